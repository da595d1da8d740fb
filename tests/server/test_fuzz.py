"""Some of what `tests.server.fuzz` sends, and bytes without sense."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantforge.server import Settings, create_app
from tests.server.fuzz import Case, Fuzzer
from tests.server.test_tensors import JSON, NPY, SAFETENSORS

PATHS = ("/v1/compress", "/v1/decompress", "/v1/collections/a/points", "/v1/collections/a/search")
BUDGET = settings(
    max_examples=60, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzer]:
    options = Settings(folder=Path(tmp_path_factory.mktemp("fuzz")))
    with TestClient(create_app(options), base_url="http://127.0.0.1:8000") as client:
        yield Fuzzer(client, seed=0)


@BUDGET
@given(seed=st.integers(0, 2**32))
def test_damaged_and_lying_bodies_are_answered(fuzzer: Fuzzer, seed: int) -> None:
    fuzzer.reseed(seed)
    case = fuzzer.case()
    try:
        fuzzer.send(case)
    except AssertionError as error:
        raise AssertionError(f"{error}: {case}") from error


@BUDGET
@given(
    path=st.sampled_from(PATHS),
    kind=st.sampled_from((SAFETENSORS, NPY, JSON)),
    start=st.sampled_from((b"", b"\x93NUMPY\x01\x00", b"\x10" + bytes(7), b'{"vectors": [')),
    body=st.binary(max_size=200),
)
def test_bytes_without_sense_are_refused(
    fuzzer: Fuzzer, path: str, kind: str, start: bytes, body: bytes
) -> None:
    assert fuzzer.send(Case(path, kind, {}, start + body)) >= 400
