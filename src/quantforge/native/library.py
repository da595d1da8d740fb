"""Finding, checking and loading the native library, and choosing its level.

The wheel's library is taken if it was built from the sources beside it; else one that was built
here before, for this user, sources and compiler; else it is built now. `QUANTFORGE_NATIVE=0` in
the environment at the first call turns all of it off.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from quantforge.native.build import (
    FILE_NAME,
    LEVEL_FLAGS,
    SHIPPED,
    BuildError,
    build,
    cache_folder,
    source_hash,
)
from quantforge.native.check import self_check
from quantforge.native.code import Packed, Rows

LEVELS = tuple(LEVEL_FLAGS)
"""Names of the levels, from the slowest."""
SWITCH = "QUANTFORGE_NATIVE"
_log = logging.getLogger("quantforge")
_lock = threading.Lock()

_ROWS, _PACKED = ctypes.POINTER(Rows), ctypes.POINTER(Packed)
_P, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_SIGNATURES = {
    "qf_quantize": (_P, _LONG, _LONG, _ROWS, _INT, _P, _P, _P, _P, _PACKED, _INT),
    "qf_dequantize": (_PACKED, _LONG, _LONG, _P, _P, _P, _P, _ROWS, _INT, _INT),
    "qf_rotate": (_P, _LONG, _P, _P, _INT, _INT),
    "qf_scores": (_PACKED, _LONG, _LONG, _LONG, _P, _P, _ROWS, _INT, _INT, _INT),
    "qf_combine": (_PACKED, _LONG, _LONG, _LONG, _ROWS, _P, _INT),
    "qf_search": (_P,),
    "qf_attention": (_PACKED, _PACKED, _P, _P, _P, _INT, _P, _INT, _FLOAT, _P, _P, _INT),
}  # fmt: skip


class Library:
    """The loaded library.

    Attributes:
        path: of the file.
        functions: the C interface (source/api.cpp), with argument types.
        byte_offset: what the level in use adds to int8 centroids.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.functions = ctypes.CDLL(str(path))
        self.functions.qf_source.restype = ctypes.c_char_p
        for name, types in _SIGNATURES.items():
            getattr(self.functions, name).argtypes = types
        self.byte_offset: int = self.functions.qf_byte_offset()

    @property
    def source(self) -> str:
        """Digest of the sources it was built from."""
        return self.functions.qf_source().decode()

    @property
    def levels(self) -> tuple[str, ...]:
        """Levels that this processor can run, from the slowest."""
        bits = self.functions.qf_levels()
        return tuple(name for i, name in enumerate(LEVELS) if bits >> i & 1)

    def use(self, level: str | None) -> None:
        """Run all later calls on a level of `levels`; None is the fastest."""
        missing = self.functions.qf_set_level(-1 if level is None else LEVELS.index(level))
        assert not missing, f"this processor lacks {level}"
        self.byte_offset = self.functions.qf_byte_offset()

    def call(self, name: str, *args: object) -> None:
        """Call a function of the interface.

        Raises:
            MemoryError: if it could not allocate its work space.
        """
        if getattr(self.functions, name)(*args):
            raise MemoryError(f"{name} ran out of memory")


def library() -> Library | str:
    """Return the library, or the reason why there is none; both are found out once."""
    with _lock:
        return _load()


@lru_cache
def _load() -> Library | str:
    if os.environ.get(SWITCH, "1") == "0":
        return f"the environment says {SWITCH}=0"
    try:
        found = _open(SHIPPED / FILE_NAME) or _build_or_reuse()
    except (BuildError, OSError) as error:
        _log.warning("no native CPU kernels, operators run in eager torch: %s", error)
        return str(error).splitlines()[0]
    problem = self_check(found)
    if problem is not None:
        _log.warning("the native CPU kernels failed their self-check, not used: %s", problem)
        return problem
    return found


def _open(path: Path) -> Library | None:
    """Load a library if it is there and was built from the sources at hand."""
    if not path.is_file():
        return None
    candidate = Library(path)
    return candidate if candidate.source == source_hash() else None


def _build_or_reuse() -> Library:
    folder = cache_folder()
    found = _open(folder / FILE_NAME)
    if found is None:
        _log.info("building the native CPU kernels in %s (once)", folder)
        found = _open(build(folder))
    if found is None:
        raise BuildError("the native library changed while it was built")
    return found


@contextmanager
def level(name: str) -> Iterator[None]:
    """Run native operators on one level while the context is open (tests and benchmarks)."""
    found = library()
    assert isinstance(found, Library), found
    found.use(name)
    try:
        yield
    finally:
        found.use(None)
