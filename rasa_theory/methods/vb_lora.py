"""VB-LoRA: all factors of all layers put together from the vectors of one bank (arXiv 2405.15179)."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from rasa_theory.common import InputError, at_least
from rasa_theory.methods.access import left, right, seeded
from rasa_theory.methods.fit import Evidence, Fit, Found, Method, fitted
from rasa_theory.methods.settings import Settings
from rasa_theory.problem import LayerStack, balanced
from rasa_theory.solvers import solve_lora

LENGTH = 32  # sub-vectors of about this length, where the configuration is chosen
MOST_PAIRS = 1 << 24  # distances that are looked at where a bank is begun

_KMEANS = 10


class _Bank(NamedTuple):
    """vectors (h, s), their indices (n, K) in each of the n sub-vectors, and logits (n, K) of their weights."""

    vectors: Tensor
    indices: Tensor
    logits: Tensor

    def sub_vectors(self) -> Tensor:
        """(n, s): softmax(logits) times the vectors chosen."""
        return (self.logits.softmax(1)[..., None] * self.vectors[self.indices]).sum(1)


def fit_vb_lora(
    stack: LayerStack, rank: int, bank: int, length: int, topk: int = 2, seed: int = 0, max_iterations: int = 150
) -> Fit:
    """min sum_i ||M_i - B_i A_i||_F^2, all sub-vectors of the factors from a bank: VB-LoRA (Li et al., NeurIPS 2024).

    As the paper has it: the rows of A_i (r, a) and the columns of B_i (b, r) are cut into sub-vectors of `length` = s,
    each the softmax-weighted sum of `topk` = K of the h = `bank` vectors, which all layers share. Stored are the bank,
    h s numbers, and for each of the n = L r (a + b) / s sub-vectors K indices and K - 1 weights (they add up to one).

    Not as the paper has it is the search: which K vectors a sub-vector uses is settled once, where the bank is fitted
    to LoRA's optimum (k-means, then K vectors one after the other, each with the weight that is best beside those
    before); bank and weights are then lowered together by L-BFGS on the error of the updates, which never rises. Best
    found. Raises InputError unless 1 <= rank <= min(b, a), s divides b and a, and 1 <= K <= h.
    """
    b, a = stack.shape
    named = {"rank": rank, "bank": bank, "length": length, "topk": topk, "max_iterations": max_iterations}
    r, h, s, K, iterations = (at_least(name, value, 1) for name, value in named.items())
    if b % s or a % s:
        raise InputError(f"length {s} does not divide the layers of {b} x {a}; give a divisor of {math.gcd(b, a)}")
    if h < K:
        raise InputError(f"topk {K} exceeds the {h} vectors of the bank")
    unit = stack.unit()
    start = _begun(unit, r, h, s, K, seed)
    found, history = _lowered(unit, start, r, iterations)
    B, A = _factors(found.sub_vectors(), unit, r)
    weights = found.logits.softmax(1)[:, : K - 1]
    return fitted(
        stack,
        "vb_lora",
        {"rank": r, "bank": h, "length": s, "topk": K},
        Evidence.BEST_FOUND,
        Found(lambda i: B[i] @ A[i], (found.vectors, weights), r, indices=found.indices.numel(), history=history),
    )


def _factors(sub_vectors: Tensor, unit: LayerStack, r: int) -> tuple[Tensor, Tensor]:
    """The sub-vectors put together: B (L, b, r), column by column, and A (L, r, a), row by row."""
    L, (b, a) = unit.layers, unit.shape
    flat = sub_vectors.flatten()
    return flat[: L * r * b].reshape(L, r, b).mT, flat[L * r * b :].reshape(L, r, a)


def _begun(unit: LayerStack, r: int, h: int, s: int, K: int, seed: int) -> _Bank:
    """A bank fitted to LoRA's optimum with b_j and a_j of equal norm."""
    lora = solve_lora(unit, r).factors.to(torch.float64)
    B, A = balanced(lora.B, lora.A)
    wanted = torch.cat([B.mT.flatten(), A.flatten()]).reshape(-1, s)
    vectors = _kmeans(wanted, h, unit, seed)
    reached, weights = torch.zeros_like(wanted), wanted.new_zeros(len(wanted), 0)
    indices = torch.zeros(len(wanted), 0, dtype=torch.long, device=wanted.device)
    for n in range(K):  # add the vector that brings nearest, by a step t from what is reached: (1 - t) x + t v
        index, t = _nearest(wanted, reached, vectors, indices, whole=n == 0)
        reached = (1 - t[:, None]) * reached + t[:, None] * vectors[index]
        weights = torch.cat([weights * (1 - t[:, None]), t[:, None]], 1)
        indices = torch.cat([indices, index[:, None]], 1)
    return _Bank(vectors, indices, weights.clamp_min(1e-3).log())


