"""From stacks to an adapter with an error report, one stack at a time, so that an interruption loses one at most."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rasa_theory.bounds import Bound, lower_bound
from rasa_theory.common import InputError
from rasa_theory.extraction.extract_settings import STORED, ExtractSettings
from rasa_theory.formats import ModuleNames, dense_tensor, lora_factors, lora_tensors, rasa_factors, rasa_tensors
from rasa_theory.problem import LayerStack, LoraFactors, RankBudget, RasaFactors, spectral_ranks, squared_errors
from rasa_theory.solvers import Callback, RasaSolution, solve_lora, solve_path, solve_rasa

_SHARES = (50, 90, 99)
_FACTS = ("stable_rank", "entropy_rank", *(f"rank_{share}" for share in _SHARES))


@dataclass(frozen=True)
class Extracted:
    """What is written of one stack: the tensors in the dtype of the files, and its row of the report."""

    tensors: dict[str, Tensor]
    row: dict[str, Any]


def extract_stack(
    stack: LayerStack,
    modules: ModuleNames,
    settings: ExtractSettings,
    ranks: Sequence[int] | None = None,
    callback: Callback | None = None,
) -> Extracted:
    """LoRA of rank r and RaSA(r, k) of one stack, the tensors of the format, and how far they are from it.

    `ranks`, one per layer, stand for r where the settings have a target; a stack of zeros has ranks 0 and no tensors.
    All errors are squared, in units of the input, per layer and summed. A LoRA without RaSA of layers larger than 1024
    is taken from the certified leading part, and full spectra are not reported. Raises InputError if r > min(b, a), or
    if the dtype of the files cannot hold the factors.
    """
    L = stack.layers
    if stack.norm_squared == 0:
        zeros = [0.0] * L
        return Extracted(
            {}, _row(stack, modules, settings, [0] * L, zeros, zeros, zeros, [dict.fromkeys(_FACTS, 0)] * L)
        )
    given = [settings.rank or 0] * L if ranks is None else list(ranks)
    spent = sum(given) * sum(stack.shape)
    exact = settings.exact(stack.shape)
    lora = solve_lora(stack, max(1, *given), "exact" if exact else "fast", settings.solver.seed)
    best: LoraFactors | RasaFactors = lora.factors if ranks is None else _cut(lora.factors, ranks)
    lora_errors = lora.layer_errors if ranks is None else squared_errors(stack, best)
    k, errors, floor = 0, lora_errors, Bound(0.0, "none")
    if settings.k != 0:
        found, k = _solved(stack, given[0], settings, callback)
        floor = lower_bound(stack, RankBudget(given[0], k), settings.certificate)
        errors = found.layer_errors
        if settings.format != "lora":
            best, given = found.factors, [given[0] - k + L * k] * L
    tensors, stored = _stored(stack, modules, best, given, settings)
    spectra = (
        _spectral_facts(stack.spectra.svd().S) if exact else [_leading_facts(stack, lora.factors, i) for i in range(L)]
    )
    row = _row(stack, modules, settings, given, lora_errors, errors, stored, spectra)
    written = sum(t.numel() for t in tensors.values())
    parameters = {"lora": spent, "rasa": spent + L * L * k, "stored": written}
    floors = {"lower_bound": floor.value, "lower_bound_name": floor.name}
    return Extracted(tensors, row | {"k": k, "parameters": parameters} | floors)


def _row(
    stack: LayerStack,
    modules: ModuleNames,
    settings: ExtractSettings,
    ranks: Sequence[int],
    lora: Sequence[float],
    rasa: Sequence[float],
    stored: Sequence[float],
    facts: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """The row of a stack of which nothing is written yet: ranks written, squared errors and spectral facts by layer."""
    norms = stack.layer_norms_squared
    return {
        "name": stack.name, "kind": modules.kind, "layers": stack.layers, "shape": list(stack.shape),
        "transposed": modules.transposed, "rank": settings.rank, "k": 0,
        "norm_squared": stack.norm_squared, "e_lora": math.fsum(lora), "e_rasa": math.fsum(rasa),
        "lower_bound": 0.0, "lower_bound_name": "none", "e_stored": math.fsum(stored),
        "parameters": {"lora": 0, "rasa": 0, "stored": 0},
        "ranks": {name: rank for name, rank in zip(modules.names, ranks, strict=True) if rank > 0},
        "modules": [
            {
                "module": name, "rank": ranks[i], "norm_squared": norms[i], "e_lora": lora[i],
                "e_rasa": rasa[i], "e_stored": stored[i], **facts[i],
            }
            for i, name in enumerate(modules.names)
        ],
    }  # fmt: skip


def _cut(factors: LoraFactors, ranks: Sequence[int]) -> LoraFactors:
    """The leading ranks[i] terms of every layer, the others 0."""
    kept = (
        torch.arange(factors.B.shape[2], device=factors.B.device)
        < torch.tensor(ranks, device=factors.B.device)[:, None]
    )
    return LoraFactors(factors.B * kept[:, None], factors.A)


def _solved(
    stack: LayerStack, rank: int, settings: ExtractSettings, callback: Callback | None
) -> tuple[RasaSolution, int]:
    """RaSA(r, k) and k; the best of several k, the smallest of equal ones, where none is given."""
    if settings.k is not None:
        return solve_rasa(stack, RankBudget(rank, settings.k), settings.solver, callback), settings.k
    path = solve_path(stack, rank, {*(2**n for n in range(rank.bit_length())), rank}, settings.solver, callback)
    k = min(path, key=lambda k: path[k].error)
    return path[k], k


def _stored(
    stack: LayerStack,
    modules: ModuleNames,
    factors: LoraFactors | RasaFactors,
    ranks: Sequence[int],
    settings: ExtractSettings,
) -> tuple[dict[str, Tensor], list[float]]:
    """The tensors of the format, rounded, and the squared error of every layer's update as rebuilt from them."""
    factors = factors.to(torch.float64)
    dtype = STORED[settings.dtype]
    if settings.format == "diff":
        return _stored_dense(stack, modules, factors, dtype)
    if settings.format == "rasa" and isinstance(factors, RasaFactors):
        tensors = rasa_tensors(modules, factors)
    else:
        tensors = lora_tensors(modules, factors if isinstance(factors, LoraFactors) else factors.as_lora(), ranks)
    kept = {key: _rounded(key, tensor, dtype) for key, tensor in tensors.items()}
    is_rasa = settings.format == "rasa"
    written = rasa_factors(modules, kept) if is_rasa else lora_factors(modules, kept, stack.shape)
    return kept, squared_errors(stack, written.to(device=stack.device))


