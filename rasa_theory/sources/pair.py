"""Updates from a pair of checkpoints, base and tuned: tuned minus base, of the tensors that correspond."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from rasa_theory.common import InputError
from rasa_theory.formats import (
    Checkpoint,
    Entry,
    Exclusion,
    LeftOut,
    ModelCheckpoint,
    architecture,
    config_file,
    holds_adapter,
    is_floating,
    model_config,
    model_types,
    refuse_quantised,
    refuse_unmerged,
    why_unknown,
)
from rasa_theory.sources.catalogue import Catalogue, Reader, catalogue_of
from rasa_theory.sources.tensor_updates import Differences, PairedKeys


class Prefix(NamedTuple):
    """The difference between the names of two checkpoints.

    Names that begin with `tuned` in the tuned checkpoint begin with `base` in the other, and go on alike. Each of the
    two is dotted components with the dot after them, or empty.
    """

    base: str
    tuned: str

    def in_base(self, name: str) -> str:
        """The name in the base of a tensor called `name` in the tuned checkpoint."""
        return self.base + name.removeprefix(self.tuned) if name.startswith(self.tuned) else name

    @property
    def is_exchange(self) -> bool:
        """Whether neither side is the other with components before or after it."""
        return not (self.base.startswith(self.tuned) or self.tuned.startswith(self.base))

    def __str__(self) -> str:
        if not self.base:
            return f"{self.tuned!r} taken off the names"
        return (
            f"{self.tuned!r} read as {self.base!r} in the names"
            if self.tuned
            else f"{self.base!r} put before the names"
        )


def open_pair(
    base: Path, tuned: Path, memory: int | None = None, alone: bool = False, convolutions: bool = False
) -> Catalogue:
    """The stacks of updates, tuned - base in float32 (float64 if either is), of the tensors that both have.

    Tensors have the names of the model that the config.json of `base`, or else of `tuned`, describes; so the two may
    be saved under different names. Where transformers does not know it, they are named as in `base`. Layers
    that have the same name in both correspond; the names of others may differ by prefixes (`find_prefixes`), which the
    source then mentions.

    Tensors that only one has, or whose shapes differ, are left out. Raises InputError as `open_checkpoint` and
    `find_prefixes` do, and if both hold matrices but none in common.
    """
    disk = _model(base), _model(tuned)
    model, models = architecture(base) or architecture(tuned), model_types(tuned) or model_types(base)
    before, after = (ModelCheckpoint(one, model, models, convolutions) for one in disk)
    prefixes = find_prefixes(before, after)
    key_after = _corresponding(before.entries, after.entries, prefixes)
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
    if model is not None:
        _refuse_other_config(base, model.name, entries)
    matched = set(key_after.values())
    left_out += [
        LeftOut(key, f"in {tuned} but not in {base}", Exclusion.UNMATCHED)
        for key in after.entries
        if key not in matched
    ]
    wide = {entry.name: torch.float64 if entry.dtype == "float64" else torch.float32 for entry in entries}
    updates = Differences({entry.name: entry for entry in entries}, before, after, PairedKeys(key_after, wide))
    source = f"{tuned} minus {base}" + (f" ({', '.join(map(str, prefixes))} of {tuned})" if prefixes else "")
    reader = Reader(updates.read, updates.file_of, updates.part)
    catalogue = catalogue_of(source, entries, reader, left_out, memory, alone)
    notes = () if model is not None else (_as_on_disk(tuned if config_file(base) is None else base),)
    return dataclasses.replace(catalogue, files=before.files + after.files, updates=updates, notes=notes)


def _as_on_disk(path: Path) -> str:
    """The sentence that names are those of the disk, with the reason."""
    return (
        f"Modules are named as on the disk, and tensors taken for what their names and shapes say, since "
        f"{why_unknown(path)}. The model may name them otherwise."
    )


def _refuse_other_config(base: Path, model: str, entries: Sequence[Entry]) -> None:
    """Raise InputError if the model class knows none of the matrices: the config.json is another model's."""
    matrices = [entry for entry in entries if _is_matrix(entry)]
    if matrices and all(entry.place is None or entry.place.position is None for entry in matrices):
        raise InputError(
            f"{base}: config.json describes a {model}, which has no matrix called as those of the checkpoints, such as "
            f"{matrices[0].name!r}; put the config.json of this model there"
        )


def _model(path: Path) -> Checkpoint:
    """The checkpoint of a model with weights that can be subtracted. Raises InputError if they cannot."""
    checkpoint = Checkpoint(path)
    refuse_unmerged(checkpoint)
    if holds_adapter(checkpoint):
        raise InputError(f"{path} is an adapter, not a model; give it alone as --source, or several as --adapters")
    refuse_quantised(path, checkpoint.entries.values(), model_config(path))
    return checkpoint


def _dtype_of_difference(old: str, new: str) -> str:
    """The dtype of tuned - base; one of the two, if it cannot be computed with."""
    for dtype in (old, new):
        if not is_floating(dtype):
            return dtype
    return "float64" if "float64" in (old, new) else "float32"


# ---- names that correspond


