"""One-sided pools: private terms, and a column (or row) space that all layers share with free coefficients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rasa_theory import linalg
from rasa_theory.common import at_least, one_of
from rasa_theory.methods.alternate import Steps, alternate
from rasa_theory.methods.fit import Evidence, Fit, Found, Method, fitted, residual
from rasa_theory.methods.settings import Settings, at_most, largest
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
    """min sum_i ||M_i - B~_i A~_i - B_S C_i||_F^2, B~_i (b, q), A~_i (q, a), B_S (b, p), C_i (p, a).

    What RaSA's pool would be with one side free for every layer. side "rows": the same of the transposed layers,
    C_i B_S with C_i (b, p), B_S (p, a). L q (a + b) + p (b + L a) parameters, "rows" L q (a + b) + p (a + L b). Two
    exact steps in turn: for B_S, private terms and C_i at once (the rank-q SVD of (I - B_S B_S^T) M_i), then for
    private terms B_S and C_i at once (the top p eigenvectors of the residuals' Gram matrix). From the leading common
    space, and from the one that LoRA of rank q leaves. Best found; the minimum where p = 0 or q = 0. Raises InputError
    unless q, p >= 0, q + p >= 1, q <= min(b, a) and p <= b ("rows": a).
    """
    q, p = at_least("private_rank", private_rank, 0), at_least("shared_rank", shared_rank, 0)
    one_of("side", side, SIDES)
    at_least("private_rank + shared_rank", q + p, 1)
    view = stack.unit() if side == "columns" else stack.unit().transpose()
    at_most("private_rank", q, min(view.shape), stack)
    at_most("shared_rank", p, view.shape[0], stack)

    starts = [_refit(view, _private(view, S, q), p) for S in _spaces(view, q, p)]
    steps = Steps(lambda s: _refit(view, _private(view, s.shared, q), p), lambda s: residual(view, s.update))
    state, history = alternate(view, steps, starts, at_least("max_sweeps", max_sweeps, 1))
    found = Found(lambda i: state.update(i) if side == "columns" else state.update(i).mT, state, q + p, history=history)
    evidence = Evidence.BEST_FOUND if p and q else Evidence.CLOSED_FORM
    settings: Settings = {"private_rank": q, "shared_rank": p, "side": side}
    return fitted(stack, "one_sided", settings, evidence, found)


def _spaces(view: LayerStack, q: int, p: int) -> list[Tensor]:
    """The leading common space, and none, of which the first step makes the one that LoRA leaves."""
    none = torch.zeros(view.shape[0], 0, dtype=torch.float64, device=view.device)
    return [none] if p == 0 or q == 0 else [linalg.leading_eigenpairs(view.spectra.gram(), p)[1], none]


def _private(view: LayerStack, shared: Tensor, q: int) -> tuple[Tensor, Tensor]:
    """B~_i A~_i = the best rank-q approximation of (I - B_S B_S^T) M_i: private terms and C_i at once."""
    pairs = []
    for tile in view.tiles(rows=view.shape[0]):
        M = tile.values.double()
        pairs.append(linalg.best_low_rank(M - shared @ (shared.mT @ M), q))
    return torch.stack([B for B, _ in pairs]), torch.stack([A for _, A in pairs])


def _refit(view: LayerStack, private: tuple[Tensor, Tensor], p: int) -> _State:
    """B_S = the top p eigenvectors of sum_i E_i E_i^T, E_i = M_i - B~_i A~_i, and C_i = B_S^T E_i."""
    (B, A), b = private, view.shape[0]
    E = torch.stack([t.values.double() - B[t.layer] @ A[t.layer] for t in view.tiles(rows=b)])
    if p == 0:
        return _State(E.new_zeros(b, 0), B, A, E.new_zeros(len(E), 0, E.shape[2]))
    S = linalg.leading_eigenpairs((E @ E.mT).sum(0), p)[1]
    return _State(S, B, A, S.mT @ E)


def _configurations(stack: LayerStack, parameters: int) -> list[Settings]:
    """Of LoRA's rank r that costs as much, all but one or half of it private, the rest for the pool."""
    L, shape = stack.layers, stack.shape
    cost, found = L * sum(shape), []
    r = min(parameters // cost, *shape)
    for side, (n, m) in zip(SIDES, (shape, shape[::-1]), strict=True):
        for q in sorted({max(r - 1, 0), r // 2}):
            p = largest(lambda p, n=n, m=m: p * (n + L * m), parameters - q * cost, n)  # type: ignore[misc]
            if p:
                found.append({"private_rank": q, "shared_rank": p, "side": side})
    return found  # type: ignore[return-value]


ONE_SIDED = Method(fit_one_sided, _configurations)
