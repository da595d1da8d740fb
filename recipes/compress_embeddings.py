"""Compress embeddings from .npy, .npz or .safetensors into a quantforge file, and measure the loss.

    python recipes/compress_embeddings.py embeddings.npy --bits 4 --output embeddings.safetensors

Every float array of two or more axes is compressed with its last axis as vectors; the rest is
kept as it is. The claims, asserted: the relative squared error of each array is what theory says
for random rotations, and the bytes are `bits / 32` of float32 plus the stored scales. `--small`
makes its own data: words of the standard library's docstrings hashed into vectors.
"""

import argparse
import importlib
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch

from quantforge import QuantForgeConfig, QuantPipeline, QuantTensor, load_file, save_file
from quantforge.numerics.lloyd_max import distortion, solve

MODULES = ("argparse", "ast", "asyncio", "collections", "csv", "datetime", "decimal", "difflib",
           "email", "fractions", "functools", "heapq", "http", "inspect", "json", "logging",
           "math", "os", "pathlib", "random", "re", "shutil", "socket", "sqlite3", "statistics",
           "string", "subprocess", "tarfile", "tempfile", "textwrap", "threading",
           "unittest", "urllib.request", "uuid", "zipfile")  # fmt: skip
SAMPLE = 10_000  # vectors that errors and recall are measured on
QUERIES = 100


def hashed_docstrings(dim: int) -> np.ndarray:
    """One vector per docstring: the sum of one Gaussian vector per different word, by its CRC."""
    texts = set()
    for module in map(importlib.import_module, MODULES):
        for thing in vars(module).values():
            members = vars(thing).values() if isinstance(thing, type) else ()
            texts |= {t.__doc__ for t in (thing, *members) if isinstance(t.__doc__, str)}
    words = [sorted(set(text.split())) for text in sorted(texts) if len(text) > 80]
    vectors = np.random.RandomState(0).standard_normal((4096, dim)).astype(np.float32)
    return np.stack([vectors[[zlib.crc32(w.encode()) % 4096 for w in ws]].sum(0) for ws in words])


def read(path: Path) -> dict[str, torch.Tensor]:
    """Read every array of a file; .npy and .safetensors stay on disk until they are used."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file as load_plain

        return load_plain(path)
    loaded = np.load(path, mmap_mode="c" if path.suffix == ".npy" else None)
    arrays = {path.stem: loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def expected_error(bits: int) -> float:
    """Relative squared error of Lloyd-Max codes with the unbiased scale: D / (1 - D)."""
    d = distortion(solve(bits))
    return d / (1 - d)


def recall_at_10(x: torch.Tensor, q: QuantTensor, seed: int) -> float:
    """Share of the ten best by exact inner product that the scores of packed codes find."""
    picked = torch.from_numpy(np.random.RandomState(seed).permutation(len(x))[:QUERIES])
    queries = x[picked.to(x.device)]
    k = min(10, len(x))
    exact = (queries @ x.T).topk(k).indices
    found = (queries @ q.mT).topk(k).indices
    return (exact[:, :, None] == found[:, None]).any(-1).float().mean().item()


def measure(x: torch.Tensor, q: QuantTensor, args: argparse.Namespace) -> list[float]:
    """Relative squared error, the same by theory, and recall@10, of the first vectors."""
    dim = x.shape[-1]
    rows = slice(0, SAMPLE)
    x = x.reshape(-1, dim)[rows].to(args.device, torch.float32)
    q = q.reshape(-1, dim)[rows].to(args.device).to(torch.float32)
    error = ((x - q.dequantize()).square().sum() / x.square().sum()).item()
    return [error, expected_error(args.bits), recall_at_10(x, q, args.seed)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("input", nargs="?", type=Path, help=".npy, .npz or .safetensors")
    parser.add_argument("--bits", type=int, default=4, choices=range(1, 9))
    parser.add_argument("--seed", type=int, default=0, help="of the rotation")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="make the data; seconds on a CPU")
    parser.add_argument("--output", type=Path, help="default: <input>.quantforge.safetensors")
    args = parser.parse_args(argv)
    if args.small == (args.input is not None):
        parser.error("give an input file or --small")
    if args.small:
        tensors = {"docstrings": torch.from_numpy(hashed_docstrings(dim=256))}
        default = Path(tempfile.gettempdir(), "docstrings.quantforge.safetensors")
    else:
        tensors, default = read(args.input), args.input.with_suffix(".quantforge.safetensors")
    output = args.output or default
    config = QuantForgeConfig(bits=args.bits, seed=args.seed)

    packed = {}
    for name, x in tensors.items():
        packed[name] = x
        if x.is_floating_point() and x.ndim > 1 and x.numel():
            pipeline = QuantPipeline(x.shape[-1], config)
            packed[name] = pipeline.compress(x.to(args.device)).cpu()
    save_file(packed, output, metadata={"made by": "recipes/compress_embeddings.py"})

    print("| array | bytes before | after | ratio | relative MSE | theory | recall@10 |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, q in load_file(output).items():
        if not isinstance(q, QuantTensor):
            continue
        before, after = tensors[name].nbytes, q.nbytes_packed
        error, theory, recall = measure(tensors[name], q, args)
        print(f"| {name} | {before:,} | {after:,} | {before / after:.2f} | {error:.5f} | "
              f"{theory:.5f} | {recall:.3f} |")  # fmt: skip
        dim, count = q.shape[-1], q.numel() // q.shape[-1]
        assert after <= count * (dim * args.bits / 8 + 14), "more bytes than codes and scale take"
        if min(dim, count) >= 64 and error > 0:  # theory is about many coordinates, and not zeros
            spread = 0.05 if args.small else 0.05 + 4 / dim**0.5  # if all vectors are parallel
            assert abs(error / theory - 1) < spread, f"{name}: {error}, but theory says {theory}"
    print(f"\n{output}: {output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
