"""The two-sided floor: columns and rows of the pool at once, for any way to divide M_i T into U_i + V_i."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rasa_theory.bounds.closed import cappings
from rasa_theory.bounds.dual import CapturedEnergy, rounding_allowance
from rasa_theory.bounds.search import FloorOptions, Search, SearchWatch, captured_smoothly, clip_factors, leading_basis
from rasa_theory.problem import LayerStack, RankBudget


@dataclass(frozen=True)
class Division:
    """T (a, a) with T T^T <= I; U_i (b, a) as a function of i and A_i = M_i T; s (L,) in (0, 1); factors of Y_i, Y'_i.

    F (L, b, p) and H (L, a, p), Y_i = F_i F_i^T and Y'_i = H_i H_i^T.
    """

    T: Tensor
    U: Callable[[int, Tensor], Tensor]
    s: Tensor
    F: Tensor
    H: Tensor


def two_sided_value(view: LayerStack, budget: RankBudget, division: Division) -> float:
    """||M||^2 - C({g_i}) - C({h_i}) less its rounding, below e_rasa(k) for any division: C is `CapturedEnergy`, with

        A_i = M_i T = U_i + V_i,  g_i = M_i M_i^T - A_i A_i^T + U_i U_i^T / s_i,  h_i = V_i^T V_i / (1 - s_i).

    Proof: let X_i be any updates of the budget, E_i = M_i - X_i, and K K^T = I - T T^T, so that
    ||E_i||^2 = ||E_i K||^2 + ||E_i T||^2. The columns of X_i K and X_i T lie in the range of Z_i, a projector on R
    shared and q private directions; so do the rows of X_i T for such a W_i (they are those of A_S T and of A~_i T).
    - ||E_i K||^2 >= ||(I - Z_i) M_i K||^2 = ||M_i K||^2 - tr Z_i M_i (I - T T^T) M_i^T.
    - X_i T = Z_i X_i T W_i, and Z_i A_i W_i is the nearest such matrix: ||E_i T||^2 >= ||A_i||^2 - ||Z_i A_i W_i||^2.
    - ||Z_i A_i W_i|| <= ||Z_i U_i W_i|| + ||Z_i V_i W_i|| <= ||Z_i U_i|| + ||V_i W_i||, and
      (x + y)^2 <= x^2 / s + y^2 / (1 - s).

    Together sum_i ||E_i||^2 >= ||M||^2 - sum_i tr Z_i g_i - sum_i tr W_i h_i, and `CapturedEnergy` bounds each sum.

    Rounding: as for `dual_value`, with Omega = sum_i ((||M_i||^2 + ||U_i||^2) / s_i + tr Y_i
    + (||M_i||^2 + ||V_i||^2) / (1 - s_i) + tr Y'_i), and with sqrt(a) times as many roundings, since M_i T is computed
    to a eps ||M_i|| ||T||_F, and ||T||_F <= sqrt(a). T is divided by its largest singular value, if that exceeds 1, and
    shrunk by the rounding of both. Needs 0 < s_i < 1; -inf if anything is not finite.
    """
    L, (b, a) = view.layers, view.shape
    T, s, F, H = (x.double() for x in (division.T, division.s, division.F, division.H))
    if not all(bool(torch.isfinite(x).all()) for x in (T, s, F, H)) or not bool(((s > 0) & (s < 1)).all()):
        return -math.inf
    T = T * (1 - 100 * a * torch.finfo(torch.float64).eps) / max(1.0, float(torch.linalg.matrix_norm(T, 2)))
    energy = float((F * F).sum() + (H * H).sum())
    columns, rows = CapturedEnergy(budget, L), CapturedEnergy(budget, L)
    for i, tile in enumerate(view.tiles(rows=b)):
        M = tile.values.double()
        A = M @ T
        U = division.U(i, A)
        V = A - U
        size = float((M * M).sum())
        energy += (size + float((U * U).sum())) / float(s[i]) + (size + float((V * V).sum())) / float(1 - s[i])
        if not math.isfinite(energy):
            return -math.inf
        columns.add(M @ M.mT - A @ A.mT + U @ U.mT / s[i], F[i])
        rows.add(V.mT @ V / (1 - s[i]), H[i])
    captured = columns.total() + rows.total()
    terms = 4 * math.sqrt(a) * (L * (a + b + F.shape[2] + H.shape[2]))
    return view.norm_squared - captured - rounding_allowance(int(terms), L * budget.rank, energy)


class _Problem(NamedTuple):
    """The two-sided problem in the leading directions Vb (b, n), Va (a, n') of both sides, in units of the level.

    G (L, n, n) of M_i (I - T T^T) M_i^T, A (L, n, n') of A_i; `beside` (L, n, n) is what A_i A_i^T has beyond A A^T,
    from row directions outside Va, `below` (L, n', n') the same for A_i^T A_i.
    """

    Vb: Tensor
    Va: Tensor
    T: Tensor
    G: Tensor
    A: Tensor
    beside: Tensor
    below: Tensor

    @classmethod
    def of(cls, view: LayerStack, budget: RankBudget, T: Tensor, width: int, level: float) -> _Problem:
        Vb, Va = leading_basis(view, budget, width), leading_basis(view.transpose(), budget, width)
        left = view.left(Vb.to(view.dtype)).double().mT / math.sqrt(level)  # Vb^T M_i (L, n, a)
        right = view.right((T @ Va).to(view.dtype)).double() / math.sqrt(level)  # A_i Va (L, b, n')
        A, left_T = Vb.mT @ right, left @ T
        G = left @ left.mT - left_T @ left_T.mT
        return cls(Vb, Va, T, G, A, left_T @ left_T.mT - A @ A.mT, right.mT @ right - A.mT @ A)

    def objective(self, budget: RankBudget, search: Search) -> Callable[..., tuple[float, float, list[Tensor]]]:
        """Of U (L, n, n'), x with s = 1 / (1 + exp(-x)) (L,), F and H."""

        def evaluate(U: Tensor, x: Tensor, F: Tensor, H: Tensor) -> tuple[float, float, list[Tensor]]:
            s, V = torch.sigmoid(x)[:, None, None], self.A - U
            excess, lack = (2 * s - 1).clamp_min(0), (1 - 2 * s).clamp_min(0)  # `complete` puts so much where it costs
            UU, VV = U @ U.mT, V.mT @ V
            g = self.G + (UU + excess**2 * self.beside) / s
            h = (VV + lack**2 * self.below) / (1 - s)
            columns = captured_smoothly(g, F, budget, search.mu)
            rows = captured_smoothly(h, H, budget, search.mu)
            slope_U = 2 * (columns.Z @ U / s - V @ rows.Z / (1 - s))
            slope_g = -(UU + excess**2 * self.beside) / s**2 + 4 * excess * self.beside / s
            slope_h = (VV + lack**2 * self.below) / (1 - s) ** 2 - 4 * lack * self.below / (1 - s)
            slope_s = ((columns.Z * slope_g).sum((1, 2)) + (rows.Z * slope_h).sum((1, 2))) * (s * (1 - s)).reshape(-1)
            gradients = [slope_U, slope_s, columns.slope_F, rows.slope_F]
            return columns.smooth + rows.smooth, columns.exact + rows.exact, gradients

        return evaluate

    def start(self, budget: RankBudget) -> list[Tensor]:
        """Half of A on each side."""
        U = self.A / 2
        F = clip_factors(self.G + 2 * U @ U.mT, budget)
        return [U, torch.zeros_like(U[:, 0, 0]), F, clip_factors(2 * U.mT @ U, budget)]

    def complete(self, level: float, U: Tensor, x: Tensor, F: Tensor, H: Tensor) -> Division:
        """The whole division: outside the directions looked at, a rule.

        Of A_i, the block of leading columns with other rows costs nothing on the row side, so V_i gets it, and U_i the
        block of other columns with leading rows. But with s_i far from 1/2 the weight 1 / s_i would lift it above the
        level: at most 2 s_i and 2 (1 - s_i) of them. The rest is divided as s_i and 1 - s_i: s_i A_i weighs s_i.
        """
        root, s = math.sqrt(level), torch.sigmoid(x)
        Vb, Va = self.Vb, self.Va

        def whole(i: int, A: Tensor) -> Tensor:
            beside, below = (2 * s[i] - 1).clamp_min(0), (2 * s[i]).clamp_max(1)
            AV, VA = A @ Va, Vb.mT @ A
            core = VA @ Va
            inner = root * U[i] + (s[i] - beside - below) * core
            return s[i] * A + Vb @ (inner @ Va.mT + (beside - s[i]) * VA) + (below - s[i]) * AV @ Va.mT

        return Division(self.T, whole, s, root * Vb @ F, root * Va @ H)


def search_two_sided(view: LayerStack, budget: RankBudget, options: FloorOptions, watch: SearchWatch | None) -> float:
    """The best `two_sided_value` at the divisions that a search in the leading `options.width` directions comes to.

    Given T, the bound is convex in U, s, Y and Y' together. T brings the row directions that layers share down to their
    L r-th; on which side, the first stage of the search decides. As the smoothing falls, the search relies on ever
    less beside the directions it looks at, so the formula is evaluated after every stage, until it gives less.
    """
    begun = [_begin(side, budget, options, watch) for side in (view, view.transpose())]
    searching = min(begun, key=lambda one: one.search.best)
    searching.search.deadline = begun[0].search.deadline + options.max_seconds  # what both sides may take together
    best = searching.value(budget, searching.found)
    for found in searching.rest:
        value = searching.value(budget, found)
        if value <= best:
            break
        best = value
    return best


class _Searching(NamedTuple):
    """A search after its first stage, and the stages that follow."""

    side: LayerStack
    search: Search
    problem: _Problem
    found: list[Tensor]
    rest: Iterator[list[Tensor]]

    def value(self, budget: RankBudget, found: list[Tensor]) -> float:
        U, x, F, H = found
        return two_sided_value(self.side, budget, self.problem.complete(self.search.level, U, x, F, H))


def _begin(side: LayerStack, budget: RankBudget, options: FloorOptions, watch: SearchWatch | None) -> _Searching:
    identity = torch.eye(side.shape[1], dtype=torch.float64, device=side.device)
    T = (cappings(side, (side.layers * budget.rank,)) or [identity])[0]
    search = Search.of("two-sided", side, budget, options, watch)
    problem = _Problem.of(side, budget, T, options.width_of(side, budget), search.level)
    stages = search.stages(problem.objective(budget, search), problem.start(budget))
    return _Searching(side, search, problem, next(stages), stages)
