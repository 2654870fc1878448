"""The basis of one side of a core sweep: how it begins, grows and is cut down."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from rasa_theory.linalg import batched, orthogonal
from rasa_theory.problem import LayerStack, RasaFactors, mean_projector

_ROUNDS = 12  # a basis holds the new directions of at most this many rounds
_EARLIER = 2  # where a basis is cut down, it keeps the factors of this many earlier rounds


@dataclass(frozen=True)
class Side:
    """The basis of one side: U_i = [common, own_i] (L, b, n), orthonormal.

    `common` (b, c) spans B_S, so that the pool has the leading c coordinates in all layers. Z_i (L, a, ..) is M_i^T
    times the basis before the last growth. `fresh` are the directions that M_i has not been multiplied with. `earlier`
    holds the factors of the last rounds.
    """

    # A side would be a plain orthonormal basis, if it were not for two wishes.
    #
    # 1. The pool's columns are the same vectors in all layers, so their coordinates must be the same too. Hence
    #    `common` comes first in every U_i, and B_S never leaves it. New common directions are not orthogonal to own_i.
    #    So a growing basis turns own_i: [new, own_i] holds the new common directions, and its part beside them becomes
    #    the new own_i.
    # 2. M_i must be multiplied with new directions only, since that is the pass over M. Z_i, which belongs to the basis
    #    before, is brought up to date by the same turn W_i: see `Turn` and `turned`.
    #
    # The width is limited, since work on the core grows with it. A basis that is full is cut down to two thirds; it
    # keeps the factors of this round and of two before, and the latest directions. The constants were chosen by trial.

    U: Tensor
    common: Tensor
    Z: Tensor
    fresh: Tensor
    turn: Turn | None
    earlier: tuple[RasaFactors, ...]

    @classmethod
    def of(cls, view: LayerStack, factors: RasaFactors) -> Side:
        """The span of B_S and, as far as it fits, of all B~_i, common to all layers; or all of R^b, if it is small."""
        b, a = view.shape
        L = factors.sharding.local_layers
        zeros = factors.mixing.new_zeros
        if _limit(factors) >= b:
            eye = torch.eye(b, dtype=factors.mixing.dtype, device=factors.mixing.device)
            return cls(eye.expand(L, b, b), eye, zeros(L, a, 0), eye.expand(L, b, b), None, ())
        nothing = cls(zeros(L, b, 0), zeros(b, 0), zeros(L, a, 0), zeros(L, b, 0), None, ())
        common = private_of_all(factors)
        is_complete = common.shape[1] == view.layers * factors.private_B.shape[2]
        own = factors.private_B[:, :, :0] if is_complete else factors.private_B
        return nothing.with_directions(torch.cat([factors.shared_B, common], 1), own)

    @property
    def width(self) -> int:
        """n, the dimension of the span of U_i."""
        return int(self.U.shape[2])

    @property
    def is_whole(self) -> bool:
        """True if U_i spans R^b."""
        return self.width == self.U.shape[1]

    def multiplied(self, view: LayerStack) -> Side:
        """The same basis with Z_i = M_i^T U_i (L, a, n): a pass, if there are directions not multiplied yet."""
        if self.fresh.shape[2] == 0:
            return self
        Z = self.turned(torch.cat([self.Z, view.left(self.fresh)], 2))
        return dataclasses.replace(self, Z=Z, fresh=self.fresh[:, :, :0], turn=None)

    def turned(self, X: Tensor) -> Tensor:
        """X_i (L, .., n), whose columns belong to the basis before the last growth and then to `fresh`, for U_i."""
        return X if self.turn is None else self.turn.applied(X)

    def with_directions(self, common: Tensor, own: Tensor) -> Side:
        """A basis with more directions: (b, R) that B_S may use in all layers, and (L, b, q) for B~_i."""
        L, c = len(self.U), self.common.shape[1]
        common = orthogonal.orthonormal_beside(self.common, common)
        R = common.shape[1]
        fresh = orthogonal.orthonormal_beside(self.U, torch.cat([common.expand(L, -1, -1), own], 2))
        both = torch.cat([fresh[:, :, :R], self.U[:, :, c:]], 2)  # contains `common`; the rest is own
        inside = both.mT @ common
        rest = orthogonal.complement(inside)
        all_common = torch.cat([self.common, common], 1)
        U = torch.cat([all_common.expand(L, -1, -1), both @ rest, fresh[:, :, R:]], 2)
        if self.Z.shape[2] == 0:  # nothing has been multiplied yet
            return dataclasses.replace(self, U=U, common=all_common, fresh=U)
        turn = Turn(c, torch.cat([inside, rest], 2).roll(-R, 1))  # the basis has own before fresh
        return dataclasses.replace(self, U=U, common=all_common, fresh=fresh, turn=turn)

    def cut_down(self, factors: RasaFactors) -> tuple[Side, Tensor | None]:
        """The basis with room for the directions of one round, and T (L, n, n') with U T the new one.

        T is None if there was room. The factors are noted as those of this round.
        """
        limit, more = _limit(factors), _ranks(factors)
        T: Tensor | None = None
        side = self
        if self.width + more > limit:
            side, T = self.restricted(factors, max(2 * limit // 3, 2 * more))
        return dataclasses.replace(side, earlier=(factors, *self.earlier)[:_EARLIER]), T

    def restricted(self, factors: RasaFactors, width: int) -> tuple[Side, Tensor]:
        """The span of the factors, of earlier ones and of the latest directions, `width` dimensions in all; and T."""
        eye = torch.eye(self.width, dtype=self.U.dtype, device=self.U.device)
        c, R, q = self.common.shape[1], factors.shared_B.shape[1], factors.private_B.shape[2]
        shared = (factors.shared_B, private_of_all(factors), *(f.shared_B for f in self.earlier))
        latest_common = eye[:c, :c].flip(1)
        pool = orthogonal.orthonormal_columns(torch.cat([*(self.common.mT @ X for X in shared), latest_common], 1))
        pool = pool[:, : min(max(width * c // self.width, R), width - q)]
        private = [self.U.mT @ f.private_B for f in (factors, *self.earlier)]
        latest_own = eye[:, c:].flip(1).expand(len(self.U), -1, -1)
        first = padded(pool, self.width).expand(len(self.U), -1, -1)
        T = orthogonal.completed(first, torch.cat([*private, latest_own], 2))[:, :, :width]
        return dataclasses.replace(self, U=self.U @ T, Z=self.Z @ T, common=self.common @ pool), T


@dataclass(frozen=True)
class Turn:
    """The change of a basis when it grows: its columns from `first` on are multiplied by W_i (m, m), orthogonal."""

    first: int
    W: Tensor

    def applied(self, X: Tensor) -> Tensor:
        """X_i (L, .., n) with columns first .. first + m - 1 multiplied by W_i."""
        last = self.first + self.W.shape[1]
        return torch.cat([X[:, :, : self.first], X[:, :, self.first : last] @ self.W, X[:, :, last:]], 2)


def _limit(factors: RasaFactors) -> int:
    """The largest width of the basis of the B side, b dimensions: half of them, unless 3 (R + q) are more."""
    at_start = factors.shared_B.shape[1] + _private_in_common(factors)
    return max(3 * _ranks(factors), min(len(factors.shared_B) // 2, at_start + _ROUNDS * _ranks(factors)))


def _private_in_common(factors: RasaFactors) -> int:
    """The number of private directions that the common basis begins with: all L q, but at most b / 8."""
    _, b, q = factors.private_B.shape
    return min(factors.layers * q, b // 8)


def _ranks(factors: RasaFactors) -> int:
    """R + q."""
    return factors.shared_B.shape[1] + factors.private_B.shape[2]


def private_of_all(factors: RasaFactors) -> Tensor:
    """An orthonormal basis of all B~_i, (b, L q), or its leading part by ||d_i|| ||B~_i||, if L q is above b / 8.

    The pool needs them. Where no minimum is attained, a pool term grows along a private one of its owner and cancels
    against it, and their difference quotient remains. Without these directions in the pool's common basis a term would
    have to find them in small steps, one a pass.
    """
    _, b, q = factors.private_B.shape
    if factors.shared_B.shape[1] == 0 or q == 0:
        return factors.private_B.new_zeros(b, 0)
    count = _private_in_common(factors)
    if count == factors.layers * q:
        return orthogonal.orthonormal_columns(batched.beside(factors.sharding.all_gather(factors.private_B)))
    weighted = factors.private_B * torch.linalg.vector_norm(factors.mixing, dim=1)[:, None, None]
    return orthogonal.orthonormal_columns(mean_projector(factors.sharding.all_gather(weighted))[1][:, :count])


def padded(coordinates: Tensor, n: int) -> Tensor:
    """(c, m) -> (n, m), zero rows below."""
    return torch.nn.functional.pad(coordinates, (0, 0, 0, n - len(coordinates)))
