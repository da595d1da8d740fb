"""Vectors for tests."""

from __future__ import annotations

import torch


def skewed(n: int, dim: int, seed: int = 0) -> torch.Tensor:
    """Vectors with a mean and loud directions that are not axes."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(99)))[0]
    spread = torch.arange(1, dim + 1) ** -0.7
    return (torch.randn(n, dim, generator=generator) * spread) @ mix + 0.05


def recall(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Share of the exact neighbours (q, k) among those found."""
    return float((found.unsqueeze(2) == exact.unsqueeze(1)).any(1).float().mean())


def clustered(n: int, dim: int, clusters: int, seed: int = 0) -> torch.Tensor:
    """Vectors around centres, nearer to them than these to each other."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(clusters, dim, generator=torch.Generator().manual_seed(77))
    which = torch.randint(clusters, (n,), generator=generator)
    return centres[which] + torch.randn(n, dim, generator=generator)
