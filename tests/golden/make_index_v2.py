"""Wrote index_v2_*.safetensors and index_v2.npz, by the first version with lists.

    python tests/golden/make_index_v2.py

Files of that format must load for ever, so this is not run again.
"""

from pathlib import Path

import numpy as np

from quantforge.vectordb import IndexConfig, QuantizedIndex

HERE = Path(__file__).parent
DIM = 24


def main() -> None:
    draw = np.random.RandomState(0)
    spread = np.arange(1, DIM + 1) ** -0.7
    x = (draw.standard_normal((200, DIM)) * spread + 0.3).astype(np.float32)
    query = (draw.standard_normal((4, DIM)) * spread + 0.3).astype(np.float32)
    found = {"queries": query}
    for mode, metric in (("adapted", "ip"), ("oblivious", "l2")):
        index = QuantizedIndex(DIM, IndexConfig(bits=3, mode=mode, metric=metric, nlist=4))
        index.add(x[:190], ids=[f"row {i}" for i in range(190)])
        index.add(x[190:], ids=[f"row {i}" for i in range(190, 200)])
        index.save(HERE / f"index_v2_{mode}_{metric}.safetensors")
        ids, scores = index.search(query, 10, nprobe=2)
        errors = index.standard_errors(query, ["row 1", "row 195"])
        found |= {f"{mode}_{metric}_ids": ids.astype(str), f"{mode}_{metric}_scores": scores}
        found[f"{mode}_{metric}_errors"] = errors
    np.savez(HERE / "index_v2.npz", **found)


if __name__ == "__main__":
    main()
