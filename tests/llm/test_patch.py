"""Patched models make quantized caches by themselves, and unpatched ones are as they were."""

from __future__ import annotations

import copy
import pickle
import types
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DynamicCache,
    MambaConfig,
    MambaForCausalLM,
    StaticCache,
    pipeline,
)

from quantforge import QuantForgeCache
from quantforge.errors import ConfigError, InputError, UnsupportedError
from quantforge.llm import patch_model, unpatch_model
from quantforge.llm.segments import SegmentedTensor
from tests.llm.models import SETTINGS, random_model

TINY = Path(__file__).parents[2] / "recipes" / "assets" / "tiny-lm"
IDS = torch.randint(2, 128, (1, 60), generator=torch.Generator().manual_seed(1))
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
PHI: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "eos_token_id": None,
}


def generate(model: Any, **kwargs: Any) -> Any:
    mask = torch.ones_like(IDS)
    return model.generate(
        IDS, attention_mask=mask, return_dict_in_generate=True, **(GREEDY | kwargs)
    )


def expected_tokens(model: Any, **settings: Any) -> torch.Tensor:
    """Return what the model says with a cache that is passed in."""
    cache = QuantForgeCache(model.config, **(SETTINGS | settings))
    return generate(model, past_key_values=cache).sequences


def state_of(model: Any) -> dict[int, Any]:
    """Return everything on every module that is not a parameter, buffer or module."""
    return {
        id(module): {
            name: dict(value) if isinstance(value, dict) else value
            for name, value in vars(module).items()
            if name not in ("_parameters", "_buffers", "_modules")
        }
        for module in model.modules()
    }


def assert_ours(out: Any, model: Any) -> None:
    assert isinstance(out.past_key_values, QuantForgeCache)
    assert any(isinstance(layer.keys, SegmentedTensor) for layer in out.past_key_values.layers)
    assert torch.equal(out.sequences, expected_tokens(model))


@pytest.fixture
def llama() -> Any:
    return random_model("llama")


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "phi3", "gemma2", "gemma3_text", "qwen2", "qwen3"]
)
def test_families(family: str) -> None:
    model = random_model(family, "eager" if family == "gemma2" else "sdpa")
    before = generate(model).sequences
    state = state_of(model)
    with patch_model(model, **SETTINGS) as patched:
        assert patched is model
        assert_ours(generate(model), model)
    assert state_of(model) == state
    after = generate(model)
    assert torch.equal(after.sequences, before)
    assert type(after.past_key_values) is DynamicCache


def test_phi() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("phi", **PHI)).eval()
    with patch_model(model, **SETTINGS):
        assert_ours(generate(model), model)


def test_patch_holds_until_unpatch(llama: Any) -> None:
    state, parameters = state_of(llama), list(llama.state_dict())
    config, kind = llama.config.to_dict(), type(llama)
    patch_model(llama, **SETTINGS)
    assert_ours(generate(llama), llama)
    assert type(llama) is kind
    assert list(llama.state_dict()) == parameters
    assert llama.config.to_dict() == config
    unpatch_model(llama)
    assert state_of(llama) == state
    unpatch_model(llama)  # nothing to do


def test_settings_differ_by_layer(llama: Any) -> None:
    with patch_model(llama, layers={1: {"bits": (8, 2)}}, **SETTINGS):
        cache = generate(llama).past_key_values
    bits = [(layer.keys.packed.spec.bits, layer.values.packed.spec.bits) for layer in cache.layers]
    assert bits == [(4, 4), (8, 2)]


def test_patches_nest_and_end_in_any_order(llama: Any) -> None:
    def window() -> int:
        return generate(llama).past_key_values.options.window

    state = state_of(llama)
    outer = patch_model(llama, window=32)
    inner = patch_model(llama, window=8)
    assert window() == 8
    inner.remove()
    inner.remove()
    assert window() == 32
    inner = patch_model(llama, window=8)
    outer.remove()
    assert window() == 8
    inner.remove()
    assert state_of(llama) == state
    patch_model(llama), patch_model(llama)
    unpatch_model(llama)
    assert state_of(llama) == state


def test_a_context_ends_with_an_exception(llama: Any) -> None:
    state = state_of(llama)
    with pytest.raises(RuntimeError, match="stop"), patch_model(llama):
        raise RuntimeError("stop")
    assert state_of(llama) == state


def test_what_the_caller_asks_for_is_respected(llama: Any) -> None:
    own = DynamicCache(config=llama.config)
    with patch_model(llama, **SETTINGS):
        assert generate(llama, past_key_values=own).past_key_values is own
        static = generate(llama, cache_implementation="static").past_key_values
        assert isinstance(static, StaticCache)
        offloaded = generate(llama, use_cache=False)
        assert offloaded.past_key_values is None


