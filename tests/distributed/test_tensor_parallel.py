"""A model divided among ranks decodes as a whole one does, with its share of the cache."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.multiprocessing import ProcessRaisedException

from quantforge.errors import ConfigError
from quantforge.llm import parallel
from quantforge.llm.parallel import HeadShard, head_shard
from tests.distributed import tensor_parallel_ranks as ranks


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ranks.four_heads(tmp_path_factory.mktemp("model") / "four-heads")


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return ranks.run_ranks(ranks.generate_all, 1, tmp_path_factory.mktemp("whole"), model)[0]


@pytest.fixture(scope="module", params=[2, 4])
def divided(
    request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("divided")
    return ranks.run_ranks(ranks.generate_all, request.param, folder, model)


@pytest.mark.parametrize("cache", ranks.CACHES)
def test_ranks_decode_as_one_process(
    whole: dict[str, Any], divided: list[dict[str, Any]], cache: str
) -> None:
    expected = whole[cache]
    assert expected["margin"] > 1e-2, "a choice that rounding can turn; take another prompt"
    for rank in divided:
        assert rank[cache]["tokens"].tolist() == expected["tokens"].tolist()
    heads = torch.cat([rank[cache]["layer"] for rank in divided], 2)
    assert heads.shape == expected["layer"].shape
    # a product of half a matrix rounds differently, which may move a number across a boundary
    same = torch.isclose(heads, expected["layer"], rtol=1e-5, atol=1e-5).float().mean()
    assert same > 0.999


@pytest.mark.parametrize("cache", ranks.CACHES)
def test_ranks_divide_the_bytes(
    whole: dict[str, Any], divided: list[dict[str, Any]], cache: str
) -> None:
    held = [rank[cache]["nbytes"] for rank in divided]
    if cache == "head_bits":  # heads of more bits are where they are
        assert held[0] != held[-1]
    else:
        assert len(set(held)) == 1
    counters = 5 * 16 * (len(divided) - 1)  # each layer of a static cache counts on every rank
    assert 0 <= sum(held) - whole[cache]["nbytes"] <= (counters if cache == "static" else 0)


def test_fewer_key_heads_than_ranks(tmp_path: Path) -> None:
    for said in ranks.run_ranks(ranks.errors, 4, tmp_path, ranks.TINY):
        assert len(said) == 3
        assert all("4 ranks" in text and "layers of 2;" in text for text in said)


def test_bits_of_heads_need_the_config(model: Path, tmp_path: Path) -> None:
    for said in ranks.run_ranks(ranks.nameless_heads, 2, tmp_path, model):
        assert "config=model.config" in said


def test_a_rank_that_fails_ends_all(model: Path, tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(ProcessRaisedException, match="max_cache_len=8"):
        ranks.run_ranks(ranks.one_fails, 2, tmp_path, model)
    assert time.monotonic() - start < 25, "the other rank waited for it"


# ---- which heads a rank holds --------------------------------------------------------------------


def config_of(plan: dict[str, str] | None, changes: Any = None, heads: Any = 4) -> Any:
    text = SimpleNamespace(base_model_tp_plan=plan, num_attention_heads=8)
    if isinstance(heads, list):
        text.per_layer_config = [SimpleNamespace(num_key_value_heads=n) for n in heads]
    text.num_key_value_heads = heads
    text.get_text_config = lambda decoder: text
    text.distributed_config = SimpleNamespace(tp_size=2, tp_plan=changes)
    return text


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> int:
    """Rank 5 of a mesh whose last axis has size 2."""
    monkeypatch.setattr(parallel.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(parallel.distributed, "get_rank", lambda: 5)
    return 5


COLWISE = {"layers.*.self_attn.k_proj": "colwise"}


@pytest.mark.usefixtures("rank")
@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (config_of(COLWISE), (4,)),
        (config_of(COLWISE, "auto", None), (8,)),
        (config_of({"layers.*.attention.query_key_value": "colwise"}), (4,)),
        (config_of(COLWISE, heads=[4, 2]), (4, 2)),
        (config_of({}, {"model.layers.*.self_attn.k_proj": "colwise"}), (4,)),
        (config_of({"layers.*.self_attn.qkv_proj": "colwise_gather_output"}), None),
        (config_of(COLWISE, {"model.layers.*.self_attn.k_proj": "colwise_gather_output"}), None),
        (config_of(COLWISE, {}), None),
        (config_of(None), None),
        (None, None),
    ],
)
def test_head_shard(config: Any, expected: tuple[int, ...] | None) -> None:
    assert head_shard(config) == (None if expected is None else HeadShard(1, 2, expected))


@pytest.mark.usefixtures("rank")
def test_uneven_heads_are_named() -> None:
    with pytest.raises(ConfigError, match=r"2 ranks .* layers of 1, 3;"):
        head_shard(config_of(COLWISE, heads=[4, 3, 1]))


def test_head_bits_of_a_rank() -> None:
    bits = {0: 8, 3: (6, 4), 5: 2, 7: 3}
    assert [HeadShard(r, 4, (8,)).local(bits) for r in range(4)] == [
        {0: 8},
        {1: (6, 4)},
        {1: 2},
        {1: 3},
    ]
    assert HeadShard(0, 2, (8, 4)).local({}) == {}
    with pytest.raises(ConfigError, match=r"\[8\], but this model has 8: 0 to 7"):
        HeadShard(0, 4, (8,)).local({8: 2})
    with pytest.raises(ConfigError, match="equally many"):
        HeadShard(0, 2, (8, 4)).local(bits)
