"""Closed forms: the allocation bound above e_rasa(k), and certified floors below it.

sigma_ij is the j-th singular value of M_i, Gamma_i = M_i M_i^T, and KF_m(S) the sum of the m largest eigenvalues of S.
An update of the budget is X_i = B~_i A~_i + B_S D_i A_S. Its columns lie in a space of R dimensions that all layers
share, and in q more of layer i. P projects on the former, and P_i on the rest of the latter, orthogonal to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rasa_theory import linalg
from rasa_theory.bounds.allocation import allocate_pool, terms_within_reach
from rasa_theory.bounds.bound import Bound, BoundName
from rasa_theory.distributed import LayerSharding
from rasa_theory.problem import LayerStack, RankBudget


def allocation_bound(stack: LayerStack, budget: RankBudget) -> Bound:
    """Bound e_rasa(k) from above by the optimum of pools whose terms serve one layer each.

    e_alloc(k) = sum_i sum_{j>q} sigma_ij^2 - (the R largest of {sigma_ij^2 : j > q}) >= e_rasa(k).

    Proof: let layer i keep its q leading singular terms as private terms. Let the pool hold the R largest of all other
    singular terms, each with a nonzero mixing coefficient in its own layer alone. These are RaSA factors of the budget,
    and by orthogonality of singular terms their error is e_alloc(k).

    It is at most e_lora, which takes the terms q + 1 .. r of every layer: one choice of R terms, and e_alloc takes the
    largest ones. So e_lora - e_alloc is the worth of unequal allocation, e_alloc - e_rasa the worth of true sharing.

    Arguments:
        stack: the updates M_i, (L, b, a).
        budget: r and k. q = r - k, R = L k.

    Returns:
        e_alloc(k), squared, summed over layers, in the units of the stack, with the name "allocation".

    Raises:
        InputError: r exceeds min(b, a).
    """
    budget.check_fits(stack)
    unit = stack.unit()
    if unit.spectra.is_leading:
        S = unit.sharding.all_gather(terms_within_reach(unit, budget).S)
        taken = S**2
        layer, index = allocate_pool(S, budget)
        captured = float(taken[:, : budget.private_rank].sum() + taken[layer, index].sum())
        return Bound(max(unit.norm_squared - captured, 0.0) * stack.scale**2, BoundName.ALLOCATION)
    S = unit.spectra.singular_values()
    rest = S**2
    rest[:, : budget.private_rank] = 0
    rest[allocate_pool(S, budget)] = 0
    return Bound(float(rest.sum()) * stack.scale**2, BoundName.ALLOCATION)


def closed_floors(stack: LayerStack, budget: RankBudget) -> list[Bound]:
    """All floors in closed form, below e_rasa(k), for both orientations, less their rounding. They can be negative.

    Each is proved in the docstring of its function: `rank_floor`, `stack_floor`, `clipped_floor` and `split_floor`, the
    last with every T of `cappings` at L r and at 3/2 L r. Transposing every M_i transposes the updates of the budget,
    so floors of the transposed stack hold as well. Values are squared and in the units of the stack.

    Raises InputError if r > min(b, a).
    """
    budget.check_fits(stack)
    unit, Lr = stack.unit(), stack.layers * budget.rank
    floors = [Bound(0.0, BoundName.ZERO), rank_floor(unit, budget)]
    for view in (unit, unit.transpose()):
        floors += [stack_floor(view, budget), clipped_floor(view, budget)]
        floors += [split_floor(view, budget, T) for T in cappings(view, (Lr, Lr + Lr // 2))]
    return [Bound(floor.value * stack.scale**2, floor.name) for floor in floors]


def floor_slack(stack: LayerStack, name: str) -> float:
    """Greatest distance of the closed floor `name` from its exact value, which is above it: squared, in input units.

    It is twice the allowance of a floor from Gram matrices: one allowance is taken off, and rounding may have lowered
    the sum before that by another. The allowance of the split floor is 2 sqrt(a) times that of the others.
    """
    views = (stack.unit(), stack.unit().transpose())
    times = 2 * math.sqrt(max(stack.shape)) if name == BoundName.SPLIT else 1.0
    return 2 * times * max(_gram_allowance(view, max(stack.shape)) for view in views) * stack.scale**2


def rank_floor(unit: LayerStack, budget: RankBudget) -> Bound:
    """sum_i sum_{j>q+R} sigma_ij^2.

    Proof: X_i has rank q + R at most, so by Eckart-Young layer i leaves at least its tail after q + R.

    Rounding: the norm of the tail moves by at most the norm of the error of M (Mirsky).
    """
    rank = budget.private_rank + budget.pool_rank(unit.layers)
    tail = float(linalg.tail_energy(unit.spectra.singular_values(), rank).sum())
    allowance = linalg.rounding(math.sqrt(unit.norm_squared), unit.shape, torch.finfo(torch.float64).eps)
    return Bound(max(math.sqrt(tail) - allowance, 0.0) ** 2, BoundName.RANK)


def stack_floor(unit: LayerStack, budget: RankBudget) -> Bound:
    """sum_{j>Lr} sigma_j([M_1 .. M_L])^2.

    Proof: the columns of all X_i together lie in a space of R + L q = L r dimensions, see `common_space_floor`.
    """
    return Bound(common_space_floor(unit, unit.layers * budget.rank), BoundName.STACK)


def common_space_floor(unit: LayerStack, rank: int) -> float:
    """sum_{j>rank} sigma_j([M_1 .. M_L])^2 less its rounding: squared, in the units of `unit`. It can be negative.

    It is below the error of all updates X_i whose columns lie in one space of `rank` dimensions. Proof: [X_1 .. X_L]
    has at most this rank, so by Eckart-Young [M_1 .. M_L] leaves at least its tail after it. The tail is the sum of
    the other eigenvalues of sum_i Gamma_i.
    """
    rest = max(unit.shape[0] - rank, 0)
    eigenvalues = linalg.symmetric_eigenvalues(unit.spectra.gram()).clamp_min(0)
    return float(eigenvalues[:rest].sum()) - _gram_allowance(unit, rest)


def clipped_floor(unit: LayerStack, budget: RankBudget) -> Bound:
    """||M||^2 - sum_i sum_{j<=q} sigma_ij^2 - KF_R(sum_i clip(Gamma_i)).

    clip lowers the top q eigenvalues to the next one.

    Proof: layer i captures at most tr((P + P_i) Gamma_i) of its energy. Split Gamma_i = Y_i + clip(Gamma_i), Y_i >= 0
    the part of the top q eigenvalues above sigma_{i,q+1}^2. Since P + P_i <= I, tr((P + P_i) Y_i) <= tr Y_i. By Ky Fan
    tr(P_i clip(Gamma_i)) <= q sigma_{i,q+1}^2 and tr(P sum_i clip(Gamma_i)) <= KF_R. The first two add up to the q
    leading sigma_ij^2.
    """
    q, R = budget.private_rank, budget.pool_rank(unit.layers)
    U, energy = unit.spectra.svd().U[:, :, :q], unit.spectra.singular_values() ** 2  # (L, m)
    following = energy[:, q] if q < energy.shape[1] else torch.zeros_like(energy[:, 0])
    above = (energy[:, :q] - following[:, None])[unit.sharding.local]
    Y = torch.einsum("ibq,iq,icq->bc", U, above, U)
    clipped = unit.spectra.gram() - unit.sharding.all_reduce(Y)
    value = unit.norm_squared - float(energy[:, :q].sum()) - float(linalg.ky_fan(clipped, R))
    return Bound(value - _gram_allowance(unit, R), BoundName.CLIPPED)


def split_floor(view: LayerStack, budget: RankBudget, T: Tensor) -> Bound:
    """||M||^2 - C({M_i (I - N) M_i^T}) - C({T^T M_i^T M_i T}), N = T T^T <= I, C as in `ClippedEnergy`.

    Proof: with E_i = M_i - X_i and K K^T = I - N, ||E_i||^2 = ||E_i K||^2 + ||E_i T||^2. Times a matrix from the right,
    X_i keeps its structure: columns in R shared and q private directions, and the same for rows. So the first term is
    at least what columns leave of M_i K, the second at least what rows leave of M_i T.

    Rounding: M_i T is off by a eps ||M_i|| ||T||_F <= a sqrt(a) eps ||M_i||, which enters both sides twice.
    """
    b, a = view.shape
    columns, rows = ClippedEnergy.empty(view, budget, b), ClippedEnergy.empty(view, budget, a)
    for tile in view.tiles(rows=b):
        M = tile.values.double()
        A = M @ T
        columns.add(M @ M.mT - A @ A.mT)
        rows.add(A.mT @ A)
    captured = columns.total() + rows.total()
    allowance = 2 * math.sqrt(a) * _gram_allowance(view, view.layers * budget.rank)
    return Bound(view.norm_squared - captured - allowance, BoundName.SPLIT)


def cappings(view: LayerStack, indices: Sequence[int]) -> list[Tensor]:
    """T = N^{1/2} (a, a), N = min(1, t/S) as a function of S = sum_i M_i^T M_i, one for each of `indices`.

    t is the eigenvalue number index + 1 of S. Then sum_i (M_i T)^T M_i T = min(S, t): the leading row directions, which
    layers share, are brought down to the rest. An index with t = 0 is left out, as S has lower rank or is smaller. T is
    shrunk by more than its rounding error, which is a few a eps in norm, so that T T^T <= I.
    """
    a = view.shape[1]
    eps = torch.finfo(torch.float64).eps
    values, X = linalg.symmetric_eigenpairs(view.transpose().spectra.gram())
    levels = [values[-1 - index] for index in indices if index < a]
    shrink = 1 - 100 * a * eps
    return [shrink * (X * (t / values.clamp_min(t)).sqrt()) @ X.mT for t in levels if t > a * eps * view.norm_squared]


@dataclass
class ClippedEnergy:
    """C = sum_i KF_q(g_i) + KF_R(sum_i clip(g_i)) >= sum_i tr (P + P_i) g_i, for g_i >= 0 (n, n), added one by one.

    The proof of `clipped_floor` holds for any g_i in place of Gamma_i. Every process adds its own layers.
    """

    budget: RankBudget
    sharding: LayerSharding
    own: Tensor
    pooled: Tensor

    @classmethod
    def empty(cls, view: LayerStack, budget: RankBudget, n: int) -> ClippedEnergy:
        """The sums for layers of `view`, before any of them is added."""
        zeros = torch.zeros(n, n, dtype=torch.float64, device=view.device)
        return cls(budget, view.sharding, zeros.new_zeros(()), zeros)

    def add(self, g: Tensor) -> None:
        """Add one layer to both sums."""
        q = self.budget.private_rank
        if q > 0:
            values, V = linalg.leading_eigenpairs(g, min(q + 1, len(g)))  # ascending
            following = values[0] if q < len(g) else values.new_zeros(())
            values, V = values[-q:], V[:, -q:]
            self.own = self.own + values.clamp_min(0).sum()
            g = g - (V * (values - following)) @ V.mT
        self.pooled = self.pooled + g

    def total(self) -> float:
        """Return C, after all layers of all processes."""
        own, pooled = self.sharding.all_reduce_together(self.own, self.pooled)
        return float(own) + float(linalg.ky_fan(pooled, self.budget.pool_rank(self.sharding.layers)))


def _gram_allowance(unit: LayerStack, m: int) -> float:
    """Greatest error of a sum of m eigenvalues of a computed Gram matrix.

    The Gram matrix is a sum of L a products, so its error in Frobenius norm is at most L a eps ||M||^2. The backward
    error of the eigenvalue solver is a small multiple of b eps ||M||^2. A sum of m eigenvalues moves by at most sqrt(m)
    times that norm. 10 is left for the constants.
    """
    b, a = unit.shape
    return 10 * math.sqrt(m + 1) * (unit.layers * a + b) * torch.finfo(torch.float64).eps * unit.norm_squared
