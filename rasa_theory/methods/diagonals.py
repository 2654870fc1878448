"""Exact steps for updates diag(v_i) B diag(u_i) A with B (b, r) and A (r, a) common to all layers.

Tied-LoRA trains all four factors, VeRA only v_i (b) and u_i (r). Each step solves for an increment from the residual,
not for the factor itself. So the error never rises, whatever directions of a singular system the solver drops.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rasa_theory import linalg


class Diagonals(NamedTuple):
    """The factors v (L, b), B (b, r), u (L, r) and A (r, a).

    Each `refit_` method returns the factors with one of them replaced by its least-squares solution for fixed others.
    """

    v: Tensor
    B: Tensor
    u: Tensor
    A: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(b, a)."""
        return self.B.shape[0], self.A.shape[1]

    def scaled_B(self) -> Tensor:
        """W_i = diag(v_i) B diag(u_i), (L, b, r)."""
        return self.v[..., None] * self.B * self.u[:, None]

    def update(self, i: int) -> Tensor:
        """diag(v_i) B diag(u_i) A, (b, a)."""
        return (self.v[i, :, None] * self.B * self.u[i]) @ self.A

    def norms(self) -> Tensor:
        """||update(i)|| of all layers, (L,)."""
        W = self.scaled_B()
        return ((W.mT @ W) * (self.A @ self.A.mT)).sum((1, 2)).clamp_min(0).sqrt()

    def refit_u(self, MA: Tensor, norms: Tensor) -> Diagonals:
        """The best u_i (r,) of every layer, from MA_i = M_i A^T (L, b, r) and the norms ||M_i|| (L,).

        (W^T W * A A^T) u_i = diag(W^T M_i A^T) with W = diag(v_i) B, `*` elementwise.
        """
        return self._replace(u=torch.stack([self._best_u(i, MA[i], norms[i]) for i in range(len(self.u))]))

    def _best_u(self, i: int, MA: Tensor, norm: Tensor) -> Tensor:
        W, AA, u = self.v[i, :, None] * self.B, self.A @ self.A.mT, self.u[i]
        G = (W.mT @ W) * AA
        g = (W * MA).sum(0) - G @ u
        size = (norm + (u @ G @ u).clamp_min(0).sqrt()).reshape(1)
        return u + increment(G, g[:, None], size, self.shape)[:, 0]

    def refit_v(self, MA: Tensor, norms: Tensor) -> Diagonals:
        """The best v_i (b,) of every layer, from MA_i = M_i A^T (L, b, r) and the norms ||M_i|| (L,).

        Row s of layer i is the scalar v_is times c = (B diag(u_i))_s A, so v_is ||c||^2 = <M_is, c>.
        """
        C = self.B * self.u[:, None]  # (L, b, r)
        squares = ((C @ (self.A @ self.A.mT)) * C).sum(2)  # ||c||^2, (L, b)
        g = (MA * C).sum(2) - self.v * squares
        sizes = (norms[:, None] + self.v.abs() * squares.clamp_min(0).sqrt())[..., None]
        return self._replace(
            v=self.v + increment(squares[..., None, None], g[..., None, None], sizes, self.shape)[..., 0, 0]
        )

    def refit_B(self, MA: Tensor, size: Tensor) -> Diagonals:
        """The best B, from MA_i = M_i A^T (L, b, r); `size` () is a norm of the stack and all updates.

        Row s of B: (sum_i v_is^2 u_i u_i^T * A A^T) b_s = sum_i v_is u_i * (M_i A^T)_s, `*` elementwise.
        """
        v, B, u, A = self
        G = torch.einsum("ls,lj,lk->sjk", v * v, u, u) * (A @ A.mT)
        g = torch.einsum("ls,lj,lsj->sj", v, u, MA) - (G @ B[..., None])[..., 0]
        return self._replace(B=B + increment(G, g[..., None], size.reshape(1, 1), self.shape)[..., 0])

    def refit_A(self, MW: Tensor, size: Tensor) -> Diagonals:
        """The best A, from sum_i M_i^T W_i (a, r) with W_i = `scaled_B`; `size` as in `refit_B`.

        sum_i W_i^T W_i A = sum_i W_i^T M_i.
        """
        W = self.scaled_B()
        G = (W.mT @ W).sum(0)
        return self._replace(A=self.A + increment(G, MW.mT - G @ self.A, size.reshape(1), self.shape))

    def evened(self) -> Diagonals:
        """The same updates with unit columns in B, unit rows in A and v_i of mean square 1; u_i takes their scale."""
        nB, nA = torch.linalg.vector_norm(self.B, dim=0), torch.linalg.vector_norm(self.A, dim=1)
        nv = torch.linalg.vector_norm(self.v, dim=1) / self.v.shape[1] ** 0.5
        B = self.B / torch.where(nB > 0, nB, 1)
        A = self.A / torch.where(nA > 0, nA, 1)[:, None]
        return Diagonals(self.v / torch.where(nv > 0, nv, 1)[:, None], B, self.u * (nB * nA) * nv[:, None], A)


def beyond(f: Diagonals, before: Diagonals, stride: float) -> Diagonals:
    """The extrapolated factors f + stride (f - before)."""
    return Diagonals(*(x + stride * (x - y) for x, y in zip(f, before, strict=True)))


def increment(gram: Tensor, g: Tensor, sizes: Tensor, shape: tuple[int, int]) -> Tensor:
    """The step x that minimises x^T G x - 2 x^T g as far as rounding lets one trust: (..., n, n), (..., n, m).

    g is a difference of products with M_i and with its update. Its rounding error is estimated from `sizes` (..., 1),
    the sum of their norms: 4 sqrt(max(b, a)) eps times the size, for every row times the root of its diagonal entry.
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    eps = torch.finfo(gram.dtype).eps
    noise = 4 * math.sqrt(max(shape)) * eps * sizes * diagonal.clamp_min(0).sqrt()
    return linalg.solve_increment(gram, g, diagonal, noise)
