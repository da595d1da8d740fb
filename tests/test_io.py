from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import quantforge.io.atomic
from quantforge import (
    FormatError,
    InputError,
    QuantForgeConfig,
    QuantPipeline,
    QuantTensor,
    load_file,
    save_file,
)
from quantforge.io import create_file, open_file, read_metadata
from quantforge.io.index import parse_size

GOLDEN = Path(__file__).parent / "golden"
in_tmp = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)


def quantized(*shape: int, **config: Any) -> QuantTensor:
    x = torch.from_numpy(np.random.RandomState(sum(shape)).standard_normal(shape)).float()
    return QuantPipeline(shape[-1], QuantForgeConfig(**config)).compress(x)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if not isinstance(a, QuantTensor):
        return type(b) is torch.Tensor and a.dtype == b.dtype and torch.equal(a, b)
    kind = a.dtype == b.dtype and isinstance(b, QuantTensor) and a.container == b.container
    return kind and torch.equal(a, b)


def check_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert same(ours[name], theirs[name]), name


MIXED = {
    "k": quantized(2, 3, 16, bits=3),
    "v": quantized(4, 12, shift=True, equalizer=True, estimator="prod"),
    "plain": torch.arange(5),
    "half": torch.ones(2, 2, dtype=torch.bfloat16),
}


# ---- round trips ---------------------------------------------------------------------------


def test_mixed_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(MIXED, path, metadata={"note": "größer"})
    check_same(load_file(path), MIXED)
    assert read_metadata(path) == {"note": "größer"}
    check_same(load_file(path, names=["v"]), {"v": MIXED["v"]})


@in_tmp
@given(
    bits=st.integers(2, 8),
    dim=st.sampled_from([1, 5, 8, 12, 20]),
    lead=st.lists(st.integers(0, 3), max_size=3),
    estimator=st.sampled_from(["mse", "prod"]),
    scale_dtype=st.sampled_from(["float16", "float32"]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    statistics=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_code_round_trips(
    tmp_path: Path, bits: int, dim: int, lead: list[int], dtype: torch.dtype, statistics: bool,
    **config: Any,
) -> None:  # fmt: skip
    settings_ = QuantForgeConfig(bits=bits, shift=statistics, equalizer=statistics, **config)
    q = QuantPipeline(dim, settings_).compress(torch.randn(*lead, dim).to(dtype))
    save_file({"q": q}, tmp_path / "a.safetensors")
    check_same(load_file(tmp_path / "a.safetensors"), {"q": q})


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float16, torch.float8_e4m3fn, torch.int8, torch.uint64, torch.bool,
     torch.complex64],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3)])
def test_plain_dtypes_as_the_safetensors_package_reads_them(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    t = torch.randint(0, 2, shape).to(dtype)
    save_file({"odd": torch.zeros(3, dtype=torch.uint8), "t": t}, tmp_path / "a.safetensors")
    for load in (load_file, safetensors.torch.load_file):
        got = load(tmp_path / "a.safetensors")["t"]
        assert got.dtype == dtype
        assert got.shape == t.shape
        assert torch.equal(got.view(torch.uint8) if shape else got.to(torch.complex64),
                           t.view(torch.uint8) if shape else t.to(torch.complex64))  # fmt: skip


def test_views_and_shared_memory(tmp_path: Path) -> None:
    x, q = torch.randn(4, 6), quantized(6, 4, 16)
    tensors = {"x": x, "t": x.T, "row": x[1], "q": q[::2, 1:3], "p": torch.nn.Parameter(x)}
    tensors["conj"] = torch.tensor([1 + 2j]).conj()
    save_file(tensors, tmp_path / "a.safetensors")
    loaded = load_file(tmp_path / "a.safetensors")
    for name in ("x", "t", "row", "p", "conj"):
        assert torch.equal(loaded[name], tensors[name].detach().resolve_conj()), name
    assert torch.equal(loaded["q"], tensors["q"])


def test_lazy_repetition_is_carried_out(tmp_path: Path) -> None:
    q = quantized(1, 2, 3, 16)
    repeated = q[:, :, None].expand(1, 2, 4, 3, 16).reshape(1, 8, 3, 16)
    save_file({"k": repeated}, tmp_path / "a.safetensors")
    loaded = load_file(tmp_path / "a.safetensors")["k"]
    assert torch.equal(loaded.dequantize(), q.dequantize().repeat_interleave(4, dim=1))


def test_same_content_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file(MIXED, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_open_file_lists_without_loading(tmp_path: Path) -> None:
    save_file(MIXED, tmp_path / "a.safetensors")
    with open_file(tmp_path / "a.safetensors") as file:
        assert set(file) == set(MIXED)
        assert len(file) == 4
        assert "k.packed" not in file
        info = file.info("k")
        assert (info.shape, info.dtype, info.spec) == ((2, 3, 16), torch.float32, MIXED["k"].spec)
        assert info.nbytes == MIXED["k"].nbytes_packed
        assert file.info("plain").spec is None
        q = file["k"]
    assert torch.equal(q, MIXED["k"])  # tensors outlive the file


def test_loading_is_lazy_and_never_writes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(48 << 20, dtype=torch.uint8)}, path)
    before = psutil.Process().memory_info().rss
    x = load_file(path)["x"]
    assert psutil.Process().memory_info().rss - before < 8 << 20
    x[:10] = 1
    assert int(load_file(path)["x"][:10].sum()) == 0


