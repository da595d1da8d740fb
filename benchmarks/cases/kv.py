"""Keys and values of one attention layer, packed as the cache holds them and dense in bfloat16.

    dense [ 16 sinks | 128 to 191 recent tokens ]      packed [ pages of 64 tokens ]

The dense tokens are part of what ours has to read, and their merge is part of its time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from benchmarks.cases.inputs import (
    code_error,
    dense_nbytes,
    normal,
    pack,
    rotated,
    rotation_bytes,
    row_nbytes,
)
from benchmarks.registry import Call, Calls
from quantforge import QuantSpec, QuantTensor
from quantforge.llm.options import CacheConfig
from quantforge.llm.paged import PagedRows, PageFormat
from quantforge.llm.segments import SegmentedTensor
from quantforge.numerics.pages import page_layout
from quantforge.ops.decode_attention.api import why_not_fused
from quantforge.ops.pages import codes_of
from quantforge.spec import E4M3_MAX_BITS, CodebookName

OPTIONS = CacheConfig()
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
MASKED_QUERIES = 16
KV = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Layer:
    """One attention layer that holds `length` tokens, the `q_len` newest of them queries.

    Attributes:
        batch: sequences.
        kv_heads: heads of keys and values.
        q_per_kv: query heads that share one.
        q_len: queries per sequence; query i sees all but the last q_len - 1 - i tokens.
        length: tokens per sequence.
        key_bits: bits per number of the keys.
        value_bits: likewise of the values.
        dim: of a head.
        dtype: of the model.
        codebook: of the codes; beyond 5 bits e4m3 has none and Lloyd-Max is taken.
    """

    batch: int
    q_per_kv: int
    q_len: int
    length: int
    key_bits: int
    value_bits: int
    kv_heads: int = 8
    dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    codebook: CodebookName = "e4m3"

    @property
    def specs(self) -> tuple[QuantSpec, QuantSpec]:
        """The codes of keys and values."""
        rules = (OPTIONS.key_scale_rule, OPTIONS.value_scale_rule)
        return tuple(
            QuantSpec(
                self.dim,
                bits,
                codebook=self.codebook if bits <= E4M3_MAX_BITS else "lloyd_max",
                scale_rule=rule,
            )
            for bits, rule in zip((self.key_bits, self.value_bits), rules, strict=True)
        )

    @property
    def n_packed(self) -> int:
        """Tokens that have left the window, in whole pages; the queries' own are dense."""
        left = self.length - OPTIONS.sinks - OPTIONS.window - (self.q_len - 1)
        return max(0, left // OPTIONS.page_size * OPTIONS.page_size)

    @property
    def n_dense(self) -> int:
        """Sinks and recent tokens."""
        return self.length - self.n_packed

    @property
    def query_shape(self) -> tuple[int, int, int, int]:
        """Shape of queries and outputs."""
        return (self.batch, self.kv_heads * self.q_per_kv, self.q_len, self.dim)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed tokens."""
        rows = self.batch * self.kv_heads * self.n_packed
        return rows * sum(row_nbytes(spec) for spec in self.specs)

    @property
    def ours_bytes(self) -> int:
        """Bytes of keys and values as the cache holds them."""
        shape = (2, self.batch, self.kv_heads, self.n_dense, self.dim)
        return self.packed_bytes + dense_nbytes(shape, self.dtype)

    @property
    def dense_bytes(self) -> int:
        """Bytes of uncompressed keys and values."""
        return dense_nbytes((2, self.batch, self.kv_heads, self.length, self.dim), self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes that ours has to move: cached tokens and queries read, outputs written."""
        return self.ours_bytes + 2 * dense_nbytes(self.query_shape, self.dtype)

    @property
    def flops(self) -> int:
        """Two products with every token, for every query."""
        _, heads, q_len, dim = self.query_shape
        return 4 * self.batch * heads * q_len * self.length * dim

    @property
    def shape(self) -> dict[str, object]:
        """What tables and plots select by."""
        return {
            "batch": self.batch,
            "kv_heads": self.kv_heads,
            "q_per_kv": self.q_per_kv,
            "q_len": self.q_len,
            "length": self.length,
            "dim": self.dim,
            "key_bits": self.key_bits,
            "value_bits": self.value_bits,
            "codebook": self.specs[0].codebook,
        }

    @property
    def name(self) -> str:
        """Name of the case."""
        bits = f"{self.key_bits} bits"
        if self.value_bits != self.key_bits:
            bits = f"K {self.key_bits}, V {self.value_bits} bits"
        if self.specs[0].codebook != "lloyd_max":
            bits = f"{bits} {self.specs[0].codebook}"
        return (
            f"B={self.batch} q_per_kv={self.q_per_kv} q_len={self.q_len} Skv={self.length} {bits}"
        )

    def memory(self, device: str) -> int:
        """Bytes of all input sets, and of what making one needs."""
        sets = rotation_bytes(self.ours_bytes, device) + rotation_bytes(self.dense_bytes, device)
        return sets + 2 * self.dense_bytes

    def query(self, device: torch.device) -> torch.Tensor:
        """Return queries."""
        return normal(self.query_shape, self.dtype, device, seed=1000)

    def key_value(self, seed: int, device: torch.device) -> KV:
        """Return the dense keys and values of an input set."""
        shape = (self.batch, self.kv_heads, self.length, self.dim)
        return (
            normal(shape, self.dtype, device, 2 * seed),
            normal(shape, self.dtype, device, 2 * seed + 1),
        )

    def segments(self, seed: int, device: torch.device) -> tuple[SegmentedTensor, SegmentedTensor]:
        """Return the keys and values of an input set as the cache hands them to attention."""
        first, last = OPTIONS.sinks, OPTIONS.sinks + self.n_packed
        fused = why_not_fused(*self.specs, device, self.dtype) is None
        result = []
        for x, spec in zip(self.key_value(seed, device), self.specs, strict=True):
            packed, scales = pack(x[:, :, first:last], spec)
            source: QuantTensor | PagedRows = QuantTensor(packed, scales, spec, dtype=self.dtype)
            if fused:  # as the cache keeps them on this device
                written = PageFormat(page_layout(*self.specs), spec, holds_keys=not result)
                pages = written.write(codes_of(packed, spec.dim, spec.bits), scales[..., 0])
                n = packed.shape[2]
                source = PagedRows(pages.contiguous(), n, written, None, None, self.dtype)
            dense = torch.cat([x[:, :, :first], x[:, :, last:]], 2)
            result.append(SegmentedTensor(dense, source, first))
        return result[0], result[1]

    def mask(self, device: torch.device) -> torch.Tensor | None:
        """Return which tokens each query sees; None for one query.

        A few queries bring a mask, as models pass it. For many it is a `causal_lower_right`, which
        the baselines get too: a captured call may not look into a mask, while a model's is looked
        at once for all its layers.
        """
        if self.q_len == 1:
            return None
        if self.q_len > MASKED_QUERIES and device.type == "cuda":
            return causal_lower_right(self.q_len, self.length)
        shape = (1, 1, self.q_len, self.length)
        return torch.ones(shape, dtype=torch.bool, device=device).tril_(self.length - self.q_len)


def packed_calls(layer: Layer, device: torch.device) -> Calls:
    """Return attention over the packed cache, as a model calls it.

    `F.scaled_dot_product_attention` on `SegmentedTensor`s leads to whatever kernel the cache uses:
    window and merge are part of it. A kernel with an interface of its own is called here.
    """
    query, mask = layer.query(device), layer.mask(device)

    def call(seed: int) -> Call:
        key, value = layer.segments(seed, device)
        attend = F.scaled_dot_product_attention
        return partial(attend, query, key, value, attn_mask=mask, enable_gqa=True)

    return rotated(call, layer.ours_bytes, device)


def dense_calls(layer: Layer, device: torch.device) -> dict[str, Calls]:
    """Return attention over uncompressed keys and values, by every way that may be best.

    Query heads are passed as models do (`enable_gqa`) and, where no mask forbids it, folded into
    rows. Several queries are also tried without a mask, which computes a little more but lets
    every kernel take part.
    """
    query = layer.query(device)
    pairs = rotated(lambda seed: layer.key_value(seed, device), layer.dense_bytes, device)
    folded = query.reshape(layer.batch, layer.kv_heads, -1, layer.dim)
    result: dict[str, Calls] = {}
    if device.type != "cuda":
        for dtype in (layer.dtype, torch.bfloat16):
            name = f"sdpa {str(dtype).removeprefix('torch.')}"
            cast = [tuple(x.to(dtype) for x in pair) for pair in pairs]
            masked = partial(
                F.scaled_dot_product_attention, attn_mask=layer.mask(device), enable_gqa=True
            )
            result[name] = [partial(masked, query.to(dtype), *pair) for pair in cast]
            attend = F.scaled_dot_product_attention
            if layer.q_len == 1:
                result[f"{name}, folded"] = [
                    partial(attend, folded.to(dtype), *pair) for pair in cast
                ]
        return result
    for name, backend in BACKENDS.items():
        attend = partial(_attend, backend)
        result[name] = [partial(attend, query, *pair) for pair in pairs]
        if layer.q_len == 1:
            result[f"{name}, folded"] = [partial(attend, folded, *pair) for pair in pairs]
    if layer.q_len > 1:
        mask = causal_lower_right(layer.q_len, layer.length)
        attend = partial(_attend, BACKENDS["flash"], mask=mask)
        result["flash, causal"] = [partial(attend, query, *pair) for pair in pairs]
    return result


def exact_baseline(layer: Layer, device: torch.device) -> str:
    """Return the baseline that computes what ours approximates."""
    if device.type != "cuda":
        return f"sdpa {str(layer.dtype).removeprefix('torch.')}"
    return "flash" if layer.q_len == 1 else "flash, causal"


def _attend(
    backend: SDPBackend,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    with sdpa_kernel(backend):
        gqa = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=gqa)


def attention_error(layer: Layer) -> float:
    """Return a bound of the relative error of attention over random keys and values.

    Logits have unit variance, so an error of the keys moves the weights by as much; the factor
    2 is for the tails.
    """
    keys, values = code_error(layer.key_bits), code_error(layer.value_bits)
    return 2 * (keys**2 + values**2) ** 0.5
