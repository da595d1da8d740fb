"""Files: safetensors that hold packed codes beside plain tensors, and say what they hold.

    save_file, load_file        all at once
    open_file -> QuantFile      list and load lazily
    create_file -> FileWriter   write row by row, for data larger than memory

    header    keys, metadata, validation      index     shards and how a set replaces another
    writer    one file                        save      one file or shards
    reader    memory-mapped loading           atomic    files that appear whole or not at all
    npz       for numpy alone                 npy       arrays in .npy format, and in .npz files

The format is described in docs/format.md. Nothing in a file is executed or imported by name.
"""

from quantforge.io.header import Part, TensorInfo
from quantforge.io.reader import QuantFile, load_file, open_file, read_metadata
from quantforge.io.save import save_file
from quantforge.io.writer import FileWriter, create_file

__all__ = [
    "FileWriter",
    "Part",
    "QuantFile",
    "TensorInfo",
    "create_file",
    "load_file",
    "open_file",
    "read_metadata",
    "save_file",
]
