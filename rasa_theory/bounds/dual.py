"""The dual floor: for any Y_i >= 0 a lower bound on e_rasa(k), and a search for good ones.

Gamma_i = M_i M_i^T, KF_m(S) is the sum of the m largest nonnegative eigenvalues of S, m = L r.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rasa_theory import linalg
from rasa_theory.bounds.search import FloorOptions, Search, SearchWatch, captured_smoothly, clip_factors, leading_basis
from rasa_theory.problem import LayerStack, RankBudget


@dataclass
class CapturedEnergy:
    """C = KF_Lr(sum_i Y_i) + sum_i KF_q(g_i - Y_i) + KF_R(sum_i (g_i - Y_i)) >= sum_i tr Z_i g_i, for Y_i = F_i F_i^T.

    Layers come one by one, (g_i (n, n) symmetric, F_i (n, p)). Z_i = P + P_i is any projector on a space of R
    dimensions that all layers share, and q more of layer i, orthogonal to it.

    Proof: Z_i <= Q, the projector on all of these spaces together, of rank at most R + L q = L r. As Y_i >= 0,
    sum_i tr Z_i Y_i <= tr Q sum_i Y_i <= KF_Lr(sum_i Y_i). What remains of sum_i tr Z_i g_i is
    tr P sum_i (g_i - Y_i) <= KF_R and, layer by layer, tr P_i (g_i - Y_i) <= KF_q (Ky Fan, three times).
    """

    budget: RankBudget
    layers: int
    own: float = 0.0
    whole: Tensor | float = 0.0
    pooled: Tensor | float = 0.0

    def add(self, g: Tensor, F: Tensor) -> None:
        """Count one layer in."""
        Y = F @ F.mT
        rest = g - Y
        self.own += float(linalg.ky_fan(rest, self.budget.private_rank))
        self.whole, self.pooled = self.whole + Y, self.pooled + rest

    def total(self) -> float:
        """C, after all layers."""
        m, R = self.layers * self.budget.rank, self.budget.pool_rank(self.layers)
        return self.own + sum(
            float(linalg.ky_fan(torch.as_tensor(S), n)) for S, n in ((self.whole, m), (self.pooled, R))
        )


def dual_value(view: LayerStack, budget: RankBudget, F: Tensor) -> float:
    """||M||^2 - `CapturedEnergy` of (Gamma_i, F_i) less its rounding: below e_rasa(k) for any F (L, b, p) whatever.

    The columns of the update of layer i lie in a space that some Z_i projects on, so it captures at most tr Z_i Gamma_i
    of ||M_i||^2. Y_i = Gamma_i gives the stack floor, the part of Gamma_i above its eigenvalue q + 1 the clipped one.

    Rounding: Y_i = F_i F_i^T is positive semidefinite by construction; what is computed are the eigenvalues of sums of
    at most L (a + p) products, off by that many eps times Omega = ||M||^2 + ||F||^2 in Frobenius norm, and by a small
    multiple of b eps Omega in the eigenvalue solver. A sum of m eigenvalues moves by at most sqrt(m) times that, three
    such sums of at most L r eigenvalues are taken, and 10 is left for the constants. -inf if F is not finite.
    """
    L, (b, a) = view.layers, view.shape
    F = F.double()
    energy = view.norm_squared + float((F * F).sum())
    if not math.isfinite(energy):
        return -math.inf
    captured = CapturedEnergy(budget, L)
    for i, tile in enumerate(view.tiles(rows=b)):
        M = tile.values.double()
        captured.add(M @ M.mT, F[i])
    return view.norm_squared - captured.total() - rounding_allowance(L * (a + F.shape[2]) + b, L * budget.rank, energy)


def rounding_allowance(terms: int, m: int, energy: float) -> float:
    """How far three sums of at most m eigenvalues can be off, if `terms` roundings of size eps `energy` went in."""
    return 30 * math.sqrt(m + 1) * terms * torch.finfo(torch.float64).eps * energy


def search_dual(view: LayerStack, budget: RankBudget, options: FloorOptions, watch: SearchWatch | None) -> float:
    """`dual_value` at the F that a search in the leading `options.width` directions ends with.

    For q = 0 or R = 0 nothing can be gained over the stack and the rank floor: KF is subadditive, so Y = 0 is optimal.
    """
    V = leading_basis(view, budget, options.width_of(view, budget))  # (b, n)
    X = view.left(V.to(view.dtype)).double()  # (L, a, n)
    search = Search.of("dual", view, budget, options, watch)
    g = X.mT @ X / search.level

    def objective(F: Tensor) -> tuple[float, float, list[Tensor]]:
        found = captured_smoothly(g, F, budget, search.mu)
        return found.smooth, found.exact, [found.slope_F]

    *_, (F,) = search.stages(objective, [clip_factors(g, budget)])
    return dual_value(view, budget, math.sqrt(search.level) * V @ F)
