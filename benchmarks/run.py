"""Time operators against their baselines, after their tests.

    python -m benchmarks.run [op ...] [--device cuda] [--quick] [--output DIR] [--no-tests]

Without operators, all of them, each in a process of its own. An operator whose tests fail, or
whose result is not finite or far from the baseline's, gets no number, and the exit status is 1.
Rows go to `<output>/<op>_<gpu>.jsonl` as they are measured, in the place of older ones of the
same case.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.ceiling import ceilings
from benchmarks.measure import WrongResultError, measure_case, release
from benchmarks.record import RESULTS, environment, put_row, slug
from benchmarks.registry import OPS, SIZES, TESTS, cases

ROOT = Path(__file__).parents[1]
SMALL_READ_BYTES = 8 << 20
FORWARDED = ("device", "size", "cases", "output", "repetitions", "threads", "commit")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="*", metavar="op", help=f"any of {', '.join(OPS)}")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, choices=("cuda", "cpu"))
    parser.add_argument("--size", choices=SIZES, help="of the shapes; default: the device's")
    parser.add_argument("--quick", action="store_true", help="few cases, 10 repetitions")
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    parser.add_argument("--output", type=lambda text: Path(text).resolve(), default=RESULTS)
    parser.add_argument("--no-tests", action="store_true", help="they have just passed")
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--commit", help="where the working tree has no git history")
    args = parser.parse_args(arguments)
    if unknown := sorted(set(args.ops) - set(OPS)):
        parser.error(f"unknown operators {', '.join(unknown)}; known are {', '.join(OPS)}")
    args.size = args.size or args.device
    if args.size == "small" and args.output == RESULTS:
        parser.error("small shapes are for tests and do not belong among the results: --output DIR")
    args.repetitions = min(args.repetitions, 10) if args.quick else args.repetitions
    return args


def tests_pass(op: str, device: str) -> bool:
    """Run an operator's tests on the device."""
    marked = "gpu" if device == "cuda" else "not gpu"
    call = [sys.executable, "-m", "pytest", "-q", "-x", "-m", marked, *TESTS[op]]
    return subprocess.run(call, cwd=ROOT, check=False).returncode == 0


def describe(row: dict[str, Any]) -> str:
    """Return a row as a line of the printed table."""
    if "skipped" in row:
        return f"{row['case']:52} {row['skipped']}"
    against = f"{row['ratio']:6.2f}x {row['best']}" if "ratio" in row else ""
    goals = [f"{row['goal_ratio']}x" if row["goal_ratio"] else ""]
    goals.append(f"{row['goal_share']:.0%}" if row["goal_share"] else "")
    goal = "".join(goals)
    return (
        f"{row['case']:52} {row['time_us']:11.1f} us {row['gbps']:7.0f} GB/s "
        f"{row['share']:6.1%} {against}{f'  (goal {goal})' if goal else ''} [{row['how']}]"
    )


def run_op(op: str, args: argparse.Namespace) -> bool:
    """Measure one operator; return whether it has numbers."""
    device = torch.device(args.device)
    if not args.no_tests and not tests_pass(op, args.device):
        print(f"{op}: tests failed, nothing is measured", flush=True)
        return False
    where = environment(args.device, args.commit)
    limits = ceilings(device, SMALL_READ_BYTES if args.size == "small" else None)
    print(f"\n{op} on {where['device']}: read ceiling {limits['read_gbps']} GB/s, ", end="")
    print(f"copy {limits['copy_gbps']} GB/s, torch {where['torch']}", flush=True)
    path = args.output / f"{op}_{slug(args.device)}.jsonl"
    start = time.perf_counter()
    for case in cases(op, args.size):
        if args.cases not in case.name or (args.quick and not case.quick):
            continue
        try:
            with torch.no_grad():
                row = measure_case(case, device, limits, args.repetitions)
        except WrongResultError as error:
            print(f"{error}: nothing more is measured", flush=True)
            return False
        put_row(path, row | {"tested": not args.no_tests, "environment": where})
        print(describe(row), flush=True)
    release(device)
    print(f"{path}, {time.perf_counter() - start:.0f} s", flush=True)
    return True


def main(arguments: list[str] | None = None) -> int:
    """Measure the operators asked for; return the exit status."""
    args = parse(arguments)
    if len(args.ops) == 1:
        torch.set_num_threads(args.threads)
        return 0 if run_op(args.ops[0], args) else 1
    # one that crashes, or breaks the CUDA context, must not take the others with it
    options = [f"--{name}={value}" for name in FORWARDED if (value := getattr(args, name))]
    options += [
        f"--{name}" for name in ("quick", "no-tests") if getattr(args, name.replace("-", "_"))
    ]
    red = [
        op
        for op in args.ops or OPS
        if subprocess.run([sys.executable, "-m", "benchmarks.run", op, *options], cwd=ROOT,
                          check=False).returncode
    ]  # fmt: skip
    if red:
        print(f"no complete numbers for {', '.join(red)}")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