def test_file_mode_follows_the_umask(tmp_path: Path) -> None:
    save_file(MIXED, tmp_path / "a")
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


# ---- what cannot be saved ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"": torch.ones(1)}, "non-empty"),
        ({1: torch.ones(1)}, "non-empty"),
        ({"__metadata__": torch.ones(1)}, "__metadata__"),
        ({"\ud800": torch.ones(1)}, "Unicode"),
        ({"k": MIXED["k"], "k.packed": torch.ones(1)}, "reserved"),
        ({"k": MIXED["k"], "k.shift": torch.ones(1)}, "reserved"),
        ({"k": MIXED["k"], "k.scales": MIXED["k"]}, "reserved"),
        ({"k": MIXED["k"].mT}, r"\.mT"),
        ({"k": np.ones(3)}, "from_numpy"),
        ({"k": None}, "NoneType"),
        ({"k": torch.eye(2).to_sparse()}, "dense"),
        ({"k": torch.ones(1, dtype=torch.complex128)}, "complex128"),
        ({"k": torch.ones(1, device="meta")}, "meta"),
        (torch.ones(1), "save_file"),
    ],
)
def test_refused_tensors(tmp_path: Path, tensors: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        save_file(tensors, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("metadata", [{"a": 1}, {1: "a"}, {"quantforge.x": "a"}, {"a": "\ud800"}])
def test_refused_metadata(tmp_path: Path, metadata: Any) -> None:
    with pytest.raises(InputError, match="metadata"):
        save_file(MIXED, tmp_path / "a.safetensors", metadata=metadata)


def test_refused_arguments(tmp_path: Path) -> None:
    save_file(MIXED, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="no tensors"):
        load_file(tmp_path / "a.safetensors", names=["nope"])
    with pytest.raises(InputError, match="list of names"):
        load_file(tmp_path / "a.safetensors", names="k")
    with pytest.raises(InputError, match="index"):
        save_file(MIXED, tmp_path / "a.safetensors.index.json")
    with pytest.raises(FileNotFoundError):
        load_file(tmp_path / "none")
    with pytest.raises(IsADirectoryError):
        load_file(tmp_path)


# ---- row by row ----------------------------------------------------------------------------


def test_create_file_appends_rows(tmp_path: Path) -> None:
    q, x = quantized(10, 16, shift=True), torch.randn(10, 3)
    with create_file(tmp_path / "a", {"q": q, "x": x.to("meta")}) as file:
        for rows in (slice(0, 4), slice(4, 4), slice(4, 10)):
            file.write("q", q[rows])
            file.write("x", x[rows])
    check_same(load_file(tmp_path / "a"), {"q": q, "x": x})


def test_create_file_refuses_what_was_not_declared(tmp_path: Path) -> None:
    q = quantized(4, 16, shift=True)
    other = quantized(5, 16, shift=True)
    wrong: list[tuple[Callable[[Any], object], str]] = [
        (lambda f: f.write("x", q), "declared"),
        (lambda f: f.write("q", torch.ones(4, 16)), "must be"),
        (lambda f: (f.write("q", q), f.write("q", q[:1])), "more rows"),
        (lambda f: (f.write("q", q[:1]), f.write("q", other[:1])), "differs"),
        (lambda f: f.write("q", q[:3]), "incomplete"),
    ]
    for action, message in wrong:
        with (
            pytest.raises(InputError, match=message),
            create_file(tmp_path / "a", {"q": q}) as file,
        ):
            action(file)
    assert list(tmp_path.iterdir()) == []


# ---- shards --------------------------------------------------------------------------------


def files_in(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_shards_round_trip_and_are_readable_alone(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file(MIXED, path, max_shard_size=100, metadata={"a": "b"})
    index = json.loads((tmp_path / "m.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert files_in(tmp_path) == {*shards, "m.safetensors.index.json"}
    assert len(shards) > 1
    for where in (path, tmp_path / "m.safetensors.index.json"):
        check_same(load_file(where), MIXED)
        assert read_metadata(where) == {"a": "b"}
    together: dict[str, torch.Tensor] = {}
    for shard in shards:
        together |= load_file(tmp_path / shard)  # no tensor is split
    check_same({name: together[name] for name in MIXED}, MIXED)
    total = sum(file.nbytes for file in _infos(path))
    assert index["metadata"]["total_size"] == total


def _infos(path: Path) -> list[Any]:
    with open_file(path) as file:
        return [file.info(name) for name in file]


def test_sets_replace_each_other_and_leave_nothing(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    unrelated = tmp_path / "m-00001-of-00002.safetensors"
    unrelated.touch()
    few = {"k": MIXED["k"]}
    for tensors, size in ((MIXED, 100), (few, 100), (MIXED, 200), (MIXED, None), (MIXED, 100)):
        save_file(tensors, path, max_shard_size=size)
        check_same(load_file(path), tensors)
        index = tmp_path / "m.safetensors.index.json"
        expected = {unrelated.name}
        if size is not None and tensors is MIXED:
            expected |= {index.name, *json.loads(index.read_text())["weight_map"].values()}
        else:
            expected |= {path.name}
        assert files_in(tmp_path) == expected
    with create_file(path, few) as file:
        file.write("k", few["k"])
    check_same(load_file(path), few)


@pytest.mark.parametrize(
    ("size", "expected"), [(7, 7), ("7", 7), ("5GB", 5 * 10**9), ("1.5 KiB", 1536), ("2TB", 2e12)]
)
def test_sizes(size: int | str, expected: int) -> None:
    assert parse_size(size) == expected


@pytest.mark.parametrize("size", [0, -1, "", "5 bananas", "GB", "-5GB", 1e400, "5gb "])
def test_bad_sizes(size: Any) -> None:
    with pytest.raises(InputError, match="max_shard_size"):
        parse_size(size)


def test_damaged_indexes(tmp_path: Path) -> None:
    path, index = tmp_path / "m.safetensors", tmp_path / "m.safetensors.index.json"
    save_file(MIXED, path, max_shard_size=100)
    good = json.loads(index.read_text())
    first = min(good["weight_map"].values())
    save_file({"k": MIXED["k"]}, tmp_path / "other.safetensors")

    def check(message: str, **changes: Any) -> None:
        index.write_text(json.dumps(good | changes))
        with pytest.raises(FormatError, match=message):
            load_file(path)

    check("weight_map", weight_map={})
    check("weight_map", weight_map=[])
    check("metadata", metadata=None)
    check("not written by quantforge", metadata={})
    check("version '9'", metadata={"quantforge": "9"})
    for name in ("../x", "/etc/passwd", "", "..", "a\\b", 7, "a\0b"):
        check("weight_map", weight_map={"k": name})
    weights = dict(good["weight_map"])
    check("also holds", weight_map={k: v for k, v in weights.items() if k != "k.packed"})
    check("lacks 'zz'", weight_map=weights | {"zz": first})
    check("missing", weight_map=weights | {"zz": "gone.safetensors"})
    elsewhere = {"k.packed": "other.safetensors", "k.scales": "other.safetensors"}
    del weights["k.packed"], weights["k.scales"]
    check("also holds|lacks", weight_map=weights | {"plain": "other.safetensors"})
    index.write_text(json.dumps(good | {"weight_map": weights | elsewhere}))
    check_same(load_file(path), MIXED)  # shards may come from anywhere if the index says so
    index.write_bytes(b"\xff\xfe")
    with pytest.raises(FormatError, match="UTF-8"):
        load_file(path)
    index.write_text("[" * 100_000)
    with pytest.raises(FormatError, match="JSON"):
        load_file(path)


# ---- a save is atomic ----------------------------------------------------------------------

OLD = {"k": quantized(3, 16), "x": torch.arange(3)}


@pytest.mark.parametrize("size", [None, 100])
@pytest.mark.parametrize("old_size", [None, 30])
@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failure_leaves_the_old_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int | None, old_size: int | None,
    broken: str,
) -> None:  # fmt: skip
    path = tmp_path / "m.safetensors"
    save_file(OLD, path, max_shard_size=old_size)
    before = files_in(tmp_path)
    real, calls = getattr(os, broken), 0

    def fail_at(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2 or size is None:
            raise OSError("disk full")
        return real(*args)

    monkeypatch.setattr(quantforge.io.atomic.os, broken, fail_at)
    with pytest.raises(OSError, match="disk full"):
        save_file(MIXED, path, max_shard_size=size)
    monkeypatch.undo()
    assert files_in(tmp_path) == before
    check_same(load_file(path), OLD)


KILL = """
import os, signal, sys, torch
from quantforge import save_file
import quantforge.io.atomic, pathlib
path, size, moment = sys.argv[1], int(sys.argv[2]) or None, int(sys.argv[3])
count = 0
def dying(real):
    def call(*args, **kwargs):
        global count
        count += 1
        if count == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return call
for name in ("fsync", "replace"):
    setattr(os, name, dying(getattr(os, name)))
pathlib.Path.unlink = dying(pathlib.Path.unlink)
save_file({"x": torch.full((50,), 2), "y": torch.full((50,), 2)}, path, max_shard_size=size)
print("saved", count)
"""


def save_and_die(path: Path, size: int, moment: int) -> int:
    command = [sys.executable, "-c", KILL, str(path), str(size), str(moment)]
    return subprocess.run(command, capture_output=True, check=False).returncode


def test_a_failure_behind_the_switch_keeps_the_new_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index is replaced, then the folder's sync fails: what the index names must stay."""
    path = tmp_path / "m.safetensors"
    index = tmp_path / "m.safetensors.index.json"
    new = {f"x{i}": torch.full((100,), float(i)) for i in range(4)}
    sync = quantforge.io.atomic.sync_folder

    def fail_once_switched(folder: Path) -> None:
        if index.exists():
            raise KeyboardInterrupt
        sync(folder)

    monkeypatch.setattr(quantforge.io.atomic, "sync_folder", fail_once_switched)
    with pytest.raises(KeyboardInterrupt):
        quantforge.save_file(new, path, max_shard_size=400)
    loaded = quantforge.load_file(path)
    assert all(torch.equal(loaded[name], value) for name, value in new.items())


@pytest.mark.parametrize(
    ("old_size", "new_size", "moments"),
    [(0, 0, (1, 2, 3)), (0, 400, (7, 8, 9, 10)), (400, 0, (2, 3, 4, 6))],
)
def test_a_kill_leaves_the_old_or_the_new(
    tmp_path: Path, old_size: int, new_size: int, moments: tuple[int, ...]
) -> None:
    outcomes = []
    for moment in moments:
        path = tmp_path / str(moment) / "m.safetensors"
        path.parent.mkdir()
        old = {name: torch.full((50,), 1) for name in "xy"}
        save_file(old, path, max_shard_size=old_size or None)
        assert save_and_die(path, new_size, moment) == -signal.SIGKILL
        values = {int(v) for t in load_file(path).values() for v in t}
        assert values in ({1}, {2})
        outcomes.append(values.pop())
        save_file(old, path)  # and nothing is in the way of the next save
        assert int(load_file(path)["x"][0]) == 1
    assert set(outcomes) == {1, 2}  # the moments straddle the switch


def test_readers_never_see_half_a_set(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    sets = [{name: torch.full((50,), i) for name in "xyz"} for i in range(2)]
    save_file(sets[0], path, max_shard_size=400)
    stop = threading.Event()

    def write() -> None:
        try:
            for i in range(60):
                save_file(sets[i % 2], path, max_shard_size=(None, 400, 400)[i % 3])
        finally:
            stop.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not stop.is_set():
        assert len({int(t[0]) for t in load_file(path).values()}) == 1
    writer.join()


# ---- golden file ---------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [96, 160, 224])
def test_old_rotations_are_refused(tmp_path: Path, dim: int) -> None:
    path = tmp_path / "old.safetensors"
    save_file({"k": QuantPipeline(dim).compress(torch.randn(2, dim))}, path)
    assert load_file(path)["k"].shape == (2, dim)
    data = path.read_bytes()
    assert data.count(b'"quantforge":"2"') == 1
    path.write_bytes(data.replace(b'"quantforge":"2"', b'"quantforge":"1"'))
    with pytest.raises(FormatError, match=rf"'k': dim {dim} .*quantize the original vectors"):
        load_file(path)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_golden_file_loads_for_ever(version: str) -> None:
    about = json.loads((GOLDEN / f"format_{version}.json").read_text())
    loaded = load_file(GOLDEN / f"format_{version}.safetensors")
    assert loaded.keys() == about.keys()
    with np.load(GOLDEN / f"format_{version}.npz") as values:
        for name, t in loaded.items():
            expected = about[name]
            assert list(t.shape) == expected["shape"], name
            assert str(t.dtype) == expected["dtype"], name
            dense = t
            if isinstance(t, QuantTensor):
                assert (t.spec.key, t.container) == (expected["spec"], expected["container"]), name
                dense = t.dequantize()
            else:
                assert expected["spec"] is None, name
            peak = np.abs(values[name]).max(initial=0)
            rounding = torch.finfo(t.dtype).eps if t.dtype.is_floating_point else 0
            error = np.abs(dense.double().numpy() - values[name]).max(initial=0)
            assert error <= 2 * max(rounding, 2**-22) * peak, name


# ---- damaged files -------------------------------------------------------------------------


def raw_file(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None) -> None:
    safetensors.torch.save_file(tensors, path, metadata)


PARTS = {"k.packed": MIXED["k"].packed, "k.scales": MIXED["k"].scales}
ENTRY = {
    "spec": {
        "dim": 16, "bits": 3, "rotation": "hadamard", "seed": 0, "codebook": "lloyd_max",
        "scale_rule": "unbiased", "estimator": "mse", "scale_dtype": "float16",
    },
    "shape": [2, 3, 16],
    "dtype": "float32",
    "container": "torch",
    "parts": ["packed", "scales"],
}  # fmt: skip


def with_entry(path: Path, entry: Any, parts: dict[str, torch.Tensor] | None = None) -> Path:
    metadata = {"quantforge": "1", "quantforge.tensors": json.dumps({"k": entry})}
    raw_file(path, PARTS if parts is None else parts, metadata)
    return path


def test_a_file_put_together_by_the_documentation_loads(tmp_path: Path) -> None:
    loaded = load_file(with_entry(tmp_path / "a", ENTRY))
    check_same(loaded, {"k": MIXED["k"]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": [2, 3, 17]}, r"shape must be \[2, 3, 16\]"),
        ({"shape": [2**70]}, "shape"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"dtype": ["float32"]}, "dtype"),
        ({"container": "pickle"}, "container"),
        ({"parts": ["packed"]}, "parts must list"),
        ({"parts": ["packed", "scales", "code"]}, "parts must list"),
        ({"parts": ["packed", "scales", "scales"]}, "parts must list"),
        ({"parts": [["packed"], {}]}, "parts must list"),
        ({"parts": ["packed", "scales", "shift"]}, "'k.shift' is missing"),
        ({"extra": 1}, "must have the fields"),
        ({"spec": None}, "spec must have the fields"),
    ],
)
def test_wrong_fields(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        load_file(with_entry(tmp_path / "a", ENTRY | changes))
    assert "tensor 'k'" in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("codebook", "os.system", "codebook must be one of"),
        ("dim", 12, "shape must be"),
        ("dim", 2**62, "dim must be"),
        ("bits", 8, "rows of"),
        ("bits", True, "bits"),
        ("bits", 4.0, "bits"),
        ("seed", -1, "seed"),
        ("rotation", {}, "rotation"),
        ("estimator", "prod", "scales of"),
        ("scale_dtype", "float32", "scales"),
        ("new_field", 1, "must have the fields"),
    ],
)
def test_wrong_specs(tmp_path: Path, field: str, value: Any, message: str) -> None:
    entry = ENTRY | {"spec": ENTRY["spec"] | {field: value}}  # type: ignore[operator]
    with pytest.raises(FormatError, match=message):
        load_file(with_entry(tmp_path / "a", entry))


def test_wrong_arrays(tmp_path: Path) -> None:
    packed, scales = PARTS.values()
    wrong = [
        ({"k.packed": packed}, "'k.scales' is missing"),
        ({"k.packed": packed, "k.scales": scales[:1].clone()}, "scales"),
        ({"k.packed": packed.int(), "k.scales": scales}, "uint8"),
        ({"k.packed": packed[..., :5].clone(), "k.scales": scales}, "rows of"),
        (PARTS | {"k.shift": torch.zeros(16)}, "not listed"),
        (PARTS | {"k": torch.zeros(16)}, "not listed"),
    ]
    for parts, message in wrong:
        with pytest.raises(FormatError, match=message):
            load_file(with_entry(tmp_path / "a", ENTRY, parts))
    with_shift = ENTRY | {"parts": ["packed", "scales", "shift"]}
    for shift in (torch.zeros(15), torch.zeros(16, dtype=torch.int32), torch.zeros(3, 16)):
        with pytest.raises(FormatError, match="shift"):
            load_file(with_entry(tmp_path / "a", with_shift, PARTS | {"k.shift": shift}))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "safetensors.torch.load_file"),
        ({"format": "pt"}, "safetensors.torch.load_file"),
        ({"quantforge": "3"}, "version '3'.*upgrade"),
        ({"quantforge": "one"}, "version 'one'"),
        ({"quantforge": "1"}, "quantforge.tensors"),
        ({"quantforge": "1", "quantforge.tensors": "{"}, "not valid JSON"),
        ({"quantforge": "1", "quantforge.tensors": "[" * 99_999}, "not valid JSON"),
        ({"quantforge": "1", "quantforge.tensors": "9" * 9_999}, "not valid JSON"),
        ({"quantforge": "1", "quantforge.tensors": "[]"}, "object"),
    ],
)
def test_wrong_metadata(tmp_path: Path, metadata: dict[str, str] | None, message: str) -> None:
    raw_file(tmp_path / "a", PARTS, metadata)
    with pytest.raises(FormatError, match=message):
        load_file(tmp_path / "a")


def crafted(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps({"__metadata__": {"quantforge": "1", "quantforge.tensors": "{}"}} | header)
    return len(text).to_bytes(8, "little") + text.encode() + data


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({"a": {"dtype": "F32", "shape": [2**63, 0], "data_offsets": [0, 0]}}, b""),
        ({"a": {"dtype": "F8_E8M0", "shape": [2], "data_offsets": [0, 2]}}, b"xy"),
        ({"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}, b"xy"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"12345678"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 400]}}, b"1234"),
    ],
)
def test_crafted_headers(tmp_path: Path, header: dict[str, Any], data: bytes) -> None:
    (tmp_path / "a").write_bytes(crafted(header, data))
    with pytest.raises(FormatError):
        load_file(tmp_path / "a")


# ---- fuzzing: nothing but FormatError escapes ----------------------------------------------


def only_format_error(path: Path, content: bytes) -> None:
    # a new file each time: overwriting one that is mapped would change tensors in use
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    try:
        for t in load_file(path).values():
            if isinstance(t, QuantTensor):
                t.dequantize()
    except FormatError:
        pass


GOLDEN_BYTES = (GOLDEN / "format_v1.safetensors").read_bytes()
HEADER_END = 8 + int.from_bytes(GOLDEN_BYTES[:8], "little")


@in_tmp
@given(end=st.integers(0, len(GOLDEN_BYTES) - 1))
def test_truncated_files(tmp_path: Path, end: int) -> None:
    (tmp_path / "a").unlink(missing_ok=True)
    (tmp_path / "a").write_bytes(GOLDEN_BYTES[:end])
    with pytest.raises(FormatError):
        load_file(tmp_path / "a")


@settings(in_tmp, max_examples=300)
@given(
    st.lists(st.tuples(st.integers(0, HEADER_END - 1), st.integers(0, 255)), min_size=1, max_size=4)
)
def test_mutated_headers(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    content = bytearray(GOLDEN_BYTES)
    for position, byte in changes:
        content[position] = byte
    only_format_error(tmp_path / "a", bytes(content))


@in_tmp
@given(st.binary(max_size=300))
def test_arbitrary_bytes(tmp_path: Path, content: bytes) -> None:
    only_format_error(tmp_path / "a", content)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@settings(in_tmp, max_examples=300)
@given(data=st.data())
def test_random_entries(tmp_path: Path, data: st.DataObject) -> None:
    entry: Any = json.loads(json.dumps(ENTRY))
    target = entry["spec"] if data.draw(st.booleans()) else entry
    target[data.draw(st.sampled_from([*target, "new"]))] = data.draw(JSON)
    table = data.draw(JSON) if data.draw(st.integers(0, 9)) == 0 else {"k": entry}
    metadata = {"quantforge": "1", "quantforge.tensors": json.dumps(table)}
    only_format_error(tmp_path / "a", safetensors.torch.save(PARTS, metadata))
