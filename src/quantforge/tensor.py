"""`QuantTensor`: vectors that stay packed behind the interface of a torch tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch

from quantforge.config import QuantForgeConfig
from quantforge.errors import InputError, UnsupportedError
from quantforge.ops.checks import check_packed, check_statistic
from quantforge.ops.dequantize import op as dequantize_op
from quantforge.ops.quantize.api import quantize
from quantforge.spec import QuantSpec

FIELDS = ("_packed", "_scales", "_shift", "_equalizer")
"""The inner tensors; everything else of a QuantTensor is constant metadata."""

Container = Literal["torch", "numpy"]
"""What the vectors were before coding, and what `QuantPipeline.decompress` gives back."""

FUNCTIONS: dict[Any, Callable[..., Any]] = {}
"""Handlers of torch functions, taken before torch decomposes them; filled by `dispatch`."""
OPERATORS: dict[Any, Callable[..., Any]] = {}
"""Handlers of aten operators: views, copies, and what functions decompose to."""


class QuantTensor(torch.Tensor):
    """Packed vectors with the shape and dtype of what they stand for.

    `x ~= shift + equalizer * R^T (scale * centroids[codes])`. Views along all axes but the last,
    copies and moves work on the codes; `F.linear`, matmul and
    `F.scaled_dot_product_attention` read them in place. Every other operation raises
    `UnsupportedError`: nothing is decoded behind your back. `dequantize()` decodes.

    Build one with `QuantTensor.quantize(x)`. The constructor takes the parts:

    Args:
        packed: (..., row_bytes) uint8.
        scales: (..., 1) or (..., 2) in the spec's scale dtype.
        spec: the code.
        shift: (dim,), or (..., 1, dim) broadcasting against the logical shape, or None.
        equalizer: likewise.
        dtype: what the tensor stands for and `dequantize` returns.
        container: "numpy" if the vectors came as a numpy array; `dequantize` does not look at it.

    Raises:
        InputError: if the parts do not fit together.
    """

    _packed: torch.Tensor
    _scales: torch.Tensor
    _shift: torch.Tensor | None
    _equalizer: torch.Tensor | None
    _spec_key: str
    _dim: int
    _n_rep: int
    _transposed: bool
    _container: Container

    def __new__(
        cls,
        packed: torch.Tensor,
        scales: torch.Tensor,
        spec: QuantSpec,
        *,
        shift: torch.Tensor | None = None,
        equalizer: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        container: Container = "torch",
    ) -> QuantTensor:
        """Check the parts and wrap them."""
        if not isinstance(spec, QuantSpec):
            raise InputError(f"spec must be a QuantSpec; got {type(spec).__name__}")
        check_packed("packed", packed, scales, spec)
        shape = torch.Size((*packed.shape[:-1], spec.dim))
        check_statistic("shift", shift, shape)
        check_statistic("equalizer", equalizer, shape)
        for name, t in (("shift", shift), ("equalizer", equalizer)):
            if t is not None and t.device != packed.device:
                raise InputError(f"{name} is on {t.device} but packed is on {packed.device}")
        if not dtype.is_floating_point:
            raise InputError(f"dtype must be a floating-point dtype; got {dtype}")
        if container not in get_args(Container):
            raise InputError(f'container must be "torch" or "numpy"; got {container!r}')
        parts = (packed, scales, _aligned(shift, shape), _aligned(equalizer, shape))
        return cls._make(*parts, (spec.key, spec.dim, dtype, 1, False, container))

    @classmethod
    def _make(
        cls,
        packed: torch.Tensor,
        scales: torch.Tensor,
        shift: torch.Tensor | None,
        equalizer: torch.Tensor | None,
        meta: tuple[str, int, torch.dtype, int, bool, Container],
    ) -> QuantTensor:
        """Build from parts that are known to fit; statistics have the ndim of packed."""
        spec_key, dim, dtype, n_rep, transposed, container = meta
        shape = [*packed.shape[:-1], dim]
        if n_rep > 1:
            shape[-3] = shape[-3] * n_rep
        if transposed:
            shape[-1], shape[-2] = shape[-2], shape[-1]
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=packed.device)
        self._packed, self._scales, self._shift, self._equalizer = packed, scales, shift, equalizer
        self._spec_key, self._dim = spec_key, dim
        self._n_rep, self._transposed, self._container = n_rep, transposed, container
        return self

    @classmethod
    def quantize(
        cls,
        x: torch.Tensor,
        config: QuantForgeConfig | QuantSpec | None = None,
        *,
        shift: torch.Tensor | None = None,
        equalizer: torch.Tensor | None = None,
    ) -> QuantTensor:
        """Quantize x (..., dim), keeping its shape, dtype and device.

        Args:
            x: float tensor.
            config: the code; `QuantForgeConfig()` if None. Its `shift` and `equalizer` settings
                belong to `QuantPipeline`, which measures them; here they are given.
            shift: (dim,), or (..., 1, dim) broadcasting against x.
            equalizer: likewise, positive.

        Raises:
            InputError: for a wrong shape or dtype, NaN or infinity.
        """
        if x.ndim == 0:
            raise InputError("x must have at least one axis, the vectors' own; got a scalar")
        config = QuantForgeConfig() if config is None else config
        spec = config if isinstance(config, QuantSpec) else config.spec(x.shape[-1])
        packed, scales = quantize(x, spec, shift=shift, equalizer=equalizer)
        return cls(packed, scales, spec, shift=shift, equalizer=equalizer, dtype=x.dtype)

    # ---- parts ---------------------------------------------------------------------------

    @property
    def spec(self) -> QuantSpec:
        """The code."""
        return QuantSpec.from_key(self._spec_key)

    @property
    def packed(self) -> torch.Tensor:
        """Packed codes (..., row_bytes), uint8."""
        return self._packed

    @property
    def scales(self) -> torch.Tensor:
        """Scales (..., 1), or (..., 2) with the QJL residual."""
        return self._scales

    @property
    def shift(self) -> torch.Tensor | None:
        """The vector subtracted before coding, (..., 1, dim), or None."""
        return self._shift

    @property
    def equalizer(self) -> torch.Tensor | None:
        """The channel factors divided out before coding, (..., 1, dim), or None."""
        return self._equalizer

    @property
    def container(self) -> Container:
        """What the vectors were before coding: "torch" or "numpy"."""
        return self._container

    @property
    def nbytes_packed(self) -> int:
        """Bytes held: codes, scales, shift and equalizer (`nbytes` is what they stand for)."""
        return sum(t.numel() * t.element_size() for t in self._inner().values())

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Decode into a dense tensor of the same shape, in `dtype` or the tensor's own."""
        out = dequantize_op.dequantize(
            self._packed,
            self._scales,
            self._shift,
            self._equalizer,
            self._spec_key,
            self.dtype if dtype is None else dtype,
        )
        if self._n_rep > 1:
            out = out.repeat_interleave(self._n_rep, dim=-3)
        return out.mT if self._transposed else out

    # ---- what torch asks of a wrapper subclass ----------------------------------------------

    def _inner(self) -> dict[str, torch.Tensor]:
        return {name: t for name in FIELDS if (t := getattr(self, name)) is not None}

    def _meta(self, **changes: Any) -> tuple[str, int, torch.dtype, int, bool, Container]:
        return (
            self._spec_key,
            self._dim,
            changes.get("dtype", self.dtype),
            changes.get("n_rep", self._n_rep),
            changes.get("transposed", self._transposed),
            changes.get("container", self._container),
        )

    def _map(self, f: Callable[[torch.Tensor], torch.Tensor], **changes: Any) -> QuantTensor:
        """Apply f to every inner tensor; `changes` go into the metadata."""
        shift, equalizer = (None if t is None else f(t) for t in (self._shift, self._equalizer))
        meta = self._meta(**changes)
        return QuantTensor._make(f(self._packed), f(self._scales), shift, equalizer, meta)

    def __tensor_flatten__(self) -> tuple[list[str], tuple]:
        return list(self._inner()), self._meta()

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, torch.Tensor], meta: tuple, outer_size: Any, outer_stride: Any
    ) -> QuantTensor:
        packed, scales, shift, equalizer = FIELDS
        statistics = (inner.get(shift), inner.get(equalizer))
        return QuantTensor._make(inner[packed], inner[scales], *statistics, meta)

    @classmethod
    def __metadata_guard__(cls, ours: tuple, theirs: tuple) -> bool:
        return ours == theirs

    def _stable_hash_for_caching(self) -> str:
        return f"{list(self._inner())}{self._meta()}"

    def __repr__(self) -> str:  # type: ignore[override]
        spec = self.spec
        return (
            f"QuantTensor(shape={tuple(self.shape)}, dtype={self.dtype}, bits={spec.bits}, "
            f"rotation={spec.rotation!r}, device={str(self.device)!r}, "
            f"nbytes_packed={self.nbytes_packed})"
        )

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if (handler := FUNCTIONS.get(func)) is not None:
            return handler(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled() and _is_normal_tensor(args):
            # a view of a tensor made outside inference mode cannot be made inside (pytorch #112024)
            with torch.inference_mode(False), torch.no_grad():
                return _run(func, args, kwargs)
        return _run(func, args, kwargs)


def _is_normal_tensor(args: tuple) -> bool:
    return bool(args) and isinstance(args[0], torch.Tensor) and not args[0].is_inference()


def _run(func: Any, args: tuple, kwargs: dict) -> Any:
    if (handler := OPERATORS.get(func)) is not None:
        return handler(*args, **kwargs)
    if func._can_decompose():  # inference mode delivers composite operators whole
        return func.decompose(*args, **kwargs)
    types = ", ".join(type(arg).__name__ for arg in args)
    raise UnsupportedError(
        f"{func} is not defined on QuantTensor; got ({types}). Decode first with .dequantize(), or "
        "see docs/tensor.md for the operations that work on packed codes"
    )


def _aligned(statistic: torch.Tensor | None, shape: torch.Size) -> torch.Tensor | None:
    """Give a shift or equalizer the ndim of the vectors it belongs to."""
    if statistic is None or statistic.ndim == len(shape):
        return statistic
    return statistic.reshape((1,) * (len(shape) - statistic.ndim) + statistic.shape)


QuantizedTensor = QuantTensor

torch.serialization.add_safe_globals([QuantTensor])

# handlers live there; whoever imports this module has them
import quantforge.dispatch  # noqa: E402, F401
