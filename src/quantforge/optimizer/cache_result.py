"""What an allocation of bits found: plans, their KL and bytes, and which of them to use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from os import PathLike
from typing import Any

from quantforge.errors import ConfigError
from quantforge.optimizer.advice import Chosen, Recommendation, draw
from quantforge.optimizer.compare import F64, Gain, standard_error
from quantforge.optimizer.reward import Weights, accuracy_of_kl, pareto, saved
from quantforge.optimizer.slots import Plan, Slot
from quantforge.optimizer.timing import Latency, why_no_latency
from quantforge.text import table


@dataclass(frozen=True, eq=False)
class MeasuredPlan:
    """A plan and what it does.

    Attributes:
        name: "uniform, 3 bits" or "allocated, 3 bits, window 128".
        plan: bits and window.
        nbytes: of one sequence at the context that is counted.
        choice: KL (passages,) of the half that chooses, nats.
        check: likewise of the half held out.
    """

    name: str
    plan: Plan
    nbytes: int
    choice: F64
    check: F64


@dataclass(frozen=True, eq=False)
class Budget:
    """The bytes of a uniform cache, spent in other ways.

    Attributes:
        bits: of the uniform cache.
        uniform: that cache.
        mixed: allocations, one for each window.
        best: the one of least KL on the half that chooses.
    """

    bits: int
    uniform: MeasuredPlan
    mixed: tuple[MeasuredPlan, ...]
    best: MeasuredPlan

    def gain(self, plan: MeasuredPlan) -> Gain:
        """Return by how much a plan has less KL than uniform bits, on the half held out."""
        return Gain.of(-plan.check, -self.uniform.check)

    @property
    def adopted(self) -> bool:
        """Whether the allocation beats uniform bits by more than one standard error."""
        return self.gain(self.best).holds

    @property
    def recommended(self) -> MeasuredPlan:
        """`best` if it is adopted, else `uniform`."""
        return self.best if self.adopted else self.uniform


@dataclass(frozen=True, eq=False)
class CacheOptimization:
    """All that was measured on a model; `print` it for the table and the advice.

    Attributes:
        model: its name.
        passages: of text, half of which choose.
        prompt: tokens of a passage that are packed.
        length: tokens of a passage.
        context: length of the sequence whose bytes are counted.
        weights: of the reward, which chooses among budgets.
        slots: keys and values of each layer.
        choices: bits that a slot may get.
        sensitivity: KL (slots, choices, passages) with one slot quantized alone, nats.
        own_nbytes: bytes of one sequence in the model's own cache.
        budgets: by rising bits.
        max_bytes: limit of a choice.
        max_kl: likewise.
        latencies: time of a step, by plan and of the model's "own" cache; None if not measured.
    """

    model: str
    passages: int
    prompt: int
    length: int
    context: int
    weights: Weights
    slots: tuple[Slot, ...]
    choices: tuple[int, ...]
    sensitivity: F64
    own_nbytes: int
    budgets: tuple[Budget, ...]
    max_bytes: float | None
    max_kl: float | None
    latencies: Mapping[str, Latency] | None

    @cached_property
    def no_latency(self) -> str | None:
        """Why latency does not count although it has a weight, or None."""
        return None if self.latencies is None else why_no_latency(list(self.latencies.values()))

    def reward(self, budget: Budget) -> float:
        """Return the reward of what a budget recommends, by the half that chooses."""
        plan, latency = budget.recommended, None
        if self.latencies is not None and self.no_latency is None:
            own = self.latencies["own"].median_ms
            latency = saved(self.latencies[plan.name].median_ms, own)
        accuracy = accuracy_of_kl(float(plan.choice.mean()))
        return self.weights.reward(accuracy, saved(plan.nbytes, self.own_nbytes), latency)

    @property
    def best(self) -> Budget:
        """The budget of greatest reward within the limits.

        Raises:
            ConfigError: if none is.
        """
        allowed = [budget for budget in self.budgets if self._within(budget)]
        if not allowed:
            plans = [budget.recommended for budget in self.budgets]
            raise ConfigError(
                f"no plan has at most {self.max_bytes} bytes and a KL of at most {self.max_kl}; "
                f"the fewest bytes are {min(p.nbytes for p in plans)}, the least KL is "
                f"{min(float(p.choice.mean()) for p in plans):.5f}: relax a limit, or offer other "
                "bits"
            )
        return max(allowed, key=self.reward)

    def _within(self, budget: Budget) -> bool:
        plan = budget.recommended
        few = self.max_bytes is None or plan.nbytes <= self.max_bytes
        return few and (self.max_kl is None or float(plan.choice.mean()) <= self.max_kl)

    @property
    def config(self) -> Chosen:
        """The recommended settings of QuantForgeCache, to save."""
        return Chosen({"cache": self.best.recommended.plan.settings})

    @property
    def front(self) -> tuple[Budget, ...]:
        """Budgets whose recommendation no other beats in KL and bytes."""
        values = [
            (-float(b.recommended.check.mean()), -float(b.recommended.nbytes)) for b in self.budgets
        ]
        return tuple(self.budgets[i] for i in pareto(values))

    def table(self) -> str:
        """Return uniform and allocated bits for each budget, on the passages held out."""
        head = ["", "plan", "window", "bytes", "KL held out", "+-", "gain", "+-", "reward",
                "bits of keys,values by layer"]  # fmt: skip
        rows, best = [], self.best
        for budget in self.budgets:
            for plan in (budget.uniform, *budget.mixed):
                chosen = plan is budget.recommended
                gain = None if plan is budget.uniform else budget.gain(plan)
                rows.append([
                    "*" if chosen and budget is best else "+" if chosen else "",
                    plan.name.partition(", window")[0], str(plan.plan.window), f"{plan.nbytes:,}",
                    f"{plan.check.mean():.5f}", f"{standard_error(plan.check):.5f}",
                    "" if gain is None else f"{gain.mean:.5f}",
                    "" if gain is None else f"{gain.standard_error:.5f}",
                    f"{self.reward(budget):.4f}" if chosen else "", str(plan.plan),
                ])  # fmt: skip
        return table(head, rows)

    def __str__(self) -> str:
        where = (
            f"{self.model}: {self.length - self.prompt} tokens after {self.prompt}, "
            f"{self.passages} passages, half of them held out; bytes of {self.context} tokens; "
            "+ recommended for its bytes, * of these the best reward"
        )
        notes = [] if self.no_latency is None else [self.no_latency]
        return "\n".join([where, *notes, self.table(), "", str(self.recommendation)])

    @property
    def recommendation(self) -> Recommendation:
        """What to use, why, and what it gives up."""
        budget = self.best
        plan, gain = budget.recommended, budget.gain(budget.best)
        arguments = ", ".join(f"{name}={value!r}" for name, value in plan.plan.settings.items())
        weights = ", ".join(f"{key} {value:g}" for key, value in asdict(self.weights).items())
        if not budget.mixed:
            against = "no allocation fits these bytes, so the bits are uniform"
        else:
            found = "beats" if budget.adopted else "does not beat"
            against = (
                f"allocated by layer it {found} uniform bits of the same bytes by more than one "
                f"standard error on passages held out: KL lower by {gain.mean:.5f} +- "
                f"{gain.standard_error:.5f}"
            )
        return Recommendation(
            what=f"QuantForgeCache(model.config, {arguments})",
            why=f"the greatest reward ({weights}) of {len(self.budgets)} budgets; {against}",
            expected=f"KL {plan.check.mean():.5f} +- {standard_error(plan.check):.5f} nats of the "
            f"next-token distribution at {self.length} tokens",
            nbytes=f"{plan.nbytes:,} for {self.context} tokens instead of {self.own_nbytes:,}, "
            f"{self.own_nbytes / plan.nbytes:.1f} times fewer",
            gives_up="that KL against the model's own cache; longer contexts lose more, as the "
            "recent window is less of them",
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        names = ("model", "passages", "prompt", "length", "context", "own_nbytes", "choices",
                 "max_bytes", "max_kl", "no_latency")  # fmt: skip
        times = None
        if self.latencies is not None:
            times = {name: asdict(latency) for name, latency in self.latencies.items()}
        return {
            **{name: getattr(self, name) for name in names},
            "weights": asdict(self.weights),
            "latencies": times,
            "sensitivity": [
                {"layer": s.layer, "part": s.part, "kl_by_choice": row}
                for s, row in zip(self.slots, self.sensitivity.mean(-1).tolist(), strict=True)
            ],
            "budgets": [self._budget_dict(budget) for budget in self.budgets],
            "config": {"cache": self.config.sections["cache"]},
            "recommendation": asdict(self.recommendation),
        }

    def _budget_dict(self, budget: Budget) -> dict[str, Any]:
        def plain(found: MeasuredPlan) -> dict[str, Any]:
            gain = None if found is budget.uniform else asdict(budget.gain(found))
            return {
                "name": found.name, "settings": found.plan.settings, "nbytes": found.nbytes,
                "kl_choice": float(found.choice.mean()), "kl_held_out": float(found.check.mean()),
                "kl_held_out_standard_error": standard_error(found.check), "gain": gain,
            }  # fmt: skip

        return {
            "bits": budget.bits,
            "uniform": plain(budget.uniform),
            "mixed": [plain(found) for found in budget.mixed],
            "best": budget.best.name,
            "adopted": budget.adopted,
            "recommended": budget.recommended.name,
            "reward": self.reward(budget),
        }

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw held-out KL over bytes into a file (needs the extra `plot`)."""
        front = [budget.recommended for budget in self.front]
        uniform = [budget.uniform for budget in self.budgets]
        mixed = [plan for budget in self.budgets for plan in budget.mixed]
        series = {"uniform": _xy(uniform), "allocated by layer": _xy(mixed)}
        labels = (f"bytes of {self.context} tokens", "KL held out, nats")
        draw(path, series, _xy(front), labels, self.model, log=True)


def _xy(plans: Sequence[MeasuredPlan]) -> tuple[list[float], list[float]]:
    return [float(p.nbytes) for p in plans], [float(p.check.mean()) for p in plans]
