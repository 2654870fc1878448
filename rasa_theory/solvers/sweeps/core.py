"""Few passes over M: sweeps on a small core, in bases that grow by what every pass shows.

B_S and B~_i lie in the span of U_i (b, n), the rows of A_S and A~_i in that of V_i (a, m), orthonormal, so that
    ||M_i - X_i||^2 = ||M_i||^2 - ||K_i||^2 + ||K_i - U_i^T X_i V_i||^2,    K_i = U_i^T M_i V_i,
and sweeps on the K_i cost no pass. A pass M_i^T U_i (or M_i V_i) is used twice: for K_i, and for the directions in
which the error falls outside the other side's basis, sum_i E_i^T B_S D_i for the pool and E_i^T B~_i for layer i alone.
The other side takes them up, and it is its turn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rasa_theory.linalg import batched, orthogonal
from rasa_theory.problem import LayerStack, RasaFactors, subspaces
from rasa_theory.solvers.accuracy import layer_term_norms, residual_noise, trusted_error
from rasa_theory.solvers.sweeps.accelerated import core_sweeps

_ROUNDS = 12  # new directions of so many rounds are kept at most
_EARLIER = 2  # where a basis is cut down, it keeps the factors of so many rounds before
_INNER, _WHOLE = 20, 8  # sweeps on the core after each pass; where it is M itself, and no pass is saved by more


class CoreSweep:
    """Two passes over M, one per side, each followed by sweeps on the core: one sweep, as `Descent` wants it.

    Its bases go on from the factors that it returned last; other ones begin anew. Where a side has so few dimensions
    that its basis would be the whole space, it is: if both are, K is M, and only the first sweep reads it.
    """

    def __init__(self, unit: LayerStack) -> None:
        self._unit = unit
        self._last: RasaFactors | None = None  # what the bases and K belong to

    def __call__(self, factors: RasaFactors) -> tuple[RasaFactors, float]:
        """The factors after one sweep, and their squared error, from the products."""
        if factors is not self._last:
            self._columns, self._rows = (
                _Side.of(self._unit, factors),
                _Side.of(self._unit.transpose(), factors.transpose()),
            )
            self._K = factors.mixing.new_zeros(factors.sharding.local_layers, self._columns.width, 0)
        factors, error = self._half(self._unit, self._columns, self._rows, factors)
        if not (self._columns.is_whole and self._rows.is_whole):
            self._K = self._K.mT
            factors, error = self._half(self._unit.transpose(), self._rows, self._columns, factors.transpose())
            factors, self._K = factors.transpose(), self._K.mT
        self._last = factors
        return self._last, trusted_error(self._unit, self._last, error)

    def _half(self, view: LayerStack, known: _Side, grown: _Side, factors: RasaFactors) -> tuple[RasaFactors, float]:
        """A pass M_i^T U_i, new directions for V_i, and sweeps on K_i = U_i^T M_i V_i."""
        Z = known.product(view)
        if grown.is_whole:
            self._K = Z.mT
        else:
            if (T := grown.make_room(factors.transpose())) is not None:
                self._K = self._K @ T
            grown.take_up(*_directions(Z, known, factors, view.layer_norms()))
            self._K = grown.turned(torch.cat([self._K, Z.mT @ grown.fresh], 2))
        start = RasaFactors(
            private_B=known.U.mT @ factors.private_B,
            private_A=factors.private_A @ grown.U,
            shared_B=_padded(known.common.mT @ factors.shared_B, known.width),
            shared_A=_padded(grown.common.mT @ factors.shared_A.mT, grown.width).mT,
            mixing=factors.mixing,
            sharding=factors.sharding,
        )
        K = self._K.double()
        common = known.common.shape[1], grown.common.shape[1]
        count = _WHOLE if known.is_whole and grown.is_whole else _INNER
        found, error = core_sweeps(K, start.to(torch.float64), common, count)
        found = found.to(factors.mixing.dtype)
        moved = RasaFactors(
            private_B=known.U @ found.private_B,
            private_A=found.private_A @ grown.U.mT,
            shared_B=known.common @ found.shared_B[: common[0]],
            shared_A=found.shared_A[:, : common[1]] @ grown.common.mT,
            mixing=found.mixing,
            sharding=factors.sharding,
        )
        inside = factors.sharding.all_reduce(batched.total((K * K).sum((1, 2))))
        return moved, view.norm_squared - float(inside) + error


@dataclass
class _Side:
    """The basis of one side: U_i = [common, own_i] (L, b, n), orthonormal.

    B_S stays in the span of `common` (b, c), so that the pool has the leading c coordinates in all layers. `fresh` are
    directions that M_i has not been multiplied with; Z_i (L, a, ..) is M_i^T times the basis of before, which has to be
    turned into the one of now when they have been (`turn`: from which column on, and W_i (m, m), orthogonal; own_i
    makes room for new directions of `common`). `earlier` holds the factors of the last rounds.
    """

    U: Tensor
    common: Tensor
    Z: Tensor
    fresh: Tensor
    turn: tuple[int, Tensor] | None
    earlier: list[RasaFactors]

    @classmethod
    def of(cls, view: LayerStack, factors: RasaFactors) -> _Side:
        """The span of B_S and, as far as it fits, of all B~_i, common to all layers; or all of R^b, if it is small."""
        (b, a), L = view.shape, factors.sharding.local_layers
        zeros = factors.mixing.new_zeros
        if _limit(factors) >= b:
            eye = torch.eye(b, dtype=factors.mixing.dtype, device=factors.mixing.device)
            return cls(eye.expand(L, b, b), eye, zeros(L, a, 0), eye.expand(L, b, b), None, [])
        side = cls(zeros(L, b, 0), zeros(b, 0), zeros(L, a, 0), zeros(L, b, 0), None, [])
        common = private_of_all(factors)
        complete = common.shape[1] == view.layers * factors.private_B.shape[2]
        own = factors.private_B[:, :, :0] if complete else factors.private_B
        side.take_up(torch.cat([factors.shared_B, common], 1), own)
        return side

    @property
    def width(self) -> int:
        """n."""
        return int(self.U.shape[2])

    @property
    def is_whole(self) -> bool:
        """Whether U_i spans R^b."""
        return self.width == self.U.shape[1]

    def product(self, view: LayerStack) -> Tensor:
        """Z_i = M_i^T U_i (L, a, n): a pass, if there are directions that have not been multiplied yet."""
        if self.fresh.shape[2] > 0:
            self.Z = self.turned(torch.cat([self.Z, view.left(self.fresh)], 2))
            self.fresh, self.turn = self.fresh[:, :, :0], None
        return self.Z

    def turned(self, X: Tensor) -> Tensor:
        """X_i (L, .., n), whose columns belong to the basis of before and then to `fresh`, for the basis of now."""
        if self.turn is None:
            return X
        c, W = self.turn
        rest = c + W.shape[1]
        return torch.cat([X[:, :, :c], X[:, :, c:rest] @ W, X[:, :, rest:]], 2)

    def make_room(self, factors: RasaFactors) -> Tensor | None:
        """Cut the basis down, if it is as wide as it may be. Returns T (L, n, n') then: U <- U T."""
        limit, more = _limit(factors), _ranks(factors)
        T = self._keep(factors, max(2 * limit // 3, 2 * more)) if self.width + more > limit else None
        self.earlier = [factors, *self.earlier][:_EARLIER]
        return T

    def take_up(self, common: Tensor, own: Tensor) -> None:
        """Add directions (b, R) that B_S may use in all layers, and (L, b, q) of B~_i."""
        L, c = len(self.U), self.common.shape[1]
        common = orthogonal.orthonormal_beside(self.common, common)
        R = common.shape[1]
        self.fresh = orthogonal.orthonormal_beside(self.U, torch.cat([common.expand(L, -1, -1), own], 2))
        both = torch.cat([self.fresh[:, :, :R], self.U[:, :, c:]], 2)  # contains `common`; what is left is own
        inside = both.mT @ common
        left = orthogonal.complement(inside)
        self.turn = c, torch.cat([inside, left], 2).roll(-R, 1)  # the basis has own before fresh
        self.common = torch.cat([self.common, common], 1)
        self.U = torch.cat([self.common.expand(L, -1, -1), both @ left, self.fresh[:, :, R:]], 2)
        if self.Z.shape[2] == 0:  # nothing has been multiplied yet
            self.fresh, self.turn = self.U, None

    def _keep(self, factors: RasaFactors, width: int) -> Tensor:
        """The span of the factors, of earlier ones and of the latest directions, `width` dimensions in all."""
        eye = torch.eye(self.width, dtype=self.U.dtype, device=self.U.device)
        c, R, q = self.common.shape[1], factors.shared_B.shape[1], factors.private_B.shape[2]
        shared = (factors.shared_B, private_of_all(factors), *(f.shared_B for f in self.earlier))
        latest = eye[:c, :c].flip(1)
        pool = orthogonal.orthonormal_columns(torch.cat([*(self.common.mT @ X for X in shared), latest], 1))
        pool = pool[:, : min(max(width * c // self.width, R), width - q)]
        private = [self.U.mT @ f.private_B for f in (factors, *self.earlier)]
        latest = eye[:, c:].flip(1).expand(len(self.U), -1, -1)
        kept = _padded(pool, self.width).expand(len(self.U), -1, -1)
        T = orthogonal.completed(kept, torch.cat([*private, latest], 2))[:, :, :width]
        self.U, self.Z, self.common = self.U @ T, self.Z @ T, self.common @ pool
        return T


def _limit(factors: RasaFactors) -> int:
    """How wide the basis of the B side, b dimensions, may become: half of them, if 3 (R + q) are not more."""
    begun = factors.shared_B.shape[1] + _private_in_common(factors)
    return max(3 * _ranks(factors), min(len(factors.shared_B) // 2, begun + _ROUNDS * _ranks(factors)))


def _private_in_common(factors: RasaFactors) -> int:
    """How many private directions the common basis begins with: all L q, but at most b / 8."""
    _, b, q = factors.private_B.shape
    return min(factors.layers * q, b // 8)


def _ranks(factors: RasaFactors) -> int:
    """R + q."""
    return factors.shared_B.shape[1] + factors.private_B.shape[2]


def private_of_all(factors: RasaFactors) -> Tensor:
    """An orthonormal basis of all B~_i, (b, L q); its leading part by ||d_i|| ||B~_i||, if they are more than b / 8.

    The pool wants them: where no minimum is attained, a pool term grows along a private one of its owner and cancels
    against it, and what is left is their difference quotient. Without these directions in the pool's common basis a
    term would have to find them in small steps, one a pass.
    """
    _, b, q = factors.private_B.shape
    if factors.shared_B.shape[1] == 0 or q == 0:
        return factors.private_B.new_zeros(b, 0)
    count = _private_in_common(factors)
    if count == factors.layers * q:
        return orthogonal.orthonormal_columns(batched.beside(factors.sharding.all_gather(factors.private_B)))
    weighted = factors.private_B * torch.linalg.vector_norm(factors.mixing, dim=1)[:, None, None]
    return orthogonal.orthonormal_columns(subspaces.mean_projector(factors.sharding.all_gather(weighted))[1][:, :count])


def _padded(coordinates: Tensor, n: int) -> Tensor:
    return torch.nn.functional.pad(coordinates, (0, 0, 0, n - len(coordinates)))


def _directions(Z: Tensor, known: _Side, factors: RasaFactors, layer_norms: Tensor) -> tuple[Tensor, Tensor]:
    """-1/2 of the gradient: sum_i E_i^T B_S D_i (a, R), and E_i^T Q_i (L, a, q), Q_i an orthonormal basis of B~_i.

    Z_i = M_i^T U_i, and the factors lie in the span of U_i. A column that is rounding noise, as all are of a start from
    singular vectors, would be another with every order of the sums: in its place comes what the residual makes of a
    random vector of the span.
    """
    Bt, At, B_S, A_S, D = factors.named().values()
    sharding, R = factors.sharding, B_S.shape[1]

    def seen(both: Tensor) -> Tensor:
        """E_i^T of (L, b, R + q): (L, a, R + q)."""
        E: Tensor = Z @ (known.U.mT @ both) - At.mT @ (Bt.mT @ both) - (A_S.mT * D[:, None]) @ (B_S.mT @ both)
        return E

    Q = orthogonal.orthonormal_columns(Bt)
    E = seen(torch.cat([B_S.expand(len(Q), -1, -1), Q], 2))
    noise = math.sqrt(A_S.shape[1]) * residual_noise(layer_norms + layer_term_norms(factors), factors)
    shared, level = sharding.all_reduce_together(
        batched.weighted(E[:, :, :R], D), batched.total(noise[:, None] * D.abs())
    )
    own = E[:, :, R:]
    vague, vague_own = (torch.linalg.vector_norm(X, dim=-2) <= n for X, n in ((shared, level), (own, noise[:, None])))
    anywhere = sharding.all_reduce_max((vague_own.any() | vague.any()).to(D.dtype).reshape(1))
    if anywhere > 0:
        probes = orthogonal.random_columns(B_S.new_empty(len(B_S), R + own.shape[2]), R)
        E = seen(known.U @ (known.U.mT @ probes))
        shared = torch.where(vague, sharding.all_reduce(batched.weighted(E[:, :, :R], D)), shared)
        own = torch.where(vague_own.unsqueeze(-2), E[:, :, R:], own)
    return shared, own
