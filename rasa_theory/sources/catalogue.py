"""The contents of a source: stacks that are read one at a time, on demand, and the tensors left out."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rasa_theory.common import DamagedFile, FailedElsewhere, InputError, NotFinite
from rasa_theory.distributed import ALONE, LayerSharding, Processes
from rasa_theory.formats import Entry, Exclusion, LeftOut, Place
from rasa_theory.problem import Factored, LayerStack, OnDisk, Part, compute_dtype, exceeds_share
from rasa_theory.sources.grouping import Group, group
from rasa_theory.sources.tensor_updates import Norms, Updates

_SHOWN = 5


class Load(Protocol):
    """A function that reads a stack. None leaves dtype or device to `LayerStack`; see `StackSource`."""

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

    Attributes:
        name: the name of the stack.
        layers: L.
        shape: (b, a).
        load: reads it as a `LayerStack`: load(dtype, device, processes, tf32), None as `LayerStack` chooses. It raises
            InputError, naming the file, if the file has been damaged or a value is not finite. With several processes,
            each reads its own layers alone. If one fails, all fail, with a message that names it.
        keys: the tensor of each layer in the file, or the one tensor (layers, b, a); empty if the stack is generated.
        transposed: true if the model stores each matrix as (a, b), as Conv1D does. `load` returns (b, a) all the same.
        place: the role of the tensors in their model, and how it was decided; None in a file of updates. With a place,
            `keys` are names of parameters in the model; without ".weight" they are the modules. For `Role.EXPERTS` the
            one key is the parameter (experts, b, a), and layer i is expert i.
        stored: the dtype of the files in which a limit on memory leaves it; None if it is always in memory.
        is_one_tensor: the stack is one tensor (L, b, a) of the file, also where L is 1.
    """

    name: str
    layers: int
    shape: tuple[int, int]
    load: Load
    keys: tuple[str, ...] = ()
    transposed: bool = False
    place: Place | None = None
    stored: torch.dtype | None = None
    is_one_tensor: bool = False

    @property
    def has_named_layers(self) -> bool:
        """Whether every layer is a tensor of its own, with a name."""
        return bool(self.keys) and not self.is_one_tensor

    def memory(self, dtype: torch.dtype, decomposed: bool = True, limit: int | None = None) -> int:
        """An estimate of the bytes of memory that work on it takes, if `limit` bytes are allowed (None: no limit).

        It counts the stack, its float64 SVDs if `decomposed`, and the work on one layer. Of the first two it leaves
        out what stays on disk.
        """
        L, (b, a) = self.layers, self.shape
        svds = 8 * L * min(b, a) * (b + a) * decomposed
        stack = 0 if self.stays_on_disk(limit) else L * b * a * dtype.itemsize
        return stack + (0 if exceeds_share(svds, limit) else svds) + 32 * b * a

    def stays_on_disk(self, limit: int | None) -> bool:
        """Return whether its entries stay in their files if `limit` bytes of memory are allowed (None: no limit)."""
        size = self.layers * math.prod(self.shape)
        return self.stored is not None and exceeds_share(size * self.stored.itemsize, limit)


