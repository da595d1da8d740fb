"""The adapter keeps ann-benchmarks' contract, in the order in which its runner calls it."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.ann_benchmarks import METRICS, QuantForge
from tests.vectordb.data import skewed

X, Q = skewed(1200, 32).numpy(), skewed(20, 32, 1).numpy()


def truth(metric: str) -> np.ndarray:
    if metric == "euclidean":
        return np.square(Q[:, None] - X).sum(-1).argsort(1)[:, :10]
    x = X / np.linalg.norm(X, axis=1, keepdims=True) if metric == "angular" else X
    return (-(Q @ x.T)).argsort(1)[:, :10]


@pytest.mark.parametrize("metric", METRICS)
def test_contract(metric: str) -> None:
    algorithm = QuantForge(metric, 4)
    assert algorithm.get_memory_usage() == 0
    assert algorithm.get_additional() == {}
    algorithm.fit(X.astype(np.float64))
    recalls = {}
    for rerank in (0, 10):
        algorithm.set_query_arguments(1, rerank)
        algorithm.batch_query(Q, 10)
        batch = algorithm.get_batch_results()
        single = np.stack([algorithm.query(q, 10) for q in Q])
        np.testing.assert_array_equal(batch, single)
        assert batch.shape == (20, 10)
        recalls[rerank] = (batch[:, :, None] == truth(metric)[:, None]).any(1).mean()
    assert recalls[0] > 0.85
    assert recalls[10] > 0.99
    assert str(algorithm) == "QuantForge(bits=4, nprobe=1, rerank=10)"
    assert 1200 * 32 * 2.5 / 1024 < algorithm.get_memory_usage() < 400
    assert algorithm.get_additional() == {"nlist": 1}
    algorithm.done()
    assert algorithm.get_memory_usage() == 0


def test_out_of_turn() -> None:
    with pytest.raises(ValueError, match="metric"):
        QuantForge("hamming", 4)
    with pytest.raises(RuntimeError, match="fit"):
        QuantForge("dot", 4).query(Q[0], 3)
    with pytest.raises(RuntimeError, match="batch_query"):
        QuantForge("dot", 4).get_batch_results()
