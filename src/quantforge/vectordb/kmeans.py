"""Centroids of lists: k-means++ seeds, mini-batch steps, and lists of not too different lengths.

Sources: Arthur and Vassilvitskii, SODA 2007 (seeds); Sculley, WWW 2010 (mini-batches).
"""

from __future__ import annotations

import torch

ROWS_PER_LIST = 64
"""Vectors that a list learns from: more of them hardly move it."""
EPOCHS = 6
BATCH = 8192
SEED_ROUNDS = 64
"""Seeds are drawn in so many rounds; those of a round do not know of each other."""
LONGEST = 4.0
"""A list longer than so many times the mean is split."""
SPLIT_ROUNDS = 6
TILE_NUMBERS = 1 << 24


def nearest(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Return the nearest centroid of each vector (n, dim), (n,) int64."""
    half = centroids.square().sum(-1) / 2
    step = max(1, TILE_NUMBERS // len(centroids))
    found = [(part @ centroids.T - half).argmax(-1) for part in x.split(step)]
    return torch.cat(found)


def step(
    x: torch.Tensor, centroids: torch.Tensor, counts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Move each centroid to the mean of what it has seen, `counts` vectors and its part of x.

    Args:
        x: (n, dim).
        centroids: (lists, dim).
        counts: (lists,) float32; zeros make a step of Lloyd's algorithm.

    Returns:
        The centroids and counts after it.
    """
    labels = nearest(x, centroids)
    new = torch.bincount(labels, minlength=len(centroids)).to(counts.dtype)
    total = torch.zeros_like(centroids).index_add_(0, labels, x)
    seen = counts + new
    moved = centroids + (total - new[:, None] * centroids) / seen.clamp_min(1)[:, None]
    return torch.where(new[:, None] > 0, moved, centroids), seen


def learn_centroids(x: torch.Tensor, nlist: int, seed: int) -> torch.Tensor:
    """Return nlist centroids (nlist, dim) of vectors (n, dim), n at least nlist.

    Cost: about EPOCHS n nlist dim multiplications, for n up to ROWS_PER_LIST nlist.
    """
    generator = torch.Generator().manual_seed(seed)
    wanted = min(len(x), ROWS_PER_LIST * nlist)
    x = x[torch.randperm(len(x), generator=generator)[:wanted].to(x.device)]
    centroids = _seeds(x, nlist, generator)
    counts = centroids.new_zeros(nlist)
    for _ in range(EPOCHS):
        order = torch.randperm(len(x), generator=generator).to(x.device)
        counts.zero_()
        for batch in order.split(max(BATCH, 4 * nlist)):
            centroids, counts = step(x[batch], centroids, counts)
    return _balanced(x, centroids)


def imbalance(sizes: torch.Tensor) -> float:
    """Return how much longer a scan of a random row's list is than with equal lists, from 1."""
    total = sizes.double().sum()
    return float(len(sizes) * sizes.double().square().sum() / total.square()) if total else 1.0


def _seeds(x: torch.Tensor, nlist: int, generator: torch.Generator) -> torch.Tensor:
    """Draw vectors, each with a probability in proportion to its squared distance from the rest."""
    first = int(torch.randint(len(x), (1,), generator=generator))
    chosen = [x[first : first + 1]]
    left = (x - chosen[0]).square().sum(-1)
    own = x.square().sum(-1)
    count = 1
    while count < nlist:
        size = min(nlist - count, max(1, nlist // SEED_ROUNDS))
        # an exponential of rate w comes first among many with probability w / sum(w)
        waits = torch.empty(len(x)).exponential_(generator=generator).to(x.device)
        drawn = (waits / left.clamp_min(1e-30)).topk(size, largest=False).indices
        chosen.append(x[drawn])
        distance = own[:, None] - 2 * x @ x[drawn].T + own[drawn]
        left = torch.minimum(left, distance.amin(-1).clamp_min(0))
        count += size
    return torch.cat(chosen)


def _balanced(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Split lists that are too long into places of the shortest ones."""
    nlist = len(centroids)
    for _ in range(SPLIT_ROUNDS):
        labels = nearest(x, centroids)
        sizes = torch.bincount(labels, minlength=nlist)
        long = (sizes > LONGEST * len(x) / nlist).nonzero()[:, 0]
        if not len(long):
            break
        short = sizes.argsort(stable=True)[: len(long)]
        centroids = centroids.clone()
        for big, small in zip(long.tolist(), short.tolist(), strict=True):
            members = x[labels == big]
            far = members[(members - centroids[big]).square().sum(-1).argmax()]
            pair = torch.stack([centroids[big], far])
            for _ in range(EPOCHS):
                pair, _ = step(members, pair, pair.new_zeros(2))
            centroids[big], centroids[small] = pair
        centroids, _ = step(x, centroids, centroids.new_zeros(nlist))
    return centroids
