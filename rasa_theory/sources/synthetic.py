"""Stacks made to measure: a given spectrum and overlap between layers, or factors planted in noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rasa_theory.common import InputError, at_least
from rasa_theory.problem import LayerStack, RankBudget, RasaFactors


def synthetic_stack(
    layers: int = 6,
    shape: tuple[int, int] = (384, 384),
    spectrum: str = "power:0.7",
    overlap: float = 0.0,
    seed: int = 0,
) -> LayerStack:
    """Layers M_i = U_i diag(sigma) V_i^T, (L, b, a) in float64, all of the same spectrum.

    `spectrum` is `flat` (sigma_j = 1), `power:P` (j^-P) or `exp:C` (exp(-C (j - 1))), j = 1..min(b, a). U_i and V_i are
    sqrt(overlap) G + sqrt(1 - overlap) G_i orthonormalised, G Gaussian and common to all layers, G_i the layer's own:
    independent bases at 0, the same ones at 1. Raises InputError for values out of range.
    """
    check_synthetic(layers, shape, spectrum, overlap, seed)
    generator = torch.Generator().manual_seed(seed)
    b, a = shape
    sigma = singular_values(spectrum, min(b, a))
    U, V = (_bases(layers, n, min(b, a), overlap, generator) for n in (b, a))
    return LayerStack((U * sigma) @ V.mT, "synthetic")


def check_synthetic(layers: int, shape: tuple[int, int], spectrum: str, overlap: float, seed: int) -> None:
    """Raise InputError for arguments that `synthetic_stack` would refuse; nothing is made."""
    _generator(layers, shape, seed)
    if not 0 <= overlap <= 1:
        raise InputError(f"overlap must lie between 0 and 1, got {overlap}", "overlap")
    singular_values(spectrum, 1)


def planted_stack(
    layers: int, shape: tuple[int, int], budget: RankBudget, noise: float = 0.0, seed: int = 0
) -> tuple[LayerStack, RasaFactors]:
    """A stack that RaSA of `budget` reconstructs to the noise, and the factors that do: (L, b, a) in float64.

    The factors have standard Gaussian entries; the Gaussian noise has norm `noise` times that of the clean stack, so
    their squared error is noise^2 ||clean||^2. With the same seed the clean stack is the same whatever the noise.
    Raises InputError for values out of range, also if r exceeds min(b, a).
    """
    generator = _generator(layers, shape, seed)
    if not 0 <= noise < math.inf:
        raise InputError(f"noise must be finite and not negative, got {noise}")
    (b, a), q, R = shape, budget.private_rank, budget.pool_rank(layers)
    if budget.rank > min(b, a):
        raise InputError(f"rank {budget.rank} exceeds min(b, a) = {min(b, a)} of shape {b} x {a}; lower the rank")
    factors = RasaFactors(
        private_B=_gaussian(generator, layers, b, q),
        private_A=_gaussian(generator, layers, q, a),
        shared_B=_gaussian(generator, b, R),
        shared_A=_gaussian(generator, R, a),
        mixing=_gaussian(generator, layers, R),
    )
    clean = torch.stack([factors.update(i) for i in range(layers)])
    error = _gaussian(generator, layers, b, a)
    return LayerStack(clean + error * (noise * clean.norm() / error.norm()), "planted"), factors


def singular_values(spectrum: str, count: int) -> Tensor:
    """sigma_1 .. sigma_count, (count,), of a spectrum by name. Raises InputError with the three forms there are."""
    kind, colon, number = spectrum.partition(":")
    try:
        decay = float(number) if colon else 0.0
    except ValueError:
        decay = math.nan
    if kind not in ("flat", "power", "exp") or (kind == "flat") == bool(colon) or not 0 <= decay < math.inf:
        raise InputError(
            f"spectrum {spectrum!r} is not flat, power:P or exp:C with a finite number that is not negative, "
            "such as power:0.7",
            "spectrum",
        )
    j = torch.arange(1, count + 1, dtype=torch.float64)
    return torch.exp(-decay * (j - 1)) if kind == "exp" else j**-decay


def _generator(layers: int, shape: tuple[int, int], seed: int) -> torch.Generator:
    """The seeded generator, after the checks that both kinds of stack need."""
    at_least("layers", layers, 1)
    if len(shape) != 2 or min(shape) < 1:
        raise InputError(f"shape must be two numbers B,A of at least 1, got {tuple(shape)}", "shape")
    if max(layers, *shape) >= 2**63:
        raise InputError(f"layers and shape must be below 2^63, got {layers} and {tuple(shape)}", "layers")
    if not 0 <= seed < 2**63:
        raise InputError(f"seed must lie between 0 and 2^63 - 1, got {seed}", "seed")
    return torch.Generator().manual_seed(seed)


def _gaussian(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _bases(layers: int, n: int, m: int, overlap: float, generator: torch.Generator) -> Tensor:
    """(L, n, m), orthonormal columns. The signs make them depend continuously on the overlap, as R's diagonal > 0."""
    common = _gaussian(generator, n, m)
    own = _gaussian(generator, layers, n, m)
    Q, R = torch.linalg.qr(math.sqrt(overlap) * common + math.sqrt(1 - overlap) * own)
    signs = torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    return torch.mul(Q, signs.unsqueeze(-2))
