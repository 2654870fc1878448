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

_ENOUGH = 1e-3  # sweeps end where one gains less than this share of what all have gained


def core_sweeps(K: Tensor, factors: RasaFactors, common: tuple[int, int], count: int) -> tuple[RasaFactors, float]:
    """A joint sweep on K (L, n, m), float64, and up to `count` - 1 steps more: the factors and their squared error.

    B_S has its first common[0] rows only, and A_S its first common[1] columns. A step sweeps from
    beyond the last point, by so much of the last change as grows while this lowers the error and shrinks where it does
    not; there, and in the first step, it sweeps from the point itself. So the error never rises. Steps end where one
    gains less than a thousandth of what all have gained.
    """
    swept = sweeps_on(K, common, replayed=K.device.type == "cuda" and factors.sharding.alone)
    before, (point, error) = factors, swept(factors)
    begun, step = error, 0.0
    for _ in range(count - 1):
        found, lower = swept(_beyond(point, before, step)) if step > 0 else swept(point)
        if step == 0:
            step = 1.0
        elif lower < error:
            step *= 1.3
        else:
            step = max(step / 2, 0.5)
            found, lower = swept(point)
        if not lower < error:
            break
        gain, before, point, error = error - lower, point, found, lower
        if gain < _ENOUGH * (begun - error):
            break
    return point, error


def sweeps_on(K: Tensor, common: tuple[int, int], replayed: bool) -> Callable[[RasaFactors], tuple[RasaFactors, float]]:
    """Factors -> the factors after a sweep on K, and their error.

    On a GPU a sweep is some three hundred small kernels, which take less time than their launch: `replayed`, all but
    the first are played from a recording, unchecked, and only one that was not sound is done again with all checks.
    """
    norms, sides = torch.linalg.matrix_norm(K), (partial(linalg.product, K), partial(linalg.product, K.mT))

    def checked(factors: RasaFactors) -> tuple[RasaFactors, float]:
        found, error = updates.joint_sweep(sides, norms, factors, common)
        return found, float(error)

    def unchecked(*tensors: Tensor) -> tuple[Tensor, ...]:
        algebra = Unchecked()
        found, error = updates.joint_sweep(sides, norms, RasaFactors(*tensors), common, algebra)
        return torch.stack([error, algebra.sound.to(error)]), *found.named().values()

    recorded: Recorded | None = None

    def swept(factors: RasaFactors) -> tuple[RasaFactors, float]:
        nonlocal recorded
        if recorded is None:  # the first one sets up what a recording needs
            recorded = Recorded(unchecked)
            return checked(factors)
        facts, *found = recorded(*factors.named().values())
        error, sound = facts.tolist()
        return (RasaFactors(*found), error) if sound else checked(factors)  # replayed in one process only

    return swept if replayed else checked


def _beyond(point: RasaFactors, before: RasaFactors, step: float) -> RasaFactors:
    """point + step (point - before), with unit columns in the pool."""
    pairs = zip(point.named().values(), before.named().values(), strict=True)
    return RasaFactors(*(x + step * (x - y) for x, y in pairs), sharding=point.sharding).normalised()
