"""Plots of `benchmarks/results/`: decode attention over context length and bits.

    python -m benchmarks.plots        writes docs/decode_attention_<gpu>.svg

Left, the time of one step; dashed, the time of moving its bytes at the measured read ceiling.
Right, the ratio to the best bf16 kernel of the same run; dashed, what it would be at the ceiling.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.cases.decode_attention import SWEEP_BATCH
from benchmarks.op_tables import DOCS, result_files
from benchmarks.record import RESULTS, read_rows

Row = dict[str, Any]
SWEEP = {"batch": SWEEP_BATCH, "q_per_kv": 4, "q_len": 1}
COLORS = {8: "#7b3294", 4: "#0571b0", 3: "#008837", 2: "#e66101"}
BASELINE = "#555555"


def sweep(rows: list[Row]) -> dict[int, list[Row]]:
    """Return the measured rows of the sweep by bits, each in the order of its lengths."""
    found: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        shape = row["shape"]
        alike = shape["key_bits"] == shape["value_bits"] and shape["key_bits"] in COLORS
        if "time_us" in row and alike and SWEEP.items() <= shape.items():
            found[shape["key_bits"]].append(row)
    return {
        bits: sorted(found[bits], key=lambda row: row["shape"]["length"])
        for bits in sorted(found, reverse=True)
    }


def floor_us(row: Row) -> float:
    """Return the time of a row's bytes at the read ceiling."""
    return row["bytes"] / row["read_gbps"] / 1e3


def draw(rows: list[Row], path: Path) -> None:
    """Draw the sweep of one device."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "quantforge"  # the same file for the same rows
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    best: dict[int, float] = {}
    for bits, measured in sweep(rows).items():
        lengths = [row["shape"]["length"] for row in measured]
        floors = [floor_us(row) for row in measured]
        dense = [row["baselines"][row["best"]]["time_us"] for row in measured]
        for length, time_us in zip(lengths, dense, strict=True):
            best[length] = min(time_us, best.get(length, time_us))
        color, label = COLORS[bits], f"{bits} bits"
        left.plot(lengths, [row["time_us"] for row in measured], "o-", color=color, label=label)
        left.plot(lengths, floors, "--", color=color, linewidth=1)
        right.plot(lengths, [row["ratio"] for row in measured], "o-", color=color, label=label)
        limits = [d / f for d, f in zip(dense, floors, strict=True)]
        right.plot(lengths, limits, "--", color=color, linewidth=1)
    left.plot(sorted(best), [best[n] for n in sorted(best)], "s-", color=BASELINE,
              label="best bf16 SDPA")  # fmt: skip
    right.axhline(1.0, color=BASELINE)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("context length")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    left.set_yscale("log")
    left.set_ylabel("time of one step, us")
    right.set_ylabel("times as fast as the best bf16 SDPA")
    right.set_ylim(bottom=0)
    figure.suptitle(
        f"Decode attention, B={SWEEP_BATCH}, 32 query and 8 KV heads of dim 128, "
        f"{rows[0]['environment']['device']}; dashed: its bytes at the read ceiling",
        fontsize=10,
    )
    figure.savefig(path, format="svg", metadata={"Date": None})
    plt.close(figure)


def main(results: Path = RESULTS, docs: Path = DOCS) -> list[Path]:
    """Draw every GPU that has a sweep."""
    written = []
    for source in result_files("decode_attention", results):
        rows = read_rows(source)
        if any(sweep(rows).values()):
            written.append(docs / f"{source.stem}.svg")
            draw(rows, written[-1])
            print(written[-1])
    return written


if __name__ == "__main__":
    main()