def find_prefixes(before: ModelCheckpoint, after: ModelCheckpoint) -> list[Prefix]:
    """Find the prefixes by which the names of layers differ that have no partner of the same name; maybe none.

    A layer is a floating-point matrix, or a stack of them, with a number among the dotted components of its name. Only
    layers that are without a partner on both sides count: a copy that lies beside the layers of one side is none.

    A prefix is first a run of components that one checkpoint has in its names and the other lacks. It stands at their
    beginning or after their first component, and before the number: `bert.`, or `language_model.` in
    `model.language_model.layers.0` for `model.layers.0`. It fits if with it a layer of one checkpoint has the name and
    shape of a layer of the other. Layers that are then left may differ in all that stands before `layers.0`, such as
    `language_model.model.` and `model.language_model.` (`_exchanged`).

    Raises InputError if several fit, for nothing is guessed, and if half of the layers of the base have no partner in
    the end, while the other side has such layers as well.
    """
    old, new = _layers(before.entries), _layers(after.entries)
    count = len(old)
    old, new = _without_partner(old, new, [])
    fitting = {Prefix(base=short, tuned=long): None for long, short in _beginnings(new, old)}
    fitting |= {Prefix(base=long, tuned=short): None for long, short in _beginnings(old, new)}
    if len(fitting) > 1:
        _refuse_unclear(before, after, fitting)
    prefixes = list(fitting)
    old, new = _without_partner(old, new, prefixes)
    prefixes += _exchanged(before, after, old, new)
    old, new = _without_partner(old, new, prefixes)
    if prefixes and new and 2 * len(old) >= count:
        raise InputError(
            f"{after.path} and {before.path} match in part: {len(old)} of {count} layers of the base, such as "
            f"{next(iter(old))!r}, have no partner among the others, such as {next(iter(new))!r}; give checkpoints "
            "whose names agree"
        )
    return prefixes


def _without_partner(
    old: Mapping[str, Entry], new: Mapping[str, Entry], prefixes: Sequence[Prefix]
) -> tuple[dict[str, Entry], dict[str, Entry]]:
    """The layers of both sides that the other side does not have, under these prefixes."""
    pairs = _corresponding(old, new, prefixes)
    matched = set(pairs.values())
    left = {name: entry for name, entry in old.items() if name not in pairs}
    return left, {name: entry for name, entry in new.items() if name not in matched}


def _exchanged(
    before: ModelCheckpoint, after: ModelCheckpoint, old: Mapping[str, Entry], new: Mapping[str, Entry]
) -> list[Prefix]:
    """The pairs of beginnings, up to the component before the number, under which layers have equal ends and shapes.

    Raises InputError if a beginning has several partners.
    """
    ends_old, ends_new = _ends(old), _ends(new)
    fitting = [Prefix(one, other) for one in ends_old for other in ends_new if ends_old[one] & ends_new[other]]
    for side in (0, 1):
        for beginning, count in Counter(prefix[side] for prefix in fitting).items():
            if count > 1:
                _refuse_unclear(before, after, [prefix for prefix in fitting if prefix[side] == beginning])
    return fitting


def _ends(layers: Mapping[str, Entry]) -> dict[str, set[tuple[str, tuple[int, ...]]]]:
    """The ends of names from the component before the number on, with the shapes, by the beginning of the name."""
    ends: dict[str, set[tuple[str, tuple[int, ...]]]] = {}
    for name, entry in layers.items():
        parts = name.split(".")
        start = max(0, next(i for i, part in enumerate(parts) if part.isdecimal()) - 1)
        ends.setdefault(_dotted(parts[:start]), set()).add((".".join(parts[start:]), entry.shape))
    return ends


def _refuse_unclear(before: ModelCheckpoint, after: ModelCheckpoint, fitting: Iterable[Prefix]) -> None:
    raise InputError(
        f"{after.path} and {before.path}: which layers correspond is unclear, for they are found with "
        f"{', and with '.join(map(str, fitting))} of {after.path}; give checkpoints whose names agree"
    )


def _layers(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    return {
        name: entry
        for name, entry in entries.items()
        if _is_matrix(entry) and is_floating(entry.dtype) and _is_numbered(name)
    }


def _is_numbered(name: str) -> bool:
    return any(map(str.isdecimal, name.split(".")))


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


def _corresponding(
    before: Mapping[str, Entry], after: Mapping[str, Entry], prefixes: Sequence[Prefix]
) -> dict[str, str]:
    """The name in the tuned checkpoint of each tensor that both have, by its name in the base. Equal names go first.

    Where parts of the model are arranged anew (`Prefix.is_exchange`), a tensor that is still alone goes with the only
    one of its shape whose name is the end of its own, as `lm_head.weight` is of `language_model.lm_head.weight`.
    """
    name_of: dict[str, str] = {}
    for name in after:
        key = name if name in before else next((k for p in prefixes if (k := p.in_base(name)) in before), name)
        if key == name or key not in after:
            name_of[key] = name
    pairs = {key: name_of[key] for key in before if key in name_of}
    return pairs | (_by_their_ends(before, after, pairs) if any(p.is_exchange for p in prefixes) else {})


def _by_their_ends(before: Mapping[str, Entry], after: Mapping[str, Entry], pairs: Mapping[str, str]) -> dict[str, str]:
    matched = set(pairs.values())
    alone = [key for key in before if key not in pairs and not _is_numbered(key)]
    others = [name for name in after if name not in matched and not _is_numbered(name)]
    fitting = [
        (key, name)
        for key in alone
        for name in others
        if (f".{key}".endswith(f".{name}") or f".{name}".endswith(f".{key}")) and before[key].shape == after[name].shape
    ]
    keys, names = Counter(key for key, _ in fitting), Counter(name for _, name in fitting)
    return {key: name for key, name in fitting if keys[key] == 1 and names[name] == 1}


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
