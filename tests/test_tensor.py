"""The table of operations on `QuantTensor`: those that work, and those that must be refused.

A view is checked exactly: the same function of a tensor of row numbers says which codes it must
return. Products are checked against the same function of the float64 decoding.
"""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._higher_order_ops.flex_attention import flex_attention as flex_attention_operator
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import flex_attention

from quantforge import InputError, QuantForgeConfig, QuantTensor, UnsupportedError
from quantforge.spec import QuantSpec
from quantforge.tensor import FUNCTIONS, OPERATORS, QuantizedTensor
from tests.helpers import Store, assert_close, gaussian, make_store, spec_of

aten = torch.ops.aten
B, H, N, D = 2, 3, 6, 64
DOC = Path(__file__).parents[1] / "docs" / "tensor.md"

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

# ---- the table: operations that compute ------------------------------------------------------


MASK = torch.arange(5 * N).view(5, N) % 3 != 1
COMPUTE: dict[str, Callable[[torch.Tensor, Dense], torch.Tensor]] = {
    "linear": lambda x, r: F.linear(r(7, x.shape[-1]), x[0, 0]),
    "linear bias": lambda x, r: F.linear(r(2, 3, x.shape[-1]), x[0, 0], r(N)),
    "linear vector": lambda x, r: F.linear(r(x.shape[-1]), x[1, 0], r(N)),
    "linear of packed": lambda x, r: F.linear(x[0], r(5, x.shape[-1])),
    "aten.linear": lambda x, r: aten.linear.default(r(7, x.shape[-1]), x[0, 0], r(N)),
    "matmul": lambda x, r: torch.matmul(r(B, H, 5, x.shape[-1]), x.mT),
    "Tensor.matmul": lambda x, r: r(B, H, 5, N).matmul(x),
    "@": lambda x, r: r(5, N) @ x[0, 0],
    "@ .T": lambda x, r: r(5, x.shape[-1]) @ x[0, 0].T,
    "@ 1-D": lambda x, r: r(N) @ x,
    "@ 1-D .mT": lambda x, r: r(x.shape[-1]) @ x.mT,
    "@ 3-D": lambda x, r: r(H, 5, N) @ x[0],
    "@ 3-D .mT": lambda x, r: r(H, 5, x.shape[-1]) @ x[0].mT,
    "@ 3-D by 2-D": lambda x, r: r(4, 5, x.shape[-1]) @ x[0, 0].mT,
    "@ 2-D by 3-D": lambda x, r: r(5, N) @ x[0],
    "@ 4-D by 2-D": lambda x, r: r(B, 4, 5, N) @ x[0, 0],
    "@ 4-D by 3-D": lambda x, r: r(B, H, 5, x.shape[-1]) @ x[0].mT,
    "@ broadcast": lambda x, r: r(B, 1, 5, x.shape[-1]) @ x.mT,
    "@ broadcast packed": lambda x, r: r(B, H, 5, N) @ x[:1],
    "@ vector": lambda x, r: r(2, 5, x.shape[-1]) @ x[0, 0, 3],
    "vector @ vector": lambda x, r: r(x.shape[-1]) @ x[0, 0, 3],
    "packed @": lambda x, r: x @ r(x.shape[-1], 5),
    "packed @ 4-D": lambda x, r: x @ r(B, H, x.shape[-1], 5),
    "packed @ 1-D": lambda x, r: x @ r(x.shape[-1]),
    "packed .mT @": lambda x, r: x.mT @ r(N, 5),
    "packed vector @": lambda x, r: x[0, 0, 3] @ r(x.shape[-1], 5),
    "packed vector @ vector": lambda x, r: x[0, 0, 3] @ r(x.shape[-1]),
    "__rmatmul__": lambda x, r: x[0, 0].__rmatmul__(r(5, N)),
    "mm": lambda x, r: torch.mm(r(5, N), x[0, 0]),
    "Tensor.mm": lambda x, r: r(5, x.shape[-1]).mm(x[0, 0].t()),
    "aten.mm": lambda x, r: aten.mm.default(r(5, N), x[0, 0]),
    "bmm": lambda x, r: torch.bmm(r(H, 5, N), x[0]),
    "Tensor.bmm": lambda x, r: r(H, 5, N).bmm(x[0]),
    "aten.bmm": lambda x, r: aten.bmm.default(r(H, 5, N), x[0]),
    "mv": lambda x, r: torch.mv(x[0, 0], r(x.shape[-1])),
    "Tensor.mv": lambda x, r: x[0, 0].mv(r(x.shape[-1])),
    "aten.mv": lambda x, r: aten.mv.default(x[0, 0], r(x.shape[-1])),
    "addmm": lambda x, r: torch.addmm(r(N), r(5, x.shape[-1]), x[0, 0].mT, beta=0.5, alpha=2),
    "Tensor.addmm": lambda x, r: r(5, x.shape[-1]).addmm(r(5, N), x[0, 0]),
    "aten.addmm": lambda x, r: aten.addmm.default(r(5, N), r(5, x.shape[-1]), x[0, 0].mT),
    "aten.matmul": lambda x, r: aten.matmul.default(r(B, H, 5, N), x),
    "no rows": lambda x, r: r(B, H, 0, N) @ x,
    "no keys": lambda x, r: r(B, H, 5, x.shape[-1]) @ x[:, :, :0].mT,
    "sum of no rows": lambda x, r: r(B, H, 5, 0) @ x[:, :, :0],
    # eager attention of transformers
    "repeat_kv scores": lambda x, r: r(B, 4 * H, 5, x.shape[-1]) @ repeat_kv(x, 4).transpose(2, 3),
    "repeat_kv values": lambda x, r: r(B, 4 * H, 5, N) @ repeat_kv(x, 4),
    "repeat_kv broadcast": lambda x, r: r(B, 1, 5, N) @ repeat_kv(x, 2),
    "repeat_kv no rows": lambda x, r: r(B, 4 * H, 0, N) @ repeat_kv(x, 4),
}


