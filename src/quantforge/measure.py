"""What a code costs and loses on vectors at hand: error, recall, bytes and speed."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from quantforge.config import QuantForgeConfig
from quantforge.errors import InputError
from quantforge.numerics.codebook import load_codebook
from quantforge.numerics.lloyd_max import distortion
from quantforge.ops.search.api import search
from quantforge.pipeline import QuantPipeline
from quantforge.spec import QuantSpec, own_centroids
from quantforge.tensor import QuantTensor

REPEATS = 3
"""Runs that are timed; the quickest counts."""

T = TypeVar("T")


@dataclass(frozen=True)
class Measured:
    """What one code does to vectors.

    Attributes:
        bits: of the code.
        vectors: how many were compressed.
        bytes_per_vector: codes and scales.
        ratio: bytes as float32 over those bytes.
        mse: `sum |x - decoded|^2 / sum |x|^2`.
        theory: the mse to expect of vectors without structure; None for the QJL residual
            and for a codebook of one's own.
        bound: 4^-bits, Shannon's, which no code of so many bits beats on such vectors.
        cosine: between vector and decoded vector, on average.
        recall: share of the k greatest inner products found on codes; None without queries.
        encode_gb_s: float32 bytes encoded in a second, GB/s.
        decode_gb_s: likewise decoded.
    """

    bits: int
    vectors: int
    bytes_per_vector: float
    ratio: float
    mse: float
    theory: float | None
    bound: float
    cosine: float
    recall: float | None
    encode_gb_s: float
    decode_gb_s: float

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain values, for JSON."""
        return dataclasses.asdict(self)


def theory(spec: QuantSpec) -> float | None:
    """Return the relative squared error of a code on vectors without structure.

        D                        with the scale of least error ("mse")
        D / (1 - D)              where inner products are unbiased
        2 - 2 sqrt(1 - D)        where the norm is kept

    D is that of the exact Lloyd-Max codebook of this dim. None for the QJL
    residual and for a codebook of one's own.

    Source: arXiv 2504.19874, Theorem 1; the others follow from cos^2 = 1 - D.
    """
    if spec.estimator == "prod" or own_centroids(spec.codebook) is not None:
        return None
    centroids = load_codebook("lloyd_max", spec.code_bits, spec.dim).centroids.astype(np.float64)
    lost = distortion(centroids[len(centroids) // 2 :], spec.dim if spec.dim >= 4 else 0)
    if spec.scale_rule == "mse":
        return lost
    return lost / (1 - lost) if spec.scale_rule == "unbiased" else 2 - 2 * (1 - lost) ** 0.5


def measure(
    x: torch.Tensor, queries: torch.Tensor, config: QuantForgeConfig, *, k: int = 10
) -> Measured:
    """Compress vectors, decode them and search them, and compare.

    Args:
        x: (n, dim), on any device, n at least 1.
        queries: (q, dim) that are not among x; none: no recall.
        config: the code.
        k: neighbours that recall is about, at most n of them.

    Raises:
        InputError: for no vectors, NaN or infinity.
    """
    if x.ndim != 2 or len(x) == 0:
        raise InputError(f"vectors to measure have shape (n, dim), n >= 1; got {tuple(x.shape)}")
    x = x.float()
    pipeline = QuantPipeline(x.shape[1], config)
    encode_s, codes = _timed(lambda: pipeline.compress(x, progress=False), x.device)
    decode_s, decoded = _timed(codes.dequantize, x.device)
    mse, cosine = losses(x, decoded)
    nbytes = (codes.packed.nbytes + codes.scales.nbytes) / len(x)
    return Measured(
        bits=config.bits,
        vectors=len(x),
        bytes_per_vector=nbytes,
        ratio=4 * x.shape[1] / nbytes,
        mse=float(mse.mean()),
        theory=theory(pipeline.spec),
        bound=4.0**-config.bits,
        cosine=float(cosine.mean()),
        recall=_recall(x, codes, queries.float(), min(k, len(x))) if len(queries) else None,
        encode_gb_s=x.nbytes / encode_s / 1e9,
        decode_gb_s=x.nbytes / decode_s / 1e9,
    )


def losses(x: torch.Tensor, decoded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return squared error over the mean squared length, and cosine, of vectors (n, dim), float64.

    The mean of the first is `sum |x - decoded|^2 / sum |x|^2`. Vectors of zeros have cosine 0.
    """
    norms = x.square().sum(-1, dtype=torch.float64)
    error = (x - decoded).square().sum(-1, dtype=torch.float64)
    lengths = (norms * decoded.square().sum(-1, dtype=torch.float64)).sqrt()
    products = (x * decoded).sum(-1, dtype=torch.float64)
    return error / norms.mean().clamp_min(1e-300), products / lengths.clamp_min(1e-300)


def _timed(work: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Return the seconds of the quickest run, and its result; tables are made before."""
    result, seconds = work(), []
    for _ in range(REPEATS):
        start = time.perf_counter()
        result = work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return max(min(seconds), 1e-9), result


def _recall(x: torch.Tensor, codes: QuantTensor, queries: torch.Tensor, k: int) -> float:
    true = (queries @ x.T).topk(k).indices
    _, found = search(
        queries, codes.packed, codes.scales, codes.spec, k,
        shift=codes.shift, equalizer=codes.equalizer,
    )  # fmt: skip
    return float((true[:, :, None] == found[:, None, :]).any(-1).float().mean())
