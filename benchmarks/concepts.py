"""What docs/concepts.md shows: distortion, outlier channels, bytes of a cache.

    python -m benchmarks.concepts     writes benchmarks/results/concepts.json, docs/concepts.svg

Relative squared errors of vectors of dim 128. For the outlier, one channel is `loud` times the
others, and the error is that of the quiet channels: of integers scaled by the largest number of a
vector, of rotated codes, and of rotated codes with the equalizer. Bytes are those that a cache of
one key head of dim 128 has allocated, keys and values.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.op_tables import DOCS
from quantforge import QuantForgeCache, QuantForgeConfig, QuantPipeline, QuantTensor
from quantforge.numerics.lloyd_max import distortion, solve

DIM = 128
LOUDNESS = (1, 3, 10, 30, 100)
CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)


def relative_error(got: torch.Tensor, x: torch.Tensor) -> float:
    """Return `|got - x|^2 / |x|^2`."""
    return float((got - x).square().sum() / x.square().sum())


def distortions(x: torch.Tensor) -> list[dict[str, float]]:
    """Return measured error, Lloyd-Max theory and Shannon's bound for 1-8 bits."""
    rows = []
    for bits in range(1, 9):
        packed = QuantTensor.quantize(x, QuantForgeConfig(bits=bits, scale_rule="mse"))
        rows.append(
            {
                "bits": bits,
                "measured": relative_error(packed.dequantize(), x),
                "theory": distortion(solve(bits, DIM), DIM),
                "bound": 4.0**-bits,
            }
        )
    return rows


def integers(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Return x (n, dim) rounded to signed integers of a vector's own scale."""
    step = x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    return (x / step).round() * step


def outliers(x: torch.Tensor, bits: int = 4) -> list[dict[str, float]]:
    """Return the error of the quiet channels where the first one is loud."""
    rows = []
    for loud in LOUDNESS:
        y = x.clone()
        y[:, 0] *= loud
        row = {"loud": loud, "integers": relative_error(integers(y, bits)[:, 1:], x[:, 1:])}
        for name, equalizer in (("rotated", False), ("equalized", True)):
            pipeline = QuantPipeline(DIM, QuantForgeConfig(bits=bits, equalizer=equalizer))
            got = pipeline.decompress(pipeline.compress(y))
            row[name] = relative_error(got[:, 1:], x[:, 1:])
        rows.append(row)
    return rows


def cache_bytes(contexts: tuple[int, ...]) -> list[dict[str, int]]:
    """Return the bytes of caches after prompts of so many tokens."""
    rows = []
    for tokens in contexts:
        key, value = torch.randn(2, 1, 1, tokens, DIM).to(torch.bfloat16)
        row = {"tokens": tokens, "16": 2 * key.nbytes}
        for bits in (4, 3, 2):
            cache = QuantForgeCache(bits=bits)
            cache.update(key, value, 0)
            row[str(bits)] = cache.nbytes
        rows.append(row)
    return rows


def tables(result: dict[str, Any]) -> dict[str, str]:
    """Return the rows of the three Markdown tables."""
    return {
        "DISTORTION": "\n".join(
            f"| {r['bits']} | {r['measured']:.6f} | {r['theory']:.6f} | {r['bound']:.6f} |"
            for r in result["distortion"]
        ),
        "OUTLIERS": "\n".join(
            f"| {r['loud']} | {r['integers']:.4f} | {r['rotated']:.4f} | {r['equalized']:.4f} |"
            for r in result["outliers"]
        ),
        "CACHE": "\n".join(
            f"| {r['tokens']:,} | {r['16']:,} | {r['4']:,} | {r['3']:,} | {r['2']:,} |"
            for r in result["cache"]
        ),
    }


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw the three of them side by side."""
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "quantforge"  # the same file for the same numbers
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    rows = result["distortion"]
    bits = [row["bits"] for row in rows]
    left.semilogy(bits, [row["theory"] for row in rows], label="Lloyd-Max, theory")
    left.semilogy(bits, [row["measured"] for row in rows], "k.", label="measured")
    left.semilogy(bits, [row["bound"] for row in rows], "--", label="Shannon's bound")
    left.set(xlabel="bits", ylabel="relative squared error", title="Distortion")
    rows = result["outliers"]
    for name in ("integers", "rotated", "equalized"):
        middle.loglog([row["loud"] for row in rows], [row[name] for row in rows], ".-", label=name)
    middle.set(xlabel="loudness of one channel", title="Error of the others, 4 bits")
    rows = result["cache"]
    for name in ("16", "4", "3", "2"):
        tokens = [row["tokens"] for row in rows]
        right.loglog(tokens, [row[name] / 1024 for row in rows], label=f"{name} bits")
    right.set(xlabel="tokens", ylabel="KiB", title="A cache's head, keys and values")
    for axes in (left, middle, right):
        axes.legend()
    figure.savefig(path, metadata={"Date": None})


def measure(vectors: int, contexts: tuple[int, ...]) -> dict[str, Any]:
    """Return all results, from seed 0."""
    torch.manual_seed(0)
    x = torch.randn(vectors, DIM)
    return {
        "distortion": distortions(x),
        "outliers": outliers(x),
        "cache": cache_bytes(contexts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    result = measure(4096, CONTEXTS)
    record.save("concepts", "cpu", [result])
    draw(result, DOCS / "concepts.svg")


if __name__ == "__main__":
    main()