def sdpa(heads: int = H, batch: int = B, **options: Any) -> Any:
    return lambda x, r: F.scaled_dot_product_attention(
        r(batch, heads, 5, x.shape[-1]), x, x.flip(-2), **options
    )


COMPUTE |= {
    "sdpa": sdpa(),
    "sdpa causal": sdpa(is_causal=True),
    "sdpa scale": sdpa(scale=0.3),
    "sdpa enable_gqa": sdpa(heads=4 * H, enable_gqa=True),
    "sdpa broadcast batch": sdpa(batch=1),
    "sdpa mask bool": lambda x, r: F.scaled_dot_product_attention(
        r(B, H, 5, x.shape[-1]), x, x, attn_mask=MASK.to(x.device)
    ),
    "sdpa mask float": lambda x, r: F.scaled_dot_product_attention(
        r(B, H, 5, x.shape[-1]), x, x, r(B, 1, 5, N)
    ),
    "sdpa mask of queries": lambda x, r: F.scaled_dot_product_attention(
        r(B, H, 5, x.shape[-1]), x, x, attn_mask=r(B, H, 5, 1)
    ),
    "sdpa 3-D": lambda x, r: F.scaled_dot_product_attention(
        r(H, 5, x.shape[-1]), x[0], x[1], attn_mask=MASK.to(x.device)
    ),
    "sdpa 2-D": lambda x, r: F.scaled_dot_product_attention(
        r(5, x.shape[-1]), x[0, 1], x[1, 2], is_causal=True
    ),
    "sdpa one key for all": lambda x, r: F.scaled_dot_product_attention(
        r(3, H, 5, x.shape[-1]), x[:1].expand(3, -1, -1, -1), x[1:].expand(3, -1, -1, -1)
    ),
    "sdpa repeat_kv": lambda x, r: F.scaled_dot_product_attention(
        r(B, 4 * H, 5, x.shape[-1]), repeat_kv(x, 4), repeat_kv(x.flip(0), 4), is_causal=True
    ),
    "sdpa repeat_kv mask": lambda x, r: F.scaled_dot_product_attention(
        r(B, 2 * H, 5, x.shape[-1]), repeat_kv(x, 2), repeat_kv(x, 2), r(B, 2 * H, 5, N)
    ),
    "sdpa repeated unlike": lambda x, r: F.scaled_dot_product_attention(
        r(B, 2 * H, 5, x.shape[-1]), repeat_kv(x, 2), x.repeat_interleave(2, dim=1)
    ),
    "aten.sdpa": lambda x, r: aten.scaled_dot_product_attention.default(
        r(B, H, 5, x.shape[-1]), x, x, None, 0.0, True
    ),
}

Q = (B, H, 5)
BACKENDS: dict[str, Callable[[torch.Tensor, torch.Tensor], tuple]] = {
    # the backends' operators exist for some devices only: compared with F.sdpa, causal
    "_flash_attention_for_cpu": lambda q, x: (
        aten._scaled_dot_product_flash_attention_for_cpu.default(q, x, x, 0.0, True)
    ),
    "_efficient_attention": lambda q, x: aten._scaled_dot_product_efficient_attention.default(
        q, x, x, None, True, 0.0, True
    ),
    "_flash_attention": lambda q, x: aten._scaled_dot_product_flash_attention.default(
        q, x, x, 0.0, True
    ),
    "_cudnn_attention": lambda q, x: aten._scaled_dot_product_cudnn_attention.default(
        q, x, x, None, True, 0.0, True
    ),
}

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

# ---- what must be refused: (operation, word in the message) -----------------------------------

