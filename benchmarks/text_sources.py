"""Distinct sentences of what is written on a machine: documentation, comments, messages, code.

    python -m benchmarks.text_sources out/texts.txt --limit 1000000 --sources all

One sentence a line, in an order drawn from a seed; `out/texts.json` says how many are of which
source. Sources are used up in the order of `SOURCES`, until there are enough. Sentences that
differ in case, digits, spaces or punctuation alone are one. Many processes read; torch is not
imported here, so that they can be forked.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html
import json
import multiprocessing
import os
import random
import re
import sys
import sysconfig
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

SOURCES = ("docstrings", "comments", "documents", "messages", "code")
"""Docstrings of Python; comments of Python, C++ and others; pages and manuals; other strings in
Python that are sentences; lines of code."""
SYSTEM = ("/usr/share", "/usr/include", "/usr/lib", "/usr/local", "/opt")
"""Folders beside those that Python imports from."""
SHORTEST, LONGEST, LEAST_WORDS = 30, 160, 5
MAX_BYTES = 4 << 20
"""Longer files are tables."""
PER_FILE = 4000
"""Sentences of a file and source: a long list says the same again and again."""

PYTHON = (".py", ".pyi")
C_LIKE = (".h", ".hpp", ".hxx", ".cuh", ".cu", ".c", ".cc", ".cpp", ".inl", ".js", ".ts")
HASHED = (".yaml", ".yml", ".cmake", ".toml", ".pl", ".pm", ".sh", ".cfg")
PAGES = (".md", ".rst", ".txt", ".html", ".htm", ".pod", ".info", "METADATA", "README")
KINDS = (*PYTHON, *C_LIKE, *HASHED, *PAGES)

Found = dict[str, list[str]]
"""Sentences by source."""
Keyed = dict[str, list[tuple[int, str]]]

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n\s*\n")
_WORD = re.compile(r"[^\W\d_]{2,}")
_NO_LETTERS = re.compile(r"[\W\d_]+")
_PYTHON = re.compile(
    r"(?P<comment>#[^\n]*(?:\n[ \t]*#[^\n]*)*)"
    r"|(?P<q>\"{3}|'{3})(?P<long>.*?)(?P=q)"
    r"|\"(?P<double>(?:\\.|[^\"\\\n])*)\"|'(?P<single>(?:\\.|[^'\\\n])*)'",
    re.DOTALL,
)
_HASH_LINES = re.compile(r"(?:^[ \t]*#[^\n]*\n)+", re.MULTILINE)
_HASH_MARK = re.compile(r"^[ \t]*#+:?", re.MULTILINE)
_C_COMMENT = re.compile(r"/\*.*?\*/|(?:^[ \t]*//[^\n]*\n)+|//[ \t][^\n]*", re.DOTALL | re.MULTILINE)
_C_MARK = re.compile(r"^[ \t]*(?:/\*+[!<]?|\*+/?|//+[!<]?)|\*+/", re.MULTILINE)
_NOT_TEXT = re.compile(r"<(script|style|pre)\b.*?</\1>|<!--.*?-->", re.DOTALL | re.IGNORECASE)
_PARAGRAPH = re.compile(r"</?(?:p|li|td|tr|th|h\d|div|dd|dt|br)\b[^>]*>", re.IGNORECASE)
_TAG = re.compile(r"<[^>]*>")
_MANUAL = re.compile(r"/man\d\w*/[^/]+$|/share/doc/[^/]+/[^/]+\.gz$")
_MACRO = re.compile(r"^[.'][^\n]*$", re.MULTILINE)
_FONT = re.compile(r"\\f[A-Z]|\\\(..|\\[&^|]|\\")


def key_of(sentence: str) -> int:
    """Return 64 bits of the letters of a sentence."""
    letters = _NO_LETTERS.sub("", sentence.lower()).encode()
    return int.from_bytes(hashlib.blake2b(letters, digest_size=8).digest(), "big")


def sentences(text: str) -> Iterator[str]:
    """Yield the sentences of prose: what is nearly all words."""
    for part in _SENTENCE_END.split(text):
        sentence = " ".join(part.split())
        if SHORTEST <= len(sentence) <= LONGEST:
            letters = len(_NO_LETTERS.sub("", sentence)) + sentence.count(" ")
            if letters >= 0.85 * len(sentence) and len(_WORD.findall(sentence)) >= LEAST_WORDS:
                yield sentence


def code_lines(text: str) -> Iterator[str]:
    """Yield the lines of code with enough different words."""
    for line in text.splitlines():
        if len(line) >= SHORTEST:
            line = " ".join(line.split())
            if SHORTEST <= len(line) <= LONGEST and line[0] not in "#/*\"'":
                words = _WORD.findall(line)
                if len(set(words)) >= LEAST_WORDS and 5 * sum(map(len, words)) >= 3 * len(line):
                    yield line


def of_python(text: str) -> Iterator[tuple[str, str]]:
    """Yield comments and strings of a file; long strings that begin a line are docstrings."""
    for match in _PYTHON.finditer(text):
        comment, long, double, single = match.group("comment", "long", "double", "single")
        if comment:
            yield "comments", _HASH_MARK.sub("", comment)
        elif long:
            before = text[text.rfind("\n", 0, match.start()) + 1 : match.start()]
            yield "messages" if before.strip(" \trRuU") else "docstrings", long
        elif len(short := double or single or "") >= SHORTEST:
            yield "messages", short


def of_hashes(text: str) -> Iterator[tuple[str, str]]:
    """Yield the comments that begin with #, lines that follow each other together."""
    for match in _HASH_LINES.finditer(text):
        yield "comments", _HASH_MARK.sub("", match[0])