def _kmeans(points: Tensor, h: int, unit: LayerStack, seed: int) -> Tensor:
    """h centres of the points (n, s), from random ones of them; a centre without points moves to the worst point."""
    order = seeded(unit, seed, len(points)).argsort()
    centres = points[order[torch.arange(h, device=points.device) % len(points)]]
    for _ in range(_KMEANS):
        distance, own = _distances(points, centres).min(1)
        count = torch.zeros(h, dtype=points.dtype, device=points.device).index_add(0, own, torch.ones_like(distance))
        sums = torch.zeros_like(centres).index_add(0, own, points)
        empty = (count == 0).nonzero()[:, 0][: len(points)]
        centres = sums / count.clamp_min(1)[:, None]
        centres[empty] = points[distance.argsort(descending=True)[: len(empty)]]
    return centres


def _distances(X: Tensor, Y: Tensor) -> Tensor:
    """Squared distances, (n, m)."""
    return ((X * X).sum(1)[:, None] - 2 * X @ Y.mT + (Y * Y).sum(1)).clamp_min(0)


def _nearest(wanted: Tensor, reached: Tensor, vectors: Tensor, taken: Tensor, whole: bool) -> tuple[Tensor, Tensor]:
    """For every sub-vector the vector v and the t in [0, 1] with the least ||wanted - (1 - t) reached - t v||.

    `whole`: t = 1. Vectors that are taken are left out. A block of sub-vectors at a time.
    """
    block, found, steps = max(1, MOST_PAIRS // len(vectors)), [], []
    for x, y, used in zip(*(torch.split(t, block) for t in (wanted, reached, taken)), strict=True):
        if whole:
            t, loss = wanted.new_ones(len(x), len(vectors)), _distances(x, vectors)
        else:  # g = x - y, d = v - y: t = <g, d> / ||d||^2, ||g - t d||^2 = ||g||^2 - 2 t <g, d> + t^2 ||d||^2
            g = x - y
            gd, dd = g @ vectors.mT - (g * y).sum(1)[:, None], _distances(y, vectors)
            t = (gd / torch.where(dd > 0, dd, 1)).clamp(0, 1)
            loss = (g * g).sum(1)[:, None] - 2 * t * gd + t * t * dd
        loss.scatter_(1, used, math.inf)
        index = loss.argmin(1)
        found.append(index)
        steps.append(t.gather(1, index[:, None])[:, 0])
    return torch.cat(found), torch.cat(steps)


def _lowered(unit: LayerStack, start: _Bank, r: int, iterations: int) -> tuple[_Bank, tuple[float, ...]]:
    """L-BFGS on bank and logits together, the choice of vectors fixed, and the error of every iterate."""
    norm, (h, s), indices = unit.norm_squared, start.vectors.shape, start.indices
    if norm == 0:
        return start._replace(vectors=torch.zeros_like(start.vectors)), (0.0,)
    size = float(start.vectors.square().mean().sqrt())  # vectors are looked for in its units, beside logits of order 1

    def unpacked(x: np.ndarray) -> tuple[Tensor, Tensor]:
        flat = torch.from_numpy(x).to(unit.device)
        return flat[: h * s].reshape(h, s) * size, flat[h * s :].reshape(start.logits.shape)

    def value_and_slope(x: np.ndarray) -> tuple[float, np.ndarray]:
        """||M - B A||^2 and its slopes by the factors, 2 (B A - M) A^T and 2 B^T (B A - M), all over ||M||^2."""
        vectors, logits = (t.clone().requires_grad_() for t in unpacked(x))
        B, A = _factors(_Bank(vectors, indices, logits).sub_vectors(), unit, r)
        with torch.no_grad():
            MA, MB = right(unit, A.mT), left(unit, B)
            AA, BB = A @ A.mT, B.mT @ B
            error = norm - 2 * float((B * MA).sum()) + float((BB * AA).sum())
            slopes = 2 * (B @ AA - MA) / norm, 2 * (BB @ A - MB.mT) / norm
        torch.autograd.backward([B, A], slopes)
        return error / norm, torch.cat([vectors.grad.flatten() * size, logits.grad.flatten()]).cpu().numpy()  # type: ignore[union-attr]

    x = torch.cat([start.vectors.flatten() / size, start.logits.flatten()]).cpu().numpy()
    history = [max(value_and_slope(x)[0], 0.0) * norm]
    found = minimize(
        value_and_slope,
        x,
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": iterations, "maxcor": 20, "ftol": 1e-8, "gtol": 1e-10},
        callback=lambda intermediate_result: history.append(max(float(intermediate_result.fun), 0.0) * norm),
    )
    vectors, logits = unpacked(found.x)
    return _Bank(vectors, indices, logits), tuple(history)


def _configurations(stack: LayerStack, parameters: int) -> list[Settings]:
    """The rank of LoRA of as many parameters, and twice that; K = 2, and as large a bank as the rest pays."""
    L, (b, a) = stack.layers, stack.shape
    s = max(n for n in range(1, LENGTH + 1) if b % n == 0 and a % n == 0)
    found: list[Settings] = []
    own = parameters // (L * (a + b))
    for rank in sorted({min(max(own, 1), b, a), min(max(2 * own, 1), b, a)}):
        n = L * rank * (a + b) // s
        h = min((parameters - 3 * n) // s, n)
        if h >= 2:
            found.append({"rank": rank, "bank": h, "length": s, "topk": 2})
    return found


VB_LORA = Method(fit_vb_lora, _configurations)
