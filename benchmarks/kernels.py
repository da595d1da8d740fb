"""The Triton kernel that measures the read ceiling. Importing it imports triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TILE = 4096
TILES = 16
NUM_WARPS = 8
"""16 numbers a thread and tile, as four 16-byte loads; 256 KiB a program. Untuned."""


@triton.jit
def read_kernel(x_ptr, out_ptr, TILE: tl.constexpr, TILES: tl.constexpr):
    """Sum TILES tiles of TILE float32 numbers; one load and one add per number."""
    program = tl.program_id(0).to(tl.int64)
    offsets = program * (TILE * TILES) + tl.arange(0, TILE)
    total = tl.zeros((TILE,), tl.float32)
    for tile in tl.static_range(TILES):
        total += tl.load(x_ptr + offsets + tile * TILE)
    tl.store(out_ptr + program, tl.sum(total))


def read_all(x: torch.Tensor) -> torch.Tensor:
    """Return the sums of 65536 numbers of x (float32, contiguous, a multiple of as many)."""
    programs = x.numel() // (TILE * TILES)
    out = x.new_empty(programs)
    read_kernel[(programs,)](x, out, TILE=TILE, TILES=TILES, num_warps=NUM_WARPS)
    return out
