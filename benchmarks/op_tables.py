"""Tables of what `benchmarks.run` and `benchmarks.decode_step` have measured, one per device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, read_rows

Row = dict[str, Any]
DOCS = Path(__file__).parents[1] / "docs"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """Return a table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def result_files(name: str, folder: Path = RESULTS) -> list[Path]:
    """Return the results of an operator, one file per device, whose name has no "_"."""
    found = sorted(folder.glob(f"{name}_*.jsonl"))
    return [path for path in found if "_" not in path.stem.removeprefix(f"{name}_")]


def of_devices(
    name: str, command: str, table: Callable[[list[Row]], str], folder: Path = RESULTS
) -> str:
    """Return a table and its caption for every device with results."""
    files = result_files(name, folder)
    if not files:
        return f"Not measured yet: `{command}`.\n"
    return "\n".join(table(rows) + "\n" + _caption(rows, path) for path, rows in _read(files))


def _read(files: list[Path]) -> list[tuple[Path, list[Row]]]:
    return [(path, read_rows(path)) for path in files]


def _caption(rows: list[Row], path: Path) -> str:
    def values(name: str) -> str:
        return ", ".join(sorted({str(row["environment"][name]) for row in rows}))

    where = rows[0]["environment"]
    software = f"torch {values('torch')}"
    if "NVIDIA" in where["device"]:
        software += f", triton {values('triton')}"
    else:
        software = f"{where['threads']} thread{'s' * (where['threads'] != 1)}, {software}"
    ceilings = [row["read_gbps"] for row in rows if "read_gbps" in row]
    read = f"read ceiling {_range(ceilings)} GB/s; " if ceilings else ""
    source = f"`benchmarks/results/{path.name}`"
    return f"{where['device']}, {software}, {values('date')}; {read}{source}.\n"


def _range(numbers: list[float]) -> str:
    low, high = f"{min(numbers):,.0f}", f"{max(numbers):,.0f}"
    return low if low == high else f"{low}-{high}"


def time_text(time_us: float) -> str:
    """Return a time with its unit."""
    return f"{time_us / 1e3:,.2f} ms" if time_us >= 1000 else f"{time_us:.1f} us"


def op_table(op: str, *, only_goals: bool = False, folder: Path = RESULTS) -> str:
    """Return the times of an operator's cases, or only of those that have a goal."""

    def table(rows: list[Row]) -> str:
        if only_goals:
            rows = [row for row in rows if row.get("goal_ratio")]
        head = ["case", "time", "bytes / time", "of the read ceiling", "best baseline", "ratio"]
        goals = any(row.get("goal_ratio") or row.get("goal_share") for row in rows)
        body = [_op_cells(row) + ([_goal(row)] if goals else []) for row in rows]
        return markdown(head + (["goal"] if goals else []), body)

    return of_devices(op, f"python -m benchmarks.run {op}", table, folder)


def _op_cells(row: Row) -> list[str]:
    if "skipped" in row:
        return [row["case"], row["skipped"], "", "", "", ""]
    best = row.get("best")
    baseline = "" if best is None else f"{best}, {time_text(row['baselines'][best]['time_us'])}"
    return [
        row["case"],
        time_text(row["time_us"]),
        f"{row['gbps']:,.0f} GB/s",
        f"{row['share']:.0%}",
        baseline,
        "" if best is None else f"{row['ratio']:.2f}x",
    ]


def _goal(row: Row) -> str:
    if row.get("goal_ratio"):
        return f"{row['goal_ratio']}x"
    return f"{row['goal_share']:.0%}" if row.get("goal_share") else ""


def decode_step_table() -> str:
    """Return the times of decode steps, and where they go."""
    return of_devices("decode_step", "python -m benchmarks.decode_step", _steps)


def compiled_step_table() -> str:
    """Return compiled decode steps with transformers' static cache and with ours."""
    return of_devices("decode_step", "python -m benchmarks.decode_step", _compiled_steps)


def generate_step_table() -> str:
    """Return the time of a token through `generate()`."""
    return of_devices("generate_step", "python -m benchmarks.generate_step", _generated)


def _generated(rows: list[Row]) -> str:
    head = ["context", "batch", "cache", "a token", "from", "to"]
    order = sorted(rows, key=lambda row: (row["context"], row["batch"], row["case"]))
    body = [
        [
            f"{row['context']:,}",
            str(row["batch"]),
            row["cache"],
            *(f"{row[key]:.2f} ms" for key in ("token_ms", "low_ms", "high_ms")),
        ]
        for row in order
    ]
    return markdown(head, body)


def _compiled_steps(rows: list[Row]) -> str:
    head = [
        "context",
        "batch",
        "`StaticCache`, bf16",
        "`QuantForgeCache`, 4 bits",
        "faster",
        "peak",
    ]
    found = {row["case"]: row for row in rows if row["compiled"] and "skipped" not in row}
    body = []
    for name, theirs in found.items():
        ours = found.get(f"quantforge4-{name}")
        if ours is None or ours["batch"] != theirs["batch"]:
            continue
        peaks = [f"{row['peak_gib']:.1f}" for row in (theirs, ours) if row["peak_gib"] is not None]
        body.append(
            [
                f"{theirs['context']:,}",
                str(theirs["batch"]),
                *(f"{row['step_ms']:.1f} ms" for row in (theirs, ours)),
                f"{theirs['step_ms'] / ours['step_ms']:.1f}x",
                f"{' and '.join(peaks)} GiB" if peaks else "",
            ]
        )
    return markdown(head, sorted(body, key=lambda row: (len(row[0]), row[0], int(row[1]))))


def _steps(rows: list[Row]) -> str:
    head = ["context", "batch", "cache", "step", "tokens/s", "peak", "bytes floor"]
    parts = ["attention", "append", "linear", "other", "gap"]
    body = []
    largest = max((row["batch"] for row in rows if row["batch"] != "max"), default=0)
    for row in sorted(rows, key=lambda row: (row["context"], _batch(row, largest + 1))):
        cache = row["cache"] + (", compiled" if row["compiled"] else "")
        start = [f"{row['context']:,}", str(row["batch"]), cache]
        if "skipped" in row:
            body.append([*start, row["skipped"], *[""] * (3 + len(parts))])
            continue
        peak = "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f} GiB"
        found = row.get("breakdown", {})
        spent = found.get("parts_ms", {}) | {"gap": found.get("gap_ms")}
        body.append(
            [
                *start,
                f"{row['step_ms']:.2f} ms",
                f"{row['tokens_per_s']:,.1f}",
                peak,
                f"{row['floor_ms']:.2f} ms",
                *("" if spent.get(part) is None else f"{spent[part]:.2f}" for part in parts),
            ]
        )
    return markdown(head + parts, body)


def _batch(row: Row, otherwise: int) -> int:
    return otherwise if row["batch"] == "max" else row["batch"]


def plots() -> str:
    """Return links to the plots, as seen from docs/."""
    files = sorted(DOCS.glob("decode_attention_*.svg"))
    if not files:
        return "Not drawn yet: `python -m benchmarks.plots`.\n"
    return "".join(f"![Decode attention, time and speed]({path.name})\n" for path in files)
