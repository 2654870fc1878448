"""Updates from a pair of checkpoints, base and tuned: tuned minus base, of the tensors that correspond."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from rasa_theory.common import InputError
from rasa_theory.formats import Entry, Exclusion, LeftOut, ModelCheckpoint, architecture, is_floating, model_types
from rasa_theory.sources.catalogue import Catalogue, Reader, catalogue_of
from rasa_theory.sources.tensor_updates import Differences, PairedKeys


class Prefix(NamedTuple):
    """The difference between the names of two checkpoints.

    Names that begin with `tuned` in the tuned checkpoint begin with `base` in the other, and go on alike. Each of the
    two is dotted components with the dot after them, or empty; one begins with the other.
    """

    base: str
    tuned: str

    def in_base(self, name: str) -> str:
        """The name in the base of a tensor called `name` in the tuned checkpoint."""
        return self.base + name.removeprefix(self.tuned) if name.startswith(self.tuned) else name

    def __str__(self) -> str:
        if not self.base:
            return f"{self.tuned!r} taken off the names"
        return (
            f"{self.tuned!r} read as {self.base!r} in the names"
            if self.tuned
            else f"{self.base!r} put before the names"
        )


def open_pair(base: Path, tuned: Path, memory: int | None = None, alone: bool = False) -> Catalogue:
    """The stacks of updates, tuned - base in float32 (float64 if either is), of the tensors that both have.

    Tensors have the names of the model that the config.json of `base`, or else of `tuned`, describes; so the two may
    be saved under different names. Where transformers does not know it, they are named as in `base`. If no layer has
    the same name in both, they may differ by a prefix (`find_prefix`), which the source then mentions.

    Tensors that only one has, or whose shapes differ, are left out. Raises InputError as `open_checkpoint` and
    `find_prefix` do, and if both hold matrices but none in common.
    """
    model, models = architecture(base) or architecture(tuned), model_types(tuned) or model_types(base)
    before, after = ModelCheckpoint(base, model, models), ModelCheckpoint(tuned, model, models)
    prefix = find_prefix(before, after)
    key_after = _corresponding(before.entries, after.entries, prefix)
    entries: list[Entry] = []
    left_out = [*before.left_out, *after.left_out]
    for key, old in before.entries.items():
        if key not in key_after:
            left_out.append(LeftOut(key, f"in {base} but not in {tuned}", Exclusion.UNMATCHED))
            continue
        new = after.entries[key_after[key]]
        if old.shape != new.shape:
            reason = f"shape {old.shape} in {base}, {new.shape} in {tuned}"
            left_out.append(LeftOut(key, reason, Exclusion.UNMATCHED))
            continue
        entries.append(old._replace(dtype=_dtype_of_difference(old.dtype, new.dtype)))
    if not any(map(_is_matrix, entries)):
        _refuse_strangers(before, after, key_after)
    matched = set(key_after.values())
    left_out += [
        LeftOut(key, f"in {tuned} but not in {base}", Exclusion.UNMATCHED)
        for key in after.entries
        if key not in matched
    ]
    wide = {entry.name: torch.float64 if entry.dtype == "float64" else torch.float32 for entry in entries}
    updates = Differences({entry.name: entry for entry in entries}, before, after, PairedKeys(key_after, wide))
    source = f"{tuned} minus {base}" + (f" ({prefix} of {tuned})" if prefix is not None else "")
    reader = Reader(updates.read, updates.file_of, updates.part)
    catalogue = catalogue_of(source, entries, reader, left_out, memory, alone)
    return dataclasses.replace(catalogue, files=before.files + after.files, updates=updates)


def _dtype_of_difference(old: str, new: str) -> str:
    """The dtype of tuned - base; one of the two, if it cannot be computed with."""
    for dtype in (old, new):
        if not is_floating(dtype):
            return dtype
    return "float64" if "float64" in (old, new) else "float32"


# ---- names that correspond


def find_prefix(before: ModelCheckpoint, after: ModelCheckpoint) -> Prefix | None:
    """Find the prefix by which the names of two checkpoints differ; None if a layer has the same name in both.

    A layer is a floating-point matrix, or a stack of them, with a number among the dotted components of its name.
    A prefix is a run of components that one checkpoint has in its names and the other lacks. It stands at their
    beginning or after their first component, and before the number: `bert.`, or `language_model.` in
    `model.language_model.layers.0` for `model.layers.0`. It fits if with it a layer of one checkpoint has the name and
    shape of a layer of the other. Returns None if no prefix fits. Raises InputError if several fit: nothing is guessed.
    """
    old, new = _layers(before.entries), _layers(after.entries)
    if not old.keys().isdisjoint(new):
        return None
    fitting = {Prefix(base=short, tuned=long): None for long, short in _beginnings(new, old)}
    fitting |= {Prefix(base=long, tuned=short): None for long, short in _beginnings(old, new)}
    if len(fitting) > 1:
        raise InputError(
            f"{after.path} and {before.path}: which layers correspond is unclear, for they are found with "
            f"{', and with '.join(map(str, fitting))} of {after.path}; give checkpoints whose names agree"
        )
    return next(iter(fitting), None)


def _layers(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    return {
        name: entry
        for name, entry in entries.items()
        if _is_matrix(entry) and is_floating(entry.dtype) and any(map(str.isdecimal, name.split(".")))
    }


def _is_matrix(entry: Entry) -> bool:
    return len(entry.shape) in (2, 3)


def _beginnings(longer: Mapping[str, Entry], shorter: Mapping[str, Entry]) -> Iterator[tuple[str, str]]:
    """Shorten names of `longer` by a run of components before the number, until they are names in `shorter`.

    Yields the beginning of the name up to the end of that run, and the same without the run. In `shorter` the
    shortened name has the same shape.
    """
    for name, entry in longer.items():
        parts = name.split(".")
        number = next(i for i, part in enumerate(parts) if part.isdecimal())
        tried: set[str] = set()
        for start in (0, 1):
            for stop in range(start + 1, number + 1):
                shortened = ".".join(parts[:start] + parts[stop:])
                if shortened not in tried and shortened in shorter and shorter[shortened].shape == entry.shape:
                    tried.add(shortened)  # either `model` of model.model.layers.0 may go: the first does
                    yield _dotted(parts[:stop]), _dotted(parts[:start])


def _dotted(parts: list[str]) -> str:
    return "".join(f"{part}." for part in parts)


def _corresponding(before: Mapping[str, Entry], after: Mapping[str, Entry], prefix: Prefix | None) -> dict[str, str]:
    """The name in the tuned checkpoint of each tensor that both have, by its name in the base. Equal names go first."""
    name_of: dict[str, str] = {}
    for name in after:
        key = name if prefix is None or name in before else prefix.in_base(name)
        if key == name or key not in after:
            name_of[key] = name
    return {key: name_of[key] for key in before if key in name_of}


def _refuse_strangers(before: ModelCheckpoint, after: ModelCheckpoint, key_after: Mapping[str, str]) -> None:
    """Raise InputError if both checkpoints hold matrices, but none in common: they are two models."""
    advice = "give a model and what was fine-tuned from it, both in full"
    for key, old in before.entries.items():
        if key in key_after and _is_matrix(old):
            new = after.entries[key_after[key]]
            raise InputError(
                f"{after.path} and {before.path} have no matrix of the same name and shape: {key!r}, for one, is "
                f"{new.shape} in the one and {old.shape} in the other; {advice}"
            )
    first, second = (next(filter(_is_matrix, x.entries.values()), None) for x in (after, before))
    if first is not None and second is not None:
        raise InputError(
            f"no matrix of {after.path}, such as {first.name!r}, is in {before.path}, which has others, such as "
            f"{second.name!r}; {advice}"
        )