def of_c(text: str) -> Iterator[tuple[str, str]]:
    """Yield the comments of C++ and of languages with the same ones."""
    for match in _C_COMMENT.finditer(text):
        yield "comments", _C_MARK.sub("", match[0])


def of_page(text: str) -> Iterator[tuple[str, str]]:
    """Yield a page or manual without its tags or macros."""
    if "</" in text:
        text = _PARAGRAPH.sub("\n\n", _NOT_TEXT.sub("\n\n", text))
        text = html.unescape(_TAG.sub("", text))
    elif "\n.SH" in text or "\n.Sh" in text:
        text = _FONT.sub("", _MACRO.sub("\n", text))
    yield "documents", text


def read(path: str) -> Keyed:
    """Return the sentences of a file by source, each with its key."""
    try:
        if os.path.getsize(path) > MAX_BYTES:
            return {}
        raw = Path(path).read_bytes()
        text = (gzip.decompress(raw) if path.endswith(".gz") else raw).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError):
        return {}
    name = path.removesuffix(".gz")
    is_code = name.endswith((*PYTHON, *C_LIKE))
    if is_code:
        parts = of_python(text) if name.endswith(PYTHON) else of_c(text)
    else:
        parts = of_hashes(text) if name.endswith(HASHED) else of_page(text)
    found: dict[str, dict[int, str]] = {}
    for source, part in parts:
        found.setdefault(source, {}).update((key_of(some), some) for some in sentences(part))
    if is_code:
        found["code"] = {key_of(line): line for line in code_lines(text)}
    return {source: list(some.items())[:PER_FILE] for source, some in found.items()}


def files(roots: Iterable[str], without: str | None = None) -> list[str]:
    """Return the files below folders that can be read, each once, in the order of paths.

    Args:
        roots: folders; links in them are not followed.
        without: a folder in which nothing is read.
    """
    found = set()
    for root in {os.path.realpath(root) for root in roots}:
        for folder, inner, names in os.walk(root):
            inner[:] = [name for name in inner if os.path.join(folder, name) != without]
            for name in names:
                path = os.path.join(folder, name)
                is_read = name.removesuffix(".gz").endswith(KINDS) or _MANUAL.search(path)
                if is_read and not os.path.islink(path):
                    found.add(path)
    return sorted(found)


def collect(paths: list[str], limit: int, sources: Iterable[str], workers: int = 1) -> Found:
    """Return distinct sentences of files by source, at most `limit` in all.

    Args:
        paths: of files.
        limit: sentences that are wanted.
        sources: all of one are taken before any of the next.
        workers: processes that read.
    """
    all_of: Keyed = {source: [] for source in sources}

    def put(found: Keyed) -> None:
        for source in all_of.keys() & found.keys():
            all_of[source] += found[source]

    if workers == 1:
        for path in paths:
            put(read(path))
    else:
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            for found in pool.imap(read, paths, chunksize=32):
                put(found)
    seen: set[int] = set()
    taken: Found = {}
    draw = random.Random(0)
    for source, some in all_of.items():
        new = {key: sentence for key, sentence in some if key not in seen}
        seen |= new.keys()
        fresh = list(new.values())
        draw.shuffle(fresh)
        taken[source] = fresh[: limit - sum(map(len, taken.values()))]
        print(f"{source:12} {len(fresh):10,} distinct, {len(taken[source]):10,} taken", flush=True)
    return taken


def write(output: Path, found: Found) -> None:
    """Write sentences, mixed, and beside them how many are of which source."""
    texts = [sentence for some in found.values() for sentence in some]
    random.Random(1).shuffle(texts)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("".join(f"{text}\n" for text in texts), "utf-8")
    counts = {source: len(some) for source, some in found.items() if some}
    output.with_suffix(".json").write_text(json.dumps(counts) + "\n")


def main(arguments: list[str] | None = None) -> None:
    """Write what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help=".txt file")
    parser.add_argument("--limit", type=int, default=1_000_000, help="sentences")
    parser.add_argument("--sources", nargs="+", choices=[*SOURCES, "all"], default=["docstrings"])
    parser.add_argument("--roots", nargs="+", help="folders; all that Python and the system have")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    sources = SOURCES if "all" in options.sources else options.sources
    own = str(Path(__file__).resolve().parents[1])
    imported = [*filter(os.path.isdir, sys.path), sysconfig.get_path("purelib")]
    roots = options.roots or [
        *(folder for folder in imported if not Path(folder).resolve().is_relative_to(own)),
        *(SYSTEM if "all" in options.sources else ()),
    ]
    start = time.perf_counter()
    paths = files(roots, without=own)
    found = collect(paths, options.limit, sources, options.workers)
    write(options.output, found)
    count = sum(map(len, found.values()))
    print(f"{count:,} sentences of {len(paths):,} files, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
