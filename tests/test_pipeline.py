from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import quantforge.arrays
from quantforge import (
    FormatError,
    InputError,
    QuantForgeConfig,
    QuantPipeline,
    QuantTensor,
    load_file,
)
from quantforge.arrays import pieces
from quantforge.numerics.statistics import measure
from quantforge.pipeline import Statistics

BOTH = QuantForgeConfig(shift=True, equalizer=True)
RANDOM = np.random.RandomState(0)
LOUD = (RANDOM.standard_normal((500, 16)) * np.linspace(0.1, 5, 16) + 100).astype(np.float32)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(quantforge.arrays.CHUNK_NUMBERS, "cpu", 64)


def relative_error(x: Any, y: Any) -> float:
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return float(np.square(x - y).sum() / np.square(x).sum())


# ---- what goes in comes out ----------------------------------------------------------------


@given(
    lead=st.lists(st.integers(0, 4), max_size=3),
    dim=st.sampled_from([1, 5, 8, 12]),
    kind=st.sampled_from([
        np.float16, np.float32, np.float64, ">f4",
        torch.float16, torch.bfloat16, torch.float32, torch.float64,
    ]),
    config=st.sampled_from([QuantForgeConfig(), BOTH, QuantForgeConfig(bits=8, estimator="prod")]),
)  # fmt: skip
def test_container_dtype_and_shape_return(
    lead: list[int], dim: int, kind: Any, config: QuantForgeConfig
) -> None:
    values = np.random.RandomState(1).standard_normal((*lead, dim))
    x: Any = torch.from_numpy(values).to(kind) if isinstance(kind, torch.dtype) else None
    x = values.astype(kind) if x is None else x
    pipeline = QuantPipeline(dim, config)
    q = pipeline.compress(x)
    assert isinstance(q, QuantTensor)
    assert q.container == ("torch" if isinstance(x, torch.Tensor) else "numpy")
    y = pipeline.decompress(q)
    assert type(y) is type(x)
    assert y.dtype == (x.dtype if isinstance(x, torch.Tensor) else x.dtype.newbyteorder("="))
    assert tuple(y.shape) == tuple(q.shape) == tuple(x.shape)
    assert bool((y == y).all())


@pytest.mark.parametrize("statistics", [False, True])
def test_compress_is_quantize(small_chunks: None, statistics: bool) -> None:
    x = torch.from_numpy(LOUD).view(5, 100, 16)
    pipeline = QuantPipeline(16, BOTH if statistics else QuantForgeConfig())
    shift, equalizer = found = pipeline.measure(x)
    expected = QuantTensor.quantize(x, pipeline.spec, shift=shift, equalizer=equalizer)
    for data in (x, x.numpy(), x.transpose(0, 1).contiguous().transpose(0, 1), x.numpy()[:, :]):
        q = pipeline.compress(data)
        assert torch.equal(q.packed, expected.packed)
        assert torch.equal(q.scales, expected.scales)
        assert torch.equal(q.dequantize(), expected.dequantize())
    assert torch.equal(pipeline.compress(x, statistics=found), expected)


@pytest.mark.parametrize("array", [LOUD[::-1], LOUD[::2], np.asfortranarray(LOUD), LOUD[3]])
def test_any_strides(small_chunks: None, array: np.ndarray) -> None:
    pipeline = QuantPipeline(16)
    frozen = array.copy()
    frozen.flags.writeable = False
    assert torch.equal(pipeline.compress(array), pipeline.compress(frozen))