def test_names_in_old_checkpoints_are_no_request(llama: Any) -> None:
    llama.generation_config.cache_implementation = "hybrid"
    with patch_model(llama, **SETTINGS):
        assert isinstance(generate(llama).past_key_values, QuantForgeCache)
    assert llama.generation_config.cache_implementation == "hybrid"


@pytest.mark.parametrize("arguments", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_modes_of_generation(llama: Any, arguments: dict[str, Any]) -> None:
    expected = generate(
        llama, past_key_values=QuantForgeCache(llama.config, **SETTINGS), **arguments
    )
    with patch_model(llama, **SETTINGS):
        out = generate(llama, **arguments)
    assert isinstance(out.past_key_values, QuantForgeCache)
    assert torch.equal(out.sequences, expected.sequences)


def test_patched_assistant(llama: Any) -> None:
    assistant = random_model("llama", num_hidden_layers=1)
    with patch_model(assistant, **SETTINGS):
        cache = QuantForgeCache(llama.config, **SETTINGS)
        expected = generate(llama, assistant_model=assistant, past_key_values=cache)
        with patch_model(llama, **SETTINGS):
            out = generate(llama, assistant_model=assistant)
    assert isinstance(out.past_key_values, QuantForgeCache)
    assert torch.equal(out.sequences, expected.sequences)


class TestForward:
    """Plain calls."""

    def test_makes_a_cache_where_the_model_would(self, llama: Any) -> None:
        with patch_model(llama, **SETTINGS), torch.no_grad():
            out = llama(IDS)
            cache = out.past_key_values
            assert isinstance(cache, QuantForgeCache)
            again = llama(IDS[:, :1], past_key_values=cache)
            assert again.past_key_values is cache
            assert isinstance(llama(IDS, None, None, None).past_key_values, QuantForgeCache)
            assert isinstance(llama(IDS, use_cache=True).past_key_values, QuantForgeCache)
        torch.testing.assert_close(out.logits, llama(IDS).logits)  # a prompt attends exactly

    def test_leaves_everything_else(self, llama: Any) -> None:
        own = DynamicCache(config=llama.config)
        with patch_model(llama, **SETTINGS), torch.no_grad():
            assert llama(IDS, use_cache=False).past_key_values is None
            assert llama(IDS, None, None, own).past_key_values is own
            llama.train()
            assert type(llama(IDS).past_key_values) is DynamicCache
            llama.eval()
            llama.config.use_cache = False
            assert llama(IDS).past_key_values is None

    def test_can_be_switched_off(self, llama: Any) -> None:
        with patch_model(llama, forward=False, **SETTINGS), torch.no_grad():
            assert type(llama(IDS).past_key_values) is DynamicCache
            assert_ours(generate(llama), llama)

    def test_gradients_pass(self, llama: Any) -> None:
        llama(IDS, labels=IDS).loss.backward()
        expected = llama.lm_head.weight.grad.clone()
        llama.zero_grad()
        with patch_model(llama, **SETTINGS):
            llama(IDS, labels=IDS).loss.backward()
        torch.testing.assert_close(llama.lm_head.weight.grad, expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_patched_on_their_own(llama: Any, copied: Any) -> None:
    patch_model(llama, **SETTINGS)
    twin = copied(llama)
    unpatch_model(llama)
    assert type(generate(llama).past_key_values) is DynamicCache
    assert_ours(generate(twin), twin)
    assert isinstance(twin(IDS).past_key_values, QuantForgeCache)
    unpatch_model(twin)
    assert type(generate(twin).past_key_values) is DynamicCache
    assert vars(twin).keys() == vars(llama).keys()


def test_save_pretrained_writes_what_it_writes(llama: Any, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path / "plain")
    with patch_model(llama, **SETTINGS):
        llama.save_pretrained(tmp_path / "patched")
    plain, patched = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
        for name in ("plain", "patched")
    )
    assert plain == patched
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "patched")
    assert type(generate(loaded).past_key_values) is DynamicCache


