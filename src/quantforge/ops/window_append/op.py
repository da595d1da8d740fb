"""Schema, fake and registration of `quantforge::window_append`."""

from __future__ import annotations

from typing import Any

from quantforge.ops._library import register
from quantforge.ops.window_append import eager


def fake(*args: Any) -> None:
    """Return nothing: the operator writes into its buffers."""


window_append = register(
    "window_append(Tensor(a!) k_dense, Tensor(b!) v_dense, Tensor(c!) k_packed, "
    "Tensor(d!) v_packed, Tensor(e!) k_scales, Tensor(f!) v_scales, Tensor(g!) k_statistics, "
    "Tensor(h!) v_statistics, Tensor(i!) counts, Tensor key, Tensor value, int n_sinks, int page, "
    "bool shifts, bool equalizes, str k_spec, str v_spec) -> ()",
    fake=fake,
    eager=eager.window_append,
    fast=("triton",),
)
