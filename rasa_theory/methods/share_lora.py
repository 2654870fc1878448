"""ShareLoRA: A, B, or both shared by all layers (arXiv 2406.10785)."""

from __future__ import annotations

import torch

from rasa_theory import linalg
from rasa_theory.common import at_least, one_of
from rasa_theory.methods.access import right
from rasa_theory.methods.fit import Evidence, Fit, Found, Method, fitted
from rasa_theory.methods.settings import Settings, at_most, largest
from rasa_theory.problem import LayerStack

SHARED = ("A", "B", "both")


def fit_share_lora(stack: LayerStack, rank: int, shared: str = "A") -> Fit:
    """min sum_i ||M_i - B_i A||_F^2, or B A_i, or B A: ShareLoRA (Song et al., 2024).

    - shared "A": A (r, a) holds the top r eigenvectors of sum_i M_i^T M_i, B_i = M_i A^T (b, r): the truncated SVD of
      the layers below each other. r a + L b r parameters.
    - "B": the same of the transposed layers. r b + L a r.
    - "both": sum_i ||M_i - X||^2 = L ||mean - X||^2 + sum_i ||M_i - mean||^2, so X = B A is the truncated SVD of the
      mean. r (a + b).

    All closed forms. Raises InputError unless 1 <= rank <= min(b, a), with shared "A" min(L b, a), "B" min(b, L a).
    """
    at_least("rank", rank, 1)
    one_of("shared", shared, SHARED)
    at_most("rank", rank, _most(stack, shared), stack)
    found = _both(stack.unit(), rank) if shared == "both" else _one(stack.unit(), rank, shared)
    return fitted(stack, "share_lora", {"rank": rank, "shared": shared}, Evidence.CLOSED_FORM, found)


def _one(unit: LayerStack, rank: int, shared: str) -> Found:
    view = unit if shared == "A" else unit.transpose()
    A = linalg.leading_eigenpairs(view.transpose().spectra.gram(), rank)[1].mT  # (r, a)
    B = right(view, A.mT)  # (L, b, r)
    return Found(lambda i: B[i] @ A if shared == "A" else (B[i] @ A).mT, (B, A), rank)


def _both(unit: LayerStack, rank: int) -> Found:
    mean = torch.zeros(unit.shape, dtype=torch.float64, device=unit.device)
    for tile in unit.tiles():
        mean[tile.rows] += tile.values.double() / unit.layers
    U, S, Vh = linalg.svd(mean)
    B, A = U[:, :rank] * S[:rank], Vh[:rank]
    return Found(lambda i: B @ A, (B, A), rank)


def _most(stack: LayerStack, shared: str) -> int:
    L, (b, a) = stack.layers, stack.shape
    return {"A": min(L * b, a), "B": min(b, L * a), "both": min(b, a)}[shared]


def _configurations(stack: LayerStack, parameters: int) -> list[Settings]:
    L, (b, a) = stack.layers, stack.shape
    costs = {"A": a + L * b, "B": b + L * a, "both": a + b}
    ranks = {s: largest(lambda r, s=s: r * costs[s], parameters, _most(stack, s)) for s in SHARED}  # type: ignore[misc]
    return [{"rank": rank, "shared": s} for s, rank in ranks.items() if rank]


SHARE_LORA = Method(fit_share_lora, _configurations)
