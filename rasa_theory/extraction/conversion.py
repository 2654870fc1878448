"""One stack -> the tensors of an adapter, and a row of the report with the errors of every layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rasa_theory import linalg
from rasa_theory.bounds import Bound, lower_bound
from rasa_theory.common import InputError
from rasa_theory.extraction.extract_settings import STORED, ExtractSettings
from rasa_theory.formats import (
    ModuleNames,
    dense_tensor,
    kohya_factors,
    kohya_tensors,
    layer_span,
    lora_factors,
    lora_tensors,
    rasa_factors,
    rasa_tensors,
)
from rasa_theory.problem import LayerStack, LoraFactors, RankBudget, RasaFactors, spectral_ranks, squared_errors
from rasa_theory.solvers import Callback, RasaSolution, solve_lora, solve_path, solve_rasa

_SHARES = (50, 90, 99)
_FACTS = ("stable_rank", "entropy_rank", *(f"rank_{share}" for share in _SHARES))


@dataclass(frozen=True)
class Extracted:
    """One stack as written: the tensors in the dtype of the files, and the row of the report."""

    tensors: dict[str, Tensor]
    row: dict[str, Any]


def extract_stack(
    stack: LayerStack,
    modules: ModuleNames,
    settings: ExtractSettings,
    ranks: Sequence[int] | None = None,
    callback: Callback | None = None,
) -> Extracted:
    """Solve LoRA of rank r and RaSA(r, k) on one stack.

    Matrices narrower than r are taken whole. A stack of zeros has ranks 0 and no tensors. With k = 0, layers of up to
    1024 rows or columns take exact SVDs, and larger ones their certified leading parts. With a pool,
    `LayerStack.with_spectra` decides. Without exact SVDs the full spectra are not reported.

    Arguments:
        stack: the L updates M_i (b, a).
        modules: the names of the modules, one for each layer.
        settings: the settings of the extraction.
        ranks: a rank for each layer in place of r, where the settings have a target.
        callback: called with a `Progress` while the solver runs.

    Returns:
        The tensors of the format, and the row of the report. Errors are squared, in units of the input, by layer and
        summed.

    Raises:
        InputError: r exceeds min(b, a), or the dtype of the files cannot hold the factors.
    """
    L = stack.layers
    if stack.norm_squared == 0:
        return Extracted({}, _row(stack, modules, settings, [_module_row(name) for name in modules.names]))
    budget = settings.budget(stack.shape)
    lora_ranks = [budget.rank] * L if ranks is None else list(ranks)
    exact = settings.exact(stack)
    if settings.k != 0:
        stack = stack.with_spectra("exact" if exact else "leading", RankBudget(budget.rank, 0))
    method = "exact" if exact or settings.k != 0 else "fast"
    lora = solve_lora(stack, max(1, *lora_ranks), method, settings.solver.seed)
    lora_factors = lora.factors if ranks is None else _truncated(lora.factors, ranks)
    lora_errors = lora.layer_errors if ranks is None else squared_errors(stack, lora_factors)
    lora_size = sum(lora_ranks) * sum(stack.shape)
    has_pool = budget.shared_rank > 0 if settings.k is not None else _gains_by_a_pool(stack, budget, lora.error)
    rasa = _solve_rasa(stack, settings, callback) if has_pool else _Answer(0, lora_errors, lora_size)
    written: LoraFactors | RasaFactors = lora_factors
    written_ranks = lora_ranks
    if rasa.factors is not None and settings.is_pooled:
        written, written_ranks = rasa.factors, [budget.rank - rasa.k + L * rasa.k] * L
    tensors, stored_errors = _stored(stack, modules, written, written_ranks, settings)
    same_size = _of_equal_size(stack, settings, method, tensors, lora_ranks, math.fsum(lora_errors))
    facts = (
        spectral_facts(stack.spectra.svd().S) if exact else [_leading_facts(stack, lora.factors, i) for i in range(L)]
    )
    norms = stack.layer_norms_squared
    module_rows = [
        _module_row(name, written_ranks[i], norms[i], lora_errors[i], rasa.errors[i], stored_errors[i]) | facts[i]
        for i, name in enumerate(modules.names)
    ]
    stored_size = sum(tensor.numel() for tensor in tensors.values())
    row = _row(stack, modules, settings, module_rows) | {
        "rank": None if ranks is not None else budget.rank,
        "k": rasa.k,
        "equal_size": same_size,
        "error_at_rank": _error_at_rank(stack, lora.factors, exact),
        "parameters": {"lora": lora_size, "rasa": rasa.parameters, "stored": stored_size},
        "lower_bound": rasa.floor.value,
        "lower_bound_name": rasa.floor.name,
        "lower_bound_failure": rasa.floor.failure,
        "search": rasa.search,
    }
    return Extracted(tensors, row)


def difference_of(
    stack: LayerStack, keys: Sequence[str], is_one_tensor: bool, modules: ModuleNames, settings: ExtractSettings
) -> Extracted:
    """The updates themselves, by the keys of the tuned checkpoint: each layer of `stack`, or one tensor of all layers.

    No rank is chosen and nothing is solved: the row has the error of rounding to the dtype of the files alone.
    """
    tensors: dict[str, Tensor] = {}
    errors: list[float] = []
    for i, _, M in stack.tiles(rows=stack.shape[0]):
        name = modules.names[i]
        tensors[name] = rounded(keys[min(i, len(keys) - 1)], M.mT if modules.transposed else M, STORED[settings.dtype])
        stored = tensors[name].to(stack.device, torch.float64)
        errors.append(float(((M.double() - (stored.mT if modules.transposed else stored)) ** 2).sum()))
    norms = stack.layer_norms_squared
    rows = [
        _module_row(name, 0, norms[i], 0.0, 0.0, errors[i]) | {"e_lora": None, "e_rasa": None} | dict.fromkeys(_FACTS)
        for i, name in enumerate(modules.names)
    ]
    if stack.norm_squared == 0:
        tensors = {}
    elif is_one_tensor:
        tensors = {keys[0]: torch.stack(list(tensors.values()))}
    else:
        tensors = dict(zip(keys, tensors.values(), strict=True))
    size = sum(tensor.numel() for tensor in tensors.values())
    row = _row(stack, modules, settings, []) | {
        "rank": None, "e_lora": None, "e_rasa": None, "e_stored": math.fsum(errors), "modules": rows,
        "parameters": {"lora": 0, "rasa": 0, "stored": size},
    }  # fmt: skip
    return Extracted(tensors, row)


def _module_row(
    name: str, rank: int = 0, norm: float = 0.0, lora: float = 0.0, rasa: float = 0.0, stored: float = 0.0
) -> dict[str, Any]:
    """The row of one module: the rank written, its squared norm and errors, and spectral facts of 0."""
    errors = {"e_lora": lora, "e_rasa": rasa, "e_stored": stored}
    span = layer_span(name)
    layer = None if span is None or "/" in name else int(name[slice(*span)])
    return {"module": name, "layer": layer, "rank": rank, "norm_squared": norm} | errors | dict.fromkeys(_FACTS, 0)


def _row(
    stack: LayerStack, modules: ModuleNames, settings: ExtractSettings, module_rows: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The row of a stack without a pool or a floor: ranks, squared norm and errors summed over its modules."""
    return {
        "name": stack.name,
        "kind": modules.kind,
        "layers": stack.layers,
        "shape": list(stack.shape),
        "transposed": modules.transposed,
        "parameter": modules.parameter,
        "rank": settings.rank,
        "k": 0,
        "norm_squared": stack.norm_squared,
        "e_lora": math.fsum(row["e_lora"] for row in module_rows),
        "e_rasa": math.fsum(row["e_rasa"] for row in module_rows),
        "lower_bound": 0.0,
        "lower_bound_name": "none",
        "lower_bound_failure": 0.0,
        "search": None,
        "e_stored": math.fsum(row["e_stored"] for row in module_rows),
        "equal_size": None,
        "error_at_rank": {},
        "parameters": {"lora": 0, "rasa": 0, "stored": 0},
        "ranks": _written_ranks(modules, module_rows),
        "modules": list(module_rows),
    }


