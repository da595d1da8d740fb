"""A window of a static cache layer beside the oracle that says what it must hold."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from quantforge.numerics.pages import page_layout
from quantforge.ops import window_append
from quantforge.ops._library import Impl
from quantforge.ops.pages import codes_of, read_key_pages, read_value_pages
from quantforge.ops.window_append.api import Window, new_window
from quantforge.ops.window_append.reference import Head
from quantforge.spec import QuantSpec
from tests.helpers import gaussian, to_numpy


@dataclass(frozen=True)
class Case:
    """Sizes of a window, and its codes."""

    k: QuantSpec
    v: QuantSpec
    page: int
    sinks: int = 4
    recent: int = 24
    pages: int = 3
    paged: bool = False
    batch: int = 2
    heads: int = 2
    dtype: torch.dtype = torch.float32

    @property
    def rows(self) -> int:
        return self.sinks + self.recent + self.page

    @property
    def most(self) -> int:
        """Tokens that may be appended at once."""
        return min(self.page, self.recent + 1)


def paged(k_bits: int, v_bits: int, dim: int = 128, **changes: object) -> Case:
    """Return a case with pages."""
    k, v = QuantSpec(dim, k_bits, scale_rule="norm"), QuantSpec(dim, v_bits)
    return replace(Case(k, v, page_layout(k, v).tokens, paged=True), **changes)


def in_rows(k: QuantSpec, v: QuantSpec, page: int, **changes: object) -> Case:
    """Return a case with rows."""
    return replace(Case(k, v, page), **changes)


CASES = {
    "pages-4": paged(4, 4),
    "pages-3": paged(3, 3, batch=1),
    "pages-2-4": paged(2, 4, batch=1, sinks=0),
    "pages-4-2": paged(4, 2, batch=1),
    "pages-4-dim64": paged(4, 4, 64, recent=0),
    "rows": in_rows(QuantSpec(64, 4, scale_rule="mse"), QuantSpec(32, 3), 8),
    "rows-8": in_rows(QuantSpec(32, 8), QuantSpec(64, 1), 12, batch=3, recent=100),
}


class Pair:
    """The window of a case, and an oracle for each head of keys and of values."""

    def __init__(
        self,
        case: Case,
        device: torch.device,
        *,
        measured: bool,
        shifts: bool = True,
        queries: bool = False,
    ) -> None:
        self.case, self.specs = case, (case.k, case.v)
        lead = (case.batch, case.heads)
        like = [torch.empty((*lead, 1, s.dim), dtype=case.dtype, device=device) for s in self.specs]
        layout = page_layout(*self.specs) if case.paged else None
        tokens = case.pages * case.page
        self.window: Window = new_window(*like, case.rows, tokens, layout, self.specs)
        self.heads = [
            [
                Head(spec, case.sinks, case.rows, case.page, tokens, shifts=shifts)
                for _ in range(case.batch * case.heads)
            ]
            for spec in self.specs
        ]
        self.position = 0
        if measured:  # given statistics, so that codes can be compared bit by bit
            for i, statistics in enumerate(self.window[6:8]):
                shift = gaussian(*lead, 1, self.specs[i].dim, seed=i)
                equalizer = np.exp(gaussian(*lead, 1, self.specs[i].dim, seed=i + 2))
                statistics[0] = torch.from_numpy(shift)
                statistics[1] = torch.from_numpy(equalizer)
                for j, head in enumerate(self.heads[i]):
                    head.shift = shift.reshape(-1, 1, shift.shape[-1])[j]
                    head.equalizer = equalizer.reshape(-1, 1, shift.shape[-1])[j]
        if queries:  # whose RMS was seen before the first page is packed
            rms = np.exp(2 * gaussian(*lead, 1, case.k.dim, seed=9))
            rms[..., 3] = 0
            self.window.k_statistics[2] = torch.from_numpy(rms)
            for j, head in enumerate(self.heads[0]):
                head.query_rms = rms.reshape(-1, 1, case.k.dim)[j].astype(np.float64)
        self.flags = (shifts and not measured, not measured)

    def append(self, q: int, impl: Impl = "auto") -> None:
        """Append q random tokens to both."""
        case, new = self.case, []
        for i, dense in enumerate(self.window[:2]):
            shape = (
                case.batch,
                q,
                case.heads,
                self.specs[i].dim,
            )  # a transposed view, as in models
            x = 3 * gaussian(*shape, seed=7 * self.position + i) + gaussian(shape[-1], seed=i)
            x = torch.from_numpy(x).to(dense).transpose(1, 2)
            new.append(x)
            exact = to_numpy(x).reshape(-1, q, shape[-1])
            for head, rows in zip(self.heads[i], exact, strict=True):
                head.append(rows)
        self.position += q
        window_append(
            self.window, *new, self.specs, n_sinks=case.sinks, page=case.page,
            shift=self.flags[0], equalizer=self.flags[1], impl=impl,
        )  # fmt: skip

    def crop(self, tokens: int) -> None:
        """Remove packed tokens from both, and all dense rows but the sinks."""
        n_packed = int(self.window.counts[0, 0]) - tokens
        self.window.counts[0] = n_packed
        self.window.counts[1] = self.case.sinks
        for head in (*self.heads[0], *self.heads[1]):
            head.crop(n_packed, self.case.sinks)

    def held(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return dense rows, codes and scales of keys (0) or values (1), by head."""
        case, spec = self.case, self.specs[i]
        n_packed, n_dense = self.window.counts[:2, 0].tolist()
        dense = self.window[i][:, :, :n_dense].flatten(0, 1)
        packed, scales = self.window[2 + i], self.window[4 + i]
        if case.paged:
            read = read_value_pages if i else read_key_pages
            codes, scales = read(packed.transpose(1, 2), page_layout(*self.specs))
        else:
            codes, scales = codes_of(packed, spec.dim, spec.bits), scales[..., 0]
        codes, scales = (t[:, :, :n_packed].flatten(0, 1) for t in (codes, scales))
        return to_numpy(dense), to_numpy(codes), to_numpy(scales)

    def check(self) -> None:
        """Assert that the window holds what the oracles do, codes and scales bit for bit."""
        counts = self.window.counts.cpu()
        assert bool((counts == counts[:, :1]).all()), "sequences of a batch differ in length"
        assert int(counts[2, 0]) == self.heads[0][0].lost
        assert not counts[3].any(), "the kernel's own count is not back at zero"
        for i in range(2):
            for head, dense, codes, scales in zip(self.heads[i], *self.held(i), strict=True):
                np.testing.assert_array_equal(dense, np.reshape(head.dense, dense.shape))
                np.testing.assert_array_equal(codes, np.reshape(head.codes, codes.shape))
                expected = np.reshape(head.scales, scales.shape).astype(np.float16)
                np.testing.assert_array_equal(scales.view(np.uint16), expected.view(np.uint16))

    def check_measured(self, tolerance: float) -> None:
        """Assert that shift and equalizer are what the oracles measured."""
        for i in range(2):
            statistics = to_numpy(self.window[6 + i]).reshape(3, -1, self.specs[i].dim)
            for j, head in enumerate(self.heads[i]):
                assert head.shift is not None, "nothing was measured"
                assert head.equalizer is not None, "nothing was measured"
                scale = 1e-6 + np.abs(head.shift).max()
                np.testing.assert_allclose(statistics[0, j], head.shift[0], atol=tolerance * scale)
                np.testing.assert_allclose(statistics[1, j], head.equalizer[0], rtol=tolerance)
