"""The tables of README and docs, made from `benchmarks/results/`.

python -m benchmarks.tables        rewrites what stands between `<!-- table: NAME -->` marks
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks import optimizer_tables
from benchmarks.op_tables import (
    compiled_step_table,
    decode_step_table,
    generate_step_table,
    markdown,
    op_table,
    plots,
)
from benchmarks.record import RESULTS, load
from benchmarks.registry import OPS
from benchmarks.search_tables import fields as index_fields
from benchmarks.search_tables import million as search_million
from benchmarks.search_tables import table as index_peers

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _caption(name: str, folder: Path = RESULTS) -> str:
    where = load(name, folder)["environment"]
    threads = f", {where['threads']} thread" + ("s" if where["threads"] != 1 else "")
    return (
        f"{where['device']}{threads if 'NVIDIA' not in where['device'] else ''}, torch "
        f"{where['torch']}, transformers {where['transformers']}, {where['date']}; "
        f"`benchmarks/results/{name}.json`."
    )


def kv_fidelity(name: str, folder: Path = RESULTS) -> str:
    """Return KL, top-1 and needles of each cache on the three versions of a model."""
    found = load(name, folder)["rows"]
    versions = list(dict.fromkeys(row["model"] for row in found))
    rows = []
    for cache in dict.fromkeys(row["cache"] for row in found):
        by_version = {row["model"]: row for row in found if row["cache"] == cache}
        first = by_version[versions[0]]
        cells = [
            f"{row['kl_mean']:.4f} / {row['top1']:.3f} / {row['needles']:.0%}"
            for row in (by_version[version] for version in versions)
        ]
        rows.append([cache, *cells, f"{first['bits_per_number_at_8k']:.2f}"])
    head = ["KL (nats) / top-1 / needles", *versions, "bits per number at 8k"]
    settings = found[0]
    what = f"Decode of {settings['decode']} tokens after {settings['prompt']}. "
    return markdown(head, rows) + "\n" + what + _caption(name, folder) + "\n"


def held_bits(name: str, folder: Path = RESULTS) -> str:
    """Return KL, top-1 and the bits that each version of a model makes a cache hold."""
    found = load(name, folder)["rows"]
    versions = list(dict.fromkeys(row["model"] for row in found))
    rows = []
    for cache in dict.fromkeys(row["cache"] for row in found):
        of_cache = (row for row in found if row["cache"] == cache)
        cells = [
            f"{row['kl_mean']:.4f} / {row['top1']:.3f} / {row['bits_per_number']:.2f}"
            for row in of_cache
        ]
        rows.append([cache, *cells])
    head = ["KL (nats) / top-1 / bits per number held", *versions]
    what = f"Decode of {found[0]['decode']} tokens after {found[0]['prompt']}, windows in float32. "
    return markdown(head, rows) + "\n" + what + _caption(name, folder) + "\n"


def eager_scores(name: str) -> str:
    """Return the speed of packed scores against dense matmul."""
    rows = [row for row in load(name)["rows"] if row["op"] == "scores"]
    body = [
        [
            f"{row['dim']}",
            f"{row['queries']}",
            f"{row['bits']}",
            f"{row['ratios']['fp32']:.2f}x",
            f"{row['ratios']['bf16']:.2f}x",
        ]
        for row in rows
    ]
    head = ["dim", "queries", "bits", "against fp32 matmul", "against bf16 matmul"]
    return markdown(head, body) + f"\n{rows[0]['n']:,} vectors. {_caption(name)}\n"


def eager_attention(name: str) -> str:
    """Return the speed of packed attention against dense SDPA."""
    rows = [row for row in load(name)["rows"] if row["op"] == "attention"]
    baselines = list(rows[0]["ratios"])
    body = [
        [f"{row['queries']}", f"{row['bits']}", *(f"{row['ratios'][b]:.2f}x" for b in baselines)]
        for row in rows
    ]
    head = ["queries", "bits", *(f"against {b}" for b in baselines)]
    text = "8 query and 2 KV heads of dim 128 over 32,768 tokens. "
    return markdown(head, body) + f"\n{text}{_caption(name)}\n"


def native_ops(name: str, folder: Path = RESULTS) -> str:
    """Return the speed of the native library against dense torch."""
    body = []
    rows = load(name, folder)["rows"]
    with_cold = any(row.get("cold_ratio") for row in rows)
    for row in rows:
        if row["op"] not in ("scores", "attention"):
            continue
        cold = f"{row['cold_ratio']:.2f}x" if row.get("cold_ratio") else ""
        queries = f"{row['queries']} quer{'y' if row['queries'] == 1 else 'ies'}"
        goal = f"{row['target']:g}x" if row.get("target") else ""
        body.append(
            [
                f"{row['op']}, {row['n']:,} x {row['dim']}, {row['bits']} bits, {queries}",
                row.get("precision") or "exact",
                row["level"],
                f"{row['packed_ms']:.2f} ms",
                f"{row['ratio']:.2f}x",
                goal,
                *([cold] if with_cold else []),
            ]
        )
    head = ["case", "precision", "level", "time", "against dense", "goal"]
    head += ["with codes out of cache"] if with_cold else []
    text = "Dense is fp32 matmul for scores, bf16 SDPA with heads folded into rows for attention. "
    return markdown(head, body) + f"\n{text}{_caption(name, folder)}\n"


def _optimizer(table: Callable[[str, str], str], name: str) -> str:
    return table(name, _caption(name))


TABLES: dict[str, Callable[[], str]] = {
    "kv_fidelity_tiny-lm": lambda: kv_fidelity("kv_fidelity_tiny-lm"),
    "kv_fidelity_tiny-code-llama": lambda: kv_fidelity("kv_fidelity_tiny-code-llama"),
    "kv_fidelity_6k": lambda: kv_fidelity("kv_fidelity_tiny-code-llama_6k"),
    "kv_fidelity_6k_stress": lambda: kv_fidelity("kv_fidelity_tiny-code-llama_6k_stress"),
    "outlier_bits": lambda: held_bits("kv_fidelity_tiny-code-llama_outlier_bits"),
    "eager_scores": lambda: eager_scores("eager_ops_cpu"),
    "eager_attention_cuda": lambda: eager_attention("eager_ops_cuda"),
    "eager_attention": lambda: eager_attention("eager_ops_cpu"),
    **{op: partial(op_table, op) for op in OPS},
    "native_ops": lambda: native_ops("native_ops"),
    "native_ops_avx2": lambda: native_ops("native_ops_avx2"),
    "decode_attention_goals": partial(op_table, "decode_attention", only_goals=True),
    "decode_step": decode_step_table,
    "compiled_step": compiled_step_table,
    "generate_step": generate_step_table,
    "decode_attention_plot": plots,
    "index_peers": index_peers,
    "index_fields": index_fields,
    "search_million": search_million,
    **{
        name: partial(_optimizer, optimizer_tables.caches, name)
        for name in ("optimizer_tiny-lm", "optimizer_tiny-code-llama")
    },
    "optimizer_tiny-lm_decoded": partial(
        _optimizer, optimizer_tables.decoded, "optimizer_tiny-lm_decoded"
    ),
    **{
        name: partial(_optimizer, optimizer_tables.vectors, name)
        for name in ("optimizer_minilm", "optimizer_minilm_million")
    },
}


def with_tables(text: str) -> str:
    """Return text with every table block made anew."""

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}{TABLES[match[2]]()}{match[3]}"

    return BLOCK.sub(fill, text)


def main() -> None:
    """Rewrite the tables of the README and of the documents that have some."""
    docs = README.parent / "docs"
    for path in (
        README,
        docs / "benchmarks.md",
        docs / "optimizer.md",
        docs / "fidelity.md",
        docs / "search.md",
    ):
        path.write_text(with_tables(path.read_text("utf-8")), "utf-8")
        print(path)


if __name__ == "__main__":
    main()
