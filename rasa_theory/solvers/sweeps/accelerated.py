"""Sweeps on the core, which is small and in memory: many of them for one pass over M, each from beyond the last."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from rasa_theory import linalg
from rasa_theory.linalg import Recorded, Unchecked
from rasa_theory.problem import RasaFactors
from rasa_theory.solvers import updates
from rasa_theory.solvers.descent import BestSoFar, Descent, Extrapolated

Swept = tuple[RasaFactors, float]
"""Factors after a sweep, and their squared error."""

_ENOUGH = 1e-3  # sweeps end where one gains less than this share of the gain of all since the first


def core_sweeps(K: Tensor, factors: RasaFactors, common: tuple[int, int], count: int) -> tuple[RasaFactors, float]:
    """The factors after at most `count` joint sweeps on K (L, n, m), float64, and their squared error.

    Only the first common[0] rows of B_S move, and the first common[1] columns of A_S. The sweeps after the first are
    `Extrapolated`, so the error never rises.
    """
    # Sweeps on the core cost no pass over M, so it pays to go on until they stall. How far they can go is limited by
    # the bases, not by the core: the next pass brings new directions and makes the last digits here worthless. Hence
    # the loose end at a thousandth of the gain since the first sweep. The first sweep itself is left out of that gain,
    # since it takes up the new directions and would hide all others.
    sweep = sweeps_on(K, common, replayed=K.device.type == "cuda" and factors.sharding.alone)
    with linalg.suitable_threads(K):  # the core is small even where the layers are not
        descent = Descent(BestSoFar(Extrapolated(sweep, _beyond)), *sweep(factors))
        descent.advance(count - 1, _gains_little)
    return descent.point, min(descent.history)


def _gains_little(history: list[float]) -> bool:
    before, error = history[-2:]
    return not error < before or before - error < _ENOUGH * (history[0] - error)


def sweeps_on(K: Tensor, common: tuple[int, int], replayed: bool) -> Callable[[RasaFactors], Swept]:
    """A function from factors to the factors after a joint sweep on K, and their squared error.

    `replayed` sweeps are played from a recording where that is sound; they need a GPU and a single process.
    """
    sweep = SweepOnCore(K, common)
    return ReplayedSweep(sweep) if replayed else sweep


class SweepOnCore:
    """A joint sweep on K (L, n, m) in memory: factors -> (factors, squared error)."""

    def __init__(self, K: Tensor, common: tuple[int, int]) -> None:
        self._norms = torch.linalg.matrix_norm(K)
        self._sides = partial(linalg.product, K), partial(linalg.product, K.mT)
        self._common = common

    def __call__(self, factors: RasaFactors) -> Swept:
        half = updates.joint_sweep(self._sides, self._norms, factors, self._common)
        return half.factors, float(half.error)

    def unchecked(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The same without a look at rounding: [error, whether all steps were sound], and the five factors."""
        algebra = Unchecked()
        half = updates.joint_sweep(self._sides, self._norms, RasaFactors(*tensors), self._common, algebra)
        return torch.stack([half.error, algebra.sound.to(half.error)]), *half.factors.named().values()


Function = Callable[..., tuple[Tensor, ...]]
Record = Callable[[Function], Function]


class ReplayedSweep:
    """A sweep on the core, recorded on a GPU and replayed.

    On a GPU a sweep is some three hundred small kernels, which take less time than their launch. All sweeps but the
    first are played from a recording, unchecked. One that was not sound is done again with all checks. The first one is
    checked, since it sets up the libraries that a recording needs.
    """

    def __init__(self, sweep: SweepOnCore, record: Record = Recorded) -> None:
        self._sweep = sweep
        self._record = record
        self._replay: Function | None = None

    def __call__(self, factors: RasaFactors) -> Swept:
        if self._replay is None:
            self._replay = self._record(self._sweep.unchecked)
            return self._sweep(factors)
        facts, *tensors = self._replay(*factors.named().values())
        error, sound = facts.tolist()
        return (RasaFactors(*tensors), error) if sound else self._sweep(factors)


def _beyond(point: RasaFactors, before: RasaFactors, stride: float) -> RasaFactors:
    """point + stride (point - before), with unit columns in the pool."""
    pairs = zip(point.named().values(), before.named().values(), strict=True)
    return RasaFactors(*(x + stride * (x - y) for x, y in pairs), sharding=point.sharding).normalised()