REFUSED: dict[str, tuple[Callable[[QuantTensor], Any], str]] = {
    "add": (lambda x: x + 1, "add"),
    "radd": (lambda x: torch.ones(()) + x, "add"),
    "neg": (lambda x: -x, "neg"),
    "eq": (lambda x: x == x, "eq"),
    "mul_": (lambda x: x.mul_(2), "mul_"),
    "imul": (lambda x: x.__imul__(2), "mul_"),
    "zero_": (lambda x: x.zero_(), "zero_"),
    "fill_": (lambda x: x.fill_(1), "fill_"),
    "setitem number": (lambda x: x.__setitem__(0, 0.0), "fill_"),
    "sum": (lambda x: x.sum(), "sum"),
    "mean": (lambda x: x.mean(-1), "mean"),
    "norm": (lambda x: torch.linalg.vector_norm(x), "norm"),
    "exp": (lambda x: x.exp(), "exp"),
    "softmax": (lambda x: x.softmax(-1), "softmax"),
    "sort": (lambda x: x.sort(), "sort"),
    "topk": (lambda x: x.topk(2), "topk"),
    "argmax": (lambda x: x.argmax(), "argmax"),
    "gather": (lambda x: x.gather(2, torch.zeros(1, 1, 1, 1, dtype=torch.long)), "gather"),
    "masked_fill": (lambda x: x.masked_fill(MASK[0, :1], 0), "masked_fill"),
    "where": (lambda x: torch.where(MASK[0, :1], x, x), "where"),
    "pad": (lambda x: F.pad(x, (0, 0, 1, 1)), "pad"),
    "layer_norm": (lambda x: F.layer_norm(x, x.shape[-1:]), "layer_norm"),
    "isnan": (lambda x: torch.isnan(x), "ne"),
    "item": (lambda x: x[0, 0, 0].item(), "item"),
    "bool": (lambda x: bool(x), "bool"),
    "in": (lambda x: 1.0 in x, "eq"),
    "tolist": (lambda x: x.tolist(), "tolist"),
    "numpy": (lambda x: x.numpy(), "numpy"),
    "np.asarray": (lambda x: np.asarray(x), "__array__"),
    "zeros_like": (lambda x: torch.zeros_like(x), "_like"),
    "empty_like": (lambda x: torch.empty_like(x), "empty_like"),
    "channel slice": (lambda x: x[..., :3], "slicing"),
    "channel select": (lambda x: x[..., 3], "select"),
    "channel index": (lambda x: x[..., [3, 4]], "indexing"),
    "channel index_select": (lambda x: x.index_select(3, torch.tensor([1])), "index_select"),
    "channel flip": (lambda x: x.flip(-1), "flip"),
    "channel unbind": (lambda x: list(x[0, 0, 0]), "unbind"),
    "channel split": (lambda x: x.chunk(2, dim=-1), "slicing"),
    "channel cat": (lambda x: torch.cat([x, x], dim=-1), "cat"),
    "channel slice transposed": (lambda x: x.mT[..., :3, :], "slicing"),
    "channel expand": (lambda x: x.expand(B, H, N, 2 * D), "expand"),
    "channel repeat": (lambda x: x.repeat(1, 1, 1, 2), "repeat"),
    "channel repeat_interleave": (lambda x: x.repeat_interleave(2, dim=-1), "repeat_interleave"),
    "channel reshape": (lambda x: x.reshape(B, H, -1), "reshape"),
    "channel flatten": (lambda x: x.flatten(2, 3), "reshape"),
    "flatten to scalars": (lambda x: x[0, 0, 0].reshape(2, -1), "reshape"),
    "channel permute": (lambda x: x.permute(3, 0, 1, 2), "permute"),
    "channel unsqueeze": (lambda x: x.unsqueeze(-1), "unsqueeze"),
    "transposed unsqueeze": (lambda x: x.mT.unsqueeze(-2), "unsqueeze"),
    "transposed reshape": (lambda x: x.mT.reshape(B, H, D * 2, -1), "reshape"),
    "transposed index": (lambda x: x.mT[torch.tensor([0]), torch.tensor([0])], "index"),
    "repeat_interleave flat": (lambda x: x.repeat_interleave(2), "repeat_interleave"),
    "cat specs": (lambda x: torch.cat([x, _other(x)]), "cat"),
    "cat dense": (lambda x: torch.cat([x, x.dequantize()]), "cat"),
    "cat shifts": (lambda x: torch.cat([x, _shifted(x)], dim=2), "cat"),
    "cat shifts of heads": (lambda x: torch.cat([x, _shifted(x)], dim=1), "cat"),
    "stack dense": (lambda x: torch.stack([x, x.dequantize()]), "stack"),
    "equal dense": (lambda x: torch.equal(x, x.dequantize()), "equal"),
    "copy_ specs": (lambda x: x.copy_(_other(x)), "copy_"),
    "copy_ shifts": (lambda x: x.copy_(_shifted(x)), "copy_"),
    "copy_ repeated": (lambda x: repeat_kv(x, 2).copy_(repeat_kv(x, 2)), "copy_"),
    "setitem repeated": (lambda x: repeat_kv(x, 2).__setitem__(0, x[0]), "__setitem__"),
    "setitem specs": (lambda x: x.__setitem__(0, _other(x)[0]), "copy_"),
    "index_copy_ specs": (
        lambda x: x.index_copy_(0, torch.tensor([1]), _other(x)[:1]),
        "index_copy_",
    ),
    "index_copy_ shifts": (
        lambda x: x.index_copy_(0, torch.tensor([1]), _shifted(x)[:1]),
        "index_copy_",
    ),
    "index_put_ accumulate": (
        lambda x: x.index_put_((torch.tensor([1]),), x[:1], accumulate=True),
        "index_put_",
    ),
    "index_put_ shifts": (lambda x: x.__setitem__([0], _shifted(x)[:1]), "index_put_"),
    "view dtype": (lambda x: x.view(torch.uint8), "view"),
    "aten.view dtype": (lambda x: aten.view.dtype(x, torch.uint8), "view"),
    "to int": (lambda x: x.to(torch.int32), "int32"),
    "complex": (lambda x: x.to(torch.complex64), "complex64"),
    "requires_grad_": (lambda x: x.requires_grad_(True), "requires_grad"),
    "requires_grad =": (lambda x: setattr(x, "requires_grad", True), "requires_grad"),
    "Parameter": (lambda x: nn.Parameter(x), "requires_grad"),
    "matmul of packed": (lambda x: x @ x.mT, "matmul"),
    "baddbmm": (
        lambda x: torch.baddbmm(torch.ones(H, N, N), torch.ones(H, N, D), x[0].mT),
        "baddbmm",
    ),
    "sdpa packed query": (lambda x: F.scaled_dot_product_attention(x, x, x), "attention"),
    "sdpa dense value": (
        lambda x: F.scaled_dot_product_attention(x.dequantize(), x, x.dequantize()),
        "attention",
    ),
    "sdpa dropout": (
        lambda x: F.scaled_dot_product_attention(x.dequantize(), x, x, dropout_p=0.1),
        "dropout",
    ),
    "sdpa transposed": (
        lambda x: F.scaled_dot_product_attention(torch.ones(B, H, 2, N), x.mT, x.mT),
        "attention",
    ),
    "flex_attention": (
        lambda x: flex_attention_operator(x.dequantize(), x, x, None, (), 1.0, {}),
        "flex_attention",
    ),
}


