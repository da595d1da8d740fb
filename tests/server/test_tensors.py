"""Compress, decompress and benchmark over HTTP; what is refused, and how."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from safetensors.torch import save

from quantforge import QuantForgeConfig, QuantPipeline, QuantTensor, load_file, save_file
from quantforge.ops.constants import rotation
from quantforge.optimizer import optimize
from quantforge.server import operations
from quantforge.server.bodies import JSON, NPY, SAFETENSORS
from tests.helpers import gaussian
from tests.server.conftest import Serve


def npy(x: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, x)
    return file.getvalue()


def post(client: TestClient, path: str, body: bytes, kind: str = SAFETENSORS, **query: Any) -> Any:
    return client.post(path, content=body, headers={"Content-Type": kind}, params=query)


def tensors(body: bytes, folder: Path) -> dict[str, torch.Tensor]:
    path = folder / "answer.safetensors"
    path.write_bytes(body)
    return load_file(path)


def error_of(answer: Any) -> dict[str, str]:
    body = answer.json()
    assert set(body) == {"error"}, body
    assert {"type", "message"} <= set(body["error"]) <= {"type", "message", "remedy"}
    return body["error"]


@pytest.mark.parametrize("path", ["/compress", "/v1/compress"])
def test_a_npy_is_compressed_as_the_pipeline_does(
    client: TestClient, tmp_path: Path, path: str
) -> None:
    x = gaussian(50, 64)
    answer = post(client, path, npy(x), NPY, bits=3, scale_rule="mse", seed=7)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == SAFETENSORS
    q = tensors(answer.content, tmp_path)["vectors"]
    assert isinstance(q, QuantTensor)
    expected = QuantPipeline(64, QuantForgeConfig(bits=3, scale_rule="mse", seed=7)).compress(x)
    assert q.spec == expected.spec
    assert torch.equal(q.packed, expected.packed)
    assert torch.equal(q.scales, expected.scales)


def test_statistics_are_measured_on_the_data(client: TestClient, tmp_path: Path) -> None:
    x = gaussian(40, 64) + 5
    q = tensors(
        post(client, "/compress", npy(x), NPY, shift=True, equalizer=True).content, tmp_path
    )["vectors"]
    assert isinstance(q, QuantTensor)
    assert q.shift is not None
    np.testing.assert_allclose(q.shift.flatten().numpy(), x.mean(0), rtol=1e-5)
    error = np.square(q.dequantize().numpy() - x).sum() / np.square(x - x.mean(0)).sum()
    assert error < 0.02


def test_a_file_of_several_tensors_goes_there_and_back(client: TestClient, tmp_path: Path) -> None:
    given = {
        "table": torch.from_numpy(gaussian(3, 20, 64)).to(torch.bfloat16),
        "wide": torch.from_numpy(gaussian(5, 768)).double(),
        "bias": torch.arange(5.0),
        "index": torch.arange(6).reshape(2, 3),
    }
    packed = post(client, "/compress", save(given, {"origin": "a test"}))
    found = tensors(packed.content, tmp_path)
    assert {name: isinstance(t, QuantTensor) for name, t in found.items()} == {
        "table": True, "wide": True, "bias": False, "index": False,
    }  # fmt: skip
    back = tensors(post(client, "/v1/decompress", packed.content).content, tmp_path)
    for name, t in given.items():
        assert back[name].shape == t.shape
        assert back[name].dtype == t.dtype
    assert torch.equal(back["bias"], given["bias"])
    assert torch.equal(back["index"], given["index"])
    expected = QuantTensor.quantize(given["wide"]).dequantize()
    assert torch.equal(back["wide"], expected)


@pytest.mark.parametrize("form", ["npy", "json"])
def test_decompress_into_other_formats(client: TestClient, form: str) -> None:
    x = gaussian(7, 64)
    packed = client.post("/compress", json={"vectors": x.tolist()}).content
    answer = post(client, "/decompress", packed, format=form)
    found = np.load(io.BytesIO(answer.content)) if form == "npy" else answer.json()["vectors"]
    expected = QuantTensor.quantize(torch.from_numpy(x)).dequantize().numpy()
    np.testing.assert_array_equal(np.asarray(found, np.float32), expected)


def test_benchmark(client: TestClient) -> None:
    answer = client.post(
        "/v1/benchmark", json={"vectors": gaussian(400, 64).tolist()}, params={"bits": [2, 4, 4]}
    )
    report = answer.json()
    assert [row["bits"] for row in report["rows"]] == [2, 4]
    assert (report["dim"], report["queries"]) == (64, 40)
    for row in report["rows"]:
        assert row["mse"] == pytest.approx(row["theory"], rel=0.1)
        assert row["vectors"] == 360
        assert row["ratio"] == pytest.approx(4 * 64 / row["bytes_per_vector"])
        assert row["bytes_per_vector"] == 64 * row["bits"] / 8 + 2
    low, high = report["rows"]
    assert low["recall"] < high["recall"] <= 1
    assert low["cosine"] < high["cosine"] < 1


def test_optimize(client: TestClient) -> None:
    query = {"accuracy": "cosine", "min_accuracy": 0.99, "sample": 100, "background": False}
    answer = post(client, "/v1/optimize", npy(gaussian(120, 32)), NPY, **query)
    assert answer.status_code == 200, answer.text
    expected = optimize(gaussian(120, 32), accuracy="cosine", min_accuracy=0.99, sample=100)
    assert answer.json()["config"] == json.loads(json.dumps(expected.to_dict()))["config"]


def test_few_vectors_have_no_recall(client: TestClient) -> None:
    body = {"vectors": gaussian(5, 64).tolist()}
    row = client.post("/benchmark", json=body, params={"bits": 4}).json()["rows"][0]
    assert row["recall"] is None


def test_nothing_stays_in_the_scratch_folder(client: TestClient, tmp_path: Path) -> None:
    post(client, "/compress", npy(gaussian(50, 64)), NPY)
    post(client, "/compress", b"no file at all", NPY)
    assert list((tmp_path / "data" / "scratch").iterdir()) == []


def header(shape: list[int], dtype: str = "F32", size: int | None = None) -> bytes:
    """Return a safetensors file that promises an array and holds none of its bytes."""
    size = 4 * int(np.prod(shape)) if size is None else size
    text = json.dumps({"x": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}).encode()
    return len(text).to_bytes(8, "little") + text


LONG = 1 << 21
NAN = gaussian(5, 64)
NAN[3, 4] = np.nan
REFUSED: dict[str, tuple[bytes, str, int, str]] = {
    "not finite": (npy(NAN), NPY, 400, "input"),
    "integers": (npy(np.arange(64).reshape(2, 32)), NPY, 400, "input"),
    "no axis": (npy(np.float32(3)), NPY, 400, "input"),
    "empty": (b"", NPY, 400, "format"),
    "text": (b"hello", NPY, 400, "format"),
    "pickled": (npy(np.array([{}], object)), NPY, 400, "format"),
    "records": (npy(np.zeros(3, [("a", "f4")])), NPY, 400, "input"),
    "cut short": (npy(gaussian(50, 64))[:-10], NPY, 400, "format"),
    "no safetensors": (b"hello, this is no file", SAFETENSORS, 400, "format"),
    "long header": (
        (1 << 21).to_bytes(8, "little") + b" " * (1 << 21),
        SAFETENSORS,
        413,
        "too_large",
    ),
    "empty safetensors": (b"", SAFETENSORS, 400, "format"),
    "promises bytes": (header([10**6, 64]), SAFETENSORS, 400, "format"),
    "4-bit floats": (header([8, 8], "F4", 32) + bytes(32), SAFETENSORS, 400, "format"),
    "great and empty": (header([2**40, 0], size=0), SAFETENSORS, 413, "too_large"),
    "long vectors": (npy(np.zeros((1, 70_000), np.float32)), NPY, 413, "too_large"),
    "QR of a long dim": (npy(np.zeros((1, 3001), np.float32)), NPY, 413, "too_large"),
    "media type": (b"{}", "text/plain", 415, "media_type"),
    "json": (b"{", JSON, 422, "schema"),
    "ragged": (b'{"vectors": [[1, 2], [3]]}', JSON, 400, "input"),
    "strings": (b'{"vectors": [["a"]]}', JSON, 422, "schema"),
    "unknown": (b'{"vectors": [[1, 2]], "bits": 4}', JSON, 422, "schema"),
    "beyond float32": (b'{"vectors": [[1e39, 0]]}', JSON, 400, "input"),
    "json infinity": (b'{"vectors": [[1e999, 0]]}', JSON, 400, "input"),
    "deep": (b'{"vectors": ' + b"[" * 10_000, JSON, 422, "schema"),
    "no numbers": (b'{"vectors": []}', JSON, 400, "input"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(shared_client: TestClient, case: str) -> None:
    body, kind, status, type = REFUSED[case]
    answer = post(shared_client, "/v1/compress", body, kind)
    assert answer.status_code == status, answer.text
    assert error_of(answer)["type"] == type
    assert shared_client.get("/health").status_code == 200


def test_the_first_bad_vector_is_named(client: TestClient) -> None:
    assert "3" in error_of(post(client, "/compress", npy(NAN), NPY))["message"]


def test_bad_settings_are_named(client: TestClient) -> None:
    answer = post(client, "/compress", npy(gaussian(2, 64)), NPY, bits=9)
    assert answer.status_code == 422
    assert "bits" in error_of(answer)["message"]
    answer = post(client, "/compress", npy(gaussian(2, 50)), NPY, rotation="hadamard")
    assert answer.status_code == 400
    assert "Hadamard" in error_of(answer)["message"]
    answer = post(client, "/compress", npy(gaussian(2, 64)), NPY, bit=4)
    assert answer.status_code == 422
    assert "bit" in error_of(answer)["message"]


def test_what_is_packed_is_not_packed_again(client: TestClient) -> None:
    packed = post(client, "/compress", npy(gaussian(5, 64)), NPY).content
    assert "packed already" in error_of(post(client, "/compress", packed))["message"]
    plain = save({"x": torch.zeros(2, 64)})
    assert "no packed tensors" in error_of(post(client, "/decompress", plain))["message"]


def test_a_small_file_cannot_expand_beyond_the_limit(serve: Serve, tmp_path: Path) -> None:
    """1-bit codes of 2^20 numbers are 131 KB; decoded they are 4 MiB."""
    client = serve(max_numbers=1 << 19)
    q = QuantTensor.quantize(torch.zeros(1 << 10, 1 << 10), QuantForgeConfig(bits=1))
    save_file({"x": q}, tmp_path / "x.safetensors")
    body = (tmp_path / "x.safetensors").read_bytes()
    assert len(body) < 1 << 18
    answer = post(client, "/decompress", body)
    assert answer.status_code == 413
    assert "1048576" in error_of(answer)["message"]


def test_matrices_of_rotations_do_not_pile_up(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seeds are the client's choice, and each has a matrix of its own."""
    monkeypatch.setattr(operations, "MAX_ROTATION_BYTES", 5 * 4 * 51 * 51)
    rotation.cache_clear()  # type: ignore[attr-defined]
    for seed in range(20):
        assert post(client, "/compress", npy(gaussian(2, 51)), NPY, seed=seed).status_code == 200
        assert rotation.cache_info().currsize <= 5  # type: ignore[attr-defined]


def test_json_does_not_hold_what_decodes_to_infinity(client: TestClient, tmp_path: Path) -> None:
    q = QuantTensor.quantize(torch.ones(1, 64))
    q.scales.fill_(torch.inf)
    save_file({"x": q}, tmp_path / "x.safetensors")
    answer = post(client, "/decompress", (tmp_path / "x.safetensors").read_bytes(), format="json")
    assert answer.status_code == 400
    assert error_of(answer)["type"] == "format"
