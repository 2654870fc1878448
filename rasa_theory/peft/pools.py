"""Which modules of a model an adapter changes, checked, and grouped into pools."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rasa_theory.common import InputError
from rasa_theory.formats import MODULE_PARTS, RESERVED, pool_attribute, pools_of
from rasa_theory.peft.config import RasaConfig
from rasa_theory.peft.library import BaseTunerLayer, in_out_features, resolve_quantization_backend
from rasa_theory.problem import RankBudget

_PARTS = frozenset({"model", "base_layer", "modules_to_save", "weight", "bias", "rasa_pool_A", "rasa_pool_B",
                    *MODULE_PARTS.values()})  # fmt: skip
"""Parts of parameters' names in a `PeftModel`, beside the names of modules, kinds and adapters."""


class Pool(NamedTuple):
    """The modules that share one pool.

    Attributes:
        name: the pool's name, which is the kind of its modules and, where needed, their tower and shape.
        modules: the names of its L modules, in the order of the model.
        shape: (b, a) = (out, in) of an update.
        budget: the ranks r and k of each module.
    """

    name: str
    modules: tuple[str, ...]
    shape: tuple[int, int]
    budget: RankBudget

    @property
    def key(self) -> str:
        """The name of its parameters in a ParameterDict."""
        return pool_attribute(self.name)

    @property
    def rank(self) -> int:
        """The number of terms R = L k of the pool."""
        return self.budget.pool_rank(len(self.modules))


def check_name(adapter: str, modules: Collection[str]) -> None:
    """Raise InputError if the parameters of an adapter with this name cannot be registered, or told from others.

    `modules` are the names of the model's modules.
    """
    if not adapter or "." in adapter or adapter in RESERVED:
        raise InputError(
            f"an adapter cannot be called {adapter!r}: the name must not be empty, hold a dot, or be one that torch "
            "keeps to itself",
            "adapter_name",
        )
    if adapter in _PARTS.union(*(name.split(".") for name in modules)):
        raise InputError(
            f"an adapter cannot be called {adapter!r}: parameters of the model have a name with that part, and peft "
            "would leave them out when it saves another adapter",
            "adapter_name",
        )


def plan(model: nn.Module, modules: Collection[str], config: RasaConfig, kwargs: Mapping[str, Any]) -> list[Pool]:
    """Group modules into pools.

    Arguments:
        model: the model, with or without adapters in it.
        modules: the names of the modules, in the order of the model.
        config: the configuration, which says the ranks of each module.
        kwargs: what peft needs to know about a quantised model.

    Returns:
        The pools, in the order of the model.

    Raises:
        InputError: no adapter can stand beside a module, one shares its weight with another module, the modules of a
            pool differ in rank, or two pools would have the same name in a file.
    """
    shapes = {}
    for name in modules:
        module = model.get_submodule(name)
        if reason := _why_not(module, kwargs):
            raise InputError(f"module {name!r} cannot be adapted: {reason}; choose target_modules without it")
        in_features, out_features = in_out_features(unwrapped(module))
        shapes[name] = (int(out_features), int(in_features))
    _check_not_shared(model, shapes.keys())
    pools = []
    for name, members in pools_of(shapes).items():
        budgets = {config.budget(module): module for module in members}
        if len(budgets) > 1:
            (first, one), (second, other) = list(budgets.items())[:2]
            raise InputError(
                f"{one!r} and {other!r} share the pool {name!r} but have r, k = {first.rank}, {first.shared_rank} and "
                f"{second.rank}, {second.shared_rank}; give all modules of a pool the same ranks"
            )
        pools.append(Pool(name, tuple(members), shapes[members[0]], next(iter(budgets))))
    _check_distinct(pools)
    return pools


def module_names(model: nn.Module) -> list[str]:
    """The names of the modules of a model, without the inside of layers that hold adapters."""
    adapted = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    return [name for name, _ in model.named_modules() if name and not name.startswith(adapted)]


def unwrapped(module: nn.Module) -> nn.Module:
    """The layer of the model itself, if the module is one with adapters beside it."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def is_conv1d(module: nn.Module) -> bool:
    """True if the weight of a layer of the model is (in, out), as in GPT-2."""
    return isinstance(unwrapped(module), Conv1D)


def backend_of(layer: nn.Module, kwargs: Mapping[str, Any]) -> Any:
    """peft's way to read and write the weight of a quantised layer; None if it is not quantised."""

    def unknown(*_: Any) -> Any:
        raise InputError("the model does not say how its torchao weights were quantised, so nothing can be merged")

    return resolve_quantization_backend(layer, **{"get_apply_tensor_subclass": unknown, **kwargs})


def _why_not(module: nn.Module, kwargs: Mapping[str, Any]) -> str | None:
    """The reason that no RaSA adapter can stand beside this module; None if one can."""
    from rasa_theory.peft.layer import RasaLayer

    if isinstance(module, BaseTunerLayer) and not isinstance(module, RasaLayer):
        return "it holds an adapter of another method, which must be merged or unloaded first"
    layer = unwrapped(module)
    if backend_of(layer, kwargs) is not None:
        return None
    if not isinstance(layer, nn.Linear | Conv1D):
        return f"it is a {type(layer).__name__}, neither Linear nor Conv1D"
    if type(layer).__name__ == "NonDynamicallyQuantizableLinear":
        return "it is the out_proj of a torch MultiheadAttention, which reads its weight and never calls it"
    weight = layer._parameters.get("weight")
    if weight is None:
        return "its weight is no parameter of its own (weight norm, or another parametrization)"
    if not weight.is_floating_point() or (weight.ndim != 2 and not hasattr(weight, "ds_shape")):
        return "its weight is no matrix of floating-point numbers"
    return None


def _check_not_shared(model: nn.Module, modules: Collection[str]) -> None:
    owners: dict[int, list[str]] = defaultdict(list)
    parameters: list[Tensor] = []  # kept, so that no identity is used twice
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            if parameter is not None:
                parameters.append(parameter)
                owners[id(parameter)].append(name.removesuffix(".base_layer"))
    for names in owners.values():
        if len(names) > 1 and (targets := [name for name in names if name in modules]):
            other = next((name for name in names if name != targets[0]), targets[0])
            raise InputError(
                f"{targets[0]!r} and {other!r} share one weight, so that a change of the one changes the other; "
                "choose target_modules without it"
            )


def _check_distinct(pools: list[Pool]) -> None:
    seen: dict[str, str] = {}
    for pool in pools:
        if pool.key in seen:
            raise InputError(
                f"the pools {seen[pool.key]!r} and {pool.name!r} would both be called {pool.key!r} in a file; give "
                "each an adapter of its own"
            )
        seen[pool.key] = pool.name
