"""The benchmarks measure what they say: bytes, checks, files, tables and plots."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import plots, record, run
from benchmarks.cases import codec, decode_attention, kv
from benchmarks.cases.inputs import normal, pack, row_nbytes, sets
from benchmarks.cases.search import dense_search, missed, vector_search
from benchmarks.ceiling import ceilings
from benchmarks.measure import WrongResultError, measure_case
from benchmarks.registry import OPS, SIZES, Case, Contenders, cases
from benchmarks.timing import measure
from quantforge import QuantSpec, ops

CPU = torch.device("cpu")
NOT_YET = [op for op in OPS if op == "search" and not hasattr(ops, "search")]
HERE = [op for op in OPS if op not in NOT_YET]


def row_of(case: Case, device: torch.device = CPU) -> dict[str, Any]:
    return measure_case(case, device, {"read_gbps": 10.0, "copy_gbps": 10.0}, repetitions=2)


def case_of(contenders: Contenders, memory: int = 0) -> Case:
    return Case("scores", "case", {}, 1000, 1000, memory, lambda device: contenders)


@pytest.mark.parametrize("op", HERE)
def test_every_operator_runs_from_the_command_line(op: str, tmp_path: Path) -> None:
    options = ["--device=cpu", "--size=small", "--no-tests", "--repetitions=2"]
    assert run.main([op, *options, f"--output={tmp_path}"]) == 0
    rows = record.read_rows(tmp_path / f"{op}_cpu.jsonl")
    assert [row["case"] for row in rows] == [case.name for case in cases(op, "small")]
    for row in rows:
        assert row["time_us"] > 0
        assert row["share"] == pytest.approx(
            row["bytes"] / row["time_us"] / 1e3 / row["read_gbps"], abs=1e-4
        )
        fastest = min(row["baselines"], key=lambda name: row["baselines"][name]["time_us"])
        assert row["best"] == fastest
        assert {"device", "torch", "commit", "date"} <= set(row["environment"])


@pytest.mark.parametrize("op", OPS)
def test_cases_have_one_name_each_and_fit_a_gpu(op: str) -> None:
    for size in SIZES:
        found = cases(op, size)
        assert found
        assert max(Counter(case.name for case in found).values()) == 1
        assert any(case.quick for case in found) or size == "small"
        for case in found:
            assert case.op == op
            assert case.nbytes > 0
            assert case.memory < 74 << 30, f"{case.name} needs {case.memory / 2**30:.0f} GiB"


def test_cases_are_those_of_the_issue() -> None:
    found = {case.name: case for case in cases("decode_attention", "cuda")}
    goals = {
        (s["batch"], s["q_per_kv"], s["q_len"], s["length"], s["key_bits"]): case.goal_ratio
        for case in found.values()
        if (s := case.shape)["key_bits"] == s["value_bits"] and case.goal_ratio
    }
    assert goals[8, 4, 1, 32768, 4] == 3.0
    assert goals[64, 4, 1, 2048, 2] == 2.0
    assert goals[4, 4, 8, 32768, 4] == 2.5
    assert len(goals) == 13
    lengths = plots.sweep([{"time_us": 1.0, "shape": case.shape} for case in found.values()])
    assert set(lengths) == set(decode_attention.SWEEP_BITS)
    for rows in lengths.values():
        measured = {row["shape"]["length"] for row in rows}
        assert measured == {*decode_attention.SWEEP_LENGTHS, 32768}
    assert {case.goal_ratio for case in cases("extend_attention", "cuda")} == {0.9, None}
    assert {case.goal_share for case in cases("search", "cuda")} == {0.75, None}


def test_bytes_are_those_of_the_tensors() -> None:
    layer = kv.Layer(2, 3, 2, 400, 3, 4, kv_heads=2, dim=64, dtype=torch.float32)
    key, value = layer.segments(0, CPU)
    assert key.nbytes_packed + value.nbytes_packed == layer.ours_bytes
    assert sum(t.nbytes for t in layer.key_value(0, CPU)) == layer.dense_bytes
    assert key.shape == (2, 2, 400, 64)
    assert key.packed.shape[2] % kv.OPTIONS.page_size == 0
    for vectors in codec.SHAPES["small"]:
        packed = vectors.packed(CPU)[0]
        assert sum(t.nbytes for t in packed) == vectors.packed_bytes
        assert vectors.dense(CPU)[0].nbytes == vectors.dense_bytes
    spec = QuantSpec(96, 5)
    assert sum(t.nbytes for t in pack(torch.ones(7, 96), spec)) == 7 * row_nbytes(spec)


def test_packed_history_holds_no_query_of_its_own_chunk() -> None:
    """What a query must not see is dense: packed rows have no causal mask."""
    for layer in (kv.Layer(1, 1, 512, 2048, 4, 4), kv.Layer(1, 1, 8, 300, 4, 4)):
        assert layer.n_packed + kv.OPTIONS.sinks <= layer.length - layer.q_len
        assert kv.OPTIONS.window <= layer.n_dense - kv.OPTIONS.sinks
    mask = kv.Layer(1, 1, 3, 5, 4, 4).mask(CPU)
    assert mask is not None
    assert mask[0, 0].sum(-1).tolist() == [3, 4, 5]


def test_input_sets_keep_data_out_of_the_caches() -> None:
    assert sets(1 << 30, "cuda") * (1 << 30) >= 40 * 50_000_000
    assert sets(4 << 30, "cuda") == 1
    assert sets(1, "cuda") == 64
    x = [normal((4,), torch.float32, CPU, seed) for seed in (0, 0, 1)]
    assert torch.equal(x[0], x[1])
    assert not torch.equal(x[0], x[2])


def test_contenders_take_turns_over_all_their_sets() -> None:
    calls: list[str] = []
    times = measure(
        {name: [partial(calls.append, f"{name}{i}") for i in range(3)] for name in "ab"}, CPU, 4
    )
    assert times["a"].repetitions == times["b"].repetitions == 4
    counts = Counter(calls)
    assert set(counts) == {"a0", "a1", "a2", "b0", "b1", "b2"}
    assert len(set(counts.values())) == 1
    timed = [calls[i] for i in range(len(calls) - 24, len(calls), 3)]
    assert timed == ["a0", "b0", "b0", "a0", "a0", "b0", "b0", "a0"]


def test_wrong_results_have_no_time() -> None:
    right = torch.ones(3, 4)
    baselines = {"dense": [right.clone]}
    with pytest.raises(WrongResultError, match="NaN"):
        row_of(case_of(Contenders([lambda: right / 0 * 0], baselines)))
    with pytest.raises(WrongResultError, match="an error of 1"):
        row_of(case_of(Contenders([lambda: 2 * right], baselines, "dense", 0.5)))
    row = row_of(case_of(Contenders([lambda: 1.1 * right], baselines, "dense", 0.5)))
    assert row["error"] == pytest.approx(0.1, abs=1e-4)


def test_a_baseline_that_does_not_run_here_is_named() -> None:
    def refuse() -> None:
        raise RuntimeError("No available kernel")

    ones = partial(torch.ones, 3, 4)
    row = row_of(case_of(Contenders([ones], {"a": [refuse], "b": [ones]}, "a")))
    assert row["unavailable"] == {"a": "No available kernel"}
    assert row["best"] == "b"
    assert row["error"] is None


def test_a_case_that_does_not_fit_says_so() -> None:
    row = row_of(case_of(Contenders([], {}), memory=1 << 60))
    assert "needs 1073741824.0 GiB" in row["skipped"]
    assert row["skipped"] in run.describe(row)


@pytest.mark.parametrize("op", HERE)
def test_every_operator_has_tests(op: str) -> None:
    for name in run.TESTS[op]:
        assert (run.ROOT / name).is_file()


@pytest.mark.parametrize("passes", [True, False])
def test_no_number_on_red(passes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test = tmp_path / "test_it.py"
    test.write_text(f"def test_it():\n    assert {passes}\n")
    monkeypatch.setitem(run.TESTS, "cache_append", (str(test),))
    options = ["cache_append", "--device=cpu", "--size=small", "--repetitions=1"]
    assert run.main([*options, f"--output={tmp_path}"]) == (0 if passes else 1)
    assert (tmp_path / "cache_append_cpu.jsonl").exists() == passes


def test_rows_replace_those_of_the_same_case(tmp_path: Path) -> None:
    path = tmp_path / "new" / "op_cpu.jsonl"
    for case, value in (("a", 1), ("b", 2), ("a", 3)):
        record.put_row(path, {"case": case, "value": value})
    assert record.read_rows(path) == [{"case": "a", "value": 3}, {"case": "b", "value": 2}]


@pytest.mark.parametrize("queries", [1, 5])
def test_dense_search_is_a_search(queries: int) -> None:
    rows, query = (
        normal((300, 16), torch.float32, CPU, 0),
        normal((queries, 16), torch.float32, CPU, 1),
    )
    want = (query @ rows.T).topk(7)
    for best, ids in (dense_search(query, rows, 7, 64), dense_search(query, rows, 7, 1000)):
        torch.testing.assert_close(best, want.values)
        assert torch.equal(ids, want.indices)
        assert missed((best, ids), (want.values, want.indices)) == 0
    half = torch.cat([want.indices[:, 4:], want.indices[:, 4:].flip(-1) + 1000], -1)
    assert missed((half, half), want) == pytest.approx(4 / 7)
    if queries == 1:
        assert torch.equal(vector_search(query[0], rows, 7)[1], want.indices[0])


# ---- on a GPU --------------------------------------------------------------------------------


@pytest.mark.gpu
def test_read_ceiling_reads() -> None:
    from benchmarks.kernels import read_all

    x = normal((1 << 20,), torch.float32, torch.device("cuda"), 0)
    torch.testing.assert_close(read_all(x).double().sum(), x.double().sum(), rtol=0, atol=0.05)
    found = ceilings(torch.device("cuda"), 1 << 30)
    assert 500 < found["read_gbps"] < 10_000
    assert 500 < found["copy_gbps"] < 10_000


@pytest.mark.gpu
def test_graphs_are_replayed_and_calls_that_wait_are_not() -> None:
    x = normal((1 << 20,), torch.float32, torch.device("cuda"), 0)
    capturable, waiting = [x.sum, x.sum], [lambda: x.sum().item()]
    for _ in range(2):  # a failed capture must not spoil the next one
        times = measure({"graph": capturable, "events": waiting}, x.device, 3)
        assert times["graph"].how == "graph"
        assert times["events"].how == "events"
    assert times["graph"].calls >= 16


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # torch explains why it refuses a kernel
@pytest.mark.parametrize("op", HERE)
def test_small_cases_run_on_a_gpu(op: str) -> None:
    for case in cases(op, "small"):
        row = row_of(case, torch.device("cuda"))
        assert "skipped" not in row
        assert row["time_us"] > 0
        json.dumps(row)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
def test_dense_attention_has_its_kernels() -> None:
    layer = kv.Layer(1, 4, 1, 1024, 4, 4, kv_heads=2)
    calls = kv.dense_calls(layer, torch.device("cuda"))
    want = calls["flash"][0]()
    for name in ("flash, folded", "cudnn"):
        got = calls[name][0]().reshape(want.shape)
        torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)
