"""The search behind the dual and the two-sided floor: quasi-Newton steps on a smoothed bound.

A floor is valid at whatever point a search ends, so no proof rests on this file.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.optimize
import torch
from torch import Tensor

from rasa_theory import linalg
from rasa_theory.common import positive, whole_number
from rasa_theory.linalg import orthogonal
from rasa_theory.problem import LayerStack, RankBudget

# Why the search smooths, and why it does so in stages.
#
# The bound is convex, but its minimum lies in corners, where eigenvalues meet. L-BFGS learns curvature from changes of
# the gradient, and in a corner the gradient jumps. So the steps lower a smoothed bound, see `smoothing`. Little
# smoothing hides little, but its curvature is like 1/mu and the steps are short. Much smoothing converges in few steps
# to a point that is too high by mu m / 2 at most. Therefore every stage starts where the one with more smoothing ended.
#
# Chosen by trial. 240 iterations on 3 layers of 96 x 96 of a bundled update, r = 4, k = 1, in units of e_lora:
#
#     smoothing                      dual      two-sided
#     five stages of 60             0.9546      0.9816
#     0.003 from the start          0.9527      0.9799
#     0.03 all the time             0.9538      0.9812
#     0.3 all the time              0.9493      0.9698
_SMOOTHING = (0.3, 0.1, 0.03, 0.01, 0.003)  # in units of the level, see `SearchScale`
_STAGE = 60  # iterations of one stage, at most

_MEMORY = 5  # pairs of steps and gradients that L-BFGS keeps, fewer than scipy's 10

# A stage ends when one iteration lowers the bound by less than this share of `rtol`, relative to the bound. A whole
# stage of such iterations would lower it by 6 % of `rtol` at most.
_DECREASE = 1e-3

# Least level in `leading_basis`, relative to the mean or largest one. The level of a layer of rank r is 0 up to
# rounding, about eps^2 of its energy. With this floor its directions count in full, and none divides by zero.
_LEAST_LEVEL = 1e-12

_NOISE = 0.05  # of the initial guess, in units of the square root of the level


@dataclass(frozen=True)
class FloorOptions:
    """Limits of the search for a floor, for each orientation of a stack.

    The search ends when smoothing hides less than `rtol` of e_lora, or at the first limit that it reaches.

    Arguments:
        max_iterations: greatest number of quasi-Newton iterations.
        max_seconds: greatest time in seconds. The first iteration is always finished.
        rtol: tolerance relative to e_lora.
        width: number of leading directions of each side in which the search moves. None: 5 L r, or 6 L r for k = r. Of
            the 384 directions of a bundled update at r = 8, k = 1, the default of 240 loses little: 0.0002 of e_lora in
            the dual floor, 0.0014 in the two-sided one. 160 directions lose 0.001 in the dual floor.

    Raises:
        InputError: a limit is not positive, or a number of iterations or directions is not whole.
    """

    max_iterations: int = 240
    max_seconds: float = 40.0
    rtol: float = 1e-3
    width: int | None = None

    def __post_init__(self) -> None:
        positive("max_iterations", whole_number("max_iterations", self.max_iterations))
        if self.width is not None:
            positive("width", whole_number("width", self.width))
        positive("max_seconds", self.max_seconds)
        positive("rtol", self.rtol)

    def width_of(self, stack: LayerStack, budget: RankBudget) -> int:
        """Number of directions of each side. A side with fewer uses them all."""
        return self.width or (5 if budget.private_rank else 6) * stack.layers * budget.rank


class SearchProgress(NamedTuple):
    """One finished iteration of a search for a floor.

    Attributes:
        search: "dual" or "two-sided".
        iteration: number of iterations so far, from 1.
        max_iterations: greatest number of iterations.
        value: the floor in the directions of the search, before its rounding is taken off: squared, in the units of the
            stack.
    """

    search: str
    iteration: int
    max_iterations: int
    value: float


SearchWatch = Callable[[SearchProgress], None]


@dataclass(frozen=True)
class SearchScale:
    """Squared sizes of a stack with e_lora > 0, in the units of its search.

    - level: the unit, the mean of sigma_{i,r+1}^2 over the layers. It is the size of what a floor decides about.
    - energy: ||M||^2 / level.
    - e_lora: e_lora / level.
    """

    level: float
    energy: float
    e_lora: float

    @classmethod
    def of(cls, view: LayerStack, budget: RankBudget) -> SearchScale:
        """The scale of the search for a floor of `view` at this budget."""
        level = level_of(view, budget.rank)
        return cls(level, view.norm_squared / level, view.spectra.tail_energy(budget.rank) / level)


def level_of(view: LayerStack, rank: int) -> float:
    """The mean of sigma_{i,r+1}^2 over the layers. It is 0 for r = min(b, a)."""
    if rank == min(view.shape):
        return 0.0
    return float((view.spectra.leading(rank + 1).S[:, rank] ** 2).mean())


Blocks = list[Tensor]
Vector = npt.NDArray[np.float64]


class Evaluation(NamedTuple):
    """A bound on the captured energy at one point, in units of the level.

    - smooth: the bound with smoothing, which the steps lower.
    - exact: the bound without smoothing, which counts.
    - gradients: of `smooth`, one for each block.
    """

    smooth: float
    exact: float
    gradients: Blocks


Objective = Callable[[Blocks, float], Evaluation]
"""A function (blocks of parameters, smoothing mu) -> the bound at this point."""


class Search:
    """Minimise a convex bound on the captured energy over several blocks of parameters.

    - solution: the blocks with the lowest bound so far, without smoothing.
    - best: this bound, in units of the level.

    The stages are explicit: `run_stage` runs the next one, `can_improve` tells whether there is reason to. `run` does
    all. A deadline is a time of `time.perf_counter`, and comes from the caller, so that searches can share one.
    """

    def __init__(
        self,
        name: str,
        objective: Objective,
        x0: Blocks,
        scale: SearchScale,
        options: FloorOptions,
        watch: SearchWatch | None = None,
    ) -> None:
        self.name, self.objective, self.scale, self.options, self.watch = name, objective, scale, options, watch
        self.solution: Blocks = x0
        self.best = math.inf
        self._x = _joined(x0)
        self._gap = math.inf
        self._stage = 0
        self._iteration = 0

    def run(self, deadline: float) -> None:
        """Run stages while they can improve the bound. The first one runs in any case."""
        self.run_stage(deadline)
        while self.can_improve(deadline):
            self.run_stage(deadline)

    def can_improve(self, deadline: float) -> bool:
        """True if stages, iterations and time remain, and smoothing hides more than the tolerance.

        At a minimum of the smoothed bound, the minimum of the bound itself is lower than `exact` by at most
        exact - smooth. This is the gap that is compared with the tolerance.
        """
        is_hidden = self._gap > self.options.rtol * self.scale.e_lora
        return is_hidden and self._stage < len(_SMOOTHING) and not self._is_spent(deadline)

    def run_stage(self, deadline: float) -> None:
        """Run L-BFGS with the next smoothing, from the point where the last stage ended."""
        mu = _SMOOTHING[self._stage]
        self._stage += 1
        limit = min(_STAGE, self.options.max_iterations - self._iteration)
        settings = {"maxiter": limit, "maxcor": _MEMORY, "ftol": _DECREASE * self.options.rtol, "gtol": 0.0}
        try:
            with linalg.suitable_threads(self.solution[0]):  # blocks are small even where the layers are not
                self._x = scipy.optimize.minimize(
                    self._evaluate,
                    self._x,
                    args=(mu,),
                    jac=True,
                    method="L-BFGS-B",
                    callback=lambda _: self._end_iteration(deadline),
                    options=settings,
                ).x
        except linalg.LinAlgError:
            self._gap = 0.0  # a line search that left the range of numbers; the solution is as good as before

    def _evaluate(self, x: Vector, mu: float) -> tuple[float, Vector]:
        """The smoothed bound and its gradient at x. A point with a lower bound becomes the solution."""
        blocks = _split(x, self.solution)
        bound = self.objective(blocks, mu)
        self._gap = bound.exact - bound.smooth
        if bound.exact < self.best:
            self.best, self.solution = bound.exact, blocks
        return bound.smooth, _joined(bound.gradients)

    def _end_iteration(self, deadline: float) -> None:
        """Count and report an iteration. StopIteration ends the minimisation."""
        self._iteration += 1
        if self.watch is not None:
            value = self.scale.level * (self.scale.energy - self.best)
            self.watch(SearchProgress(self.name, self._iteration, self.options.max_iterations, value))
        if self._is_spent(deadline):
            raise StopIteration

    def _is_spent(self, deadline: float) -> bool:
        return time.perf_counter() > deadline or self._iteration >= self.options.max_iterations


def _joined(blocks: Blocks) -> Vector:
    """All blocks as one vector, as scipy wants its parameters."""
    vector: Vector = torch.cat([block.reshape(-1) for block in blocks]).cpu().numpy()
    return vector


def _split(x: Vector, like: Blocks) -> Blocks:
    """The blocks of a copy of x, with the shapes and the device of `like`."""
    parts = torch.split(torch.from_numpy(x.copy()).to(like[0].device), [block.numel() for block in like])
    return [part.reshape(block.shape) for part, block in zip(parts, like, strict=True)]


def leading_basis(view: LayerStack, budget: RankBudget, width: int) -> Tensor:
    """Orthonormal (b, n), n = min(b, width): directions that are leading in some layer, or in the sum of all.

    They are eigenvectors of sum_i min(Gamma_i / sigma_{i,r+1}^2, 1)^4 + min(S / t, 1)^4. Here S = sum_i Gamma_i, and t
    is its eigenvalue number L r + 1. Directions that reach their level count alike, whatever their energy, since a
    floor decides between directions near the level. The fourth power, chosen by trial, leaves the others small weights.
    Levels are bounded below, see `_LEAST_LEVEL`, so that no layer divides by zero.
    """
    if view.spectra.is_leading:
        return _leading_basis_from_products(view, budget, width)
    U, S, _ = view.spectra.svd()
    weights = _importance(S, budget)
    importance = U.new_zeros(U.shape[1], U.shape[1])
    for u, w in zip(U, weights, strict=True):
        importance += (u * w) @ u.mT
    values, X = linalg.symmetric_eigenpairs(view.spectra.gram())
    t = values[max(len(values) - 1 - view.layers * budget.rank, 0)].clamp_min(_LEAST_LEVEL * values[-1])
    importance += (X * (values / t).clamp(0, 1) ** 4) @ X.mT
    return linalg.symmetric_eigenpairs(importance)[1][:, -width:]


def _importance(S: Tensor, budget: RankBudget) -> Tensor:
    """min(sigma_ij^2 / sigma_{i,r+1}^2, 1)^4 for singular values S (L, n), falling."""
    energy = S**2
    following = energy[:, budget.rank : budget.rank + 1]
    level = following.clamp_min(torch.finfo(torch.float64).tiny + _LEAST_LEVEL * float(following.mean()))
    return (energy / level).clamp_max(1) ** 4


def _leading_basis_from_products(view: LayerStack, budget: RankBudget, width: int) -> Tensor:
    """`leading_basis` from as many terms of each layer as fill it, and 3/2 L r directions of the sum."""
    b, Lr = view.shape[0], view.layers * budget.rank
    count = min(max(budget.rank + 1, math.ceil(width / view.layers)), *view.shape)
    U, S, _ = view.spectra.leading(count)
    values, X = view.transpose().spectra.common_pairs(min(Lr + Lr // 2 + 1, b))
    t = values[min(Lr, len(values) - 1)].clamp_min(_LEAST_LEVEL * values[0])
    scaled = [u * w.sqrt() for u, w in zip(U, _importance(S, budget), strict=True)]
    scaled.append(X * (values / t).clamp(0, 1) ** 2)
    columns = torch.cat(scaled, 1)  # (b, n): importance is columns times columns^T
    leading = linalg.symmetric_eigenpairs(columns.mT @ columns)[1][:, -min(width, b) :]
    return orthogonal.orthonormal_columns(columns @ leading.flip(1))


def clipped_factors(g: Tensor, budget: RankBudget) -> Tensor:
    """Initial guess F (L, n, p), p = min(n, L r): F_i F_i^T is near the part of g_i above its eigenvalue q + 1.

    This is the Y_i of the clipped floor. Columns that are zero would stay zero, since the gradient in F is linear in F.
    So a little seeded noise is added, see `_NOISE`. For q = 0 there are no columns: R = L r and
    KF_R(S) <= KF_R(S - Y) + KF_R(Y), so Y = 0 is optimal.
    """
    L, n, _ = g.shape
    q = budget.private_rank
    if q == 0:
        return g[:, :, :0]
    values, X = linalg.symmetric_eigenpairs(g)
    following = values[:, n - q - 1] if q < n else torch.zeros_like(values[:, 0])
    F = X * (values - following[:, None]).clamp_min(0).sqrt()[:, None, :]
    F = F[:, :, -min(n, L * budget.rank) :]
    noise = torch.randn(F.shape, dtype=F.dtype, generator=torch.Generator().manual_seed(0))
    return F + _NOISE * noise.to(F.device)
