"""Numerical ranks of singular values: stable rank, entropy rank, and the ranks that hold a share of the energy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rasa_theory import linalg
from rasa_theory.common import InputError
from rasa_theory.problem.stack import LayerStack

SHARES = (0.5, 0.9, 0.99)


@dataclass(frozen=True)
class SpectralRanks:
    """Numerical ranks of every layer, from the shares p_j = sigma_j^2 / sum_j sigma_j^2 of its energy.

    All are 0 for a layer of zeros. They do not change when a layer is multiplied by a constant.

    Attributes:
        stable: sum_j sigma_j^2 / sigma_1^2 = 1 / p_1, (L,) in float64 (Rudelson and Vershynin, J. ACM 54, 2007).
        entropy: exp(-sum_j p_j log p_j), (L,) in float64; n for n equal singular values (Roy and Vetterli, EUSIPCO
            2007, with energies in place of singular values).
        energy: the least n with p_1 + .. + p_n >= share, (L, S) in int64: a column for each of `shares`.
        shares: the shares of the energy, (S,), each above 0 and at most 1.
    """

    stable: Tensor
    entropy: Tensor
    energy: Tensor
    shares: tuple[float, ...]


def spectral_ranks(spectrum: LayerStack | Tensor, shares: Sequence[float] = SHARES) -> SpectralRanks:
    """Measure how many singular directions every layer uses.

    Arguments:
        spectrum: a stack, or singular values in falling order, (L, m) or (m,) for one layer.
        shares: shares of the energy, each above 0 and at most 1.

    Returns:
        The ranks of all L layers, on the CPU; the same in all processes.

    Raises:
        InputError: the singular values have another number of axes, or are not finite, at least 0 and falling, or a
            share is out of range.
    """
    for share in shares:
        if not 0 < share <= 1:
            raise InputError(f"a share of the energy must be above 0 and at most 1, got {share}", "shares")
    sigma = _checked(spectrum.spectra.singular_values() if isinstance(spectrum, LayerStack) else spectrum)
    largest = sigma[:, :1]
    unit = sigma / largest.where(largest > 0, 1.0)  # squares of 1e-200 and 1e200 leave the range
    ranks = [_layer_ranks(energy, shares) for energy in (unit**2).cpu()]
    stable, entropy = (torch.tensor([r[n] for r in ranks], dtype=torch.float64) for n in range(2))
    counts = torch.tensor([r[2] for r in ranks], dtype=torch.int64).reshape(len(ranks), len(shares))
    return SpectralRanks(stable, entropy, counts, tuple(shares))


def _checked(sigma: Tensor) -> Tensor:
    """Singular values as (L, m) in float64."""
    if sigma.ndim not in (1, 2) or sigma.shape[-1] == 0:
        raise InputError(f"singular values need shape (L, m) or (m,), found {tuple(sigma.shape)}", "spectrum")
    values = sigma.reshape(-1, sigma.shape[-1]).double()
    if not bool(torch.isfinite(values).all() & (values >= 0).all() & (values.diff(dim=1) <= 0).all()):
        raise InputError("singular values must be finite, at least 0 and falling along each layer", "spectrum")
    return values


def _layer_ranks(energy: Tensor, shares: Sequence[float]) -> tuple[float, float, list[int]]:
    """Stable rank, entropy rank and energy ranks from sigma_j^2 of one layer, falling, (m,)."""
    total = float(energy.sum())
    if total == 0:
        return 0.0, 0.0, [0] * len(shares)
    p, cumulative = energy / total, torch.cumsum(energy, 0) / total
    entropy = -float(torch.special.xlogy(p, p).sum())
    return total / float(energy[0]), math.exp(entropy), [linalg.terms_reaching(cumulative, s) for s in shares]
