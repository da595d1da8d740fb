"""What a search does with the codes: how many candidates, in how many stages, in whose order."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from quantforge.errors import InputError
from quantforge.ops.search.eager import keys_of, results_of
from quantforge.vectordb import candidates, scan, two_stage
from quantforge.vectordb.checks import nprobe_of
from quantforge.vectordb.codec import Queries
from quantforge.vectordb.core import Core
from quantforge.vectordb.rerank import Fetch, best_of

if TYPE_CHECKING:
    from quantforge.vectordb.index import QuantizedIndex

Rerank = int | Literal["auto"] | None
CANDIDATE_RECALL = 0.99
"""Share of the true neighbours among the candidates of `rerank="auto"`, if nothing is said."""
PLAN_QUERIES, PLAN_ROWS = 128, 1 << 16
"""Vectors of the index that stand in for queries and for all of it when two stages are planned."""

Found = tuple[torch.Tensor, torch.Tensor]


def search(
    index: QuantizedIndex,
    queries: Any,
    k: int,
    *,
    nprobe: int | None,
    recall: float | None,
    allowed: torch.Tensor | None,
    rerank: Rerank,
    fetch: Fetch | None,
    stages: float | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Find the k best: `QuantizedIndex.search`."""
    query = index._vectors(queries, "queries")
    if type(k) is not int or not 1 <= k <= len(index):
        raise InputError(f"k must be an integer from 1 to {len(index)} vectors; got {k!r}")
    if rerank not in (None, "auto") and (type(rerank) is not int or rerank < k):
        raise InputError(f'rerank must be an integer of at least k={k}, or "auto"; got {rerank!r}')
    if rerank is not None and fetch is None and not index._known.keeps_originals:
        raise InputError('rerank needs vectors: originals="float16" in the config, or fetch')
    core, lists = index._known, nprobe_of(nprobe, recall)
    if recall is not None:
        lists = core.partition.nprobe_for(recall)

    def best(m: int) -> Found:
        if stages is not None:
            return _in_two_stages(core, query, m, stages, allowed)
        return core.best(query, m, allowed, lists)

    if rerank == "auto":
        share = CANDIDATE_RECALL if recall is None else min(recall, 1 - 1e-6)
        n = len(index) if allowed is None else max(k, len(allowed))

        def errors_of(rows: torch.Tensor) -> torch.Tensor:
            return errors_of_rows(core, query, rows)

        exact_of = partial(core.exact_scores, query, fetch=fetching(index, fetch))
        scores, rows = best_of(*candidates.choose(best, errors_of, exact_of, n, k, share), k)
    elif rerank is not None:
        rows = best(min(rerank, len(index)))[1]
        scores, rows = core.rerank(query, rows, k, fetching(index, fetch))
    else:
        scores, rows = best(k)
    return core.catalog.ids.names(rows), (-scores if core.codec.squared else scores).numpy()


def fetching(
    index: QuantizedIndex, fetch: Fetch | None
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Return what fetches checked vectors by rows."""
    if fetch is None:
        return None

    def by_rows(rows: torch.Tensor) -> torch.Tensor:
        x = index._vectors(fetch(index._catalog.ids.names(rows)), "fetched vectors").cpu()
        if len(x) != len(rows):
            raise InputError(f"fetch was given {len(rows)} ids and returned {len(x)}")
        return x

    return by_rows


def errors_of_rows(core: Core, query: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return standard errors (q, m) of each query's own rows (q, m); -1 is any row."""
    found = [
        core.standard_errors(query[i : i + 1], own)[0] for i, own in enumerate(rows.clamp_min(0))
    ]
    return torch.stack(found) if found else torch.empty(rows.shape)


def _in_two_stages(
    core: Core, query: torch.Tensor, k: int, recall: float, allowed: torch.Tensor | None
) -> Found:
    if len(core.partition) > 1 or allowed is not None:
        raise InputError(
            "two stages are for an index without lists and a search without filter, which read all "
            "codes otherwise; leave two_stage out"
        )
    core.compact()
    plan, query = plan_of(core, k, recall), query.to(core.device)
    # in a batch, queries share what is decoded, and few rows are left by all of them
    own = plan if len(query) == 1 and plan.stage.lead is not None else None
    search = core.bounds.search(core.rows, own)
    if search is not None:
        part = core.codec.queries(query)
        return search(part.turned, part.base[:, 0], k)
    coded = core.rows.coded(slice(None))
    scores = torch.full((len(query), k), -torch.inf)
    rows = torch.full((len(query), k), -1)
    step = max(1, scan.TILE_SCORES // len(core.rows))
    for start in range(0, len(query), step):
        some = query[start : start + step]
        part = core.codec.queries(some)
        first = plan.stage.scores(core.codec, some, coded)
        deviation = plan.stage.deviation(core.codec, some)
        for i in range(len(first)):
            full = partial(_full, core.shelf, part[i : i + 1])
            sigma = deviation[i] * coded.scales[:, 0].float()
            survivors, found = two_stage.survivors(first[i], sigma, plan.z, k, full)
            keys = keys_of(found + part.base[i], survivors).topk(k).values
            scores[start + i], rows[start + i] = results_of(keys, None)
    return scores, rows


def _full(shelf: scan.Shelf, query: Queries, rows: torch.Tensor) -> torch.Tensor:
    return shelf.tile(query, rows)[0]


def plan_of(core: Core, k: int, recall: float) -> two_stage.Plan:
    """Return how to search in two stages, measured on vectors of the index itself.

    What was found is kept until the index has grown to twice its size.
    """
    known = core.plans.get((k, recall))
    if known is not None and len(core.rows) < 2 * known[0]:
        return known[1]
    generator = torch.Generator().manual_seed(core.config.seed)
    chosen = torch.randperm(len(core.rows), generator=generator)[:PLAN_ROWS]
    count = min(PLAN_QUERIES, len(chosen))
    query, coded = core.decode(chosen[:count]), core.rows.coded(chosen)
    full = core.codec.scores(core.codec.queries(query), coded)
    full[torch.arange(count), torch.arange(count)] = -torch.inf
    whole = core.bounds.search(core.rows) is not None
    plan = two_stage.plan(core.codec, coded, query, full, k, recall, whole=whole)
    core.plans[k, recall] = (len(core.rows), plan)
    return plan
