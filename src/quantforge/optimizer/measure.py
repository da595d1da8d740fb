"""What a code or an index makes of a sample: accuracy, bytes, time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from quantforge.config import QuantForgeConfig
from quantforge.measure import losses
from quantforge.optimizer.sample import Sample
from quantforge.optimizer.space import Config, name
from quantforge.optimizer.timing import Latency, latency
from quantforge.pipeline import QuantPipeline
from quantforge.vectordb.index import QuantizedIndex

Accuracy = Literal["recall", "cosine", "mse"]
TIMED_QUERIES = 16

F64 = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Point:
    """One setting, measured.

    Attributes:
        config: the setting.
        recall: mean recall@k of all queries.
        cosine: mean cosine of vectors and their reconstruction.
        mse: squared error over squared length of all vectors.
        bytes_per_vector: codes, scales and offsets, and the vector's share of what was learned of
            the data; ids are not counted.
        latency: of searching for TIMED_QUERIES queries; None where it was not asked for.
        samples: accuracy by query (recall) or by vector (cosine, 1 - relative squared error).
    """

    config: Config
    recall: float
    cosine: float
    mse: float
    bytes_per_vector: float
    latency: Latency | None
    samples: dict[Accuracy, F64] = field(repr=False)

    def accuracy(self, measure: Accuracy, half: Literal["choice", "check"]) -> F64:
        """Return one half of the samples: those that choose, or those that check the choice."""
        return self.samples[measure][0 if half == "choice" else 1 :: 2]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        timed = {} if self.latency is None else vars(self.latency)
        return {
            "kind": "vectors" if isinstance(self.config, QuantForgeConfig) else "index",
            "name": name(self.config),
            "settings": self.config.to_dict(),
            "recall": self.recall,
            "cosine": self.cosine,
            "mse": self.mse,
            "bytes_per_vector": self.bytes_per_vector,
            "latency_ms": timed.get("median_ms"),
            "latency_spread_ms": timed.get("spread_ms"),
        }


def measure(config: Config, sample: Sample, stored: int, *, timed: bool) -> Point:
    """Code a sample, and compare what the codes say with what the vectors say.

    Args:
        config: of codes (on the sample's device), or of an index (on the CPU), which is scanned in
            full whatever its lists.
        sample: vectors and queries.
        stored: vectors that will share what is learned of the data.
        timed: measure the latency too.
    """
    if isinstance(config, QuantForgeConfig):
        restored, found, nbytes, search = _codes(config, sample, stored)
    else:
        restored, found, nbytes, search = _index(config, sample, stored)
    relative, cosine = (loss.cpu().numpy() for loss in losses(sample.base, restored))
    recall = sample.recall(found)
    return Point(
        config,
        float(recall.mean()),
        float(cosine.mean()),
        float(relative.mean()),
        nbytes,
        latency(search, sample.base.device) if timed else None,
        {"recall": recall, "cosine": cosine, "mse": 1 - relative},
    )


def _codes(
    config: QuantForgeConfig, sample: Sample, stored: int
) -> tuple[torch.Tensor, torch.Tensor, float, Callable[[], Any]]:
    codes = QuantPipeline(sample.dim, config).compress(sample.base, progress=False)
    restored = codes.dequantize()
    # distances need the lengths of what is stored; a tensor of codes has them decoded
    lengths = restored.square().sum(-1) if sample.metric == "l2" else None

    def search(queries: torch.Tensor) -> torch.Tensor:
        products = queries @ codes.mT
        scores = products if lengths is None else 2 * products - lengths
        return scores.topk(sample.k).indices

    learned = sum(t.nbytes for t in (codes.shift, codes.equalizer) if t is not None)
    rows = (codes.nbytes_packed - learned) / len(sample.base)
    few = sample.queries[:TIMED_QUERIES]
    return restored, search(sample.queries), rows + learned / stored, lambda: search(few)


def _index(
    config: Any, sample: Sample, stored: int
) -> tuple[torch.Tensor, torch.Tensor, float, Callable[[], Any]]:
    # scanned in full: what lists leave out is no property of bits and mode
    index = QuantizedIndex(sample.dim, replace(config, nlist=0))
    ids = index.add(sample.base.cpu())
    restored = torch.from_numpy(index.reconstruct(ids)).to(sample.base.device)
    report, queries = index.memory_report(), sample.queries.cpu()
    rows = report["total"] - report["learned"] - report["ids"]
    found, _ = index.search(queries, sample.k)
    few = queries[:TIMED_QUERIES]
    nbytes = rows / len(index) + report["learned"] / stored
    return restored, torch.from_numpy(found), nbytes, lambda: index.search(few, sample.k)


def uncompressed_latency(sample: Sample) -> Latency:
    """Return the time of the same search with float32 vectors."""
    few = Sample(sample.base, sample.queries[:TIMED_QUERIES], sample.metric, sample.k)
    return latency(lambda: few.scores(few.base).topk(few.k), sample.base.device)
