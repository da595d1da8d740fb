"""The tables and the plot of `benchmarks.vector_search`, and the table of `search_million`.

python -m benchmarks.search_tables        writes docs/vector_search.svg
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.op_tables import DOCS, markdown
from benchmarks.record import RESULTS, read_rows

SOURCE = RESULTS / "index_peers_cpu.jsonl"
FIELDS = RESULTS / "index_peers_fields_cpu.jsonl"
MILLION = RESULTS / "search_million_cuda.jsonl"
COMMAND = "python -m benchmarks.vector_search VECTORS.npy"
FAMILIES = {
    "quantforge adapted": ("#0571b0", "o"),
    "quantforge centred": ("#92c5de", "o"),
    "quantforge oblivious": ("#bbbbbb", "o"),
    "FAISS RaBitQFastScan": ("#e66101", "s"),
    "FAISS PQ": ("#fdb863", "s"),
    "FAISS SQ": ("#5e3c99", "s"),
    "turbovec": ("#008837", "^"),
}
PEERS = {"faiss-cpu": "FAISS", "turbovec": "turbovec", "usearch": "usearch"}
WHAT = "sentence embeddings"
Row = dict[str, Any]


def table(source: Path = SOURCE, what: str = WHAT) -> str:
    """Return recall, bytes, speed and time to build of every index."""
    if not source.exists():
        return f"Not measured yet: `{COMMAND}`.\n"
    rows = read_rows(source)
    body = [
        [
            row["case"],
            f"{row['recall']:.3f}",
            f"{row['code_bytes']:,.0f}",
            f"{row['total_bytes'] / 2**20:,.1f}",
            f"{row['qps']:,.0f}",
            f"{row['single_ms']:.2f}",
            f"{row['build_s']:.1f}",
        ]
        for row in rows
    ]
    head = ["index", "recall@10", "bytes a vector", "MiB in all", "queries/s", "one query, ms",
            "build, s"]  # fmt: skip
    first, where = rows[0], rows[0]["environment"]
    peers = ", ".join(f"{PEERS[name]} {where[name]}" for name in PEERS if name in where)
    caption = (
        f"{first['n']:,} x {first['dim']} {what}, {first['queries']:,} queries in one "
        f"batch, one thread, CPU time. {where['device']}, torch {where['torch']}, {peers}, "
        f"{where['date']}; `benchmarks/results/{source.name}`."
    )
    return markdown(head, body) + f"\n{caption}\n\n![recall against bytes](vector_search.svg)\n"


def fields(source: Path = FIELDS) -> str:
    """Return recall and bytes of codes of vectors of several fields, families side by side."""
    if not source.exists():
        return f"Not measured yet: `{COMMAND} --fields 2`.\n"
    rows = [row for row in read_rows(source) if "IVF" not in row["case"]]
    found = {(row["dim"], row["bits"], _family(row)): row for row in rows}
    names = [name for name in FAMILIES if any(family == name for _, _, family in found)]
    body = [
        [f"{dim:,}", f"{bits:g}", *(_kept(found.get((dim, bits, name))) for name in names)]
        for dim, bits in sorted({(row["dim"], row["bits"]) for row in rows})
    ]
    sizes = " and ".join(
        f"{n:,} of dim {dim:,}" for dim, n in sorted({(row["dim"], row["n"]) for row in rows})
    )
    first, where = rows[0], rows[0]["environment"]
    peers = ", ".join(f"{PEERS[name]} {where[name]}" for name in PEERS if name in where)
    caption = (
        f"{sizes}, {first['queries']:,} queries. {where['device']}, torch {where['torch']}, "
        f"{peers}, {where['date']}; `benchmarks/results/{source.name}`."
    )
    return markdown(["dim", "bits", *names], body) + f"\n{caption}\n"


def _family(row: Row) -> str:
    return next(name for name in FAMILIES if row["case"].startswith(name))


def _kept(row: Row | None) -> str:
    return "" if row is None else f"{row['recall']:.3f}, {row['code_bytes']:,.0f} bytes"


def million(source: Path = MILLION) -> str:
    """Return what `benchmarks.search_million` has measured: ours first, full scans before lists."""
    if not source.exists():
        return (
            "Not measured yet: `python -m benchmarks.search_million VECTORS.npy --device cuda`.\n"
        )
    rows = sorted(read_rows(source), key=_place)
    body = [
        [
            row["case"],
            f"{row['recall']:.3f}" + _of_all_lists(row),
            f"{row['code_bytes']:,.0f}",
            _pair(row, "single_ms", ".2f"),
            _pair(row, "qps", ",.0f"),
            f"{row['build_s']:.1f}",
            f"{row['held'] / 2**20:,.1f}",
            f"{row['reported'] / row['held'] - 1:+.1%}" if row["reported"] else "",
        ]
        for row in rows
    ]
    head = ["index", "recall@10 (all lists; looked into)", "bytes a vector", "one query, ms",
            "queries/s", "build, s", "MiB held", "its report"]  # fmt: skip
    first, where = rows[0], rows[0]["environment"]
    text = first["text"] or {}
    kinds = ", ".join(f"{count:,} {source}" for source, count in text.items())
    caption = (
        f"{first['n']:,} x {first['dim']} embeddings by all-MiniLM-L6-v2"
        + (f" of distinct sentences ({kinds})" if kinds else "")
        + f", {first['queries']:,} others as queries. On the CPU: one thread, CPU time / all "
        f"{where['threads']} threads. {where['device']}"
        + (f", {where['gpu']}" if "gpu" in where else "")
        + f", torch {where['torch']}"
        + (f", FAISS {where['faiss-cpu']}" if "faiss-cpu" in where else "")
        + f", {where['date']}; `benchmarks/results/{source.name}`."
    )
    return markdown(head, body) + f"\n{caption}\n"


def _place(row: Row) -> tuple[bool, str, bool, float]:
    return not row["case"].startswith("quantforge"), row["on"], row["nlist"] > 1, row["bits"]


def _of_all_lists(row: Row) -> str:
    if row["nprobe"] is None:
        return ""
    return f" ({row['recall_of_all_lists']:.3f}; {row['nprobe']} of {row['nlist']:,})"


def _pair(row: Row, name: str, form: str) -> str:
    values = [row[f"{name}_1_thread"]] if f"{name}_1_thread" in row else []
    return " / ".join(format(value, form) for value in [*values, row[name]])


def draw(rows: list[Row], path: Path, what: str = WHAT) -> None:
    """Draw recall against bytes a vector, one line for each family of codes."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "quantforge"  # the same file for the same rows
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    for name, (color, marker) in FAMILIES.items():
        found = [row for row in rows if row["case"].startswith(name) and "IVF" not in row["case"]]
        found = sorted(found, key=lambda row: row["code_bytes"])
        if found:
            axes.plot(
                [row["code_bytes"] for row in found],
                [row["recall"] for row in found],
                f"{marker}-",
                color=color,
                label=name,
            )
    axes.set_xlabel("bytes a vector")
    axes.set_ylabel("recall@10")
    axes.set_title(f"{rows[0]['n']:,} {what} of {rows[0]['dim']} numbers", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, format="svg", metadata={"Date": None})
    plt.close(figure)


def main(source: Path = SOURCE, docs: Path = DOCS, what: str = WHAT) -> None:
    """Draw what was measured."""
    draw(read_rows(source), docs / "vector_search.svg", what)


if __name__ == "__main__":
    main()
