"""Shared by the tests: packed inputs with their oracles, the tolerance, and a memory probe."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from quantforge.numerics.codebook import codebook_of
from quantforge.numerics.encode import Encoded, decode, encode
from quantforge.numerics.packing import row_bytes, unpack
from quantforge.numerics.rotation import qjl_seed, rotation_matrix
from quantforge.spec import QuantSpec, hadamard_base

CPU = torch.device("cpu")
ODD_SIZES = (0, 1, 63, 100, 127)
Statistic = Literal["none", "shared", "per_head"]
Form = Literal["decoded", "rotated"]


def spec_of(dim: int, bits: int = 4, **fields: Any) -> QuantSpec:
    """Return a spec with the Hadamard rotation where the dim has one, else QR."""
    rotation = "qr" if hadamard_base(dim) is None else "hadamard"
    return QuantSpec(dim, bits, **{"rotation": rotation, **fields})


def gaussian(*shape: int, seed: int = 0) -> np.ndarray:
    """Return float32 normal numbers."""
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def sphere(n: int, dim: int, seed: int = 0) -> np.ndarray:
    """Return n uniformly distributed unit vectors in float64."""
    x = np.random.RandomState(seed).standard_normal((n, dim))
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def to_numpy(x: torch.Tensor) -> np.ndarray:
    """Return a tensor's values in numpy (bfloat16 as float32, which holds it exactly)."""
    x = x.detach().cpu()
    return x.float().numpy() if x.dtype == torch.bfloat16 else x.numpy()


def to_float64(x: torch.Tensor) -> np.ndarray:
    """Return a tensor's values in float64 numpy."""
    return to_numpy(x).astype(np.float64)


def assert_same_bits(packed: torch.Tensor, scales: torch.Tensor, expected: Encoded) -> None:
    """Assert that codes and scales are the same bytes, the sign of a zero included."""
    for name, got, want in (
        ("packed", packed, expected.packed),
        ("scales", scales, expected.scales),
    ):
        array = to_numpy(got)
        assert array.shape == want.shape, f"{name}: shape {array.shape}, expected {want.shape}"
        assert array.dtype == want.dtype, f"{name}: dtype {array.dtype}, expected {want.dtype}"
        bytes_got = np.ascontiguousarray(array).view(np.uint8)
        different = bytes_got != np.ascontiguousarray(want).view(np.uint8)
        rows = np.argwhere(different.any(axis=-1))
        assert not len(rows), f"{name}: {len(rows)} vectors differ, first {rows[0]}"


def assert_close(actual: torch.Tensor, naive: Sequence[torch.Tensor], exact: np.ndarray) -> None:
    """Assert `|impl - f64| <= 2 * (|eager in the same dtype - f64| + eps(out) * max|f64|)`.

    `naive` evaluates the formula in float32, the plainest way torch can (where a kernel multiplies
    half numbers, also with operands of that dtype), and is rounded to the dtype of `actual`. The
    errors are maxima over the tensor. A maximum of rounding errors is a matter of luck where one
    query decides it, so there may be several evaluations: the worst counts. Infinities must agree.
    """
    assert tuple(actual.shape) == exact.shape
    got = to_float64(actual)
    finite = np.isfinite(exact)
    np.testing.assert_array_equal(got[~finite], exact[~finite])
    if not finite.any():
        return
    assert np.isfinite(got[finite]).all(), "not finite where the oracle is"
    error = np.abs(got[finite] - exact[finite]).max()
    naive_error = 0.0
    for evaluation in naive:
        assert tuple(evaluation.shape) == exact.shape
        rounded = to_float64(evaluation.to(actual.dtype))
        naive_error = max(naive_error, np.abs(rounded[finite] - exact[finite]).max())
    step = torch.finfo(actual.dtype).eps * np.abs(exact[finite]).max()
    bound = 2 * (naive_error + step)
    assert error <= bound, f"error {error:.3g} > {bound:.3g} (naive: {naive_error:.3g})"


@dataclass(frozen=True)
class Store:
    """Packed vectors made by the numpy oracle, on a device, with their exact decodings."""

    spec: QuantSpec
    encoded: Encoded
    shift_array: np.ndarray | None
    equalizer_array: np.ndarray | None
    device: torch.device = CPU

    def _tensor(self, array: np.ndarray | None) -> torch.Tensor | None:
        return None if array is None else torch.from_numpy(array).to(self.device)

    @cached_property
    def packed(self) -> torch.Tensor:
        return torch.from_numpy(self.encoded.packed).to(self.device)

    @cached_property
    def scales(self) -> torch.Tensor:
        return torch.from_numpy(self.encoded.scales).to(self.device)

    @cached_property
    def statistics(self) -> dict[str, torch.Tensor | None]:
        """Keyword arguments `shift` and `equalizer`."""
        return {
            "shift": self._tensor(self.shift_array),
            "equalizer": self._tensor(self.equalizer_array),
        }

    @cached_property
    def exact(self) -> np.ndarray:
        """The vectors by the float64 oracle."""
        return decode(self.encoded, self.spec, self.shift_array, self.equalizer_array)

    @cached_property
    def naive(self) -> torch.Tensor:
        """The vectors by the formula in plain float32 torch, on the CPU."""
        return naive_decode(self.encoded, self.spec, self.shift_array, self.equalizer_array)


