"""What a source holds: stacks that are read one at a time, when asked for, and the tensors left out."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from rasa_theory.common import DamagedFile, FailedElsewhere, InputError, NotFinite
from rasa_theory.distributed import ALONE, LayerSharding, Processes
from rasa_theory.formats import Entry, LeftOut
from rasa_theory.problem import Factored, LayerStack, OnDisk, Part, compute_dtype
from rasa_theory.sources.grouping import Group, group

__all__ = ["Catalogue", "Holder", "LeftOut", "Reader", "StackSource", "catalogue_of", "catalogue_of_groups"]

_SHOWN = 5


class Load(Protocol):
    """Reads a stack."""

    def __call__(
        self,
        dtype: torch.dtype | None,
        device: torch.device | None,
        processes: Processes = ALONE,
        tf32: bool = False,
    ) -> LayerStack: ...


@dataclass(frozen=True)
class StackSource:
    """A stack that is not read yet: `layers` matrices of `shape` (b, a).

    `load(dtype, device, processes, tf32)` reads it (None: as LayerStack chooses). It raises InputError, naming the
    file, if the file has been damaged or a value is not finite. Of several processes, each reads its own layers alone,
    and if one fails, all do, with a sentence that names it.

    `keys`: the tensor of each layer in the file, or the one tensor (layers, b, a); none if the stack is generated.
    `transposed`: the model has each matrix as (a, b), as a Conv1D does its weight; `load` gives (b, a) all the same.
    """

    name: str
    layers: int
    shape: tuple[int, int]
    load: Load
    keys: tuple[str, ...] = ()
    transposed: bool = False

    def memory(self, dtype: torch.dtype, decomposed: bool = True) -> int:
        """Bytes that work on it takes, about: the stack, its float64 SVDs if `decomposed`, and what one layer needs."""
        L, (b, a) = self.layers, self.shape
        return L * b * a * dtype.itemsize + 8 * (L * min(b, a) * (b + a) * decomposed + 4 * b * a)


@dataclass(frozen=True)
class Catalogue:
    """The stacks of `source`, and what of it is not looked at; `files` are those that it reads."""

    source: str
    stacks: list[StackSource]
    left_out: list[LeftOut]
    files: tuple[Path, ...] = ()

    def matching(self, globs: Sequence[str]) -> Catalogue:
        """The stacks whose name equals or matches one of `globs` (case counts); the others move to `left_out`.

        No glob at all keeps everything. Raises InputError if nothing matches, naming the stacks that there are.
        """
        if not globs:
            return self
        wanted = ", ".join(map(repr, globs))
        kept = [s for s in self.stacks if any(g == s.name or fnmatchcase(s.name, g) for g in globs)]
        if not kept:
            names = ", ".join(repr(s.name) for s in self.stacks)
            raise InputError(f"{self.source}: no stack matches --modules {wanted}; there are {names}")
        dropped = [LeftOut(s.name, f"does not match --modules {wanted}") for s in self.stacks if s not in kept]
        return dataclasses.replace(self, stacks=kept, left_out=self.left_out + dropped)


@dataclass(frozen=True)
class Reader:
    """Tensors by key: `read` one as a whole; `file_of` names its file in errors; `part` reads it in blocks of rows.

    None for `part` where the format does not allow that.
    """

    read: Callable[[str], Tensor]
    file_of: Callable[[str], str]
    part: Callable[[str], Part] | None = None


@dataclass(frozen=True)
class Holder:
    """`hold(group, dtype, device, own)` is what LayerStack takes, with matrices as the model has them.

    `own`: of which layers of the group; nothing else is read. `file_of` names the file of a key in errors.
    """

    hold: Callable[[Group, torch.dtype | None, torch.device | None, slice], Tensor | OnDisk | Factored]
    file_of: Callable[[str], str]


def catalogue_of(
    source: str,
    entries: Iterable[Entry],
    reader: Reader,
    left_out: Sequence[LeftOut] = (),
    memory: int | None = None,
    alone: bool = False,
) -> Catalogue:
    """Group `entries` into stacks that `reader` reads by key when loaded; `alone` as for `grouping.group`.

    A stack larger than a quarter of `memory` stays on disk. `left_out` is what the file format has already set aside.
    Raises InputError if no stack remains.
    """
    entries = list(entries)
    groups, ungrouped = group(entries, alone)
    by_name = {entry.name: entry for entry in entries}

    def hold(g: Group, dtype: torch.dtype | None, device: torch.device | None, own: slice) -> Tensor | OnDisk:
        return _held(g, own, reader, _common([by_name[key] for key in g.keys]), memory, dtype, device)

    return catalogue_of_groups(source, groups, [*left_out, *ungrouped], Holder(hold, reader.file_of), memory)


def catalogue_of_groups(
    source: str,
    groups: Sequence[Group],
    left_out: list[LeftOut],
    holder: Holder,
    memory: int | None = None,
) -> Catalogue:
    """The stacks of `groups`, which `holder` holds when they are loaded. Raises InputError if there are none."""
    if not groups:
        shown = "; ".join(f"{name!r}: {reason}" for name, reason in left_out[:_SHOWN])
        more = f"; and {len(left_out) - _SHOWN} more" if len(left_out) > _SHOWN else ""
        raise InputError(f"{source}: no stack remains ({shown or 'it holds no tensors'}{more})")
    return Catalogue(source, [_stack_source(g, holder, memory) for g in groups], left_out)


def _common(entries: list[Entry]) -> torch.dtype:
    """The dtype that holds all these tensors; one of more than 64 bits is read as float64."""
    names = ["float64" if entry.dtype in ("float96", "float128") else entry.dtype for entry in entries]
    common: torch.dtype = functools.reduce(torch.promote_types, [getattr(torch, name) for name in names])
    return common


def _stack_source(g: Group, holder: Holder, memory: int | None) -> StackSource:
    def load(
        dtype: torch.dtype | None, device: torch.device | None, processes: Processes = ALONE, tf32: bool = False
    ) -> LayerStack:
        with processes.raise_together():
            return read(dtype, device, LayerSharding.of(g.layers, processes), tf32)

    def read(dtype: torch.dtype | None, device: torch.device | None, sharding: LayerSharding, tf32: bool) -> LayerStack:
        with sharding.processes.raise_together():
            values = holder.hold(g, dtype, device, sharding.local)
        try:
            stack = LayerStack(values, g.name, dtype, device, memory, None if sharding.alone else sharding, tf32=tf32)
            return stack.transpose() if g.transposed else stack
        except (DamagedFile, FailedElsewhere):
            raise
        except NotFinite as error:
            key = g.keys[sharding.first + error.layer if len(g.keys) > 1 else 0]
            tensor = f" (tensor {key!r})" if len(g.keys) > 1 else ""
            raise InputError(f"{holder.file_of(key)}: {error}{tensor}") from None
        except InputError as error:
            raise InputError(f"{holder.file_of(g.keys[0])}: {error}") from None

    return StackSource(g.name, g.layers, g.shape, load, tuple(g.keys), g.transposed)


def _held(
    g: Group,
    own: slice,
    reader: Reader,
    stored: torch.dtype,
    memory: int | None,
    dtype: torch.dtype | None,
    device: torch.device | None,
) -> Tensor | OnDisk:
    """The layers `own` of the stack as they are stored, in memory or on disk."""
    b, a = g.in_model
    shape = (own.stop - own.start, b, a)
    size = math.prod(shape) * stored.itemsize
    if memory is not None and 4 * size > memory:
        if reader.part is None:
            raise InputError(
                f"{reader.file_of(g.keys[0])}: stack {g.name!r} takes {size / 2**20:.4g} MiB, more than a quarter of "
                "the memory allowed, and cannot be read in parts; save it as .npy or .safetensors"
            )
        if len(g.keys) > 1:
            return OnDisk([reader.part(key) for key in g.keys[own]], shape, stored, alone=True)
        return OnDisk([reader.part(g.keys[0])], shape, stored, first=own.start)
    if len(g.keys) == 1 and shape[0] < g.layers and reader.part is not None:
        return reader.part(g.keys[0]).read(own.start * b, own.stop * b).to(stored).reshape(shape)
    if len(g.keys) == 1:
        values = reader.read(g.keys[0])
        return (values if values.ndim == 3 else values[None])[own]
    target = stored if dtype is None or dtype.itemsize > stored.itemsize else compute_dtype(dtype)
    values = torch.empty(shape, dtype=target, device=device)
    for layer, key in zip(values, g.keys[own], strict=True):
        layer.copy_(reader.read(key))  # beside the stack, one tensor of the file is in memory at a time
    return values
