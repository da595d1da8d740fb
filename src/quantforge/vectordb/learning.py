"""What an index learns from data: the code, the lists, and how many of them to look into."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from quantforge.errors import InputError
from quantforge.numerics import vectors
from quantforge.numerics.vectors import Mode, Moments, VectorCode
from quantforge.vectordb.codec import CHUNK_ROWS, Codec
from quantforge.vectordb.config import IndexConfig, Metric
from quantforge.vectordb.kmeans import learn_centroids, nearest
from quantforge.vectordb.lists import Partition
from quantforge.vectordb.moments import Passing, measure

ERROR_ROWS = 2048
"""Vectors on which errors are measured."""
CURVE_QUERIES, CURVE_NEIGHBOURS = 256, 10
DEFAULT_RECALL = 0.95
SPREAD = 0.3
"""Spreads by which the best vectors of a list are above its centroid, seen from a query."""


def learn(
    config: IndexConfig, dim: int, batches: Iterable[torch.Tensor], nlist: int | None = None
) -> tuple[Codec, Partition]:
    """Learn from checked vectors (n, dim) that pass by once.

    Args:
        config: of the index.
        dim: vector length.
        batches: the vectors.
        nlist: lists to make; None for what the config says of so many vectors.

    Raises:
        InputError: for too few vectors.
    """
    mode: Mode = config.mode
    bits, seed = config.bits, config.seed
    squared = config.metric == "l2"
    if mode == "oblivious":
        code = vectors.oblivious(dim, bits, seed)
        sample = next((batch for batch in batches if len(batch)), torch.empty(0, dim))
        if len(sample):  # errors do not change the codes
            code = vectors.with_measured_errors(code, mode, seed, _some(sample))
        return Codec(code, mode, seed, squared=squared), Partition.single(dim)
    passing = Passing(dim, seed=seed).see(batches)
    moments, sample = passing.moments, passing.sample
    nlist = config.lists_for(moments.n) if nlist is None else nlist
    if len(sample) < nlist:
        raise InputError(f"{nlist} lists are learned from as many vectors; got {len(sample)}")
    if nlist == 1:
        mean = torch.from_numpy(moments.mean).to(sample)
        code, mode = _learn_code(config, moments, sample - mean)
        return Codec(code, mode, seed, squared=squared), Partition.single(dim)
    partition = learn_partition(config, sample, nlist, coded=True)
    rest = sample - partition.centroids[partition.nearest(sample)]
    code, mode = _learn_code(config, measure([rest], dim), rest)
    code = dataclasses.replace(code, mean=moments.mean)
    centres = partition.centroids.cpu()
    return Codec(code, mode, seed, squared=squared, centres=centres), partition


def learn_partition(
    config: IndexConfig, sample: torch.Tensor, nlist: int, *, coded: bool
) -> Partition:
    """Make lists from a sample (n, dim), n at least nlist."""
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(len(sample), generator=generator).to(sample.device)
    count = min(CURVE_QUERIES, (len(sample) - nlist) // 2)  # which the centroids must not know
    queries, others = sample[order[:count]], sample[order[count:]]
    centroids = learn_centroids(others, nlist, config.seed)
    labels = nearest(others, centroids)
    spreads = _spreads(others, centroids, labels)
    partition = Partition(centroids, spreads, coded, torch.empty(0), nlist)
    exact = routes(config.metric, queries, others)
    rows = exact.topk(min(CURVE_NEIGHBOURS, len(others)), dim=1).indices
    curve = curve_of(config, partition, queries, labels[rows])
    partition = dataclasses.replace(partition, curve=curve)
    nprobe = partition.nprobe_for(DEFAULT_RECALL) if config.nprobe is None else config.nprobe
    return dataclasses.replace(partition, nprobe=min(nprobe, nlist))


def routes(metric: Metric, query: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return the exact scores (q, n) of queries with vectors; greater is nearer."""
    found = query @ x.T
    if metric != "l2":
        return found
    return 2 * found - query.square().sum(-1)[:, None] - x.square().sum(-1)


def list_routes(
    metric: Metric, query: torch.Tensor, partition: Partition, known: torch.Tensor | None = None
) -> torch.Tensor:
    """Return how promising each list (q, lists) is to queries (q, dim); greater is more.

    The best inner product in a list is above that of its centroid, the more so the wider vectors
    are spread about it: those of unit length are where the centroid is short. Distances know this
    by themselves. The scores of the centroids may be known already.
    """
    found = routes(metric, query, partition.centroids) if known is None else known
    if metric == "l2":
        return found
    length = torch.linalg.vector_norm(query, dim=-1, keepdim=True)
    return torch.addcmul(found, length, partition.spreads, value=SPREAD)


def _spreads(x: torch.Tensor, centroids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    total = centroids.new_zeros(len(centroids))
    for part, own in zip(x.split(CHUNK_ROWS), labels.split(CHUNK_ROWS), strict=True):
        total.index_add_(0, own, (part - centroids[own]).square().sum(-1))
    return (total / torch.bincount(labels, minlength=len(centroids)).clamp_min(1)).sqrt()


def curve_of(
    config: IndexConfig, partition: Partition, query: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Return the share of neighbours in the 1, 2, ... nearest lists, (lists,) float32.

    Args:
        config: of the index.
        partition: the lists.
        query: (q, dim), on the device of the centroids.
        labels: (q, k) the list of each neighbour, -1 for none.
    """
    order = list_routes(config.metric, query, partition).argsort(1, descending=True)
    labels = labels.to(order.device)
    rank = order.argsort(1).gather(1, labels.clamp_min(0))[labels >= 0]
    seen = torch.bincount(rank.cpu(), minlength=len(partition)).cumsum(0)
    return seen.to(torch.float32) / max(1, len(rank))


def _learn_code(
    config: IndexConfig, moments: Moments, rest: torch.Tensor
) -> tuple[VectorCode, Mode]:
    """Return the code of residuals (n, dim) with its errors, and its mode.

    Where knowing directions does not pay, as with isotropic data whose directions are those of the
    sample only, or at 8 bits, which no direction can have more of, it is the centred one.
    """
    mode, sample = config.mode, _some(rest)
    code = vectors.learn(mode, moments, config.bits, config.seed)
    if mode == "adapted":
        plain = vectors.learn("centred", moments, config.bits, config.seed)
        if vectors.product_error(plain, sample) < vectors.product_error(code, sample):
            code, mode = plain, "centred"
    return vectors.with_measured_errors(code, mode, config.seed, sample), mode


def _some(x: torch.Tensor) -> NDArray[np.float64]:
    step = max(1, len(x) // ERROR_ROWS)
    return x[::step][:ERROR_ROWS].double().cpu().numpy()
