"""What a source holds: stacks that are read one at a time, when asked for, and the tensors left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from rasa_theory.errors import InputError
from rasa_theory.problem import LayerStack, compute_dtype
from rasa_theory.sources.grouping import Entry, Group, LeftOut, group

__all__ = ["Catalogue", "LeftOut", "StackSource", "catalogue_of"]

_SHOWN = 5


@dataclass(frozen=True)
class StackSource:
    """A stack that is not read yet: `layers` matrices of `shape` (b, a).

    `load(dtype, device)` reads it (None: as LayerStack chooses) and raises InputError, naming the file, if the file
    has been damaged or a value is not finite.
    """

    name: str
    layers: int
    shape: tuple[int, int]
    load: Callable[[torch.dtype | None, torch.device | None], LayerStack]


@dataclass(frozen=True)
class Catalogue:
    """The stacks of `source`, and what of it is not looked at."""

    source: str
    stacks: list[StackSource]
    left_out: list[LeftOut]

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
        return Catalogue(self.source, kept, self.left_out + dropped)


def catalogue_of(
    source: str,
    entries: Iterable[Entry],
    read: Callable[[str], Tensor],
    file_of: Callable[[str], str],
    left_out: Sequence[LeftOut] = (),
) -> Catalogue:
    """Group `entries` into stacks that `read` them by key when loaded; `file_of(key)` names the file in errors.

    `left_out` is what the file format has already set aside. Raises InputError if no stack remains.
    """
    entries = list(entries)
    groups, ungrouped = group(entries)
    left_out = [*left_out, *ungrouped]
    if not groups:
        shown = "; ".join(f"{name!r}: {reason}" for name, reason in left_out[:_SHOWN])
        more = f"; and {len(left_out) - _SHOWN} more" if len(left_out) > _SHOWN else ""
        raise InputError(f"{source}: no stack remains ({shown or 'it holds no tensors'}{more})")
    doubles = {entry.name for entry in entries if entry.dtype in ("float64", "float96", "float128")}
    return Catalogue(source, [_stack_source(source, g, read, file_of, doubles) for g in groups], left_out)


def _stack_source(
    source: str, g: Group, read: Callable[[str], Tensor], file_of: Callable[[str], str], doubles: set[str]
) -> StackSource:
    def load(dtype: torch.dtype | None, device: torch.device | None) -> LayerStack:
        if len(g.keys) == 1:
            values = read(g.keys[0])
        else:  # filled in place: beside the stack, one tensor of the file is in memory at a time
            natural = torch.float32 if doubles.isdisjoint(g.keys) else torch.float64
            target = natural if dtype is None else compute_dtype(dtype)
            values = torch.empty(g.layers, *g.shape, dtype=target, device=device)
            for layer, key in zip(values, g.keys, strict=True):
                layer.copy_(read(key))
        try:
            return LayerStack(values, g.name, dtype, device)
        except InputError as error:
            bad = [len(g.keys) > 1 and not bool(torch.isfinite(layer).all()) for layer in values]
            key = g.keys[bad.index(True) if any(bad) else 0]
            tensor = f" (tensor {key!r})" if any(bad) else ""
            raise InputError(f"{file_of(key)}: {error}{tensor}") from None

    return StackSource(g.name, g.layers, g.shape, load)