@dataclass(frozen=True)
class Catalogue:
    """The stacks of `source`, the tensors left out, and the files that it reads.

    Attributes:
        source: the description of the source.
        stacks: the stacks, not read yet.
        left_out: the tensors that form no stack, each with its reason.
        files: the files of the source.
        updates: the updates of all tensors by their names, including tensors left out; None where a source has no
            tensors beside its stacks.
        notes: sentences that a user should read before the names are used.
    """

    source: str
    stacks: list[StackSource]
    left_out: list[LeftOut]
    files: tuple[Path, ...] = ()
    updates: Updates | None = None
    notes: tuple[str, ...] = ()

    def norms(self, source: StackSource) -> list[Norms] | None:
        """The norms of every layer of a stack; None where the source does not measure them.

        They come from the reading of the stack, if it was read as a whole before, else the tensors are read here.
        """
        if self.updates is None or not source.keys:
            return None
        norms = [self.updates.norms(key) for key in source.keys]
        return [one for several in norms for one in several or ()] if None not in norms else None

    def of_rank(self, rank: int) -> Catalogue:
        """Move the stacks whose matrices are narrower than `rank` to `left_out`, unless all are: then nothing moves."""
        narrow = [source for source in self.stacks if min(source.shape) < rank]
        if len(narrow) == len(self.stacks):
            return self
        dropped = [
            LeftOut(
                source.name,
                f"rank {rank} exceeds min(b, a) = {min(source.shape)}: an adapter takes such matrices whole",
                Exclusion.NARROW,
            )
            for source in narrow
        ]
        stacks = [source for source in self.stacks if source not in narrow]
        return dataclasses.replace(self, stacks=stacks, left_out=self.left_out + dropped)

    def check_changed(self, nothing: str) -> None:
        """Raise InputError if this is a pair and every update of its stacks is zero; `nothing` ends the sentence.

        The first tensor of every stack is read first, so that for a pair that differs little is read.
        """
        if self.updates is None or not self.updates.is_pair:
            return
        keys = [source.keys[:1] for source in self.stacks] + [source.keys[1:] for source in self.stacks]
        for key in (key for several in keys for key in several):
            norms = self.updates.norms(key)
            if norms is None or any(one.update > 0 for one in norms):
                return
        changed = [name for name, one in self.norms_left_out().items() if one.update > 0]
        only = f"; only {changed[0]!r} has changed, which is in no stack" if changed else ""
        raise InputError(f"{self.source}: every update is zero, {nothing}{only}")

    def norms_left_out(self) -> dict[str, Norms]:
        """The norms of the tensors in `left_out` by name: of all that both checkpoints have and that can be read.

        Stacks among `left_out` are not in it; see `norms`.
        """
        norms = {one.name: self.updates.norms(one.name) for one in self.left_out} if self.updates is not None else {}
        return {name: Norms.together(several) for name, several in norms.items() if several is not None}

    def matching(self, globs: Sequence[str]) -> Catalogue:
        """Select the stacks whose name equals or matches one of `globs` (case counts); the others move to `left_out`.

        Without globs all stay. Raises InputError if nothing matches, naming the stacks that there are.
        """
        if not globs:
            return self
        patterns = ", ".join(map(repr, globs))
        selected = [s for s in self.stacks if _matches(s.name, globs)]
        if not selected:
            names = ", ".join(repr(s.name) for s in self.stacks)
            part = next((glob for glob in globs if any(glob in s.name for s in self.stacks)), None)
            hint = f"; '*{part}*' matches names with {part!r} in them" if part else ""
            raise InputError(f"{self.source}: no stack matches --modules {patterns}; there are {names}{hint}")
        return self._only(selected, f"does not match --modules {patterns}")

    def without(self, globs: Sequence[str]) -> Catalogue:
        """Move the stacks whose name equals or matches one of `globs` (case counts) to `left_out`.

        Raises InputError if a glob matches nothing, or nothing remains.
        """
        if idle := [g for g in globs if not any(_matches(s.name, [g]) for s in self.stacks)]:
            names = ", ".join(repr(s.name) for s in self.stacks)
            raise InputError(f"{self.source}: no stack matches --exclude {idle[0]!r}; there are {names}")
        remaining = [s for s in self.stacks if not _matches(s.name, globs)]
        if not remaining:
            raise InputError(f"{self.source}: --exclude leaves no stack; name fewer")
        return self._only(remaining, f"matches --exclude {', '.join(map(repr, globs))}")

    def _only(self, stacks: list[StackSource], reason: str) -> Catalogue:
        """The catalogue with these of its stacks; the others are left out for this reason."""
        dropped = [LeftOut(s.name, reason, Exclusion.UNSELECTED) for s in self.stacks if s not in stacks]
        return dataclasses.replace(self, stacks=stacks, left_out=self.left_out + dropped)


def _matches(name: str, globs: Sequence[str]) -> bool:
    return any(glob == name or fnmatchcase(name, glob) for glob in globs)


# ---- from groups of tensors to stacks


class Portion(NamedTuple):
    """The part of a stack to read, and where to: some of its layers, in this dtype (None: the file's) and device."""

    layers: slice
    dtype: torch.dtype | None
    device: torch.device | None


class Holder(Protocol):
    """Reads groups of a file format when their stacks are loaded."""

    def hold(self, g: Group, portion: Portion) -> Tensor | OnDisk | Factored:
        """The `values` for LayerStack, with matrices as the model has them; nothing but the portion is read."""
        ...

    def file_of(self, key: str) -> str:
        """The file of a tensor, for errors."""
        ...

    def stored(self, g: Group) -> torch.dtype | None:
        """The dtype of the files in which a limit on memory leaves the group; None if it is always in memory."""
        ...


@dataclass(frozen=True)
class Reader:
    """Access to the tensors of a file format by key.

    `read` reads one as a whole, `part` in blocks of rows (None: the format does not allow that). `file_of` names its
    file in errors.
    """

    read: Callable[[str], Tensor]
    file_of: Callable[[str], str]
    part: Callable[[str], Part] | None = None


