"""Attention over a packed memory in a plain PyTorch module: no transformers, no cache.

`PackedMemoryAttention` projects a memory once, keeps its keys and values as packed buffers, and
attends to them with `F.scaled_dot_product_attention`, which reads the codes. Prints, for 8, 4, 3
and 2 bits, the bytes of the memory and the relative error of outputs against 32 bits.
Asserted: more bits err less, 4 bits err below 0.15 (rms) at 7 times fewer bytes, and a module
that loads the `state_dict` of another one gives equal outputs.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from torch import nn

from quantforge import QuantForgeConfig, QuantTensor


class PackedMemoryAttention(nn.Module):
    """Cross-attention to a memory (B, n, width) that `remember` was given."""

    def __init__(self, width: int, heads: int, config: QuantForgeConfig | None) -> None:
        super().__init__()
        self.heads, self.config = heads, config
        self.query, self.key, self.value, self.output = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.register_buffer("keys", None)
        self.register_buffer("values", None)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, n, width) as (B, heads, n, width / heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    @torch.no_grad()
    def remember(self, memory: torch.Tensor) -> None:
        """Project a memory and keep it, packed if there is a config."""
        keys, values = self.split(self.key(memory)), self.split(self.value(memory))
        if self.config is not None:
            keys = QuantTensor.quantize(keys, self.config)
            values = QuantTensor.quantize(values, self.config)
        self.keys, self.values = keys, values

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, q, width) for queries of that shape."""
        out = F.scaled_dot_product_attention(self.split(self.query(x)), self.keys, self.values)
        return self.output(out.transpose(1, 2).flatten(2))

    @property
    def memory_bytes(self) -> int:
        """Bytes of keys and values."""
        return sum(
            t.nbytes_packed if isinstance(t, QuantTensor) else t.nbytes
            for t in (self.keys, self.values)
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16_384, help="of the memory")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="1,000 tokens")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokens = 1000 if args.small else args.tokens
    memory = torch.randn(2, tokens, args.width, device=args.device)
    # each query asks for one row of the memory, so that attention has something to find
    x = 4 * memory[:, :: tokens // 16] + torch.randn_like(memory[:, :: tokens // 16])

    dense = PackedMemoryAttention(args.width, args.heads, None).to(args.device)
    with torch.no_grad():
        dense.key.weight.copy_(dense.query.weight)  # like attends to like
        dense.query.weight.mul_(3)
        dense.key.weight.mul_(3)
    dense.remember(memory)
    weights = {name: p for name, p in dense.state_dict().items() if name.endswith("weight")}
    print(f"{tokens} tokens, {args.heads} heads of {args.width // args.heads}, {args.device}\n")
    print(f"{'bits':>4} {'KiB':>8} {'ratio':>6} {'rms error':>10} {'ms':>7}")
    errors = []
    with torch.inference_mode():
        expected = dense(x)
    for bits in (None, 8, 4, 3, 2):
        config = None if bits is None else QuantForgeConfig(bits=bits, seed=args.seed)
        module = PackedMemoryAttention(args.width, args.heads, config).to(args.device)
        module.load_state_dict(weights, strict=False)
        module.remember(memory)
        with torch.inference_mode():
            start = time.perf_counter()
            out = module(x)
            seconds = time.perf_counter() - start
        error = ((out - expected).square().sum() / expected.square().sum()).sqrt().item()
        ratio = dense.memory_bytes / module.memory_bytes
        print(f"{bits or 32:4d} {module.memory_bytes / 1024:8.0f} {ratio:5.1f}x {error:10.4f} "
              f"{1e3 * seconds:7.2f}")  # fmt: skip
        errors.append(error)
        if bits == 4:
            assert error < 0.15, f"4 bits err by {error}"
            assert ratio > 7, f"4 bits save a factor of {ratio}"
            twin = PackedMemoryAttention(args.width, args.heads, config).to(args.device)
            twin.remember(torch.zeros_like(memory))
            twin.load_state_dict(module.state_dict())
            with torch.inference_mode():
                assert torch.equal(twin(x), out), "a loaded module gives other outputs"
    assert errors == sorted(errors), f"more bits do not err less: {errors}"


if __name__ == "__main__":
    main()
