"""Sweeps on the core that stay inside the bound on terms."""

from __future__ import annotations

from torch import Tensor

from rasa_theory.problem import RasaFactors
from rasa_theory.solvers.search import Batch, BatchedSweeps, Multipliers, inside

_TRIES = 4  # rounds of `count` sweeps, at most
_GAIN = 1e-5  # the relative decrease at which no further round is tried


def bounded_sweeps(
    K: Tensor,
    factors: RasaFactors,
    common: tuple[int, int],
    count: int,
    limits: Tensor,
    multipliers: Multipliers | None,
) -> tuple[RasaFactors, float, Multipliers]:
    """Factors inside the bound after sweeps on K (L, n, m) with multipliers; `factors` themselves if none are lower.

    `count` sweeps are repeated until the error has fallen by `_GAIN`, at most `_TRIES` times, since multipliers take
    some sweeps to settle. Only the first common[0] rows of B_S move, and the first common[1] columns of A_S. Returns
    the factors, their squared error, and the multipliers for the next sweeps. With several processes each does the same
    for all layers.
    """
    sharding = factors.sharding
    K, limits = sharding.all_gather(K), sharding.all_gather(limits)
    start = Batch.of([factors.gathered()])
    sweeps = BatchedSweeps(K, start, limits, common, multipliers)
    before = float((start.residual(K) ** 2).sum())
    lowest, result = before, factors
    for _ in range(_TRIES):
        batch, errors = inside(K, sweeps.run(count).batch, limits)
        if float(errors[0]) < lowest:
            lowest, result = float(errors[0]), batch.factors()[0].sharded(sharding)
        if lowest < (1 - _GAIN) * before:
            break
    return result, lowest, sweeps.multipliers