@dataclass(frozen=True)
class TensorHolder:
    """A Holder of tensors that `reader` reads; `dtype_of` has the dtype of each in its file.

    A stack larger than a quarter of `memory` (bytes; None: no limit) stays on disk.
    """

    reader: Reader
    dtype_of: dict[str, torch.dtype]
    memory: int | None

    def file_of(self, key: str) -> str:
        return self.reader.file_of(key)

    def stored(self, g: Group) -> torch.dtype:
        return functools.reduce(torch.promote_types, [self.dtype_of[key] for key in g.keys])

    def hold(self, g: Group, portion: Portion) -> Tensor | OnDisk:
        layers = portion.layers
        stored = self.stored(g)
        shape = (layers.stop - layers.start, *g.in_model)
        size = math.prod(shape) * stored.itemsize
        if exceeds_share(size, self.memory):
            return self._on_disk(g, layers, shape, stored)
        if len(g.keys) == 1:
            return self._from_one_tensor(g, layers, shape, stored)
        dtype, device = portion.dtype, portion.device
        target = stored if dtype is None or dtype.itemsize > stored.itemsize else compute_dtype(dtype)
        values = torch.empty(shape, dtype=target, device=device)
        for layer, key in zip(values, g.keys[layers], strict=True):
            layer.copy_(self.reader.read(key))  # beside the stack, one tensor of the file is in memory at a time
        return values

    def _on_disk(self, g: Group, layers: slice, shape: tuple[int, int, int], stored: torch.dtype) -> OnDisk:
        if self.reader.part is None:
            size = math.prod(shape) * stored.itemsize
            raise InputError(
                f"{self.file_of(g.keys[0])}: stack {g.name!r} takes {size / 2**20:.4g} MiB, more than a quarter of "
                "the memory allowed, and cannot be read in parts; save it as .npy or .safetensors"
            )
        if len(g.keys) > 1:
            return OnDisk([self.reader.part(key) for key in g.keys[layers]], shape, stored, alone=True)
        return OnDisk([self.reader.part(g.keys[0])], shape, stored, first=layers.start)

    def _from_one_tensor(self, g: Group, layers: slice, shape: tuple[int, int, int], stored: torch.dtype) -> Tensor:
        """Some layers of the tensor that is the whole stack; where it can be, no others are read."""
        (key,), (held, b, _) = g.keys, shape
        if held < g.layers and self.reader.part is not None:
            return self.reader.part(key).read(layers.start * b, layers.stop * b).to(stored).reshape(shape)
        values = self.reader.read(key)
        return (values if values.ndim == 3 else values[None])[layers]


def catalogue_of(
    source: str,
    entries: Iterable[Entry],
    reader: Reader,
    left_out: Sequence[LeftOut] = (),
    memory: int | None = None,
    alone: bool = False,
) -> Catalogue:
    """Group `entries` into stacks whose tensors `reader` reads when they are loaded; `alone` as for `grouping.group`.

    A stack larger than a quarter of `memory` stays on disk. `left_out`: the tensors that the format has set aside.
    Raises InputError if no stack remains.
    """
    entries = list(entries)
    groups, ungrouped = group(entries, alone)
    grouped = {key for g in groups for key in g.keys}
    dtype_of = {entry.name: _torch_dtype(entry) for entry in entries if entry.name in grouped}
    holder = TensorHolder(reader, dtype_of, memory)
    return catalogue_of_groups(source, groups, [*left_out, *ungrouped], holder, memory)


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


def _torch_dtype(entry: Entry) -> torch.dtype:
    """The dtype that holds the tensor; one of more than 64 bits is read as float64."""
    dtype: torch.dtype = getattr(torch, "float64" if entry.dtype in ("float96", "float128") else entry.dtype)
    return dtype


def _stack_source(g: Group, holder: Holder, memory: int | None) -> StackSource:
    def load(
        dtype: torch.dtype | None, device: torch.device | None, processes: Processes = ALONE, tf32: bool = False
    ) -> LayerStack:
        # Making a LayerStack is collective: processes compare its largest entry. So they first agree, within, that
        # each could read its layers; the outer agreement is on the checks of the stack itself.
        with processes.raise_together():
            sharding = LayerSharding.of(g.layers, processes)
            with processes.raise_together():
                values = holder.hold(g, Portion(sharding.local, dtype, device))
            try:
                stack = LayerStack(
                    values, g.name, dtype, device, memory, None if sharding.alone else sharding, tf32=tf32
                )
                return stack.transpose() if g.transposed else stack
            except (DamagedFile, FailedElsewhere):
                raise
            except NotFinite as error:
                key = g.keys[sharding.first + error.layer if len(g.keys) > 1 else 0]
                tensor = f" (tensor {key!r})" if len(g.keys) > 1 else ""
                raise InputError(f"{holder.file_of(key)}: {error}{tensor}") from None
            except InputError as error:
                raise InputError(f"{holder.file_of(g.keys[0])}: {error}") from None

    return StackSource(
        g.name, g.layers, g.shape, load, tuple(g.keys), g.transposed, g.place, holder.stored(g), g.is_one_tensor
    )
