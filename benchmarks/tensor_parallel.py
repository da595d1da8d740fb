"""Decoding by 1, 2 and 4 ranks of tensor parallelism: tokens per second and bytes of each cache.

    python -m benchmarks.tensor_parallel [--ranks 1 2 4] [--device cpu]
    torchrun --nproc-per-node 2 -m benchmarks.tensor_parallel

Runs `recipes/tensor_parallel.py` and writes results/tensor_parallel_<device>.json. Without GPUs
ranks share the cores of one host, and the rows say so. With GPUs each rank has its own, NCCL
between them. Under torchrun there is one row, of the ranks that it started.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks import record

RECIPE = Path(__file__).parents[1] / "recipes" / "tensor_parallel.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ranks", nargs="+", default=["1", "2", "4"])
    parser.add_argument("--small", action="store_true", help="a smaller model and prompt")
    parser.add_argument("--folder", type=Path, default=record.RESULTS)
    parser.add_argument("--commit", help="where the repository is a copy without history")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "rows.json")
        command = [sys.executable, str(RECIPE), "--device", args.device, "--json", str(out)]
        command += ["--small"] if args.small else []
        subprocess.run([*command, "--ranks", *args.ranks], check=True)
        if int(os.environ.get("RANK", 0)) > 0:
            return
        rows = json.loads(out.read_text())
    for row in rows:
        row["simulated_ranks"] = args.device == "cpu"
    name = f"tensor_parallel_{record.slug(args.device)}"
    print(record.save(name, args.device, rows, args.folder, args.commit))


if __name__ == "__main__":
    main()
