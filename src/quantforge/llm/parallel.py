"""Tensor parallelism: which key heads of a model this process holds.

transformers shards the projections of a model, so each rank's cache is handed its own key heads and
nothing else: what a head stores does not depend on the ranks, and the bytes of a cache are divided
by their number. Two things are global. Heads must divide evenly, which transformers finds out in
the middle of the first forward; and heads are named by their number in the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import distributed

from quantforge.errors import ConfigError
from quantforge.llm.options import Bits

KEY_PROJECTIONS = ("k_proj", "qkv_proj", "query_key_value")
"""Modules whose output holds the keys; the names of transformers' `get_kv_heads_per_rank`."""


@dataclass(frozen=True)
class HeadShard:
    """The key heads that a rank holds: a contiguous share of all.

    Attributes:
        rank: of this process among those that share the heads.
        ranks: how many those are.
        heads: key heads of each layer, on all ranks together.
    """

    rank: int
    ranks: int
    heads: tuple[int, ...]

    def local(self, head_bits: Mapping[int, Bits]) -> dict[int, Bits]:
        """Return the bits of the heads held here, by their number on this rank.

        Raises:
            ConfigError: if a head does not exist, or layers differ in their number of heads.
        """
        if not head_bits:
            return {}
        if len(set(self.heads)) > 1:
            raise ConfigError(
                "head_bits under tensor parallelism needs layers of equally many key heads; this "
                f"model has {sorted(set(self.heads))}"
            )
        total = self.heads[0]
        unknown = [head for head in head_bits if not 0 <= head < total]
        if unknown:
            raise ConfigError(
                f"head_bits names the key heads {unknown}, but this model has {total}: 0 to "
                f"{total - 1}, counted over all ranks"
            )
        held = total // self.ranks
        first = self.rank * held
        return {h - first: b for h, b in head_bits.items() if first <= h < first + held}


def head_shard(config: Any) -> HeadShard | None:
    """Return which key heads this process holds, or None where it holds all.

    Args:
        config: of a model loaded with `distributed_config=DistributedConfig(tp_size=...)`, which
            transformers leaves on it; any other config, or None.

    Raises:
        ConfigError: if the ranks cannot hold equally many heads.
    """
    parallel = getattr(config, "distributed_config", None)
    if parallel is None or not (distributed.is_available() and distributed.is_initialized()):
        return None
    ranks = parallel.tp_size
    if ranks == 1:
        return None
    text = config.get_text_config(decoder=True)
    if not _shards_keys(getattr(text, "base_model_tp_plan", None), parallel.tp_plan):
        return None
    heads = _key_heads(text)
    uneven = sorted({n for n in heads if n % ranks})
    if uneven:
        raise ConfigError(
            f"tensor parallelism over {ranks} ranks divides the key heads of every layer, but this "
            f"model has layers of {', '.join(map(str, uneven))}; use a tp_size that divides "
            f"{' and '.join(map(str, uneven))}"
        )
    # of the mesh (pp, dp_replicate, fsdp, tp) in which transformers lays out all ranks
    return HeadShard(distributed.get_rank() % ranks, ranks, heads)


def _shards_keys(plan: Mapping[str, str] | None, changes: Any) -> bool:
    """Return whether a rank computes only its own keys, by a model's plan and the user's rules."""
    if isinstance(changes, Mapping):  # an empty one is no plan at all
        plan = {**(plan or {}), **changes} if changes else {}
    styles = {name.rpartition(".")[2]: style for name, style in (plan or {}).items()}
    return any(styles.get(name) == "colwise" for name in KEY_PROJECTIONS)


def _key_heads(text: Any) -> tuple[int, ...]:
    layers = getattr(text, "per_layer_config", None) or [text]
    found = (getattr(layer, "num_key_value_heads", None) for layer in layers)
    return tuple(n or layer.num_attention_heads for n, layer in zip(found, layers, strict=True))