def _other(x: QuantTensor) -> QuantTensor:
    return QuantTensor.quantize(x.dequantize(), QuantForgeConfig(bits=2))


def _shifted(x: QuantTensor) -> QuantTensor:
    shift = torch.ones(x.shape[-1])
    return QuantTensor.quantize(x.dequantize(), x.spec, shift=shift)


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


def assert_compute(f: Callable, t: QuantTensor, store: Store, run: Callable) -> None:
    """Assert that f of the packed tensor is f of the decoded one, within rounding."""
    exact = f(torch.from_numpy(store.exact), partial(normal, torch.float64, "cpu")).numpy()
    dense = partial(normal, torch.float32, "cpu")
    naive = [f(x, dense) for x in (store.naive, tensor_of(store).dequantize().cpu())]
    with run():
        actual = f(t, partial(normal, torch.float32, t.device))
    assert type(actual) is torch.Tensor
    assert_close(actual, naive, exact)


# ---- tests of the table ----------------------------------------------------------------------


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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", COMPUTE)
def test_products_agree_with_decoding_first(name: str, mode: str, device: torch.device) -> None:
    made, run = MODES[mode]
    store = store_of("per_head", B, H, N, device=device)
    with made():
        t = tensor_of(store)
    assert_compute(COMPUTE[name], t, store, run)


@pytest.mark.parametrize("variant", VARIANTS)
def test_products_of_every_code(variant: str, device: torch.device) -> None:
    store = store_of(variant, B, H, N, device=device)
    for f in COMPUTE.values():
        assert_compute(f, tensor_of(store), store, torch.no_grad)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", BACKENDS)
