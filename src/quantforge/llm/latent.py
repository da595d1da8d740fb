"""A cache layer for models that expand what they cached (multi-head latent attention, MLA).

DeepSeek-V2/V3 and their kin cache one latent per token and multiply all of it by a weight in every
step. No attention over codes can stand for that, so the codes save memory only: each step decodes
the latents of one layer.
"""

from __future__ import annotations

from typing import Any

import torch

from quantforge.llm.layer import QuantForgeLayer
from quantforge.llm.options import CacheConfig
from quantforge.llm.segments import SegmentedTensor


class LatentLayer(QuantForgeLayer):
    """Packs like any layer; where one head of `rank` numbers is cached, `update` returns it dense.

    Args:
        options: how to store latents ("keys") and the rotary part of the keys ("values").
        rank: numbers of a latent, `config.kv_lora_rank`. Models that cache expanded keys and values
            attend to codes as others do.
    """

    def __init__(self, options: CacheConfig, rank: int) -> None:
        self.rank = rank
        super().__init__(options)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append latents (B, 1, q, rank) and rotary keys (B, 1, q, dim); return all, decoded.

        Or keys and values of the heads, as in any layer.

        Raises:
            InputError: if they do not fit each other or what the layer holds.
        """
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if key_states.shape[1] != 1 or key_states.shape[-1] != self.rank:
            return keys, values
        return _dense(keys), _dense(values)


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x.dequantize() if isinstance(x, SegmentedTensor) else x
