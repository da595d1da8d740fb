"""What an optimizer has to say: readable advice, and the settings as a file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from quantforge import settings
from quantforge.errors import UnsupportedError


@dataclass(frozen=True)
class Recommendation:
    """What to use, and what that means; `print` it.

    Attributes:
        what: the settings, as code.
        why: how they were chosen, and against what.
        expected: accuracy on data that had no say in the choice.
        nbytes: of a vector, or of a cache at some length, and how much that saves.
        gives_up: what is lost against no compression and against the most accurate setting.
    """

    what: str
    why: str
    expected: str
    nbytes: str
    gives_up: str

    def __str__(self) -> str:
        lines = (
            ("use", self.what), ("why", self.why), ("expect", self.expected),
            ("bytes", self.nbytes), ("gives up", self.gives_up),
        )  # fmt: skip
        return "\n".join(f"{label:9} {text}" for label, text in lines)


def call(config: Any) -> str:
    """Return the code that makes a config, defaults left out."""
    shown = [
        f"{field.name}={value!r}"
        for field in fields(config)
        if (value := getattr(config, field.name)) != field.default
    ]
    return f"{type(config).__name__}({', '.join(shown)})"


@dataclass(frozen=True)
class Chosen:
    """Settings that were chosen.

    Attributes:
        sections: of a file of settings, by what reads them: "vectors", "index", "cache".
    """

    sections: Mapping[str, Mapping[str, Any]]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file for `QuantForgeConfig`, `IndexConfig` and `QuantForgeCache.from_file`."""
        settings.write(path, self.sections)


def draw(
    path: str | os.PathLike[str],
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    front: tuple[Sequence[float], Sequence[float]],
    labels: tuple[str, str],
    title: str,
    *,
    log: bool,
) -> None:
    """Draw points and the line of those that no other beats (needs the extra `plot`).

    Args:
        path: .svg, .png, ...
        series: x and y by name.
        front: x and y of the line.
        labels: of the axes.
        title: of the figure.
        log: whether y is drawn by its logarithm.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise UnsupportedError('a plot needs matplotlib: pip install "quantforge[plot]"') from error

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, (x, y) in series.items():
        axes.plot(x, y, "o", markersize=4, alpha=0.7, label=name)
    axes.plot(*front, "-", color="0.4", linewidth=1, zorder=0, label="not beaten in both")
    axes.set(xlabel=labels[0], ylabel=labels[1], title=title)
    if log:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(Path(path), metadata={"Date": None} if str(path).endswith(".svg") else None)
