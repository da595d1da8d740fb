"""vLLM with the packed cache, end to end: `make test-vllm` builds its environment and runs this.

What vLLM writes is compared, token by token, with transformers and a cache that stores what the
same codes stand for. Not part of the default tests: vLLM is large, and each engine takes a minute.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    OMP_NUM_THREADS="1",
    VLLM_LOGGING_LEVEL="WARNING",
)

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from quantforge.errors import UnsupportedError
from quantforge.ops.dequantize.api import dequantize
from quantforge.ops.quantize.api import quantize
from quantforge.vllm import Settings, check, options
from quantforge.vllm.pages import Statistics
from quantforge.vllm.statistics import load_layer, measure_statistics

MODEL = Path(__file__).parents[2] / "recipes/assets/tiny-lm"
NEW_TOKENS = 32
NEAR_TIE = 0.1
MEMORY = 64 << 20
TEXTS = [
    "for i in range(",
    "class A:\n    def __init__(self, name):\n        self.name = name\n",
    Path(json.__file__).read_text()[:1500],
]
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="session")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    return [tokenizer(text).input_ids for text in TEXTS]


@pytest.fixture(scope="session")
def statistics_file(model, prompts, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("statistics") / "tiny-lm.safetensors"
    measure_statistics(model, torch.tensor([prompts[2]]), path)
    return str(path)


class CodedCache(DynamicCache):
    """Stores what the codes of keys and values stand for; new tokens meet each other exactly."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        bits = self.settings.of_layer(layer_idx)
        specs = self.settings.specs(key_states.shape[-1], value_states.shape[-1], bits)
        statistics = Statistics()
        if self.settings.statistics is not None:
            heads = slice(0, key_states.shape[1])
            statistics = load_layer(self.settings.statistics, layer_idx, heads, torch.device("cpu"))
        held = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        old = (held.keys, held.values) if held is not None and held.is_initialized else None
        coded = []
        for x, spec, (shift, equalizer) in zip(
            (key_states, value_states), specs, (statistics[:2], statistics[2:]), strict=True
        ):
            names = {"shift": shift, "equalizer": equalizer}
            coded.append(dequantize(*quantize(x, spec, **names), spec, **names))
        super().update(*coded, layer_idx, *args, **kwargs)
        if old is None:
            return key_states, value_states
        seen = zip(old, (key_states, value_states), strict=True)
        return tuple(torch.cat([before, new], 2) for before, new in seen)


def expected(model, prompt: list[int], settings: Settings, parts: list[int]) -> list[int]:
    """Return greedy tokens after a prompt that is read in parts of these lengths.

    They end before the first one that is nearly a tie: rounding in another order turns a code over
    now and then, which moves logits by some hundredths.
    """
    assert sum(parts) == len(prompt)
    cache, start, found = CodedCache(settings), 0, []
    with torch.inference_mode():
        for n in parts:
            ids = torch.tensor([prompt[start : start + n]])
            logits = model(ids, past_key_values=cache).logits[0, -1]
            start += n
        for _ in range(NEW_TOKENS):
            best, second = logits.topk(2).values
            if best - second < NEAR_TIE:
                break
            found.append(int(logits.argmax()))
            logits = model(torch.tensor([[found[-1]]]), past_key_values=cache).logits[0, -1]
    assert len(found) >= 8, "the prompt is no test: take another one"
    return found


def assert_starts_with(output, wanted: list[int]) -> None:
    tokens = list(output.outputs[0].token_ids)
    assert len(tokens) == NEW_TOKENS
    assert tokens[: len(wanted)] == wanted


def start(**arguments):
    from vllm import LLM

    settled = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "max_num_seqs": 4}
    memory = {"kv_cache_memory_bytes": MEMORY, "enable_prefix_caching": False}
    return LLM(str(MODEL), **settled | memory | arguments)


def generated(llm, prompts: list[list[int]]):
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    return llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)


