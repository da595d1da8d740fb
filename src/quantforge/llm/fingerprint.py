"""A short text that tells models apart, and so says whose keys and values a file holds."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from quantforge.errors import InputError

SAMPLES = 16
"""Numbers of each weight that count, evenly spaced."""


def fingerprint(model: Any) -> str:
    """Return 32 hexadecimal digits made of the names, shapes and some numbers of all weights.

    Numbers count as bfloat16, so a model has one fingerprint in float32, float16 and bfloat16,
    wherever they hold the same checkpoint. Adapters and fine-tuning change it.

    Raises:
        InputError: for weights without data (offloaded by accelerate, or on the meta device).

    Cost: reads 16 numbers of each weight.
    """
    digest = hashlib.sha256()
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    order = []
    for name, weight in getattr(model, "_orig_mod", model).named_parameters():
        if weight.device.type == "meta":
            raise InputError(
                f"the weight {name!r} is offloaded and cannot be read for a fingerprint; leave out "
                "model=, or compute it before offloading"
            )
        digest.update(f"{name} {tuple(weight.shape)}\n".encode())
        if weight.is_floating_point() and weight.numel():
            flat = weight.detach().reshape(-1)
            picked = flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES]
            samples = by_device.setdefault(weight.device, [])
            order.append((weight.device, len(samples)))
            samples.append(picked.to(torch.bfloat16))
    read = {device: _read(samples) for device, samples in by_device.items()}
    for device, index in order:  # the same wherever the layers are
        digest.update(read[device][index])
    return digest.hexdigest()[:32]


def _read(samples: list[torch.Tensor]) -> list[bytes]:
    """Return the bytes of tensors of one device, fetched in one transfer."""
    joined = torch.cat(samples).cpu()
    return [t.view(torch.uint8).numpy().tobytes() for t in joined.split([len(t) for t in samples])]
