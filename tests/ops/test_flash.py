"""How a history is cut into chunks for torch's dense kernels."""

from __future__ import annotations

import pytest
import torch

from quantforge.ops import flash

LONGEST = [1024, 2048, 16384]


@pytest.mark.parametrize("longest", LONGEST)
def test_chunks_cover_the_history_once(longest: int) -> None:
    for n in [*range(1, 3000, 7), 4096, 20_000, 32_768, 100_001]:
        cut = sorted(flash.chunks(n, longest))
        ends = [first + length for first, length in cut]
        assert [first for first, _ in cut] == [0, *ends[:-1]]
        assert ends[-1] == n
        assert max(length for _, length in cut) <= longest


@pytest.mark.parametrize("longest", LONGEST)
def test_cudnn_meets_few_lengths(longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    met = set()

    def cudnn(query: torch.Tensor, key: torch.Tensor, *rest: object) -> flash.Partial:
        met.add(key.shape[2])
        return query, query

    monkeypatch.setattr(flash, "has_cudnn", lambda query: True)
    monkeypatch.setattr(flash, "cudnn", cudnn)
    monkeypatch.setattr(flash, "flash", lambda query, *rest: (query, query))
    x = torch.empty(1, 1, 1, 1)
    for n in range(1, 70_000, 13):
        for first, length in flash.chunks(n, longest):
            rows = x.expand(1, 1, first + length, 1)[:, :, first:]
            flash.attend(x, rows, rows, 1.0)
    assert met <= {1 << power for power in range(9, 15)}
    assert longest in met


def test_few_tokens_of_a_history_are_left_to_flash() -> None:
    """So the cost of a length between two powers stays near that of cuDNN's share."""
    for n in range(2048, 70_000, 97):
        rest = [length for _, length in flash.chunks(n, 16384) if length & (length - 1)]
        assert sum(rest) < 512


@pytest.mark.parametrize(
    ("token_bytes", "rows", "tokens"),
    [
        (4 * 128 * 8, 2048, 16384),  # one sequence of 8 key heads: 64 MiB
        (4 * 128 * 64, 2048, 4096),  # eight: 128 MiB, an output of 2048 rows takes 32
        (4 * 128 * 64, 256, 2048),
        (4 * 128 * 2048, 2048, 1024),  # never less
        (4 * 80 * 8, 512, 16384),
    ],
)
def test_longest_chunk(token_bytes: int, rows: int, tokens: int) -> None:
    assert flash.longest_chunk(token_bytes, rows) == tokens
