"""Synthetic stacks: a prescribed spectrum and overlap between layers, or factors planted in noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rasa_theory import linalg
from rasa_theory.common import InputError, at_least, whole_number
from rasa_theory.distributed import ALONE, LayerSharding, Processes
from rasa_theory.problem import LayerStack, RankBudget, RasaFactors
from rasa_theory.sources.catalogue import Catalogue, StackSource


def synthetic_stack(
    layers: int = 6,
    shape: tuple[int, int] = (384, 384),
    spectrum: str = "power:0.7",
    overlap: float = 0.0,
    seed: int = 0,
) -> LayerStack:
    """Layers M_i = U_i diag(sigma) V_i^T, (L, b, a) in float64, all of the same spectrum.

    `spectrum` is `flat` (sigma_j = 1), `power:P` (j^-P) or `exp:C` (exp(-C (j - 1))), j = 1..min(b, a). U_i and V_i are
    sqrt(overlap) G + sqrt(1 - overlap) G_i, orthonormalised. G is Gaussian and common to all layers, G_i is the
    layer's own: overlap 0 gives independent bases, 1 equal ones. Raises InputError for values out of range.
    """
    check_synthetic(layers, shape, spectrum, overlap, seed)
    generator = seeded_generator(seed)
    b, a = shape
    sigma = singular_values(spectrum, min(b, a))
    U, V = (_bases(layers, n, min(b, a), overlap, generator) for n in (b, a))
    return LayerStack((U * sigma) @ V.mT, "synthetic")


def check_synthetic(layers: int, shape: tuple[int, int], spectrum: str, overlap: float, seed: int) -> None:
    """Raise InputError for arguments that `synthetic_stack` would refuse, without making a stack."""
    _check_size(layers, shape)
    check_seed(seed)
    if not 0 <= overlap <= 1:
        raise InputError(f"overlap must lie between 0 and 1, got {overlap}", "overlap")
    singular_values(spectrum, 1)


def power_law_stack(
    layers: int,
    shape: tuple[int, int],
    overlap: float = 0.5,
    decay: float = 0.7,
    seed: int = 0,
    device: torch.device | None = None,
) -> LayerStack:
    """Draw a large float32 stack on its device, without an SVD or QR of a full matrix.

    M_i = c_i (U_i diag(s) V_i^T + G_i). The norms c_i rise from 0.5 in the first layer to 1.5 in the last. The spectrum
    is s_j = j^-decay for j <= p = min(512, min(b, a) / 4). U_i and V_i overlap as in `synthetic_stack`. G_i is Gaussian
    with norm about s_p, so that the tail goes on where the power law ends. The numbers depend on the kind of device.
    """
    check_synthetic(layers, shape, f"power:{decay}", overlap, seed)
    b, a = shape
    generator = torch.Generator(device or "cpu").manual_seed(seed)
    p = max(1, min(512, min(b, a) // 4))
    s = torch.arange(1, p + 1, device=device, dtype=torch.float32) ** -decay
    common = [torch.randn(n, p, generator=generator, device=device) for n in (b, a)]
    M = torch.empty(layers, b, a, device=device, dtype=torch.float32)
    for i in range(layers):
        U, V = (
            torch.linalg.qr(
                math.sqrt(overlap) * G
                + math.sqrt(1 - overlap) * torch.randn(G.shape, generator=generator, device=device)
            ).Q
            for G in common
        )
        M[i].normal_(generator=generator).mul_(s[-1] / (math.sqrt(b) + math.sqrt(a)))
        M[i].addmm_(U * s, V.mT).mul_(0.5 + i / max(layers - 1, 1))
    return LayerStack(M, f"power:{decay} of rank {p} in a Gaussian tail")


def synthetic_catalogue(layers: int, shape: tuple[int, int], spectrum: str, overlap: float, seed: int) -> Catalogue:
    """A source of one stack, `synthetic_stack`, made when it is loaded. Raises InputError as `check_synthetic` does.

    Random bases depend on all of their layers, so every process makes the whole stack and keeps its own layers.
    """
    check_synthetic(layers, shape, spectrum, overlap, seed)

    def make(
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        processes: Processes = ALONE,
        tf32: bool = False,
    ) -> LayerStack:
        sharding = LayerSharding.of(layers, processes)
        with processes.raise_together():
            stack = synthetic_stack(layers, shape, spectrum, overlap, seed)
        return LayerStack(stack.values[sharding.local], "synthetic", dtype, device, sharding=sharding, tf32=tf32)

    return Catalogue("synthetic", [StackSource("synthetic", layers, shape, make)], [])


def planted_stack(
    layers: int, shape: tuple[int, int], budget: RankBudget, noise: float = 0.0, seed: int = 0
) -> tuple[LayerStack, RasaFactors]:
    """A stack (L, b, a) in float64 that RaSA of `budget` reconstructs to the noise, and the factors that do so.

    The factors have standard Gaussian entries. The Gaussian noise has norm `noise` times ||clean||, so the squared
    error of the factors is noise^2 ||clean||^2. The clean stack depends on the seed and not on the noise.
    Raises InputError for values out of range, also if r exceeds min(b, a).
    """
    _check_size(layers, shape)
    generator = seeded_generator(seed)
    if not 0 <= noise < math.inf:
        raise InputError(f"noise must be finite and not negative, got {noise}")
    (b, a), q, R = shape, budget.private_rank, budget.pool_rank(layers)
    if budget.rank > min(b, a):
        raise InputError(f"rank {budget.rank} exceeds min(b, a) = {min(b, a)} of shape {b} x {a}; lower the rank")
    factors = RasaFactors(
        private_B=gaussian(generator, layers, b, q),
        private_A=gaussian(generator, layers, q, a),
        shared_B=gaussian(generator, b, R),
        shared_A=gaussian(generator, R, a),
        mixing=gaussian(generator, layers, R),
    )
    clean = torch.stack([factors.update(i) for i in range(layers)])
    error = gaussian(generator, layers, b, a)
    return LayerStack(clean + error * (noise * clean.norm() / error.norm()), "planted"), factors


def singular_values(spectrum: str, count: int) -> Tensor:
    """sigma_1 .. sigma_count, (count,), of a spectrum by name. Raises InputError, naming the three forms."""
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


def check_seed(seed: int) -> int:
    """Return the seed as an int. Raises InputError for a seed that torch cannot take."""
    number = whole_number("seed", seed)
    if not 0 <= number < 2**63:
        raise InputError(f"seed must lie between 0 and 2^63 - 1, got {number}", "seed")
    return number


def seeded_generator(seed: int) -> torch.Generator:
    """A generator on the CPU. Raises InputError for a seed that torch cannot take."""
    return torch.Generator().manual_seed(check_seed(seed))


def gaussian(generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal entries in float64."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _check_size(layers: int, shape: tuple[int, int]) -> None:
    at_least("layers", layers, 1)
    if len(shape) != 2 or min(shape) < 1:
        raise InputError(f"shape must be two numbers B,A of at least 1, got {tuple(shape)}", "shape")
    if max(layers, *shape) >= 2**63:
        raise InputError(f"layers and shape must be below 2^63, got {layers} and {tuple(shape)}", "layers")


def _bases(layers: int, n: int, m: int, overlap: float, generator: torch.Generator) -> Tensor:
    """Orthonormal columns (L, n, m).

    QR fixes a column only up to its sign. The sign that makes the diagonal of R positive lets the bases depend
    continuously on the overlap.
    """
    common = gaussian(generator, n, m)
    own = gaussian(generator, layers, n, m)
    Q, R = linalg.thin_qr(math.sqrt(overlap) * common + math.sqrt(1 - overlap) * own)
    signs = torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    return torch.mul(Q, signs.unsqueeze(-2))
