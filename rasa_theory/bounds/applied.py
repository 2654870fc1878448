"""The dual and the two-sided floor of large layers: their formulas at a point, from products with M alone.

The formulas are those of `dual_value` and `two_sided_value`. There g_i is formed and decomposed. Here it is applied,
and a `Majorant` bounds each sum of its eigenvalues.

**The probability.** Each side of a point takes `FAILURE`. A search uses random numbers of other purposes, see
`linalg.stream`, so the bounds hold wherever it ends. A two-sided search evaluates five points at most, the dual ones
one each: 12 sides, 2.4e-11, beside the 6.4e-11 of `probable_floor`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rasa_theory import linalg
from rasa_theory.linalg import Operator, orthogonal
from rasa_theory.problem import LayerStack, RankBudget

FAILURE = 2e-12
"""The largest probability that the captured energy of one side at one point is above its bound."""
_GOAL = 1e-4  # of e_lora: by how much each sum of eigenvalues may exceed the exact value, see `linalg.majorant`
_LEAST_GOAL = 1e-5  # of ||M||^2, in place of e_lora
_NORM_ROUNDING = 1e-13  # of ||M||^2: more than the rounding of a sum of squares
_EPS = float(torch.finfo(torch.float64).eps)

Product = Callable[[int, Tensor, Tensor], Tensor]
"""A function (i, M_i (b, a), X (n, m)) -> g_i X, in the dtype of M_i and X."""
Sum = Callable[[Tensor], Tensor]
"""A function X (n, m) -> sum_i g_i X."""


@dataclass(frozen=True)
class Side:
    """Symmetric g_i (n, n), which are only applied, and Y_i = V F_i F_i^T V^T for `CapturedEnergy`.

    - name: of the point, for its random numbers.
    - times: g_i X.
    - summed: sum_i g_i X, by one pass.
    - sizes: upper bounds on ||g_i||_F.
    - V: (n, d), orthonormal to the rounding of one QR.
    - F: (L, d, p), in float64.
    - rounding: a computed product with g_i, or with the one that the proof asks for, is off by at most this times
      `sizes` and ||X||_F.
    """

    name: str
    times: Product
    summed: Sum
    sizes: list[float]
    V: Tensor
    F: Tensor
    rounding: float


def captured_energy(view: LayerStack, budget: RankBudget, side: Side) -> float:
    """An upper bound on KF_Lr(sum_i Y_i) + sum_i KF_q(g_i - Y_i) + KF_R(sum_i (g_i - Y_i)): `CapturedEnergy`.

    Rounding: Y_i X takes products of inner length n, d, p, d and d. ||V||^2 <= 1 + ||V^T V - I||_F.
    """
    L, q, R = view.layers, budget.private_rank, budget.pool_rank(view.layers)
    n, d = side.V.shape
    Y = side.F @ side.F.mT
    whole = Y.sum(0)
    thin = [float(y.trace()) for y in Y]
    deviation = _deviation(side.V)
    thin_error = 2 * (n + 4 * d) * _EPS + deviation
    norms = [size + 1.1 * y for size, y in zip(side.sizes, thin, strict=True)]
    errors = [side.rounding * size + thin_error * y for size, y in zip(side.sizes, thin, strict=True)]
    goal = _GOAL * max(view.spectra.tail_energy(budget.rank), _LEAST_GOAL * view.norm_squared)

    def less(products: Tensor, y: Tensor, X: Tensor) -> Tensor:
        V = side.V.to(X.dtype)
        return products - V @ (y.to(X.dtype) @ (V.mT @ X))

    def operator(apply: Sum, norm: float, error: float) -> Operator:
        return Operator(apply, n, norm, error, view.dtype, view.device)

    def rest_of_layer(i: int, M: Tensor) -> Sum:
        times = _of_layer(side.times, i, M)
        return lambda X: less(times(X), Y[i], X)

    def rest_of_all(X: Tensor) -> Tensor:
        return less(side.summed(X), whole, X)

    own = 0.0
    if q > 0:
        for i, tile in enumerate(view.tiles(rows=view.shape[0])):
            one = operator(rest_of_layer(i, tile.values), norms[i], errors[i])
            stream = linalg.stream(side.name, "own", view.transposed, i)
            own += linalg.majorant(one, q, goal / L, FAILURE / (2 * L), stream, tolerance=math.inf).ky_fan(q)
    pooled = 0.0
    if R > 0:
        stream = linalg.stream(side.name, "pooled", view.transposed)
        everything = operator(rest_of_all, math.fsum(norms), math.fsum(errors) + L * _EPS * math.fsum(norms))
        pooled = linalg.majorant(everything, R, goal, FAILURE / 2, stream, tolerance=math.inf).ky_fan(R)
    together = float(linalg.ky_fan(whole, L * budget.rank)) if Y.numel() else 0.0
    return own + pooled + together + (thin_error + 10 * d * _EPS) * math.fsum(thin)


def _deviation(V: Tensor) -> float:
    """An upper bound on ||V^T V - I||_F, its rounding included: (n, d)."""
    n, d = V.shape
    computed = torch.linalg.matrix_norm(V.mT @ V - torch.eye(d, dtype=V.dtype, device=V.device))
    return float(computed) + n * math.sqrt(d) * _EPS


def _of_layer(times: Product, i: int, M: Tensor) -> Sum:
    """X -> g_i X for one layer, whose values are converted once for each dtype."""
    values = {M.dtype: M}

    def apply(X: Tensor) -> Tensor:
        if X.dtype not in values:
            values[X.dtype] = M.to(X.dtype)
        return times(i, values[X.dtype], X)

    return apply


def _of_layers(view: LayerStack, times: Product) -> Sum:
    """X -> sum_i g_i X, whose layers are converted one after the other."""

    def apply(X: Tensor) -> Tensor:
        result = torch.zeros_like(X)
        for i, tile in enumerate(view.tiles(rows=view.shape[0])):
            result += times(i, tile.values.to(X.dtype), X)
        return result

    return apply


def applied_dual_value(view: LayerStack, budget: RankBudget, V: Tensor, F: Tensor) -> float:
    """`dual_value` at V F_i, V (b, d) orthonormal and F (L, d, p), from products; -inf if F is not finite."""
    if not bool(torch.isfinite(F).all()):
        return -math.inf

    def times(i: int, M: Tensor, X: Tensor) -> Tensor:
        return linalg.product(M, linalg.product(M.mT, X))

    summed = view.transpose().spectra.common_operator().apply  # its rows are converted while they are in the cache
    side = Side("dual", times, summed, view.layer_norms_squared, V, F, 1.1 * sum(view.shape) * _EPS)
    return view.norm_squared * (1 - _NORM_ROUNDING) - captured_energy(view, budget, side)


# ---- two sides


@dataclass(frozen=True)
class Capping:
    """T = I - W diag(c) W^T, W (a, w) orthonormal to rounding, c (w,) in [0, 1): symmetric, 0 < T <= I."""

    W: Tensor
    c: Tensor

    @classmethod
    def of(cls, view: LayerStack, index: int) -> Capping:
        """The T of `cappings` for this index, from leading Ritz pairs of sum_i M_i^T M_i."""
        values, W = view.spectra.common_pairs(min(index + 1, view.shape[1]))
        if index >= len(values) or not float(values[index]) > 0:
            return cls(W[:, :0], values[:0])
        W = orthogonal.thin_qr(W[:, :index])[0]
        return cls(W, 1 - (values[index] / values[:index].clamp_min(values[index])).sqrt())

    def times(self, X: Tensor) -> Tensor:
        """T X, (a, n) -> (a, n)."""
        W = self.W.to(X.dtype)
        return X - W @ (self.c.to(X.dtype)[:, None] * (W.mT @ X))


@dataclass(frozen=True)
class ThinDivision:
    """A point of the two-sided floor, as `Division` has it, of thin factors:

        U_i = A_i (s_i I + e_i V_a V_a^T) + V_b K_i,    A_i = M_i T.

    - T: the part of M_i that counts on both sides.
    - Vb, Va: orthonormal (b, d) and (a, d').
    - s: weights (L,) in (0, 1), s_i for U_i and 1 - s_i for V_i = A_i - U_i.
    - e: (L,) in [-1, 1].
    - K: (L, d, a).
    - F, H: (L, d, p) and (L, d', p), with Y_i = V_b F_i F_i^T V_b^T and Y'_i = V_a H_i H_i^T V_a^T.
    """

    T: Capping
    Vb: Tensor
    Va: Tensor
    s: Tensor
    e: Tensor
    K: Tensor
    F: Tensor
    H: Tensor

    def is_valid(self) -> bool:
        """Whether 0 < s_i < 1 and everything is finite."""
        tensors = (self.T.W, self.T.c, self.s, self.e, self.K, self.F, self.H)
        return all(bool(torch.isfinite(x).all()) for x in tensors) and bool(((self.s > 0) & (self.s < 1)).all())

    def part(self, i: int, of_rows: bool) -> _Part:
        """U_i or, `of_rows`, V_i."""
        s, e = float(self.s[i]), float(self.e[i])
        return _Part(self, 1 - s, -e, -self.K[i]) if of_rows else _Part(self, s, e, self.K[i])


@dataclass(frozen=True)
class _Part:
    """A_i (alpha I + beta V_a V_a^T) + V_b K, a part of A_i = M_i T."""

    division: ThinDivision
    alpha: float
    beta: float
    K: Tensor

    def _inner(self, X: Tensor) -> Tensor:
        """(alpha I + beta V_a V_a^T) X."""
        V = self.division.Va.to(X.dtype)
        return self.alpha * X + self.beta * V @ (V.mT @ X)

    def times(self, M: Tensor, X: Tensor) -> Tensor:
        """The part times X, (a, m) -> (b, m)."""
        thin = self.division.Vb.to(X.dtype) @ (self.K.to(X.dtype) @ X)
        return linalg.product(M, self.division.T.times(self._inner(X))) + thin

    def transposed_times(self, M: Tensor, X: Tensor) -> Tensor:
        """Its transpose times X, (b, m) -> (a, m)."""
        thin = self.K.to(X.dtype).mT @ (self.division.Vb.to(X.dtype).mT @ X)
        return self._inner(self.division.T.times(linalg.product(M.mT, X))) + thin


def applied_two_sided_value(view: LayerStack, budget: RankBudget, division: ThinDivision, stage: int) -> float:
    """`two_sided_value` at a division, from products; -inf if it is not valid.

    `stage` counts the points of a search, so that each has random numbers of its own.

    Rounding: a product with U_i or V_i takes inner lengths that add up to b + 3 a + w + 4 d at most, and there are two
    of them. The proof asks for orthonormal W. The nearest orthonormal matrix is off by ||W^T W - I||, T and
    B_i = M_i (I - T T^T)^{1/2} by twice that, relative to ||M_i||, and so are A_i and V_i. U_i may be anything.
    """
    if not division.is_valid():
        return -math.inf
    T, s = division.T, division.s
    B = _products(view, T.W * (T.c * (2 - T.c)).sqrt())  # (L, b, w), B_i B_i^T = M_i (I - T T^T) M_i^T

    def column_side(i: int, M: Tensor, X: Tensor) -> Tensor:
        part, Bi = division.part(i, of_rows=False), B[i].to(X.dtype)
        return Bi @ (Bi.mT @ X) + part.times(M, part.transposed_times(M, X)) / float(s[i])

    def row_side(i: int, M: Tensor, X: Tensor) -> Tensor:
        part = division.part(i, of_rows=True)
        return part.transposed_times(M, part.times(M, X)) / (1 - float(s[i]))

    norms = torch.tensor(view.layer_norms_squared, dtype=torch.float64, device=s.device).sqrt()
    sizes = (2 * norms + torch.linalg.matrix_norm(division.K)) ** 2  # at least ||U_i||^2 and ||V_i||^2
    lengths = sum(view.shape) + T.W.shape[1] + division.Vb.shape[1] + division.Va.shape[1]
    rounding = 8 * lengths * _EPS + 4 * _deviation(T.W)
    name = f"two-sided {stage}"

    def side(part: str, times: Product, sizes: Tensor, V: Tensor, F: Tensor) -> Side:
        return Side(f"{name} {part}", times, _of_layers(view, times), sizes.tolist(), V, F, rounding)

    columns = side("columns", column_side, norms**2 + sizes / s, division.Vb, division.F)
    rows = side("rows", row_side, sizes / (1 - s), division.Va, division.H)
    captured = sum(captured_energy(view, budget, side) for side in (columns, rows))
    return view.norm_squared * (1 - _NORM_ROUNDING) - captured


def _products(view: LayerStack, X: Tensor) -> Tensor:
    """M_i X in float64, (a, n) -> (L, b, n). One pass."""
    b = view.shape[0]
    return torch.stack([linalg.product(tile.values.double(), X) for tile in view.tiles(rows=b)])
