"""Launcher of the kernel of `window_append`: one launch, whatever is due."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from quantforge.numerics.encode import encode_constants
from quantforge.numerics.packing import packed_width
from quantforge.numerics.pages import page_layout
from quantforge.numerics.statistics import MIN_EQUALIZER
from quantforge.ops import constants
from quantforge.ops.kernels.arguments import plane_list, why_not
from quantforge.ops.kernels.codebook import cells_of
from quantforge.ops.kernels.window import window_append_kernel
from quantforge.ops.pages import scale_places
from quantforge.spec import QuantSpec

TILE = 64
"""Rows quantized, or moved, at a time where a page does not decide it."""
MAX_PAGE = 1 << 14
"""Numbers of a page that one program holds: 64 in each thread."""
NUM_WARPS = 8
"""64 tokens of 128 channels are then 32 numbers in each thread. Not tuned: a page is packed once
in as many steps, and the other steps write one row."""


def supports(
    k_dense: torch.Tensor,
    v_dense: torch.Tensor,
    k_packed: torch.Tensor,
    v_packed: torch.Tensor,
    k_scales: torch.Tensor,
    v_scales: torch.Tensor,
    k_statistics: torch.Tensor,
    v_statistics: torch.Tensor,
    counts: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    n_sinks: int,
    page: int,
    shifts: bool,
    equalizes: bool,
    k_spec_key: str,
    v_spec_key: str,
) -> str | None:
    """Return why the kernel cannot run these arguments, or None."""
    if key.stride(-1) != 1 or value.stride(-1) != 1:
        return "the channels of keys and values are not next to each other"
    for spec_key, dense in ((k_spec_key, k_dense), (v_spec_key, v_dense)):
        spec = QuantSpec.from_key(spec_key)
        if (reason := why_not(spec, dense, dense.dtype)) is not None:
            return reason
        if spec.dim & (spec.dim - 1):
            return f"dim {spec.dim} is no power of two"
        if spec.estimator != "mse" or spec.scale_dtype != "float16":
            return 'the kernel writes estimator="mse" and float16 scales'
        if k_scales.ndim == 1 and page * spec.dim > MAX_PAGE:
            return f"a page of {page} tokens of dim {spec.dim} does not fit into registers"
    return None


@dataclass(frozen=True)
class Code:
    """What the kernel needs of a spec."""

    signs: torch.Tensor
    table: torch.Tensor
    constants: tuple[object, ...]


@lru_cache(maxsize=64)
def code_of(spec_key: str, device: torch.device) -> Code:
    """Return the tables of a spec on a device, and its compile-time constants."""
    spec = QuantSpec.from_key(spec_key)
    cells = cells_of(spec, device)
    return Code(
        constants.signs(spec.dim, spec.seed, device),
        cells.table,
        (
            spec.dim,
            spec.bits,
            spec.scale_rule,
            cells.slope,
            cells.size,
            encode_constants(spec.dim).inv_sqrt_dim,
            plane_list(spec),
            packed_width(spec),
        ),
    )


NAMES = ("D", "BITS", "RULE", "SLOPE", "CELLS", "INV_SQRT", "PLANES", "ROW_BYTES")


def window_append(
    k_dense: torch.Tensor,
    v_dense: torch.Tensor,
    k_packed: torch.Tensor,
    v_packed: torch.Tensor,
    k_scales: torch.Tensor,
    v_scales: torch.Tensor,
    k_statistics: torch.Tensor,
    v_statistics: torch.Tensor,
    counts: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    n_sinks: int,
    page: int,
    shifts: bool,
    equalizes: bool,
    k_spec_key: str,
    v_spec_key: str,
) -> None:
    """Implement `quantforge::window_append` on a GPU."""
    device = k_dense.device
    batch, heads, rows, _ = k_dense.shape
    q = key.shape[2]
    if batch * heads * q == 0:
        return
    is_paged = k_scales.ndim == 1
    k, v = code_of(k_spec_key, device), code_of(v_spec_key, device)
    compile_time: dict[str, object] = {}
    for letter, code in (("K", k), ("V", v)):
        compile_time |= {f"{letter}_{n}": c for n, c in zip(NAMES, code.constants, strict=True)}
    compile_time |= {"D": compile_time.pop("K_D"), "DV": compile_time.pop("V_D")}
    order = counts
    tile = min(TILE, 1 << (page - 1).bit_length())
    views = (k_packed, v_packed) * 2
    if is_paged:
        layout = page_layout(QuantSpec.from_key(k_spec_key), QuantSpec.from_key(v_spec_key))
        order, tile = scale_places(layout.tokens, device), layout.tokens
        views = tuple(t.view(d) for d in (torch.int32, torch.float16) for t in (k_packed, v_packed))
    move = min(TILE, 1 << (page.bit_length() - 1))
    window_append_kernel[(batch * heads, 2)](
        k_dense, v_dense, k_packed, v_packed, *views, k_scales, v_scales,
        k_statistics, v_statistics, counts, key, value, k.signs, v.signs, k.table, v.table, order,
        batch, q, rows, n_sinks, page, k_packed.shape[1] * page if is_paged else k_packed.shape[2],
        k_statistics.stride(0), v_statistics.stride(0), 2 * batch * heads,
        *key.stride()[:3], *value.stride()[:3],
        HKV=heads, SHIFTS=shifts, EQUALIZES=equalizes, LEAST=MIN_EQUALIZER,
        PAGED=is_paged, T=tile, Q=1 << (q - 1).bit_length(), MOVE=move,
        B=min(1 << (batch - 1).bit_length(), 128), **compile_time,
        num_warps=NUM_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
