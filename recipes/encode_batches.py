"""Compress a column of vectors in ray.data or Hugging Face datasets, with the same function.

python recipes/encode_batches.py {ray,datasets} vectors.parquet embedding codes
"""

import sys
from functools import partial

from quantforge import QuantForgeConfig
from quantforge.encode import encode_batch

library, source, column, output = sys.argv[1:]
encode = partial(encode_batch, column=column, config=QuantForgeConfig(bits=4))

if library == "ray":
    import ray

    codes = ray.data.read_parquet(source).map_batches(encode, batch_format="numpy")
    codes.write_parquet(output)
else:
    from datasets import Dataset

    rows = Dataset.from_parquet(source).with_format("numpy")
    rows.map(encode, batched=True, remove_columns=[column]).to_parquet(output)
