"""What a million vectors are made of, and how indexes of them are measured."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from benchmarks import embed_text, search_million, search_tables, text_sources
from benchmarks.record import read_rows
from tests.vectordb.data import skewed

PYTHON = '''
"""A module that says what it is for, in one sentence."""

# This comment goes on
# over another line of text here.
raise ValueError("the message says that %s is not what was expected" % some_value_that_was_given)
'''
HEADER = """
/* Frees the memory that was taken before, if there was any. */
int release_all_memory(struct Memory *memory, const char *reason);  // see above
"""
PAGE = (
    "<html><style>p { all of this is not text }</style><p>Tables &amp; pages have tags in them.</p>"
)
MANUAL = ".TH X 1\n.SH NAME\nwords \\fBin bold\\fR are words as all others are\n"


def sources_of(folder: Path, **files: str) -> text_sources.Found:
    for name, text in files.items():
        path = folder / name.replace("__", ".")
        raw = text.encode()
        path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    paths = text_sources.files([str(folder)])
    return text_sources.collect(paths, 100, text_sources.SOURCES)


def test_sentences_are_found_in_all_that_is_written(tmp_path: Path) -> None:
    files = {"a__py": PYTHON, "b__h": HEADER, "c__html": PAGE, "d__txt__gz": MANUAL}
    found = sources_of(tmp_path, **files, e__bin="No sentence of this file is to be read.")
    assert found["docstrings"] == ["A module that says what it is for, in one sentence."]
    assert set(found["comments"]) == {
        "This comment goes on over another line of text here.",
        "Frees the memory that was taken before, if there was any.",
    }
    assert set(found["documents"]) == {
        "Tables & pages have tags in them.",
        "words in bold are words as all others are",
    }
    assert found["messages"] == ["the message says that %s is not what was expected"]
    assert any("release_all_memory" in line for line in found["code"])
    assert any("raise ValueError" in line for line in found["code"])


def test_sentences_that_differ_in_no_letter_are_one(tmp_path: Path) -> None:
    same = "Version 12 of this file is read.\n\nversion 3 of  this FILE is read\n\n"
    text = same + "This one is altogether another one."
    (tmp_path / "a.md").write_text(text)
    (tmp_path / "b.py").write_text(f"'''{text} And here is yet one more of all of them.'''\n")
    found = sources_of(tmp_path)
    assert len(found["docstrings"]) == 3
    assert found["documents"] == []
    few = text_sources.collect(text_sources.files([str(tmp_path)]), 2, text_sources.SOURCES)
    assert set(few["docstrings"]) < set(found["docstrings"])
    assert sum(map(len, few.values())) == 2


def test_many_processes_find_what_one_does(tmp_path: Path) -> None:
    output = tmp_path / "out" / "texts.txt"
    (tmp_path / "in").mkdir()
    for i in range(70):
        (tmp_path / "in" / f"{i}.md").write_text(
            f"The letters {chr(97 + i % 26) * 3} are in this one."
        )
    options = ["--roots", str(tmp_path / "in"), "--sources", "all"]
    text_sources.main([str(output), *options, "--workers=1"])
    first = output.read_text()
    text_sources.main([str(output), *options, "--workers=2"])
    assert output.read_text() == first
    assert len(first.splitlines()) == 26
    assert json.loads(output.with_suffix(".json").read_text()) == {"documents": 26}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    words = ["[PAD]", "[UNK]", *"abcdefgh"]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]")
    fast.save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    config = BertConfig(vocab_size=10, num_hidden_layers=1, hidden_size=384, intermediate_size=64)
    BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_an_embedding_does_not_depend_on_its_batch(model: Path, tmp_path: Path) -> None:
    texts = ["a b c", "d", "e f g h a b", *["b c d e"] * 40, "h " * 60]
    output = tmp_path / "x.npy"
    output.with_suffix(".txt").write_text("\n".join(texts))
    embed_text.main([str(output), f"--model={model}"])
    found = np.load(output)
    alone = np.concatenate([embed_text.Embedder(model, "cpu")([text]) for text in texts[:4]])
    np.testing.assert_allclose(found[:4], alone, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    assert abs(found[0] - found[1]).max() > 0.01
    part = tmp_path / "x.npy.part"
    part.write_bytes(part.read_bytes()[: 5 * 4 * 384 + 7])  # as a killed run leaves it
    embed_text.main([str(output), f"--model={model}"])
    np.testing.assert_allclose(np.load(output), found, atol=1e-6)


def test_run_and_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.npy"
    np.save(path, torch.nn.functional.normalize(skewed(4256, 64), dim=-1).numpy())
    path.with_suffix(".json").write_text('{"documents": 4256}')
    monkeypatch.setattr(search_million, "BATCH_SECONDS", 0.1)
    monkeypatch.setattr(search_million, "SINGLES", 5)
    monkeypatch.setattr(search_million, "WARM_ROWS", {"cpu": 1000})
    threads = torch.get_num_threads()
    only = "quantforge [24] bits, CPU|quantforge 4 bits, 16|FAISS (Flat|RaBitQfs4, 16)"
    options = [f"--out={tmp_path}", "--nlist=16", f"--only={only}"]
    try:
        output = search_million.main([str(path), *options])
    finally:
        search_million.use_threads(threads)
    rows = {row["case"]: row for row in read_rows(output)}
    assert len(rows) == 5
    assert rows["FAISS Flat, CPU"]["recall"] == 1
    two, four = rows["quantforge 2 bits, CPU"], rows["quantforge 4 bits, CPU"]
    assert 0.75 < two["recall"] < four["recall"] < 1
    lists = rows["quantforge 4 bits, 16 lists, CPU"]
    assert 1 <= lists["nprobe"] <= lists["nlist"] == 16
    assert 0.9 < lists["recall"] / lists["recall_of_all_lists"] <= 1
    for row in rows.values():
        assert row["n"] == 3000
        assert min(row[name] for name in ("qps", "qps_1_thread", "single_ms", "build_s")) > 0
    text = search_tables.million(output)
    assert all(name in text for name in rows)
    assert "4,256 documents" in text
    assert text.index("quantforge 2 bits") < text.index("quantforge 4 bits") < text.index("FAISS")
    assert "Not measured" in search_tables.million(tmp_path / "nothing")


def test_as_few_lists_are_looked_into_as_are_enough() -> None:
    class Found:
        nlist, code_bytes, reported = 100, 1.0, None

        def search(self, queries: np.ndarray, nprobe: int | None) -> np.ndarray:
            """Find one of twenty neighbours in every second list."""
            held = min(20, (nprobe or 0) // 2)
            row = [*range(held), *[-1 - i for i in range(20 - held)]]
            return np.tile(row, (len(queries), 1))

    assert search_million.least_nprobe(Found(), np.zeros((4, 2))) in range(38, 43)
