"""Attention over pages that lie anywhere, with lengths on the device, against the oracle."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.library import opcheck

from quantforge.errors import InputError
from quantforge.ops import paged_attention
from quantforge.ops._library import Impl
from quantforge.ops.paged_attention.reference import paged_attention as reference
from quantforge.spec import QuantSpec
from tests.helpers import (
    FORMS,
    Statistic,
    Store,
    assert_close,
    gaussian,
    make_store,
    spec_of,
    to_float64,
    to_numpy,
)
from tests.ops.test_attention import naive_attention

PAGE = 16
LENGTHS = (0, 1, 16, 37, 70)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Pages:
    """Stores of some sequences, and the same rows in pages in another order.

    Rows of no token hold 255: codes, and scales that are NaN.
    """

    keys: list[Store]
    values: list[Store]
    seqlens: tuple[int, ...]
    device: torch.device

    @property
    def table(self) -> torch.Tensor:
        most = max(-(-n // PAGE) for n in self.seqlens) + 1
        order = np.random.default_rng(0).permutation(most * len(self.seqlens)).astype(np.int32)
        return torch.from_numpy(order.reshape(len(self.seqlens), most)).to(self.device)

    @property
    def lengths(self) -> torch.Tensor:
        return torch.tensor(self.seqlens, dtype=torch.int32, device=self.device)

    def parts(self, stores: list[Store]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return packed rows and scales in pages, views of one buffer with gaps."""
        table, spec = self.table.cpu(), stores[0].spec
        heads, width = stores[0].packed.shape[1], stores[0].packed.shape[-1]
        size = PAGE * (width + 2) + 16
        buffer = torch.full((table.numel(), heads, size), 255, dtype=torch.uint8)
        rows = buffer[..., : PAGE * width].unflatten(-1, (PAGE, width))
        scales = buffer[..., PAGE * width : -16].view(torch.float16).unsqueeze(-1)
        assert spec.scale_dtype == "float16"
        for b, store in enumerate(stores):
            token = torch.arange(self.seqlens[b])
            at = table[b, token // PAGE].long(), slice(None), token % PAGE
            rows[at] = store.packed[0].transpose(0, 1)
            scales[at] = store.scales[0].transpose(0, 1)
        moved = buffer.to(self.device)
        return (
            moved[..., : PAGE * width].unflatten(-1, (PAGE, width)),
            moved[..., PAGE * width : -16].view(torch.float16).unsqueeze(-1),
        )

    def exact(self, stores: list[Store]) -> np.ndarray:
        """Return dense pages (pages, Hkv, N, dim), NaN where no token is."""
        table = to_numpy(self.table)
        heads, dim = stores[0].exact.shape[1], stores[0].spec.dim
        pages = np.full((table.size, heads, PAGE, dim), np.nan)
        for b, store in enumerate(stores):
            token = np.arange(self.seqlens[b])
            pages[table[b, token // PAGE], :, token % PAGE] = np.swapaxes(store.exact[0], 0, 1)
        return pages


def make_pages(
    k_spec: QuantSpec,
    v_spec: QuantSpec,
    kv_heads: int,
    *,
    seqlens: tuple[int, ...] = LENGTHS,
    statistic: Statistic = "none",
    device: torch.device = CPU,
) -> Pages:
    stores = [
        [make_store(spec, 1, kv_heads, n, statistic=statistic, seed=seed) for n in seqlens]
        for seed, spec in enumerate((k_spec, v_spec))
    ]
    return Pages(*stores, seqlens, device)


def check(query: torch.Tensor, pages: Pages, impl: Impl, n_tokens: int | None = None) -> None:
    """Compare with the oracle in the dtype of the query."""
    key, value = pages.keys[0], pages.values[0]
    statistics = {
        f"{name}_{kind}": None if t is None else t.to(query.device)
        for name, store in (("key", key), ("value", value))
        for kind, t in store.statistics.items()
    }
    got = paged_attention(
        query,
        pages.parts(pages.keys),
        pages.parts(pages.values),
        *(key.spec, value.spec, pages.table, pages.lengths),
        n_tokens=n_tokens,
        **statistics,
        impl=impl,
    )
    assert got[0].dtype == got[1].dtype == torch.float32
    scale = key.spec.dim**-0.5
    exact = reference(
        to_float64(query),
        *(pages.exact(pages.keys), pages.exact(pages.values)),
        *(to_numpy(pages.table), to_numpy(pages.lengths), scale),
    )
    naive = []
    for form in FORMS:
        found = [
            naive_attention(q[None].cpu(), [pair], form, scale=scale)
            for q, *pair in zip(query, pages.keys, pages.values, strict=True)
        ]
        naive.append([torch.cat(each) for each in zip(*found, strict=True)])
    for i, each in enumerate(got):
        assert_close(each.to(query.dtype), [n[i] for n in naive], exact[i])


def query_of(pages: Pages, heads: int, q: int, dtype: torch.dtype) -> torch.Tensor:
    shape = (len(pages.seqlens), heads, q, pages.keys[0].spec.dim)
    return torch.from_numpy(gaussian(*shape, seed=11)).to(pages.device, dtype)


@pytest.mark.parametrize(("k_bits", "v_bits"), [(4, 4), (3, 2), (1, 8)])
@pytest.mark.parametrize("statistic", ["none", "per_head"])
def test_pages_of_mixed_lengths(k_bits: int, v_bits: int, statistic: Statistic) -> None:
    pages = make_pages(spec_of(64, k_bits), spec_of(48, v_bits), 2, statistic=statistic)
    check(query_of(pages, 4, 1, torch.float32), pages, "eager")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_queries(dtype: torch.dtype) -> None:
    pages = make_pages(spec_of(64), spec_of(64), 1)
    check(query_of(pages, 2, 3, dtype), pages, "auto")


def test_an_upper_bound_of_the_lengths_changes_nothing() -> None:
    pages = make_pages(spec_of(64), spec_of(64), 2)
    query = query_of(pages, 4, 1, torch.float32)
    for bound in (max(LENGTHS), max(LENGTHS) + 5, 10**6):
        check(query, pages, "eager", bound)


def test_what_does_not_fit_is_refused() -> None:
    spec = spec_of(64)
    pages = make_pages(spec, spec, 2, seqlens=(3, 20))
    keys, table, lengths = pages.parts(pages.keys), pages.table, pages.lengths
    query = query_of(pages, 4, 1, torch.float32)
    for args, message in (
        ((query[:, :3], keys, keys, spec, spec, table, lengths), "multiple of Hkv"),
        ((query, keys, (keys[0][:-1], keys[1][:-1]), spec, spec, table, lengths), "same pages"),
        ((query, keys, keys, spec, spec, table.long(), lengths), "int32"),
        ((query, keys, keys, spec, spec, table, lengths[:1]), "int32"),
        ((query, keys, keys, spec_of(64, 8), spec, table, lengths), "rows of 64 bytes"),
    ):
        with pytest.raises(InputError, match=message):
            paged_attention(*args)


def test_opcheck() -> None:
    spec = spec_of(64)
    pages = make_pages(spec, spec, 2, seqlens=(3, 20), statistic="per_head")
    keys, values = pages.parts(pages.keys), pages.parts(pages.values)
    shift, equalizer = pages.keys[0].statistics.values()
    opcheck(
        torch.ops.quantforge.paged_attention.default,
        (
            *(query_of(pages, 4, 1, torch.float32), *keys, shift, equalizer, *values, None, None),
            *(pages.table, pages.lengths, 20, 0.125, spec.key, spec.key),
        ),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("dim", "k_bits", "v_bits"), [(128, 4, 4), (64, 3, 2), (80, 8, 1)])
@pytest.mark.parametrize("q", [1, 5])
def test_triton(dim: int, k_bits: int, v_bits: int, q: int, dtype: torch.dtype) -> None:
    pages = make_pages(
        *(spec_of(dim, k_bits), spec_of(dim, v_bits), 2),
        seqlens=(*LENGTHS, 1500),
        statistic="per_head",
        device=torch.device("cuda"),
    )
    check(query_of(pages, 8, q, dtype), pages, "triton")


@pytest.mark.gpu
def test_a_captured_launch_follows_the_lengths() -> None:
    """Captured for the longest sequences, replayed while they grow."""
    device = torch.device("cuda")
    pages = make_pages(spec_of(128), spec_of(128), 2, seqlens=(200, 333), device=device)
    query = query_of(pages, 8, 1, torch.float16)
    table, lengths = pages.table, pages.lengths
    keys, values = pages.parts(pages.keys), pages.parts(pages.values)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        spec = pages.keys[0].spec
        return paged_attention(query, keys, values, spec, spec, table, lengths, impl="triton")

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for now in ((0, 1), (17, 64), (200, 333)):
        lengths.copy_(torch.tensor(now, dtype=torch.int32))
        graph.replay()
        for got, want in zip(captured, run(), strict=True):
            assert torch.equal(got, want)
