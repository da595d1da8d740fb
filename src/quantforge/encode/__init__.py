"""Bulk compression: a folder of files of vectors, by any number of workers that never talk.

    encode_folder    this worker's share of the files, resumable
    encode_batch     a dict of arrays, as ray.data and datasets.map hand them over
    progress         what all workers have done, from the files

`torchrun --nproc-per-node 8 -m quantforge.encode INPUT OUTPUT`, `srun python -m quantforge.encode`
and one process write the same bytes.
"""

from quantforge.encode.batch import encode_batch
from quantforge.encode.folder import Progress, encode_folder, progress

__all__ = ["Progress", "encode_batch", "encode_folder", "progress"]
