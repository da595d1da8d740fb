"""Made format_v1.safetensors once; kept to show how. Do not run it again: old files must load.

PYTHONPATH=src python tests/golden/make_format_v1.py
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
    x = rng.standard_normal((2, 16)).astype(np.float32)
    loud = x * np.linspace(0.1, 4, 16, dtype=np.float32) + 1

    def packed(data: object, **config: object) -> QuantTensor:
        return QuantPipeline(np.shape(data)[-1], QuantForgeConfig(**config)).compress(data)  # type: ignore[arg-type]

    t = torch.from_numpy(x)
    result: dict[str, torch.Tensor] = {f"bits{b}": packed(t, bits=b) for b in range(1, 9)}
    result |= {
        "numpy": packed(x),
        "float64": packed(x.astype(np.float64), scale_rule="norm"),
        "bfloat16": packed(t.bfloat16(), scale_rule="mse"),
        "shift": packed(torch.from_numpy(loud), shift=True),
        "both": packed(loud, shift=True, equalizer=True, bits=3),
        "prod": packed(t, estimator="prod", bits=3, seed=7),
        "odd": packed(rng.standard_normal((2, 3, 5)), bits=3),
        "wide_scale": packed(t * 1e9, scale_dtype="float32", codebook="gaussian"),
        "e4m3": packed(t, codebook="e4m3", seed=2**32 - 1),
        "vector": packed(x[0]),
        "none": packed(x[:0]),
        "a plain float": torch.tensor([1.5, -2.0]),
        "plain.int": torch.arange(6).view(2, 3),
        "plain.bf16": torch.tensor([0.1], dtype=torch.bfloat16),
        "plain.bool": torch.tensor([True, False]),
        "scalar": torch.tensor(3.25),
    }
    return result


def main() -> None:
    tensors = samples()
    save_file(tensors, HERE / "format_v1.safetensors", metadata={"made by": "make_format_v1.py"})
    about = {
        name: {
            "shape": list(t.shape),
            "dtype": str(t.dtype),
            "spec": t.spec.key if isinstance(t, QuantTensor) else None,
            "container": t.container if isinstance(t, QuantTensor) else None,
        }
        for name, t in tensors.items()
    }
    (HERE / "format_v1.json").write_text(json.dumps(about, indent=1) + "\n")
    dense = {n: t.dequantize() if isinstance(t, QuantTensor) else t for n, t in tensors.items()}
    np.savez_compressed(HERE / "format_v1.npz", **{n: t.double().numpy() for n, t in dense.items()})


if __name__ == "__main__":
    main()
