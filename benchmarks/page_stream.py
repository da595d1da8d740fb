"""How fast pages can be read at all: the loads of the fused decode kernel without its arithmetic.

    python -m benchmarks.page_stream [--batch 8] [--tokens 32576]

One warp a program copies its pages of keys and values to shared memory and counts nothing, so the
time is that of the access pattern: a bound for `decode_attention`. GPU only.
"""

from __future__ import annotations

import argparse
import json

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from benchmarks.record import environment
from benchmarks.timing import measure
from quantforge.numerics.pages import page_layout
from quantforge.ops.launch import multiprocessors
from quantforge.spec import QuantSpec

PROGRAMS = (8, 12, 16, 20)
"""Programs a multiprocessor."""


@gluon.jit
def stream_kernel(
    k_pages, v_pages, out, n_pages, pages_per_split, HKV: gl.constexpr, BYTES: gl.constexpr
):
    """Copy a range of pages of one head to shared memory. Grid: (splits, B * Hkv)."""
    split = gl.program_id(0)
    head = gl.program_id(1)
    LAYOUT: gl.constexpr = gl.BlockedLayout([16], [32], [1], [0])
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(16, 1, 1, [0])
    byte = gl.arange(0, 8192, LAYOUT)
    k_shared = gl.allocate_shared_memory(gl.uint8, [8192], SHARED)
    v_shared = gl.allocate_shared_memory(gl.uint8, [8192], SHARED)
    first = split * pages_per_split
    last = gl.minimum(first + pages_per_split, n_pages)
    for page in range(first, last):
        at = ((head // HKV * n_pages + page).to(gl.int64) * HKV + head % HKV) * BYTES
        async_copy.wait_group(1)
        async_copy.async_copy_global_to_shared(k_shared, k_pages + at + byte, mask=byte < BYTES)
        async_copy.commit_group()
        async_copy.wait_group(1)
        async_copy.async_copy_global_to_shared(v_shared, v_pages + at + byte, mask=byte < BYTES)
        async_copy.commit_group()
    async_copy.wait_group(0)
    total = gl.sum(k_shared.load(LAYOUT).to(gl.int32) + v_shared.load(LAYOUT).to(gl.int32), 0)
    gl.store(out + head * gl.num_programs(0) + split, total)


def main() -> None:
    """Print a JSON line for each number of programs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32576)
    parser.add_argument("--commit")
    args = parser.parse_args()
    device, spec = torch.device("cuda"), QuantSpec(128, 4)
    layout = page_layout(spec, spec)
    heads, n_pages = args.batch * args.kv_heads, -(-args.tokens // layout.tokens)
    shape = (args.batch * n_pages * args.kv_heads * layout.key_bytes,)
    sets = [
        tuple(torch.randint(0, 256, shape, dtype=torch.uint8, device=device) for _ in range(2))
        for _ in range(2)  # more than the L2 cache holds
    ]
    out = torch.empty(heads * 4096, dtype=torch.int32, device=device)
    for programs in PROGRAMS:
        pages = -(-n_pages // max(programs * multiprocessors(device) // heads, 1))
        splits = -(-n_pages // pages)

        def call(keys: torch.Tensor, values: torch.Tensor, pages=pages, splits=splits) -> None:  # type: ignore[no-untyped-def]
            stream_kernel[(splits, heads)](
                keys, values, out, n_pages, pages,
                HKV=args.kv_heads, BYTES=layout.key_bytes, num_warps=1,
            )  # fmt: skip

        timing = measure({"stream": [lambda s=s: call(*s) for s in sets]}, device)["stream"]
        gbps = 2 * shape[0] / timing.time_us / 1e3
        row = {"programs": programs, "gbps": round(gbps), **timing.as_dict()}
        print(json.dumps(row | {"environment": environment("cuda", args.commit)}), flush=True)


if __name__ == "__main__":
    main()
