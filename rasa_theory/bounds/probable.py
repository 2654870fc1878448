"""Closed floors below e_rasa(k) from products with M alone: they hold but for a probability of 1e-10.

The forms of `closed`, with leading directions in place of eigenvectors and a `Majorant` in place of eigenvalues. Each
floor holds for any directions; only the bound on what they leave out rests on random vectors. So the floor that looks
highest by Ritz values is certified. These estimates can be too high, so the next one is certified too while its
estimate is above what is certified so far.

**The probability.** Every bound has random numbers of its own, see `linalg.stream`. The choice depends on the data and
on those for the terms of single layers, 2e-11 for each orientation. A certificate takes at most a majorant of the sum
over the layers, the rows of the split floor and one pooled sum, 2e-12 each, and at most `_CERTIFIED` are computed. That
is 6.4e-11 in all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rasa_theory import linalg
from rasa_theory.bounds.bound import Bound, BoundName
from rasa_theory.linalg import Majorant, Operator, lanczos, orthogonal
from rasa_theory.problem import SVD, LayerStack, RankBudget

FAILURE = 1e-10
"""The largest probability that a probable floor is above e_rasa(k)."""
_SHARE = 2e-12  # for the rows of the split floor, and for the pooled sum of a floor; see the module
_CERTIFIED = 4  # the most floors that are certified
_GOAL = 1e-5  # of e_lora: by how much each of them may exceed the exact value
_ESTIMATE = 5e-5  # of ||M||^2: what an estimate may miss
_LEAST_GOAL = 1e-5  # of ||M||^2, in place of e_lora
_NORM_ROUNDING = 1e-13  # of ||M||^2: more than the rounding of a sum of squares
_WITHIN = 4  # terms of a layer beyond r that estimates know
_FEW = 8  # the rank floor is considered if it takes at most this share of the directions of a layer
_DENSE = 1024  # a matrix with at most this many rows is decomposed
_EPS = float(torch.finfo(torch.float64).eps)


class Choice(NamedTuple):
    """A floor: its name, budget and orientation, and for the split floor its level's index."""

    name: BoundName
    budget: RankBudget
    transposed: bool
    level: int = 0


def probable_floor(unit: LayerStack, budget: RankBudget) -> Bound:
    """The highest of the floors of `closed_floors`, for k and for k = r, from products: squared, in units of `unit`.

    The name says so. It is below e_rasa(k) but for a probability of `FAILURE`.
    """
    goal = _GOAL * max(unit.spectra.tail_energy(budget.rank), _LEAST_GOAL * unit.norm_squared)
    ordered = sorted(estimates(unit, budget), key=lambda estimate: estimate[1])
    ordered = unit.sharding.processes.from_first(lambda: ordered)  # rounding may differ
    certify: dict[BoundName, Callable[[LayerStack, Choice, float], float]] = {
        BoundName.RANK: _rank,
        BoundName.STACK: _stack,
        BoundName.CLIPPED: _clipped,
        BoundName.SPLIT: _split,
    }
    best = Bound(0.0, BoundName.ZERO)
    for choice, captured in ordered[:_CERTIFIED]:
        if unit.norm_squared - captured <= best.value + goal:
            break
        view = unit.transpose() if choice.transposed else unit
        value = certify[choice.name](view, choice, goal) - _NORM_ROUNDING * unit.norm_squared
        if value > best.value:
            best = Bound(value, f"{choice.name}, probable", FAILURE)
    return best


# ---- the choice, from Ritz values alone


def estimates(unit: LayerStack, budget: RankBudget) -> list[tuple[Choice, float]]:
    """Each floor with an estimate of ||M||^2 less its value."""
    budgets = [budget] if budget.private_rank == 0 else [budget, RankBudget(budget.rank, budget.rank)]
    floors = [
        estimate
        for transposed, view in ((False, unit), (True, unit.transpose()))
        for estimate in _estimates(view, transposed, budgets)
    ]
    rank = min(budget.private_rank + budget.pool_rank(unit.layers), *unit.shape)
    if rank <= budget.rank + _WITHIN or _FEW * rank <= min(unit.shape) or min(unit.shape) <= _DENSE:
        floors.append((Choice(BoundName.RANK, budget, False), math.fsum(unit.spectra.most_captured(rank))))
    return floors


