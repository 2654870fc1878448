"""Sweeps on the core, which is small and in memory: many of them for one pass over M, each from beyond the last."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from rasa_theory import linalg, updates
from rasa_theory.algebra import Recorded, Unchecked
from rasa_theory.factors import RasaFactors

_Sweep = Callable[[RasaFactors, RasaFactors, float], tuple[RasaFactors, float]]


def core_sweeps(K: Tensor, factors: RasaFactors, common: tuple[int, int], count: int) -> tuple[RasaFactors, float]:
    """At most `count` joint sweeps on K (L, n, m), in which B_S has its first `common` rows only, and A_S its columns.

    Every sweep but the first begins beyond the last point, by a step that grows while this lowers the error and
    shrinks where it does not; such a point is kept only if its error after the sweep is lower. So the error never
    rises. Ends early where a sweep gains less than a thousandth of what all have gained.
    """
    swept = _sweeps_on(K, common, replayed=K.device.type == "cuda")
    point, error = swept(factors, factors, 0.0)
    begun, before, step = error, point, 1.0
    for _ in range(count - 1):
        found, lower = point, math.inf
        if before is not point:
            found, lower = swept(point, before, step)
            step = step * 1.3 if lower < error else max(step / 2, 0.5)
        if not lower < error:
            found, lower = swept(point, point, 0.0)
        if not lower < error:
            break
        gain, point, before, error = error - lower, found, point, lower
        if gain < 1e-3 * (begun - error):
            break
    return point, error


def _sweeps_on(K: Tensor, common: tuple[int, int], replayed: bool) -> _Sweep:
    """(point, the one before, step) -> the factors after a sweep from point + step (point - before), and their error.

    On a GPU a sweep is some three hundred small kernels, which take less time than their launch: from the second on
    they are replayed, unchecked, and only what was not sound is done again with all checks.
    """
    norms, sides = torch.linalg.matrix_norm(K), (partial(linalg.product, K), partial(linalg.product, K.mT))

    def checked(point: RasaFactors, before: RasaFactors, step: float) -> tuple[RasaFactors, float]:
        found, error = updates.joint_sweep(sides, norms, _beyond(point, before, step), common)
        return found, float(error)

    if not replayed:
        return checked

    def unchecked(step: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        algebra = Unchecked()
        begun = _beyond(RasaFactors(*tensors[:5]), RasaFactors(*tensors[5:]), step)
        found, error = updates.joint_sweep(sides, norms, begun, common, algebra)
        return torch.stack([error, algebra.sound.to(error)]), *found.named().values()

    recorded, calls = Recorded(unchecked), itertools.count()

    def swept(point: RasaFactors, before: RasaFactors, step: float) -> tuple[RasaFactors, float]:
        if next(calls) > 0:
            facts, *found = recorded(norms.new_tensor(step), *point.named().values(), *before.named().values())
            error, sound = facts.tolist()
            if sound:
                return RasaFactors(*found), error
        return checked(point, before, step)

    return swept


def _beyond(point: RasaFactors, before: RasaFactors, step: float | Tensor) -> RasaFactors:
    if isinstance(step, float) and step == 0:
        return point
    pairs = zip(point.named().values(), before.named().values(), strict=True)
    return updates.normalise_pool(RasaFactors(*(x + step * (x - y) for x, y in pairs)))
