"""The .fvecs and .bvecs files of the TEXMEX corpus (http://corpus-texmex.irisa.fr).

record   [ dim: int32 ][ dim numbers: float32 | uint8 ]        little-endian, one per vector
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from quantforge.errors import FormatError
from quantforge.inputs.entry import Entry

NUMBERS: dict[str, np.dtype[Any]] = {".fvecs": np.dtype("<f4"), ".bvecs": np.dtype(np.uint8)}


class Records:
    """The vectors of a mapped file, as float32; each record read is checked."""

    def __init__(self, path: Path, records: np.ndarray) -> None:
        self._path, self._records = path, records
        self.shape: tuple[int, ...] = (len(records), records["x"].shape[1])
        self.ndim, self.dtype = 2, np.dtype(np.float32)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        records = self._records[index]
        bad = np.flatnonzero(np.atleast_1d(records["dim"]) != self.shape[1])
        if len(bad):
            raise FormatError(
                f"{self._path} must hold vectors of dim {self.shape[1]} alone; one that begins "
                f"with {np.atleast_1d(records['dim'])[bad[0]]} is among {index}"
            )
        return records["x"].astype(np.float32)


def texmex_entries(path: Path) -> dict[str, Entry]:
    """List the vectors of a .fvecs or .bvecs file.

    Raises:
        FormatError: if the file is not a whole number of records.
    """
    numbers, size = NUMBERS[path.suffix.lower()], path.stat().st_size
    with open(path, "rb") as file:
        dim = int.from_bytes(file.read(4), "little", signed=True)
    record = 4 + dim * numbers.itemsize
    if dim < 1 or size % record:
        raise FormatError(
            f"{path} is not a {path.suffix} file: its first number, {dim}, must be the dim of all "
            f"vectors, and its {size} bytes a multiple of {record}"
        )
    layout = np.dtype([("dim", "<i4"), ("x", numbers, (dim,))])
    records = Records(path, np.memmap(path, layout, "r"))
    return {path.stem: Entry(records.shape, "float32", lambda: records)}
