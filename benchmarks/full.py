"""One report of this machine: error, search, cache fidelity, decode speed and memory.

    python -m benchmarks.full [--quick] [--device cpu|cuda] [--output DIR] [--vectors FILE.npy]

Everything is measured and drawn by the modules of this folder that the documents use, on data that
come with the repository; DIR gets `report.md`, its figures, and the numbers as JSON. A part that
cannot run here says why. Vectors to search are the last hidden states of the tiny model over the
standard library, or those of FILE.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from benchmarks import concepts, kv_fidelity, native_ops, plots, record, run, tables, vector_search
from benchmarks import search_tables as search
from benchmarks.ceiling import ceilings
from benchmarks.op_tables import markdown, op_table
from quantforge import QuantSpec
from quantforge.llm.presets import PRESETS
from quantforge.native.library import Library, library
from quantforge.numerics.packing import packed_width

Part = Callable[["Sizes", str, Path], Iterator[str]]
"""Sizes, device and folder -> paragraphs; files go to the folder."""


class CannotRunError(Exception):
    """Why a part cannot run on this machine."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        vectors: of which the error is measured.
        contexts: of caches whose bytes are counted.
        rows: that are searched.
        queries: that are asked.
        indexes: regular expression of their names; PQ's are for multiples of 192 dimensions.
        prompt: tokens before decoding.
        decode: tokens decoded.
        texts: that is done for.
        keys: of one decode step on a CPU.
        search_vectors: .npy of vectors to search; None for hidden states.
    """

    vectors: int = 4096
    contexts: tuple[int, ...] = concepts.CONTEXTS
    rows: int = 20_000
    queries: int = 500
    indexes: str = r"^(?!.*(PQ\d|HNSW|usearch))"
    prompt: int = 512
    decode: int = 64
    texts: int = 4
    keys: int = 8192
    search_vectors: Path | None = None


QUICK = Sizes(
    vectors=1024,
    contexts=(128, 1024, 8192),
    rows=3000,
    queries=100,
    indexes="adapted|RaBitQ|Flat",
    prompt=256,
    decode=16,
    texts=1,
    keys=4096,
)


def figures_can_be_drawn() -> bool:
    """Return whether matplotlib is there."""
    return importlib.util.find_spec("matplotlib") is not None


def picture(title: str, name: str) -> str:
    """Return a figure of the report."""
    return f"![{title}]({name})"


def error_and_memory(sizes: Sizes, device: str, folder: Path) -> Iterator[str]:
    """Error against theory at 1-8 bits, the outlier channel, and bytes of caches."""
    result = concepts.measure(sizes.vectors, sizes.contexts)
    record.save("error_and_memory", "cpu", [result], folder)
    found = concepts.tables(result)
    heads = {
        "DISTORTION": ["bits", "measured", "theory", "`4^-bits`"],
        "OUTLIERS": ["loudness", "integers", "rotated", "equalized"],
        "CACHE": ["tokens", "16 bits", "4 bits", "3 bits", "2 bits"],
    }
    yield (
        f"Relative squared error of {sizes.vectors:,} Gaussian vectors of dim {concepts.DIM} "
        "against Lloyd-Max theory and Shannon's bound; of the quiet channels beside a loud one at "
        "4 bits; bytes that the cache of one key head has allocated."
    )
    for name, head in heads.items():
        yield markdown(head, []) + found[name]
    if figures_can_be_drawn():
        concepts.draw(result, folder / "error_and_memory.svg")
        yield picture("Error, an outlier channel, bytes of a cache", "error_and_memory.svg")


def hidden_states(count: int) -> np.ndarray:
    """Return (count, dim) float32 last hidden states of the tiny model over the standard library.

    Neighbouring tokens are alike, so they are shuffled; equal states count once.
    """
    model, tokenizer = tiny_model("cpu")
    found, length, have = [], 512, 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        ids = tokenizer(path.read_text("utf-8", "ignore"), return_tensors="pt").input_ids[0]
        ids = ids[: len(ids) // length * length].view(-1, length)
        with torch.inference_mode():
            for batch in ids.split(8) if len(ids) else ():
                found.append(model.model(batch).last_hidden_state.flatten(0, 1).float())
                have += batch.numel()
        if have > 1.2 * count:
            break
    x = torch.unique(torch.cat(found), dim=0).numpy()
    return x[np.random.RandomState(0).permutation(len(x))[:count]]


def tiny_model(device: str) -> tuple[Any, Any]:
    """Return the model that comes with the repository, and its tokenizer."""
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(kv_fidelity.MODEL, dtype=torch.float32)
    return model.to(device), AutoTokenizer.from_pretrained(kv_fidelity.MODEL)


def recall_of_indexes(sizes: Sizes, device: str, folder: Path) -> Iterator[str]:
    """Recall against bytes, with FAISS and others where they are installed."""
    rows, path = folder / "indexes.jsonl", sizes.search_vectors
    rows.unlink(missing_ok=True)
    if path is None:
        path = folder / "vectors.npy"
        np.save(path, hidden_states(sizes.rows + sizes.queries))
    try:
        vector_search.main(
            [str(path), f"--queries={sizes.queries}", f"--only={sizes.indexes}",
             f"--output={rows}"]
        )  # fmt: skip
    finally:
        if sizes.search_vectors is None:
            path.unlink()
    missing = sorted(set(vector_search.PEERS) - set(vector_search.versions()))
    if missing:
        yield f"Not installed here, so not measured: {', '.join(missing)}."
    given = sizes.search_vectors
    what = "hidden states of the tiny model" if given is None else f"vectors of {given.name}"
    yield search.table(rows, what).partition("\n![")[0]
    if figures_can_be_drawn():
        search.main(rows, folder, what)
        yield picture("Recall against bytes a vector", "vector_search.svg")


def fidelity_of_presets(sizes: Sizes, device: str, folder: Path) -> Iterator[str]:
    """KL, top-1 and needles of the tiny model with each preset."""
    model, tokenizer = tiny_model(device)
    ids = kv_fidelity.held_out_tokens(tokenizer, sizes.prompt + sizes.decode)[: sizes.texts]
    needles = kv_fidelity.needles_of(tokenizer, sizes.prompt)
    caches = {f'preset "{name}"': {"preset": name} for name in PRESETS}
    settings = {"model": "tiny-lm", "prompt": sizes.prompt, "decode": sizes.decode}
    measured = kv_fidelity.measure(model, tokenizer, ids.to(device), needles, sizes.prompt, caches)
    rows = [settings | row for row in measured]
    record.save("fidelity", device, rows, folder)
    yield tables.kv_fidelity("fidelity", folder)
    if figures_can_be_drawn():
        draw_fidelity(rows, folder / "fidelity.svg")
        yield picture("KL against bits per number", "fidelity.svg")


def draw_fidelity(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the mean KL of each cache against its bits per number at 8,192 tokens."""
    axes, save = figure_of("bits per number at 8,192 tokens", "mean KL, nats")
    for row in rows[1:]:
        place = row["bits_per_number_at_8k"], max(row["kl_mean"], 1e-6)
        axes.semilogy(*place, "o")
        axes.annotate(row["cache"], place, xytext=(6, 4), textcoords="offset points", fontsize=8)
    axes.margins(x=0.25)
    save(path)


