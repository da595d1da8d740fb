"""decode_layer: what one layer's cache does in a decode step, append and attention together.

Issue 3 asks for at most 1.5 times the bytes floor under CUDA graphs at B=8, 32k: a share of the
read ceiling of 1 / 1.5. The new token is written into the window, at a position that lives on the
device; a page leaves the window in every 64th step only and is not part of this.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.cases.inputs import dense_nbytes, normal, rotated
from benchmarks.cases.kv import BACKENDS, Layer, _attend
from benchmarks.registry import Call, Case, Contenders, Size
from quantforge.llm.segments import SegmentedTensor


def _layers(size: Size) -> list[tuple[Layer, float | None, bool]]:
    if size == "small":
        return [(Layer(2, 2, 1, 300, 4, 4, kv_heads=2, dim=64, dtype=torch.float32), None, True)]
    if size == "cpu":
        return [(Layer(1, 4, 1, 32768, 4, 4, kv_heads=2, dtype=torch.float32), None, True)]
    goal = round(1 / 1.5, 3)
    return [
        (Layer(8, 4, 1, 32768, 4, 4), goal, True),
        (Layer(1, 4, 1, 32768, 4, 4), None, False),
        (Layer(1, 4, 1, 131072, 4, 4), None, False),
        (Layer(16, 4, 1, 8192, 4, 4), None, False),
    ]


def _packed_step(
    query: torch.Tensor,
    segments: tuple[SegmentedTensor, SegmentedTensor],
    token: torch.Tensor,
    position: torch.Tensor,
) -> torch.Tensor:
    """Append a token (B, Hkv, 1, dim) to the windows of keys and values, and attend."""
    for x in segments:
        x.dense.index_copy_(2, position, token)
    return F.scaled_dot_product_attention(query, *segments, enable_gqa=True)


def _dense_step(
    attend: Callable[..., torch.Tensor],
    query: torch.Tensor,
    key_value: tuple[torch.Tensor, torch.Tensor],
    token: torch.Tensor,
    position: torch.Tensor,
) -> torch.Tensor:
    for x in key_value:
        x.index_copy_(2, position, token)
    return attend(query, *key_value)


def _make(layer: Layer, device: torch.device) -> Contenders:
    query = layer.query(device)
    token = normal((layer.batch, layer.kv_heads, 1, layer.dim), layer.dtype, device, seed=1001)
    last_dense = torch.tensor([layer.n_dense - 1], device=device)
    last = torch.tensor([layer.length - 1], device=device)

    def ours(seed: int) -> Call:
        segments = layer.segments(seed, device)
        return partial(_packed_step, query, segments, token, last_dense)

    pairs = rotated(lambda seed: layer.key_value(seed, device), layer.dense_bytes, device)
    attends: dict[str, Callable[..., torch.Tensor]] = {
        "sdpa": partial(F.scaled_dot_product_attention, enable_gqa=True)
    }
    if device.type == "cuda":
        attends = {name: partial(_attend, backend) for name, backend in BACKENDS.items()}
    baselines = {
        f"index_copy + {name}": [partial(_dense_step, attend, query, p, token, last) for p in pairs]
        for name, attend in attends.items()
    }
    return Contenders(rotated(ours, layer.ours_bytes, device), baselines)


def cases(size: Size) -> list[Case]:
    """Return the cases; bytes are those of attention, and the new token read and written twice."""
    kind = "cuda" if size == "cuda" else "cpu"
    result = []
    for layer, goal, quick in _layers(size):
        token = dense_nbytes((2, layer.batch, layer.kv_heads, layer.dim), layer.dtype)
        result.append(
            Case(
                "decode_layer",
                layer.name,
                layer.shape,
                layer.nbytes + 3 * token,
                layer.flops,
                layer.memory(kind),
                partial(_make, layer),
                quick,
                goal_share=goal,
            )
        )
    return result
