"""What starting costs: `--help` loads neither torch nor numpy and takes little time."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import quantforge
from quantforge.cli.index import ACTIONS
from quantforge.cli.main import COMMANDS

HELP_CPU_S = 0.150
PACKAGE = Path(quantforge.__file__).parents[1]
HEAVY = {"torch", "numpy", "transformers", "safetensors", "pyarrow", "matplotlib", "fastapi"}
LINES = [[], *([name] for name in COMMANDS), *(["index", action] for action in ACTIONS)]

MODULES = """
import json, sys
from quantforge.cli.main import main
for line in json.loads(sys.argv[1]):
    try:
        main([*line, "--help"])
    except SystemExit as end:
        assert end.code == 0, line
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""


def python(*arguments: str, cache: Path | None = None) -> tuple[str, float]:
    """Run python and return its stdout and the seconds of CPU it took."""
    env = {**os.environ, "PYTHONPATH": str(PACKAGE)}
    if cache is not None:  # an installed package is compiled once
        env = {**env, "PYTHONPYCACHEPREFIX": str(cache)}
        env.pop("PYTHONDONTWRITEBYTECODE", None)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *arguments], env=env, capture_output=True, text=True, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_loads_nothing_heavy(tmp_path: Path) -> None:
    out, _ = python("-c", MODULES, json.dumps(LINES), cache=tmp_path)
    loaded = set(json.loads(out.splitlines()[-1]))
    assert "quantforge" in loaded
    assert not HEAVY & loaded


def test_help_is_quick(tmp_path: Path) -> None:
    """CPU time beyond that of python itself; the least of three, as others share the cores."""
    bare = min(python("-c", "pass", cache=tmp_path)[1] for _ in range(3))
    for line in ([], ["benchmark"], ["index", "build"]):
        call = ["-m", "quantforge.cli", *line, "--help"]
        python(*call, cache=tmp_path)  # compiles the modules
        taken = min(python(*call, cache=tmp_path)[1] for _ in range(3))
        assert taken - bare < HELP_CPU_S, line


def test_every_export_is_there_and_dir_lists_it() -> None:
    assert dir(quantforge) == sorted(quantforge.__all__)
    for name in set(quantforge.__all__) - {"QuantForgeCache"}:  # which loads transformers
        assert getattr(quantforge, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        quantforge.nothing  # noqa: B018


def test_settings_and_errors_load_neither_torch_nor_numpy() -> None:
    program = (
        "import sys, quantforge\n"
        "quantforge.QuantForgeConfig(bits=3); quantforge.InputError; quantforge.QuantSpec\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)\n"
        "print('loaded')\n"
    )
    out, _ = python("-c", program)
    assert out == "loaded\n"
