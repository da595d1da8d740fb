"""Build hook: compiles the native library into the wheel.

Without a compiler, or with one that fails, the wheel is built without it and says so: the package
then compiles on first use, or runs in eager torch.
"""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

BUILD_FILE = Path(__file__).parent / "src/quantforge/native/build.py"


class NativeLibraryHook(BuildHookInterface):
    """Adds `quantforge/native/lib/libquantforge.so` and the platform to a wheel."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile; `version` is "standard", or "editable" where the sources are used in place."""
        if self.target_name != "wheel" or version == "editable":
            return
        build = _load_build()
        try:
            library = build.build(Path(self.directory) / "native")
        except (build.BuildError, OSError) as error:
            self.app.display_warning(f"the wheel has no native library: {error}")
            return
        build_data["force_include"][str(library)] = f"quantforge/native/lib/{build.FILE_NAME}"
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"


def _load_build() -> Any:
    """Load build.py alone: the package needs torch, which a build environment lacks."""
    spec = importlib.util.spec_from_file_location("quantforge_native_build", BUILD_FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
