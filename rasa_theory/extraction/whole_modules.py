"""Modules that an adapter replaces as a whole (`modules_to_save` of PEFT): embeddings, output layers and norms."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from rasa_theory.formats import Entry

_PARTS = ("weight", "bias")


@dataclass(frozen=True)
class WholeModule:
    """A module that no factors adapt: its name, its tensors, and the names under which they are left out.

    `keys` are pairs of weight or bias, and the key in the checkpoint.
    """

    name: str
    keys: tuple[tuple[str, str], ...]
    changes: tuple[str, ...]


def whole_modules(entries: Mapping[str, Entry], adapted: Iterable[str], rest: Collection[str]) -> list[WholeModule]:
    """The modules with tensors among `entries` of which none is `adapted`, and some are in `rest`.

    A module with other parameters than a weight and a bias is none of them: saving it would save all that is within.
    """
    parts_of: dict[str, list[tuple[str, str]]] = {}
    for key in entries:
        module, _, part = key.rpartition(".")
        parts_of.setdefault(module, []).append((part, key))
    taken = {key.rpartition(".")[0] for key in adapted}
    modules = []
    for module, parts in parts_of.items():
        changes = tuple(key for _, key in parts if key in rest)
        if module and module not in taken and changes and all(part in _PARTS for part, _ in parts):
            modules.append(WholeModule(module, tuple(parts), changes))
            modules += _tied(entries, parts, changes)
    return modules


def _tied(
    entries: Mapping[str, Entry], parts: Sequence[tuple[str, str]], changes: tuple[str, ...]
) -> list[WholeModule]:
    """The modules that share a tensor with one that is saved whole. PEFT replaces that one alone, and unties them."""
    names = [
        (name, key) for _, key in parts if (place := entries[key].place) for name in place.tied if name not in entries
    ]
    return [WholeModule(name.rpartition(".")[0], ((name.rpartition(".")[2], key),), changes) for name, key in names]


def changed_modules(modules: Sequence[WholeModule], changed: Collection[str]) -> list[WholeModule]:
    """The modules with a tensor among `changed`, and those whose name ends like one of them.

    PEFT replaces every module whose name ends with a name in `modules_to_save`, and wants the tensors of each.
    """
    names = {module.name for module in modules if any(name in changed for name in module.changes)}
    return [module for module in modules if any(module.name.endswith(name) for name in names)]
