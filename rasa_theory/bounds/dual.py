"""The dual floor: for any Y_i >= 0 a lower bound on e_rasa(k), and a search for a good choice.

Gamma_i = M_i M_i^T, and KF_m(S) is the sum of the m largest nonnegative eigenvalues of S.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from rasa_theory import linalg
from rasa_theory.bounds.applied import applied_dual_value
from rasa_theory.bounds.search import (
    Blocks,
    Evaluation,
    FloorOptions,
    Search,
    SearchScale,
    SearchWatch,
    clipped_factors,
    leading_basis,
)
from rasa_theory.bounds.smoothing import smoothed_energy
from rasa_theory.problem import LayerStack, RankBudget


@dataclass
class CapturedEnergy:
    """C = KF_Lr(sum_i Y_i) + sum_i KF_q(g_i - Y_i) + KF_R(sum_i (g_i - Y_i)) >= sum_i tr Z_i g_i, for Y_i = F_i F_i^T.

    Layers are added one by one, (g_i (n, n) symmetric, F_i (n, p)). Z_i = P + P_i is any projector on a space of R
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
        """Add one layer to the three sums."""
        Y = F @ F.mT
        rest = g - Y
        self.own += float(linalg.ky_fan(rest, self.budget.private_rank))
        self.whole, self.pooled = self.whole + Y, self.pooled + rest

    def total(self) -> float:
        """Return C, after all layers."""
        m, R = self.layers * self.budget.rank, self.budget.pool_rank(self.layers)
        return self.own + sum(
            float(linalg.ky_fan(torch.as_tensor(S), n)) for S, n in ((self.whole, m), (self.pooled, R))
        )


def dual_value(view: LayerStack, budget: RankBudget, F: Tensor) -> float:
    """||M||^2 - C({Gamma_i}, {F_i}) less its rounding, below e_rasa(k) for any F (L, b, p): C is `CapturedEnergy`.

    Proof: the columns of the update of layer i lie in a space that some Z_i projects on. So layer i captures at most
    tr Z_i Gamma_i of ||M_i||^2, and all layers together at most C.

    Y_i = Gamma_i gives the stack floor. The part of Gamma_i above its eigenvalue q + 1 gives the clipped floor.

    Rounding: Y_i = F_i F_i^T is positive semidefinite by construction. The eigenvalues are those of computed sums of at
    most L (a + p) products. In Frobenius norm these are off by at most that many eps times
    Omega = ||M||^2 + ||F||^2, and the eigenvalue solver adds a small multiple of b eps Omega. A sum of m eigenvalues
    moves by at most sqrt(m) times that. Three sums of at most L r eigenvalues are taken, and 10 is left for the
    constants. The value is -inf if F is not finite.
    """
    L, (b, a) = view.layers, view.shape
    F = F.double()
    Omega = view.norm_squared + float((F * F).sum())
    if not math.isfinite(Omega):
        return -math.inf
    captured = CapturedEnergy(budget, L)
    for i, tile in enumerate(view.tiles(rows=b)):
        M = tile.values.double()
        captured.add(M @ M.mT, F[i])
    return view.norm_squared - captured.total() - rounding_allowance(L * (a + F.shape[2]) + b, L * budget.rank, Omega)


def rounding_allowance(terms: int, m: int, energy: float) -> float:
    """An upper bound on the rounding error of three sums of at most m eigenvalues each.

    The matrices have `terms` roundings of size eps `energy`. The 30 is three sums, times 10 for the constants of
    eigenvalue solvers.
    """
    return 30 * math.sqrt(m + 1) * terms * torch.finfo(torch.float64).eps * energy


def search_dual(view: LayerStack, budget: RankBudget, options: FloorOptions, watch: SearchWatch | None) -> float:
    """`dual_value` at the F where a search in the leading `options.width` directions ends: from products where
    the spectra of the view are.

    For q = 0 or R = 0 it cannot exceed the stack and the rank floor: KF is subadditive, so Y = 0 is optimal.
    """
    scale = SearchScale.of(view, budget)
    V = leading_basis(view, budget, options.width_of(view, budget))  # (b, n)
    X = view.left(V.to(view.dtype)).double()  # (L, a, n)
    g = X.mT @ X / scale.level

    def objective(blocks: Blocks, mu: float) -> Evaluation:
        (F,) = blocks
        captured = smoothed_energy(g, F, budget, mu)
        return Evaluation(captured.smooth, captured.exact, [captured.slope_F])

    search = Search("dual", objective, [clipped_factors(g, budget)], scale, options, watch)
    search.run(time.perf_counter() + options.max_seconds)
    F = math.sqrt(scale.level) * search.solution[0]
    if view.spectra.is_leading:
        return applied_dual_value(view, budget, V, F)
    return dual_value(view, budget, V @ F)
