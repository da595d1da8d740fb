"""Codebooks of one's own, and codes without a rotation: checked, exact, kept in files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from quantforge import (
    ConfigError,
    FormatError,
    QuantForgeCache,
    QuantForgeConfig,
    QuantPipeline,
    QuantSpec,
    QuantTensor,
    UnsupportedError,
    load_file,
    save_file,
)
from quantforge.measure import measure
from quantforge.native.library import Library, library
from quantforge.numerics.codebook import codebook_of, is_symmetric
from quantforge.numerics.encode import encode
from quantforge.numerics.pages import why_no_pages
from quantforge.ops import attention, dequantize, quantize, scores
from quantforge.ops.attention.api import Packed
from quantforge.ops.attention.reference import attention as attention_reference
from quantforge.ops.scores.reference import scores as scores_reference
from quantforge.spec import CENTROIDS, Rotation, codebook_text
from tests.helpers import (
    FORMS,
    assert_close,
    assert_same_bits,
    gaussian,
    make_store,
    naive_scores,
    to_float64,
)
from tests.test_docs import ROOT, python_blocks

UNIFORM = (-1.5, -0.5, 0.5, 1.5)
CPU_IMPLS = ("eager", "native") if isinstance(library(), Library) else ("eager",)


def centroids(bits: int, *, symmetric: bool) -> np.ndarray:
    """Return centroids that are neither Lloyd-Max nor evenly spaced."""
    positive = 2 * np.sort(np.random.RandomState(bits).rand(1 << bits)) + np.arange(1 << bits) / 64
    half = positive[: 1 << (bits - 1)] + 0.02
    return np.concatenate([-half[::-1], half]) if symmetric else positive - 0.7


def spec(bits: int, dim: int, *, symmetric: bool, rotation: Rotation = "hadamard") -> QuantSpec:
    text = codebook_text(centroids(bits, symmetric=symmetric))
    return QuantSpec(dim, bits, rotation=rotation, codebook=text, scale_rule="mse")


def test_a_sequence_an_array_and_text_are_one_codebook() -> None:
    config = QuantForgeConfig(bits=2, codebook=UNIFORM)
    assert config.codebook == "centroids:-1.5,-0.5,0.5,1.5"
    for same in (list(UNIFORM), np.array(UNIFORM), torch.tensor(UNIFORM), config.codebook):
        assert QuantForgeConfig(bits=2, codebook=same) == config
    assert hash(config.spec(64)) == hash(QuantSpec.from_key(config.spec(64).key))
    assert codebook_of(config.spec(64)).boundaries == pytest.approx([-1, 0, 1], abs=1e-5)
    assert QuantSpec(64, 2, codebook="centroids:-1.50,-0.5,5e-1,1.5") == config.spec(64)


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_float32_numbers_survive_the_text(bits: int) -> None:
    chosen = centroids(bits, symmetric=False).astype(np.float32)
    np.testing.assert_array_equal(
        codebook_of(QuantSpec(64, bits, codebook=codebook_text(chosen))).centroids, chosen
    )


@pytest.mark.parametrize(
    ("codebook", "message"),
    [
        ("nf4", "lloyd_max, gaussian, e4m3, or 2\\^bits centroids.*'nf4'"),
        (UNIFORM[:3], "2 bits has 4 centroids; got 3"),
        (range(8), "2 bits has 4 centroids; got 8"),
        ((-1, 0, 0, 1), "must ascend"),
        ((1.5, 0.5, -0.5, -1.5), "must ascend"),
        ((-1, 0, 1e-5, 1), "2\\^-14 of the largest"),
        ((-1, 0, 1, float("nan")), "largest centroid.*nan"),
        ((-1, 0, 1, float("inf")), "largest centroid.*inf"),
        ((-0.03, -0.01, 0.01, 0.03), "largest centroid.*0.02999.*mean square 1"),
        ((-1, 0, 1, "x"), "numbers"),
        ("centroids:-1,0,1,x", "numbers"),
        ("centroids:", "got 1"),
        ([UNIFORM], "shape \\(1, 4\\)"),
        (7.0, "shape \\(\\)"),
        (None, "shape|numbers|largest"),
        ({"a": 1}, "numbers"),
    ],
)
def test_refused(codebook: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantForgeConfig(bits=2, codebook=codebook)  # type: ignore[arg-type]


def test_qjl_needs_a_rotation() -> None:
    with pytest.raises(ConfigError, match="needs a rotation"):
        QuantForgeConfig(rotation="none", estimator="prod")
    assert QuantForgeConfig(bits=3, codebook=UNIFORM, estimator="prod").spec(64).code_bits == 2


@pytest.mark.parametrize("rotation", ["hadamard", "none"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_are_the_same_bits(
    bits: int, symmetric: bool, rotation: Rotation, device: torch.device
) -> None:
    code = spec(bits, 96, symmetric=symmetric, rotation=rotation)
    assert is_symmetric(code) == symmetric
    x = gaussian(203, 96, seed=bits) * np.exp(gaussian(203, 1, seed=1))
    expected = encode(x, code)
    impls = CPU_IMPLS if rotation == "hadamard" and device.type == "cpu" else ("eager",)
    for impl in ("auto", *impls):
        assert_same_bits(*quantize(torch.from_numpy(x).to(device), code, impl=impl), expected)


@pytest.mark.parametrize("rotation", ["hadamard", "none"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_are_read_alike(
    symmetric: bool, bits: int, rotation: Rotation, device: torch.device
) -> None:
    code = spec(bits, 64, symmetric=symmetric, rotation=rotation)
    store = make_store(code, 37, statistic="shared", device=device)
    got = dequantize(store.packed, store.scales, code, **store.statistics)
    assert_close(got, [store.naive], store.exact)
    query = torch.from_numpy(gaussian(3, 64, seed=11)).to(device)
    exact = scores_reference(
        to_float64(query), store.encoded, code, store.shift_array, store.equalizer_array
    )
    found = scores(query, store.packed, store.scales, code, **store.statistics)
    assert_close(found, [naive_scores(query, store, form) for form in FORMS], exact)


def test_attention_reads_them(device: torch.device) -> None:
    code = spec(4, 64, symmetric=False)
    key, value = (make_store(code, 1, 2, 50, device=device, seed=s) for s in (0, 1))
    query = torch.from_numpy(gaussian(1, 4, 3, 64, seed=2)).to(device)
    out, _ = attention(query, *(Packed(s.packed, s.scales, code) for s in (key, value)))
    exact, _ = attention_reference(to_float64(query), key.exact, value.exact, None, False, 64**-0.5)
    k, v = (t.naive.repeat_interleave(2, 1) for t in (key, value))
    naive = torch.softmax(query.cpu() @ k.mT * 64**-0.5, -1) @ v
    assert_close(out, [naive], exact)


def test_kernels_that_look_up_magnitudes_say_why_not() -> None:
    lopsided, even = (spec(4, 128, symmetric=s) for s in (False, True))
    assert why_no_pages(even, even) is None
    assert "not symmetric" in str(why_no_pages(even, lopsided))
    store = make_store(spec(4, 64, symmetric=True, rotation="none"), 5)
    if "native" in CPU_IMPLS:
        with pytest.raises(UnsupportedError, match="Hadamard rotations only, not none"):
            quantize(torch.zeros(5, 64), store.spec, impl="native")


def test_files_keep_it(tmp_path: Path) -> None:
    config = QuantForgeConfig(bits=2, codebook=UNIFORM, rotation="none", scale_rule="mse")
    config.save(tmp_path / "settings.json")
    assert QuantForgeConfig.from_file(tmp_path / "settings.json") == config
    settings = json.loads((tmp_path / "settings.json").read_text())
    settings["vectors"]["codebook"] = list(UNIFORM)
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    assert QuantForgeConfig.from_file(tmp_path / "settings.json") == config

    x = QuantTensor.quantize(torch.from_numpy(gaussian(20, 64)), config)
    for name in ("x.safetensors", "x.pt"):
        path = tmp_path / name
        save_file({"x": x}, path) if name == "x.safetensors" else torch.save({"x": x}, path)
        loaded = load_file(path) if name == "x.safetensors" else torch.load(path)
        assert loaded["x"].spec == x.spec
        assert torch.equal(loaded["x"].dequantize(), x.dequantize())

    content = (tmp_path / "x.safetensors").read_bytes()
    bad = content.replace(b"centroids:-1.5", b"centroids:+9.5")
    (tmp_path / "bad.safetensors").write_bytes(bad)
    with pytest.raises(FormatError, match=r"'x': spec: centroids must ascend"):
        load_file(tmp_path / "bad.safetensors")


def test_a_cache_takes_them(device: torch.device) -> None:
    cache = QuantForgeCache(bits=2, codebook=UNIFORM, window=0, sinks=0, page_size=16)
    key, value = torch.from_numpy(gaussian(2, 1, 2, 64, 64)).to(device)
    cache.update(key, value, 0)
    packed = cache.layers[0]._stores()[0]
    assert packed.spec.codebook == codebook_text(UNIFORM)
    with pytest.raises(ConfigError, match="4 bits has 16 centroids; got 4"):
        QuantForgeCache(bits=(2, 4), codebook=UNIFORM)


def test_coordinates_of_known_distribution_lose_less() -> None:
    """Evenly spread numbers at b bits: 4^-b at best, which no rotated code can reach."""
    x = torch.from_numpy(np.random.RandomState(0).uniform(-1, 1, (512, 128)).astype(np.float32))
    cells = (np.arange(16) + 0.5) / 8 - 1
    own = QuantForgeConfig(bits=4, rotation="none", codebook=np.sqrt(3) * cells, scale_rule="mse")
    found = measure(x, x[:0], own)
    rotated = measure(x, x[:0], QuantForgeConfig(bits=4, scale_rule="mse"))
    assert found.theory is None
    assert found.mse == pytest.approx(4.0**-4, rel=0.03)
    assert found.mse < 0.5 * rotated.mse
    packed = QuantPipeline(128, own).compress(x.numpy())
    assert QuantTensor.__name__ in repr(packed)
    assert packed.spec.codebook.startswith(CENTROIDS)


def test_the_documents_example_runs() -> None:
    (block,) = python_blocks(ROOT / "docs" / "concepts.md")
    exec(compile(block, "concepts.md", "exec"), {})
