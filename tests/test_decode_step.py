"""The end-to-end benchmark: its caches agree, its bytes are counted, its cases stand alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks import breakdown, decode_model, decode_step, generate_step, record

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> Any:
    return decode_model.random_model(decode_model.SMALL, CPU, torch.float32)


def logits_of(model: Any, kind: str, backend: str | None = None) -> torch.Tensor:
    cache = decode_model.make_cache(kind, model.config, 320)
    decode_model.fill(cache, kind, model.config, 2, 256, torch.empty(0))
    step = decode_step.make_step(model, cache, 2, backend)
    return torch.cat([step().clone() for _ in range(3)], 1)


def test_caches_hold_the_same_tokens(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Filled without a prompt, every cache decodes what the dynamic one does."""
    with torch.no_grad():
        exact = logits_of(model, "dynamic")
        torch.testing.assert_close(logits_of(model, "static"), exact)
        torch.testing.assert_close(logits_of(model, "static", backend="eager"), exact)
        near = logits_of(model, "quantforge4")
        torch.testing.assert_close(logits_of(model, "quantforge4-static", backend="eager"), near)
    assert 0 < float((near - exact).norm() / exact.norm()) < 0.1


def test_fill_in_chunks_is_fill(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    per_token = 2 * model.config.num_key_value_heads * model.config.head_dim * 4
    monkeypatch.setattr(decode_model, "FILL_BYTES", 100 * per_token)
    for kind in ("static", "quantforge4"):
        cache = decode_model.make_cache(kind, model.config, 320)
        decode_model.fill(cache, kind, model.config, 2, 256, torch.empty(0))
        assert int(cache.get_seq_length()) == 256


def test_step_bytes_are_those_of_the_cache(model: Any) -> None:
    for kind in ("dynamic", "quantforge4"):
        cache = decode_model.make_cache(kind, model.config, 320)
        decode_model.fill(cache, kind, model.config, 2, 272, torch.empty(0))
        nbytes = decode_model.step_bytes(model, kind, 2, 272)
        held = 0
        for layer in cache.layers:
            parts = (layer.keys, layer.values)
            held += sum(getattr(t, "nbytes_packed", None) or t.nbytes for t in parts)
            if kind == "quantforge4":  # a few rows per head, which the floor leaves out
                held -= sum(t.packed.shift.nbytes + t.packed.equalizer.nbytes for t in parts)
        assert nbytes.cache == held
        assert nbytes.floor_ms(1.0) == (nbytes.weights + nbytes.cache) / 1e6
    config = model.config
    embedding = (config.vocab_size - 2) * config.hidden_size * 4
    assert nbytes.weights == sum(p.nbytes for p in model.parameters()) - embedding


def test_decode_step_from_the_command_line(tmp_path: Path) -> None:
    options = ["--small", "--device=cpu", "--steps=2", "--case-seconds=0"]
    options += ["--compile-backend=eager", f"--output={tmp_path}"]
    assert decode_step.main(options) == 0
    rows = record.read_rows(tmp_path / "decode_step_cpu.jsonl")
    caches = ("dynamic", "static", "quantforge4", "quantforge4-static")
    names = [f"{cache}-256-b{b}" for b in (1, 2) for cache in caches]
    assert [row["case"] for row in rows] == names
    for row in rows:
        assert row["steps"] == 2
        assert row["tokens_per_s"] == pytest.approx(1e3 * row["batch"] / row["step_ms"], rel=0.01)
        if not row["compiled"]:
            assert set(row["breakdown"]["parts_ms"]) == {"attention", "append", "linear"}
    assert rows[2]["cache_bytes"] < rows[0]["cache_bytes"]


def test_decode_step_cases(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert decode_step.main(["--list", "--cases", "quantforge4-*", "*-8k-bmax"]) == 0
    listed = capsys.readouterr().out.split()
    assert {"quantforge4-128k-b1", "quantforge4-32k-b16", "static-8k-bmax"} <= set(listed)
    assert "dynamic-8k-b1" not in listed
    with pytest.raises(SystemExit):
        decode_step.main(["--small"])


def test_batches_shrink_after_running_out_of_memory(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = decode_step.parse(["--device=cpu", "--small", "--output=/nowhere"])
    runner = decode_step.Runner(args)
    per_sequence = decode_model.needed_bytes(runner.model, "dynamic", 1, 256)
    monkeypatch.setattr(runner, "free_bytes", lambda: 40 * per_sequence)

    def measure(case: decode_step.StepCase, batch: int) -> dict[str, Any]:
        if batch > 35:
            raise torch.cuda.OutOfMemoryError
        return {"step_ms": 1.0}

    monkeypatch.setattr(runner, "measure", measure)
    row = runner.run(decode_step.StepCase("dynamic", "256", 256, None))
    assert (row["batch"], row["out_of_memory"]) == (32, [40, 36])
    row = runner.run(decode_step.StepCase("dynamic", "256", 256, 36))
    assert row["skipped"] == "out of memory with batch 36"
    row = runner.run(decode_step.StepCase("dynamic", "256", 256, 41))
    assert "beside the weights" in row["skipped"]


def kernel(name: str, us: float) -> SimpleNamespace:
    """Return an event of the GPU, as the profiler has it."""
    span = SimpleNamespace(elapsed_us=lambda: us)
    return SimpleNamespace(
        name=name, device_type=DeviceType.CUDA, is_user_annotation=False, time_range=span
    )


def launch(name: str, parent: Any, *kernels: SimpleNamespace) -> SimpleNamespace:
    """Return an event of the CPU with the kernels it launched."""
    found = [SimpleNamespace(name=k.name, duration=k.time_range.elapsed_us()) for k in kernels]
    return SimpleNamespace(name=name, device_type=DeviceType.CPU, cpu_parent=parent, kernels=found)


def test_kernels_belong_to_the_scope_they_were_launched_in() -> None:
    gemm, flash, copy, norm = (
        kernel(name, us)
        for name, us in (("nvjet_x", 5), ("flash_fwd", 7), ("CatArrayBatched", 2), ("norm", 1))
    )
    shadow = kernel("attention", 100)
    attention, append = launch("attention", None, shadow), launch("append", None)
    cpu = [
        attention,
        append,
        launch("aten::linear", attention, gemm),  # a matmul inside attention is attention
        launch("aten::_flash", launch("aten::sdpa", attention), flash),
        launch("aten::cat", append, copy),
        launch("aten::mul", None, norm),
    ]
    kernels = [event for event in (gemm, flash, copy, norm, shadow) if breakdown._is_kernel(event)]
    assert shadow not in kernels
    parts = breakdown._by_scope(cpu, kernels)
    assert parts == {"attention": 12, "append": 2, "linear": 0, "other": 1}
    parts = breakdown._by_name(kernels)
    assert parts == {"attention": 7, "append": 2, "linear": 5, "other": 1}


def test_a_token_through_generate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, count in (("WARMUP", 1), ("SHORT", 1), ("LONG", 4), ("REPETITIONS", 2)):
        monkeypatch.setattr(generate_step, name, count)
    cases = ["--cases", "dynamic-256-b1", "quantforge4-256-b2"]
    assert not generate_step.main(
        ["--device", "cpu", "--small", "--output", str(tmp_path), "--commit", "abc", *cases]
    )
    rows = record.read_rows(next(tmp_path.glob("generate_step_*.jsonl")))
    assert [row["case"] for row in rows] == cases[1:]
    # a difference of two times: on a busy machine of any sign
    assert all(row["low_ms"] <= row["token_ms"] <= row["high_ms"] for row in rows)
    assert [(row["context"], row["batch"], row["compiled"]) for row in rows] == [
        (256, 1, False),
        (256, 2, False),
    ]