def _stored_dense(
    stack: LayerStack, modules: ModuleNames, factors: LoraFactors | RasaFactors, dtype: torch.dtype
) -> tuple[dict[str, Tensor], list[float]]:
    """The same of dense updates, a layer at a time."""
    kept, errors = {}, []
    for i, _, M in stack.tiles(rows=stack.shape[0]):
        key, update = dense_tensor(modules, factors, i)
        kept[key] = _rounded(key, update, dtype)
        written = kept[key].to(stack.device, torch.float64)
        errors.append(float(((M.double() - (written.mT if modules.transposed else written)) ** 2).sum()))
    return kept, errors


def _rounded(key: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = tensor.to(dtype).contiguous().cpu()
    if not bool(torch.isfinite(rounded).all()):
        name = str(dtype).removeprefix("torch.")
        raise InputError(f"{name} cannot hold the entries of {key!r}; write bfloat16 or float32 (--dtype)")
    return rounded


def _spectral_facts(sigma: Tensor) -> list[dict[str, Any]]:
    """Stable rank, entropy rank, and ranks for shares of the energy, of every layer: singular values (L, m)."""
    ranks = spectral_ranks(sigma, [share / 100 for share in _SHARES])
    return [
        dict(zip(_FACTS, (stable, entropy, *energy), strict=True)) if stable > 0 else dict.fromkeys(_FACTS, 0)
        for stable, entropy, energy in zip(
            ranks.stable.tolist(), ranks.entropy.tolist(), ranks.energy.tolist(), strict=True
        )
    ]


def _leading_facts(stack: LayerStack, factors: LoraFactors, i: int) -> dict[str, Any]:
    """What the leading part alone says: the stable rank, and ranks for shares of the energy that it reaches."""
    energy = (factors.B[i].double() ** 2).sum(0).cpu()
    total = stack.layer_norms_squared[i]
    if total == 0:
        return dict.fromkeys(_FACTS, 0)
    facts: dict[str, Any] = {"stable_rank": total / float(energy[0]), "entropy_rank": None}
    for s in _SHARES:
        reached = (torch.cumsum(energy, 0) >= s / 100 * total).nonzero()
        facts[f"rank_{s}"] = int(reached[0]) + 1 if len(reached) else None
    return facts
