"""How schemathesis makes bodies that JSON Schema cannot describe.

    QUANTFORGE_TOKEN=a-token-for-tests quantforge serve --port 8123 --folder /tmp/contract &
    SCHEMATHESIS_HOOKS=tests.server.openapi_hooks schemathesis run \
        http://127.0.0.1:8123/openapi.json -H 'Authorization: Bearer a-token-for-tests' \
        --exclude-checks positive_data_acceptance

The check is left out because no schema says that the rows of a matrix have one length, or the
dimension of the collection they go to. Bodies that should be taken are made to fit by
`fitting_bodies`, so that the stateful phase gets beyond the first step: it follows the links of the
document, by which collections are made, filled, searched and deleted, and jobs are cancelled.
It lists collections first: give it one to begin with.

    curl -X PUT -H 'Authorization: Bearer a-token-for-tests' -H 'Content-Type: application/json' \
        -d '{"dim": 8}' http://127.0.0.1:8123/v1/collections/first
"""

from __future__ import annotations

import json
import struct
from typing import Any

import schemathesis
from hypothesis import strategies as st

DIM = 8
DIMS = st.just(DIM) | st.integers(1, 48)


@st.composite
def safetensors_bodies(draw: st.DrawFn) -> bytes:
    """Return one float32 matrix as a safetensors file."""
    n, dim = draw(st.integers(0, 4)), draw(DIMS)
    data = draw(st.binary(min_size=4 * n * dim, max_size=4 * n * dim))
    entry = {"dtype": "F32", "shape": [n, dim], "data_offsets": [0, len(data)]}
    header = json.dumps({"vectors": entry}).encode()
    return len(header).to_bytes(8, "little") + header + data


@st.composite
def npy_bodies(draw: st.DrawFn) -> bytes:
    """Return one float32 matrix as a .npy file."""
    n, dim = draw(st.integers(0, 4)), draw(DIMS)
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({n}, {dim}), }}\n".encode()
    data = draw(st.binary(min_size=4 * n * dim, max_size=4 * n * dim))
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


schemathesis.openapi.media_type("application/vnd.safetensors", safetensors_bodies())
schemathesis.openapi.media_type("application/x-npy", npy_bodies())


@schemathesis.hook("before_call")
def fitting_bodies(context: Any, case: Any, kwargs: dict[str, Any]) -> None:
    """Give collections and vectors in JSON one dimension, unless they are meant to be wrong."""
    if not case.meta.generation.mode.is_positive or not isinstance(case.body, dict):
        return
    if "dim" in case.body:
        case.body = {**case.body, "dim": DIM, "nprobe": None}
    for name in ("vectors", "queries"):
        if isinstance(case.body.get(name), list):
            rows = [(row + [0.5] * DIM)[:DIM] for row in case.body[name]]
            case.body = {**case.body, name: rows}


@schemathesis.hook("filter_failure")
def is_a_failure(context: Any, failure: Any, case: Any, response: Any) -> bool:
    """Let a job be there that was cancelled (202): it stays until it is deleted once more."""
    is_job = case.operation.path.startswith("/v1/jobs/")
    return not (is_job and type(failure).__name__ == "UseAfterFree")
