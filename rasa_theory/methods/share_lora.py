"""ShareLoRA: A, B, or both shared by all layers (arXiv 2406.10785)."""

from __future__ import annotations

import functools

import torch

from rasa_theory import linalg
from rasa_theory.common import at_least, one_of
from rasa_theory.methods.fit import Evidence, Fit, Settings, UnitFit, measured
from rasa_theory.methods.method import Method, at_most, largest
from rasa_theory.methods.products import right, unit_of
from rasa_theory.problem import LayerStack

SHARED = ("A", "B", "both")


def fit_share_lora(stack: LayerStack, rank: int, shared: str = "A") -> Fit:
    """Minimise sum_i ||M_i - B_i A||_F^2, or B A_i, or B A: ShareLoRA (Song et al., 2024).

    - shared "A": A (r, a) holds the top r eigenvectors of sum_i M_i^T M_i, and B_i = M_i A^T (b, r). This is the
      truncated SVD of the layers stacked below each other. r a + L b r parameters.
    - shared "B": the same for the transposed layers. r b + L a r parameters.
    - shared "both": sum_i ||M_i - X||^2 = L ||mean - X||^2 + sum_i ||M_i - mean||^2, so X = B A is the truncated SVD of
      the mean. r (a + b) parameters.

    Arguments:
        stack: the layers M_i, (L, b, a).
        rank: r, from 1 to min(L b, a) for "A", min(b, L a) for "B", and min(b, a) for "both".
        shared: the factor that all layers share, "A", "B" or "both".

    Returns:
        A `Fit` with the minimum, in closed form.

    Raises:
        InputError: an argument is out of its range.
    """
    at_least("rank", rank, 1)
    one_of("shared", shared, SHARED)
    at_most("rank", rank, _largest_rank(stack, shared), stack)
    unit = unit_of(stack, rank)
    solution = _with_both(unit, rank) if shared == "both" else _with_one(unit, rank, shared)
    return measured(stack, "share_lora", {"rank": rank, "shared": shared}, Evidence.CLOSED_FORM, solution)


def _with_one(unit: LayerStack, rank: int, shared: str) -> UnitFit:
    view = unit if shared == "A" else unit.transpose()
    A = view.transpose().spectra.common(rank).mT  # (r, a)
    B = right(view, A.mT)  # (L, b, r)
    return UnitFit(lambda i: B[i] @ A if shared == "A" else (B[i] @ A).mT, (B, A), rank)


def _with_both(unit: LayerStack, rank: int) -> UnitFit:
    mean = torch.zeros(unit.shape, dtype=torch.float64, device=unit.device)
    for tile in unit.tiles():
        mean[tile.rows] += tile.values.double() / unit.layers
    U, S, Vh = linalg.svd(mean)
    B, A = U[:, :rank] * S[:rank], Vh[:rank]
    return UnitFit(lambda i: B @ A, (B, A), rank)


def _largest_rank(stack: LayerStack, shared: str) -> int:
    L, (b, a) = stack.layers, stack.shape
    return {"A": min(L * b, a), "B": min(b, L * a), "both": min(b, a)}[shared]


def _parameters(layers: int, shape: tuple[int, int], rank: int, shared: str) -> int:
    b, a = shape
    return rank * {"A": a + layers * b, "B": b + layers * a, "both": a + b}[shared]


def _configurations(stack: LayerStack, limit: int) -> list[Settings]:
    configurations: list[Settings] = []
    for shared in SHARED:
        count = functools.partial(_parameters, stack.layers, stack.shape, shared=shared)
        rank = largest(count, limit, _largest_rank(stack, shared))
        if rank:
            configurations.append({"rank": rank, "shared": shared})
    return configurations


SHARE_LORA = Method("share_lora", "ShareLoRA", fit_share_lora, _parameters, _configurations)
