"""Made format_v2.safetensors once; kept to show how. Do not run it again: old files must load.

PYTHONPATH=src python tests/golden/make_format_v2.py
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from quantforge import QuantForgeConfig, QuantPipeline, QuantTensor, save_file

HERE = Path(__file__).parent


def samples() -> dict[str, torch.Tensor]:
    rng = np.random.RandomState(0)

    def packed(dim: int, **config: object) -> QuantTensor:
        x = torch.from_numpy(rng.standard_normal((2, dim)).astype(np.float32))
        return QuantPipeline(dim, QuantForgeConfig(**config)).compress(x)  # type: ignore[arg-type]

    result: dict[str, torch.Tensor] = {f"dim{dim}": packed(dim) for dim in (16, 96, 160, 224, 768)}
    result["prod"] = packed(96, estimator="prod", bits=3, seed=7)
    result["both"] = packed(96, shift=True, equalizer=True, bits=3)
    return result


def main() -> None:
    tensors = samples()
    save_file(tensors, HERE / "format_v2.safetensors", metadata={"made by": "make_format_v2.py"})
    about = {
        name: {
            "shape": list(t.shape),
            "dtype": str(t.dtype),
            "spec": t.spec.key if isinstance(t, QuantTensor) else None,
            "container": t.container if isinstance(t, QuantTensor) else None,
        }
        for name, t in tensors.items()
    }
    (HERE / "format_v2.json").write_text(json.dumps(about, indent=1) + "\n")
    dense = {n: t.dequantize() if isinstance(t, QuantTensor) else t for n, t in tensors.items()}
    np.savez_compressed(HERE / "format_v2.npz", **{n: t.double().numpy() for n, t in dense.items()})


if __name__ == "__main__":
    main()
