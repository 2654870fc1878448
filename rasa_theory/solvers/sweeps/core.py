"""The core sweep: few passes over M, and sweeps on a small core, in bases that grow by what every pass shows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rasa_theory.linalg import batched, orthogonal
from rasa_theory.problem import LayerStack, RasaFactors
from rasa_theory.solvers.accuracy import largest_excess, layer_sizes, layer_term_norms, residual_noise, trusted_error
from rasa_theory.solvers.search import Multipliers
from rasa_theory.solvers.sweeps.accelerated import core_sweeps
from rasa_theory.solvers.sweeps.bases import Side, padded
from rasa_theory.solvers.sweeps.bounded import bounded_sweeps
from rasa_theory.solvers.updates import with_private_terms

_INNER = 20  # sweeps on the core after each pass, at most
_INNER_WHOLE = 8  # the same where the core is M itself, so that more sweeps save no pass


@dataclass
class CoreState:
    """Factors, the bases of their two sides, and the core K_i = U_i^T M_i V_i (L, n, m).

    The factors lie in the bases: B_S and B~_i in U_i, the rows of A_S and A~_i in V_i. `multipliers` keep terms inside
    the bound, from the first sweep on that went beyond it.
    """

    factors: RasaFactors
    columns: Side
    rows: Side
    K: Tensor
    multipliers: Multipliers | None = None

    def transpose(self) -> None:
        """Become the same state of the transposed stack."""
        self.factors, self.K = self.factors.transpose(), self.K.mT
        self.columns, self.rows = self.rows, self.columns


class CoreSweep:
    """Two passes over M, one per side, each followed by sweeps on the core.

    B_S and B~_i lie in the span of U_i (b, n), the rows of A_S and A~_i in that of V_i (a, m), orthonormal, so that
        ||M_i - X_i||^2 = ||M_i||^2 - ||K_i||^2 + ||K_i - U_i^T X_i V_i||^2,    K_i = U_i^T M_i V_i,
    and sweeps on the K_i cost no pass. A pass M_i^T U_i is used twice. It gives K_i. It also gives the directions in
    which the error falls outside V_i: sum_i E_i^T B_S D_i for the pool, and E_i^T B~_i for layer i alone. V_i takes
    them up, and then it is the turn of M_i V_i.

    Where a side has few dimensions its basis is the whole space from the beginning. If both are whole, K_i is M_i, and
    only the first sweep reads it.
    """

    # Joint sweeps are exact, yet each costs two passes and reduces the error linearly, so on large stacks all time goes
    # into reading M. Here a sweep costs the same two passes and does twenty sweeps' work. Fixed bases (say, of leading
    # singular vectors) would be cheaper still, but the optimum does not lie in them: they have to grow by the gradient,
    # as in a Krylov method. The bases depend on the past, so they are part of the state, and `begin` makes new ones.

    name: ClassVar[str] = "core"
    heats: ClassVar[tuple[int, int]] = (2, 6)

    def __init__(self, unit: LayerStack, max_cancellation: float = math.inf) -> None:
        self._unit = unit
        self._limits = max_cancellation * layer_sizes(unit)

    def begin(self, point: RasaFactors, error: float) -> CoreState:
        """New bases, for factors with private terms."""
        factors = with_private_terms(self._unit, point)
        columns = Side.of(self._unit, factors)
        rows = Side.of(self._unit.transpose(), factors.transpose())
        K = factors.mixing.new_zeros(factors.sharding.local_layers, columns.width, 0)
        return CoreState(factors, columns, rows, K)

    def point(self, state: CoreState) -> RasaFactors:
        return state.factors

    def __call__(self, state: CoreState, /) -> tuple[CoreState, float]:
        """The state after one sweep, and its squared error; `state` is used up."""
        error = self._half(self._unit, state)
        if not (state.columns.is_whole and state.rows.is_whole):
            state.transpose()
            error = self._half(self._unit.transpose(), state)
            state.transpose()
        return state, trusted_error(self._unit, state.factors, error)

    def _half(self, view: LayerStack, state: CoreState) -> float:
        """A pass M_i^T U_i, new directions for V_i, and sweeps on K_i: replaces all of `state`, returns the error."""
        factors = state.factors
        state.columns = state.columns.multiplied(view)
        Z = state.columns.Z
        if state.rows.is_whole:
            state.K = Z.mT
        else:
            state.rows, T = state.rows.cut_down(factors.transpose())
            if T is not None:
                state.K = state.K @ T
            common, own = gradient(Z, state.columns, factors, view.layer_norms())
            state.rows = state.rows.with_directions(common, own)
            state.K = state.rows.turned(torch.cat([state.K, Z.mT @ state.rows.fresh], 2))
        columns, rows = state.columns, state.rows
        start = RasaFactors(
            private_B=columns.U.mT @ factors.private_B,
            private_A=factors.private_A @ rows.U,
            shared_B=padded(columns.common.mT @ factors.shared_B, columns.width),
            shared_A=padded(rows.common.mT @ factors.shared_A.mT, rows.width).mT,
            mixing=factors.mixing,
            sharding=factors.sharding,
        )
        K = state.K.double()
        c, d = columns.common.shape[1], rows.common.shape[1]
        count = _INNER_WHOLE if columns.is_whole and rows.is_whole else _INNER
        inner, error = self._swept(K, start.to(torch.float64), (c, d), count, state)
        inner = inner.to(factors.mixing.dtype)
        state.factors = RasaFactors(
            private_B=columns.U @ inner.private_B,
            private_A=inner.private_A @ rows.U.mT,
            shared_B=columns.common @ inner.shared_B[:c],
            shared_A=inner.shared_A[:, :d] @ rows.common.mT,
            mixing=inner.mixing,
            sharding=factors.sharding,
        )
        inside = factors.sharding.all_reduce(batched.total((K * K).sum((1, 2))))
        return view.norm_squared - float(inside) + error

    def _swept(
        self, K: Tensor, start: RasaFactors, common: tuple[int, int], count: int, state: CoreState
    ) -> tuple[RasaFactors, float]:
        """The factors after at most `count` sweeps on the core, inside the bound, and their squared error there."""
        if state.multipliers is None:
            swept, error = core_sweeps(K, start, common, count)
            if largest_excess(swept, self._limits) <= 1:
                return swept, error
        swept, error, state.multipliers = bounded_sweeps(K, start, common, count, self._limits, state.multipliers)
        return swept, error


def gradient(Z: Tensor, columns: Side, factors: RasaFactors, layer_norms: Tensor) -> tuple[Tensor, Tensor]:
    """-1/2 of the gradient by A_S and A~_i: sum_i E_i^T B_S D_i (a, R), and E_i^T Q_i (L, a, q).

    Q_i is an orthonormal basis of B~_i. Z_i = M_i^T U_i, and the factors lie in the span of U_i. A column that is
    rounding noise, as all are at a start from singular vectors, would depend on the order of the sums. It is replaced
    by the product of the residual with a random vector of the span.
    """
    Bt, At, B_S, A_S, D = factors.named().values()
    sharding, R = factors.sharding, B_S.shape[1]

    def residual_products(X: Tensor) -> Tensor:
        """E_i^T X_i: (L, b, R + q) -> (L, a, R + q)."""
        E: Tensor = Z @ (columns.U.mT @ X) - At.mT @ (Bt.mT @ X) - (A_S.mT * D[:, None]) @ (B_S.mT @ X)
        return E

    Q = orthogonal.orthonormal_columns(Bt)
    E = residual_products(torch.cat([B_S.expand(len(Q), -1, -1), Q], 2))
    noise = math.sqrt(A_S.shape[1]) * residual_noise(layer_norms + layer_term_norms(factors), factors)
    shared, level = sharding.all_reduce_together(
        batched.weighted(E[:, :, :R], D), batched.total(noise[:, None] * D.abs())
    )
    own = E[:, :, R:]
    is_noise = torch.linalg.vector_norm(shared, dim=-2) <= level
    is_noise_own = torch.linalg.vector_norm(own, dim=-2) <= noise[:, None]
    anywhere = sharding.all_reduce_max((is_noise_own.any() | is_noise.any()).to(D.dtype).reshape(1))
    if anywhere > 0:
        probes = orthogonal.random_columns(B_S.new_empty(len(B_S), R + own.shape[2]), R)
        E = residual_products(columns.U @ (columns.U.mT @ probes))
        shared = torch.where(is_noise, sharding.all_reduce(batched.weighted(E[:, :, :R], D)), shared)
        own = torch.where(is_noise_own.unsqueeze(-2), E[:, :, R:], own)
    return shared, own
