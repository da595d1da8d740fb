"""The number of candidates gives the recall that was asked for."""

from __future__ import annotations

import pytest
import torch

from quantforge.vectordb.candidates import chances, choose, enough

N, K = 3000, 10


def scored(seed: int, noise: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return true scores (q, n), measured ones, and standard errors, which differ by row."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(200, N, generator=generator)
    errors = noise * (0.5 + torch.rand(200, N, generator=generator))
    return truth, truth + errors * torch.randn(200, N, generator=generator), errors


@pytest.mark.parametrize("recall", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("noise", [0.03, 0.3])
def test_the_recall_is_the_one_asked_for(noise: float, recall: float) -> None:
    truth, scores, errors = scored(1, noise)

    def best(m: int) -> tuple[torch.Tensor, torch.Tensor]:
        found = scores.topk(m, dim=1)
        return found.values, found.indices

    def exact_of(rows: torch.Tensor) -> torch.Tensor:
        return truth.gather(1, rows.clamp_min(0)).masked_fill(rows < 0, -torch.inf)

    exact, rows = choose(best, lambda rows: errors.gather(1, rows), exact_of, N, K, recall)
    assert torch.equal(exact, exact_of(rows))
    wanted = truth.topk(K, dim=1).indices
    reached = (rows.unsqueeze(2) == wanted.unsqueeze(1)).any(1).float().mean()
    assert reached > recall - 0.01
    counts = (rows >= 0).sum(1).float()
    assert counts.min() >= K
    plain = (best(K)[1].unsqueeze(2) == wanted.unsqueeze(1)).any(1).float().mean()
    if plain < recall - 0.05:  # it does something, and not by taking everything
        assert K < counts.mean() < 60 * K * noise + K


def test_chances_are_those_of_two_rows() -> None:
    scores, errors = torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 4.0]])
    found = chances(scores, errors, 1)[0]
    # both p at the common border t: Phi((1 - t) / 3) + Phi(-t / 4) = 1 at t = 4 / 7
    expected = torch.special.ndtr(torch.tensor([1 / 7, -1 / 7]))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_clear_cases_need_k_candidates() -> None:
    scores = torch.arange(100.0, 0, -1).expand(3, 100)
    chance = chances(scores, torch.full((3, 100), 1e-3), 7)
    assert enough(chance, 7, 0.999).tolist() == [7, 7, 7]
    assert enough(chances(scores, torch.zeros(3, 100), 7), 7, 0.999).tolist() == [7, 7, 7]


def test_rows_that_are_not_there_have_no_chance() -> None:
    scores = torch.tensor([[2.0, 1.0, -torch.inf, -torch.inf]])
    rows = torch.tensor([[5, 3, -1, -1]])
    _, found = choose(
        lambda m: (scores[:, :m], rows[:, :m]),
        lambda r: torch.ones(r.shape),
        lambda r: scores[:, : r.shape[1]].masked_fill(r < 0, -torch.inf),
        *(4, 3, 0.99),
    )
    assert found[0, :2].tolist() == [5, 3]
    assert (found[0, 2:] == -1).all()
    assert torch.allclose(chances(scores, torch.ones(1, 4), 3)[0, 2:], torch.zeros(2))
