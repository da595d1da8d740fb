"""README and docs are true: their code runs, their tables are the stored results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.tables import with_tables

ROOT = Path(__file__).parents[1]
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def python_blocks(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", path.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def test_readme_code_runs_and_its_numbers_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    blocks = python_blocks(ROOT / "README.md")
    assert len(blocks) == 5
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
    codes, restored, x = scope["codes"], scope["restored"], scope["embeddings"]
    assert codes.nbytes_packed == 194 * 1000
    assert (restored.shape, restored.dtype, type(restored)) == (x.shape, x.dtype, type(x))
    assert round(float(((restored - x) ** 2).sum() / (x**2).sum()), 3) == 0.009
    assert scope["nearest"][:, 0].tolist() == list(range(8))
    assert scope["found"].shape == (8, 10)
    assert (scope["found"] % 25 >= 10).all()
    assert scope["out"].shape[1] == scope["ids"].shape[1] + 20


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_tables_are_those_of_the_results(path: Path) -> None:
    text = path.read_text("utf-8")
    assert with_tables(text) == text, "run python -m benchmarks.tables"


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", path.read_text("utf-8")):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"