def figure_of(x: str, y: str) -> tuple[Any, Callable[[Path], None]]:
    """Return labelled axes, and how to write them: the same file for the same numbers."""
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "quantforge"
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 3.8), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    return axes, lambda path: figure.savefig(path, metadata={"Date": None})


def decode_speed(sizes: Sizes, device: str, folder: Path) -> Iterator[str]:
    """One decode step of attention against dense attention and the read ceiling."""
    if device == "cuda":
        yield from _decode_on_gpu(sizes, folder)
        return
    if not isinstance(found := library(), Library):
        raise CannotRunError(f"there is no native library: {found}")
    torch.manual_seed(0)
    with torch.no_grad():
        rows = [
            row
            for case in native_ops.attention_cases(sizes.keys)
            for row in native_ops.measure(case, list(found.levels[-1:]))
        ]
    read = ceilings(torch.device("cpu"))["read_gbps"]
    rows = [row | {"floor_ms": bytes_of_step(row) / read / 1e6} for row in rows]
    record.save("decode", "cpu", rows, folder)
    yield tables.native_ops("decode", folder)
    head = ["bits", "KV heads", "time", "its bytes at the read ceiling", "share of the ceiling"]
    body = [
        [str(row["bits"]), str(row["kv_heads"]), f"{row['packed_ms']:.2f} ms",
         f"{row['floor_ms']:.2f} ms", f"{row['floor_ms'] / row['packed_ms']:.0%}"]
        for row in rows
    ]  # fmt: skip
    yield f"Read ceiling {read} GB/s, measured in the same run.\n\n{markdown(head, body)}"
    if figures_can_be_drawn():
        draw_decode(rows, folder / "decode.svg")
        yield picture("Time of a step against the read ceiling", "decode.svg")


