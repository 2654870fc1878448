"""Exact steps for updates diag(v_i) B diag(u_i) A with B (b, r) and A (r, a) common to all layers.

Tied-LoRA trains all four, VeRA only v_i (b) and u_i (r). Each step is an increment from the residual, so that the error
never rises, whatever a singular system makes it drop.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rasa_theory.methods.alternate import increment


class Diagonals(NamedTuple):
    """v (L, b), B (b, r), u (L, r), A (r, a)."""

    v: Tensor
    B: Tensor
    u: Tensor
    A: Tensor

    def update(self, i: int) -> Tensor:
        """diag(v_i) B diag(u_i) A, (b, a)."""
        return (self.v[i, :, None] * self.B * self.u[i]) @ self.A


def update_u(f: Diagonals, i: int, MA: Tensor, norm: Tensor) -> Tensor:
    """The best u_i (r,), from MA = M_i A^T (b, r) and ||M_i||.

    (W^T W * A A^T) u_i = diag(W^T M_i A^T) with W = diag(v_i) B, `*` elementwise.
    """
    W, AA = f.v[i, :, None] * f.B, f.A @ f.A.mT
    G = (W.mT @ W) * AA
    g = (W * MA).sum(0) - G @ f.u[i]
    size = (norm + (f.u[i] @ G @ f.u[i]).clamp_min(0).sqrt()).reshape(1)
    return f.u[i] + increment(G, g[:, None], size, (f.B.shape[0], f.A.shape[1]))[:, 0]


def update_v(f: Diagonals, MA: Tensor, norms: Tensor) -> Tensor:
    """The best v_i of all layers, (L, b), from MA_i = M_i A^T (L, b, r) and the norms of the layers (L,).

    Row s of layer i is one number times c = (B diag(u_i))_s A: v_is ||c||^2 = <M_is, c>.
    """
    C = f.B * f.u[:, None]  # (L, b, r)
    den = ((C @ (f.A @ f.A.mT)) * C).sum(2)
    g = (MA * C).sum(2) - f.v * den
    sizes = (norms[:, None] + f.v.abs() * den.clamp_min(0).sqrt())[..., None]
    return f.v + increment(den[..., None, None], g[..., None, None], sizes, (f.B.shape[0], f.A.shape[1]))[..., 0, 0]


def norms_of(f: Diagonals) -> Tensor:
    """||update(i)|| of all layers, (L,)."""
    W = f.v[..., None] * f.B * f.u[:, None]
    return ((W.mT @ W) * (f.A @ f.A.mT)).sum((1, 2)).clamp_min(0).sqrt()


def beyond(f: Diagonals, before: Diagonals, stride: float) -> Diagonals:
    """f + stride (f - before)."""
    return Diagonals(*(x + stride * (x - y) for x, y in zip(f, before, strict=True)))


def evened(f: Diagonals) -> Diagonals:
    """The same updates with unit columns in B, unit rows in A and v_i of mean square 1, their scale in u_i."""
    nB, nA = torch.linalg.vector_norm(f.B, dim=0), torch.linalg.vector_norm(f.A, dim=1)
    nv = torch.linalg.vector_norm(f.v, dim=1) / f.v.shape[1] ** 0.5
    B = f.B / torch.where(nB > 0, nB, 1)
    A = f.A / torch.where(nA > 0, nA, 1)[:, None]
    return Diagonals(f.v / torch.where(nv > 0, nv, 1)[:, None], B, f.u * (nB * nA) * nv[:, None], A)