def test_another_library_had_patched_the_object(llama: Any) -> None:
    calls = []

    def theirs(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        return type(self)._prepare_cache_for_generation(self, *args, **kwargs)

    llama._prepare_cache_for_generation = types.MethodType(theirs, llama)
    state = state_of(llama)
    with patch_model(llama, **SETTINGS):
        assert_ours(generate(llama), llama)
    assert calls
    assert state_of(llama) == state


def test_pipeline() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    model = AutoModelForCausalLM.from_pretrained(TINY)
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    seen = []
    model.register_forward_hook(lambda module, args, out: seen.append(out.past_key_values))
    text = "def add(a, b):\n    return a + b\n" * 8
    arguments = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    own = generator(text, **arguments)
    assert type(seen[-1]) is DynamicCache
    with patch_model(generator.model, bits=8, **SETTINGS):
        ours = generator(text, **arguments)
        batch = generator([text, text[:100]], batch_size=1, **arguments)
    assert isinstance(seen[-1], QuantForgeCache)
    assert ours == own, "8 bits continue this text alike"
    assert batch[0] == ours
    with pytest.raises(InputError, match=r"patch its \.model"):
        patch_model(generator)


class TestAccelerate:
    """Hooks that replace `forward` on the object, before or after the patch."""

    def test_cpu_offload(self, llama: Any) -> None:
        expected = expected_tokens(llama)
        accelerate.cpu_offload(llama, execution_device="cpu")
        assert llama.lm_head.weight.device.type == "meta"
        self.check(llama, expected)

    def test_disk_offload(self, llama: Any, tmp_path: Path) -> None:
        expected = expected_tokens(llama)
        accelerate.disk_offload(llama, str(tmp_path), execution_device=torch.device("cpu"))
        assert llama.lm_head.weight.device.type == "meta"
        self.check(llama, expected)

    def test_device_map(self, llama: Any, tmp_path: Path) -> None:
        """Layers in two places; what transformers does for `device_map="auto"`."""
        expected = expected_tokens(llama)
        places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
        places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "lm_head": "disk"}
        accelerate.dispatch_model(
            llama,
            places,
            main_device="cpu",
            offload_dir=str(tmp_path),
            skip_keys=llama._skip_keys_device_placement,
            force_hooks=True,
        )
        assert llama.model.layers[1].mlp.up_proj.weight.device.type == "meta"
        self.check(llama, expected)

    def test_hooks_come_and_go_in_any_order(self, llama: Any) -> None:
        expected = expected_tokens(llama)
        patch_model(llama, **SETTINGS)
        accelerate.cpu_offload(llama, execution_device="cpu")
        assert torch.equal(generate(llama).sequences, expected)
        unpatch_model(llama)
        assert type(generate(llama).past_key_values) is DynamicCache
        accelerate.hooks.remove_hook_from_module(llama, recurse=True)

    def check(self, model: Any, expected: torch.Tensor) -> None:
        state = state_of(model)
        with patch_model(model, **SETTINGS):
            out = generate(model)
            assert isinstance(out.past_key_values, QuantForgeCache)
            assert torch.equal(out.sequences, expected)
            plain = model(IDS)
            assert isinstance(plain.past_key_values, QuantForgeCache)
        assert state_of(model) == state


def test_compiled_module(llama: Any) -> None:
    expected = expected_tokens(llama)
    compiled = torch.compile(llama, backend="eager")
    with patch_model(compiled, **SETTINGS) as patched:
        assert patched is compiled
        out = generate(compiled)
    assert torch.equal(out.sequences, expected)
    assert "_quantforge_patches" not in vars(llama)


@pytest.mark.filterwarnings("ignore")  # of peft
def test_adapters(llama: Any) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(llama, config).eval()
    base = adapted.get_base_model()
    expected = expected_tokens(base)
    state = state_of(adapted)
    for model in (adapted, base):
        with patch_model(model, **SETTINGS):
            out = generate(adapted)
            assert isinstance(out.past_key_values, QuantForgeCache)
            assert torch.equal(out.sequences, expected)
            assert isinstance(adapted(IDS).past_key_values, QuantForgeCache)
        assert state_of(adapted) == state
    patch_model(base, **SETTINGS)
    merged = adapted.merge_and_unload()
    assert torch.equal(generate(merged).sequences, expected)


def test_encoder_decoder_models_quantize_what_they_decode() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "d_model": 64, "d_kv": 32, "d_ff": 128, "num_layers": 2}
    config = AutoConfig.for_model(
        "t5", num_heads=2, decoder_start_token_id=0, eos_token_id=None, **sizes
    )
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    arguments = {"max_new_tokens": 40, "do_sample": False, "return_dict_in_generate": True}
    with patch_model(model, **SETTINGS):
        cache = model.generate(IDS, **arguments).past_key_values
    assert isinstance(cache.self_attention_cache, QuantForgeCache)
    assert isinstance(cache.self_attention_cache.layers[0].keys, SegmentedTensor)
    assert type(cache.cross_attention_cache) is DynamicCache


class TestRefusals:
    """Objects and settings that make no sense."""

    def test_settings(self, llama: Any) -> None:
        state = state_of(llama)
        with pytest.raises(ConfigError, match="unknown cache settings"):
            patch_model(llama, bitz=4)
        assert state_of(llama) == state

    @pytest.mark.parametrize("thing", [object(), torch.nn.Linear(2, 2)], ids=["object", "module"])
    def test_no_model(self, thing: Any) -> None:
        with pytest.raises(InputError, match="not a transformers model with generate"):
            patch_model(thing)
        with pytest.raises(InputError, match="not a transformers model with generate"):
            unpatch_model(thing)

    def test_body_without_head(self, llama: Any) -> None:
        with pytest.raises(InputError, match="a model with a language-model head"):
            patch_model(llama.model)

    def test_model_without_keys_and_values(self) -> None:
        sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
        with pytest.raises(UnsupportedError, match="use it unpatched"):
            patch_model(MambaForCausalLM(MambaConfig(**sizes)))
