"""e_lora: the truncated SVD of every layer, or its leading part with a certified interval."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from rasa_theory import linalg
from rasa_theory.common import one_of
from rasa_theory.linalg import lanczos
from rasa_theory.problem import LayerStack, LoraFactors, RankBudget, check_memory

METHODS = ("auto", "exact", "fast")
WIDTH = 1e-6  # largest width of the interval of method "fast", in units of ||M_i||^2; else the SVD is computed
_EPS = float(torch.finfo(torch.float64).eps)
FAILURE = 1e-10  # largest probability that the interval of one call is wrong


@dataclass(frozen=True)
class LoraSolution:
    """The optimum of LoRA.

    Attributes:
        error: e_lora, squared, summed over layers, in units of the input (method "fast": the error of `factors`).
        interval: bounds on the exact e_lora, rounding included.
        layer_errors: the L summands of `error`.
        factors: B (L, b, r) with the singular values, A (L, r, a) with orthonormal rows. Terms are in order of falling
            size. With several processes these are the factors of the local layers.
    """

    error: float
    interval: tuple[float, float]
    layer_errors: list[float]
    factors: LoraFactors


def solve_lora(stack: LayerStack, rank: int, method: str = "auto", seed: int = 0) -> LoraSolution:
    """Compute e_lora = min sum_i ||M_i - B_i A_i||_F^2 = sum_i sum_{j>r} sigma_ij^2 (Eckart-Young), with the factors.

    - "auto": "exact" for small layers, else leading terms from products, which other work on the stack shares. They are
      certified as with "fast", see `LayerStack.with_spectra` for the rule. No layer of more than 1024 rows and columns
      falls back to its SVD. Where many singular values are as large as sigma_r, the interval is wider instead.
    - "exact": SVDs in float64, computed once per stack. The interval allows for `stack.rounding`. A view of a stack
      whose spectra are leading directions keeps to these.
    - "fast": leading parts by block Lanczos, certified (see `linalg.lanczos`), a layer at a time in one pass. `error`
      is measured before the factors are rounded to the dtype of the stack, so it is not below e_lora but for rounding.
      The interval is at most 1e-6 ||M||^2 wide. It holds the e_lora of the entries as they are, whatever their dtype,
      but for a probability of 1e-10 over the random vectors. Some layers fall back to their SVD: small ones, and those
      whose certificate takes too long, since many singular values are as large as sigma_r.

    Arguments:
        stack: the L updates M_i (b, a).
        rank: r, from 1 to min(b, a).
        method: "auto", "exact" or "fast".
        seed: seed of the random vectors of method "fast".

    Returns:
        The squared error, its interval and the factors.

    Raises:
        InputError: `rank` is not in 1 .. min(b, a), the method is unknown, or the memory limit of the stack is too low.
    """
    RankBudget(rank, 0).check_fits(stack)
    one_of("method", method, METHODS)
    if method == "auto" and not stack.spectra.is_leading:
        stack = stack.with_spectra("auto", RankBudget(rank, 0))
    with stack.suitable_threads():
        if stack.spectra.is_leading:
            return _from_leading(stack, rank)
        return _fast(stack, rank, seed) if method == "fast" else _exact(stack, rank)


def _exact(stack: LayerStack, rank: int) -> LoraSolution:
    U, S, Vh = stack.unit().spectra.svd()
    errors = [e * stack.scale**2 for e in stack.sharding.all_gather_floats(linalg.tail_energy(S, rank).tolist())]
    error = math.fsum(errors)
    interval = linalg.widened(error, stack.rounding)
    B = U[:, :, :rank] * (S[:, None, :rank] * stack.scale)
    factors = LoraFactors(B, Vh[:, :rank], sharding=stack.sharding).to(stack.dtype, stack.device)
    return LoraSolution(error, interval, errors, factors)


def _from_leading(stack: LayerStack, rank: int) -> LoraSolution:
    """The solution from the leading terms that other work on the stack uses as well."""
    unit, square = stack.unit(), stack.scale**2
    U, S, Vh = unit.spectra.leading(rank)
    norms = unit.layer_norms_squared
    captured = stack.sharding.all_gather_floats((S**2).sum(1).tolist())
    errors = [max(norm - x, 0.0) * square for norm, x in zip(norms, captured, strict=True)]
    most = unit.spectra.most_captured(rank)
    lows = [min(max(norm - x, 0.0) * square, error) for norm, x, error in zip(norms, most, errors, strict=True)]
    error = math.fsum(errors)
    interval = (
        math.fsum(lows),
        linalg.widened(error, linalg.rounding(math.sqrt(stack.norm_squared), stack.shape, _EPS))[1],
    )
    factors = LoraFactors(U * (S[:, None] * stack.scale), Vh, sharding=stack.sharding).to(stack.dtype, stack.device)
    return LoraSolution(error, interval, errors, factors)


def _fast(stack: LayerStack, rank: int, seed: int) -> LoraSolution:
    L, held, (b, a) = stack.layers, stack.sharding.local_layers, stack.shape
    B = torch.empty(held, b, rank, dtype=stack.dtype, device=stack.device)
    A = torch.empty(held, rank, a, dtype=stack.dtype, device=stack.device)
    generators = _generators(L, seed)[stack.sharding.local]
    lows: list[float] = []
    errors: list[float] = []
    highs: list[float] = []
    for tile in stack.tiles(rows=b):
        exponent = math.frexp(max(abs(float(x)) for x in torch.aminmax(tile.values)))[1]
        size = math.ldexp(1.0, max(exponent, -100 if stack.dtype == torch.float32 else -1000))
        M = tile.values / size  # a power of two: exact
        part = lanczos.leading_part(M, rank, WIDTH, FAILURE / L, generators[tile.layer])
        if part is None:
            if stack.memory is not None:
                check_memory(stack, stack.memory)
            part = lanczos.leading_part_by_svd(M.double(), rank)
        B[tile.layer], A[tile.layer] = part.B * size, part.A
        low, error, high = (x * size**2 for x in (part.low, part.error, part.high))
        lows.append(low)
        errors.append(error)
        highs.append(high)
    lows, errors, highs = (stack.sharding.all_gather_floats(x) for x in (lows, errors, highs))
    interval, factors = (math.fsum(lows), math.fsum(highs)), LoraFactors(B, A, sharding=stack.sharding)
    return LoraSolution(math.fsum(errors), interval, errors, factors)


def _generators(layers: int, seed: int) -> list[torch.Generator]:
    """A generator for each layer, so that results do not depend on the distribution of layers over processes."""
    seeds = torch.randint(2**62, (layers,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [torch.Generator().manual_seed(one) for one in seeds]