def bytes_of_step(row: dict[str, Any]) -> int:
    """Return the bytes of codes and fp16 scales, keys and values, that a step reads."""
    width = packed_width(QuantSpec(row["dim"], row["bits"])) + 2
    return 2 * row["kv_heads"] * row["n"] * width


def draw_decode(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the time of a step beside dense attention and what memory allows."""
    axes, save = figure_of("", "ms")
    places = np.arange(len(rows))
    names = [f"{row['bits']} bits,\n{row['kv_heads']} KV heads" for row in rows]
    axes.bar(places - 0.2, [row["packed_ms"] for row in rows], 0.4, label="packed")
    axes.bar(places + 0.2, [min(row["dense_ms"].values()) for row in rows], 0.4, label="dense")
    axes.plot(places - 0.2, [row["floor_ms"] for row in rows], "k_", markersize=22,
              label="packed, at the read ceiling")  # fmt: skip
    axes.set_xticks(places, names, fontsize=8)
    axes.set_title(f"One decode step over {rows[0]['n']:,} tokens, dim 128", fontsize=10)
    axes.legend(fontsize=8)
    save(path)


def _decode_on_gpu(sizes: Sizes, folder: Path) -> Iterator[str]:
    quick = ["--quick"] if sizes == QUICK else []
    where = ["--device", "cuda", "--no-tests", "--output", str(folder)]
    if run.main(["decode_attention", *where, *quick]):
        raise CannotRunError("benchmarks.run decode_attention failed; its output says why")
    yield op_table("decode_attention", folder=folder)
    if figures_can_be_drawn():
        for path in plots.main(folder, folder):
            yield picture("Decode attention over context length and bits", path.name)


PARTS: dict[str, Part] = {
    "Error and memory": error_and_memory,
    "Recall of indexes": recall_of_indexes,
    "Fidelity of caches": fidelity_of_presets,
    "Decode speed": decode_speed,
}


def head_of(device: str) -> str:
    """Return hardware, versions and date."""
    where = record.environment(device) | vector_search.versions()
    body = [[name, str(value)] for name, value in where.items() if value is not None]
    return "# Report\n\n" + markdown(["measured on", ""], body)


def write_report(sizes: Sizes, device: str, folder: Path) -> Path:
    """Measure all parts and write the report; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    paragraphs = [head_of(device)]
    if not figures_can_be_drawn():
        paragraphs.append("There are no figures: matplotlib is not installed.")
    for title, part in PARTS.items():
        start = time.perf_counter()
        print(f"-- {title}", flush=True)
        paragraphs.append(f"## {title}")
        try:
            paragraphs += part(sizes, device, folder)
        except CannotRunError as reason:
            paragraphs.append(f"Not measured: {reason}.")
        seconds, load = time.perf_counter() - start, os.getloadavg()[0]
        paragraphs.append(f"Measured in {seconds:.0f} s, load average {load:.1f}.")
    path = folder / "report.md"
    text = "\n\n".join(paragraph.strip("\n") for paragraph in paragraphs) + "\n"
    path.write_text(text.replace("benchmarks/results/", ""), "utf-8")
    return path


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="about half a minute")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, default=Path("out/report"))
    parser.add_argument("--vectors", type=Path, help=".npy of vectors to search")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"there is no GPU that torch {torch.__version__} sees; use --device cpu")
    torch.set_num_threads(args.threads)
    sizes = QUICK if args.quick else Sizes()
    if args.vectors is not None:
        sizes = Sizes(**{**vars(sizes), "search_vectors": args.vectors})
    print(write_report(sizes, args.device, args.output))


if __name__ == "__main__":
    main()
