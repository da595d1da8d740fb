"""Views, copies and writes of a `QuantTensor`, as a table.

A view is checked exactly: the same function of a tensor of row numbers says which codes it must
return.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from quantforge import QuantTensor, UnsupportedError
from quantforge.spec import QuantSpec
from tests.helpers import Store, assert_close, gaussian, make_store, spec_of

aten = torch.ops.aten
B, H, N, D = 2, 3, 6, 64

Dense = Callable[..., torch.Tensor]
"""dense(*shape): normal numbers, always the same, in the dtype of the run."""


@dataclass(frozen=True)
class Variant:
    """How the tensor of a table run is coded."""

    spec: QuantSpec
    statistic: Any = "none"


VARIANTS = {
    "4_bits": Variant(spec_of(D)),
    "1_bit": Variant(spec_of(D, 1)),
    "shared": Variant(spec_of(D, 3), "shared"),
    "per_head": Variant(spec_of(D), "per_head"),
    "prod": Variant(spec_of(D, 4, estimator="prod"), "per_head"),
    "qr": Variant(spec_of(40, 5, rotation="qr", codebook="gaussian"), "shared"),
}

MODES: dict[str, tuple[Callable[[], AbstractContextManager], Callable[[], AbstractContextManager]]]
MODES = {  # (where the tensor is made, where the operation runs)
    "grad": (torch.enable_grad, torch.enable_grad),
    "no_grad": (torch.enable_grad, torch.no_grad),
    "inference": (torch.inference_mode, torch.inference_mode),
    "into_inference": (torch.enable_grad, torch.inference_mode),
    "out_of_inference": (torch.inference_mode, torch.no_grad),
}


def store_of(variant: str, *shape: int, device: torch.device | str = "cpu") -> Store:
    v = VARIANTS[variant]
    return make_store(v.spec, *shape, statistic=v.statistic, device=torch.device(device))


def tensor_of(store: Store, dtype: torch.dtype = torch.float32) -> QuantTensor:
    parts = {name: None if t is None else t.clone() for name, t in store.statistics.items()}
    packed, scales = store.packed.clone(), store.scales.clone()
    return QuantTensor(packed, scales, store.spec, **parts, dtype=dtype)


def normal(dtype: torch.dtype, device: Any, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(gaussian(*shape, seed=sum(shape) + seed)).to(device, dtype)


def repeat_kv(x: torch.Tensor, n_rep: int) -> torch.Tensor:
    """As transformers writes it (models/llama/modeling_llama.py)."""
    batch, num_key_value_heads, slen, head_dim = x.shape
    if n_rep == 1:
        return x
    x = x[:, :, None, :, :].expand(batch, num_key_value_heads, n_rep, slen, head_dim)
    return x.reshape(batch, num_key_value_heads * n_rep, slen, head_dim)


def lazily(x: torch.Tensor, n_rep: int) -> torch.Tensor:
    return (
        x[:, :, None]
        .expand(*x.shape[:2], n_rep, *x.shape[2:])
        .reshape(x.shape[0], -1, *x.shape[2:])
    )


def index(*rows: int, x: torch.Tensor) -> torch.Tensor:
    return torch.tensor(rows, device=x.device)


# ---- the table: operations that rearrange (B, H, N, dim) ---------------------------------------

VIEWS: dict[str, Callable[[torch.Tensor], Any]] = {
    # slices
    "slice": lambda x: x[1:],
    "slice rows": lambda x: x[:, :, 2:5],
    "slice step": lambda x: x[:, :, 1::2],
    "slice negative": lambda x: x[:, :, -3:-1],
    "slice empty": lambda x: x[:, :, 3:3],
    "slice beyond": lambda x: x[:, :, :100],
    "slice all channels": lambda x: x[:, 1:, ..., -x.shape[-1] :],
    "ellipsis": lambda x: x[..., :2, :],
    "None": lambda x: x[None],
    "None before rows": lambda x: x[:, :, None],
    "None inside": lambda x: x[:, None, 1:, None],
    "int": lambda x: x[1],
    "int and slice": lambda x: x[-1, 1:, 2:],
    "narrow": lambda x: x.narrow(2, 1, 3),
    "select": lambda x: x.select(1, -1),
    "slice transposed": lambda x: x.mT[..., 1:4],
    "select transposed": lambda x: x.mT[1],
    # rows by number
    "list": lambda x: x[:, :, [0, 5, 2]],
    "bool mask": lambda x: x[:, torch.tensor([True, False, True], device=x.device)],
    "bool mask 0": lambda x: x[torch.tensor([False, True], device=x.device)],
    "index tensor": lambda x: x[:, :, index(3, 1, 1, x=x)],
    "index transposed": lambda x: x.mT[..., index(3, 1, x=x)],
    "index two axes": lambda x: x[:1, :, :1][index(0, 0, x=x), index(2, 1, x=x)],
    "index_select": lambda x: x.index_select(2, index(3, 1, x=x)),
    "index_select heads": lambda x: torch.index_select(x, 1, index(2, 0, 0, x=x)),
    "flip": lambda x: x.flip(0, 2),
    # pieces and joins
    "split": lambda x: x.split(4, dim=2),
    "split sizes": lambda x: torch.split(x, [1, 2], dim=1),
    "split empty": lambda x: x[:0].split(2),
    "chunk": lambda x: x.chunk(3, dim=2),
    "tensor_split": lambda x: x.tensor_split(4, dim=2),
    "unbind": lambda x: x.unbind(0),
    "iter": lambda x: list(x),
    "cat": lambda x: torch.cat([x, x[:1]]),
    "cat heads": lambda x: torch.cat([x[:, 1:], x], dim=1),
    "cat rows": lambda x: torch.cat([x[:, :, 2:], x[:, :, :1], x], dim=-2),
    "cat transposed": lambda x: torch.cat([x.mT, x.mT[..., :1]], dim=-1),
    "stack": lambda x: torch.stack([x, x], dim=1),
    # repetition
    "expand": lambda x: x[:1].expand(4, -1, -1, -1),
    "expand new axis": lambda x: x.expand(2, *x.shape),
    "expand_as": lambda x: x[:1].expand_as(x),
    "expand transposed": lambda x: x.mT[:1].expand(2, -1, -1, -1),
    "repeat": lambda x: x.repeat(2, 1, 2, 1),
    "repeat new axis": lambda x: x.repeat(2, 1, 1, 1, 1),
    "repeat_interleave": lambda x: x.repeat_interleave(2, dim=0),
    "repeat_interleave heads": lambda x: torch.repeat_interleave(x, 2, dim=1),
    "repeat_interleave tensor": lambda x: x.repeat_interleave(index(2, 0, 1, x=x), dim=1),
    "repeat_kv": lambda x: repeat_kv(x, 4),
    "repeat_kv once": lambda x: lazily(x, 1),
    "repeat_kv twice": lambda x: repeat_kv(repeat_kv(x, 2), 2),
    "repeat_kv slice": lambda x: repeat_kv(x, 2)[:, :, 1:4],
    "repeat_kv slice heads": lambda x: repeat_kv(x, 2)[:, 1:4],
    "repeat_kv select": lambda x: repeat_kv(x, 2)[1],
    "repeat_kv transpose": lambda x: repeat_kv(x, 2).transpose(2, 3),
    "repeat_kv flatten": lambda x: repeat_kv(x, 2).flatten(0, 1),
    "repeat_kv cat": lambda x: torch.cat([repeat_kv(x, 2), repeat_kv(x, 2)], dim=0),
    "repeat_kv unsqueeze": lambda x: repeat_kv(x, 2)[None],
    "repeat_kv permute": lambda x: repeat_kv(x, 2).permute(1, 0, 2, 3),
    "repeat_kv expand": lambda x: repeat_kv(x, 2).expand(3, -1, -1, -1, -1),
    "repeat_kv repeat": lambda x: repeat_kv(x, 2).repeat(2, 1, 1, 1),
    # shapes
    "reshape": lambda x: x.reshape(B * H, N, -1),
    "reshape same": lambda x: x.reshape(x.shape),
    "torch.reshape": lambda x: torch.reshape(x, (-1, 2, N, x.shape[-1])),
    "reshape keyword": lambda x: torch.reshape(x, shape=(B * H, N, x.shape[-1])),
    "reshape rows": lambda x: x.reshape(B, H, 3, 2, -1),
    "reshape transposed": lambda x: x.mT.reshape(B * H, x.shape[-1], N),
    "reshape strided": lambda x: x[:, 1:].reshape(-1, N, x.shape[-1]),
    "view": lambda x: x.view(B * H, 2, 3, -1),
    "view_as": lambda x: x.view_as(x),
    "flatten": lambda x: x.flatten(0, 1),
    "unflatten": lambda x: x.unflatten(2, (2, 3)),
    "unflatten and back": lambda x: x.unflatten(2, (2, 3)).flatten(2, 3),
    "squeeze": lambda x: x[:1].squeeze(0),
    "squeeze none": lambda x: x.squeeze(0),
    "squeeze dims": lambda x: x[:1, None].squeeze((0, 1)),
    "squeeze all": lambda x: x[:1, :, None].squeeze(),
    "unsqueeze": lambda x: x.unsqueeze(-2),
    "unsqueeze transposed": lambda x: x.mT.unsqueeze(1),
    "permute": lambda x: x.permute(1, 0, 2, 3),
    "permute transposed": lambda x: x.permute(1, 0, 3, 2),
    "permute back": lambda x: x.permute(1, 0, 3, 2).permute(1, 0, 3, 2),
    "transpose": lambda x: x.transpose(0, 1),
    "transpose channels": lambda x: x.transpose(-1, -2),
    "transpose twice": lambda x: x.mT.mT,
    "swapaxes": lambda x: x.swapaxes(0, 1),
    "movedim": lambda x: x.movedim(0, 1),
    ".mT": lambda x: x.mT,
    # copies
    "clone": lambda x: x.clone(),
    "detach": lambda x: x.detach(),
    "contiguous": lambda x: x.contiguous(),
    "contiguous strided": lambda x: x[:, 1:].contiguous(),
    "deepcopy": copy.deepcopy,
    "copy.copy": copy.copy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "to same": lambda x: x.to(x.device),
    "data": lambda x: x.data,
}

SHARED_VIEWS: dict[str, Callable[[torch.Tensor], Any]] = {
    # these put vectors of several heads into one row axis: one shift and equalizer for all, please
    "rows of heads": lambda x: x[:, :, 4],
    "heads as rows": lambda x: x.transpose(1, 2),
    "heads as rows, transposed": lambda x: x.permute(0, 2, 3, 1),
    "flatten all": lambda x: x.flatten(0, 2),
    "reshape to one axis": lambda x: x.reshape(-1, x.shape[-1]),
    "squeeze rows": lambda x: x[:, :, :1].squeeze(2),
    "unbind rows": lambda x: x.unbind(2),
    "index matrix": lambda x: x[:, :, index(0, 3, 1, 4, x=x).view(2, 2)],
    "mask of rows": lambda x: x[torch.arange(B * H * N, device=x.device).view(B, H, N) % 2 == 0],
    "index last of three": lambda x: x[0, index(1, 0, x=x), index(5, 2, x=x)],
    "select transposed row": lambda x: x.mT[..., 3],
    "2-D .T": lambda x: x.flatten(0, 2).T,
    "2-D .t()": lambda x: x.flatten(0, 2).t(),
    "1-D": lambda x: x[0, 0][2],
    "1-D .t()": lambda x: aten.t.default(x[1, 1, 3]),
    "1-D None": lambda x: x[1, 1, 3][None],
}
WORKS_PER_HEAD = {"1-D", "1-D .t()", "1-D None"}

ATEN_VIEWS: dict[str, Callable[[torch.Tensor], Any]] = {
    # what torch functions decompose to, called directly
    "aten.reshape": lambda x: aten.reshape.default(x, [B * H, N, x.shape[-1]]),
    "aten._unsafe_view": lambda x: aten._unsafe_view.default(x, [B * H, N, x.shape[-1]]),
    "aten.repeat_interleave": lambda x: aten.repeat_interleave.self_int(x, 2, 1),
    "aten.contiguous": lambda x: aten.contiguous.default(x),
    "aten.alias": lambda x: aten.alias.default(x),
    "aten.split": lambda x: aten.split.Tensor(x, 4, 2),
}

ALL_VIEWS = VIEWS | SHARED_VIEWS | ATEN_VIEWS


# ---- the table: writes; f(target, source) with source (B, H, N, dim), packed or dense -----------

WRITES: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "copy_": lambda x, s: x.copy_(s),
    "copy_ slice": lambda x, s: x[:, :, 1:3].copy_(s[:, :, :2]),
    "copy_ broadcast": lambda x, s: x.copy_(s[:, :, :1]),
    "copy_ transposed": lambda x, s: x.mT.copy_(s.mT),
    "setitem": lambda x, s: x.__setitem__(1, s[1]),
    "setitem rows": lambda x, s: x.__setitem__((..., slice(2, 4), slice(None)), s[:, :, 4:]),
    "setitem one": lambda x, s: x.__setitem__((0, 1, slice(3, 4)), s[0, 1, :1]),
    "index_copy_": lambda x, s: x.index_copy_(2, index(4, 0, x=x), s[:, :, 1:3]),
    "index_copy_ transposed": lambda x, s: x.mT.index_copy_(3, index(4, x=x), s.mT[..., :1]),
}
SHARED_WRITES: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "index_copy_ heads": lambda x, s: x.index_copy_(1, index(2, x=x), s[:, :1]),
    "setitem index": lambda x, s: x.__setitem__(
        (slice(None), slice(None), index(4, 0, x=x)), s[:, :, 1:3]
    ),
    "setitem mask": lambda x, s: x.__setitem__(
        torch.arange(B * H * N, device=x.device).view(B, H, N) == 7, s[0, 0, 0]
    ),
    "index_put_": lambda x, s: x.index_put_((index(1, 0, x=x), index(0, 2, x=x)), s[0, :2]),
}
ALL_WRITES = WRITES | SHARED_WRITES


# ---- checks ----------------------------------------------------------------------------------


def ids_like(x: torch.Tensor, first: int = 0) -> torch.Tensor:
    """Return the number of the row in each of its entries."""
    rows = torch.arange(first, first + x.shape[:-1].numel(), device=x.device)
    return rows.view(*x.shape[:-1], 1).repeat(*(1,) * (x.ndim - 1), x.shape[-1])


def flat_parts(x: QuantTensor) -> list[torch.Tensor]:
    """Return codes, scales, shift and equalizer of every vector, (vectors, ...)."""
    if x._transposed:
        x = x.mT
    parts = [x._packed, x._scales]
    for t in (x._shift, x._equalizer):
        if t is not None:
            assert t.ndim == x.ndim
            parts.append(t.expand(*x._packed.shape[:-1], x.spec.dim))
    if x._n_rep > 1:
        parts = [t.repeat_interleave(x._n_rep, dim=-3) for t in parts]
    return [t.reshape(-1, t.shape[-1]) for t in parts]


def assert_rows(result: Any, pool: list[torch.Tensor], ids: torch.Tensor) -> None:
    """Assert that `result` holds the vectors `ids` of `pool`, byte for byte."""
    assert isinstance(result, QuantTensor)
    assert result.shape == ids.shape
    assert isinstance(result.spec, QuantSpec)
    numbers = (ids.mT if result._transposed else ids)[..., 0].flatten()
    got = flat_parts(result)
    assert len(got) == len(pool)
    for part, expected in zip(got, pool, strict=True):
        assert torch.equal(part, expected[numbers])


def assert_view(result: Any, t: QuantTensor, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert_rows(result, flat_parts(t), expected)
        assert result.device == t.device
        assert result.dtype == t.dtype
        return
    assert len(result) == len(expected)
    for one, one_expected in zip(result, expected, strict=True):
        assert_view(one, t, one_expected)


# ---- tests -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ALL_VIEWS)
def test_views_hold_the_codes(name: str, mode: str, device: torch.device) -> None:
    made, run = MODES[mode]
    f = ALL_VIEWS[name]
    for variant in ("per_head", "shared") if name not in SHARED_VIEWS else ("shared",):
        with made():
            t = tensor_of(store_of(variant, B, H, N, device=device))
        with run():
            result = f(t)
        assert_view(result, t, f(ids_like(t)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_views_decode_to_views(variant: str, device: torch.device) -> None:
    store = store_of(variant, B, H, N, device=device)
    per_head = VARIANTS[variant].statistic == "per_head"
    for name, f in ALL_VIEWS.items():
        if per_head and name in SHARED_VIEWS and name not in WORKS_PER_HEAD:
            with pytest.raises(UnsupportedError, match="shift or equalizer"):
                f(tensor_of(store))
            continue
        result, exact, naive = (
            f(x) for x in (tensor_of(store), torch.from_numpy(store.exact), store.naive)
        )
        if isinstance(exact, torch.Tensor):
            result, exact, naive = [result], [exact], [naive]
        for one in zip(result, exact, naive, strict=True):
            assert_close(one[0].dequantize(), [one[2]], one[1].numpy())


@pytest.mark.parametrize("source", ["packed", "dense", "bfloat16"])
@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference", "into_inference"])
@pytest.mark.parametrize("name", ALL_WRITES)
def test_writes(name: str, mode: str, source: str, device: torch.device) -> None:
    made, run = MODES[mode]
    f = ALL_WRITES[name]
    for variant in ("shared",) if name in SHARED_WRITES else ("shared", "per_head", "prod"):
        store = store_of(variant, B, H, N, device=device)
        dense = normal(torch.float32, device, B, H, N, D)
        dense = dense.to(torch.bfloat16) if source == "bfloat16" else dense
        with made():
            t = tensor_of(store)
            s = QuantTensor.quantize(dense, store.spec, **store.statistics)
        before = flat_parts(t.clone())
        with run():
            f(t, s if source == "packed" else dense)
        pool = [torch.cat(pair) for pair in zip(before, flat_parts(s), strict=True)]
        ids, source_ids = ids_like(t), ids_like(t, t.shape[:-1].numel())
        f(ids, source_ids)
        assert_rows(t, pool, ids)


@pytest.mark.parametrize("name", SHARED_WRITES)
def test_writes_that_need_shared_statistics_say_so(name: str) -> None:
    t = tensor_of(store_of("per_head", B, H, N))
    for source in (t.clone(), t.dequantize()):
        with pytest.raises(UnsupportedError, match=r"shift and equalizer|slice"):
            SHARED_WRITES[name](t, source)


# ---- memory ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["slice rows", "slice step", "slice negative", "int", "select", "narrow", "split", "unbind",
     "expand", "None", "view", "reshape same", "flatten", "unflatten", "squeeze", "unsqueeze",
     "permute", "transpose", ".mT", "detach", "repeat_kv", "contiguous"],
)  # fmt: skip
def test_views_share_memory(name: str) -> None:
    t = tensor_of(store_of("shared", B, H, N))
    view = VIEWS[name](t)
    view = view if isinstance(view, QuantTensor) else view[0]
    storage = t.packed.untyped_storage().data_ptr()
    assert view.packed.untyped_storage().data_ptr() == storage
    assert view.scales.untyped_storage().data_ptr() == t.scales.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", ["clone", "contiguous strided", "deepcopy", "repeat", "cat"])
def test_copies_own_their_memory(name: str) -> None:
    t = tensor_of(store_of("shared", B, H, N))
    storage = VIEWS[name](t).packed.untyped_storage()
    assert storage.data_ptr() != t.packed.untyped_storage().data_ptr()


def test_a_strided_view_is_refused_as_for_dense_tensors() -> None:
    t = tensor_of(store_of("4_bits", B, H, N))
    for x in (t, t.dequantize()):
        with pytest.raises(RuntimeError, match="reshape"):
            x[:, 1:].view(-1, N, D)


def test_a_write_through_a_view_is_seen() -> None:
    t = tensor_of(store_of("shared", B, H, N))
    rows = t[0, 1]
    t[0, 1, 2:3] = t[1, 2, 4:5].clone()
    assert torch.equal(rows[2], t[1, 2, 4])


def test_a_copy_into_a_part_never_changes_the_shift_of_the_rest() -> None:
    t, other = (tensor_of(make_store(spec_of(D), N, statistic="shared", seed=s)) for s in (0, 1))
    rest = t[3:].dequantize()
    with pytest.raises(UnsupportedError, match="shift and equalizer"):
        t[:3].copy_(other[:3])
    assert torch.equal(t[3:].dequantize(), rest)
    t.copy_(other)  # a whole tensor takes all of it, as load_state_dict needs
    assert torch.equal(t, other)


@pytest.mark.parametrize(
    "f",
    [lambda x: x[5], lambda x: x.select(4, 0), lambda x: x.transpose(0, 4), lambda x: x[0, 0, 9]],
)
def test_indices_out_of_range(f: Callable[[torch.Tensor], Any]) -> None:
    t = tensor_of(store_of("4_bits", B, H, N))
    for x in (t, t.dequantize()):
        with pytest.raises(IndexError):
            f(x)
