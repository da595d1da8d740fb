"""FAISS indexes in and out: flat ones and those with lists of whole vectors.

from_faiss      IndexFlat, IndexIVFFlat, either behind an IndexIDMap
to_faiss        the vectors that codes stand for, under their ids

Needs FAISS: `pip install faiss-cpu`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quantforge.errors import InputError, UnsupportedError
from quantforge.vectordb.config import IndexConfig
from quantforge.vectordb.index import QuantizedIndex

BATCH = 1 << 16


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise UnsupportedError("FAISS is not installed: pip install faiss-cpu") from error
    return faiss


def from_faiss(index: Any, config: IndexConfig | None = None) -> QuantizedIndex:
    """Return an index of the vectors of a FAISS index, under the same ids.

    Args:
        index: `IndexFlat`, `IndexIVFFlat`, or an `IndexIDMap` of one, with inner products or
            squared distances.
        config: settings; the metric is that of the FAISS index, "cosine" is taken for inner
            products. None for the default.

    Raises:
        UnsupportedError: without FAISS, or for another kind of index or metric.
        InputError: for a metric in the config that is not that of the index.
    """
    faiss = _faiss()
    outer = faiss.downcast_index(index)
    metrics = {faiss.METRIC_INNER_PRODUCT: "ip", faiss.METRIC_L2: "l2"}
    metric = metrics.get(outer.metric_type)
    if metric is None:
        raise UnsupportedError(f"FAISS metric {outer.metric_type} is neither inner product nor L2")
    if config is None:
        config = IndexConfig(metric=metric)  # type: ignore[arg-type]
    elif config.metric != metric and (config.metric, metric) != ("cosine", "ip"):
        raise InputError(f'the FAISS index has metric "{metric}", the config "{config.metric}"')
    names = None
    if isinstance(outer, faiss.IndexIDMap):
        names = faiss.vector_to_array(outer.id_map)
        outer = faiss.downcast_index(outer.index)
    if isinstance(outer, faiss.IndexIVFFlat):
        x, ids = _lists(faiss, outer)
    elif isinstance(outer, faiss.IndexFlat):
        x, ids = outer.reconstruct_n(0, outer.ntotal), np.arange(outer.ntotal)
    else:
        raise UnsupportedError(
            f"{type(outer).__name__} holds no whole vectors; take an IndexFlat or IndexIVFFlat, or "
            "add the vectors themselves"
        )
    found = QuantizedIndex(outer.d, config)
    if len(x):
        found.add(x, ids=ids if names is None else names[ids])
    return found


def _lists(faiss: Any, index: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the vectors and ids of all inverted lists, in the order of ids."""
    vectors, ids = [np.empty((0, index.d), np.float32)], [np.empty(0, np.int64)]
    for number in range(index.nlist):
        size = index.invlists.list_size(number)
        if not size:
            continue
        codes = faiss.rev_swig_ptr(index.invlists.get_codes(number), size * index.code_size)
        vectors.append(codes.view(np.float32).reshape(size, index.d).copy())
        ids.append(faiss.rev_swig_ptr(index.invlists.get_ids(number), size).copy())
    order = np.argsort(np.concatenate(ids), kind="stable")
    return np.concatenate(vectors)[order], np.concatenate(ids)[order]


def to_faiss(index: QuantizedIndex) -> Any:
    """Return a FAISS index of what the codes stand for, as float32, under the same ids.

    An index with lists becomes an `IndexIVFFlat` with the same centroids and `nprobe`, another an
    `IndexIDMap2` of an `IndexFlat`. Cosines are inner products of vectors of length 1.

    Raises:
        UnsupportedError: without FAISS.
        InputError: for ids that are not integers; FAISS has no others.
    """
    faiss = _faiss()
    ids = np.asarray(index.ids)
    if len(ids) and ids.dtype.kind not in "iu":
        raise InputError(f"FAISS has integer ids only; the index has {ids.dtype} ones")
    l2 = index.config.metric == "l2"
    metric = faiss.METRIC_L2 if l2 else faiss.METRIC_INNER_PRODUCT
    flat = faiss.IndexFlat(index.dim, metric)
    core = index._core
    if core is None or len(core.partition) == 1:
        found = faiss.IndexIDMap2(flat)
    else:
        flat.add(core.partition.centroids.cpu().numpy())
        found = faiss.IndexIVFFlat(flat, index.dim, len(core.partition), metric)
        found.is_trained, found.nprobe = True, core.partition.nprobe
    found.own_fields = True
    flat.this.disown()
    for start in range(0, len(ids), BATCH):
        some = ids[start : start + BATCH].astype(np.int64)
        x = np.ascontiguousarray(index.reconstruct(some), np.float32)
        if index.config.metric == "cosine":
            x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.finfo(np.float32).tiny)
        found.add_with_ids(x, some)
    return found
