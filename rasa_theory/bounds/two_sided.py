"""The two-sided floor: columns and rows of the pool at once, for any way to divide M_i T into U_i + V_i."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rasa_theory import linalg
from rasa_theory.bounds.applied import Capping, ThinDivision, applied_two_sided_value
from rasa_theory.bounds.closed import cappings
from rasa_theory.bounds.dual import CapturedEnergy, rounding_allowance
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


@dataclass(frozen=True)
class Division:
    """A point of the two-sided floor: A_i = M_i T is divided into U_i + V_i.

    - T: (a, a) with T T^T <= I, the part of M_i that counts on both sides.
    - U: the function (i, A_i) -> U_i (b, a).
    - s: weights (L,) in (0, 1), s_i for U_i and 1 - s_i for V_i.
    - F: (L, b, p), factors of Y_i = F_i F_i^T.
    - H: (L, a, p), factors of Y'_i = H_i H_i^T.
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
    ||E_i||^2 = ||E_i K||^2 + ||E_i T||^2. The columns of X_i lie in the range of Z_i, a projector on R shared and q
    private directions, and so do the columns of X_i K and X_i T. The rows of X_i T are combinations of rows of A_S T
    and A~_i T, so they lie in the range of such a projector, W_i.

    - ||E_i K||^2 >= ||(I - Z_i) M_i K||^2 = ||M_i K||^2 - tr Z_i M_i (I - T T^T) M_i^T.
    - X_i T = Z_i X_i T W_i, and Z_i A_i W_i is the nearest such matrix: ||E_i T||^2 >= ||A_i||^2 - ||Z_i A_i W_i||^2.
    - ||Z_i A_i W_i|| <= ||Z_i U_i W_i|| + ||Z_i V_i W_i|| <= ||Z_i U_i|| + ||V_i W_i||, and
      (x + y)^2 <= x^2 / s + y^2 / (1 - s).

    Together sum_i ||E_i||^2 >= ||M||^2 - sum_i tr Z_i g_i - sum_i tr W_i h_i, and `CapturedEnergy` bounds each sum.

    Rounding: as for `dual_value`, with Omega = sum_i ((||M_i||^2 + ||U_i||^2) / s_i + tr Y_i
    + (||M_i||^2 + ||V_i||^2) / (1 - s_i) + tr Y'_i). There are sqrt(a) times more roundings, since M_i T is computed
    to a eps ||M_i|| ||T||_F, and ||T||_F <= sqrt(a). T is divided by its largest singular value if that exceeds 1, and
    shrunk by the rounding of both. The value is -inf unless 0 < s_i < 1 and everything is finite.
    """
    L, (b, a) = view.layers, view.shape
    T, s, F, H = (x.double() for x in (division.T, division.s, division.F, division.H))
    if not all(bool(torch.isfinite(x).all()) for x in (T, s, F, H)) or not bool(((s > 0) & (s < 1)).all()):
        return -math.inf
    T = T * (1 - 100 * a * torch.finfo(torch.float64).eps) / max(1.0, float(torch.linalg.matrix_norm(T, 2)))
    Omega = float((F * F).sum() + (H * H).sum())
    columns, rows = CapturedEnergy(budget, L), CapturedEnergy(budget, L)
    for i, tile in enumerate(view.tiles(rows=b)):
        M = tile.values.double()
        A = M @ T
        U = division.U(i, A)
        V = A - U
        size = float((M * M).sum())
        Omega += (size + float((U * U).sum())) / float(s[i]) + (size + float((V * V).sum())) / float(1 - s[i])
        if not math.isfinite(Omega):
            return -math.inf
        columns.add(M @ M.mT - A @ A.mT + U @ U.mT / s[i], F[i])
        rows.add(V.mT @ V / (1 - s[i]), H[i])
    captured = columns.total() + rows.total()
    terms = 4 * math.sqrt(a) * (L * (a + b + F.shape[2] + H.shape[2]))
    return view.norm_squared - captured - rounding_allowance(int(terms), L * budget.rank, Omega)


class ProjectedProblem:
    """The two-sided problem in the leading directions of both sides, in units of the level.

    - times_T: the function X (a, m) -> T X, T symmetric.
    - Vb, Va: these directions, orthonormal (b, n) and (a, n').
    - G: Vb^T M_i (I - T T^T) M_i^T Vb, (L, n, n).
    - A: Vb^T A_i Va, (L, n, n').
    - beside: (L, n, n), the part of Vb^T A_i A_i^T Vb from row directions outside Va.
    - below: (L, n', n'), the part of Va^T A_i^T A_i Va from column directions outside Vb.
    """

    def __init__(
        self, view: LayerStack, budget: RankBudget, times_T: Callable[[Tensor], Tensor], width: int, level: float
    ) -> None:
        self.view, self.budget, self.times_T, self.level = view, budget, times_T, level
        self.Vb, self.Va = (leading_basis(side, budget, width) for side in (view, view.transpose()))
        left = view.left(self.Vb.to(view.dtype)).double().mT / math.sqrt(level)  # Vb^T M_i (L, n, a)
        right = view.right(times_T(self.Va).to(view.dtype)).double() / math.sqrt(level)  # A_i Va (L, b, n')
        left_T = times_T(left.mT).mT
        self.A = self.Vb.mT @ right
        self.G = left @ left.mT - left_T @ left_T.mT
        self.beside = left_T @ left_T.mT - self.A @ self.A.mT
        self.below = right.mT @ right - self.A.mT @ self.A

    def initial_guess(self) -> Blocks:
        """U_i = V_i = A_i / 2 and s_i = 1/2, with the Y_i and Y'_i of the clipped floors."""
        U = self.A / 2
        x = torch.zeros_like(U[:, 0, 0])
        return [U, x, clipped_factors(self.G + 2 * U @ U.mT, self.budget), clipped_factors(2 * U.mT @ U, self.budget)]

    def captured(self, blocks: Blocks, mu: float) -> Evaluation:
        """The captured energy of columns and rows at U (L, n, n'), x (L,) with s = 1 / (1 + exp(-x)), F and H.

        `complete` adds shares of `beside` and `below`, so they are counted here.
        """
        U, x, F, H = blocks
        s, V = torch.sigmoid(x)[:, None, None], self.A - U
        excess, lack = (2 * s - 1).clamp_min(0), (1 - 2 * s).clamp_min(0)  # the shares that `complete` adds
        UU, VV = U @ U.mT, V.mT @ V
        g = self.G + (UU + excess**2 * self.beside) / s
        h = (VV + lack**2 * self.below) / (1 - s)
        columns = smoothed_energy(g, F, self.budget, mu)
        rows = smoothed_energy(h, H, self.budget, mu)
        slope_U = 2 * (columns.Z @ U / s - V @ rows.Z / (1 - s))
        slope_g = -(UU + excess**2 * self.beside) / s**2 + 4 * excess * self.beside / s
        slope_h = (VV + lack**2 * self.below) / (1 - s) ** 2 - 4 * lack * self.below / (1 - s)
        slope_x = ((columns.Z * slope_g).sum((1, 2)) + (rows.Z * slope_h).sum((1, 2))) * (s * (1 - s)).reshape(-1)
        gradients = [slope_U, slope_x, columns.slope_F, rows.slope_F]
        return Evaluation(columns.smooth + rows.smooth, columns.exact + rows.exact, gradients)

    def complete(self, blocks: Blocks, T: Tensor) -> Division:
        """The division of the whole A_i = M_i T, T (a, a): U_i in the leading directions is a block, else by a rule.

        The block of A_i of leading columns with other rows costs nothing on the row side, so V_i gets it. Likewise U_i
        gets the block of other columns with leading rows. But with s_i far from 1/2 the weights 1 / s_i and
        1 / (1 - s_i) would lift a block above the level. So U_i gets at most the share 2 s_i of its block, and V_i at
        most 2 (1 - s_i). The rest of A_i is divided as s_i and 1 - s_i, where s_i A_i weighs no more than its share.
        """
        U, x, F, H = blocks
        root, s = math.sqrt(self.level), torch.sigmoid(x)

        def whole(i: int, A: Tensor) -> Tensor:
            _, below = _shares(s[i])
            K = self._thin(U[i], s[i], self.Vb.mT @ A)
            return s[i] * A + self.Vb @ K + (below - s[i]) * A @ self.Va @ self.Va.mT

        return Division(T, whole, s, root * self.Vb @ F, root * self.Va @ H)

    def complete_thin(self, blocks: Blocks, T: Capping) -> ThinDivision:
        """The division of `complete` in thin factors, at the cost of one pass."""
        U, x, F, H = blocks
        root, s = math.sqrt(self.level), torch.sigmoid(x)
        tiles = self.view.tiles(rows=self.view.shape[0])
        K = [
            self._thin(U[i], s[i], T.times(linalg.product(tile.values.double().mT, self.Vb)).mT)
            for i, tile in enumerate(tiles)
        ]
        return ThinDivision(T, self.Vb, self.Va, s, _shares(s)[1] - s, torch.stack(K), root * F, root * H)

    def _thin(self, U: Tensor, s: Tensor, VA: Tensor) -> Tensor:
        """K_i (n, a), what the leading columns add to s_i A_i, from U_i (n, n'), s_i and Vb^T A_i (n, a)."""
        beside, below = _shares(s)
        inner = math.sqrt(self.level) * U + (s - beside - below) * (VA @ self.Va)
        return inner @ self.Va.mT + (beside - s) * VA


def _shares(s: Tensor) -> tuple[Tensor, Tensor]:
    """The shares of U_i in the block beside the leading one, and in the block below it."""
    return (2 * s - 1).clamp_min(0), (2 * s).clamp_max(1)


class _SideSearch:
    """The search for a division of one orientation of a stack."""

    def __init__(self, view: LayerStack, budget: RankBudget, options: FloorOptions, watch: SearchWatch | None) -> None:
        self.view, self.budget = view, budget
        scale = SearchScale.of(view, budget)
        self.T: Tensor | Capping = self._capping()
        times_T = self.T.times if isinstance(self.T, Capping) else self.T.__matmul__
        self.problem = ProjectedProblem(view, budget, times_T, options.width_of(view, budget), scale.level)
        x0 = self.problem.initial_guess()
        self.search = Search("two-sided", self.problem.captured, x0, scale, options, watch)
        self._points = 0

    def _capping(self) -> Tensor | Capping:
        """T, which brings the row directions that layers share down to their L r-th; T = I without an L r-th."""
        level = self.view.layers * self.budget.rank
        if self.view.spectra.is_leading:
            return Capping.of(self.view, level)
        identity = torch.eye(self.view.shape[1], dtype=torch.float64, device=self.view.device)
        return (cappings(self.view, (level,)) or [identity])[0]

    def value(self) -> float:
        """The floor at the solution so far."""
        self._points += 1
        blocks = self.search.solution
        if isinstance(self.T, Capping):
            division = self.problem.complete_thin(blocks, self.T)
            return applied_two_sided_value(self.view, self.budget, division, self._points)
        return two_sided_value(self.view, self.budget, self.problem.complete(blocks, self.T))


def search_two_sided(view: LayerStack, budget: RankBudget, options: FloorOptions, watch: SearchWatch | None) -> float:
    """The highest `two_sided_value` at the ends of the stages of a search in the leading `options.width` directions.

    Given T, the bound is convex in U, s, Y and Y' together. T brings the row directions that layers share down to
    their L r-th. Which orientation takes T can only be seen by searching: both run one stage, and the one with the
    lower captured energy goes on, in the time that is left of 2 `options.max_seconds`.

    The search sees the leading directions only, and with less smoothing it relies on them more. So the whole formula
    is evaluated after every stage, and the search ends at the first stage that lowers it.
    """
    deadline = time.perf_counter() + 2 * options.max_seconds
    sides = []
    for orientation in (view, view.transpose()):
        side = _SideSearch(orientation, budget, options, watch)
        side.search.run_stage(time.perf_counter() + options.max_seconds)
        sides.append(side)
    better = min(sides, key=lambda side: side.search.best)
    best = better.value()
    while better.search.can_improve(deadline):
        better.search.run_stage(deadline)
        value = better.value()
        if value <= best:
            break
        best = value
    return best
