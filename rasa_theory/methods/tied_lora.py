"""Tied-LoRA: one A and one B for all layers, and two diagonals for each (arXiv 2311.09578)."""

from __future__ import annotations

import torch

from rasa_theory import linalg
from rasa_theory.common import at_least
from rasa_theory.methods import diagonals
from rasa_theory.methods.access import leading_terms, left, right, seeded
from rasa_theory.methods.alternate import Steps, alternate, increment
from rasa_theory.methods.diagonals import Diagonals
from rasa_theory.methods.fit import Evidence, Fit, Found, Method, fitted, residual
from rasa_theory.methods.settings import Settings, largest
from rasa_theory.problem import LayerStack


def fit_tied_lora(stack: LayerStack, rank: int, starts: int = 3, seed: int = 0, max_sweeps: int = 120) -> Fit:
    """min sum_i ||M_i - diag(v_i) B diag(u_i) A||_F^2: Tied-LoRA (Renduchintala et al., NAACL 2024).

    Of their variants the one that trains all four, B (b, r), A (r, a), v_i (b) and u_i (r): r (a + b) + L (b + r)
    parameters. Exact least squares for u_i, v_i, B and A in turn, each round from beyond the last.
    `starts`: the leading singular terms of all layers, then the common row and column space, then random ones. There
    are many local minima, since signs of v_i hardly change: best found. Raises InputError if rank or starts < 1.
    """
    at_least("rank", rank, 1)
    unit = stack.unit()
    norms = unit.layer_norms(torch.float64)
    makers = (_leading, _common, *[_random] * at_least("starts", starts, 1))[:starts]
    steps = Steps(lambda f: _sweep(unit, norms, f), lambda f: residual(unit, f.update), diagonals.beyond)
    begun = [make(unit, rank, seed + 1000 * n) for n, make in enumerate(makers)]
    f, history = alternate(unit, steps, begun, at_least("max_sweeps", max_sweeps, 1), heat=20)
    return fitted(stack, "tied_lora", {"rank": rank}, Evidence.BEST_FOUND, Found(f.update, f, rank, history=history))


def _leading(unit: LayerStack, rank: int, seed: int) -> Diagonals:
    """The leading singular terms of all layers, each used by its own layer alone: all v_i = 1."""
    B, A, u = leading_terms(unit, rank, seed)
    return diagonals.evened(Diagonals(B.new_ones(unit.layers, B.shape[0]), B, u, A))


def _common(unit: LayerStack, rank: int, seed: int) -> Diagonals:
    """Random B and A in the leading common column and row space, which no layer uses yet: all v_i = 1, and u_i = 0."""
    f = _random(unit, rank, seed)
    n = min(rank, *unit.shape)
    U, V = (linalg.leading_eigenpairs(view.spectra.gram(), n)[1] for view in (unit, unit.transpose()))
    return diagonals.evened(f._replace(B=U @ (U.mT @ f.B), A=(f.A @ V) @ V.mT))


def _random(unit: LayerStack, rank: int, seed: int) -> Diagonals:
    """The same with any B and A."""
    L, (b, a) = unit.layers, unit.shape
    B, A = seeded(unit, 2 * seed, b, rank), seeded(unit, 2 * seed + 1, rank, a)
    return diagonals.evened(Diagonals(B.new_ones(L, b), B, B.new_zeros(L, rank), A))


def _sweep(unit: LayerStack, norms: torch.Tensor, f: Diagonals) -> Diagonals:
    """u, v, B and A, each the exact minimiser; two passes."""
    shape, MA = unit.shape, right(unit, f.A.mT)  # (L, b, r)
    f = f._replace(u=torch.stack([diagonals.update_u(f, i, MA[i], norms[i]) for i in range(unit.layers)]))
    f = f._replace(v=diagonals.update_v(f, MA, norms))

    total = torch.sqrt((norms**2).sum()) + torch.sqrt((diagonals.norms_of(f) ** 2).sum())
    v, B, u, A = f  # row s of B: sum_i v_is^2 (u_i u_i^T * A A^T) b_s = sum_i v_is u_i * (M_i A^T)_s
    G = torch.einsum("ls,lj,lk->sjk", v * v, u, u) * (A @ A.mT)
    g = torch.einsum("ls,lj,lsj->sj", v, u, MA) - (G @ B[..., None])[..., 0]
    f = f._replace(B=B + increment(G, g[..., None], total.reshape(1, 1), shape)[..., 0])

    W = f.v[..., None] * f.B * f.u[:, None]  # (L, b, r): sum_i W_i^T W_i A = sum_i W_i^T M_i
    G = (W.mT @ W).sum(0)
    g = left(unit, W).sum(0).mT - G @ f.A
    f = f._replace(A=f.A + increment(G, g, total.reshape(1), shape))
    return diagonals.evened(f)


def _configurations(stack: LayerStack, parameters: int) -> list[Settings]:
    L, (b, a) = stack.layers, stack.shape
    rank = largest(lambda r: r * (a + b) + L * (b + r), parameters, b * a)
    return [{"rank": rank}] if rank else []


TIED_LORA = Method(fit_tied_lora, _configurations)
