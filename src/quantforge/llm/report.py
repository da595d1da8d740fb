"""What a cache did, layer by layer: bits, bytes, windows, how unusual the data were.

Scores are of the worst key head, measured when the layer's first page was packed:

    key bias      ||mean|| / ||RMS about it||        1: the mean is as long as what it hides
    outliers      loudest / median channel, by RMS   1: all alike
    logit error   standard deviation of a logit that the codes of keys add, where queries were seen:
                  sqrt(D / dim * sum (k_i / e_i)^2 * sum (q_i e_i)^2) / sqrt(dim), of ordinary
                  tokens and, with head_bits, of the first group's bits
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from quantforge.llm.layer import QuantForgeLayer
from quantforge.llm.outliers import LOUD, loudness
from quantforge.llm.store import Store
from quantforge.numerics.codebook import load_codebook
from quantforge.numerics.lloyd_max import distortion
from quantforge.spec import QuantSpec, own_centroids
from quantforge.text import table

BIASED = 1.0
"""Key bias from which the mean, left in, would take most of the bits."""

Scores = tuple[float | None, float | None, float | None, float | None]


@dataclass(frozen=True)
class LayerReport:
    """One layer of a cache.

    Attributes:
        layer: index.
        kind: class of the layer.
        tokens: held.
        packed: of them.
        sinks: first tokens in the model's dtype.
        recent: last tokens in the model's dtype.
        bits: of keys and values, with the share of tokens or the heads that have others.
        nbytes: allocated.
        bits_per_number: the same for each number held, windows, scales and slack counted.
        key_bias: see above; None where nothing is packed yet or the layer is not quantized.
        key_outliers: likewise.
        value_outliers: likewise.
        logit_error: likewise; None where no query was seen.
        done: what was found and what was done about it.
    """

    layer: int
    kind: str
    tokens: int
    packed: int
    sinks: int
    recent: int
    bits: str
    nbytes: int
    bits_per_number: float | None
    key_bias: float | None
    key_outliers: float | None
    value_outliers: float | None
    logit_error: float | None
    done: tuple[str, ...]


@dataclass(frozen=True)
class CacheReport:
    """All layers of a cache; `print` it for a table.

    Attributes:
        layers: one report each.
    """

    layers: tuple[LayerReport, ...]

    @property
    def nbytes(self) -> int:
        """Bytes allocated by all layers."""
        return sum(layer.nbytes for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        rows = [dataclasses.asdict(layer) | {"done": list(layer.done)} for layer in self.layers]
        return {"nbytes": self.nbytes, "layers": rows}

    def __str__(self) -> str:
        head = ["layer", "tokens", "packed", "sinks", "recent", "bits (K, V)", "MiB", "bits/number",
                "key bias", "outliers K", "V", "logit error", "done"]  # fmt: skip
        rows = [
            [str(row.layer), *map(str, (row.tokens, row.packed, row.sinks, row.recent)), row.bits,
             f"{row.nbytes / 2**20:.2f}", *(_number(x) for x in (
                row.bits_per_number, row.key_bias, row.key_outliers, row.value_outliers,
                row.logit_error)), "; ".join(row.done)]
            for row in self.layers
        ]  # fmt: skip
        return f"{table(head, rows)}\n{self.nbytes / 2**20:.2f} MiB in {len(rows)} layers"


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:.3g}"


def report(layers: Sequence[Any], sizes: Sequence[int]) -> CacheReport:
    """Describe the layers of a cache.

    Args:
        layers: QuantForgeLayers, or others, which are named only.
        sizes: bytes that each has allocated.
    """
    return CacheReport(
        tuple(
            _quantized(index, layer, nbytes)
            if isinstance(layer, QuantForgeLayer) and layer.get_seq_length()
            else _other(index, layer, nbytes)
            for index, (layer, nbytes) in enumerate(zip(layers, sizes, strict=True))
        )
    )


def _other(index: int, layer: Any, nbytes: int) -> LayerReport:
    quantized = isinstance(layer, QuantForgeLayer)
    tokens = 0 if quantized or not hasattr(layer, "keys") else int(layer.get_seq_length())
    done = "nothing yet" if quantized else "not quantized"
    none = (None,) * 5
    return LayerReport(
        index, type(layer).__name__, tokens, 0, 0, tokens, "-", nbytes, *none, (done,)
    )


def _quantized(index: int, layer: QuantForgeLayer, nbytes: int) -> LayerReport:
    keys, values = layer._stores()
    tokens = int(layer.get_seq_length())
    held = int(keys.length)
    sinks = min(keys.options.sinks, keys.n_dense)
    assert keys.dense is not None, "it has tokens"
    batch, heads = keys.dense.shape[:2]
    numbers = batch * heads * held * (keys.spec.dim + values.spec.dim)
    scores = _scores(keys, values)
    return LayerReport(
        *(index, type(layer).__name__, tokens, keys.n_packed, sinks, keys.n_dense - sinks),
        *(_bits(keys, values), nbytes, 8 * nbytes / numbers if numbers else None),
        *scores,
        (*_done(keys, values, scores), *_raised(layer)),
    )


def _raised(layer: QuantForgeLayer) -> tuple[str, ...]:
    """Say which heads got more bits, where that was found when the first page was packed."""
    if layer.options == layer.given or not layer.options.head_bits:
        return ()
    heads = ", ".join(map(str, layer.options.head_bits))
    return (f"outliers left in heads {heads}: raised to {layer.given.outlier_bits} bits",)


def _bits(keys: Store, values: Store) -> str:
    pairs = list(zip((keys, *keys.tiers), (values, *values.tiers), strict=True))
    names = [f"{k.spec.bits}, {v.spec.bits}" for k, v in pairs]
    if keys.groups is not None:
        named = zip(keys.groups.heads, names, strict=True)
        return " | ".join(f"{name} heads {','.join(map(str, heads))}" for heads, name in named)
    if keys.slots is not None:
        total = sum(keys.slots.rows)
        shares = [f" {n / total:.1%}" for n in keys.slots.rows]
        return " | ".join(name + share for name, share in zip(names, shares, strict=True))
    return names[0]


def _scores(keys: Store, values: Store) -> Scores:
    if keys.moments is None or values.moments is None:
        return None, None, None, None
    mean, rms = keys.moments
    bias = float((mean.norm(dim=-1) / rms.norm(dim=-1).clamp_min(1e-30)).max())
    loud = [float(loudness(store.moments[1]).max()) for store in (keys, values)]  # type: ignore[index]
    return bias, loud[0], loud[1], _logit_error(keys, rms)


def _logit_error(keys: Store, rms: torch.Tensor) -> float | None:
    if keys.query_rms is None or own_centroids(keys.spec.codebook) is not None:
        return None
    query, dim = keys.query_rms, keys.spec.dim
    equalizer = torch.ones_like(rms)
    if keys.equalizer is not None and keys.groups is None:
        equalizer = keys.equalizer
    elif keys.equalizer is not None and keys.groups is not None:
        stored = [t.equalizer for t in (keys, *keys.tiers) if t.equalizer is not None]
        equalizer = keys.groups.join(stored)
    product = (rms / equalizer).square().sum(-1) * (query * equalizer).square().sum(-1)
    return float((_distortion(keys.spec) / dim * product.max()).sqrt()) * dim**-0.5


def _distortion(spec: QuantSpec) -> float:
    """Return the relative squared error of a code, of its exact codebook."""
    centroids = load_codebook("lloyd_max", spec.code_bits, spec.dim).centroids
    return distortion(np.sort(centroids[centroids > 0]).astype(np.float64))


def _done(keys: Store, values: Store, scores: Scores) -> tuple[str, ...]:
    bias, key_loud, value_loud, _ = scores
    if bias is None or key_loud is None or value_loud is None:
        return ("nothing packed yet",)
    shifted, equalized = keys.shift is not None, keys.equalizer is not None
    done = []
    if bias >= BIASED:
        done.append(f"key bias: mean {'taken out' if shifted else 'LEFT IN (shift=False)'}")
    for name, loud in (("key", key_loud), ("value", value_loud)):
        if loud >= LOUD:
            how = "by keys alone" if keys.query_rms is None else "by keys and queries"
            how = f"equalized {how if name == 'key' else 'by values'}"
            how = how if equalized else "LEFT ALONE (equalizer=False)"
            done.append(f"{name} outliers: {how}")
    return tuple(done) or ("nothing unusual",)
