"""A device that is none: its tensors hold numbers, and refuse to meet those of the CPU.

`torch.device("meta", 7)` stands in for a GPU where there is none. What a GPU refuses is refused
here: an operation on tensors of both, and numpy's look at one. Numbers of no dimension and indices
may be on the CPU, as on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from quantforge.ops import constants, transform

DEVICE = torch.device("meta", 7)
aten = torch.ops.aten
INDEXING = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)
COPIES = (aten.copy_.default, aten._to_copy.default)


class Elsewhere(torch.Tensor):
    """A tensor that says it is on the device, around one of the CPU."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Elsewhere:
        found = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), dtype=inner.dtype, device=DEVICE
        )
        found.inner = inner
        return found

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __deepcopy__(self, memo: Any) -> Elsewhere:
        return Elsewhere(self.inner.clone())

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("numpy was asked for a tensor that is on a device")


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    there = [t for t in given if isinstance(t, Elsewhere)]
    here = [t for t in given if not isinstance(t, Elsewhere) and t.ndim]
    asked = kwargs.get("device")
    is_ours = func.namespace == "quantforge"
    if there and here and not is_ours:
        allowed = func in COPIES or (func in INDEXING and isinstance(args[0], Elsewhere))
        assert allowed, f"{func} of {[t.shape for t in there]} there and {[t.shape for t in here]}"
    if asked is not None:
        kwargs = {**kwargs, "device": "cpu"}
    plain = tree_map(lambda t: t.inner if isinstance(t, Elsewhere) else t, (args, kwargs))
    found = func(*plain[0], **plain[1])
    if func is aten.copy_.default:
        return args[0]
    goes = torch.device(asked) == DEVICE if asked is not None else bool(there)
    if not goes:
        return found
    if func._schema.is_mutable and isinstance(args[0], Elsewhere):
        return args[0]
    return tree_map(lambda t: Elsewhere(t) if isinstance(t, torch.Tensor) else t, found)


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Here:
    """Runs in the calling thread, where the mode is on, what else has a thread of its own."""

    def __init__(self, *_: Any) -> None:
        pass

    def __enter__(self) -> _Here:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def submit(self, call: Any, *args: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(call(*args))
        return done


@contextmanager
def device() -> Iterator[torch.device]:
    """Give the device a meaning while this lasts."""
    limits = {"meta": transform.MAX_DENSE_DIM["cuda"]}
    with (
        mock.patch.object(constants, "ThreadPoolExecutor", _Here),
        mock.patch.dict(transform.MAX_DENSE_DIM, limits),
        _Mode(),
    ):
        yield DEVICE
