"""Wrote index_v1_*.safetensors and index_v1.npz, by the version whose offsets were <mean, r>.

    python tests/golden/make_index_v1.py

Files of that format must load for ever, so this is not run again.
"""

from pathlib import Path

import numpy as np

from quantforge.vectordb import IndexConfig, QuantizedIndex

HERE = Path(__file__).parent
DIM = 40


def main() -> None:
    draw = np.random.RandomState(0)
    spread = np.arange(1, DIM + 1) ** -0.7
    x = (draw.standard_normal((300, DIM)) * spread + 0.3).astype(np.float32)
    query = (draw.standard_normal((4, DIM)) * spread + 0.3).astype(np.float32)
    found = {"queries": query}
    for mode, metric in (("adapted", "ip"), ("centred", "cosine"), ("adapted", "l2")):
        index = QuantizedIndex(DIM, IndexConfig(bits=3, mode=mode, metric=metric))
        index.add(x, ids=np.arange(300) * 2)
        index.save(HERE / f"index_v1_{mode}_{metric}.safetensors")
        ids, scores = index.search(query, 10)
        found |= {f"{mode}_{metric}_ids": ids, f"{mode}_{metric}_scores": scores}
    np.savez(HERE / "index_v1.npz", **found)


if __name__ == "__main__":
    main()
