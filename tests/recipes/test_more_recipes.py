"""The recipes run with --small and print what they claim; a chat reads standard input."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.recipes.test_recipes import ROOT, run


def test_chat_computes_each_turn_alone() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "chat.py"), "--max-new-tokens", "4"],
        input="import os\ndef main(\n",
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = done.stdout.split("seconds")[1].splitlines()[1:3]
    assert [row.split()[0] for row in rows] == ["1", "2"]


def test_chat_small() -> None:
    assert "the model's own cache would take" in run("chat.py", "--small")


def test_document_qa_finds_its_file_again(tmp_path: Path) -> None:
    first = run("document_qa.py", "--small", "--caches", str(tmp_path))
    (file,) = tmp_path.glob("*.safetensors")
    written = file.stat().st_mtime_ns
    again = run("document_qa.py", "--small", "--caches", str(tmp_path))
    assert file.stat().st_mtime_ns == written
    assert "40718" in first
    assert "40718" in again


def test_rag_folder() -> None:
    assert "recall@10" in run("rag_folder.py", "--small")


def test_compress_weights(tmp_path: Path) -> None:
    out = run("compress_weights.py", "--small", "--output", str(tmp_path / "4.safetensors"))
    assert "model.embed_tokens.weight" in out
    assert (tmp_path / "4.safetensors").exists()


def test_custom_codebook() -> None:
    assert "ratings, 1 to 5" in run("custom_codebook.py", "--small")


def test_attention_module() -> None:
    assert "rms error" in run("attention_module.py", "--small")


def test_compiled_step() -> None:
    assert "one graph" in run("compiled_step.py", "--small")