def statistics_of(
    kind: Statistic, lead: tuple[int, ...], dim: int, seed: int = 7
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return a shift and a positive equalizer: none, (dim,), or (*lead, 1, dim)."""
    if kind == "none":
        return None, None
    shape = (dim,) if kind == "shared" else (*lead, 1, dim)
    shift = 2 * gaussian(*shape, seed=seed)
    return shift, np.exp(gaussian(*shape, seed=seed + 1))


def make_store(
    spec: QuantSpec,
    *shape: int,
    statistic: Statistic = "none",
    device: torch.device = CPU,
    seed: int = 0,
    magnitude: float = 1.0,
) -> Store:
    """Return a store of random vectors, `shape` without the last axis."""
    shift, equalizer = statistics_of(statistic, shape[:-1], spec.dim, seed + 100)
    x = np.float32(magnitude) * gaussian(*shape, spec.dim, seed=seed)
    if equalizer is not None and shift is not None:
        x = x * equalizer + shift
    if x.size:
        encoded = encode(x, spec, shift, equalizer)
    else:
        one = encode(np.ones((1, spec.dim), np.float32), spec)
        encoded = Encoded(
            np.zeros((*shape, one.packed.shape[-1]), np.uint8),
            np.zeros((*shape, one.scales.shape[-1]), one.scales.dtype),
        )
    return Store(spec, encoded, shift, equalizer, device)


def naive_decode(
    encoded: Encoded, spec: QuantSpec, shift: np.ndarray | None, equalizer: np.ndarray | None
) -> torch.Tensor:
    """Evaluate the decoding formula in float32 torch, codes unpacked one by one."""
    x = _naive_rotated(encoded, spec) @ _rotation(spec, spec.seed)
    if equalizer is not None:
        x = x * torch.from_numpy(equalizer)
    return x if shift is None else x + torch.from_numpy(shift)


def _rotation(spec: QuantSpec, seed: int) -> torch.Tensor:
    return torch.from_numpy(rotation_matrix(spec, seed=seed)).float()


def _naive_rotated(encoded: Encoded, spec: QuantSpec) -> torch.Tensor:
    """Return decoded vectors before rotation, equalizer and shift are undone."""
    codes = torch.from_numpy(unpack(encoded.packed, spec.dim, spec.code_bits).astype(np.int64))
    scales = torch.from_numpy(encoded.scales).float()
    rotated = scales[..., :1] * torch.from_numpy(codebook_of(spec).centroids)[codes]
    if spec.estimator == "prod":
        plane = encoded.packed[..., row_bytes(spec.dim, spec.code_bits) :]
        signs = 2.0 * torch.from_numpy(unpack(plane, spec.dim, 1)).float() - 1.0
        rotated = rotated + scales[..., 1:] * (signs @ _rotation(spec, qjl_seed(spec.seed)))
    return rotated


FORMS: tuple[Form, ...] = ("decoded", "rotated")


def naive_scores(
    query: torch.Tensor, store: Store, form: Form, operand: torch.dtype = torch.float32
) -> torch.Tensor:
    """Evaluate `q . x`, or `R (equalizer * q) . rotated + q . shift`, in float32 on the CPU.

    The rotation mixes loud channels into all others, so the second rounds worse than the first;
    reading codes without decoding them cannot do better. The vectors are rounded to `operand`
    before they are multiplied.
    """
    query = query.cpu().float()
    if form == "decoded":
        return query @ store.naive.to(operand).float().mT
    shift, equalizer = store.shift_array, store.equalizer_array
    turned = query if equalizer is None else query * torch.from_numpy(equalizer)
    turned = turned @ _rotation(store.spec, store.spec.seed).T
    result = turned @ _naive_rotated(store.encoded, store.spec).to(operand).float().mT
    return result if shift is None else result + (query * torch.from_numpy(shift)).sum(-1, True)


def naive_combine(
    weights: torch.Tensor, store: Store, form: Form, operand: torch.dtype = torch.float32
) -> torch.Tensor:
    """Evaluate `w @ x`, or `equalizer * R^T (w @ rotated) + sum(w) shift`, likewise."""
    weights = weights.cpu().float()
    if form == "decoded":
        return weights @ store.naive.to(operand).float()
    total = weights @ _naive_rotated(store.encoded, store.spec).to(operand).float()
    x = total @ _rotation(store.spec, store.spec.seed)
    if store.equalizer_array is not None:
        x = x * torch.from_numpy(store.equalizer_array)
    if store.shift_array is None:
        return x
    return x + weights.sum(-1, keepdim=True) * torch.from_numpy(store.shift_array)


def scattered(x: torch.Tensor) -> torch.Tensor:
    """Return x as every other row of a bigger buffer of garbage: NaN, or 0xA5 in integers."""
    garbage = torch.nan if x.is_floating_point() else 0xA5
    *lead, n, width = x.shape
    buffer = torch.full((*lead, 2 * n + 3, width + 5), garbage, dtype=x.dtype, device=x.device)
    view = buffer[..., 1 : 2 * n + 1 : 2, 2 : width + 2]
    view.copy_(x)
    return view


def transposed(x: torch.Tensor) -> torch.Tensor:
    """Return x as the transposed view of a contiguous tensor: its last axis has a stride."""
    return x.mT.contiguous().mT


def misaligned(x: torch.Tensor) -> torch.Tensor:
    """Return x contiguous, but from the second element of its storage on."""
    buffer = x.new_zeros(x.numel() + 1)
    return buffer[1:].view(x.shape).copy_(x)


LAYOUTS = {"scattered": scattered, "transposed": transposed, "misaligned": misaligned}


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run torch on several threads: lookups take another path there."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def peak_extra_bytes(run: Callable[[], torch.Tensor], device: torch.device) -> int:
    """Return the greatest memory that `run` held at once beyond its result, by the allocator."""
    run()  # constants are made once and stay
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with profile(
            activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
        ) as trace:
            result = run()
        held = peak = 0
        for event in trace.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
    return peak - result.numel() * result.element_size()