def _written_ranks(modules: ModuleNames, module_rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    """The rank of every module in the file, or of the parameter that holds all of them; none for rank 0."""
    ranks = {row["module"]: row["rank"] for row in module_rows if row["rank"] > 0}
    if modules.parameter is None or not ranks:
        return ranks
    return {modules.parameter: max(ranks.values())}


def _truncated(factors: LoraFactors, ranks: Sequence[int]) -> LoraFactors:
    """The leading ranks[i] terms of every layer; the other columns of B are 0."""
    device = factors.B.device
    is_leading = torch.arange(factors.B.shape[2], device=device) < torch.tensor(ranks, device=device)[:, None]
    return LoraFactors(factors.B * is_leading[:, None], factors.A)


@dataclass(frozen=True)
class _Answer:
    """RaSA's answer for a stack, or LoRA's with k = 0: squared errors by layer, parameters.

    Floor, search and factors are those of RaSA.
    """

    k: int
    errors: Sequence[float]
    parameters: int
    floor: Bound = Bound(0.0, "none")  # noqa: RUF009  (frozen)
    search: dict[str, Any] | None = None
    factors: RasaFactors | None = None


def _gains_by_a_pool(stack: LayerStack, budget: RankBudget, e_lora: float) -> bool:
    """Whether k auto has anything to gain: not where LoRA takes matrices whole, or is exact up to rounding."""
    return budget.rank < min(stack.shape) and not linalg.not_above(e_lora, 0.0, stack.rounding)


def _solve_rasa(stack: LayerStack, settings: ExtractSettings, callback: Callback | None) -> _Answer:
    """RaSA(r, k) with its floor."""
    budget, solution = _best_k(stack, settings, callback)
    floor = lower_bound(stack, budget, settings.certificate, spectra=settings.solver.spectra)
    search = None if solution.search is None else dataclasses.asdict(solution.search)
    factors = solution.factors
    return _Answer(budget.shared_rank, solution.layer_errors, factors.parameters, floor, search, factors)


def _best_k(stack: LayerStack, settings: ExtractSettings, callback: Callback | None) -> tuple[RankBudget, RasaSolution]:
    """RaSA(r, k) with its budget; for k auto the best of 1, 2, 4, .., r, the smallest of those equal up to rounding."""
    budget = settings.budget(stack.shape)
    rank = budget.rank
    if settings.k is not None:
        return budget, solve_rasa(stack, budget, settings.solver, callback)
    path = solve_path(stack, rank, {*(2**n for n in range(rank.bit_length())), rank}, settings.solver, callback)
    least = min(solution.error for solution in path.values())
    k = min(k for k, solution in path.items() if linalg.not_above(solution.error, least, stack.rounding))
    return RankBudget(rank, k), path[k]


def _stored(
    stack: LayerStack,
    modules: ModuleNames,
    factors: LoraFactors | RasaFactors,
    ranks: Sequence[int],
    settings: ExtractSettings,
) -> tuple[dict[str, Tensor], list[float]]:
    """The tensors of the format, rounded, and the squared error of every layer, read back from these tensors alone."""
    factors = factors.to(torch.float64)
    dtype = STORED[settings.dtype]
    if settings.format == "dense":
        return _stored_dense(stack, modules, factors, dtype)
    if settings.format == "rasa":
        whole = RankBudget(settings.rank or 1, settings.k or 0)
        tensors = rasa_tensors(modules, _as_rasa(factors), settings.layout, whole)
        rounded = _all_rounded(tensors, dtype)
        return rounded, squared_errors(stack, rasa_factors(modules, rounded).to(device=stack.device))
    lora = factors if isinstance(factors, LoraFactors) else factors.as_lora()
    if settings.format == "kohya":
        rounded = _all_rounded(kohya_tensors(modules, lora, ranks, settings.prefix), dtype)
        stored = kohya_factors(modules, rounded, stack.shape, settings.prefix)
    else:
        rounded = _all_rounded(lora_tensors(modules, lora, ranks), dtype)
        stored = lora_factors(modules, rounded, stack.shape)
    return rounded, squared_errors(stack, stored.to(device=stack.device))


def _as_rasa(factors: LoraFactors | RasaFactors) -> RasaFactors:
    """The same updates as RaSA; those of a LoRA, as matrices that are taken whole have, with a pool of rank 0."""
    if isinstance(factors, RasaFactors):
        return factors
    B, A = factors.B, factors.A
    return RasaFactors(B, A, B.new_zeros(B.shape[1], 0), A.new_zeros(0, A.shape[2]), B.new_zeros(len(B), 0))


def _of_equal_size(
    stack: LayerStack,
    settings: ExtractSettings,
    method: str,
    tensors: Mapping[str, Tensor],
    ranks: Sequence[int],
    lora_error: float,
) -> dict[str, Any] | None:
    """The rank and the error of the best LoRA that takes no more parameters than these tensors of the stack.

    None where it would take full SVDs that nothing else needs.
    """
    if settings.format in ("lora", "kohya"):
        return {"rank": max(ranks), "e_lora": lora_error}
    size = sum(tensor.numel() for tensor in tensors.values())
    rank = min(size // (stack.layers * sum(stack.shape)), *stack.shape)
    if rank in (0, min(stack.shape)):
        return {"rank": rank, "e_lora": stack.norm_squared if rank == 0 else 0.0}
    if settings.format == "dense" and not settings.exact(stack):
        return None
    return {"rank": rank, "e_lora": solve_lora(stack, rank, method, settings.solver.seed).error}


def _stored_dense(
    stack: LayerStack, modules: ModuleNames, factors: LoraFactors | RasaFactors, dtype: torch.dtype
) -> tuple[dict[str, Tensor], list[float]]:
    """Dense updates, rounded, and their squared errors, a layer at a time."""
    tensors, errors = {}, []
    for i, _, M in stack.tiles(rows=stack.shape[0]):
        key, update = dense_tensor(modules, factors, i)
        tensors[key] = rounded(key, update, dtype)
        stored = tensors[key].to(stack.device, torch.float64)
        errors.append(float(((M.double() - (stored.mT if modules.transposed else stored)) ** 2).sum()))
    if modules.parameter is not None:
        tensors = {modules.parameter: torch.stack(list(tensors.values()))}
    return tensors, errors


def _all_rounded(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors in the dtype of the files but scalars, which stay exact. Raises InputError as `rounded` does."""
    return {key: rounded(key, t, dtype if t.ndim > 0 else t.dtype) for key, t in tensors.items()}


def rounded(key: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in the dtype of the files. Raises InputError, naming its key, if an entry leaves the range."""
    rounded = tensor.to(dtype).contiguous().cpu()
    if not bool(torch.isfinite(rounded).all()):
        name = str(dtype).removeprefix("torch.")
        raise InputError(f"{name} cannot hold the entries of {key!r}; write bfloat16 or float32 (--dtype)")
    return rounded


def spectral_facts(sigma: Tensor) -> list[dict[str, Any]]:
    """The stable rank, the entropy rank and ranks for shares of the energy of every layer, from sigma (L, m)."""
    ranks = spectral_ranks(sigma, [share / 100 for share in _SHARES])
    return [
        dict(zip(_FACTS, (stable, entropy, *energy), strict=True)) if stable > 0 else dict.fromkeys(_FACTS, 0)
        for stable, entropy, energy in zip(
            ranks.stable.tolist(), ranks.entropy.tolist(), ranks.energy.tolist(), strict=True
        )
    ]


def _error_at_rank(stack: LayerStack, factors: LoraFactors, exact: bool) -> dict[str, float]:
    """e_lora of the whole stack at ranks 0, 1, 2, 4, .., as far as the singular values reach that were computed."""
    energy = stack.spectra.svd().S.double() ** 2 if exact else (factors.B.double() ** 2).sum(1)
    kept = torch.cumsum(energy.sum(0).cpu(), 0).tolist()
    ranks = [2**n for n in range(len(kept).bit_length())]
    errors = {str(r): max(stack.norm_squared - kept[r - 1], 0.0) for r in [*ranks, len(kept)] if r <= len(kept)}
    return {"0": stack.norm_squared} | errors


def _leading_facts(stack: LayerStack, factors: LoraFactors, i: int) -> dict[str, Any]:
    """The stable rank, and the ranks for shares of the energy that the leading part reaches; None for the others."""
    energy = (factors.B[i].double() ** 2).sum(0).cpu()
    total = stack.layer_norms_squared[i]
    if total == 0:
        return dict.fromkeys(_FACTS, 0)
    facts: dict[str, Any] = {"stable_rank": total / float(energy[0]), "entropy_rank": None}
    for s in _SHARES:
        reached = (torch.cumsum(energy, 0) >= s / 100 * total).nonzero()
        facts[f"rank_{s}"] = int(reached[0]) + 1 if len(reached) else None
    return facts
