"""Good bytes made bad, from a random state that says which."""

from __future__ import annotations

import json
import random
from typing import Any

TOKENS = (b"-1", b"9999999999", b"\0", b"(", b"\xff\xff\xff\x7f", b"1e9", b"\xff" * 8, b"9" * 8)
VALUES: list[Any] = [None, True, -1, 0, 1, 2**31, 2**63, 10**30, -0.5, "", "x", "9", [], {}, [-1],
                     [[1]], {"a": 1}, "\ud800", float("nan"), 1e308]  # fmt: skip
_NEAR = 400


def mutated(rng: random.Random, body: bytes) -> bytes:
    """Return bytes with up to eight places changed, more often near the start or the end."""
    found = bytearray(body)
    for _ in range(rng.choice([0, 1, 1, 2, 8])):
        at = _place(rng, len(found) + 1)
        how = rng.randrange(6)
        if how == 0 and at < len(found):
            found[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            del found[at : at + rng.choice([1, 8, 1000])]
        elif how == 2:
            found[at:at] = rng.randbytes(rng.choice([1, 8, 64]))
        elif how == 3:
            token = rng.choice(TOKENS)
            found[at : at + len(token)] = token
        elif how == 4:
            found[at:at] = rng.choice(TOKENS)
        else:
            del found[at:]
    return bytes(found)


def _place(rng: random.Random, size: int) -> int:
    near = min(size, _NEAR)
    where = rng.randrange(4)
    if where == 0:
        return rng.randrange(near)
    return size - 1 - rng.randrange(near) if where == 1 else rng.randrange(size)


def mutated_json(rng: random.Random, text: bytes) -> bytes:
    """Return JSON with one value replaced, removed or doubled, also in strings that hold JSON."""
    value = json.loads(text)
    return json.dumps(_changed(rng, value)).encode()


def _changed(rng: random.Random, value: Any) -> Any:
    if isinstance(value, str) and value[:1] in ("{", "[") and rng.random() < 0.9:
        try:
            return json.dumps(_changed(rng, json.loads(value)))
        except ValueError:
            return rng.choice(VALUES)
    if not isinstance(value, dict | list) or not value or rng.random() < 0.1:
        return rng.choice(VALUES)
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    key = rng.choice(list(copy)) if isinstance(copy, dict) else rng.randrange(len(copy))
    how = rng.random()
    if how < 0.1:
        del copy[key]
    elif how < 0.2 and isinstance(copy, dict):
        copy[rng.choice(["x", "", key + "."])] = copy.pop(key)
    elif how < 0.2:
        copy.append(copy[key])
    else:
        copy[key] = _changed(rng, copy[key])
    return copy


def mutated_safetensors(rng: random.Random, body: bytes) -> bytes:
    """Return a safetensors file whose header says something else, and is well-formed."""
    size = int.from_bytes(body[:8], "little")
    header = mutated_json(rng, body[8 : 8 + size])
    return len(header).to_bytes(8, "little") + header + body[8 + size :]
