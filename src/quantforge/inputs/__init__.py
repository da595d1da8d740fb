"""Vectors from files of other programs, read in pieces: what is larger than memory streams.

    open_vectors     one array of vectors, to give to QuantPipeline, QuantizedIndex, ...
    list_arrays      what a file holds, without reading it

    numpy_files      .npy, .npz and .npy on stdin        texmex    .fvecs, .bvecs
    tensors          .safetensors                        arrow     .parquet, .arrow, .feather
    rows             arrays that can only be read from start to end

What is opened has `shape`, `dtype`, `ndim` and slices along its first axis, as `arrays.Source`
expects; a slice is read when it is asked for.
"""

from quantforge.inputs.entry import Entry
from quantforge.inputs.files import STDIN, SUFFIXES, list_arrays, open_vectors, sample

__all__ = ["STDIN", "SUFFIXES", "Entry", "list_arrays", "open_vectors", "sample"]
