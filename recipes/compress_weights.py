"""Compress the embedding table of a model's safetensors file, and run the model on the codes.

The other tensors of the file stay as they are. The table is put back as a module that looks rows up
and, where the model ties its head to it, multiplies by it: both on the codes. Prints bytes, error,
and what the next-token distributions lose for 8, 4, 3 and 2 bits. Asserted: the error of the table
is what theory says, the file shrinks by what the table does, and with the shipped model 4 bits
leave a KL below 0.05.
`--small` uses the tiny model that ships with quantforge.

    python recipes/compress_weights.py path/to/checkpoint --output compressed.safetensors
"""

from __future__ import annotations

import argparse
import sysconfig
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file as load_plain
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from quantforge import QuantForgeConfig, QuantTensor, load_file, save_file
from quantforge.numerics.lloyd_max import distortion, solve

TINY = Path(__file__).parent / "assets" / "tiny-lm"


class PackedEmbedding(torch.nn.Module):
    """`nn.Embedding` whose table is packed: the rows that are asked for are decoded."""

    def __init__(self, table: QuantTensor) -> None:
        super().__init__()
        self.register_buffer("table", table)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return rows (*ids.shape, width)."""
        return self.table[ids].dequantize()


class PackedHead(torch.nn.Module):
    """The tied output layer: logits from the same codes, which are never decoded in full."""

    def __init__(self, embedding: PackedEmbedding) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits (..., vocabulary)."""
        return F.linear(hidden, self.embedding.table)


def expected_error(bits: int) -> float:
    """Relative squared error of Lloyd-Max codes with the unbiased scale: D / (1 - D)."""
    d = distortion(solve(bits))
    return d / (1 - d)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, help="a folder with model.safetensors")
    parser.add_argument("--output", type=Path, help="where the 4-bit file goes")
    parser.add_argument("--text", type=Path, help="to measure on; default: source of textwrap")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0, help="of the rotation")
    parser.add_argument("--small", action="store_true", help="the shipped model, 256 tokens")
    args = parser.parse_args()
    logging.disable_progress_bar()
    path = TINY if args.small or args.model is None else args.model
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(args.device)
    source = args.text or Path(sysconfig.get_path("stdlib")) / "textwrap.py"
    ids = tokenizer(source.read_text("utf-8")[:20_000], return_tensors="pt").input_ids
    ids = ids[:, : 256 if args.small else 2048].to(args.device)
    with torch.no_grad():
        expected = model(ids).logits.log_softmax(-1)

    tensors = load_plain(path / "model.safetensors")
    embedding = model.get_input_embeddings()
    tied = model.get_output_embeddings().weight is embedding.weight
    (name,) = [n for n in tensors if n.endswith("embed_tokens.weight")]
    table, before = tensors[name].float().to(args.device), (path / "model.safetensors").stat()
    print(f"{name} {tuple(table.shape)}, {tensors[name].nbytes / 1024:.0f} KiB of "
          f"{before.st_size / 1024:.0f}; output layer {'tied' if tied else 'apart'}\n")  # fmt: skip
    print(
        f"{'bits':>4} {'table KiB':>10} {'file KiB':>9} {'error':>8} {'theory':>8} {'KL':>8} top-1"
    )
    with tempfile.TemporaryDirectory() as folder:
        for bits in (8, 4, 3, 2):
            chosen = args.output is not None and bits == 4
            file = args.output if chosen else Path(folder) / f"{bits}.safetensors"
            config = QuantForgeConfig(bits=bits, seed=args.seed)
            save_file({**tensors, name: QuantTensor.quantize(table, config)}, file)
            packed = load_file(file)[name].to(args.device)
            assert isinstance(packed, QuantTensor)
            error = ((packed.dequantize() - table).square().sum() / table.square().sum()).item()
            module = PackedEmbedding(packed)
            model.set_input_embeddings(module)
            if tied:
                model.set_output_embeddings(PackedHead(module))
            with torch.no_grad():
                got = model(ids).logits.log_softmax(-1)
            kl = F.kl_div(got, expected, log_target=True, reduction="none").sum(-1).mean().item()
            top1 = (got.argmax(-1) == expected.argmax(-1)).float().mean().item()
            size = file.stat().st_size
            print(f"{bits:4d} {packed.nbytes_packed / 1024:10.0f} {size / 1024:9.0f} {error:8.5f} "
                  f"{expected_error(bits):8.5f} {kl:8.5f} {top1:.3f}")  # fmt: skip
            assert abs(error / expected_error(bits) - 1) < 0.1, "the error is not theory's"
            saved = tensors[name].nbytes - packed.nbytes_packed
            assert abs(before.st_size - size - saved) < 8192, "the file does not shrink by as much"
            assert path != TINY or bits < 4 or kl < 0.05, f"{bits} bits cost a KL of {kl}"


if __name__ == "__main__":
    main()