def test_tokens_are_those_of_the_codes_and_the_cache_holds_more(model, prompts) -> None:
    llm = start(**options("cpu", bits=4))
    report = check(llm)
    assert report.ratio >= 3.5
    assert set(report.bits.values()) == {(4, 4)}
    assert 0.98 * MEMORY <= report.tokens * report.token_bytes <= MEMORY
    outputs = generated(llm, prompts)
    for prompt, output in zip(prompts, outputs, strict=True):
        wanted = expected(model, prompt, Settings(bits=4), [len(prompt)])
        assert_starts_with(output, wanted)


def test_chunks_shared_prefixes_and_statistics(model, prompts, statistics_file) -> None:
    chunk = 64
    settings = {"bits": (4, 3), "statistics": statistics_file}
    llm = start(
        **options("cpu", **settings),
        enable_prefix_caching=True,
        max_num_batched_tokens=chunk,
        block_size=32,
    )
    assert set(check(llm).bits.values()) == {(4, 3)}
    prompt = prompts[2]

    def parts(n: int) -> list[int]:
        return [chunk] * (n // chunk) + [n % chunk] * (n % chunk > 0)

    for n_cached in (0, len(prompt) // 32 * 32):
        output = generated(llm, [prompt])[0]
        assert output.num_cached_tokens == n_cached
        # shared blocks are read as codes: in parts as small as they were stored
        read = parts(n_cached) + parts(len(prompt) - n_cached)
        wanted = expected(model, prompt, Settings(**settings), read)
        assert_starts_with(output, wanted)


def test_two_ranks_and_bits_by_layer(model, prompts, statistics_file, monkeypatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    settings = {"bits": 4, "layers": {0: 8, 4: (8, 4)}, "statistics": statistics_file}
    llm = start(**options("cpu", **settings), tensor_parallel_size=2)
    report = check(llm)
    assert [report.bits[name] for name in sorted(report.bits)] == [
        (8, 8),
        (4, 4),
        (4, 4),
        (4, 4),
        (8, 4),
    ]
    for prompt, output in zip(prompts, generated(llm, prompts), strict=True):
        wanted = expected(model, prompt, Settings(**settings), [len(prompt)])
        assert_starts_with(output, wanted)


def test_without_settings_vllm_is_as_it_was(model, prompts) -> None:
    llm = start()
    with pytest.raises(UnsupportedError, match="options"):
        check(llm)
    output = generated(llm, prompts[:1])[0]
    with torch.inference_mode():
        ids = torch.tensor(prompts[:1])
        plain = model.generate(ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
                               do_sample=False, pad_token_id=1)  # fmt: skip
    assert list(output.outputs[0].token_ids) == plain[0, ids.shape[1] :].tolist()


def test_a_worker_without_the_plugin_does_not_start(tmp_path) -> None:
    code = (
        "from tests.vllm.engine import start, options\n"
        "if __name__ == '__main__': start(**options('cpu', bits=4))\n"
    )
    script = tmp_path / "start.py"
    script.write_text(code)
    environment = {
        **os.environ,
        "VLLM_PLUGINS": "another",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode != 0
    assert "has not loaded quantforge's plugin" in done.stdout + done.stderr


def test_the_openai_server(model, prompts, tmp_path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    chosen = options("cpu", bits=4)
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(MODEL)),
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", "1024"),
        *("--kv-cache-memory-bytes", str(MEMORY), "--port", str(port)),
        *("--additional-config", json.dumps(chosen["additional_config"])),
        *("--worker-extension-cls", chosen["worker_extension_cls"]),
    ]
    log = tmp_path / "log"
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=tmp_path)
    try:
        body = {"model": str(MODEL), "prompt": prompts[0], "max_tokens": NEW_TOKENS}
        body |= {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
        answer = post(f"http://127.0.0.1:{port}/v1/completions", body, server, log)
    finally:
        server.terminate()
        server.wait(60)
    wanted = expected(model, prompts[0], Settings(bits=4), [len(prompts[0])])
    assert answer["choices"][0]["token_ids"][: len(wanted)] == wanted


def post(url: str, body: dict, server: subprocess.Popen, log: Path) -> dict:
    """Ask the server as soon as it answers, for five minutes."""
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    for _ in range(300):
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(request, timeout=240) as response:
                return json.load(response)
        except urllib.error.URLError:
            time.sleep(1)
    raise AssertionError(log.read_text()[-3000:])