def test_operators_of_attention_backends(name: str, mode: str, device: torch.device) -> None:
    made, run = MODES[mode]
    store = store_of("per_head", B, H, N, device=device)
    with made():
        t = tensor_of(store)
    q = normal(torch.float32, device, *Q, D)
    with run():
        out, lse, *_ = BACKENDS[name](q, t)
        expected = F.scaled_dot_product_attention(q, t, t, is_causal=True)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    logits = q.double().cpu() @ torch.from_numpy(store.exact).mT / D**0.5
    hidden = torch.ones(5, N, dtype=torch.bool).triu(1)
    torch.testing.assert_close(
        lse.double().cpu(), logits.masked_fill(hidden, -torch.inf).logsumexp(-1),
        rtol=1e-5, atol=1e-5,
    )  # fmt: skip


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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, mode: str) -> None:
    made, run = MODES[mode]
    f, word = REFUSED[name]
    with made():
        t = tensor_of(store_of("4_bits", B, H, N))
    before = t.packed.clone()
    with run(), pytest.raises(UnsupportedError, match=word) as caught:
        f(t)
    remedy = ("dequantize", "use ", "write", "see docs", "index ", "keep", "leave", "set ", "undo",
              "would flatten", "must stay")  # fmt: skip
    assert any(hint in str(caught.value) for hint in remedy), str(caught.value)
    assert torch.equal(t.packed, before)


def test_the_table_exercises_every_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    called = set()

    def recorder(key: Any, handler: Callable) -> Callable:
        def record(*args: Any, **kwargs: Any) -> Any:
            called.add(key)
            return handler(*args, **kwargs)

        return record

    for table in (FUNCTIONS, OPERATORS):
        for key, handler in list(table.items()):
            monkeypatch.setitem(table, key, recorder(key, handler))
    t = tensor_of(store_of("shared", B, H, N))
    dense = partial(normal, torch.float32, "cpu")
    for run in (torch.no_grad, torch.inference_mode):
        with run():
            for view in ALL_VIEWS.values():
                view(t)
            for compute in COMPUTE.values():
                compute(t, dense)
            for backend in BACKENDS.values():
                backend(dense(*Q, D), t)
            for write in ALL_WRITES.values():
                write(t, t.clone())
            for other in OTHERS.values():
                other(t)
    for f, _ in REFUSED.values():
        with pytest.raises(UnsupportedError):
            f(t)
    assert set(FUNCTIONS) | set(OPERATORS) == called


def _pin(x: QuantTensor, f: Callable) -> None:
    if torch.cuda.is_available():
        assert f(x).is_pinned()
    else:
        with pytest.raises(RuntimeError):
            f(x)


OTHERS: dict[str, Callable[[QuantTensor], Any]] = {
    # operations whose result is not a view or a product; each has a test of its own below
    "equal": lambda x: torch.equal(x, x),
    "to": lambda x: x.to(torch.float16),
    "is_pinned": lambda x: x.is_pinned(),
    "pin_memory": lambda x: (
        _pin(x, QuantTensor.pin_memory),
        _pin(x, aten._pin_memory.default),
        _pin(x, aten.pin_memory.default),
    ),
    "share_memory_": lambda x: x.clone().share_memory_(),
    "is_shared": lambda x: x.is_shared(),
    "requires_grad_": lambda x: x.requires_grad_(False),
    "copy_ to dense": lambda x: torch.empty(x.shape).copy_(x),
}


def test_the_documented_table_is_this_table() -> None:
    documented = set()
    for line in DOC.read_text().splitlines():
        if line.startswith("| `"):
            documented |= {cell.strip(" `") for cell in line.split("|")[1].split(",")}
    assert documented, "docs/tensor.md has no table"
    tables = (ALL_VIEWS, COMPUTE, BACKENDS, ALL_WRITES, REFUSED, OTHERS)
    known = {name for table in tables for name in table}
    assert documented - known == set()


# ---- without data ------------------------------------------------------------------------------

DATA_DEPENDENT = {"bool mask", "bool mask 0", "mask of rows", "repeat_interleave tensor"}
NOT_FAKE = {"pickle", "copy.copy", "deepcopy"}