class Dataset:
    """What an h5py dataset offers: shape, dtype and slices that are read from elsewhere."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape, self.dtype, self.ndim = array, array.shape, array.dtype, array.ndim
        self.largest = 0

    def __getitem__(self, index: Any) -> np.ndarray:
        part = self.array[index]
        self.largest = max(self.largest, part.size)
        return part


def test_sliceable_datasets_are_read_in_pieces(small_chunks: None) -> None:
    data, pipeline = Dataset(LOUD), QuantPipeline(16, BOTH)
    assert torch.equal(pipeline.compress(data), pipeline.compress(LOUD))
    assert data.largest == 64


@pytest.mark.parametrize("shape", [(7, 3), (2, 5, 3), (3, 2, 2, 3), (0, 3), (1, 100)])
def test_pieces_cover_all_rows_in_order(shape: tuple[int, ...]) -> None:
    x = np.arange(np.prod(shape)).reshape(shape)
    parts = [part.reshape(-1, shape[-1]) for part in pieces(x, 6)]
    joined = np.concatenate(parts) if parts else np.empty((0, shape[-1]))
    assert np.array_equal(joined, x.reshape(-1, shape[-1]))


def test_gradients_are_not_needed() -> None:
    x = torch.randn(3, 16, requires_grad=True)
    assert not QuantPipeline(16, BOTH).compress(x).requires_grad


def test_numpy_has_no_bfloat16() -> None:
    pipeline = QuantPipeline(16)
    q = pipeline.compress(LOUD).to(torch.bfloat16)
    with pytest.raises(InputError, match=r"to\(torch\.float32\)"):
        pipeline.decompress(q)


# ---- statistics ----------------------------------------------------------------------------


@given(
    n=st.integers(1, 60),
    offset=st.sampled_from([0.0, 1.0, 1e5]),
    cuts=st.lists(st.integers(0, 60), max_size=4),
)
def test_streamed_statistics_are_those_of_numerics(n: int, offset: float, cuts: list[int]) -> None:
    x = np.random.RandomState(n).standard_normal((n, 8)) * np.arange(1, 9) + offset
    shift, equalizer = measure(x)
    found = QuantPipeline(8, BOTH).measure(np.split(x, sorted(cuts)))
    assert found.shift is not None
    assert found.equalizer is not None
    np.testing.assert_allclose(found.shift.numpy(), shift[0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.equalizer.numpy(), equalizer[0], rtol=1e-6)


def test_equalizer_alone_measures_about_zero() -> None:
    found = QuantPipeline(16, QuantForgeConfig(equalizer=True)).measure(LOUD)
    rms = np.sqrt(np.square(LOUD.astype(np.float64)).mean(0))
    assert found.shift is None
    assert found.equalizer is not None
    np.testing.assert_allclose(found.equalizer.numpy(), np.sqrt(rms / rms.max()), rtol=1e-6)


def test_statistics_help_shifted_and_uneven_data() -> None:
    centred = LOUD - LOUD.mean(0)
    errors = []
    for config in (QuantForgeConfig(), QuantForgeConfig(shift=True)):
        pipeline = QuantPipeline(16, config)
        y = pipeline.decompress(pipeline.compress(LOUD))
        errors.append(np.square(y - LOUD).sum() / np.square(centred).sum())
    assert errors[1] < 0.02 < 10 * errors[1] < errors[0]


def test_no_statistics_of_no_data() -> None:
    q = QuantPipeline(16, BOTH).compress(LOUD[:0])
    assert q.shift is not None
    assert q.equalizer is not None
    assert bool((q.shift == 0).all())
    assert bool((q.equalizer == 1).all())


# ---- streams -------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [QuantForgeConfig(), BOTH])
def test_streams_give_the_codes_of_the_whole(config: QuantForgeConfig) -> None:
    pipeline, chunks = QuantPipeline(16, config), np.split(LOUD, [0, 100, 101])
    codes = list(pipeline.compress_stream(chunks))
    assert torch.equal(torch.cat(codes), pipeline.compress(LOUD))
    restored = np.concatenate(list(pipeline.decompress_stream(codes)))
    assert np.allclose(restored, pipeline.decompress(pipeline.compress(LOUD)), atol=1e-5)


def test_a_one_pass_stream_needs_statistics() -> None:
    pipeline = QuantPipeline(16, BOTH)
    with pytest.raises(InputError, match="only once"):
        pipeline.compress_stream(iter([LOUD]))
    codes = list(pipeline.compress_stream(iter([LOUD]), statistics=pipeline.measure(LOUD)))
    assert torch.equal(codes[0], pipeline.compress(LOUD))


def test_streams_are_lazy() -> None:
    def chunks() -> Any:
        yield LOUD
        raise AssertionError("read too early")

    assert next(iter(QuantPipeline(16).compress_stream(chunks()))).shape == LOUD.shape


# ---- files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(500, 16), (5, 100, 16), (16,), (0, 16), (2, 0, 16)])
@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_files_round_trip(
    tmp_path: Path, small_chunks: None, shape: tuple[int, ...], dtype: Any
) -> None:
    x = LOUD.ravel()[: np.prod(shape)].reshape(shape).astype(dtype)
    np.save(tmp_path / "x.npy", x)
    pipeline, packed = QuantPipeline(16, BOTH), tmp_path / "x.safetensors"
    pipeline.compress_file(tmp_path / "x.npy", packed, metadata={"a": "b"})
    q = load_file(packed)["vectors"]
    assert torch.equal(q, pipeline.compress(x))
    pipeline.decompress_file(packed, tmp_path / "y.npy")
    y = np.load(tmp_path / "y.npy")
    assert (y.dtype, y.shape) == (x.dtype, x.shape)
    assert np.allclose(y, pipeline.decompress(q), rtol=1e-3)


def test_file_errors(tmp_path: Path) -> None:
    pipeline, target = QuantPipeline(16), tmp_path / "a.safetensors"
    (tmp_path / "x.npy").write_bytes(b"not numpy")
    with pytest.raises(FormatError, match="npy"):
        pipeline.compress_file(tmp_path / "x.npy", target)
    with pytest.raises(InputError, match="vector 7 holds NaN"):
        pipeline.compress_file(with_nan(LOUD, 7), target)
    assert not target.exists()
    pipeline.compress_file(LOUD, target, name="a")
    with pytest.raises(InputError, match=r"\['a'\]"):
        pipeline.decompress_file(target, tmp_path / "y.npy", name="b")
    with pytest.raises(InputError, match="dim"):
        QuantPipeline(8).decompress_file(target, tmp_path / "y.npy")
    pipeline.compress_file(torch.ones(2, 16).bfloat16(), target)
    with pytest.raises(InputError, match="bfloat16"):
        pipeline.decompress_file(target, tmp_path / "y.npy")
    assert {p.name for p in tmp_path.iterdir()} == {"x.npy", "a.safetensors"}


CONSTANT_MEMORY = """
import resource, sys
import numpy as np
from quantforge import QuantForgeConfig, QuantPipeline
pipeline = QuantPipeline(64, QuantForgeConfig(bits=1, shift=True, equalizer=True))
folder = sys.argv[1]
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[2]), int(sys.argv[2])))
pipeline.compress_file(folder + "/x.npy", folder + "/x.safetensors")
pipeline.compress(np.load(folder + "/x.npy", mmap_mode="r"))
pipeline.decompress_file(folder + "/x.safetensors", folder + "/y.npy")
"""


def test_memory_is_constant(tmp_path: Path) -> None:
    """The data (512 MiB) exceed the memory that the process may have beyond its libraries."""
    shape = (1 << 20, 64)
    x = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float64, shape)
    x[:, 0] = 1  # the rest is a hole in the file
    del x
    probe = "import quantforge, quantforge.io, quantforge.pipeline, tqdm;" \
        "print([l for l in open('/proc/self/status') if 'VmData' in l][0].split()[1])"  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # each thread's stack counts as data
    base = int(subprocess.check_output([sys.executable, "-c", probe], env=env)) * 1024
    limit = base + (256 << 20)
    command = [sys.executable, "-c", CONSTANT_MEMORY, str(tmp_path), str(limit)]
    subprocess.run(command, check=True, timeout=120, env=env)
    y = np.load(tmp_path / "y.npy", mmap_mode="r")
    assert y.shape == shape
    assert np.allclose(y[::10_000, 0], 1, atol=0.1)


# ---- refused -------------------------------------------------------------------------------


def with_nan(x: np.ndarray, *index: int, value: float = np.nan) -> np.ndarray:
    x = x.copy()
    x[(*index, 3)] = value
    return x


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.arange(16), r"astype\(np.float32\)"),
        (np.ones(16, complex), r"x\.real"),
        (np.ones(16, np.longdouble), "float64"),
        (np.ones(16, object), "float32"),
        (np.ma.masked_array(np.ones(16)), "filled"),
        (torch.arange(16), r"x\.float\(\)"),
        (torch.ones(16, dtype=torch.complex64), r"x\.real"),
        (torch.eye(16).to_sparse(), "to_dense"),
        ([1.0] * 16, "np.asarray"),
        ((LOUD,), "compress_stream"),
        (None, "NoneType"),
        (np.float32(1), "shape"),
        (torch.tensor(1.0), "shape"),
        (np.ones((16, 15)), r"\(\.\.\., 16\).*\(16, 15\)"),
        (np.ones(0), "shape"),
        (QuantTensor.quantize(torch.ones(16)), "already"),
    ],
)
def test_refused_inputs(x: Any, message: str) -> None:
    for config in (QuantForgeConfig(), BOTH):
        with pytest.raises(InputError, match=message):
            QuantPipeline(16, config).compress(x)


@pytest.mark.parametrize("config", [QuantForgeConfig(), BOTH])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_bad_vectors_are_named(small_chunks: None, config: QuantForgeConfig, value: float) -> None:
    pipeline, x = QuantPipeline(16, config), with_nan(LOUD, 321, value=value)
    for data in (x, torch.from_numpy(x)):
        with pytest.raises(InputError, match="vector 321 holds NaN or infinity"):
            pipeline.compress(data)
    with pytest.raises(InputError, match=r"vector \(3, 21\)"):
        pipeline.compress(x.reshape(5, 100, 16))
    with pytest.raises(InputError, match=r"chunk 1: .*vector 221"):
        list(pipeline.compress_stream([x[:100], x[100:]]))


def test_vectors_beyond_fp16_are_named(small_chunks: None) -> None:
    with pytest.raises(InputError, match=r'vector 9 .*scale_dtype="float32"'):
        QuantPipeline(16).compress(with_nan(LOUD, 9, value=1e9))
    with pytest.raises(InputError, match=r"vector 9 .*too large"):
        QuantPipeline(16, BOTH).compress(with_nan(LOUD.astype(np.float64), 9, value=1e300))


@pytest.mark.parametrize("q", [LOUD, torch.ones(16), None])
def test_decompress_wants_codes(q: Any) -> None:
    with pytest.raises(InputError, match="QuantTensor"):
        QuantPipeline(16).decompress(q)


def test_decompress_wants_its_dim() -> None:
    with pytest.raises(InputError, match=r"dim 16.*dim is 8"):
        QuantPipeline(8).decompress(QuantPipeline(16).compress(LOUD))


# ---- progress ------------------------------------------------------------------------------


def test_progress_bar_is_shown_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = QuantPipeline(16, BOTH)
    pipeline.compress(LOUD, progress=False)
    pipeline.compress(LOUD)
    assert capsys.readouterr().err == ""  # short work, and not a terminal
    pipeline.compress(LOUD, progress=True)
    shown = capsys.readouterr().err
    assert "measure: 100%" in shown
    assert "compress: 100%" in shown


def test_the_pipeline_loads_safetensors_only_for_files() -> None:
    code = "import sys, quantforge.pipeline; print('safetensors' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


@settings(max_examples=25)
@given(bits=st.integers(1, 8), seed=st.integers(0, 2**32 - 1))
def test_error_falls_with_bits(bits: int, seed: int) -> None:
    x = np.random.RandomState(seed).standard_normal((50, 64)).astype(np.float32)
    pipeline = QuantPipeline(64, QuantForgeConfig(bits=bits, seed=seed, scale_rule="mse"))
    assert relative_error(x, pipeline.decompress(pipeline.compress(x))) < 0.45 * 3.4 ** (1 - bits)


assert Statistics() == (None, None)
