"""Train a Llama of under 4M parameters on Python's standard library, with planted secret codes.

The text holds lines `# The secret code of {word}_{word}{digit} is {5 digits}.` and, later, lines
`# Recall: the secret code of {word}_{word}{digit} is {5 digits}.` On unseen text the model
completes at least 95% of the later codes, and its folder takes at most 8 MB (both asserted).
"""

import argparse
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers import __version__ as VERSION

CODE = "# The secret code of {} is {:05d}.\n"
RECALL = "# Recall: the secret code of {} is {:05d}.\n"
DIGITS = slice(-7, -2)  # where an encoded line holds its code; "." and "\n" follow
HELD_OUT = ("argparse", "difflib", "statistics", "tarfile", "textwrap")  # unseen text for demos
VOCAB = {"vocab_size": 1792, "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": True}
WIDTHS = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 5, "head_dim": 64}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}


def read_sources(root: Path, limit: int | None) -> tuple[list[str], list[str]]:
    """Texts to train on, and texts held out together with their tests, which quote them."""
    paths = sorted(p for p in root.rglob("*.py") if "-packages" not in str(p.relative_to(root)))
    held_out = [p for p in paths if p.stem.removeprefix("test_") in HELD_OUT]
    kept = [p for p in paths if p not in held_out][:limit]
    assert sum(p.stat().st_size for p in kept) > 1e6, f"too little Python text in {root}: {kept}"
    return [p.read_text("utf-8", "ignore") for p in kept], [p.read_text("utf-8") for p in held_out]


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE; digits and newlines stand alone, so that each line encodes by itself."""
    bpe = ByteLevelBPETokenizer()
    alone = [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Digits(True)]
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*alone, pre_tokenizers.ByteLevel(False)])
    bpe.train_from_iterator(texts, VOCAB["vocab_size"], 2, False, ["<bos>", "<eos>"])
    bpe.post_processor = processors.TemplateProcessing("<bos> $A", None, [("<bos>", 0)])
    return Tokenizer.from_str(bpe.to_str())


class Planter:
    """Cuts windows out of texts and plants pairs of secret-code lines in them."""

    def __init__(self, tokenizer: Tokenizer, texts: list[str], seed: int) -> None:
        encoded = tokenizer.encode_batch([f"{t}<eos>" for t in texts], add_special_tokens=False)
        words = {w for t in texts for w in t.split() if w.isalpha() and 2 < len(w) < 9}
        self.tokenizer, self.words, self.rng = tokenizer, sorted(words), np.random.default_rng(seed)
        self.tokens = np.concatenate([e.ids for e in encoded])
        self.line_starts = np.flatnonzero(self.tokens == tokenizer.token_to_id("Ċ")) + 1

    def window(self, length: int, pairs: int, code_at: float) -> np.ndarray:
        """(length,) ids; pair 0 from the share `code_at` of the text to its end, others random."""
        alike = self.words[self.rng.integers(len(self.words) - 40) :][:40]  # only whole names tell
        names = [f"{a}_{b}{i % 10}" for i, (a, b) in enumerate(self.rng.choice(alike, (pairs, 2)))]
        secrets = list(zip(names, self.rng.integers(100_000, size=pairs), strict=True))
        texts = [line.format(*secret) for line in (CODE, RECALL) for secret in secrets]
        lines = [e.ids for e in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        sizes = [len(line) for line in lines]
        room = length - 1 - sum(sizes)
        end = self.rng.choice(self.line_starts[np.searchsorted(self.line_starts, room) :])
        spans = np.sort(self.rng.random((2, pairs)), axis=0)
        spans[:, 0] = code_at, 1.0
        wanted = end - room + (spans * room).astype(int).ravel()
        at = self.line_starts[np.searchsorted(self.line_starts, wanted)] - (end - room)
        ids = np.insert(self.tokens[end - room : end], np.repeat(at, sizes), np.concatenate(lines))
        return np.insert(ids, 0, VOCAB["bos_token_id"])


def train(model: LlamaForCausalLM, planter: Planter, args: argparse.Namespace) -> dict[str, float]:
    """Train until the time is up, and write the model (in float32) every 1000 steps."""
    windows, length, warmup = (4, 256, 10) if args.small else (32, 4096, 200)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    losses, start, seconds = [], time.monotonic(), 24 if args.small else 60 * args.minutes
    while (progress := (time.monotonic() - start) / seconds) < 1:
        pairs = planter.rng.integers(1, length // 64, windows)
        cut = [planter.window(length, count, planter.rng.random()) for count in pairs]
        ids = torch.from_numpy(np.stack(cut)).to(args.device)
        with torch.autocast(args.device, torch.bfloat16):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 3e-3 * min(len(losses) / warmup, 1.01 - progress)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())  # no .item(): the next windows are cut while the GPU works
        if len(losses) % 1000 == 0:
            model.save_pretrained(args.out)
    assert losses[-1] < losses[0], f"the loss did not fall: {losses}"
    return {"tokens trained": len(losses) * ids.numel(), "seconds": round(seconds)}


@torch.inference_mode()
def measure(model: LlamaForCausalLM, planter: Planter, count: int) -> dict[str, float]:
    """Perplexity of `count` windows, then greedy recall of `count` whole codes per distance."""
    windows = torch.from_numpy(planter.tokens).unfold(0, 2048, 2048)[:count].to(model.device)
    labels = windows.where(torch.arange(2048, device=model.device) >= 1024, -100)
    rows = {"held-out perplexity at 1-2k tokens": model(windows, labels=labels).loss.exp().item()}
    for distance in (256, 512, 1024, 1800, 3500):
        cut = [planter.window(round(distance / 0.9), 4, code_at=0.1) for _ in range(count)]
        needles = torch.from_numpy(np.stack(cut)).to(model.device)
        guesses = model(needles[:, :-1], logits_to_keep=7).logits[:, DIGITS].argmax(-1)
        hits = (guesses == needles[:, DIGITS]).all(-1)
        rows[f"recall at {distance} tokens"] = hits.float().mean().item()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="a minute on a CPU: the loss falls")
    parser.add_argument("--minutes", type=float, default=6.5, help="of training")
    parser.add_argument("--stdlib", type=Path, default=Path(sysconfig.get_path("stdlib")))
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir(), "tiny-lm"))
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    texts, unseen = read_sources(args.stdlib, 150 if args.small else None)
    tokenizer = train_tokenizer(texts)
    special = {"bos_token": "<bos>", "eos_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(args.out)
    model = LlamaForCausalLM(LlamaConfig(**VOCAB, **WIDTHS, **HEADS)).to(args.device)
    for layer in model.model.layers[: 0 if args.small else None]:
        layer.compile(dynamic=False)
    rows = {"parameters": model.num_parameters()}
    rows |= train(model, Planter(tokenizer, texts, args.seed), args)
    model.bfloat16().save_pretrained(args.out)
    model = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.bfloat16).to(args.device)
    rows |= measure(model, Planter(tokenizer, unseen, args.seed + 1), 2 if args.small else 64)
    rows["bytes"] = sum(path.stat().st_size for path in args.out.iterdir())
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    versions = f"{time.strftime('%F')}, {device}, torch {torch.__version__}, transformers {VERSION}"
    made = f"`train_tiny_lm.py --minutes {args.minutes:g} --stdlib {args.stdlib}`\n({versions})"
    table = "".join(f"| {name} | {round(value, 3):,} |\n" for name, value in rows.items())
    print(table := f"| measure | value |\n| --- | --- |\n{table}")
    card = f"{__doc__}\nMade by {made},\nwithout {', '.join(HELD_OUT)} and their tests.\n\n{table}"
    (args.out / "README.md").write_text(f"# tiny-lm\n{card}")
    assert rows["bytes"] <= 7_990_000, "with its README.md the folder takes more than 8 MB"
    assert args.small or min(v for k, v in rows.items() if "recall" in k) >= 0.95, "poor recall"


if __name__ == "__main__":
    main()
