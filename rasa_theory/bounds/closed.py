"""Closed forms: the allocation bound above e_rasa(k), and certified floors below it.

sigma_ij is the j-th singular value of M_i, Gamma_i = M_i M_i^T, KF_m(S) the sum of the m largest eigenvalues of S.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rasa_theory import linalg
from rasa_theory.bounds.allocation import allocate_pool
from rasa_theory.distributed import LayerSharding
from rasa_theory.problem import LayerStack, RankBudget


@dataclass(frozen=True)
class Bound:
    """A bound on e_rasa(k): squared, summed over layers, in the units of the input; and which argument gave it."""

    value: float
    name: str


def allocation_bound(stack: LayerStack, budget: RankBudget) -> Bound:
    """e_alloc(k) = sum_i sum_{j>q} sigma_ij^2 - (the R largest of {sigma_ij^2 : j > q}) >= e_rasa(k).

    What D_i can do without any sharing: every pool term serves one layer, whichever needs it most. It is at most
    e_lora, since giving every layer its own terms q+1 .. r is one choice among those it is the best of.
    e_lora - e_alloc is the worth of unequal allocation, e_alloc - e_rasa that of true sharing. Raises InputError if
    r > min(b, a).
    """
    budget.check_fits(stack)
    S = stack.unit().spectra.singular_values()
    rest = S**2
    rest[:, : budget.private_rank] = 0
    rest[allocate_pool(S, budget)] = 0
    return Bound(float(rest.sum()) * stack.scale**2, "allocation")


def closed_floors(stack: LayerStack, budget: RankBudget) -> list[Bound]:
    """Every closed form below e_rasa(k), both orientations, each less its rounding. They can be negative.

    - zero.
    - rank: an update has rank <= q + R, so layer i leaves at least sum_{j>q+R} sigma_ij^2.
    - stack: all updates side by side have rank <= L q + R = L r, so [M_1 .. M_L] leaves its own tail after L r.
    - clipped: see `_clipped`.
    - split: see `_split`, with N of `cappings` at L r and at 3/2 L r.

    Raises InputError if r > min(b, a).
    """
    budget.check_fits(stack)
    unit, Lr = stack.unit(), stack.layers * budget.rank
    floors = [Bound(0.0, "zero"), _rank(unit, budget)]
    for view in (unit, unit.transpose()):
        floors += [_stack(view, budget), _clipped(view, budget)]
        floors += [_split(view, budget, T) for T in cappings(view, (Lr, Lr + Lr // 2))]
    return [Bound(floor.value * stack.scale**2, floor.name) for floor in floors]


def floor_slack(stack: LayerStack, name: str) -> float:
    """How far below its exact value the closed floor `name`, read from Gram matrices, can lie: squared, in input units.

    Twice its allowance: one that is taken off, and one by which rounding may have lowered what it is taken from. That
    of `_split` is 2 sqrt(a) times those of the others.
    """
    views = (stack.unit(), stack.unit().transpose())
    times = 2 * math.sqrt(max(stack.shape)) if name == "split" else 1.0
    return 2 * times * max(_gram_allowance(view, max(stack.shape)) for view in views) * stack.scale**2


def _rank(unit: LayerStack, budget: RankBudget) -> Bound:
    """sum_i sum_{j>q+R} sigma_ij^2. The tail norm moves by at most the error of M in norm (Mirsky)."""
    rank = budget.private_rank + budget.pool_rank(unit.layers)
    tail = float(linalg.tail_energy(unit.spectra.singular_values(), rank).sum())
    allowance = linalg.rounding(math.sqrt(unit.norm_squared), unit.shape, torch.finfo(torch.float64).eps)
    return Bound(max(math.sqrt(tail) - allowance, 0.0) ** 2, "rank")


def _stack(unit: LayerStack, budget: RankBudget) -> Bound:
    """sum_{j>Lr} sigma_j([M_1 .. M_L])^2."""
    return Bound(common_space_floor(unit, unit.layers * budget.rank), "stack")


def common_space_floor(unit: LayerStack, rank: int) -> float:
    """sum_{j>rank} sigma_j([M_1 .. M_L])^2, less its rounding, so it can be negative: in units of the view `unit`.

    By Eckart-Young, a floor below the error of all updates whose columns lie in one space of `rank` dimensions. It is
    read from the eigenvalues of sum_i Gamma_i.
    """
    rest = max(unit.shape[0] - rank, 0)
    eigenvalues = linalg.symmetric_eigenvalues(unit.spectra.gram()).clamp_min(0)
    return float(eigenvalues[:rest].sum()) - _gram_allowance(unit, rest)


def _clipped(unit: LayerStack, budget: RankBudget) -> Bound:
    """||M||^2 - sum_i sum_{j<=q} sigma_ij^2 - KF_R(sum_i clip(Gamma_i)).

    clip lowers the top q eigenvalues to the next one.

    Let P project on span(B_S), of rank <= R, and P_i on the rest of the columns of update i, of rank <= q. What layer i
    keeps of its energy is at most tr((P + P_i) Gamma_i). Split Gamma_i = Y_i + clip(Gamma_i), Y_i >= 0 the part of the
    top q eigenvalues above sigma_{i,q+1}^2. Since P + P_i <= I, tr((P + P_i) Y_i) <= tr Y_i; by Ky Fan
    tr(P_i clip(Gamma_i)) <= q sigma_{i,q+1}^2 and tr(P sum_i clip(Gamma_i)) <= KF_R. The first two add up to the q
    leading sigma_ij^2.
    """
    q, R = budget.private_rank, budget.pool_rank(unit.layers)
    U, energy = unit.spectra.svd().U[:, :, :q], unit.spectra.singular_values() ** 2  # (L, m)
    following = energy[:, q] if q < energy.shape[1] else torch.zeros_like(energy[:, 0])
    above = (energy[:, :q] - following[:, None])[unit.sharding.local]
    clipped = unit.spectra.gram() - unit.sharding.all_reduce(torch.einsum("ibq,iq,icq->bc", U, above, U))
    value = unit.norm_squared - float(energy[:, :q].sum()) - float(linalg.ky_fan(clipped, R))
    return Bound(value - _gram_allowance(unit, R), "clipped")


def cappings(view: LayerStack, indices: Sequence[int]) -> list[Tensor]:
    """T = N^{1/2} (a, a), N = min(1, t/S) as a function of S = sum_i M_i^T M_i, t its eigenvalue number index + 1.

    sum_i (M_i T)^T M_i T = min(S, t): the leading row directions, which layers share, are brought down to the rest.
    An index with t = 0 (S of lower rank, or smaller) is left out. T is shrunk by more than its rounding error, which
    is a few a eps in norm, so that T T^T <= I.
    """
    a = view.shape[1]
    eps = torch.finfo(torch.float64).eps
    values, X = linalg.symmetric_eigenpairs(view.transpose().spectra.gram())
    levels = [values[-1 - index] for index in indices if index < a]
    shrink = 1 - 100 * a * eps
    return [shrink * (X * (t / values.clamp_min(t)).sqrt()) @ X.mT for t in levels if t > a * eps * view.norm_squared]


def _split(view: LayerStack, budget: RankBudget, T: Tensor) -> Bound:
    """||M||^2 - C({M_i (I - N) M_i^T}) - C({T^T M_i^T M_i T}), N = T T^T <= I, C as in `ClippedEnergy`.

    With E_i the residuals and K K^T = I - N, ||E_i||^2 = ||E_i K||^2 + ||E_i T||^2. Times a matrix from the right,
    updates keep their structure: columns in R shared and q private directions, and the same for rows. So the first
    term is at least what columns leave of M_i K, the second at least what rows leave of M_i T.

    Rounding: M_i T is off by a eps ||M_i|| ||T||_F <= a sqrt(a) eps ||M_i||, which enters both sides twice.
    """
    b, a = view.shape
    columns, rows = ClippedEnergy.of(view, budget, b), ClippedEnergy.of(view, budget, a)
    for tile in view.tiles(rows=b):
        M = tile.values.double()
        A = M @ T
        columns.add(M @ M.mT - A @ A.mT)
        rows.add(A.mT @ A)
    captured = columns.total() + rows.total()
    allowance = 2 * math.sqrt(a) * _gram_allowance(view, view.layers * budget.rank)
    return Bound(view.norm_squared - captured - allowance, "split")


@dataclass
class ClippedEnergy:
    """C = sum_i KF_q(g_i) + KF_R(sum_i clip(g_i)) >= sum_i tr (P + P_i) g_i, for g_i >= 0 (n, n), one by one.

    The argument of `_clipped`, for any g_i in place of Gamma_i. Every process counts in its own layers.
    """

    budget: RankBudget
    sharding: LayerSharding
    own: Tensor
    pooled: Tensor

    @classmethod
    def of(cls, view: LayerStack, budget: RankBudget, n: int) -> ClippedEnergy:
        """Of no layer of `view` yet."""
        zeros = torch.zeros(n, n, dtype=torch.float64, device=view.device)
        return cls(budget, view.sharding, zeros.new_zeros(()), zeros)

    def add(self, g: Tensor) -> None:
        """Count one layer in."""
        q = self.budget.private_rank
        if q > 0:
            values, V = linalg.leading_eigenpairs(g, min(q + 1, len(g)))  # ascending
            following = values[0] if q < len(g) else values.new_zeros(())
            values, V = values[-q:], V[:, -q:]
            self.own = self.own + values.clamp_min(0).sum()
            g = g - (V * (values - following)) @ V.mT
        self.pooled = self.pooled + g

    def total(self) -> float:
        """C, after all layers."""
        own, pooled = self.sharding.all_reduce_together(self.own, self.pooled)
        return float(own) + float(linalg.ky_fan(pooled, self.budget.pool_rank(self.sharding.layers)))


def _gram_allowance(unit: LayerStack, m: int) -> float:
    """How far a sum of m eigenvalues of a computed Gram matrix can be off.

    The Gram matrix is a sum of L a products, its error in Frobenius norm at most L a eps ||M||^2; the eigenvalue
    solver's backward error is a small multiple of b eps ||M||^2. A sum of m eigenvalues moves by at most sqrt(m) times
    that norm.
    """
    b, a = unit.shape
    return 10 * math.sqrt(m + 1) * (unit.layers * a + b) * torch.finfo(torch.float64).eps * unit.norm_squared
