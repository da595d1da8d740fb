"""The codec in torch against the float64 oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantforge.errors import InputError
from quantforge.numerics import vectors
from quantforge.numerics.packing import planes, unpack
from quantforge.numerics.rotation import haar_matrix
from quantforge.numerics.vectors import SEGMENT, Mode, VectorCode, learn
from quantforge.vectordb import IndexConfig, QuantizedIndex
from quantforge.vectordb.codec import Codec
from quantforge.vectordb.moments import measure
from tests.vectordb.data import skewed

MODES: tuple[Mode, ...] = ("oblivious", "centred", "adapted")


def code_of(mode: Mode, x: torch.Tensor, bits: int) -> VectorCode:
    return learn(mode, measure(x.split(97), x.shape[1]), bits, 5)


def test_moments_do_not_depend_on_the_batches() -> None:
    x = skewed(500, 48)
    whole, parts = measure([x], 48), measure([x[:0], *x.split(61)], 48)
    np.testing.assert_allclose(parts.mean, whole.mean, atol=1e-12)
    assert parts.n == whole.n == 500
    # the shrinkage sees fourth moments about the pivot, the mean of the first batch
    np.testing.assert_allclose(parts.covariance, whole.covariance, atol=1e-4)
    with pytest.raises(InputError, match="no vectors"):
        measure([x[:0]], 48)


@pytest.mark.parametrize("dim", [8, 40, 64, 100])
@pytest.mark.parametrize("mode", MODES)
def test_codes_and_scores_are_the_oracles(mode: Mode, dim: int) -> None:
    x, query = skewed(200, dim), skewed(9, dim, 1)
    code = code_of(mode, x, 3)
    codec, oracle = Codec(code, mode, 5, squared=False), vectors.encode(code, x.double().numpy())
    coded = codec.encode(x)
    for (spec, where), packed in zip(codec.groups, coded.packed, strict=True):
        same = unpack(packed.numpy(), spec.dim, spec.bits) == oracle.codes[:, where]
        assert same.mean() > 0.999  # a coordinate on a boundary may round to the other side
    queries = codec.queries(query)
    found = codec.scores(queries, coded) + queries.base
    exact_query = query.double().numpy()
    expected = vectors.scores(code, oracle, exact_query)
    expected_error = vectors.standard_errors(code, mode, 5, oracle, exact_query)
    step = np.abs(expected).max() * 2e-3  # of a code next to a boundary, and offsets in fp16
    np.testing.assert_allclose(found.numpy(), expected, atol=step)
    errors = codec.standard_errors(query, coded)
    np.testing.assert_allclose(errors.numpy(), expected_error, rtol=2e-3)
    decoded = codec.decode(coded).numpy()
    np.testing.assert_allclose(
        decoded, vectors.decode(code, oracle), atol=3 * np.sqrt(np.square(decoded).mean())
    )
    assert np.square(decoded - x.numpy()).mean() < 0.1 * x.var()


@pytest.mark.parametrize("mode", MODES)
def test_rows_have_the_bytes_they_are_said_to_have(mode: Mode) -> None:
    x = skewed(100, 64)
    codec = Codec(code_of(mode, x, 2), mode, 5, squared=True)
    coded = codec.encode(x)
    held = sum(t.nbytes for t in (*coded.packed, coded.scales, coded.offsets))
    assert held == 100 * codec.row_bytes
    padding = 3 * sum(len(planes(spec.dim, spec.bits)) for spec, _ in codec.groups)
    assert codec.row_bytes <= 64 * 2 // 8 + 4 + padding


def test_vectors_beyond_the_training_data_are_refused() -> None:
    x = skewed(100, 64)
    codec = Codec(code_of("adapted", x, 2), "adapted", 5, squared=False)
    with pytest.raises(InputError, match="vector 3 has norm"):
        codec.encode(torch.cat([x[:3], 1e7 * x[3:4]]))
    assert len(codec.encode(x[:0]).scales) == 0


def test_rotations_of_segments_are_made_once() -> None:
    """Standard errors of a query alone cost a QR for each of many segments otherwise."""
    dim = 20 * SEGMENT + 8
    x = skewed(600, dim)
    index = QuantizedIndex(dim, IndexConfig(bits=2, seed=123))
    index.add(x)
    first = index.standard_errors(x[:1], [0, 1])
    made = haar_matrix.cache_info().misses
    np.testing.assert_array_equal(index.standard_errors(x[:1], [0, 1]), first)
    assert haar_matrix.cache_info().misses == made
