"""Joint compression: one U and one V for all layers, with a full or a diagonal core for each (arXiv 2407.00066)."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rasa_theory import linalg
from rasa_theory.bounds import common_space_floor
from rasa_theory.common import at_least, one_of
from rasa_theory.linalg import batched
from rasa_theory.methods.alternate import Steps, alternate
from rasa_theory.methods.fit import Evidence, Fit, Settings, UnitFit, measured, residual
from rasa_theory.methods.method import EFFORT, Method, at_most, largest
from rasa_theory.methods.products import leading_terms, left, right, seeded, unit_of
from rasa_theory.problem import LayerStack, RankBudget, RankOneTerms, RasaFactors
from rasa_theory.solvers import RasaDescent, SolverOptions, solve_rasa

CORES = ("full", "diagonal")
RANDOM_STARTS = 2  # of a diagonal core, beside the leading singular terms
TUCKER_SWEEPS = 100


def fit_joint(stack: LayerStack, rank: int, core: str = "full", seed: int = 0) -> Fit:
    """Minimise sum_i ||M_i - U C_i V||_F^2 with U (b, R) and V (R, a) that all layers share.

    The two kinds of core are from Compress then Serve (Brüel-Gabrielsson et al., ICML 2025):

    - core "full": C_i (R, R), their JD-Full, a Tucker-2 decomposition. R (a + b) + L R^2 parameters. HOOI alternates:
      U holds the top R eigenvectors of sum_i M_i V^T V M_i^T, then V likewise. The starts are the HOSVD and the span of
      the R leading singular terms of all layers. The HOSVD alone is not enough: a direction that many layers use a
      little can hide one that a single layer uses much.
    - core "diagonal": their JD-Diag, a CP decomposition of R terms, which is RaSA without private terms.
      R (a + b + L) parameters. Where L divides R, `solve_rasa` with r = k = R / L. Otherwise the same sweeps, from the
      R leading singular terms of all layers and from random pools.

    Arguments:
        stack: the layers M_i, (L, b, a).
        rank: R, from 1 to min(b, a) for a full core, and to a b for a diagonal one.
        core: "full" or "diagonal".
        seed: seed of the random starts.

    Returns:
        A `Fit` with the best solution of several starts, and `joint_floor` as its floor.

    Raises:
        InputError: an argument is out of its range.
    """
    at_least("rank", rank, 1)
    one_of("core", core, CORES)
    at_most("rank", rank, _largest_rank(stack, core), stack)
    solve = _tucker if core == "full" else _cp
    solution = solve(unit_of(stack, math.ceil(rank / stack.layers)), rank, seed)
    settings: Settings = {"rank": rank, "core": core}
    return measured(stack, f"joint_{core}", settings, Evidence.BEST_FOUND_WITH_FLOOR, solution)


def joint_floor(stack: LayerStack, rank: int) -> float:
    """A certified lower bound on sum_i ||M_i - U C_i V||_F^2 for all U (b, R), V (R, a) and cores C_i (R, R).

    All updates side by side have rank <= R, since U spans their columns. So they leave at least the Eckart-Young tail
    of [M_1 .. M_L] after R. The same holds for the rows and the layers below each other; the larger tail counts. It
    does not depend on the cores, so it holds for full and for diagonal ones.

    Arguments:
        stack: the layers M_i, (L, b, a).
        rank: R, at least 1.

    Returns:
        The bound, squared, in the units of the input, less the rounding of the Gram matrices it is read from.

    Raises:
        InputError: the rank is below 1.
    """
    at_least("rank", rank, 1)
    unit = stack.unit()
    tails = [common_space_floor(view, rank) for view in (unit, unit.transpose())]
    return max(0.0, *tails) * stack.scale**2


class _Sides(NamedTuple):
    """U (b, R) and V^T (a, R), each with orthonormal columns."""

    U: Tensor
    V: Tensor

    def cores(self, unit: LayerStack) -> Tensor:
        """The best cores for these sides, C_i = U^T M_i V^T: (L, R, R)."""
        return self.U.mT @ right(unit, self.V)

    def updates(self, unit: LayerStack) -> UnitFit:
        """The updates with the best cores."""
        U, V, C = self.U, self.V, self.cores(unit)
        return UnitFit(lambda i: U @ C[i] @ V.mT, (U, C, V), U.shape[1])


def _tucker(unit: LayerStack, R: int, seed: int) -> UnitFit:
    def leading(products: Tensor) -> Tensor:
        """The top R eigenvectors of sum_i X_i X_i^T, for products X_i (L, n, R): (n, R)."""
        return linalg.leading_eigenpairs(batched.outer(products, products), R)[1]

    def sweep(sides: _Sides) -> _Sides:
        U = leading(right(unit, sides.V))
        return _Sides(U, leading(left(unit, U)))

    def error(sides: _Sides) -> float:
        return residual(unit, sides.updates(unit).update)

    hosvd = _Sides(*(view.spectra.common(R) for view in (unit, unit.transpose())))
    terms = leading_terms(unit, R, seed)
    largest_terms = _Sides(linalg.thin_qr(terms.B)[0], linalg.thin_qr(terms.A.mT)[0])
    # heat = all sweeps: both starts are run to their end
    sides, history = alternate(unit, Steps(sweep, error), [hosvd, largest_terms], TUCKER_SWEEPS, heat=TUCKER_SWEEPS)
    return dataclasses.replace(sides.updates(unit), history=history, floor=joint_floor(unit, R))


def _cp(unit: LayerStack, R: int, seed: int) -> UnitFit:
    L, k = unit.layers, R // unit.layers
    options = SolverOptions(effort=EFFORT, seed=seed)
    if R % L == 0 and k <= min(unit.shape):
        solution = solve_rasa(unit, RankBudget(k, k), options)
        factors, history = solution.factors, tuple(solution.history)
    else:
        factors, history = _best_pool(unit, R, options)
    f = factors.to(torch.float64)
    stored = (f.shared_B, f.shared_A, f.mixing)
    return UnitFit(f.update, stored, R, history=history, floor=joint_floor(unit, R))


def _best_pool(unit: LayerStack, R: int, options: SolverOptions) -> tuple[RasaFactors, tuple[float, ...]]:
    """The lowest of several runs without private terms, for any R: its factors and the errors of its sweeps."""
    runs = []
    for terms in (leading_terms(unit, R, options.seed), *_random_terms(unit, R, options.seed)):
        factors = RasaFactors.from_pool(terms, private_rank=0).to(unit.dtype, unit.device)
        run = RasaDescent(unit, factors, options.sweep, "given", options.max_cancellation)
        runs.append(run.run(options.max_sweeps, options.rtol))
    best = min(runs, key=lambda run: run.best_error)
    return best.best, tuple(best.history)


def _random_terms(unit: LayerStack, R: int, seed: int) -> Iterator[RankOneTerms]:
    """Random terms that no layer uses yet."""
    b, a = unit.shape
    for n in range(seed, seed + RANDOM_STARTS):
        B, A = seeded(unit, 2 * n, b, R), seeded(unit, 2 * n + 1, R, a)
        yield RankOneTerms(B, A, B.new_zeros(unit.layers, R))


def _largest_rank(stack: LayerStack, core: str) -> int:
    b, a = stack.shape
    return min(b, a) if core == "full" else a * b


def _parameters(layers: int, shape: tuple[int, int], rank: int, core: str) -> int:
    return rank * sum(shape) + layers * (rank * rank if core == "full" else rank)


def _configurations(core: str, stack: LayerStack, limit: int) -> list[Settings]:
    count = functools.partial(_parameters, stack.layers, stack.shape, core=core)
    rank = largest(count, limit, _largest_rank(stack, core))
    return [{"rank": rank, "core": core}] if rank else []


JOINT_FULL = Method("joint_full", "joint, full", fit_joint, _parameters, functools.partial(_configurations, "full"))
JOINT_DIAGONAL = Method(
    "joint_diagonal", "joint, CP", fit_joint, _parameters, functools.partial(_configurations, "diagonal")
)
