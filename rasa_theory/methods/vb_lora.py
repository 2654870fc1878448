"""VB-LoRA: all factors of all layers put together from the vectors of one bank (arXiv 2405.15179)."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import OptimizeResult, minimize
from torch import Tensor

from rasa_theory.common import InputError, at_least
from rasa_theory.methods.bank import Bank, choose_vectors, cluster_means
from rasa_theory.methods.fit import Evidence, Fit, Settings, UnitFit, measured
from rasa_theory.methods.method import Method, largest
from rasa_theory.methods.products import left, right, seeded
from rasa_theory.problem import LayerStack, balanced
from rasa_theory.solvers import solve_lora

LENGTH = 32  # the longest sub-vectors of the configurations that are tried


@dataclass(frozen=True)
class _Sizes:
    """The rank r, the bank of h vectors of length s, and the K vectors that a sub-vector mixes."""

    rank: int
    bank: int
    length: int
    topk: int

    def check(self, shape: tuple[int, int]) -> None:
        """Raise InputError if these sizes do not fit layers of this shape."""
        for name in ("rank", "bank", "length", "topk"):
            at_least(name, getattr(self, name), 1)
        b, a = shape
        if b % self.length or a % self.length:
            raise InputError(
                f"length {self.length} does not divide the layers of {b} x {a}; give a divisor of {math.gcd(b, a)}",
                "length",
            )
        if self.bank < self.topk:
            raise InputError(f"topk {self.topk} exceeds the {self.bank} vectors of the bank", "topk")


def fit_vb_lora(
    stack: LayerStack, rank: int, bank: int, length: int, topk: int = 2, seed: int = 0, max_iterations: int = 150
) -> Fit:
    """Minimise sum_i ||M_i - B_i A_i||_F^2 with all sub-vectors of the factors from one bank. Li et al., NeurIPS 2024.

    As in the paper, the rows of A_i (r, a) and the columns of B_i (b, r) are cut into sub-vectors of length s. Each is
    the softmax-weighted sum of K of the h vectors of the bank, which all layers share. Stored are the bank, h s
    parameters, and for each of the n = L r (a + b) / s sub-vectors K indices and K - 1 weights, which add up to one.

    Unlike in the paper, the choice of vectors is made once. LoRA's optimum is clustered by k-means, and every
    sub-vector gets K of the means one after the other, each with its best weight beside those before. Then L-BFGS
    lowers the error of the updates over bank and weights together; it never rises.

    Arguments:
        stack: the layers M_i, (L, b, a).
        rank: r, from 1 to min(b, a).
        bank: h, the number of vectors.
        length: s, a divisor of b and a.
        topk: K, from 1 to h.
        seed: seed of the k-means.
        max_iterations: the largest number of L-BFGS iterations, at least 1.

    Returns:
        A `Fit` with the best solution.

    Raises:
        InputError: an argument is out of its range.
    """
    sizes = _Sizes(rank, bank, length, topk)
    sizes.check(stack.shape)
    at_least("max_iterations", max_iterations, 1)
    unit = stack.unit()
    solution, history = _lowered(unit, _initial_bank(unit, sizes, seed), rank, max_iterations)
    B, A = _factors(solution.sub_vectors(), unit, rank)
    weights = solution.logits.softmax(1)[:, : topk - 1]
    return measured(
        stack,
        "vb_lora",
        {"rank": rank, "bank": bank, "length": length, "topk": topk},
        Evidence.BEST_FOUND,
        UnitFit(
            lambda i: B[i] @ A[i],
            (solution.vectors, weights),
            rank,
            indices=solution.indices.numel(),
            history=history,
        ),
    )


def _factors(sub_vectors: Tensor, unit: LayerStack, r: int) -> tuple[Tensor, Tensor]:
    """The sub-vectors put together: B (L, b, r), column by column, and A (L, r, a), row by row."""
    L, (b, a) = unit.layers, unit.shape
    flat = sub_vectors.flatten()
    return flat[: L * r * b].reshape(L, r, b).mT, flat[L * r * b :].reshape(L, r, a)


def _initial_bank(unit: LayerStack, sizes: _Sizes, seed: int) -> Bank:
    """A bank fitted to the sub-vectors of LoRA's optimum, with b_j and a_j of equal norm."""
    lora = solve_lora(unit, sizes.rank).factors.to(torch.float64)
    B, A = balanced(lora.B, lora.A)
    points = torch.cat([B.mT.flatten(), A.flatten()]).reshape(-1, sizes.length)
    order = seeded(unit, seed, len(points)).argsort()
    centres = points[order[torch.arange(sizes.bank, device=points.device) % len(points)]]
    return choose_vectors(points, cluster_means(points, centres), sizes.topk)


