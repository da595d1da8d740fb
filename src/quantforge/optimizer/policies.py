"""Which points of a space are measured: all, random ones, or those that Optuna proposes.

exhaustive   every point; what "auto" takes below MAX_EXHAUSTIVE of them
random       distinct points in a random order: the baseline
tpe          tree-structured Parzen estimator on the reward (Optuna); "auto" for larger spaces
nsga2        genetic algorithm on accuracy, memory and latency apart (Optuna)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Literal, get_args

import numpy as np

from quantforge.errors import UnsupportedError
from quantforge.optimizer.space import CODE_FIELDS, Config, Space
from quantforge.spec import check_choice
from quantforge.vectordb.config import IndexConfig

Policy = Literal["auto", "exhaustive", "random", "tpe", "nsga2"]
MAX_EXHAUSTIVE = 200
Evaluate = Callable[[Config], Sequence[float]]
"""Measures a point and returns its reward, then accuracy, memory and, if measured, latency."""

LOG = logging.getLogger("quantforge.optimizer")


def resolve(policy: Policy, points: int) -> Policy:
    """Return the policy that "auto" stands for.

    Raises:
        ConfigError: for a policy that does not exist.
        UnsupportedError: for one that needs Optuna, where it is not installed.
    """
    check_choice("policy", policy, get_args(Policy))
    has_optuna = find_spec("optuna") is not None
    if policy in ("tpe", "nsga2") and not has_optuna:
        raise UnsupportedError(
            f'policy="{policy}" needs Optuna: pip install "quantforge[optimize]", or use '
            'policy="random"'
        )
    if policy != "auto":
        return policy
    if points < MAX_EXHAUSTIVE:
        return "exhaustive"
    if not has_optuna:
        LOG.warning("Optuna is not installed: %d points are searched at random", points)
    return "tpe" if has_optuna else "random"


def run(
    policy: Policy, space: Space, points: Sequence[Config], evaluate: Evaluate, trials: int,
    seed: int, objectives: int,
) -> None:  # fmt: skip
    """Evaluate points of a space: all of them, or at most `trials` distinct ones.

    Args:
        policy: not "auto".
        space: where points come from.
        points: all of them.
        evaluate: called once for each point chosen.
        trials: points to evaluate; "exhaustive" ignores it.
        seed: of the policy.
        objectives: numbers that `evaluate` returns beside the reward.
    """
    order = np.random.RandomState(seed).permutation(len(points))
    if policy == "exhaustive":
        for config in points:
            evaluate(config)
    elif policy == "random":
        for index in order[:trials]:
            evaluate(points[index])
    else:
        spare = [points[index] for index in order]
        seen = 1 if policy == "tpe" else objectives
        _ask_optuna(policy, space, spare, evaluate, min(trials, len(points)), seed, seen)


def _ask_optuna(
    policy: Policy, space: Space, points: Sequence[Config], evaluate: Evaluate, trials: int,
    seed: int, objectives: int,
) -> None:  # fmt: skip
    """Measure what Optuna proposes; for a point it has measured or that does not exist, the next.

    Args:
        policy: "tpe" or "nsga2".
        space: where points come from.
        points: all of them, in the order in which they stand in for useless proposals.
        evaluate: called once for each point chosen.
        trials: points to evaluate, at most all.
        seed: of the sampler.
        objectives: that the sampler sees.
    """
    import optuna

    samplers = optuna.samplers
    sampler: Any = samplers.TPESampler(seed=seed)
    if policy == "nsga2":
        sampler = samplers.NSGAIISampler(seed=seed, population_size=min(50, trials))
    by_values = {_values(config): config for config in points}
    seen: dict[Config, Sequence[float]] = {}
    with _quiet(optuna):
        study = optuna.create_study(sampler=sampler, directions=["maximize"] * objectives)
        while len(seen) < trials:
            trial = study.ask()
            config = by_values.get(_proposal(trial, space))
            if useless := config is None or config in seen:
                spare = next(point for point in points if point not in seen)
                study.enqueue_trial(_parameters(spare))
            if config is None:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                continue
            if not useless:
                seen[config] = evaluate(config)
            reward, *parts = seen[config]
            study.tell(trial, [reward] if policy == "tpe" else parts)


def _parameters(config: Config) -> dict[str, Any]:
    kind, bits, *others = _values(config)
    names = ("mode",) if kind == "index" else CODE_FIELDS[1:]
    return {"kind": kind, "bits": bits, **dict(zip(names, others, strict=True))}


def _values(config: Config) -> tuple[Any, ...]:
    if isinstance(config, IndexConfig):
        return "index", config.bits, config.mode
    return "codes", *(getattr(config, name) for name in CODE_FIELDS)


def _proposal(trial: Any, space: Space) -> tuple[Any, ...]:
    kinds = [kind for kind, values in (("codes", space.rotation), ("index", space.mode)) if values]
    bits = trial.suggest_categorical("bits", list(space.bits))
    kind = trial.suggest_categorical("kind", kinds)
    if kind == "index":
        return kind, bits, trial.suggest_categorical("mode", list(space.mode))
    others = (trial.suggest_categorical(n, list(getattr(space, n))) for n in CODE_FIELDS[1:])
    return kind, bits, *others


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Keep Optuna from reporting each trial."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
