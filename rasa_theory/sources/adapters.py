"""Stacks of adapters: the updates B A times their scaling, as factors that are never multiplied out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rasa_theory.common import InputError
from rasa_theory.formats import (
    Checkpoint,
    Entry,
    Exclusion,
    FactorPair,
    LeftOut,
    Place,
    Role,
    StoredAdapter,
    adapter_folder,
    adapter_in_folder,
    adapter_in_tensors,
)
from rasa_theory.problem import Factored
from rasa_theory.sources.catalogue import Catalogue, Portion, catalogue_of_groups
from rasa_theory.sources.grouping import Group, group


def open_adapter(folder: Path, memory: int | None = None, alone: bool = False) -> Catalogue:
    """The stacks of the adapter in a folder with a configuration; see `catalogue_of_adapter`.

    Raises InputError as `adapter_in_folder` does, and if no stack remains.
    """
    return catalogue_of_adapter(adapter_in_folder(folder), memory, alone)


def catalogue_of_adapter(adapter: StoredAdapter, memory: int | None = None, alone: bool = False) -> Catalogue:
    """The stacks of one adapter: for each kind of module the updates scaling B_i A_i, (out, in), one per layer.

    They are grouped and named like the weights of the modules in a checkpoint; the adapter says which of these are
    (in, out). The factors are held in memory, in float32 or more, whatever `memory` is. `alone` as for
    `grouping.group`. Raises InputError if no stack remains.
    """
    place_of = {f"{module}.weight": (adapter, module) for module in adapter.pairs}
    pairs = {key: adapter.pairs[module] for key, (_, module) in place_of.items()}
    entries = [Entry(key, pair.shape, "float32", pair.transposed, _place(pair)) for key, pair in pairs.items()]
    groups, ungrouped = group(entries, alone)
    source, holder = str(adapter.path), FactorHolder(place_of)
    catalogue = catalogue_of_groups(source, groups, adapter.left_out + ungrouped, holder, memory)
    return dataclasses.replace(catalogue, files=adapter.files)


def open_adapters(paths: Sequence[Path], memory: int | None = None) -> Catalogue:
    """The stacks of several adapters of one base, over tasks: one stack per module, with paths[t] as layer t.

    Modules that an adapter lacks, or that differ in shape, are left out; weights are (in, out) if one adapter says so.
    Raises InputError as `_adapter` does, for fewer than two adapters, and if no stack remains.
    """
    if len(paths) < 2:
        raise InputError(
            f"--adapters needs two folders or more, found {len(paths)}; one adapter alone is a --source, stacked over "
            "its layers"
        )
    adapters = [_adapter(path) for path in paths]
    left_out = [LeftOut(one.name, f"in {x.path}: {one.reason}", one.kind) for x in adapters for one in x.left_out]
    groups: list[Group] = []
    place_of: dict[str, tuple[StoredAdapter, str]] = {}
    for module in {module: None for x in adapters for module in x.pairs}:
        if (difference := _difference(adapters, module)) is not None:
            left_out.append(LeftOut(module, difference, Exclusion.UNMATCHED))
            continue
        keys = [f"{t}: {module}" for t in range(len(adapters))]
        place_of |= {key: (x, module) for key, x in zip(keys, adapters, strict=True)}
        transposed = any(x.pairs[module].transposed for x in adapters)
        groups.append(Group(module, len(keys), adapters[0].pairs[module].shape, keys, transposed))
    source = ", ".join(map(str, paths))
    catalogue = catalogue_of_groups(source, groups, left_out, FactorHolder(place_of), memory)
    return dataclasses.replace(catalogue, files=tuple(file for x in adapters for file in x.files))


def _place(pair: FactorPair) -> Place | None:
    """The place of a convolution; None for a Linear layer, since nothing is to be said about it."""
    return Place(Role.KERNELS, "by the axes of its factors", kernel=pair.kernel) if pair.kernel else None


def _adapter(path: Path) -> StoredAdapter:
    """The adapter in a folder or a file. Raises InputError if there is none, or it cannot be read exactly."""
    if (folder := adapter_folder(path)) is not None:
        return adapter_in_folder(folder)
    has_tensors = path.suffix.lower() == ".safetensors" or any(path.glob("*.safetensors"))
    adapter = adapter_in_tensors(Checkpoint(path)) if has_tensors else None
    return adapter if adapter is not None else adapter_in_folder(path)


def _difference(adapters: Sequence[StoredAdapter], module: str) -> str | None:
    """The reason why a module cannot be stacked over these adapters; None if all have it in one shape."""
    having = [x for x in adapters if module in x.pairs]
    first = having[0]
    if len(having) < len(adapters):
        lacking = next(x for x in adapters if module not in x.pairs)
        return f"in {first.path} but not in {lacking.path}"
    shape = first.pairs[module].shape
    other = next((x for x in having if x.pairs[module].shape != shape), None)
    if other is None:
        return None
    return f"shape {shape} in {first.path}, {other.pairs[module].shape} in {other.path}"


@dataclass(frozen=True)
class FactorHolder:
    """A Holder of factors; `place_of` has the adapter and the module of each key."""

    place_of: Mapping[str, tuple[StoredAdapter, str]]

    def file_of(self, key: str) -> str:
        return self.place_of[key][0].file

    def stored(self, g: Group) -> None:
        return None

    def hold(self, g: Group, portion: Portion) -> Factored:
        """The factors of the portion, filled up with zeros to the largest rank of the whole group."""
        places = [self.place_of[key] for key in g.keys]
        pairs = [adapter.pairs[module] for adapter, module in places]
        wide = torch.float64 if torch.float64 in [pair.dtype for pair in pairs] else torch.float32
        dtype, device = portion.dtype or wide, portion.device
        (b, a), m, held = g.shape, max(pair.rank for pair in pairs), len(pairs[portion.layers])
        B = torch.zeros(held, b, m, dtype=dtype, device=device)
        A = torch.zeros(held, m, a, dtype=dtype, device=device)
        for i, (adapter, module) in enumerate(places[portion.layers]):
            rank = adapter.pairs[module].rank
            B[i, :, :rank], A[i, :rank] = adapter.factors(module)
        return Factored(A.mT, B.mT) if g.transposed else Factored(B, A)