def _lowered(unit: LayerStack, start: Bank, r: int, iterations: int) -> tuple[Bank, tuple[float, ...]]:
    """The bank after L-BFGS on vectors and logits together, their choice fixed, and the error of every iterate."""
    norm = unit.norm_squared
    if norm == 0:
        return start._replace(vectors=torch.zeros_like(start.vectors)), (0.0,)
    objective = _Objective(unit, start, r)
    x0 = objective.pack(start)
    history = [max(objective(x0)[0], 0.0) * norm]

    def record(intermediate_result: OptimizeResult) -> None:  # scipy goes by the name of this argument
        history.append(max(float(intermediate_result.fun), 0.0) * norm)

    # ftol: a step that gains less than 1e-8 of ||M||^2 is the last.
    options = {"maxiter": iterations, "maxcor": 20, "ftol": 1e-8, "gtol": 1e-10}
    result = minimize(objective, x0, jac=True, method="L-BFGS-B", options=options, callback=record)
    return objective.unpack(result.x), tuple(history)


class _Objective:
    """||M - B A||^2 / ||M||^2 and its gradient, as a function of one flat array of vectors and logits.

    L-BFGS has one scale for all variables at first. The logits are of order 1, so the vectors are divided by the
    root mean square of the initial ones.
    """

    def __init__(self, unit: LayerStack, start: Bank, rank: int) -> None:
        self._unit, self._start, self._rank = unit, start, rank
        self._scale = float(start.vectors.square().mean().sqrt())

    def pack(self, bank: Bank) -> NDArray[np.float64]:
        """Vectors and logits as one flat array."""
        flat = torch.cat([bank.vectors.flatten() / self._scale, bank.logits.flatten()])
        return flat.cpu().numpy()

    def unpack(self, x: NDArray[np.float64]) -> Bank:
        """The bank of a flat array."""
        vectors, indices, logits = self._start
        flat, n = torch.from_numpy(x).to(self._unit.device), vectors.numel()
        return Bank(flat[:n].reshape(vectors.shape) * self._scale, indices, flat[n:].reshape(logits.shape))

    def __call__(self, x: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        """Value and gradient.

        The gradient with respect to the factors is written out, 2 (B A - M) A^T and 2 B^T (B A - M), since M is only
        read through thin products. From the factors to vectors and logits it is autograd's.
        """
        unit, norm = self._unit, self._unit.norm_squared
        bank = self.unpack(x)
        vectors, logits = bank.vectors.clone().requires_grad_(), bank.logits.clone().requires_grad_()
        B, A = _factors(Bank(vectors, bank.indices, logits).sub_vectors(), unit, self._rank)
        with torch.no_grad():
            MA, MB = right(unit, A.mT), left(unit, B)
            AA, BB = A @ A.mT, B.mT @ B
            error = norm - 2 * float((B * MA).sum()) + float((BB * AA).sum())
            gradients = 2 * (B @ AA - MA) / norm, 2 * (BB @ A - MB.mT) / norm
        by_vectors, by_logits = torch.autograd.grad([B, A], [vectors, logits], gradients)
        gradient = torch.cat([by_vectors.flatten() * self._scale, by_logits.flatten()])
        return error / norm, gradient.cpu().numpy()


def _parameters(layers: int, shape: tuple[int, int], rank: int, bank: int, length: int, topk: int) -> int:
    sub_vectors = layers * rank * sum(shape) // length
    return bank * length + sub_vectors * (2 * topk - 1)


def _configurations(stack: LayerStack, limit: int) -> list[Settings]:
    """The rank that LoRA has within `limit`, and twice that; K = 2, and the largest bank that the rest pays for."""
    L, (b, a) = stack.layers, stack.shape
    length = max(n for n in range(1, LENGTH + 1) if b % n == 0 and a % n == 0)
    lora_rank = limit // (L * (a + b))
    configurations: list[Settings] = []
    for rank in sorted({min(max(lora_rank, 1), b, a), min(max(2 * lora_rank, 1), b, a)}):
        count = functools.partial(_parameters, L, (b, a), rank, length=length, topk=2)
        bank = largest(count, limit, L * rank * (a + b) // length)
        if bank >= 2:
            configurations.append({"rank": rank, "bank": bank, "length": length, "topk": 2})
    return configurations


VB_LORA = Method("vb_lora", "VB-LoRA", fit_vb_lora, _parameters, _configurations)
