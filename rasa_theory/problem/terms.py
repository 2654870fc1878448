"""Rank-one terms that all layers of a stack weight: the shape of a pool."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RankOneTerms(NamedTuple):
    """Terms d_ij b_j a_j^T of every layer i: B (b, n) holds the columns b_j, A (n, a) the rows a_j^T, D (L, n)."""

    B: Tensor
    A: Tensor
    D: Tensor

    def select(self, index: Tensor | slice) -> RankOneTerms:
        """The terms at `index`, in its order."""
        return RankOneTerms(self.B[:, index], self.A[index], self.D[:, index])
