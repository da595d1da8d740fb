"""Bits for keys and values of each layer of a model's cache, by what each loses alone.

    1  sensitivity: the KL of the model with one slot at b bits, all others as they are
    2  the exact allocation of each budget, once for every recent window
    3  of these, measured as a whole, the one of least KL
    4  held out: it must beat uniform bits by more than the standard error of the difference

Steps 1 to 3 are decided by one half of the passages, step 4 by the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from quantforge.errors import ConfigError, InputError
from quantforge.llm.cache import QuantForgeCache
from quantforge.llm.options import CacheConfig
from quantforge.optimizer.cache_result import Budget, CacheOptimization, MeasuredPlan
from quantforge.optimizer.compare import F64
from quantforge.optimizer.knapsack import allocate
from quantforge.optimizer.probe import Probe, passages_of
from quantforge.optimizer.reward import Weights
from quantforge.optimizer.slots import Plan, Slot, slots_of
from quantforge.spec import MAX_BITS, check_int

EXACT_ENOUGH = 8
"""Bits of the other half of a layer while one of its slots is measured."""


def optimize_cache(
    model: Any,
    tokens: Any,
    *,
    bits: Sequence[int] = (2, 3, 4),
    choices: Sequence[int] = (1, 2, 3, 4, 6, 8),
    windows: Sequence[int] = (64, 128, 256),
    prompt: int | None = None,
    context: int | None = None,
    number_bytes: int | None = None,
    objective: str | Weights = "balanced",
    max_bytes: float | None = None,
    max_kl: float | None = None,
    batch: int = 8,
    progress: Callable[[str], None] = lambda message: None,
) -> CacheOptimization:
    """Find bits for every layer's keys and values by measuring what each loses.

    Args:
        model: a transformers causal language model.
        tokens: (passages, n) integers without padding, of text the model was not trained on; every
            second passage is held out.
        bits: of uniform caches, each of which sets a budget of bytes.
        choices: bits that a slot may get. Fused attention on a GPU reads 2, 3 and 4.
        windows: recent windows to try; larger ones take their bytes from the codes.
        prompt: tokens of a passage that are packed; the others attend to them. None: 7/8 of n.
        context: length of the sequence whose bytes are counted; None: n, where KL is measured.
        number_bytes: of a number in windows and in the model's own cache; None: of the model's
            dtype. 2 where a model of 16 bits is measured in float32.
        objective: weights of accuracy, memory and latency, or a name of OBJECTIVES, to choose among
            the budgets. Latency (of a step of one token) is measured if it has a weight.
        max_bytes: bytes of one sequence that a choice may have.
        max_kl: mean KL, nats, that a choice may have.
        batch: passages read at a time.
        progress: told what is being measured.

    Raises:
        InputError: for tokens that do not fit.
        ConfigError: for bits or windows out of range, or if no plan is within the limits.
        UnsupportedError: if no layer of the model is quantized.

    Cost: `slots * choices` readings of the half that chooses, past the prompt, and one of all
        passages for each plan.
    """
    weights = Weights.of(objective)
    _check(bits, choices, windows)
    passages = passages_of(tokens, model.device)
    length = passages.shape[1]
    prompt = length - max(1, length // 8) if prompt is None else prompt
    context = length if context is None else context
    check_int("context", context, 1, 1 << 40)
    check_int("number_bytes", 2 if number_bytes is None else number_bytes, 1, 8)
    _check_packed(prompt, windows)
    progress("the model's own cache")
    choice, check = (Probe(model, part, prompt, batch) for part in (passages[0::2], passages[1::2]))
    slots = slots_of(QuantForgeCache(model.config), choice.prompt)
    number_bytes = choice.prompt.dtype.itemsize if number_bytes is None else number_bytes
    window = CacheConfig().window
    sensitivity = _sensitivity(choice, slots, choices, window, progress)

    def measured(plan: Plan, name: str) -> MeasuredPlan:
        progress(name)
        kl = [probe.divergence(plan.settings) for probe in (choice, check)]
        return MeasuredPlan(name, plan, plan.nbytes(slots, context, number_bytes), *kl)

    budgets = []
    for b in sorted(set(bits)):
        uniform = measured(Plan.uniform(slots, b, window), f"uniform, {b} bits")
        mixed = [
            measured(plan, f"allocated, {b} bits, window {plan.window}")
            for plan in _plans(slots, sensitivity.mean(-1), choices, windows, context,
                               number_bytes, uniform.nbytes)
        ]  # fmt: skip
        best = min(mixed, key=lambda found: float(found.choice.mean()), default=uniform)
        budgets.append(Budget(b, uniform, tuple(mixed), best))
    result = CacheOptimization(
        model=getattr(model.config, "name_or_path", "") or type(model).__name__,
        passages=len(passages),
        prompt=prompt,
        length=length,
        context=context,
        weights=weights,
        slots=slots,
        choices=tuple(choices),
        sensitivity=sensitivity,
        own_nbytes=sum(slot.own_nbytes(context, number_bytes) for slot in slots),
        budgets=tuple(budgets),
        max_bytes=max_bytes,
        max_kl=max_kl,
        latencies=_latencies(check, budgets, progress) if weights.latency > 0 else None,
    )
    result.best  # noqa: B018, raises where nothing is within the limits
    return result


def _check(bits: Sequence[int], choices: Sequence[int], windows: Sequence[int]) -> None:
    for name, values, least, most in (
        ("bits", bits, 1, MAX_BITS), ("choices", choices, 1, MAX_BITS),
        ("windows", windows, 0, 1 << 20),
    ):  # fmt: skip
        if not values:
            raise ConfigError(f"{name} must name at least one value")
        for value in values:
            check_int(name, value, least, most)


def _check_packed(prompt: int, windows: Sequence[int]) -> None:
    """Refuse prompts of which nothing would be packed, so that nothing could be measured."""
    settings = CacheConfig()
    widest = max(settings.window, *windows)
    least = settings.sinks + widest + settings.page_size
    if prompt < least:
        raise InputError(
            f"a prompt of {prompt} tokens leaves nothing to pack beside a window of {widest}; use "
            f"one of at least {least} tokens, better of the length you use, or smaller windows"
        )


def _sensitivity(
    probe: Probe, slots: Sequence[Slot], choices: Sequence[int], window: int,
    progress: Callable[[str], None],
) -> F64:  # fmt: skip
    """Return KL (slots, choices, passages) with one slot at some bits and all others exact."""
    losses = []
    for slot in slots:
        progress(f"layer {slot.layer}, {slot.part}")
        for b in choices:
            pair = (b, EXACT_ENOUGH) if slot.part == "keys" else (EXACT_ENOUGH, b)
            # a window as long as the passage keeps the other layers in the model's dtype
            alone = {slot.layer: {"bits": pair, "window": window}}
            losses.append(probe.divergence({"window": probe.tokens, "layers": alone}))
    return np.array(losses).reshape(len(slots), len(choices), -1)


def _plans(
    slots: Sequence[Slot], loss: F64, choices: Sequence[int], windows: Sequence[int], context: int,
    number_bytes: int, budget: int,
) -> list[Plan]:  # fmt: skip
    """Return the best plan for each window that leaves room for codes."""
    sinks, plans = CacheConfig().sinks, []
    for window in dict.fromkeys(windows):
        cost = np.array(
            [[s.nbytes(b, context, window, sinks, number_bytes) for b in choices] for s in slots]
        )
        if int(cost.min(1).sum()) <= budget:
            chosen = allocate(loss, cost, budget)
            plans.append(Plan.of(slots, [choices[c] for c in chosen], window))
    return plans


def _latencies(
    probe: Probe, budgets: Sequence[Budget], progress: Callable[[str], None]
) -> dict[str, Any]:
    """Return the time of a step with the model's own cache and with each plan."""
    progress("latency")
    plans = [plan for budget in budgets for plan in (budget.uniform, budget.best)]
    times = {"own": probe.latency(None)}
    return times | {p.name: probe.latency(p.plan.settings) for p in plans}
