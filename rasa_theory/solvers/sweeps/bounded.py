"""Sweeps on the core that stay inside the bound on terms."""

from __future__ import annotations

from torch import Tensor

from rasa_theory.problem import RasaFactors
from rasa_theory.solvers.search import Batch, BatchedSweeps, Multipliers, inside


def bounded_sweeps(
    K: Tensor,
    factors: RasaFactors,
    common: tuple[int, int],
    count: int,
    limits: Tensor,
    multipliers: Multipliers | None,
) -> tuple[RasaFactors, float, Multipliers]:
    """The factors after `count` sweeps on K (L, n, m) with multipliers, moved inside the bound if that is lower.

    Only the first common[0] rows of B_S move, and the first common[1] columns of A_S. Returns the factors, their
    squared error, and the multipliers for the next sweeps. With several processes each does the same for all layers.
    """
    sharding = factors.sharding
    K, limits = sharding.all_gather(K), sharding.all_gather(limits)
    start = Batch.of([factors.gathered()])
    sweeps = BatchedSweeps(K, start, limits, common, multipliers).run(count)
    batch, errors = inside(K, sweeps.batch, limits)
    before = float((start.residual(K) ** 2).sum())
    if float(errors[0]) < before:
        return batch.factors()[0].sharded(sharding), float(errors[0]), sweeps.multipliers
    return factors, before, sweeps.multipliers
