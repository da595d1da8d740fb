"""What ranks do in the tests of tensor parallelism."""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.multiprocessing
from torch import distributed

TINY = Path(__file__).parents[2] / "recipes" / "assets" / "tiny-lm"
PRELOAD = [
    "torch.distributed.tensor",
    "transformers.generation",
    "transformers.models.llama.modeling_llama",
    "quantforge.llm",
]
SETTINGS: dict[str, Any] = {"sinks": 4, "window": 32, "page_size": 16}
CACHES: dict[str, dict[str, Any]] = {
    "growing": {},
    "head_bits": {"bits": 4, "head_bits": {1: 8, 2: (8, 2)}, "layers": {0: {"head_bits": {3: 6}}}},
    "static": {"max_cache_len": 512},
    "patched": {"bits": (8, 4)},
}
PROMPT, NEW = 300, 16


def four_heads(folder: Path) -> Path:
    """Write the model that ships with each of its two key heads twice, which computes the same."""
    weights = safetensors.torch.load_file(TINY / "model.safetensors")
    config = json.loads((TINY / "config.json").read_text())
    dim = config["head_dim"]
    for name, w in weights.items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            weights[name] = w.unflatten(0, (-1, dim)).repeat_interleave(2, 0).flatten(0, 1)
    folder.mkdir()
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 4}))
    return folder


def run_ranks(task: Callable[..., Any], world: int, folder: Path, *args: Any) -> list[Any]:
    """Return what `task(*args)` returned on each rank of a new group.

    Raises:
        ProcessRaisedException: of the first rank that failed; the others are ended.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # clean processes that are forked from one that has everything imported
    multiprocessing.set_forkserver_preload(PRELOAD)
    torch.multiprocessing.start_processes(
        _rank, (world, folder, task, args), nprocs=world, start_method="forkserver"
    )
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def _rank(rank: int, world: int, folder: Path, task: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    with _group(rank, world, folder):
        torch.save(task(*args), folder / f"{rank}.pt")


@contextmanager
def _group(rank: int, world: int, folder: Path) -> Iterator[None]:
    store = distributed.FileStore(str(folder / "store"), world)
    limit = datetime.timedelta(seconds=30)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
    yield
    distributed.destroy_process_group()  # not after an error: it would wait for the others


# ---- tasks --------------------------------------------------------------------------------------


def load(path: Path) -> Any:
    """Return the model, divided among the ranks."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    world = distributed.get_world_size()
    parallel = {}
    if world > 1:
        parallel = {"distributed_config": DistributedConfig(tp_plan="auto", tp_size=world)}
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **parallel)


def prompt() -> torch.Tensor:
    """Return (1, PROMPT) ids of source code."""
    from transformers import AutoTokenizer

    text = Path(datetime.__file__).with_name("textwrap.py").read_text("utf-8")
    return AutoTokenizer.from_pretrained(TINY)(text, return_tensors="pt").input_ids[:, :PROMPT]


def generate_all(path: Path) -> dict[str, Any]:
    """Return for each of CACHES the tokens, the margins of the choices, bytes, and codes."""
    from quantforge.llm import QuantForgeCache, patch_model

    model, ids, found = load(path), prompt(), {}
    for name, settings in CACHES.items():
        if name == "patched":
            with patch_model(model, **SETTINGS, **settings):
                out = generate(model, ids)
        else:
            cache = QuantForgeCache(model.config, **SETTINGS, **settings)
            out = generate(model, ids, past_key_values=cache)
        cache = out.past_key_values
        top = torch.cat(out.logits).topk(2).values
        held = [store.view().dequantize() for store in cache.layers[0]._stores()]
        found[name] = {
            "tokens": out.sequences[0, PROMPT:],
            "margin": float((top[:, 0] - top[:, 1]).min()),
            "nbytes": cache.nbytes,
            "layer": torch.stack(held),
        }
    return found


def generate(model: Any, ids: torch.Tensor, **kwargs: Any) -> Any:
    """Return what greedy decoding of NEW tokens returns, with logits."""
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        pad_token_id=1,
        output_logits=True,
        return_dict_in_generate=True,
        **kwargs,
    )


def errors(path: Path) -> list[str]:
    """Return what is said when a cache for the model is asked for."""
    from quantforge.errors import ConfigError
    from quantforge.llm import QuantForgeCache, patch_model

    model, said = load(path), []
    for ask in (
        lambda: QuantForgeCache(model.config),
        lambda: QuantForgeCache(model.config, max_cache_len=64),
        lambda: patch_model(model),
    ):
        try:
            ask()
        except ConfigError as error:
            said.append(str(error))
    return said


def nameless_heads(path: Path) -> str:
    """Return what is said of bits of heads when the cache does not know the model."""
    from quantforge.errors import ConfigError
    from quantforge.llm import QuantForgeCache

    cache = QuantForgeCache(head_bits={0: 8})
    try:
        load(path)(torch.arange(2, 8)[None], past_key_values=cache)
    except ConfigError as error:
        return str(error)
    return ""


def one_fails(path: Path) -> None:
    """Decode, with a cache on the last rank that is too short."""
    from quantforge.llm import QuantForgeCache

    model, last = load(path), distributed.get_rank() == distributed.get_world_size() - 1
    cache = QuantForgeCache(model.config, max_cache_len=8 if last else 512, **SETTINGS)
    generate(model, prompt(), past_key_values=cache)
