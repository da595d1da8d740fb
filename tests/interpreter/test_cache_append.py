"""The kernel of `cache_append` on the CPU, by Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantforge.numerics.encode import Encoded
from quantforge.numerics.packing import packed_width
from quantforge.ops import cache_append
from quantforge.ops.cache_append.reference import cache_append as reference
from quantforge.spec import QuantSpec
from tests.helpers import Statistic, assert_same_bits, gaussian, statistics_of
from tests.interpreter import INTERPRET

pytestmark = pytest.mark.skipif(not INTERPRET, reason="run with TRITON_INTERPRET=1")

CAPACITY = 20


def _buffers(spec: QuantSpec, *lead: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return buffers of garbage: what is not written must stay."""
    packed = torch.full((*lead, CAPACITY, packed_width(spec)), 0xA5, dtype=torch.uint8)
    return packed, torch.full((*lead, CAPACITY, spec.scales_per_vector), torch.nan).half()


def _copy(packed: torch.Tensor, scales: torch.Tensor) -> Encoded:
    return Encoded(packed.numpy().copy(), scales.numpy().copy())


@pytest.mark.parametrize("statistic", ["none", "shared", "per_head"])
@pytest.mark.parametrize(
    "spec",
    [QuantSpec(64, 4), QuantSpec(64, 3, estimator="prod"), QuantSpec(80, 8), QuantSpec(112, 1)],
    ids=lambda s: f"{s.dim}-{s.bits}-{s.estimator}",
)
def test_is_quantize_then_assignment(spec: QuantSpec, statistic: Statistic) -> None:
    packed, scales = _buffers(spec, 2, 3)
    expected = _copy(packed, scales)
    shift, equalizer = statistics_of(statistic, (2, 3), spec.dim)
    tensors = [None if s is None else torch.from_numpy(s) for s in (shift, equalizer)]
    position = 0
    for n in (5, 1, 0, 14):
        x = gaussian(2, 3, n, spec.dim, seed=n)
        cache_append(
            packed,
            scales,
            torch.from_numpy(x),
            torch.tensor(position),
            spec,
            shift=tensors[0],
            equalizer=tensors[1],
            impl="triton",
        )
        if n:
            reference(expected, x, position, spec, shift, equalizer)
        assert_same_bits(packed, scales, expected)
        position += n
    assert position == CAPACITY


def test_strided_buffers() -> None:
    """Buffers stored (n, H, bytes) and seen as (H, n, bytes)."""
    spec = QuantSpec(64, 4)
    packed, scales = (t.transpose(0, 1).contiguous() for t in _buffers(spec, 3))
    expected = Encoded(packed.numpy().copy(), scales.numpy().copy())
    x = gaussian(3, 5, 64)
    views = packed.transpose(0, 1), scales.transpose(0, 1)
    cache_append(*views, torch.from_numpy(x), torch.tensor(1), spec, impl="triton")
    reference(
        Encoded(*(np.swapaxes(a, 0, 1) for a in (expected.packed, expected.scales))), x, 1, spec
    )
    assert_same_bits(packed, scales, expected)
