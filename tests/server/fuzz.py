"""Bodies that try to break a server: damaged files, lies in headers, odd JSON, mutations.

    python -m tests.server.fuzz --cases 1000000

Every request must be answered below 500, in time, and in bounded memory.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fastapi.testclient import TestClient
from safetensors.torch import save

from quantforge import QuantForgeConfig, QuantTensor, save_file
from quantforge.server import Settings, create_app
from tests.helpers import gaussian
from tests.mutations import mutated
from tests.server.test_tensors import JSON, NPY, SAFETENSORS, npy

MiB = 2**20
MAX_SECONDS = 20.0
MAX_GROWTH = 512 * MiB
NUMBERS: list[Any] = [0, 1, -1, 2, 63, 64, 2**31, 2**53 + 1, 2**63 - 1, 2**64, 10**30, 1e308, -0.0,
                      1e-310, float("nan"), float("inf"), None, True, "4", "", [], {}]  # fmt: skip
DTYPES = ["F32", "F16", "BF16", "F64", "U8", "I64", "BOOL", "F8_E4M3", "C64", "F4", "X", 3]


SIZES = [0, 1, 2, 8, 2**20, 2**40, 2**62, 2**64, -1]
DESCRIPTIONS = ["'<f4'", "'>f8'", "'<f2'", "'|O'", "'<i8'", "[('a','<f4')]", "'|V8'", "'<c8'",
                "'|b1'", "'<U9'", "(" * 300, "'" + "x" * 300 + "'"]  # fmt: skip
WHERE = [{}, {"year": {"gte": 1}}, {"and": []}, {"not": {"not": {}}}, {"a": {"in": [1]}}]


class Case(NamedTuple):
    """One request."""

    path: str
    media_type: str
    query: dict[str, str]
    body: bytes


class Fuzzer:
    """Makes cases from a seed and sends them to one server."""

    def __init__(self, client: TestClient, seed: int) -> None:
        self._client, self._random = client, random.Random(seed)
        self._seeds = _seeds()
        client.put("/v1/collections/a", json={"dim": 8})
        client.post("/v1/collections/a/points", json={"vectors": gaussian(20, 8).tolist()})

    def reseed(self, seed: int) -> None:
        """Go on with the cases of another seed."""
        self._random.seed(seed)

    def case(self) -> Case:
        """Return the next case."""
        rng = self._random
        path = rng.choice(
            ["/v1/compress", "/v1/decompress", "/v1/decompress", "/v1/benchmark",
             "/v1/collections/a/points", "/v1/collections/a/search", "/v1/collections/a/train"]
        )  # fmt: skip
        kind = SAFETENSORS if path == "/v1/decompress" else rng.choice([SAFETENSORS, NPY, JSON])
        query = {"background": "false"} if path.count("/") == 2 else {}
        if path == "/v1/benchmark":
            query["bits"] = str(rng.randint(1, 8))
        if path == "/v1/decompress":
            query["format"] = rng.choice(["safetensors", "npy", "json"])
        make = {SAFETENSORS: self._safetensors, NPY: self._npy, JSON: self._json}[kind]
        return Case(path, kind, query, make())

    def send(self, case: Case) -> int:
        """Send a case and return the status; raise `AssertionError` for a failure."""
        start = time.perf_counter()
        answer = self._client.post(
            case.path, content=case.body, headers={"Content-Type": case.media_type},
            params=case.query,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        assert answer.status_code < 500, f"{answer.status_code} {answer.text[:300]}"
        assert seconds < MAX_SECONDS, f"{seconds:.1f} s"
        return answer.status_code

    def _safetensors(self) -> bytes:
        rng = self._random
        if rng.random() < 0.5:
            return mutated(rng, rng.choice(self._seeds[SAFETENSORS]))
        size = rng.choice([0, 4, 32, 512])
        entry = {
            "dtype": rng.choice(DTYPES),
            "shape": [rng.choice(SIZES) for _ in range(rng.randrange(4))],
            "data_offsets": [0, rng.choice([size, size + 4, 2**62])],
        }  # fmt: skip
        header: dict[str, Any] = {rng.choice(["vectors", "ids", "x"]): entry}
        if rng.random() < 0.5:
            entries = {
                "quantforge": rng.choice(["1", "2", "3", "x"]),
                "quantforge.tensors": rng.choice(["{}", "[]", "{", json.dumps({"x": entry})]),
                "ids": rng.choice(["[1]", "[", "{}", "[" * 5000, '["a"]', "[1e400]"]),
                "metadata": rng.choice(["{}", "[", '{"a": [1]}', "null", "3"]),
            }
            names = rng.sample(sorted(entries), rng.randrange(5))
            header["__metadata__"] = {name: entries[name] for name in names}
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + rng.randbytes(size)

    def _npy(self) -> bytes:
        rng = self._random
        if rng.random() < 0.5:
            return mutated(rng, rng.choice(self._seeds[NPY]))
        shape = tuple(rng.choice(SIZES) for _ in range(rng.randrange(4)))
        fields = {
            "descr": rng.choice(DESCRIPTIONS),
            "fortran_order": rng.choice(["False", "True", "0"]),
            "shape": rng.choice([str(shape), str(shape), "'x'", "3"]),
        }
        header = f"{{{', '.join(f'{name!r}: {text}' for name, text in fields.items())}}}\n"
        version = rng.choice([b"\1\0", b"\2\0", b"\3\0", b"\x09\0"])
        length = len(header).to_bytes(2 if version[0] == 1 else 4, "little")
        data = rng.randbytes(rng.choice([0, 32, 256]))
        return b"\x93NUMPY" + version + length + header.encode() + data

    def _json(self) -> bytes:
        rng = self._random
        if rng.random() < 0.3:
            return mutated(rng, rng.choice(self._seeds[JSON]))
        row = [[rng.choice(NUMBERS) if rng.random() < 0.1 else rng.random() for _ in range(8)]
               for _ in range(rng.randrange(3))]  # fmt: skip
        fields = {
            "vectors": row,
            "queries": row,
            "k": rng.choice(NUMBERS),
            "like": rng.choice([[1], [99], ["a"]]),
            "ids": rng.choice([[1], [0, 1], [2**63 - 1], [-1], ["a"], [1.5], [True]]),
            "recall": 0.5,
            "nprobe": rng.choice(NUMBERS),
            "rerank": rng.choice(NUMBERS),
            "where": rng.choice(WHERE),
            "metadata": rng.choice([{}, {"a": [1]}, {"a": []}, {"a": [[1]]}, {"": [1]}]),
        }
        chosen = rng.sample(sorted(fields), rng.choice([1, 1, 2, 3]))
        text = json.dumps({name: fields[name] for name in chosen})
        return text.encode()


def _seeds() -> dict[str, list[bytes]]:
    """Return good bodies, to be damaged."""
    x = torch.from_numpy(gaussian(6, 8))
    packed = []
    for bits, options in ((1, {}), (4, {"estimator": "prod"}), (3, {"rotation": "qr"})):
        config = QuantForgeConfig(bits=bits, **options)
        shift = torch.ones(8) if bits == 4 else None
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "x"
            save_file({"vectors": QuantTensor.quantize(x, config, shift=shift)}, path)
            packed.append(path.read_bytes())
    plain = [save({"vectors": x}), save({"vectors": x.bfloat16(), "ids": torch.arange(6)})]
    points = {"vectors": x.tolist(), "ids": [100, 101, 102, 103, 104, 105]}
    search = {"queries": x.tolist(), "k": 3, "ids": [1, 2, 3]}
    return {
        SAFETENSORS: packed * 2 + plain,
        NPY: [npy(x.numpy()), npy(x.double().numpy())],
        JSON: [json.dumps(body).encode() for body in (points, search, {"vectors": x.tolist()})],
    }


def peak_bytes() -> int:
    """Return the greatest memory this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def run_server(cases: int, seed: int) -> dict[str, Any]:
    """Send so many cases to a server; raise `AssertionError` for the first that fails."""
    start = time.perf_counter()
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        settings = Settings(folder=Path(folder), max_vectors=10_000)
        with TestClient(create_app(settings), base_url="http://127.0.0.1:8000") as client:
            fuzzer, counts = Fuzzer(client, seed), dict[int, int]()
            for _ in range(100):  # tables are made once
                fuzzer.send(fuzzer.case())
            before = peak_bytes()
            for i in range(cases):
                case = fuzzer.case()
                try:
                    status = fuzzer.send(case)
                    assert peak_bytes() - before < MAX_GROWTH, "memory"
                except BaseException:
                    print(f"case {i} of seed {seed}: {case}", file=sys.stderr)
                    raise
                counts[status] = counts.get(status, 0) + 1
            grown = (peak_bytes() - before) / MiB
    return {
        "cases": cases,
        "seconds": round(time.perf_counter() - start, 1),
        "peak_growth_mib": round(grown, 1),
        "statuses": dict(sorted(counts.items())),
    }


def main() -> None:
    """Run until the cases are through, or one fails; say which."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(json.dumps(run_server(args.cases, args.seed)))


if __name__ == "__main__":
    main()
