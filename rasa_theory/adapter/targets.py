"""Targets of an adapter: layers of a model, selected by name, checked, and grouped by kind and shape."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn

from rasa_theory.adapter.layer import AdaptedLinear, is_conv1d, why_not_linear
from rasa_theory.adapter.terms import ModuleKind
from rasa_theory.common import InputError
from rasa_theory.formats import ModuleNames

PLACE = "rasa_adapters"  # name of the submodule that holds the adapters of a model
_SHOWN = 4  # names in a message


def named(model: nn.Module, targets: Sequence[str]) -> set[str]:
    """Names of the modules that the targets select, for `kinds_of`. Raises InputError if a target selects nothing."""
    if isinstance(targets, str) or not targets:
        raise InputError(f"targets must be a list of names of modules, got {targets!r}")
    modules = dict(_walk(model))
    linear = [name for name, module in modules.items() if why_not_linear(module) is None]
    selected: set[str] = set()
    for target in targets:
        if "*" in target:
            matches = [name for name in linear if fnmatchcase(name, target)]
        else:
            matches = [name for name in modules if f".{name}".endswith(f".{target}")]
        if not matches:
            kinds = list(dict.fromkeys(ModuleNames((name,)).kind for name in linear))
            raise InputError(f"target {target!r} names no Linear or Conv1D of the model, which has {some(kinds)}")
        selected.update(matches)
    return selected


def kinds_of(model: nn.Module, names: Collection[str]) -> list[ModuleKind]:
    """The modules of these names, grouped by kind and shape, in the order of the model.

    If a kind has several shapes, the shape is part of its name. Raises InputError if the model has no such module, no
    adapter can stand beside one, one shares its weight with another module, or the model cannot hold adapters.
    """
    if isinstance(model, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        raise InputError(f"a {type(model).__name__} takes all that is registered in it for its own; inject into a "
                         "module that has it as a part")  # fmt: skip
    modules = list(_walk(model))
    there = dict(modules)
    for name in names:
        if name not in there:
            raise InputError(f"the model has no module {name!r}")
        if reason := why_not_linear(there[name]):
            raise InputError(f"module {name!r} cannot be adapted: {reason}; choose targets without it")
    _check_not_shared(modules, names)
    groups: dict[str, dict[tuple[int, ...], dict[str, nn.Module]]] = defaultdict(lambda: defaultdict(dict))
    for name, module in modules:
        if name in names:
            layer = module.base if isinstance(module, AdaptedLinear) else module
            groups[ModuleNames((name,)).kind][tuple(layer.weight.shape)][name] = layer  # type: ignore[arg-type]
    return [
        ModuleKind(
            kind if len(shapes) == 1 else f"{kind}.{'x'.join(map(str, shape))}",
            ModuleNames(tuple(layers), all(map(is_conv1d, layers.values()))),
            [layer.weight for layer in layers.values()],  # type: ignore[misc]
        )
        for kind, shapes in groups.items()
        for shape, layers in shapes.items()
    ]


def _walk(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of a model, without the inside of adapted layers and adapters.

    A module that has two names comes twice.
    """
    for key, child in module._modules.items():
        if child is not None and key != PLACE:
            yield prefix + key, child
            if not isinstance(child, AdaptedLinear):
                yield from _walk(child, f"{prefix}{key}.")


def _check_not_shared(modules: Sequence[tuple[str, nn.Module]], selected: Collection[str]) -> None:
    owners: dict[int, list[str]] = defaultdict(list)
    for name, module in modules:
        plain = module.base if isinstance(module, AdaptedLinear) else module
        for parameter in plain._parameters.values():
            if parameter is not None:
                owners[id(parameter)].append(name)
    for names in owners.values():
        if len(names) > 1 and (targets := [name for name in names if name in selected]):
            other = next(name for name in names if name != targets[0])
            raise InputError(
                f"{targets[0]!r} and {other!r} share one weight, so that a change of the one changes the other; "
                "choose targets without it"
            )


def some(names: Sequence[str]) -> str:
    """The first few names, and the number of the others."""
    return ", ".join(map(repr, names[:_SHOWN])) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
