"""Statistics for all prompts: measured as a cache measures its own, loaded by heads."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from quantforge.errors import FormatError, InputError
from quantforge.ops.measure import equalizer_of
from quantforge.vllm.statistics import load_layer, measure_statistics

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 64, (1, 90), generator=torch.Generator().manual_seed(0))


def test_shifts_are_means_and_equalizers_know_the_queries(model, ids, tmp_path) -> None:
    measure_statistics(model, ids, tmp_path / "s.safetensors")
    from transformers import DynamicCache

    plain = DynamicCache()
    queries = []
    hook = model.model.layers[1].self_attn.q_proj.register_forward_hook(
        lambda module, args, out: queries.append(out)
    )
    with torch.inference_mode():
        model(ids, past_key_values=plain)
    hook.remove()
    key, value = plain.layers[1].keys[0], plain.layers[1].values[0]
    found = load_layer(str(tmp_path / "s.safetensors"), 1, slice(0, 2), CPU)
    assert torch.allclose(found.key_shift, key.mean(1, keepdim=True), atol=1e-5)
    assert torch.allclose(found.value_shift, value.mean(1, keepdim=True), atol=1e-5)
    for statistic, x in ((found.key_equalizer, key), (found.value_equalizer, value)):
        rms = (x - x.mean(1, keepdim=True)).square().mean(1, keepdim=True).sqrt()
        alone = torch.allclose(statistic, equalizer_of(rms, None), rtol=1e-3)
        assert alone == (x is value)  # those of keys know more than keys


def test_a_rank_gets_its_heads(model, ids, tmp_path) -> None:
    path = str(tmp_path / "s.safetensors")
    measure_statistics(model, ids, path)
    both, second = (load_layer(path, 0, heads, CPU) for heads in (slice(0, 2), slice(1, 2)))
    for whole, part in zip(both, second, strict=True):
        assert torch.equal(whole[1:], part)


def test_files_and_samples_that_do_not_fit_are_refused(model, ids, tmp_path) -> None:
    path = str(tmp_path / "s.safetensors")
    with pytest.raises(InputError, match=r"\(1, n\)"):
        measure_statistics(model, ids[0], path)
    measure_statistics(model, ids, path)
    with pytest.raises(FormatError, match=r"layers\.2\.key_shift"):
        load_layer(path, 2, slice(0, 2), CPU)
    with pytest.raises(FormatError, match="2 key heads"):
        load_layer(path, 0, slice(2, 4), CPU)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(FormatError, match="measure_statistics"):
        load_layer(path, 0, slice(0, 2), CPU)
