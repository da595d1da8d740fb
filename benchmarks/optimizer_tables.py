"""The tables of docs/optimizer.md, from what `benchmarks.optimizer` has stored."""

from __future__ import annotations

from typing import Any

from benchmarks.op_tables import markdown
from benchmarks.optimizer import WINDOW
from benchmarks.record import load

FEW = 20
"""Points of a search that are all shown; of more only those that no other beats."""


def _same_window(budget: dict[str, Any]) -> dict[str, Any]:
    return next(p for p in budget["mixed"] if p["settings"]["window"] == WINDOW)


def _kl(plan: dict[str, Any]) -> str:
    return f"{plan['kl_held_out']:.5f} ± {plan['kl_held_out_standard_error']:.5f}"


def _bits(settings: dict[str, Any], layers: int) -> str:
    base = {"bits": settings["bits"]}
    own = settings.get("layers", {})
    pairs = [own.get(str(i), base)["bits"] for i in range(layers)]
    return " ".join(f"{k},{v}" for k, v in pairs)


def caches(name: str, caption: str) -> str:
    """Return uniform bits against allocated ones, held out, at the same bytes and window."""
    found = load(name)["rows"][0]
    layers = len({row["layer"] for row in found["sensitivity"]})
    body = []
    for budget in found["budgets"]:
        plan, gain = _same_window(budget), _same_window(budget)["gain"]
        best = next((p for p in budget["mixed"] if p["name"] == budget["best"]), plan)
        body.append([
            str(budget["bits"]), _kl(budget["uniform"]), _kl(plan),
            f"{gain['mean']:.5f} ± {gain['standard_error']:.5f}",
            f"{budget['uniform']['kl_held_out'] / plan['kl_held_out']:.1f}x",
            _bits(plan["settings"], layers),
            f"{best['settings']['window']}: {_kl(best)}",
        ])  # fmt: skip
    head = ["bits", "uniform", "allocated", "gain, paired", "uniform / allocated",
            "keys,values by layer", "best window: KL"]  # fmt: skip
    text = (
        f"KL, nats: mean ± standard error over {found['passages'] // 2} passages held out, "
        f"{found['length'] - found['prompt']} tokens after {found['prompt']}; window {WINDOW} but "
        "in the last column, whose bytes are the same. "
    )
    return markdown(head, body) + f"\n{text}{caption}\n"


def decoded(name: str, caption: str) -> str:
    """Return the same plans, decoded token by token."""
    rows = load(name)["rows"]
    body = [
        [row["plan"].partition(", window")[0], f"{row['kl_mean']:.5f}", f"{row['kl_p99']:.4f}",
         f"{row['top1']:.3f}"] for row in rows
    ]  # fmt: skip
    head = ["plan", "KL mean", "KL p99", "top-1"]
    text = (
        f"{rows[0]['decode']} tokens decoded one by one after {rows[0]['prompt']}, "
        f"{rows[0]['passages']} passages of a module not used before. "
    )
    return markdown(head, body) + f"\n{text}{caption}\n"


def vectors(name: str, caption: str) -> str:
    """Return the points that no other beats, and what is recommended of each kind."""
    found = load(name)["rows"][0]
    chosen = {choice["recommended"] for choice in found["choices"].values()}
    everything = len(found["points"]) <= FEW
    rows = [p for p in found["points"] if everything or p["front"] or p["name"] in chosen]
    body = [
        [("**{}**" if p["name"] in chosen else "{}").format(p["name"]), f"{p['recall']:.4f}",
         f"{p['mse']:.5f}", f"{p['bytes_per_vector']:.1f}", f"{p['reward']:.4f}"]
        for p in sorted(rows, key=lambda p: p["bytes_per_vector"])
    ]  # fmt: skip
    head = ["settings", "recall@10", "relative MSE", "bytes per vector", "reward"]
    text = (
        f"{found['sample']:,} vectors of {found['dim']} numbers, {found['queries']} queries held "
        f"out, {len(found['points'])} settings measured; what is learned is shared by "
        f"{found['stored']:,}. Bold: recommended of its kind. "
    )
    return markdown(head, body) + f"\n{text}{caption}\n"
