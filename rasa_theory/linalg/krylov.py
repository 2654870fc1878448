"""A guess of the leading eigenvectors of a symmetric matrix that is only applied. No certificate rests on it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rasa_theory.linalg import dense, orthogonal

_CHECK_SHARE = 6  # a check follows a sixth of the steps so far, since its cost grows with the basis
_LARGEST_SHARE = 2  # the basis has at most n / 2 columns: the search is for small parts of the space
_DEPENDENT = 1e-4  # relative size of a column, in single precision, that is mostly rounding after two projections


class Operator(NamedTuple):
    """A symmetric matrix S (n, n) that is only applied.

    - apply: X (n, m) -> S X, in the dtype of X, float32 or float64, on `device`.
    - n: the number of rows.
    - norm: an upper bound on ||S||_F.
    - error: in float64 a computed product S X is off by at most this times ||X||_F, in the Frobenius norm.
    - dtype: of the search, float32 or float64. Certificates are in float64.
    - device: of X.
    - rank: of S, at most.
    """

    apply: Callable[[Tensor], Tensor]
    n: int
    norm: float
    error: float
    dtype: torch.dtype = torch.float64
    device: torch.device = torch.device("cpu")
    rank: float = math.inf


def random_block(n: int, width: int, generator: torch.Generator) -> Tensor:
    """The first block (n, width) of a search."""
    return torch.randn(n, width, generator=generator, dtype=torch.float64)


class BlockLanczos:
    """Block Lanczos for S with full orthogonalisation, in `S.dtype`: a guess of the leading eigenvectors."""

    def __init__(self, S: Operator, width: int, generator: torch.Generator) -> None:
        self.S, self.width = S, width
        self.Q = orthogonal.thin_qr(random_block(S.n, width, generator).to(S.device, S.dtype))[0]  # (n, W)
        self.SQ = S.apply(self.Q)
        self.depth = 1

    def run(self, m: int, columns: int, target: float, depth: float = math.inf) -> bool:
        """Continue by at least one step, until `columns` vectors will do, or there are `depth` blocks.

        True if the certificate's sum ||Rho_j||^2 / (t - tau) is likely to fall below `target`; False if the basis
        would get too large before, see `_LARGEST_SHARE`.
        """
        while True:
            for _ in range(max(1, self.depth // _CHECK_SHARE)):
                if self.Q.shape[1] + self.width > min(self.S.rank, self.S.n) // _LARGEST_SHARE:
                    return False
                last = self._grow()
            finished = self.Q.shape[1] - self.width  # columns with a residual so far: S Q = Q T + new last
            if finished < columns:
                continue
            theta, X = self._ritz(finished)
            residual = float((last @ X[-self.width :, :m]).square().sum())
            gap = float(theta[m - 1] - theta[columns - 1])
            if residual <= target * max(gap, 0.5 * target / m) or self.depth >= depth:
                return True

    def vectors(self, columns: int) -> Tensor:
        """The leading Ritz vectors so far: (n, columns)."""
        return self.Q @ self._ritz(self.Q.shape[1])[1][:, :columns]

    def _grow(self) -> Tensor:
        """Add the directions (n, width) that S adds to the basis, and return their coefficients (width, width)."""
        Z = self.SQ[:, -self.width :]
        for _ in range(2):
            Z = orthogonal.outside(self.Q, Z)
        new, last = orthogonal.thin_qr(Z)
        sizes = last.diagonal().abs()
        largest = float(sizes.max())
        if float(sizes.min()) <= _DEPENDENT * largest or largest <= _DEPENDENT * float(self.SQ.abs().max()):
            # S adds fewer directions, and QR replaced the rest by arbitrary ones.
            new = orthogonal.orthonormal_beside(self.Q, Z)
            last = new.mT @ Z
        self.Q = torch.cat([self.Q, new], 1)
        self.SQ = torch.cat([self.SQ, self.S.apply(new)], 1)
        self.depth += 1
        return last

    def _ritz(self, columns: int) -> tuple[Tensor, Tensor]:
        """Eigenvalues, falling, and eigenvectors of Q^T S Q, for the first columns of Q."""
        T = self.Q[:, :columns].mT @ self.SQ[:, :columns]
        theta, X = dense.symmetric_eigenpairs((T + T.mT) / 2)
        return theta.flip(0), X.flip(1)
