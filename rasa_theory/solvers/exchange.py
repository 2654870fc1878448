"""Exchanges: pool terms that are worth little are given up for rank-one terms d x b x a of the residual tensor.

Sweeps move every term a little and find the nearest minimum; a term that all layers could share, but that no pool term
is near, is found by exchanges alone.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from rasa_theory.linalg import orthogonal
from rasa_theory.problem import LayerStack, RankBudget, RasaFactors, layer_losses, projected

_ALL_SIGNS, _SOME_SIGNS = 6, 32  # up to so many layers all sign patterns are tried, of more layers so many
_POWER_STEPS = 12
_TERMS = 4  # exchanged at once, at most
_WORTH = 0.8


class Terms(NamedTuple):
    """Rank-one terms d_ij b_j a_j^T, falling in size: B (n, m) and A (p, m) with unit columns, D (L, m)."""

    B: Tensor
    A: Tensor
    D: Tensor


class Exchanges:
    """Looks for terms in the residual, compressed to the leading 2 r singular directions of every layer.

    U (b, c) and V (a, c), orthonormal, are common to all layers, and K_i = U^T M_i V: no number of exchanges costs a
    pass over M. In float64. With several processes, each has the K_i of all layers, and makes the same exchanges.
    """

    def __init__(self, unit: LayerStack, budget: RankBudget, seed: int) -> None:
        svd, m, gathered = unit.spectra.svd(), min(2 * budget.rank, *unit.shape), unit.sharding.all_gather
        self._U, self._V = (
            orthogonal.orthonormal_columns(_side_by_side(gathered(X[:, :, :m]))) for X in (svd.U, svd.Vh.mT)
        )
        self._K = gathered(projected(svd, self._U, self._V))
        self._patterns = sign_patterns(unit.layers, seed).to(self._K)

    def exchanged(self, factors: RasaFactors) -> RasaFactors | None:
        """Other factors from which sweeps may end lower, or None if nothing promises that.

        The largest new terms take the place of the pool terms that are missed least, as long as a new one gains more
        than is lost; if not even the first does, it alone if it gains 0.8 of that, since sweeps adapt the others to a
        new term, and have already adapted them to the old one. Private terms take up what they can of the old ones.
        """
        f = factors.to(torch.float64).gathered()
        Bt, At, B_S, A_S, D = f.named().values()
        if B_S.shape[1] == 0:
            return None
        lost, order = losses(f).sort()
        E = self._K - (self._U.mT @ Bt) @ (At @ self._V) - ((self._U.mT @ B_S) * D[:, None]) @ (A_S @ self._V)
        new = leading_terms(E, self._patterns, min(len(lost), _TERMS))
        gained = (new.D**2).sum(0)
        n = int((gained > lost[: len(gained)]).cumprod(0).sum()) or int(gained[0] > _WORTH * lost[0])
        if n == 0:
            return None
        out, kept = order[:n], order[n:]
        private_B, private_A = orthogonal.truncated_product(
            torch.cat([Bt, B_S[:, out] * D[:, None, out]], 2),
            torch.cat([At, A_S[out].expand(len(At), -1, -1)], 1),
            Bt.shape[2],
        )
        return (
            RasaFactors(
                private_B,
                private_A,
                torch.cat([B_S[:, kept], self._U @ new.B[:, :n]], 1),
                torch.cat([A_S[kept], (self._V @ new.A[:, :n]).mT]),
                torch.cat([D[:, kept], new.D[:, :n]], 1),
            )
            .to(factors.mixing.dtype)
            .sharded(factors.sharding)
        )


def losses(factors: RasaFactors) -> Tensor:
    """What leaving out a pool term costs at most, squared, (R,): the sum over layers of `layer_losses`."""
    return layer_losses(factors).sum(0)


def leading_terms(E: Tensor, patterns: Tensor, count: int) -> Terms:
    """`count` rank-one terms of the tensor E (L, n, p), each about the largest of what those before leave.

    By the higher-order power method: b <- sum_i d_i E_i a, a <- sum_i d_i E_i^T b, d_i <- b^T E_i a, from every pattern
    d (m, L). |d|^2 is what a term takes off ||E||^2.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(len(patterns), E.shape[2], generator=generator, dtype=torch.float64).to(E)
    found = []
    for _ in range(count):
        d, a = patterns, start
        for step in range(2 * _POWER_STEPS):
            b = orthogonal.unit_columns(torch.einsum("ml,lnm->nm", d, E @ a.mT)).mT
            a = orthogonal.unit_columns(torch.einsum("ml,lpm->pm", d, E.mT @ b.mT)).mT
            if step >= _POWER_STEPS:  # before, b and a approach the leading singular vectors of sum_i d_i E_i
                d = torch.einsum("mn,lnm->ml", b, E @ a.mT)
        best = int((d**2).sum(1).argmax())
        found.append((b[best], a[best], d[best]))
        E = E - d[best][:, None, None] * torch.outer(b[best], a[best])
    terms = Terms(*(torch.stack(parts, 1) for parts in zip(*found, strict=True)))
    order = (terms.D**2).sum(0).argsort(descending=True)
    return Terms(*(part[:, order] for part in terms))


def sign_patterns(layers: int, seed: int) -> Tensor:
    """Weights of the layers, (m, L): each layer alone, and signs, up to a common one all of them or 32 random ones."""
    if layers <= _ALL_SIGNS:
        signs = torch.tensor([(1.0, *others) for others in itertools.product((1.0, -1.0), repeat=layers - 1)])
    else:
        signs = torch.randn(_SOME_SIGNS, layers, generator=torch.Generator().manual_seed(seed)).sign()
    return torch.cat([torch.eye(layers), signs]).double()


def _side_by_side(X: Tensor) -> Tensor:
    """(L, n, m) -> (n, m L), the first columns of all layers first; at most n columns."""
    return X.permute(1, 2, 0).reshape(X.shape[1], -1)[:, : X.shape[1]]
