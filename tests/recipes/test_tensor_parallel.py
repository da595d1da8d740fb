"""The recipe of tensor parallelism runs its own ranks, and as a rank that torchrun starts."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.recipes.test_recipes import ROOT, run


def test_tensor_parallel() -> None:
    lines = run(
        "tensor_parallel.py", "--small", "--device", "cpu", "--ranks", "1", "2"
    ).splitlines()
    assert "simulated" in lines[-3]
    one, two = (float(line.split()[2]) for line in lines[-2:])
    assert one == 2 * two


@pytest.mark.slow
def test_torchrun() -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    recipe = str(ROOT / "recipes" / "tensor_parallel.py")
    done = subprocess.run(
        [sys.executable, *launch, recipe, "--small", "--device", "cpu"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].split()[0] == "2"
