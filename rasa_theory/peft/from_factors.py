"""From reconstructed updates to an adapter in a model, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from rasa_theory.common import InputError
from rasa_theory.peft.config import RasaConfig, rank_settings
from rasa_theory.peft.layer import of_adapter
from rasa_theory.peft.library import PeftModel, get_peft_model
from rasa_theory.peft.model import RasaModel, tuner_of
from rasa_theory.peft.pools import Pool, module_names, plan
from rasa_theory.problem import RankBudget, RasaFactors

_SHOWN = 4  # names in a message


def from_factors(
    model: nn.Module, factors: Mapping[str, RasaFactors], *, adapter_name: str = "default", **settings: Any
) -> PeftModel:
    """Put reconstructed updates into a model, as an adapter that can be trained further.

    Private terms get the mixing 1, pool terms at most 1 in absolute value. Every term is scaled so that its two factors
    have equal norms.

    Arguments:
        model: a model, which is changed, or a `PeftModel` with RaSA adapters, which gets one more.
        factors: for each target, the factors of its layers in the order of the model. A target is the end of a module's
            name from a dot on (`q_proj`), or a pattern with `*` for the whole name. It selects one whole pool: modules
            of one kind, tower and shape.
        adapter_name: the name of the adapter.
        settings: other fields of the `RasaConfig`, such as `task_type` or `dropout`.

    Returns:
        The model with the adapter. If `model` is a `PeftModel`, it is returned itself.

    Raises:
        InputError: a target selects nothing or more than a pool, the factors have other sizes than the layers or are
            not finite, or the model cannot hold the adapter.
    """
    if not factors:
        raise InputError("there are no factors; give those of one target at least")
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    found = {target: _one_pool(inner, target, one) for target, one in factors.items()}
    budgets = {name: pool.budget for pool in found.values() for name in pool.modules}
    if len(budgets) != sum(len(pool.modules) for pool in found.values()):
        raise InputError(f"the targets {_some(list(found))} select some modules twice")
    ranks = rank_settings(budgets)
    chosen = {"alpha": float(ranks["r"])} | settings
    config = RasaConfig(target_modules=list(budgets), **ranks, **chosen)
    ordered = [name for name in module_names(inner) if name in budgets]
    joined = {pool.modules for pool in plan(inner, ordered, config, {})}
    if joined != {pool.modules for pool in found.values()}:
        raise InputError(
            f"some of the targets {_some(list(found))} share a pool, since they select modules of one kind, tower and "
            "shape; give the factors of a pool together, by one target"
        )
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, config)
    else:
        model = get_peft_model(model, config, adapter_name=adapter_name)
    tuner = tuner_of(model)
    in_model = {pool.modules: pool for pool in tuner.pools(adapter_name)}
    for target, pool in found.items():
        _assign(tuner, adapter_name, in_model[pool.modules], factors[target])
    return model


@torch.no_grad()
def factors(model: PeftModel, adapter_name: str = "default") -> dict[str, RasaFactors]:
    """Return the updates of an adapter as `RasaFactors`, by the name of the pool.

    The mixing of the private terms goes into B~_i.

    Arguments:
        model: the model with the adapter.
        adapter_name: the name of the adapter.

    Returns:
        Copies of the factors of each pool, at least in float32, on the device of the pool.

    Raises:
        InputError: the model has no such adapter.
    """
    tuner = tuner_of(model)
    return {pool.name: _factors_of(tuner, adapter_name, pool) for pool in tuner.pools(adapter_name)}


def _factors_of(tuner: RasaModel, adapter: str, pool: Pool) -> RasaFactors:
    q, terms = pool.budget.private_rank, [tuner.layer(name).terms_of(adapter) for name in pool.modules]
    device = terms[0][1].device

    def wide(t: Tensor) -> Tensor:
        return t.to(device, torch.promote_types(t.dtype, torch.float32))

    B, d, A = (torch.stack([wide(term[side]) for term in terms]) for side in range(3))
    return RasaFactors(
        private_B=B[:, :, :q] * d[:, None, :q],
        private_A=A[:, :q].clone(),
        shared_B=B[0, :, q:].clone(),
        shared_A=A[0, q:].clone(),
        mixing=d[:, q:].clone(),
    )


def _one_pool(model: nn.Module, target: str, one: RasaFactors) -> Pool:
    """The pool that a target selects, with the budget of its factors."""
    names = [name for name in module_names(model) if _selects(target, name)]
    if not names:
        raise InputError(f"target {target!r} names no module of the model")
    L, q, R = len(names), one.private_B.shape[2], one.shared_B.shape[1]
    pools = plan(model, names, RasaConfig(r=1, k=0), {})
    if len(pools) > 1:
        raise InputError(
            f"{target!r} names modules of {len(pools)} pools, {_some([pool.name for pool in pools])}; give factors for "
            "each, by a target with more of the name"
        )
    if one.layers != L or R % L:
        raise InputError(
            f"{target}: the factors are of {one.layers} layers and {R} pool terms, the model has {L} layers, each of "
            "which gives as many terms to the pool"
        )
    if (shape := (one.shared_B.shape[0], one.shared_A.shape[1])) != pools[0].shape:
        raise InputError(f"{target}: the factors are of shape {shape}, the layers of {pools[0].shape}")
    for name, tensor in one.named().items():
        if not bool(tensor.isfinite().all()):
            raise InputError(f"{target}: {name} of the factors has values that are not finite")
    return pools[0]._replace(budget=RankBudget(q + R // L, R // L))


def _selects(target: str, name: str) -> bool:
    return fnmatchcase(name, target) if "*" in target else f".{name}".endswith(f".{target}")


@torch.no_grad()
def _assign(tuner: RasaModel, adapter: str, pool: Pool, one: RasaFactors) -> None:
    even, q = one.evened(), pool.budget.private_rank
    for i, layer in enumerate(map(tuner.layer, pool.modules)):
        layer.rasa_mixing[adapter].copy_(torch.cat([even.mixing.new_ones(q), even.mixing[i]]))
        if q:
            layer.rasa_private_B[adapter].copy_(even.private_B[i])
            layer.rasa_private_A[adapter].copy_(even.private_A[i])
    if pool.rank:
        of_adapter(tuner.rasa_pool_B, adapter)[pool.key].copy_(even.shared_B)
        of_adapter(tuner.rasa_pool_A, adapter)[pool.key].copy_(even.shared_A)


def _some(names: Sequence[str]) -> str:
    """The first few names, and the number of the others."""
    return ", ".join(map(repr, names[:_SHOWN])) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
