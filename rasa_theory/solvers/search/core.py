"""The small core that a search works on: the directions of some factors, and what the layers share beside these."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rasa_theory import linalg
from rasa_theory.linalg import batched, orthogonal
from rasa_theory.problem import LayerStack, RasaFactors

_SMALL = 96  # a side of at most this many dimensions is searched whole
_BLOCKS = 4  # of Krylov spaces for approximate leading directions
_BESIDE = 16  # the least number of directions beside those of the factors; else half as many as these have


@dataclass(frozen=True)
class SearchCore:
    """K_i = U^T M_i V (L, n, m) of all layers, in float64, with U (b, n) and V (a, m) orthonormal and common to all."""

    # Hidden in the layers may be terms that all of them could share, each too small to be among the leading ones of its
    # layer. So the bases hold, beside the directions of the factors, the leading eigenvectors of sum_i E_i E_i^T, where
    # E_i is what the factors leave of M_i. Of three dyads hidden at 0.55 sigma_9 in bundled updates a search finds all
    # three in these bases, and none in bases of equal size that hold the leading directions of each layer alone.

    K: Tensor
    U: Tensor
    V: Tensor

    @classmethod
    def at(cls, unit: LayerStack, factors: RasaFactors) -> SearchCore:
        """The core at these factors, all in units of the stack's scale; the same in all processes."""
        U = _basis(unit, factors)
        V = _basis(unit.transpose(), factors.transpose())
        products = unit.right(V.to(unit.dtype)).double()  # M_i V
        return cls(unit.sharding.all_gather(U.mT @ products), U, V)

    @property
    def is_whole(self) -> bool:
        """True if the core is all of M."""
        return all(len(W) == W.shape[1] for W in (self.U, self.V))

    def lifted(self, factors: RasaFactors, unit: LayerStack) -> RasaFactors:
        """The factors of the stack with these factors of the core."""
        Bt, At, B, A, D = factors.named().values()
        whole = RasaFactors(self.U @ Bt, At @ self.V.mT, self.U @ B, A @ self.V.mT, D)
        return whole.to(unit.dtype, unit.device).sharded(unit.sharding)

    def projected(self, factors: RasaFactors) -> RasaFactors:
        """The part of factors of the stack that lies in the core."""
        Bt, At, B, A, D = factors.gathered().to(self.K.dtype, self.K.device).named().values()
        return RasaFactors(self.U.mT @ Bt, At @ self.V, self.U.mT @ B, A @ self.V, D)


def core_side(side: int, terms: int) -> int:
    """The number of rows of a core of layers with `side` rows, at factors of so many rank-one terms in all."""
    if side <= _SMALL:
        return side
    held = min(terms, side - _BESIDE)
    return held + _beside(held, side)


def _beside(held: int, side: int) -> int:
    """The number of directions beside those of the factors."""
    return min(max(_BESIDE, held // 2), side - held)


def _basis(unit: LayerStack, factors: RasaFactors) -> Tensor:
    """Orthonormal columns (b, n) for the B side, in float64."""
    b, sharding = unit.shape[0], unit.sharding
    exact = factors.to(torch.float64)
    if b <= _SMALL:
        return torch.eye(b, dtype=torch.float64, device=unit.device)
    columns = torch.cat([batched.beside(sharding.all_gather(exact.private_B)), exact.shared_B], 1)
    Q = orthogonal.orthonormal_columns(columns[:, columns.any(0)][:, : b - _BESIDE])
    more = _beside(Q.shape[1], b)
    if unit.spectra.is_leading:
        return torch.cat([Q, orthogonal.orthonormal_beside(Q, _leading_of_rest(unit, factors, Q, more))], 1)
    rest = (orthogonal.outside(Q, tile.values.double() - exact.update(tile.layer)) for tile in unit.tiles(rows=b))
    gram = sharding.sum_in_order(Q.new_zeros(b, b), (E_i @ E_i.mT for E_i in rest))
    shared = linalg.symmetric_eigenpairs(gram)[1][:, -more:].flip(1)
    return torch.cat([Q, orthogonal.orthonormal_beside(Q, shared)], 1)


def _leading_of_rest(unit: LayerStack, factors: RasaFactors, Q: Tensor, count: int) -> Tensor:
    """About the leading eigenvectors of sum_i E_i E_i^T outside Q, from products: (b, count) in float64."""
    held = factors.to(unit.dtype).as_lora()

    def apply(X: Tensor) -> Tensor:
        W = Q.to(X)
        X = orthogonal.outside(W, X)
        Y = unit.left(X) - held.A.mT @ (held.B.mT @ X)
        products = unit.right(Y) - held.B @ (held.A @ Y)
        return orthogonal.outside(W, unit.sharding.sum_in_order(torch.zeros_like(X), iter(products)))

    S = linalg.Operator(apply, unit.shape[0], unit.norm_squared, 0.0, unit.dtype, unit.device)
    generator = torch.Generator().manual_seed(0)
    return linalg.leading_guess(S, count, 0.0, generator, _BLOCKS)[:, :count].double()