def test_fake_tensors_have_the_real_shapes() -> None:
    t = tensor_of(store_of("shared", B, H, N))
    dense = partial(normal, torch.float32, "cpu")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(t)
        assert isinstance(fake, QuantTensor)
        fakes = {n: f(fake) for n, f in ALL_VIEWS.items() if n not in DATA_DEPENDENT | NOT_FAKE}
        fakes |= {n: f(fake, dense) for n, f in COMPUTE.items()}
        fakes |= {"dequantize": fake.dequantize(), "to": fake.to(torch.float16)}
    reals = {n: f(t) for n, f in ALL_VIEWS.items() if n in fakes}
    reals |= {n: f(t, dense) for n, f in COMPUTE.items()}
    reals |= {"dequantize": t.dequantize(), "to": t.to(torch.float16)}

    def signature(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            inner = signature(list(x._inner().values())) if isinstance(x, QuantTensor) else None
            return x.shape, x.dtype, isinstance(x, QuantTensor), inner
        return [signature(one) for one in x]

    assert {n: signature(x) for n, x in fakes.items()} == {
        n: signature(x) for n, x in reals.items()
    }


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


# ---- copies in and out -------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_copy_to_dense_decodes(mode: str, device: torch.device) -> None:
    made, run = MODES[mode]
    with made():
        t = tensor_of(store_of("per_head", B, H, N, device=device))
    with run():
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            out = torch.zeros(B, H, N, D, dtype=dtype, device=device)
            out[:] = t
            assert torch.equal(out, t.dequantize().to(dtype))


def test_dtype_changes_what_a_tensor_stands_for(device: torch.device) -> None:
    t = tensor_of(store_of("shared", B, H, N, device=device))
    half = t.half()
    assert (half.dtype, t.to(torch.bfloat16).dtype) == (torch.float16, torch.bfloat16)
    assert torch.equal(half.packed, t.packed)
    assert torch.equal(half.scales, t.scales)
    assert half.dequantize().dtype == torch.float16
    assert half.dequantize(torch.float32).dtype == torch.float32
    assert t.to(half).dtype == torch.float16
    assert torch.cat([half, t]).dtype == torch.float32
    assert (t.to(t.device) is t, t.cpu().device.type) == (True, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_moves_between_devices() -> None:
    t = tensor_of(store_of("per_head", B, H, N))
    pinned = t.pin_memory()
    assert pinned.is_pinned()
    moved = pinned.to("cuda", non_blocking=True)
    assert {part.device.type for part in moved._inner().values()} == {"cuda"}
    assert torch.equal(moved.cpu(), t)
    assert t.clone().copy_(moved).equal(t)


def test_share_memory_does_not_crash() -> None:
    t = tensor_of(store_of("shared", N))
    assert not t.is_shared()
    assert t.share_memory_() is t
    assert t.is_shared()
    assert not t.is_pinned()


@pytest.mark.parametrize("variant", VARIANTS)
def test_serialization(variant: str) -> None:
    t = tensor_of(store_of(variant, B, H, N), torch.bfloat16)
    for x in (t, t[:, :, 1:3], repeat_kv(t, 2), t.mT):
        buffer = io.BytesIO()
        torch.save({"x": x}, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=True)["x"]
        assert torch.equal(loaded, x)
        assert (loaded.shape, loaded.dtype, loaded.spec) == (x.shape, x.dtype, x.spec)
        assert torch.equal(loaded.dequantize(), x.dequantize())


def test_loading_in_a_fresh_process(tmp_path: Path) -> None:
    t = tensor_of(store_of("prod", B, H, N))
    torch.save([t, t.dequantize()], tmp_path / "t.pt")
    program = (
        "import torch, quantforge\n"
        f"t, dense = torch.load({str(tmp_path / 't.pt')!r}, weights_only=True)\n"
        "assert type(t) is quantforge.QuantTensor\n"
        "assert torch.allclose(t.dequantize(), dense, atol=1e-5), 'decodes differently'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


class Frozen(nn.Module):
    def __init__(self, t: QuantTensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(t, requires_grad=False)
        self.register_buffer("rows", t.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight) + x @ self.rows.mT


def test_modules() -> None:
    t, other = (tensor_of(make_store(spec_of(D), N, statistic="shared", seed=s)) for s in (0, 1))
    module = Frozen(t)
    assert isinstance(module.weight, QuantTensor)
    assert isinstance(module.weight, nn.Parameter)
    x = normal(torch.float32, "cpu", 3, D)
    torch.testing.assert_close(module(x), 2 * x @ t.dequantize().mT)
    state = module.state_dict()
    assert {type(value) for value in state.values()} <= {QuantTensor, type(module.weight)}
    twin = Frozen(other.clone())
    assert not torch.equal(twin.weight, t)
    twin.load_state_dict(state)
    assert torch.equal(twin.weight, t)
    assert torch.equal(twin.rows, t)
    assert torch.equal(Frozen(other.clone()).rows, other)
    third = Frozen(other.clone())
    third.load_state_dict(state, assign=True)
    assert torch.equal(third.weight, t)
    half = copy.deepcopy(module).to(torch.bfloat16)
    assert (half.weight.dtype, half.rows.dtype) == (torch.bfloat16, torch.bfloat16)
    assert torch.equal(half.weight.packed, t.packed)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert module.weight.requires_grad is False
    assert sum(p.numel() for p in module.parameters()) == N * D


def test_accelerate_sends_it() -> None:
    from accelerate.utils import send_to_device

    t = tensor_of(store_of("shared", N))
    assert torch.equal(send_to_device({"x": [t]}, "cpu")["x"][0], t)


# ---- compute: dtypes, gradients, errors --------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_results_have_the_dtype_of_the_dense_operand(
    dtype: torch.dtype, device: torch.device
) -> None:
    t = tensor_of(store_of("per_head", B, H, N, device=device), torch.bfloat16)
    dense = partial(normal, dtype, device)
    for name, f in COMPUTE.items():
        if name != "aten.sdpa":  # torch itself wants equal dtypes there
            assert f(t, dense).dtype == dtype


@pytest.mark.parametrize("name", ["linear bias", "@", "packed @", "bmm", "sdpa", "sdpa repeat_kv"])
def test_autocast(name: str, device: torch.device) -> None:
    store = store_of("shared", B, H, N, device=device)
    t, dense = tensor_of(store), partial(normal, torch.float32, device)
    with torch.autocast(device.type, torch.bfloat16):
        out = COMPUTE[name](t, dense)
        expected = COMPUTE[name](t.dequantize(), dense)
        assert COMPUTE[name](t, partial(normal, torch.float64, device)).dtype == torch.float64
    assert out.dtype == expected.dtype == torch.bfloat16
    exact = COMPUTE[name](torch.from_numpy(store.exact), partial(normal, torch.float64, "cpu"))
    naive = COMPUTE[name](store.naive.bfloat16(), partial(normal, torch.bfloat16, "cpu"))
    assert_close(out, [naive], exact.numpy())


@pytest.mark.parametrize("name", ["linear", "@", "packed @", "sdpa", "sdpa mask float"])
def test_backward_is_refused(name: str) -> None:
    t = tensor_of(store_of("shared", B, H, N))

    def trainable(*shape: int) -> torch.Tensor:
        return normal(torch.float32, "cpu", *shape).requires_grad_()

    out = COMPUTE[name](t, trainable)
    assert out.requires_grad
    torch.testing.assert_close(out, COMPUTE[name](t, partial(normal, torch.float32, "cpu")))
    with pytest.raises(UnsupportedError, match=r"backward.*dequantize"):
        out.sum().backward()


def test_a_trainable_mask_or_bias() -> None:
    t = tensor_of(store_of("shared", B, H, N))
    q, mask = normal(torch.float32, "cpu", B, H, 5, D), torch.zeros(5, N, requires_grad=True)
    with pytest.raises(UnsupportedError, match="backward"):
        F.scaled_dot_product_attention(q, t, t, attn_mask=mask).sum().backward()
    bias = torch.zeros(N, requires_grad=True)
    F.linear(q, t[0, 0], bias).sum().backward()
    assert torch.equal(bias.grad, torch.full((N,), float(B * H * 5)))


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_names_what_to_use() -> None:
    t = tensor_of(store_of("4_bits", B, H, N))
    with pytest.raises(RuntimeError, match="use scaled_dot_product_attention"):
        flex_attention(t.dequantize(), t, t)  # torch compiles even here, and wraps our error


def test_attention_with_all_keys_masked_is_zero(device: torch.device) -> None:
    t = tensor_of(store_of("4_bits", B, H, N, device=device))
    q = normal(torch.float32, device, B, H, 5, D)
    mask = torch.zeros(5, N, dtype=torch.bool, device=device)
    assert torch.equal(F.scaled_dot_product_attention(q, t, t, mask), torch.zeros_like(q))


def test_keys_and_values_of_different_width() -> None:
    keys = make_store(spec_of(D, 4), B, H, N)
    values = make_store(spec_of(40, 3), B, H, N, statistic="per_head")
    q = normal(torch.float32, "cpu", B, H, 5, D)
    out = F.scaled_dot_product_attention(q, tensor_of(keys), tensor_of(values))
    exact = F.scaled_dot_product_attention(
        q.double(), torch.from_numpy(keys.exact), torch.from_numpy(values.exact)
    )
    naive = F.scaled_dot_product_attention(q, keys.naive, values.naive)
    assert_close(out, [naive], exact.numpy())


BAD_SHAPES: dict[str, Callable[[torch.Tensor], Any]] = {
    "matmul": lambda x: torch.ones(5, 7) @ x,
    "linear": lambda x: F.linear(torch.ones(5, 7), x[0, 0]),
    "sdpa heads": lambda x: F.scaled_dot_product_attention(torch.ones(B, 2 * H, 5, D), x, x),
    "sdpa gqa": lambda x: F.scaled_dot_product_attention(
        torch.ones(B, H + 1, 5, D), x, x, enable_gqa=True
    ),
    "sdpa batch": lambda x: F.scaled_dot_product_attention(torch.ones(3, H, 5, D), x, x),
    "sdpa dim": lambda x: F.scaled_dot_product_attention(torch.ones(B, H, 5, 32), x, x),
    "sdpa keys": lambda x: F.scaled_dot_product_attention(torch.ones(B, H, 5, D), x, x[:, :, 1:]),
    "sdpa mask": lambda x: F.scaled_dot_product_attention(
        torch.ones(B, H, 5, D), x, x, torch.ones(5, N + 1)
    ),
    "reshape": lambda x: x.reshape(5, -1, D),
    "split": lambda x: x.split([1, 5], dim=1),
}


@pytest.mark.parametrize("name", BAD_SHAPES)
def test_shapes_that_torch_refuses(name: str) -> None:
    t = tensor_of(store_of("4_bits", B, H, N))
    with pytest.raises(InputError, match=r"got|must add up|cannot|has"):
        BAD_SHAPES[name](t)
    if name != "sdpa keys":  # torch reads beyond the end on CPU
        with pytest.raises((RuntimeError, ValueError)):
            BAD_SHAPES[name](t.dequantize())


@pytest.mark.parametrize(
    "f",
    [lambda x: x[5], lambda x: x.select(4, 0), lambda x: x.transpose(0, 4), lambda x: x[0, 0, 9]],
)
def test_indices_out_of_range(f: Callable[[torch.Tensor], Any]) -> None:
    t = tensor_of(store_of("4_bits", B, H, N))
    for x in (t, t.dequantize()):
        with pytest.raises(IndexError):
            f(x)


# ---- the tensor itself ----------------------------------------------------------------------


def test_it_looks_like_a_tensor(device: torch.device) -> None:
    t = tensor_of(store_of("shared", B, H, N, device=device), torch.bfloat16)
    assert isinstance(t, torch.Tensor)
    assert QuantizedTensor is QuantTensor
    assert (t.shape, t.ndim, t.size(-1), len(t)) == (torch.Size((B, H, N, D)), 4, D, B)
    assert (t.dtype, t.device.type, t.numel()) == (torch.bfloat16, device.type, B * H * N * D)
    assert t.is_floating_point()
    assert not t.requires_grad
    assert t.nbytes_packed == sum(p.nbytes for p in t._inner().values()) < t.nbytes
    assert [row.shape for row in t[0]] == [torch.Size((N, D))] * H
    assert bool(torch.equal(t, t.clone()))
    assert len({t, t}) == 1
    assert "prod" not in repr(t)


def test_repr_names_the_code() -> None:
    t = tensor_of(store_of("shared", N))
    expected = "QuantTensor(shape=(6, 64), dtype=torch.float32, bits=3, rotation='hadamard'"
    for text in (repr(t), str(t), f"{t}"):
        assert text.startswith(expected)


def test_equal_compares_codes() -> None:
    t = tensor_of(store_of("4_bits", B, H, D))
    assert torch.equal(t, t.clone())
    assert torch.equal(repeat_kv(t, 2), t.repeat_interleave(2, dim=1))
    assert not torch.equal(t, t.mT)
    assert not torch.equal(t, t.flip(0))
    assert not torch.equal(t, t[:1])
    assert not torch.equal(t, _shifted(t))
    assert not torch.equal(t, _other(t))


def test_no_rows(device: torch.device) -> None:
    t = QuantTensor.quantize(torch.zeros(2, 0, D, device=device))
    assert t.shape == (2, 0, D)
    assert t.dequantize().shape == (2, 0, D)
    assert torch.cat([t, t], dim=1).shape == (2, 0, D)
    assert torch.equal(t, t.clone())
    q = torch.ones(2, 3, D, device=device)
    assert torch.equal(F.scaled_dot_product_attention(q, t, t), torch.zeros_like(q))


def test_one_vector() -> None:
    x = normal(torch.float32, "cpu", D)
    t = QuantTensor.quantize(x, shift=torch.ones(D))
    assert (t.shape, t.dequantize().shape) == (x.shape, x.shape)
    torch.testing.assert_close(x @ t, x @ t.dequantize())


def test_quantize_keeps_shape_dtype_and_device(device: torch.device) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x = normal(dtype, device, 3, 5, D)
        t = QuantTensor.quantize(x, QuantForgeConfig(bits=8))
        assert (t.shape, t.dtype, t.device) == (x.shape, x.dtype, x.device)
        assert (t.dequantize() - x).abs().max() < 0.1
    with pytest.raises(InputError, match="scalar"):
        QuantTensor.quantize(torch.ones(()))


def _parts() -> dict[str, Any]:
    t = tensor_of(store_of("4_bits", N))
    return {"packed": t.packed, "scales": t.scales, "spec": t.spec}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packed": torch.zeros(N, 7, dtype=torch.uint8)}, "rows of 32 bytes"),
        ({"packed": torch.zeros(N, 32)}, "uint8"),
        ({"scales": torch.zeros(N, 1)}, "float16"),
        ({"scales": torch.zeros(N, 2, dtype=torch.float16)}, "shape"),
        ({"spec": QuantForgeConfig()}, "QuantSpec"),
        ({"shift": torch.zeros(3)}, "shift"),
        ({"shift": torch.zeros(N, D)}, "shift"),
        ({"shift": torch.zeros(D, dtype=torch.long)}, "floating"),
        ({"equalizer": torch.ones(2, 1, D)}, "equalizer"),
        ({"shift": torch.zeros(D, device="meta")}, "meta"),
        ({"dtype": torch.int32}, "floating-point"),
    ],
)
def test_the_constructor_checks_its_parts(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        QuantTensor(**(_parts() | change))
