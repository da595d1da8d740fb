"""What a mask says is looked up once, and again when it has changed."""

from __future__ import annotations

import pytest
import torch

from quantforge.ops import masks
from quantforge.ops.masks import is_plainly_causal


def _causal(q: int, n: int) -> torch.Tensor:
    return torch.ones(2, 1, q, n, dtype=torch.bool).tril(n - q)


@pytest.mark.parametrize(("q", "n"), [(1, 1), (1, 9), (5, 5), (4, 9)])
def test_causal(q: int, n: int) -> None:
    assert is_plainly_causal(_causal(q, n))
    for b, i, j in ((0, 0, 0), (1, q - 1, n - 1), (1, 0, n - q)):
        mask = _causal(q, n)
        mask[b, 0, i, j] ^= True
        assert not is_plainly_causal(mask)


def test_more_queries_than_positions() -> None:
    assert not is_plainly_causal(torch.ones(3, 2, dtype=torch.bool))


def test_a_mask_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    look = masks._look
    monkeypatch.setattr(masks, "_look", lambda mask: looks.append(1) or look(mask))
    mask = torch.ones(1, 1, 4, 12, dtype=torch.bool)
    mask[..., :10] = _causal(4, 10)[:1]
    for _ in range(3):  # every layer makes its own view
        assert is_plainly_causal(mask[..., :10])
    assert len(looks) == 1
    assert not is_plainly_causal(mask)
    assert len(looks) == 2
    mask[..., 0] = False
    assert not is_plainly_causal(mask[..., :10])
    assert len(looks) == 3


def test_under_inference_mode() -> None:
    with torch.inference_mode():
        mask = _causal(3, 7)
        assert is_plainly_causal(mask)
        mask[..., 0] = False
        assert not is_plainly_causal(mask)


def test_a_trace_does_not_look() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert not is_plainly_causal(torch.ones(1, 1, 1, 4, dtype=torch.bool))
