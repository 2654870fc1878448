"""Exchanges: pool terms that are worth little are given up for rank-one terms d x b x a of the residual tensor.

Sweeps move every term a little and find the nearest minimum. Only an exchange finds a term that all layers could share
but no pool term is near.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from rasa_theory.linalg import orthogonal
from rasa_theory.problem import LayerStack, RankBudget, RankOneTerms, RasaFactors, layer_losses, projected

# All constants were chosen by trial.
_ALL_SIGNS = 6  # up to this many layers all sign patterns are tried
_SOME_SIGNS = 32  # the number of sign patterns tried of more layers
_POWER_STEPS = 12  # with fixed weights d_i, and as many with free ones
_MOST_TERMS = 4  # exchanged at once
_WORTH = 0.8  # of the loss, which a single new term must gain


class Exchanges:
    """Looks for terms in the residual, compressed to the leading 2 r singular directions of every layer.

    U (b, c) and V (a, c), orthonormal, are common to all layers, and K_i = U^T M_i V: no number of exchanges costs a
    pass over M. In float64. With several processes, each has the K_i of all layers and makes the same exchanges.
    """

    def __init__(self, unit: LayerStack, budget: RankBudget, seed: int) -> None:
        svd = unit.spectra.svd()
        all_gather = unit.sharding.all_gather
        m = min(2 * budget.rank, *unit.shape)
        self._U = orthogonal.orthonormal_columns(_side_by_side(all_gather(svd.U[:, :, :m])))
        self._V = orthogonal.orthonormal_columns(_side_by_side(all_gather(svd.Vh.mT[:, :, :m])))
        self._K = all_gather(projected(svd, self._U, self._V))
        self._patterns = sign_patterns(unit.layers, seed).to(self._K)

    def exchanged(self, factors: RasaFactors) -> RasaFactors | None:
        """Other factors from which sweeps may end lower, or None if nothing promises that.

        The largest new terms take the place of the pool terms whose loss is least. Private terms take up what they can
        of the old ones.
        """
        # A term that gains more than the loss of the one it replaces lowers the error at once. To ask for that alone
        # would miss most exchanges that pay in the end: the other terms are adapted to the old term by many sweeps, and
        # not yet to the new one. So a single term may begin with a deficit, if it gains 0.8 of the loss; the race lets
        # sweeps decide. Several terms at once must each pay for themselves, as their deficits would add up.
        f = factors.to(torch.float64).gathered()
        if f.shared_B.shape[1] == 0:
            return None
        losses, order = pool_losses(f).sort()
        terms = leading_terms(self._residual(f), self._patterns, min(len(losses), _MOST_TERMS))
        gains = (terms.D**2).sum(0)
        count = _paying(gains, losses)
        if count == 0:
            return None
        replaced = _replaced(f, order[:count], order[count:], self._uncompressed(terms.select(slice(count))))
        return replaced.to(factors.mixing.dtype).sharded(factors.sharding)

    def _residual(self, f: RasaFactors) -> Tensor:
        """U^T E_i V, (L, c, c)."""
        private = (self._U.mT @ f.private_B) @ (f.private_A @ self._V)
        pool = ((self._U.mT @ f.shared_B) * f.mixing[:, None]) @ (f.shared_A @ self._V)
        return self._K - private - pool

    def _uncompressed(self, terms: RankOneTerms) -> RankOneTerms:
        return RankOneTerms(self._U @ terms.B, (self._V @ terms.A.mT).mT, terms.D)


def _paying(gains: Tensor, losses: Tensor) -> int:
    """The number of new terms to exchange: the leading ones that gain more than is lost, or one that nearly does.

    Gains fall and losses rise.
    """
    pays = gains > losses[: len(gains)]
    if bool(pays[0]):
        return int(pays.cumprod(0).sum())
    return int(gains[0] > _WORTH * losses[0])


def _replaced(f: RasaFactors, out: Tensor, stay: Tensor, terms: RankOneTerms) -> RasaFactors:
    """The factors with pool terms `out` given up, as far as the private ones do not take them up, and new `terms`."""
    Bt, At, B_S, A_S, D = f.named().values()
    private_B, private_A = orthogonal.truncated_product(
        torch.cat([Bt, B_S[:, out] * D[:, None, out]], 2),
        torch.cat([At, A_S[out].expand(len(At), -1, -1)], 1),
        Bt.shape[2],
    )
    return RasaFactors(
        private_B,
        private_A,
        torch.cat([B_S[:, stay], terms.B], 1),
        torch.cat([A_S[stay], terms.A]),
        torch.cat([D[:, stay], terms.D], 1),
    )


def pool_losses(factors: RasaFactors) -> Tensor:
    """Upper bounds on the cost of leaving out a pool term, squared, (R,): the sums over layers of `layer_losses`."""
    return layer_losses(factors).sum(0)


def leading_terms(E: Tensor, patterns: Tensor, count: int) -> RankOneTerms:
    """`count` rank-one terms of the tensor E (L, n, p), falling in size, with unit b_j and a_j.

    Each is about the largest term of the rest that those before leave. By the higher-order power method:
    b <- sum_i d_i E_i a, a <- sum_i d_i E_i^T b, d_i <- b^T E_i a, from every pattern d (m, L). |d|^2 is the part of
    ||E||^2 that a term explains.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(len(patterns), E.shape[2], generator=generator, dtype=torch.float64).to(E)
    columns, rows, weights = [], [], []
    for _ in range(count):
        d, a = patterns, start
        for step in range(2 * _POWER_STEPS):
            b = orthogonal.unit_columns(torch.einsum("ml,lnm->nm", d, E @ a.mT)).mT
            a = orthogonal.unit_columns(torch.einsum("ml,lpm->pm", d, E.mT @ b.mT)).mT
            if step >= _POWER_STEPS:  # before, b and a approach the leading singular vectors of sum_i d_i E_i
                d = torch.einsum("mn,lnm->ml", b, E @ a.mT)
        best = int((d**2).sum(1).argmax())
        columns.append(b[best])
        rows.append(a[best])
        weights.append(d[best])
        E = E - d[best][:, None, None] * torch.outer(b[best], a[best])
    terms = RankOneTerms(torch.stack(columns, 1), torch.stack(rows, 1).mT, torch.stack(weights, 1))
    return terms.select((terms.D**2).sum(0).argsort(descending=True))


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
