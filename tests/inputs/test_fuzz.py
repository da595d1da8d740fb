"""Damaged files are refused by name, or read: nothing else happens."""

from __future__ import annotations

import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantforge import QuantForgeError, QuantPipeline
from quantforge.inputs import open_vectors
from tests.inputs.test_inputs import WRITERS, X, records

TOKENS = (b"-1", b"9999999999", b"\0", b"(", b"\xff\xff\xff\x7f", b"1e9")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("files")
    for name, write in WRITERS.items():
        write(folder / name)
    QuantPipeline(16).compress_file(X, folder / "ours.npz")
    records(folder / "x.bvecs", X.astype(np.uint8), "u1")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@st.composite
def damage(draw: st.DrawFn) -> list[tuple[bool, int, int | bytes]]:
    """Return places, from the start or the end, and what happens there."""
    what = st.one_of(st.integers(-8, 255), st.sampled_from(TOKENS))
    place = st.one_of(st.integers(0, 400), st.integers(0, 20_000))
    return draw(st.lists(st.tuples(st.booleans(), place, what), min_size=1, max_size=4))


def damaged(data: bytes, changes: list[tuple[bool, int, int | bytes]]) -> bytes:
    out = bytearray(data)
    for from_start, place, what in changes:
        at = place % len(out) if from_start else len(out) - 1 - place % len(out)
        if isinstance(what, bytes):
            out[at:at] = what
        elif what >= 0:
            out[at] = what
        elif len(out) > 16:
            del out[at : at - what]
    return bytes(out)


@given(data=st.data(), changes=damage())
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_damage(
    tmp_path: Path,
    files: dict[str, bytes],
    data: st.DataObject,
    changes: list[tuple[bool, int, int | bytes]],
) -> None:
    name = data.draw(st.sampled_from(sorted(files)))
    path = tmp_path / name
    path.write_bytes(damaged(files[name], changes))
    with suppress(QuantForgeError, OSError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy warns of headers that Python 2 wrote
        array = open_vectors(path)
        array.dequantize() if hasattr(array, "dequantize") else (array[:3], array[-2:])
