"""Native kernels on every level of this processor."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from quantforge.native import library as native
from quantforge.native.library import LEVELS, Library


@pytest.fixture
def library() -> Library:
    found = native.library()
    if isinstance(found, str):
        pytest.skip(f"no native library: {found}")
    return found


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, library: Library) -> Iterator[str]:
    """Run the test on one level; skip what the processor lacks."""
    if request.param not in library.levels:
        pytest.skip(f"this processor has no {request.param}")
    with native.level(request.param):
        yield request.param
