"""Joint compression: one U and one V for all layers, with a full or a diagonal core for each (arXiv 2407.00066)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from rasa_theory import linalg
from rasa_theory.common import at_least, one_of
from rasa_theory.methods.access import leading_terms, left, right, seeded
from rasa_theory.methods.alternate import Steps, alternate
from rasa_theory.methods.fit import Evidence, Fit, Found, Method, fitted, residual
from rasa_theory.methods.settings import Settings, at_most, largest
from rasa_theory.problem import LayerStack, RankBudget, RasaFactors
from rasa_theory.solvers import Descent, SolverOptions, solve_rasa

CORES = ("full", "diagonal")
RANDOM_STARTS = 2
_SWEEPS = 100


def fit_joint(stack: LayerStack, rank: int, core: str = "full", seed: int = 0) -> Fit:
    """min sum_i ||M_i - U C_i V||_F^2, U (b, R), V (R, a): Compress then Serve (Brüel-Gabrielsson et al., ICML 2025).

    - core "full": C_i (R, R), their JD-Full, a Tucker-2 decomposition. Alternating (HOOI): U holds the top R
      eigenvectors of sum_i M_i V^T V M_i^T, then V likewise. From the HOSVD, and from the span of the R leading
      singular terms of all layers, since what many layers have a little of can hide what one has much of.
      R (a + b) + L R^2 parameters.
    - core "diagonal": their JD-Diag, a CP decomposition of R terms, RaSA without private terms: where L divides R,
      `solve_rasa` with r = k = R / L; else the same sweeps from the R leading singular terms of all layers, and from
      random pools. R (a + b + L) parameters.

    Best found, both. Raises InputError unless 1 <= rank, with a full core rank <= min(b, a), with a diagonal one a b.
    """
    at_least("rank", rank, 1)
    one_of("core", core, CORES)
    at_most("rank", rank, _most(stack, core), stack)
    found = _tucker(stack.unit(), rank, seed) if core == "full" else _cp(stack.unit(), rank, seed)
    return fitted(stack, f"joint_{core}", {"rank": rank, "core": core}, Evidence.BEST_FOUND, found)


def _tucker(unit: LayerStack, R: int, seed: int) -> Found:
    def leading(products: Tensor) -> Tensor:  # (L, n, R) -> (n, R)
        return linalg.leading_eigenpairs((products @ products.mT).sum(0), R)[1]

    def sweep(sides: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        U = leading(right(unit, sides[1]))
        return U, leading(left(unit, U))

    def cores(sides: tuple[Tensor, Tensor]) -> Tensor:
        U, V = sides
        return U.mT @ right(unit, V)

    def error(sides: tuple[Tensor, Tensor]) -> float:
        (U, V), C = sides, cores(sides)
        return residual(unit, lambda i: U @ C[i] @ V.mT)

    common = tuple(linalg.leading_eigenpairs(view.spectra.gram(), R)[1] for view in (unit, unit.transpose()))
    B, A, _ = leading_terms(unit, R, seed)
    largest = torch.linalg.qr(B).Q, torch.linalg.qr(A.mT).Q
    (U, V), history = alternate(unit, Steps(sweep, error), [common, largest], _SWEEPS, heat=_SWEEPS)
    C = cores((U, V))
    return Found(lambda i: U @ C[i] @ V.mT, (U, C, V), R, history=history)


def _cp(unit: LayerStack, R: int, seed: int) -> Found:
    L, k = unit.layers, R // unit.layers
    options = SolverOptions(seed=seed)
    if R % L == 0 and k <= min(unit.shape):
        solution = solve_rasa(unit, RankBudget(k, k), options)
        factors, history = solution.factors, solution.history
    else:
        terms = [leading_terms(unit, R, seed), *(_random_terms(unit, R, seed + n) for n in range(RANDOM_STARTS))]
        runs = [Descent(unit, _pool(unit, *t), options.sweep, "given", options.max_cancellation) for t in terms]
        best = min((run.run(options.max_sweeps, options.rtol) for run in runs), key=lambda run: run.best_error)
        factors, history = best.best, best.history
    f = factors.to(torch.float64)
    return Found(f.update, (f.shared_B, f.shared_A, f.mixing), R, history=tuple(history))


def _pool(unit: LayerStack, B: Tensor, A: Tensor, mixing: Tensor) -> RasaFactors:
    """RasaFactors without private terms."""
    L, (b, a) = unit.layers, unit.shape
    none = mixing.new_zeros(L, b, 0), mixing.new_zeros(L, 0, a)
    return RasaFactors(*none, B, A, mixing).to(unit.dtype, unit.device)


def _random_terms(unit: LayerStack, R: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random terms that no layer uses yet."""
    b, a = unit.shape
    B, A = seeded(unit, 2 * seed, b, R), seeded(unit, 2 * seed + 1, R, a)
    return B, A, B.new_zeros(unit.layers, R)


def _most(stack: LayerStack, core: str) -> int:
    b, a = stack.shape
    return min(b, a) if core == "full" else a * b


def _configurations(core: str, stack: LayerStack, parameters: int) -> list[Settings]:
    L, (b, a) = stack.layers, stack.shape

    def count(R: int) -> int:
        return R * (a + b) + L * (R * R if core == "full" else R)

    rank = largest(count, parameters, _most(stack, core))
    return [{"rank": rank, "core": core}] if rank else []


JOINT_FULL = Method(fit_joint, functools.partial(_configurations, "full"))
JOINT_DIAGONAL = Method(fit_joint, functools.partial(_configurations, "diagonal"))
