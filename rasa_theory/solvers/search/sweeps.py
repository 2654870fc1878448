"""Joint sweeps on many factors of one core side by side, each from beyond its last point and inside the bound."""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor

from rasa_theory.linalg import orthogonal
from rasa_theory.solvers.descent import Extrapolated
from rasa_theory.solvers.search.batch import Batch, along

_RIDGE = 1e-12  # of the mean diagonal of a Gram matrix
_ROUNDING = 1e-14  # of the diagonal before the private directions are taken off
# Multipliers aim a little inside the bound, so that hardly anything has to be cut off in the end. They begin small,
# since a bound costs little by itself: a term that doubles beyond 8 ||M_i|| gains some 1e-5 of the error.
_INSIDE = 0.99
_FIRST = 1e-6
_FASTEST = 4.0  # factor of a multiplier in one sweep


class Multipliers(NamedTuple):
    """Weights mu (S, L, R) on the squared norms of pool terms, and nu (S, L) on those of B~_i A~_i."""

    pool: Tensor
    private: Tensor

    @classmethod
    def zero(cls, D: Tensor) -> Multipliers:
        return cls(torch.zeros_like(D), D.new_zeros(D.shape[:2]))

    def cost(self, sizes: Multipliers) -> Tensor:
        """Sum of the weighted squared norms: (S,)."""
        return (self.pool * sizes.pool).sum((1, 2)) + (self.private * sizes.private).sum(1)

    def where(self, condition: Tensor, other: Multipliers) -> Multipliers:
        return Multipliers(*(torch.where(along(condition, x), x, y) for x, y in zip(self, other, strict=True)))

    def select(self, index: Tensor) -> Multipliers:
        return Multipliers(self.pool[index], self.private[index])

    def joined(self, other: Multipliers) -> Multipliers:
        return Multipliers(torch.cat([self.pool, other.pool]), torch.cat([self.private, other.private]))

    def updated(self, sizes: Multipliers, limits: Tensor) -> Multipliers:
        """The multipliers of the next sweep, from the squared norms (same shapes) and their limits (L,)."""
        return Multipliers(
            _updated(self.pool, sizes.pool / limits[:, None]), _updated(self.private, sizes.private / limits)
        )


def _updated(multipliers: Tensor, excess: Tensor) -> Tensor:
    """Multiplied by `excess`, the squared norm over its limit: they begin above 1, and switch themselves off below."""
    started = torch.where(excess > 1, multipliers.clamp_min(_FIRST), multipliers)
    grown = started * excess.clamp(1 / _FASTEST, _FASTEST)
    return torch.where(grown < _FIRST / 16, 0.0, grown)


class BatchedSweeps:
    """A batch on K (L, n, m) that descends by joint sweeps; `errors` (S,) are the squared errors of `batch`.

    Minimises sum_i ||E_i||^2 + sum_ij mu_ij t_ij^2 + sum_i nu_i ||B~_i A~_i||^2, t_ij the norms of pool terms. The
    multipliers mu and nu grow where a norm exceeds its layer's entry of `limits` (L,), and fall to zero elsewhere. Only
    the first common[0] rows of B move, and the first common[1] columns of A.
    """

    # The sweep is `updates.joint_sweep`, written for S factors at once. On a small core its time is that of the calls,
    # not of the arithmetic, so 24 factors side by side cost little more than one. Extrapolation is that of
    # `Extrapolated`, but nothing is done twice: where a sweep from beyond the last point does not pay, that factor
    # starts its next sweep from the point itself.

    def __init__(
        self,
        K: Tensor,
        batch: Batch,
        limits: Tensor,
        common: tuple[int | None, int | None] = (None, None),
        multipliers: Multipliers | None = None,
    ) -> None:
        self._K, self._limits, self._common = K, limits, common
        self._KT = K.mT.contiguous()  # what `pool_products` would copy in every sweep
        self._norm = float((K * K).sum())
        self.multipliers = multipliers or Multipliers.zero(batch.D)
        self.batch = self._before = batch
        self.errors = K.new_full(batch.D.shape[:1], torch.inf)
        self._sizes = Multipliers.zero(batch.D)
        self._stride = torch.zeros_like(self.errors)

    def run(self, sweeps: int) -> Self:
        """Do this many sweeps."""
        for _ in range(sweeps):
            self._sweep()
        return self

    def select(self, index: Tensor) -> None:
        """Go on with the factors at `index` alone."""
        self.batch, self._before = self.batch.select(index), self._before.select(index)
        self.multipliers, self._sizes = self.multipliers.select(index), self._sizes.select(index)
        self.errors, self._stride = self.errors[index], self._stride[index]

    def join(self, other: BatchedSweeps) -> None:
        """Go on with the factors of `other` as well."""
        self.batch, self._before = self.batch.joined(other.batch), self._before.joined(other._before)
        self.multipliers, self._sizes = self.multipliers.joined(other.multipliers), self._sizes.joined(other._sizes)
        self.errors = torch.cat([self.errors, other.errors])
        self._stride = torch.cat([self._stride, other._stride])

    def _sweep(self) -> None:
        now, stride = self.batch, self._stride
        batch, values = self._swept(now.beyond(self._before, stride))
        # ||B~_i A~_i|| = ||A~_i||, since the columns of B~_i are orthonormal.
        sizes = Multipliers(batch.D**2, torch.linalg.vector_norm(batch.At, dim=(2, 3)) ** 2)
        errors = values - self.multipliers.cost(sizes)
        lower = values < self.errors + self.multipliers.cost(self._sizes)
        self.batch, self._before = batch.where(lower, now), now.where(lower, self._before)
        self.errors = torch.where(lower, errors, self.errors)
        self._sizes = sizes.where(lower, self._sizes)
        longer = torch.where(stride > 0, Extrapolated.GROWTH * stride, 1.0)
        shorter = torch.where(stride > Extrapolated.SMALLEST, Extrapolated.SHRINKAGE * stride, 0.0)
        self._stride = torch.where(lower, longer, shorter)
        self.multipliers = self.multipliers.updated(self._sizes, (_INSIDE * self._limits) ** 2)

    def _swept(self, batch: Batch) -> tuple[Batch, Tensor]:
        half, _ = batched_half(self._K, self._norm, batch, self.multipliers, self._common[0])
        half, values = batched_half(self._KT, self._norm, half.transpose(), self.multipliers, self._common[1])
        return half.transpose(), values


