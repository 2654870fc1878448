"""One-sided pools: private terms, and a column (or row) space that all layers share with free coefficients."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from rasa_theory import linalg
from rasa_theory.common import at_least, one_of
from rasa_theory.linalg import batched
from rasa_theory.methods.alternate import Steps, alternate
from rasa_theory.methods.fit import Evidence, Fit, Settings, UnitFit, measured, residual
from rasa_theory.methods.method import Method, at_most, largest
from rasa_theory.problem import LayerStack

SIDES = ("columns", "rows")


class _State(NamedTuple):
    """B_S (b, p), orthonormal columns; private terms (L, b, q), (L, q, a); coefficients C (L, p, a)."""

    shared: Tensor
    B: Tensor
    A: Tensor
    C: Tensor

    def update(self, i: int) -> Tensor:
        return self.B[i] @ self.A[i] + self.shared @ self.C[i]


def fit_one_sided(
    stack: LayerStack, private_rank: int, shared_rank: int, side: str = "columns", max_sweeps: int = 20
) -> Fit:
    """Minimise sum_i ||M_i - B~_i A~_i - B_S C_i||_F^2, B~_i (b, q), A~_i (q, a), B_S (b, p), C_i (p, a).

    RaSA's pool with one side free for every layer. Side "rows" is the same for the transposed layers: C_i B_S with
    C_i (b, p) and B_S (p, a). Stored are L q (a + b) + p (b + L a) parameters, for "rows" L q (a + b) + p (a + L b).

    Two exact steps alternate. For fixed B_S, private terms and C_i together: the rank-q SVD of (I - B_S B_S^T) M_i. For
    fixed private terms, B_S and C_i together: the top p eigenvectors of the Gram matrix of the residuals. The starts
    are the leading common space, and the common space of the residuals of LoRA of rank q.

    Arguments:
        stack: the layers M_i, (L, b, a).
        private_rank: q, from 0 to min(b, a).
        shared_rank: p, from 0 to b, for "rows" to a. At least one of q and p is above 0.
        side: the shared space, "columns" or "rows".
        max_sweeps: the largest number of sweeps from each start, at least 1.

    Returns:
        A `Fit` with the best solution, which is the minimum if p = 0 or q = 0.

    Raises:
        InputError: an argument is out of its range.
    """
    q, p = at_least("private_rank", private_rank, 0), at_least("shared_rank", shared_rank, 0)
    one_of("side", side, SIDES)
    at_least("private_rank + shared_rank", q + p, 1)
    view = stack.unit() if side == "columns" else stack.unit().transpose()
    at_most("private_rank", q, min(view.shape), stack)
    at_most("shared_rank", p, view.shape[0], stack)
    at_least("max_sweeps", max_sweeps, 1)

    starts = [_refit_pool(view, _refit_private(view, S, q), p) for S in _initial_spaces(view, q, p)]
    steps = Steps(lambda s: _refit_pool(view, _refit_private(view, s.shared, q), p), lambda s: residual(view, s.update))
    state, history = alternate(view, steps, starts, max_sweeps)
    solution = UnitFit(
        lambda i: state.update(i) if side == "columns" else state.update(i).mT, state, q + p, history=history
    )
    evidence = Evidence.BEST_FOUND if p and q else Evidence.CLOSED_FORM
    settings: Settings = {"private_rank": q, "shared_rank": p, "side": side}
    return measured(stack, "one_sided", settings, evidence, solution)


def _initial_spaces(view: LayerStack, q: int, p: int) -> list[Tensor]:
    """The leading common space, and the empty space, from which the first step computes LoRA of rank q."""
    empty = torch.zeros(view.shape[0], 0, dtype=torch.float64, device=view.device)
    return [empty] if p == 0 or q == 0 else [linalg.leading_eigenpairs(view.spectra.gram(), p)[1], empty]


def _refit_private(view: LayerStack, shared: Tensor, q: int) -> tuple[Tensor, Tensor]:
    """B~_i A~_i = the best rank-q approximation of (I - B_S B_S^T) M_i, which is optimal together with C_i."""
    pairs = []
    for tile in view.tiles(rows=view.shape[0]):
        M = tile.values.double()
        pairs.append(linalg.best_low_rank(M - shared @ (shared.mT @ M), q))
    return torch.stack([B for B, _ in pairs]), torch.stack([A for _, A in pairs])


def _refit_pool(view: LayerStack, private: tuple[Tensor, Tensor], p: int) -> _State:
    """B_S = the top p eigenvectors of sum_i E_i E_i^T, E_i = M_i - B~_i A~_i, and C_i = B_S^T E_i."""
    (B, A), b = private, view.shape[0]
    E = torch.stack([t.values.double() - B[t.layer] @ A[t.layer] for t in view.tiles(rows=b)])
    if p == 0:
        return _State(E.new_zeros(b, 0), B, A, E.new_zeros(len(E), 0, E.shape[2]))
    S = linalg.leading_eigenpairs(batched.outer(E, E), p)[1]
    return _State(S, B, A, S.mT @ E)


def _parameters(layers: int, shape: tuple[int, int], private_rank: int, shared_rank: int, side: str) -> int:
    n, m = shape if side == "columns" else shape[::-1]
    return layers * private_rank * (n + m) + shared_rank * (n + layers * m)


def _configurations(stack: LayerStack, limit: int) -> list[Settings]:
    """All but one, or half, of the ranks that LoRA has within `limit` stay private; the pool takes the rest."""
    L, shape = stack.layers, stack.shape
    r = min(limit // (L * sum(shape)), *shape)
    configurations: list[Settings] = []
    for side, most in zip(SIDES, shape, strict=True):
        for q in sorted({max(r - 1, 0), r // 2}):
            p = largest(functools.partial(_parameters, L, shape, q, side=side), limit, most)
            if p:
                configurations.append({"private_rank": q, "shared_rank": p, "side": side})
    return configurations


ONE_SIDED = Method("one_sided", "one-sided", fit_one_sided, _parameters, _configurations)
