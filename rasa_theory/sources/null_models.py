"""Null models of sharing: stacks with prescribed singular values, and a prescribed amount in common between layers.

A gain of RaSA on real updates means that the layers share directions only if it disappears in `turned_apart`.
`with_common_bases` and `with_hidden_dyads` are the opposite controls: the sharing is there, so a solver must find it.
All functions draw from a seeded generator on the CPU, in float64: the same seed gives the same stack on every device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rasa_theory import linalg
from rasa_theory.common import InputError, at_least, one_of, real_number
from rasa_theory.problem import Factored, LayerStack, LoraFactors, RankOneTerms, balanced
from rasa_theory.sources.synthetic import gaussian, seeded_generator

__all__ = [
    "BASES", "hidden_dyads", "random_loras", "resized", "turned_apart", "with_common_bases", "with_hidden_dyads",
]  # fmt: skip

BASES = ("independent", "half common", "one side common", "one side equal")
"""The overlaps between layers that `resized` can make."""
_ANISOTROPY = 0.75
"""Row variances j^-0.75 of "one side common", chosen by trial.

The rows of the layers then have a mean projector like those of the bundled query updates.
"""
_SPREAD = 0.2  # relative standard deviation of a hidden dyad's size over the layers


def turned_apart(stack: LayerStack, seed: int = 0) -> LayerStack:
    """Turn the singular bases of every layer at random: U_i M_i V_i, with U_i and V_i independent and orthogonal.

    This is the permutation test of sharing. Singular values stay, and with them e_lora and the allocation bound; the
    directions that layers have in common are lost, except by chance. A gain that stays comes from unequal ranks alone.

    Arguments:
        stack: L layers (b, a).
        seed: seed of the rotations.

    Returns:
        A dense `LayerStack` (L, b, a) of the same name, dtype and device, with the same singular values.

    Raises:
        InputError: the stack is sharded over several processes, or the seed is out of range.
    """
    values, L, (b, a) = _values_of(stack), stack.layers, stack.shape
    generator = seeded_generator(seed)
    U = linalg.thin_qr(gaussian(generator, L, b, b))[0]
    V = linalg.thin_qr(gaussian(generator, L, a, a))[0]
    return LayerStack(U.to(values) @ values @ V.to(values), stack.name)


def with_common_bases(stack: LayerStack, seed: int = 0) -> LayerStack:
    """Give all layers the same singular vectors: U diag(+-sigma_i) V^T, with random signs.

    Singular values stay, and with them e_lora; every dyad is there in all layers, so that one pool can serve all.

    Arguments:
        stack: L layers (b, a) with singular values sigma_i (L, min(b, a)).
        seed: seed of U (b, min(b, a)), V (a, min(b, a)) and the signs.

    Returns:
        A dense `LayerStack` (L, b, a) of the same name in float64, with the same singular values.

    Raises:
        InputError: the stack is sharded over several processes, or the seed is out of range.
    """
    _check_whole(stack)
    S = stack.spectra.svd().S.cpu()
    generator = seeded_generator(seed)
    U, V = (linalg.thin_qr(gaussian(generator, n, S.shape[1]))[0] for n in stack.shape)
    signs = gaussian(generator, *S.shape).sign()
    return LayerStack((U * (S * signs)[:, None]) @ V.mT, stack.name, device=stack.device)


def with_hidden_dyads(stack: LayerStack, rank: int, count: int = 3, size: float = 0.8, seed: int = 0) -> LayerStack:
    """Add a few dyads u_j v_j^T that all layers share, a little too small for LoRA of rank `rank` to see.

    Their size lies below the mean sigma_{rank+1}. A start that looks at each layer alone misses them; a pool that
    finds them gains from all layers at once. The defaults were chosen by trial: sweeps from the allocation start then
    miss some of them on the bundled updates at rank 8.

    Arguments:
        stack: L layers (b, a).
        rank: LoRA's rank r, below min(b, a).
        count: number of dyads, at most min(b, a).
        size: mean size of a dyad, in units of the mean over layers of sigma_{rank+1}.
        seed: seed of the dyads. Their sign in a layer is random, their size there varies by 20 %.

    Returns:
        A dense `LayerStack` (L, b, a) of the same name, dtype and device.

    Raises:
        InputError: a number is out of range, or the stack is sharded over several processes.
    """
    values, dyads = _values_of(stack), hidden_dyads(stack, rank, count, size, seed)
    return LayerStack(values + ((dyads.B * dyads.D[:, None]) @ dyads.A).to(values), stack.name)


def hidden_dyads(stack: LayerStack, rank: int, count: int = 3, size: float = 0.8, seed: int = 0) -> RankOneTerms:
    """The dyads that `with_hidden_dyads` adds to a stack: B (b, count), A (count, a) and their sizes D (L, count).

    Arguments and errors are those of `with_hidden_dyads`. Columns of B and rows of A are orthonormal.
    """
    _check_whole(stack)
    L, (b, a) = stack.layers, stack.shape
    r, m = at_least("rank", rank, 0), at_least("count", count, 1)
    if r >= min(b, a):
        raise InputError(f"rank must be below min(b, a) = {min(b, a)}, got {r}", "rank")
    if m > min(b, a):
        raise InputError(f"count must be at most min(b, a) = {min(b, a)}, got {m}", "count")
    if not 0 <= real_number("size", size) < math.inf:
        raise InputError(f"size must be finite and not negative, got {size}", "size")
    generator = seeded_generator(seed)
    U, V = (linalg.thin_qr(gaussian(generator, n, m))[0] for n in (b, a))
    signs = gaussian(generator, L, m).sign()
    unit = float(stack.spectra.svd().S[:, r].mean())
    return RankOneTerms(U, V.mT, size * unit * signs * (1 + _SPREAD * gaussian(generator, L, m)))


def resized(
    stack: LayerStack, layers: int, width: int, count: int, bases: str = "independent", seed: int = 0
) -> LayerStack:
    """Make a stack of any depth and width with the singular values of `stack`.

    log sigma_ij is interpolated linearly between the layers of `stack`, norms included, so that first and last layers
    agree. Use it to see how a result depends on L, b and a at a fixed spectrum and a known overlap:

    - "independent": independent random bases.
    - "half common": sqrt(1/2) of a common normal matrix plus sqrt(1/2) of the layer's own, orthonormalised, both sides.
    - "one side common": independent U_i; V_i of normal matrices with variances j^-0.75 in common directions.
    - "one side equal": independent U_i; the same V_i for all layers.

    Arguments:
        stack: the stack that provides the singular values.
        layers: L of the new stack.
        width: b = a of the new stack.
        count: number of leading singular values, at most `width`. It is the rank of the layers.
        bases: the overlap between layers, one of `BASES`, see above.
        seed: seed of the bases.

    Returns:
        A dense `LayerStack` (layers, width, width) in float64, with the name "L = " and its layers.

    Raises:
        InputError: a number is out of range, `bases` is unknown, or the stack is sharded.
    """
    _check_whole(stack)
    one_of("bases", bases, BASES)
    L, n = at_least("layers", layers, 1), at_least("width", width, 1)
    logs = stack.spectra.svd().S[:, : at_least("count", count, 1)].cpu().clamp_min(1e-300).log()
    m = logs.shape[1]
    if m > n:
        raise InputError(f"count must be at most width = {n}, got {m}", "count")
    generator = seeded_generator(seed)
    common_U, common_V = gaussian(generator, 2, 1, n, m)
    U, V = gaussian(generator, 2, L, n, m)
    if bases == "half common":
        U, V = 0.5**0.5 * (U + common_U), 0.5**0.5 * (V + common_V)
    elif bases == "one side common":
        V = torch.arange(1, n + 1, dtype=torch.float64)[:, None] ** (-_ANISOTROPY / 2) * V
    elif bases == "one side equal":
        V = V[:1].expand(L, -1, -1)
    U, V = linalg.thin_qr(U)[0], linalg.thin_qr(V)[0]
    return LayerStack((U * _interpolated(logs, L).exp()[:, None]) @ V.mT, f"L = {L}")


def random_loras(factors: LoraFactors, seed: int = 0) -> LoraFactors:
    """Draw LoRAs with the same singular values as `factors`, each in singular vectors of its own.

    They have nothing in common but by chance: the control for methods that compress several LoRAs together.

    Arguments:
        factors: updates B_i A_i of rank r, B (L, b, r) and A (L, r, a).
        seed: seed of the singular vectors.

    Returns:
        `LoraFactors` in float64 of the same shapes; each term has columns of B and rows of A of equal norm.

    Raises:
        InputError: the factors are sharded over several processes, or the seed is out of range.
    """
    stack = LayerStack(Factored(factors.B, factors.A), "random", sharding=factors.sharding)
    _check_whole(stack)
    L, (b, a), r = stack.layers, stack.shape, factors.B.shape[2]
    if r > min(b, a):
        raise InputError(f"rank {r} of the factors exceeds min(b, a) = {min(b, a)}; drop the terms that are dependent")
    sigma = stack.spectra.singular_values()[:, :r].cpu()
    generator = seeded_generator(seed)
    U, V = (linalg.thin_qr(gaussian(generator, L, n, r))[0] for n in (b, a))
    return LoraFactors(*balanced(U * sigma[:, None], V.mT))


def _interpolated(logs: Tensor, layers: int) -> Tensor:
    """Rows of `logs` (n, m) at `layers` equal steps from the first row to the last, (layers, m)."""
    at = torch.linspace(0, len(logs) - 1, layers, dtype=torch.float64)
    low = at.floor().long().clamp_max(len(logs) - 2)  # -1, the only row itself, where there is one
    return torch.lerp(logs[low], logs[low + 1], (at - low)[:, None])


def _values_of(stack: LayerStack) -> Tensor:
    _check_whole(stack)
    return stack.values


def _check_whole(stack: LayerStack) -> None:
    if not stack.sharding.alone:
        raise InputError(f"stack {stack.name!r} is sharded; make null models of a stack that one process holds")