def batched_half(
    K: Tensor, norm: float, batch: Batch, multipliers: Multipliers, leading: int | None
) -> tuple[Batch, Tensor]:
    """`updates.joint_half` for S factors, with multipliers; `norm` is ||K||^2.

    With w_i = 1 / (1 + nu_i) and W_i = A~_i A_S^T the best B~_i is w_i (K_i A~_i^T - B_S D_i W_i^T), so
    C_i = A_S A_S^T - w_i W_i^T W_i and P_i = K_i A_S^T - w_i K_i A~_i^T W_i. Products with P_i are those with its two
    parts, since P_i itself would be as large as both. The multipliers mu_ij add sum_i mu_ij d_ij^2 to the diagonal of
    the Gram matrix for B_S, and mu_ij to that for d_i. Returns the batch and the value minimised (S,).
    """
    _, At, B, A, D = batch
    mu, nu = multipliers
    AK = pool_products(K, A)  # (S, R, L, n)
    h = (D.mT[:, :, None] @ AK)[:, :, 0].mT  # sum_i P_i D_i: (S, n, R)
    C = (A @ A.mT)[:, None]  # (S, 1, R, R)
    if q := At.shape[2]:
        At = torch.linalg.qr(layers_first(At).mT)[0].mT  # (L, S, q, m)
        AtK = (At.flatten(1, 2) @ K.mT).unflatten(1, (-1, q))  # (L, S, q, n)
        W = At @ A.mT  # (L, S, q, R)
        w = layers_first(1 / (1 + nu))[..., None, None]  # (L, S, 1, 1)
        wW = w * W
        h = h - (AtK.mT @ (wW * layers_first(D)[:, :, None])).sum(0)
        C = C - layers_first(W.mT @ wW)
    G = (C * D[..., None] * D[:, :, None]).sum(1) + torch.diag_embed((mu * D * D).sum(1))  # (S, R, R)
    X = solved(G, (h - B @ G)[:, :leading].mT, (D * D).sum(1).mean(1)).mT
    B = B + torch.nn.functional.pad(X, (0, 0, 0, B.shape[1] - X.shape[1]))
    norms = torch.linalg.vector_norm(B, dim=1)
    B, D = orthogonal.unit_columns(B), D * norms[:, None]
    G = (B.mT @ B)[:, None] * C + torch.diag_embed(mu)  # (S, L, R, R)
    p = (AK @ B.mT[..., None])[..., 0].mT  # b_j^T P_i e_j: (S, L, R)
    if q:
        p = p - layers_first(((AtK @ B) * wW).sum(2))
    D = D + solved(G, (p - (G @ D[..., None])[..., 0])[..., None], D.new_ones(()))[..., 0]
    value = norm - (D * (2 * p - (G @ D[..., None])[..., 0])).sum((1, 2))
    if not q:
        return Batch(batch.Bt, At, B, A, D), value
    value = value - (w[..., 0, 0] * torch.linalg.vector_norm(AtK, dim=(2, 3)) ** 2).sum(0)
    Bt = (AtK - (W * layers_first(D)[:, :, None]) @ B.mT).mul_(w).mT
    return Batch(layers_first(Bt), layers_first(At), B, A, D), value


def layers_first(X: Tensor) -> Tensor:
    """(S, L, ..) to (L, S, ..) or back, as a view. Private parts lie in memory in this order: products copy nothing."""
    return X.transpose(0, 1)


def pool_products(K: Tensor, A: Tensor) -> Tensor:
    """A_s K_i^T for all i and s by one product: (L, n, m), (S, R, m) -> (S, R, L, n)."""
    return (A.flatten(0, 1) @ K.flatten(0, 1).T).reshape(*A.shape[:2], *K.shape[:2])


def solved(G: Tensor, g: Tensor, size: Tensor) -> Tensor:
    """G^-1 g, with a ridge at rounding level, for positive semidefinite G (.., R, R) and g (.., R, p).

    An increment from the residual, so it never raises what is minimised, whatever the ridge is. G is a difference of
    matrices of about `size` (..), so it can be rounding alone, and indefinite: where Cholesky fails the result is 0.
    """
    ridge = torch.maximum(_RIDGE * G.diagonal(dim1=-2, dim2=-1).mean(-1), _ROUNDING * size)
    eye = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    ridge = ridge.clamp_min(torch.finfo(G.dtype).tiny)[..., None, None]
    factor, info = torch.linalg.cholesky_ex(G + ridge * eye)
    return torch.where((info == 0)[..., None, None], torch.cholesky_solve(g, factor), 0.0)
