"""Sweeps on the core that stay inside the bound on terms."""

from __future__ import annotations

from torch import Tensor

from rasa_theory.problem import RasaFactors
from rasa_theory.solvers.search import Batch, BatchedSweeps, Multipliers, inside

_TRIES = 4  # at most this many times as many sweeps as asked for
_GAIN = 1e-5  # of the error: a change worth ending for


def bounded_sweeps(
    K: Tensor,
    factors: RasaFactors,
    common: tuple[int, int],
    count: int,
    limits: Tensor,
    multipliers: Multipliers | None,
) -> tuple[RasaFactors, float, Multipliers]:
    """The factors after `count` sweeps on K (L, n, m) with multipliers, moved inside the bound.

    The sweeps go on where that is not lower, for multipliers may take some time to settle; after a few times as many
    the factors stay what they were. Only the first common[0] rows of B_S move, and the first common[1] columns of A_S.
    Returns the factors, their squared error, and the multipliers for the next sweeps. With several processes each does
    the same for all layers.
    """
    sharding = factors.sharding
    K, limits = sharding.all_gather(K), sharding.all_gather(limits)
    start = Batch.of([factors.gathered()])
    sweeps = BatchedSweeps(K, start, limits, common, multipliers)
    before = float((start.residual(K) ** 2).sum())
    for _ in range(_TRIES):
        batch, errors = inside(K, sweeps.run(count).batch, limits)
        if float(errors[0]) < (1 - _GAIN) * before:
            return batch.factors()[0].sharded(sharding), float(errors[0]), sweeps.multipliers
    return factors, before, sweeps.multipliers