def common_count(view: LayerStack, budget: RankBudget) -> int:
    """The number of common directions that floors of this orientation take: one more than the largest level's index."""
    Lr = view.layers * budget.rank
    return min(Lr + Lr // 2 + 1, *view.shape)


def _estimates(view: LayerStack, transposed: bool, budgets: list[RankBudget]) -> Iterator[tuple[Choice, float]]:
    """The floors of one orientation."""
    Lr = view.layers * budgets[0].rank
    values, W = view.spectra.common_pairs(common_count(view, budgets[0]))
    yield Choice(BoundName.STACK, budgets[0], not transposed), float(values[:Lr].clamp_min(0).sum())
    terms = view.spectra.leading(min(budgets[0].rank + _WITHIN, *view.shape))
    grams, products = _projections(view, W, terms.Vh.mT)
    for budget in budgets:
        if budget.private_rank > 0:
            yield Choice(BoundName.CLIPPED, budget, transposed), _clipped_estimate(view, terms, budget)
        for level in (Lr, Lr + Lr // 2):
            if level < len(values) and float(values[level]) > 0:
                estimate = _split_estimate(view, budget, values, grams, products, level)
                yield Choice(BoundName.SPLIT, budget, transposed, level), estimate


def _projections(view: LayerStack, W: Tensor, terms: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Of the layers held: Q_i^T M_i^T M_i Q_i, Q_i = [W, V_i], and M_i W. V_i are the `terms` (L, a, n) beside W."""
    grams, products = [], []
    for V, tile in zip(terms, view.tiles(rows=view.shape[0]), strict=True):
        room = view.shape[1] - W.shape[1]
        Q = torch.cat([W, orthogonal.orthonormal_beside(W, V[:, :room])], 1)
        MQ = linalg.product(tile.values, Q.to(view.dtype)).double()
        grams.append(MQ.mT @ MQ)
        products.append(MQ[:, : W.shape[1]].clone())
    return grams, products


def _split_estimate(
    view: LayerStack, budget: RankBudget, values: Tensor, grams: list[Tensor], products: list[Tensor], level: int
) -> float:
    """About what the split floor of this level says can be captured; the names are those of `_split`."""
    q, R = budget.private_rank, budget.pool_rank(view.layers)
    f_W = (values[level] / values[:level].clamp_min(values[level])).sqrt()
    rows = columns = 0.0
    thin = []
    for G, MW in zip(grams, products, strict=True):
        f = torch.cat([f_W, f_W.new_ones(len(G) - level)])  # of T in the basis Q_i
        rows += float(linalg.ky_fan(f[:, None] * G * f, q))
        captured, Z = _clipped_thin(MW[:, :level] * (1 - f_W**2).clamp_min(0).sqrt(), q)
        columns += captured
        thin.append(Z)
    own = _summed(view, rows + columns)
    return own + R * float(values[level]) + _ky_fan_of_square(_gathered(thin, view, level), R, view, None)


def _clipped_estimate(view: LayerStack, terms: SVD, budget: RankBudget) -> float:
    """About what the clipped floor says can be captured."""
    q, R = budget.private_rank, budget.pool_rank(view.layers)
    energy = terms.S**2
    following = energy[:, q] if energy.shape[1] > q else torch.zeros_like(energy[:, 0])
    own = _summed(view, float(energy[:, :q].sum()))
    if R == 0:
        return own
    S = _pooled_operator(view, list(zip(terms.U[:, :, :q], energy[:, :q] - following[:, None], strict=True)))
    V = linalg.leading_guess(S, R, _ESTIMATE * view.norm_squared, linalg.stream("estimate", view.transposed))
    values = linalg.symmetric_eigenvalues((V.mT @ S.apply(V)).double())
    return own + float(linalg.largest_nonnegative(values, R))


# ---- certificates; sums over columns are those over rows of the transposed view


def _rank(view: LayerStack, choice: Choice, goal: float) -> float:
    """`rank_floor`: ||M||^2 - sum_i KF_{q+R}(M_i^T M_i)."""
    rank = choice.budget.private_rank + choice.budget.pool_rank(view.layers)
    return view.norm_squared - math.fsum(view.spectra.most_captured(min(rank, *view.shape)))


def _stack(view: LayerStack, choice: Choice, goal: float) -> float:
    """`stack_floor`: ||M||^2 - KF_{Lr}(sum_i M_i M_i^T)."""
    m = min(view.layers * choice.budget.rank, view.shape[0])
    return view.norm_squared - view.transpose().spectra.common_majorant(m, goal).ky_fan(m)


def _clipped(view: LayerStack, choice: Choice, goal: float) -> float:
    """`clipped_floor` with Y_i = V_i diag(theta_ij - theta_{i,q+1})_+ V_i^T, V_i leading Ritz vectors of M_i M_i^T.

    The proof there holds for any Y_i >= 0, with KF_q(Gamma_i - Y_i) for what remains of layer i.
    """
    q, R, rows = choice.budget.private_rank, choice.budget.pool_rank(view.layers), view.transpose()
    captured, parts = 0.0, []
    for majorant in rows.spectra.layer_majorants(min(q + 1, *view.shape)):
        following = majorant.theta[q] if q < len(majorant.theta) else majorant.theta.new_zeros(())
        y = (majorant.theta - following).clamp_min(0)
        captured += float(y.sum()) + majorant.ky_fan(q, minus=torch.diag(y))
        parts.append((majorant.V[:, :q].clone(), y[:q]))  # y is 0 from q on
    S = _pooled_operator(view, parts)
    stream = linalg.stream("clipped", view.transposed, q)
    pooled = linalg.majorant(S, R, goal, _SHARE, stream).ky_fan(R) if R > 0 else 0.0
    return view.norm_squared - _summed(view, captured) - pooled


def _pooled_operator(view: LayerStack, parts: list[tuple[Tensor, Tensor]]) -> Operator:
    """sum_i (M_i M_i^T - V_i diag(y_i) V_i^T), V_i (b, n) and y_i (n,) for the layers held."""
    summed = view.transpose().spectra.common_operator()

    def apply(X: Tensor) -> Tensor:
        private = torch.zeros_like(X)
        for V, y in parts:
            W = V.to(X.dtype)
            private += W @ (y.to(X.dtype)[:, None] * (W.mT @ X))
        return summed.apply(X) - view.sharding.all_reduce(private)

    return summed._replace(apply=apply, error=4 * summed.error)


def _summed(view: LayerStack, value: float) -> float:
    """The sum of a number over all processes."""
    return float(view.sharding.all_reduce(torch.tensor([value], dtype=torch.float64, device=view.device)))


def _split(view: LayerStack, choice: Choice, goal: float) -> float:
    """`split_floor` with T = I - W diag(1 - f) W^T, f_j^2 = t / lambda_j, W and lambda the leading Ritz pairs.

    S = sum_i M_i^T M_i. On the row side, A_i = M_i T,
        sum_i tr (Q + Q_i) A_i^T A_i <= KF_R(T S T) + sum_i KF_q(A_i^T A_i).
    Clipping would gain nothing here: T S T has L r eigenvalues or more at its level. On the column side
    M_i (I - T^2) M_i^T = B_i B_i^T with B_i = M_i W diag(1 - f^2)^{1/2}, thin.

    Rounding: A_i and B_i are off by E_i and F_i, ||E||, ||F|| <= e. Each side is a sum of ||Z_i B_i||^2 with projectors
    Z_i, so that its root moves by at most e.
    """
    L, (b, a), budget = view.layers, view.shape, choice.budget
    q, R = budget.private_rank, budget.pool_rank(L)
    w = choice.level

    def weights(found: Majorant) -> Tensor:
        f = torch.ones_like(found.theta)
        level = found.theta[w].clamp_min(0)
        f[:w] = (level / found.theta[:w].clamp_min(torch.finfo(level.dtype).tiny)).clamp_max(1).sqrt()
        return f

    def excess(found: Majorant) -> float:
        return found.ky_fan(R, weights(found)) - R * float(found.theta[w])

    majorant = view.spectra.common_majorant(w + 1, goal, excess)
    f = weights(majorant)
    W, f_W = majorant.V[:, :w], f[:w]
    own_rows, own_columns, thin = 0.0, 0.0, []
    for n, tile in enumerate(view.tiles(rows=b)):
        M = tile.values.double()
        MW = linalg.product(M, W)
        if q > 0:
            own_rows += _most_captured(M - (MW * (1 - f_W)) @ W.mT, q, goal / L, view, n, w)
        captured, Z = _clipped_thin(MW * (1 - f_W**2).clamp_min(0).sqrt(), q)
        own_columns += captured
        thin.append(Z)
    rows = _summed(view, own_rows) + majorant.ky_fan(R, f)
    columns = _summed(view, own_columns) + _ky_fan_of_square(_gathered(thin, view, w), R, view, goal)
    e = 20 * math.sqrt(w) * (a + b) * _EPS * math.sqrt(view.norm_squared)
    gram = 10 * math.sqrt(R + 1) * (L * w + b) * _EPS * view.norm_squared
    return view.norm_squared - (math.sqrt(rows) + e) ** 2 - (math.sqrt(columns) + e) ** 2 - gram


def _most_captured(A: Tensor, q: int, goal: float, view: LayerStack, n: int, w: int) -> float:
    """An upper bound on KF_q(A^T A), about `goal` above it, for layer n of those held."""
    generator = linalg.stream("rows", view.transposed, q, w, view.sharding.first + n)
    energy = float(torch.linalg.vector_norm(A)) ** 2
    if energy == 0:
        return 0.0
    size = 2.0 ** math.frexp(math.sqrt(energy / A.numel()))[1]
    failure = _SHARE / view.layers
    part = lanczos.leading_part(A / size, q, goal / energy, failure, generator, tolerance=math.inf)
    if part is None:
        S = linalg.singular_values(A)
        return float((S[:q] ** 2).sum()) * (1 + 100 * max(A.shape) * _EPS)
    return part.majorant.ky_fan(q) * size**2


def _clipped_thin(B: Tensor, q: int) -> tuple[float, Tensor]:
    """KF_q(B B^T), B (b, w), and Z (b, w) with Z Z^T = clip(B B^T)."""
    if q == 0:
        return 0.0, B
    values, X = linalg.symmetric_eigenpairs(B.mT @ B)
    values = values.clamp_min(0)
    following = values[-1 - q] if q < len(values) else values.new_zeros(())
    ratio = torch.where(values > following, following / torch.where(values > 0, values, 1), 1)
    return float(values[-q:].sum()), B @ (X * ratio.sqrt())


def _gathered(thin: list[Tensor], view: LayerStack, w: int) -> Tensor:
    """[Z_1 .. Z_L] (b, L w) of all layers, from those held."""
    local = torch.stack(thin) if thin else torch.empty(0, view.shape[0], w, dtype=torch.float64, device=view.device)
    return linalg.batched.beside(view.sharding.all_gather(local))


def _ky_fan_of_square(Z: Tensor, m: int, view: LayerStack, goal: float | None) -> float:
    """An upper bound on KF_m(Z Z^T), Z (b, n), about `goal` above it; without a goal an estimate from below."""
    if m == 0:
        return 0.0
    b, n = Z.shape
    if min(b, n) <= _DENSE:
        return float(linalg.ky_fan(Z.mT @ Z if n <= b else Z @ Z.mT, m))
    single, energy = Z.to(view.dtype), float((Z * Z).sum())

    def apply(X: Tensor) -> Tensor:
        Y = Z if X.dtype == torch.float64 else single
        return Y @ (Y.mT @ X)

    S = Operator(apply, b, energy, 1.1 * (b + n) * _EPS * energy, view.dtype, Z.device)
    generator = linalg.stream("thin", view.transposed, m, n, goal is None)
    if goal is None:
        V = linalg.leading_guess(S, m, _ESTIMATE * energy, generator).double()
        return float(linalg.largest_nonnegative(linalg.symmetric_eigenvalues(V.mT @ apply(V)), m))
    return linalg.majorant(S, m, goal, _SHARE, generator).ky_fan(m)
