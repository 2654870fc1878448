"""Folders of PEFT LoRA adapters: the updates B A times their scaling, kept as factors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from rasa_theory.common import InputError
from rasa_theory.formats import Entry, LeftOut, LoraFolder
from rasa_theory.problem import Factored
from rasa_theory.sources.catalogue import Catalogue, Holder, catalogue_of_groups
from rasa_theory.sources.grouping import Group, group


def open_adapter(path: Path, memory: int | None = None, alone: bool = False) -> Catalogue:
    """The stacks of an adapter: of each module kind the updates scaling B_i A_i, (out, in), one per layer.

    Grouped and named as the weights of the modules in a checkpoint would be; which of them are (in, out) there,
    `adapted_conv1d` says. The factors are held in memory, in float32 or more, whatever `memory` is. Raises InputError
    as LoraFolder does, and if no stack remains. `alone` as for `grouping.group`.
    """
    adapter = LoraFolder(path)
    module_of = {f"{module}.weight": module for module in adapter.pairs}
    pairs = {name: adapter.pairs[module] for name, module in module_of.items()}
    entries = [Entry(name, pair.shape, "float32", pair.transposed) for name, pair in pairs.items()]
    groups, ungrouped = group(entries, alone)
    holder = _holder(lambda key: (adapter, module_of[key]))
    found = catalogue_of_groups(str(path), groups, adapter.left_out + ungrouped, holder, memory)
    return dataclasses.replace(found, files=adapter.files)


def open_adapters(paths: Sequence[Path], memory: int | None = None) -> Catalogue:
    """Adapters of one base, stacked over tasks: one stack per module, named by it; layer t is that of paths[t].

    Modules that not all have, or of different shapes, are left out; weights are (in, out) where one adapter says so.
    Raises InputError as LoraFolder does, for fewer than two adapters, and if no stack remains.
    """
    if len(paths) < 2:
        raise InputError(
            f"--adapters needs two folders or more, found {len(paths)}; one adapter alone is a --source, stacked over "
            "its layers"
        )
    adapters = [LoraFolder(path) for path in paths]
    left_out = [LeftOut(name, f"in {x.path}: {reason}") for x in adapters for name, reason in x.left_out]
    groups: list[Group] = []
    at: dict[str, tuple[LoraFolder, str]] = {}
    for module in {module: None for x in adapters for module in x.pairs}:
        having = [x for x in adapters if module in x.pairs]
        first = having[0]
        if len(having) < len(adapters):
            missing = next(x for x in adapters if module not in x.pairs)
            left_out.append(LeftOut(module, f"in {first.path} but not in {missing.path}"))
            continue
        shape = first.pairs[module].shape
        if other := next((x for x in having if x.pairs[module].shape != shape), None):
            found = other.pairs[module].shape
            left_out.append(LeftOut(module, f"shape {shape} in {first.path}, {found} in {other.path}"))
            continue
        keys = [f"{t}: {module}" for t in range(len(adapters))]
        at |= {key: (x, module) for key, x in zip(keys, adapters, strict=True)}
        transposed = any(x.pairs[module].transposed for x in having)
        groups.append(Group(module, len(keys), shape, keys, transposed))
    catalogue = catalogue_of_groups(", ".join(map(str, paths)), groups, left_out, _holder(at.__getitem__), memory)
    return dataclasses.replace(catalogue, files=tuple(file for x in adapters for file in x.files))


def _holder(at: Callable[[str], tuple[LoraFolder, str]]) -> Holder:
    """Holds the factors of a group, whose keys `at` finds: adapter and module."""

    def hold(g: Group, dtype: torch.dtype | None, device: torch.device | None, own: slice) -> Factored:
        layers = [at(key) for key in g.keys]
        pairs = [adapter.pairs[module] for adapter, module in layers]
        wide = torch.float64 if torch.float64 in [pair.dtype for pair in pairs] else torch.float32
        (b, a), m = g.shape, max(pair.rank for pair in pairs)
        B = torch.zeros(len(pairs[own]), b, m, dtype=dtype or wide, device=device)
        A = torch.zeros(len(pairs[own]), m, a, dtype=dtype or wide, device=device)
        for i, (adapter, module) in enumerate(layers[own]):
            r = pairs[own][i].rank
            B[i, :, :r], A[i, :r] = adapter.factors(module)
        return Factored(A.mT, B.mT) if g.transposed else Factored(B, A)

    return Holder(hold, lambda key: at(key)[0].file)


# ---- the configuration


# ---- what is not taken
