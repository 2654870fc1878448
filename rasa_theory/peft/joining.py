"""The weighted sum of adapters: private terms side by side, and pools side by side."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rasa_theory.common import InputError, real_number
from rasa_theory.formats import pools_of
from rasa_theory.peft.config import RasaConfig, rank_settings
from rasa_theory.peft.layer import of_adapter
from rasa_theory.peft.pools import Pool, module_names
from rasa_theory.problem import RankBudget

if TYPE_CHECKING:
    from rasa_theory.peft.model import RasaModel


def join(tuner: RasaModel, adapters: Sequence[str], weights: Sequence[float], name: str) -> None:
    """Add the adapter `name`, whose update of every module is sum_j weights[j] times the update of adapters[j]."""
    weights = _checked(tuner, adapters, weights, name)
    shapes = {module: pool.shape for adapter in adapters for pool in tuner.pools(adapter) for module in pool.modules}
    ordered = {module: shapes[module] for module in module_names(tuner.model) if module in shapes}
    budgets: dict[str, RankBudget] = {}
    for members in pools_of(ordered).values():
        parts = [part for adapter in adapters if (part := _pool_of(tuner, adapter, members)) is not None]
        q, R = sum(part.budget.private_rank for part in parts), sum(part.rank for part in parts)
        k = math.ceil(R / len(members))
        budgets |= dict.fromkeys(members, RankBudget(q + k, k))
    first: RasaConfig = tuner.peft_config[adapters[0]]
    tuner.peft_config[name] = dataclasses.replace(
        first, target_modules=set(ordered), exclude_modules=None, layers_to_transform=None, layers_pattern=None,
        d_init="half", **rank_settings(budgets),
    )  # fmt: skip
    try:
        tuner.inject_adapter(tuner.model, name)
    except Exception:
        del tuner.peft_config[name]
        raise
    for pool in tuner.pools(name):
        _fill(tuner, pool, adapters, weights, name)


def _checked(tuner: RasaModel, adapters: Sequence[str], weights: Sequence[float], name: str) -> list[float]:
    if isinstance(adapters, str) or not adapters or len(adapters) != len(weights):
        raise InputError(f"give one weight for each adapter, got adapters {adapters!r} and weights {weights!r}")
    if name in tuner.peft_config:
        raise InputError(f"the model has an adapter {name!r} already; take another name", "adapter_name")
    for adapter in adapters:
        tuner.pools(adapter)
        config = tuner.peft_config[adapter]
        if config.modules_to_save or config.bias != "none":
            raise InputError(f"adapter {adapter!r} has modules_to_save or biases, which have no weighted sum")
    checked = [real_number("weights", weight) for weight in weights]
    if not all(map(math.isfinite, checked)):
        raise InputError(f"weights must be finite, got {list(weights)}", "weights")
    return checked


def _pool_of(tuner: RasaModel, adapter: str, modules: Sequence[str]) -> Pool | None:
    """The pool of an adapter for some modules of one kind, tower and shape; None if it changes none of them."""
    return next((pool for pool in tuner.pools(adapter) if not set(pool.modules).isdisjoint(modules)), None)


@torch.no_grad()
def _fill(tuner: RasaModel, pool: Pool, adapters: Sequence[str], weights: Sequence[float], name: str) -> None:
    """Copy the terms of the adapters into one pool of their sum."""
    parts = [
        (adapter, weight, part)
        for adapter, weight in zip(adapters, weights, strict=True)
        if (part := _pool_of(tuner, adapter, pool.modules)) is not None
    ]
    q = pool.budget.private_rank
    for layer, module in zip(map(tuner.layer, pool.modules), pool.modules, strict=True):
        d = layer.rasa_mixing[name].zero_()
        private, shared = 0, q
        for adapter, weight, part in parts:
            own = part.budget.private_rank
            if module in part.modules:
                mixing = weight * layer.rasa_mixing[adapter]
                d[private : private + own] = mixing[:own]
                d[shared : shared + part.rank] = mixing[own:]
                if own:
                    layer.rasa_private_B[name][:, private : private + own] = layer.rasa_private_B[adapter]
                    layer.rasa_private_A[name][private : private + own] = layer.rasa_private_A[adapter]
            elif own:
                layer.rasa_private_A[name][private : private + own] = 0
            private, shared = private + own, shared + part.rank
    if pool.rank:
        _fill_shared(
            of_adapter(tuner.rasa_pool_B, name),
            pool,
            [(of_adapter(tuner.rasa_pool_B, a), part) for a, _, part in parts],
            1,
        )
        _fill_shared(
            of_adapter(tuner.rasa_pool_A, name),
            pool,
            [(of_adapter(tuner.rasa_pool_A, a), part) for a, _, part in parts],
            0,
        )


def _fill_shared(side: nn.ParameterDict, pool: Pool, parts: Sequence[tuple[nn.ParameterDict, Pool]], axis: int) -> None:
    whole: Tensor = side[pool.key].zero_()
    place = 0
    for theirs, part in parts:
        if part.rank:
            whole.narrow(axis, place, part.rank).copy_(theirs[part.key])
        place += part.rank
