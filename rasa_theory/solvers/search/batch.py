"""Many factors of one small core side by side, and exact steps on all of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rasa_theory import linalg
from rasa_theory.linalg import orthogonal
from rasa_theory.problem import RasaFactors

_SVD_UP_TO = 160  # rows or columns of a core: above, private parts come from subspace iteration
_RIDGE = 1e-8  # of unit terms' Gram matrix, where D is solved anew


class Batch(NamedTuple):
    """S factors of a core (L, n, m): Bt (S, L, n, q), At (S, L, q, m), B (S, n, R), A (S, R, m), D (S, L, R).

    Columns of B and rows of A are of unit norm.
    """

    Bt: Tensor
    At: Tensor
    B: Tensor
    A: Tensor
    D: Tensor

    @classmethod
    def of(cls, factors: Sequence[RasaFactors]) -> Batch:
        """The batch of these factors, all of the same shapes."""
        parts = zip(*(f.normalised().named().values() for f in factors), strict=True)
        return cls(*(torch.stack(part) for part in parts))

    def factors(self) -> list[RasaFactors]:
        """The factors, one by one."""
        return [RasaFactors(*parts) for parts in zip(*self, strict=True)]

    def transpose(self) -> Batch:
        """The batch for the transposed core."""
        return Batch(self.At.mT, self.Bt.mT, self.A.mT, self.B.mT, self.D)

    def select(self, index: Tensor) -> Batch:
        """The factors at `index`, in its order."""
        return Batch(*(part[index] for part in self))

    def joined(self, other: Batch) -> Batch:
        """These factors and then the other ones."""
        return Batch(*(torch.cat(pair) for pair in zip(self, other, strict=True)))

    def where(self, condition: Tensor, other: Batch) -> Batch:
        """These factors where the condition (S,) holds, and the other ones elsewhere."""
        pairs = zip(self, other, strict=True)
        return Batch(*(torch.where(along(condition, x), x, y) for x, y in pairs))

    def beyond(self, before: Batch, stride: Tensor) -> Batch:
        """x + s (x - x_before) for a stride s (S,), with unit columns in the pool.

        B~_i stays as it is, since a sweep begins by solving for it.
        """

        def extended(x: Tensor, y: Tensor) -> Tensor:
            return torch.lerp(y, x, along(1 + stride, x))

        return Batch(self.Bt, *(extended(x, y) for x, y in zip(self[1:], before[1:], strict=True))).normalised()

    def normalised(self) -> Batch:
        """The same updates with unit columns in B and unit rows in A. Zero columns and rows stay zero."""
        nB, nA = torch.linalg.vector_norm(self.B, dim=1), torch.linalg.vector_norm(self.A, dim=2)
        B, A = orthogonal.unit_columns(self.B), orthogonal.unit_columns(self.A.mT).mT
        return self._replace(B=B, A=A, D=self.D * (nB * nA)[:, None])

    def pool_updates(self) -> Tensor:
        """B_S D_i A_S: (S, L, n, m)."""
        return (self.B[:, None] * self.D[:, :, None]) @ self.A[:, None]

    def residual(self, K: Tensor) -> Tensor:
        """E_i = K_i - B~_i A~_i - B_S D_i A_S: (S, L, n, m)."""
        return K - self.Bt @ self.At - self.pool_updates()


def along(values: Tensor, x: Tensor) -> Tensor:
    """(S,) -> (S, 1, .., 1), to be broadcast along x (S, ..)."""
    return values.reshape(-1, *[1] * (x.ndim - 1))


def update_private(K: Tensor, batch: Batch) -> Batch:
    """B~_i A~_i = the best rank-q approximation of K_i - B_S D_i A_S; on a large core about the best, from A~_i."""
    q = batch.Bt.shape[3]
    if q == 0:
        return batch
    E = K - batch.pool_updates()
    if min(K.shape[1:]) > _SVD_UP_TO:
        Bt, At = linalg.leading_part_from(E, batch.At)
        return batch._replace(Bt=Bt, At=At)
    U, S, Vh = linalg.svd(E)
    return batch._replace(Bt=U[..., :q] * S[..., None, :q], At=Vh[..., :q, :])


def refitted(K: Tensor, batch: Batch, rounds: int = 2) -> Batch:
    """The same pools, after exact updates of the private terms, and `rounds` more of D and of the private terms."""
    G = (batch.B.mT @ batch.B) * (batch.A @ batch.A.mT)  # (S, R, R)
    G = G + _RIDGE * torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    batch = update_private(K, batch)
    for _ in range(rounds):
        g = (batch.B[:, None] * ((K - batch.Bt @ batch.At) @ batch.A.mT[:, None])).sum(2)  # (S, L, R)
        batch = update_private(K, batch._replace(D=torch.linalg.solve(G, g.mT).mT))
    return batch


def inside(K: Tensor, batch: Batch, limits: Tensor) -> tuple[Batch, Tensor]:
    """The batch with no term of layer i above `limits` (L,), and its squared errors (S,).

    Pool terms are cut at the limit. Private terms are the best of rank q beside them within their own limit.
    """
    D = torch.minimum(torch.maximum(batch.D, -limits[:, None]), limits[:, None])
    batch = update_private(K, batch._replace(D=D))
    sizes = torch.linalg.matrix_norm(batch.Bt)  # rows of A~_i are orthonormal
    batch = batch._replace(Bt=batch.Bt * (limits / sizes).clamp_max(1)[..., None, None])
    return batch, (batch.residual(K) ** 2).sum((1, 2, 3))
