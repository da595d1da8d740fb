"""A column of vectors as codes: in arrow, parquet, numpy and Hugging Face datasets.

    python recipes/arrow_column.py vectors.parquet --column embedding --output codes.parquet

A row of codes and its scale are bytes of one length, so a column of them is `fixed_size_binary`,
which every reader of parquet knows; what they mean lies in the metadata of the field. The claims,
asserted: a column that was written and read again decodes to the same vectors, bit by bit; a row
takes its packed codes and 2 bytes for the scale; and `IndexStore`, filled batch by batch from the
file, finds each vector by itself. `--small` makes its own parquet file.

From a dataset of the `datasets` library: `encode_column(table_of(dataset), "embedding")`, and back
with `datasets.Dataset(table)`.
"""

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from quantforge import QuantForgeConfig, QuantPipeline, QuantTensor
from quantforge.numerics.packing import row_bytes
from quantforge.spec import QuantSpec
from quantforge.vectordb import IndexConfig, IndexStore

FIELD = b"quantforge.spec"


def table_of(source: Any) -> pa.Table:
    """Return an arrow table of a table, a parquet file, a dataset or a dict of numpy arrays."""
    if isinstance(source, pa.Table):
        return source
    if isinstance(source, str | Path):
        return pq.read_table(source, memory_map=True)
    if isinstance(source, dict):
        return pa.table({name: column_of(np.asarray(array)) for name, array in source.items()})
    if hasattr(source, "with_format"):  # datasets.Dataset: its indices and selections apply
        return source.with_format("arrow")[:]
    raise TypeError(f"expected a table, a path, a dataset or a dict; got {type(source).__name__}")


def column_of(array: np.ndarray) -> pa.Array:
    """Return a numpy array as a column: (n,), or (n, dim) as lists of one length."""
    if array.ndim == 1:
        return pa.array(array)
    return pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), array.shape[1])


def vectors_of(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Return a column of lists of numbers as (n, dim)."""
    if column.null_count:
        raise ValueError(f"{column.null_count} rows have no vector; filter them out first")
    flat = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return flat.flatten().to_numpy(zero_copy_only=False).reshape(len(flat), -1)


def encode_column(table: pa.Table, name: str, bits: int = 4, seed: int = 0) -> pa.Table:
    """Replace a column of vectors by their codes."""
    x = vectors_of(table[name])
    q = QuantPipeline(x.shape[1], QuantForgeConfig(bits=bits, seed=seed)).compress(
        torch.from_numpy(np.array(x, np.float32))
    )
    rows = torch.cat([q.packed, q.scales.view(torch.uint8)], 1).numpy()
    binary = pa.binary(rows.shape[1])
    column = pa.Array.from_buffers(binary, len(rows), [None, pa.py_buffer(rows.tobytes())])
    spec = json.dumps(dataclasses.asdict(q.spec)).encode()
    field = pa.field(name, binary, nullable=False, metadata={FIELD: spec})
    return table.set_column(table.schema.get_field_index(name), field, column)


def decode_column(table: pa.Table, name: str) -> QuantTensor:
    """Return the codes of a column that `encode_column` made, (n, dim); nothing is decoded yet."""
    metadata = table.schema.field(name).metadata or {}
    if FIELD not in metadata:
        raise ValueError(f"column {name!r} holds no codes: its field has no {FIELD.decode()!r}")
    spec = QuantSpec(**json.loads(metadata[FIELD]))
    column = table[name].combine_chunks()
    width = column.type.byte_width
    data = np.frombuffer(column.buffers()[1], np.uint8).reshape(-1, width)
    rows = torch.from_numpy(data[column.offset : column.offset + len(column)].copy())
    scales = rows[:, -2:].contiguous().view(torch.float16)
    return QuantTensor(rows[:, :-2].contiguous(), scales, spec, dtype=torch.float32)


def batches_of(path: Path, name: str, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yield vectors of a parquet file, and their first row, in constant memory."""
    start = 0
    for batch in pq.ParquetFile(path).iter_batches(batch_size=size, columns=[name]):
        yield vectors_of(batch.column(0)), start
        start += len(batch)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("input", nargs="?", type=Path, help=".parquet")
    parser.add_argument("--column", default="embedding")
    parser.add_argument("--bits", type=int, default=4, choices=range(1, 9))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="make the data; seconds on a CPU")
    parser.add_argument("--output", type=Path, help="parquet file of the codes")
    args = parser.parse_args(argv)
    if args.small == (args.input is not None):
        parser.error("give an input file or --small")
    with tempfile.TemporaryDirectory() as folder:
        path = args.input or Path(folder, "small.parquet")
        if args.small:
            x = np.random.RandomState(args.seed).standard_normal((3000, 96)).astype(np.float32)
            pq.write_table(table_of({"row": np.arange(3000), args.column: x}), path)
        output = args.output or Path(folder, "codes.parquet")
        table = table_of(path)
        encoded = encode_column(table, args.column, args.bits, args.seed)
        pq.write_table(encoded, output)
        codes = decode_column(table_of(output), args.column)
        n, dim = codes.shape
        width = encoded[args.column].type.byte_width
        assert torch.equal(codes.dequantize(), decode_column(encoded, args.column).dequantize())
        assert width == row_bytes(dim, args.bits) + 2

        with IndexStore.create(Path(folder, "index"), dim, IndexConfig(metric="cosine")) as store:
            for vectors, start in batches_of(path, args.column, 1000):
                store.add(vectors, ids=np.arange(start, start + len(vectors)))
            picked = np.arange(0, n, max(1, n // 100))
            found, _ = store.index.search(vectors_of(table[args.column])[picked], k=1)
        hits = float((found[:, 0] == picked).mean())
        print("| rows | dim | bytes a row before | after | found by themselves |")
        print("| --- | --- | --- | --- | --- |")
        print(f"| {n} | {dim} | {4 * dim} | {width} | {hits:.3f} |")
        assert hits > 0.98, "a vector is its own nearest neighbour"


if __name__ == "__main__":
    main()
