"""The parts of a training loop: batches, learning rate, loss, and the ranks of the answers."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from experiments.models.data import Pair


def ranks(queries: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Return the rank of answer i among all answers to query i, (n,); ties, and what is not finite, count as worst.

    So a collapsed model, which gives all texts one embedding, has rank n everywhere, not 1.
    """
    scores = queries @ answers.T
    return len(scores) - (scores < scores.diag().unsqueeze(1)).sum(1)


def info_nce(q: torch.Tensor, c: torch.Tensor, temperature: float) -> torch.Tensor:
    """InfoNCE over a batch, in both directions: unit vectors (n, hidden) of the queries and of their answers."""
    logits, target = q @ c.T / temperature, torch.arange(len(q), device=q.device)
    cross_entropy = torch.nn.functional.cross_entropy
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2


def rate_at(step: int, steps: int, warmup: int) -> float:
    """Return the fraction of the learning rate at a step: linear warm-up, then linear decay."""
    return min((step + 1) / warmup, (steps - step) / max(steps - warmup, 1), 1.0)


def shuffled_batches(pairs: list[Pair], size: int, seed: int) -> Iterator[list[Pair]]:
    """Yield batches without end, in an order that the seed alone decides."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while True:
        if len(order) < size:
            order = torch.randperm(len(pairs), generator=generator).tolist()
        yield [pairs[i] for i in order[:size]]
        order = order[size:]
