"""`cache_append`: quantize, written into preallocated buffers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantforge.errors import InputError
from quantforge.numerics.encode import Encoded
from quantforge.numerics.packing import packed_width
from quantforge.ops import cache_append, quantize
from quantforge.ops.cache_append import op
from quantforge.ops.cache_append.reference import cache_append as reference
from quantforge.spec import QuantSpec
from tests.helpers import LAYOUTS, Statistic, assert_same_bits, gaussian, statistics_of

SPECS = (QuantSpec(64, 4), QuantSpec(96, 3, estimator="prod"), QuantSpec(80, 8))
CAPACITY = 20


def _buffers(
    spec: QuantSpec, *lead: int, device: torch.device, capacity: int = CAPACITY
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return buffers of garbage: what is not written must stay."""
    packed = torch.full((*lead, capacity, packed_width(spec)), 0xA5, dtype=torch.uint8)
    scales = torch.full((*lead, capacity, spec.scales_per_vector), torch.nan).half()
    return packed.to(device), scales.to(device)


def _copy(packed: torch.Tensor, scales: torch.Tensor) -> Encoded:
    return Encoded(packed.cpu().numpy().copy(), scales.cpu().numpy().copy())


@pytest.mark.parametrize("where", ["cpu", "device"])
@pytest.mark.parametrize("statistic", ["none", "shared", "per_head"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.dim}-{s.bits}-{s.estimator}")
def test_is_quantize_then_assignment(
    spec: QuantSpec, statistic: Statistic, where: str, device: torch.device
) -> None:
    packed, scales = _buffers(spec, 2, 3, device=device)
    expected = _copy(packed, scales)
    shift, equalizer = statistics_of(statistic, (2, 3), spec.dim)
    tensors = [None if s is None else torch.from_numpy(s).to(device) for s in (shift, equalizer)]
    position = 0
    for n in (5, 1, 0, 14):
        x = gaussian(2, 3, n, spec.dim, seed=n)
        at = torch.tensor(position, device="cpu" if where == "cpu" else device)
        cache_append(
            packed,
            scales,
            torch.from_numpy(x).to(device),
            at,
            spec,
            shift=tensors[0],
            equalizer=tensors[1],
        )
        if n:
            reference(expected, x, position, spec, shift, equalizer)
        assert_same_bits(packed, scales, expected)
        position += n
    assert position == CAPACITY


@pytest.mark.parametrize("position", [0, 7, CAPACITY - 4])
def test_writes_these_rows_and_no_others(position: int, device: torch.device) -> None:
    spec = QuantSpec(64, 4)
    packed, scales = _buffers(spec, 2, device=device)
    x = torch.from_numpy(gaussian(2, 4, 64)).to(device)
    before = _copy(packed, scales)
    cache_append(packed, scales, x, torch.tensor(position), spec)
    rows = slice(position, position + 4)
    new = quantize(x, spec)
    assert torch.equal(packed[:, rows], new[0])
    assert torch.equal(scales[:, rows], new[1])
    after = _copy(packed, scales)
    others = np.delete(np.arange(CAPACITY), np.arange(CAPACITY)[rows])
    np.testing.assert_array_equal(after.packed[:, others], before.packed[:, others])
    assert np.isnan(after.scales[:, others]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, device: torch.device) -> None:
    spec = QuantSpec(64, 4)
    packed, scales = _buffers(spec, device=device)
    x = torch.from_numpy(gaussian(3, 64)).to(device, dtype)
    cache_append(packed, scales, x, torch.tensor(2), spec)
    new = quantize(x, spec)
    assert torch.equal(packed[2:5], new[0])
    assert torch.equal(scales[2:5], new[1])


def test_mutation_is_seen_through_views(device: torch.device) -> None:
    """Views made before see the new rows, and a view of a bigger buffer can be written."""
    spec = QuantSpec(64, 4)
    packed, scales = _buffers(spec, 4, 2, device=device)
    seen = packed[1, :, 3:6], scales[1, :, 3:6]
    whole = _copy(packed, scales)
    x = torch.from_numpy(gaussian(2, 3, 64)).to(device)
    addresses = packed.data_ptr(), scales.data_ptr()
    cache_append(packed[1], scales[1], x, torch.tensor(3), spec)
    assert (packed.data_ptr(), scales.data_ptr()) == addresses
    new = quantize(x, spec)
    assert torch.equal(seen[0], new[0])
    assert torch.equal(seen[1], new[1])
    keep = [0, 2, 3]
    np.testing.assert_array_equal(packed.cpu().numpy()[keep], whole.packed[keep])


def test_strided_buffers(device: torch.device) -> None:
    """Buffers stored (n, H, bytes) and seen as (H, n, bytes)."""
    spec = QuantSpec(64, 4)
    packed, scales = (t.transpose(0, 1).contiguous() for t in _buffers(spec, 3, device=device))
    x = torch.from_numpy(gaussian(3, 5, 64)).to(device)
    cache_append(packed.transpose(0, 1), scales.transpose(0, 1), x, torch.tensor(1), spec)
    new = quantize(x, spec)
    assert torch.equal(packed[1:6].transpose(0, 1), new[0])
    assert torch.equal(scales[1:6].transpose(0, 1), new[1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("poison")
def test_layouts(layout: str, device: torch.device) -> None:
    spec = QuantSpec(64, 4)
    packed, scales = _buffers(spec, 2, device=device)
    x = torch.from_numpy(gaussian(2, 6, 64)).to(device)
    cache_append(packed, scales, LAYOUTS[layout](x), torch.tensor(0), spec)
    new = quantize(x, spec)
    assert torch.equal(packed[:, :6], new[0])
    assert torch.equal(scales[:, :6], new[1])


def test_bad_values_show_as_not_finite(device: torch.device) -> None:
    """No check waits for the device, but nothing bad passes for a number."""
    spec = QuantSpec(64, 4)
    packed, scales = _buffers(spec, device=device)
    x = torch.from_numpy(gaussian(4, 64)).to(device)
    x[1, 5], x[2, 6] = torch.nan, torch.inf
    cache_append(packed, scales, x, torch.tensor(0), spec)
    finite = torch.isfinite(scales[:4, 0]).tolist()
    assert finite == [True, False, False, True]


X = torch.ones(2, 4, 64)
PACKED, SCALES = _buffers(QuantSpec(64), 2, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position": torch.tensor(17)}, "rows 17 to 21.*capacity of 20"),
        ({"position": torch.tensor(-1)}, "rows -1 to 3.*capacity of 20"),
        ({"position": 3}, "position.*int64.*got int"),
        ({"position": torch.tensor(3.0)}, "position.*int64.*got torch.float32"),
        ({"position": torch.tensor([1, 2])}, r"position.*scalar.*got.*\(2,\)"),
        ({"x": X[..., :63]}, r"64.*got shape \(2, 4, 63\)"),
        ({"x": X.int()}, "floating.*got torch.int32"),
        ({"x": X[0]}, r"same leading axes; got \(4, 64\) and \(2, 20, 32\)"),
        ({"x": X[0, 0]}, r"got.*\(64,\)"),
        ({"x": torch.ones(3, 4, 64)}, r"same leading axes; got \(3, 4, 64\) and \(2, 20, 32\)"),
        ({"x": X[0, 0], "packed": PACKED[0, 0], "scales": SCALES[0, 0]}, r"got.*\(64,\)"),
        ({"packed": PACKED[..., :16]}, r"32 bytes.*got.*\(2, 20, 16\)"),
        ({"scales": SCALES[:, :4]}, r"\(2, 20, 1\); got.*\(2, 4, 1\)"),
        ({"shift": torch.ones(3, 1, 64)}, r"shift.*got \(3, 1, 64\)"),
        ({"equalizer": torch.ones(63)}, r"equalizer.*got \(63,\)"),
    ],
)
def test_bad_input(changes: dict, message: str) -> None:
    valid = {"packed": PACKED.clone(), "scales": SCALES.clone(), "x": X}
    valid |= {"position": torch.tensor(0), "spec": QuantSpec(64)}
    arguments = {**valid, **changes}
    with pytest.raises(InputError, match=message):
        cache_append(**arguments)
    assert bool(arguments["scales"].isnan().all())  # nothing was written


@pytest.mark.parametrize("statistic", ["none", "shared", "per_head"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.dim}-{s.bits}-{s.estimator}")
def test_opcheck(spec: QuantSpec, statistic: Statistic, device: torch.device) -> None:
    packed, scales = _buffers(spec, 2, device=device)
    scales.zero_()  # opcheck compares buffers, and NaN is not equal to itself
    shift, equalizer = statistics_of(statistic, (2,), spec.dim)
    tensors = [None if s is None else torch.from_numpy(s).to(device) for s in (shift, equalizer)]
    x = torch.from_numpy(gaussian(2, 4, spec.dim)).to(device)
    position = torch.tensor(3, device=device)
    torch.library.opcheck(op.cache_append, (packed, scales, x, position, *tensors, spec.key))


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [96, 128])
@pytest.mark.parametrize("statistic", ["none", "per_head"])
def test_captured_graph_appends_as_the_position_grows(statistic: Statistic, dim: int) -> None:
    """One capture, many replays: the kernel reads the position on the device."""
    spec, device = QuantSpec(dim, 4), torch.device("cuda")
    packed, scales = _buffers(spec, 2, 3, device=device)
    expected = _copy(packed, scales)
    shift, equalizer = statistics_of(statistic, (2, 3), dim)
    tensors = [None if s is None else torch.from_numpy(s).to(device) for s in (shift, equalizer)]
    x, position = torch.zeros(2, 3, 2, dim, device=device), torch.zeros((), dtype=torch.int64)
    position = position.to(device)

    def step() -> None:
        cache_append(
            packed,
            scales,
            x,
            position,
            spec,
            shift=tensors[0],
            equalizer=tensors[1],
            impl="triton",
        )
        position.add_(2)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles, and makes constants
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    position.zero_()
    for start in range(0, CAPACITY, 2):
        values = gaussian(2, 3, 2, dim, seed=start)
        x.copy_(torch.from_numpy(values))
        graph.replay()
        reference(expected, values, start, spec, shift, equalizer)
    assert_same_bits(packed, scales, expected)


@pytest.mark.gpu
def test_kernel_writes_nothing_past_the_capacity() -> None:
    """On a device the range is not checked; rows outside are dropped, memory beside them stays."""
    spec, device = QuantSpec(64, 4), torch.device("cuda")
    packed, scales = _buffers(spec, 4, device=device)
    before = _copy(packed, scales)
    x = torch.from_numpy(gaussian(2, 4, 64)).to(device)
    for position in (CAPACITY, CAPACITY + 1, -4):
        at = torch.tensor(position, device=device)
        cache_append(packed[1:3], scales[1:3], x, at, spec, impl="triton")
    assert_same_bits(packed, scales, before)
