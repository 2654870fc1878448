"""A bank of vectors from which the sub-vectors of a point set are mixed, a few each: how VB-LoRA is started."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

MOST_PAIRS = 1 << 24  # squared distances in memory at once, 128 MiB
KMEANS_STEPS = 10
LEAST_WEIGHT = 1e-3  # a weight of 0 would have the logit -inf, and its gradient would stay 0


class Bank(NamedTuple):
    """vectors (h, s), and for each of the n sub-vectors the indices (n, K) and logits (n, K) of those it mixes."""

    vectors: Tensor
    indices: Tensor
    logits: Tensor

    def sub_vectors(self) -> Tensor:
        """(n, s): softmax(logits) times the chosen vectors."""
        return (self.logits.softmax(1)[..., None] * self.vectors[self.indices]).sum(1)


def choose_vectors(points: Tensor, vectors: Tensor, count: int) -> Bank:
    """A bank of these vectors (h, s), with `count` of them and their weights chosen for every point (n, s).

    Greedy: the nearest vector first, then each time the vector that brings the mixture nearest to the point, by a step
    t in [0, 1] from y to (1 - t) y + t v. No point has a vector twice. Points are taken in blocks that fit into memory.
    """
    blocks = torch.split(points, max(1, MOST_PAIRS // len(vectors)))
    indices, weights = zip(*(_choose(block, vectors, count) for block in blocks), strict=True)
    return Bank(vectors, torch.cat(indices), torch.cat(weights).clamp_min(LEAST_WEIGHT).log())


def _choose(x: Tensor, vectors: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Indices and weights (n, count) of one block of points (n, s)."""
    nearest = _squared_distances(x, vectors).argmin(1)
    y, indices, weights = vectors[nearest], nearest[:, None], x.new_ones(len(x), 1)
    for _ in range(count - 1):
        index, t = best_step(x, y, vectors, indices)
        y = (1 - t[:, None]) * y + t[:, None] * vectors[index]
        weights = torch.cat([weights * (1 - t[:, None]), t[:, None]], 1)
        indices = torch.cat([indices, index[:, None]], 1)
    return indices, weights


def best_step(x: Tensor, y: Tensor, vectors: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """For every point x_n, from its approximation y_n, the v of `vectors` and t with the least ||x - (1 - t) y - t v||.

    Vectors `used` (n, m), by their indices, are left out. Returns the index of v and t in [0, 1], (n,) each. With
    g = x - y and d = v - y the best t is <g, d> / ||d||^2, and ||g - t d||^2 = ||g||^2 - 2 t <g, d> + t^2 ||d||^2.
    """
    g = x - y
    gd = g @ vectors.mT - (g * y).sum(1)[:, None]
    dd = _squared_distances(y, vectors)
    t = (gd / torch.where(dd > 0, dd, 1)).clamp(0, 1)
    loss = (g * g).sum(1)[:, None] - 2 * t * gd + t * t * dd
    loss.scatter_(1, used, math.inf)
    index = loss.argmin(1)
    return index, t.gather(1, index[:, None])[:, 0]


def cluster_means(points: Tensor, centres: Tensor) -> Tensor:
    """Centres (h, s) of the points (n, s) after a few steps of k-means from `centres`.

    A centre without points moves to one of the points that are farthest from their centres.
    """
    h = len(centres)
    for _ in range(KMEANS_STEPS):
        distance, nearest = _squared_distances(points, centres).min(1)
        count = points.new_zeros(h).index_add(0, nearest, torch.ones_like(distance))
        sums = torch.zeros_like(centres).index_add(0, nearest, points)
        empty = (count == 0).nonzero()[:, 0][: len(points)]
        centres = sums / count.clamp_min(1)[:, None]
        centres[empty] = points[distance.argsort(descending=True)[: len(empty)]]
    return centres


def _squared_distances(X: Tensor, Y: Tensor) -> Tensor:
    """||x_n - y_m||^2, (n, m)."""
    return ((X * X).sum(1)[:, None] - 2 * X @ Y.mT + (Y * Y).sum(1)).clamp_min(0)
