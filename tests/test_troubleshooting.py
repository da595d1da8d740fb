"""Every message that docs/troubleshooting.md explains is one that the source can raise."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEADINGS = re.findall(
    r"^### `(.+)`$", (ROOT / "docs" / "troubleshooting.md").read_text("utf-8"), re.MULTILINE
)


def literal(node: ast.AST) -> str | None:
    """Return a string of the source, with `...` for what is put into it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(
            str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values
        )
    return None


@cache
def messages() -> list[str]:
    sources = (ROOT / "src" / "quantforge").rglob("*.py")
    nodes = (node for path in sources for node in ast.walk(ast.parse(path.read_text("utf-8"))))
    return [text for node in nodes if (text := literal(node))]


def is_raised(heading: str) -> bool:
    pattern = ".*".join(re.escape(part) for part in heading.split("..."))
    return any(re.search(pattern, text, re.DOTALL) for text in messages())


@pytest.mark.parametrize("heading", HEADINGS)
def test_message_is_in_the_source(heading: str) -> None:
    assert is_raised(heading)


def test_a_message_that_nobody_raises_is_found() -> None:
    assert len(HEADINGS) > 20
    assert not is_raised("... tokens were eaten; feed the cache")
