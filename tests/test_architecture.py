"""The shape of the package: layers, folders, sizes, and what an import costs."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import quantforge
from quantforge import ops
from quantforge.ops._library import DEVICES, FAST_BACKENDS, NAMESPACE

PACKAGE = Path(quantforge.__file__).parent
MAX_LINES = 400
MAX_IMPORT_MS = 300

# From the bottom up. A module may import what is in a lower layer, and its own part (the first
# name after `quantforge`); of its own layer only where the parts are one thing in two files.
LAYERS = (
    ("errors", "text"),
    ("settings", "spec"),
    ("config", "numerics"),
    ("native",),
    ("ops",),
    ("dispatch", "tensor"),
    ("arrays", "io", "pipeline", "quantizer"),
    ("inputs", "measure"),
    ("llm", "vectordb"),
    ("vllm",),
    ("optimizer",),  # measures both
    ("server",),
    ("cli", "__main__"),
    ("encode",),  # a program of its own, for torchrun
)
LAYER_OF = {part: level for level, parts in enumerate(LAYERS) for part in parts}
MUTUAL = ({"dispatch", "tensor"}, {"arrays", "io", "pipeline", "quantizer"})
NO_TORCH = ("errors", "text", "settings", "spec", "config", "numerics")
OPS = ("attention", "cache_append", "combine", "dequantize", "quantize", "scores", "search")

FILES = sorted(PACKAGE.rglob("*.py"))


def _name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path) -> Iterator[str]:
    """Yield every module a file imports, also inside functions, names resolved to submodules."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            for alias in node.names:
                target = PACKAGE.parent.joinpath(*node.module.split("."), alias.name)
                is_module = target.is_dir() or target.with_suffix(".py").is_file()
                yield f"{node.module}.{alias.name}" if is_module else node.module


def _part(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def arrow_errors(importer: str, imported: str) -> str | None:
    """Return what is wrong with an import between two modules of the package, if anything."""
    source, target = _part(importer), _part(imported)
    if source == "" or source == target:  # the package itself exports from everywhere
        return None
    for part in (source, target):
        if part and part not in LAYER_OF:
            return f"{part} has no place in LAYERS: add it"
    if target == "":
        return f"{importer} imports the package itself: name the module"
    if LAYER_OF[target] < LAYER_OF[source] or any({source, target} <= pair for pair in MUTUAL):
        return None
    return f"{importer} imports {imported}, which is not below it"


@pytest.mark.parametrize("path", FILES, ids=lambda p: _name(p))
def test_import_arrows(path: Path) -> None:
    name = _name(path)
    for module in imported_modules(path):
        if module.split(".")[0] == "quantforge":
            error = arrow_errors(name, module)
            if module == "quantforge" and _part(name) in ("cli", "server", "__main__"):
                continue  # for its __version__
            assert error is None, error
        if _part(name) in NO_TORCH:
            top = module.split(".")[0]
            allowed = top in sys.stdlib_module_names or top in ("numpy", "quantforge")
            assert allowed, f"{name} imports {module}; numbers need numpy only"


def test_arrows_are_checked() -> None:
    """The control of the test above."""
    assert arrow_errors("quantforge.ops.scores.eager", "quantforge.tensor")
    assert arrow_errors("quantforge.numerics.encode", "quantforge.ops")
    assert arrow_errors("quantforge.llm.cache", "quantforge.vectordb.index")
    assert arrow_errors("quantforge.vectordb.index", "quantforge")
    assert arrow_errors("quantforge.novel", "quantforge.spec")
    assert arrow_errors("quantforge.tensor", "quantforge.dispatch.compute") is None
    assert arrow_errors("quantforge.llm.cache", "quantforge.ops.attention") is None
    modules = set(imported_modules(PACKAGE / "ops" / "scores" / "op.py"))
    assert {"quantforge.ops.scores.eager", "quantforge.ops._library", "torch"} <= modules


def _op_folders() -> list[Path]:
    return sorted(path.parent for path in (PACKAGE / "ops").glob("*/op.py"))


def test_all_ops_are_exported() -> None:
    folders = [path.name for path in _op_folders()]
    assert sorted(ops.__all__) == folders
    assert set(OPS) <= set(folders)
    for name in folders:
        assert getattr(ops, name).__module__ == f"quantforge.ops.{name}.api"


@pytest.mark.parametrize("folder", _op_folders(), ids=lambda p: p.name)
def test_op_folder(folder: Path) -> None:
    names = {path.stem for path in folder.glob("*.py")}
    assert {"__init__", "api", "op", "reference", "eager"} <= names
    assert (Path(__file__).parent / "ops" / f"test_{folder.name}.py").is_file()
    assert "import" not in (folder / "__init__.py").read_text()  # ops/__init__ imports the api
    torch_free = {m.split(".")[0] for m in imported_modules(folder / "reference.py")}
    assert "torch" not in torch_free, "an oracle is numpy"


@pytest.mark.parametrize("folder", _op_folders(), ids=lambda p: p.name)
def test_ops_share_helpers_and_not_each_other(folder: Path) -> None:
    """A sibling's implementation may be called (appending quantizes), its public API may not."""
    siblings = {f"quantforge.ops.{path.name}" for path in _op_folders() if path != folder}
    for path in folder.glob("*.py"):
        for module in imported_modules(path):
            owner = ".".join(module.split(".")[:3])
            assert module != "quantforge.ops", f"{path.name} imports quantforge.ops itself"
            if owner in siblings:
                stems = ("eager", "reference", *FAST_BACKENDS.values())
                assert path.stem in stems, f"{path} imports {module}"
                assert module.split(".")[-1] == path.stem, f"{path} imports {module}"


@pytest.mark.parametrize("name", OPS)
def test_op_is_registered_on_every_device(name: str) -> None:
    for key in (*DEVICES, "Meta"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key), key
    schema = getattr(getattr(torch.ops, NAMESPACE), name).default._schema
    assert schema.is_mutable == (name == "cache_append")


@pytest.mark.parametrize("path", FILES, ids=lambda p: _name(p))
def test_file_size(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", FILES, ids=lambda p: _name(p))
def test_public_names_have_docstrings_and_modules_say_what_they_are(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{path}: no module docstring"


COLD_IMPORT = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.process_time()
import quantforge
seconds = time.process_time() - start
print(json.dumps({
    "ms": 1e3 * seconds,
    "cuda": torch.cuda.is_initialized(),
    "loaded": sorted({name.split(".")[0] for name in set(sys.modules) - before}),
}))
"""


def _cold_import() -> dict:
    paths = [str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    result = subprocess.run(
        [sys.executable, "-c", COLD_IMPORT],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return json.loads(result.stdout.splitlines()[-1])


def test_cold_import() -> None:
    """`import quantforge` beside torch is cheap: CPU time, the best of three."""
    reports = []
    for _ in range(3):
        reports.append(_cold_import())
        if reports[-1]["ms"] < MAX_IMPORT_MS:
            break
    for report in reports:
        assert not report["cuda"], "importing initialized CUDA"
        heavy = {"transformers", "triton", "safetensors", "accelerate", "matplotlib", "scipy"}
        assert not heavy & set(report["loaded"])
        assert "quantforge" in report["loaded"]
    assert min(report["ms"] for report in reports) < MAX_IMPORT_MS
