from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from quantforge import InputError, QuantForgeConfig, QuantPipeline, TurboQuantizer, UnsupportedError

X = np.random.RandomState(0).standard_normal((40, 24)).astype(np.float32)
QUERY = np.random.RandomState(1).standard_normal((7, 24)).astype(np.float32)
CONFIGS = [
    QuantForgeConfig(bits=4),
    QuantForgeConfig(bits=3, estimator="prod"),
    QuantForgeConfig(bits=8, shift=True, equalizer=True),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_encode_and_decode_are_the_pipeline(config: QuantForgeConfig) -> None:
    quantizer, pipeline = TurboQuantizer(24, config), QuantPipeline(24, config)
    q = quantizer.encode(X)
    assert torch.equal(q, pipeline.compress(X))
    assert np.array_equal(quantizer.decode(q), pipeline.decompress(q))
    assert (quantizer.dim, quantizer.config, quantizer.spec) == (24, config, pipeline.spec)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("query_shape", [(24,), (7, 24), (2, 7, 24), (0, 24)])
@pytest.mark.parametrize("shape", [(24,), (40, 24), (2, 20, 24), (0, 24)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, torch.float32])
def test_inner_product_is_that_of_the_decoded_vectors(
    config: QuantForgeConfig, query_shape: tuple[int, ...], shape: tuple[int, ...], dtype: Any
) -> None:
    quantizer = TurboQuantizer(24, config)
    values = np.resize(QUERY, query_shape)
    is_torch = isinstance(dtype, torch.dtype)
    query: Any = torch.from_numpy(values) if is_torch else values.astype(dtype)
    q = quantizer.encode(X.ravel()[: np.prod(shape)].reshape(shape))
    scores = quantizer.inner_product(query, q)
    dense = quantizer.decode(q).astype(np.float64)
    expected = values.astype(np.float64) @ (
        dense if dense.ndim == 1 else np.swapaxes(dense, -1, -2)
    )
    assert isinstance(scores, torch.Tensor if is_torch else np.ndarray)
    assert scores.dtype == dtype
    assert tuple(scores.shape) == np.shape(expected)
    np.testing.assert_allclose(np.asarray(scores), expected, rtol=1e-4, atol=1e-4)


def test_a_query_and_codes_of_different_containers() -> None:
    quantizer = TurboQuantizer(24)
    q = quantizer.encode(torch.from_numpy(X))
    assert isinstance(quantizer.inner_product(QUERY, q), np.ndarray)
    assert isinstance(quantizer.inner_product(torch.from_numpy(QUERY), q), torch.Tensor)


@pytest.mark.parametrize("estimator", ["mse", "prod"])
def test_inner_products_are_unbiased_over_seeds(estimator: Any) -> None:
    """Theorem 2 of the paper: the mean over rotations is the exact inner product."""
    estimates = []
    for seed in range(400):
        quantizer = TurboQuantizer(24, QuantForgeConfig(bits=2, estimator=estimator, seed=seed))
        estimates.append(quantizer.inner_product(QUERY, quantizer.encode(X[:5])))
    stacked = np.stack(estimates)
    standard_error = stacked.std(0) / np.sqrt(len(stacked))
    z = (stacked.mean(0) - QUERY @ X[:5].T) / standard_error
    assert np.abs(z).max() < 4.5  # 35 draws
    assert np.square(z).mean() < 2


def test_gradients_are_refused_not_lost() -> None:
    quantizer = TurboQuantizer(24)
    query = torch.from_numpy(QUERY).requires_grad_()
    scores = quantizer.inner_product(query, quantizer.encode(X))
    with pytest.raises(UnsupportedError, match="training"):
        scores.sum().backward()


@pytest.mark.parametrize(
    ("query", "q", "message"),
    [
        (QUERY[:, :5], TurboQuantizer(24).encode(X), "24"),
        (QUERY.astype(int), TurboQuantizer(24).encode(X), "astype"),
        (TurboQuantizer(24).encode(X), TurboQuantizer(24).encode(X), "already|dequantize"),
        (QUERY, X, "QuantTensor"),
        (QUERY, TurboQuantizer(8).encode(X[:, :8]), "dim"),
    ],
)
def test_refused(query: Any, q: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TurboQuantizer(24).inner_product(query, q)
