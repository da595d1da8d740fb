"""Named settings of a quantized KV cache; docs/fidelity.md has what each was measured to lose."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from quantforge.errors import ConfigError

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "quality": {"bits": 4, "sinks": 32, "window": 256},
        "balanced": {"bits": (4, 3)},
        "small": {"bits": 2, "importance": (4,), "budget": 2.4},
    }
)
"""From the least loss to the fewest bytes. "small" keeps more bits of the tokens that get the most
attention, which costs a further pass of attention over them."""


def preset_settings(name: str) -> dict[str, Any]:
    """Return the settings of a preset.

    Raises:
        ConfigError: if there is none of that name.
    """
    if name not in PRESETS:
        raise ConfigError(f"preset must be one of {', '.join(PRESETS)}; got {name!r}")
    return dict(PRESETS[name])
