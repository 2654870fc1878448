"""Grouping of tensors into stacks, from their names, shapes and dtypes alone; no values are read."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

from rasa_theory.formats import Entry, Exclusion, LeftOut, is_floating, is_lora_tensor, layer_span

_NUMBER = re.compile(r"([0-9]+)")


class Group(NamedTuple):
    """The tensors of one stack: `layers` matrices of `shape` (b, a).

    `keys` has one key per layer, in order, or the one key of a tensor (L, b, a) that is the stack itself.
    `transposed`: the model has each matrix as (a, b).
    """

    name: str
    layers: int
    shape: tuple[int, int]
    keys: list[str]
    transposed: bool = False

    @property
    def in_model(self) -> tuple[int, int]:
        """The shape of a matrix as the model has it."""
        b, a = self.shape
        return (a, b) if self.transposed else (b, a)


class _Member(NamedTuple):
    """A matrix with the number of its layer, in digits without leading zeros."""

    number: str
    entry: Entry


def group(entries: Iterable[Entry], alone: bool = False) -> tuple[list[Group], list[LeftOut]]:
    """Group tensors into stacks. Returns the stacks, and the tensors that form none, each with the reason.

    1. A tensor with three axes is a stack, named by its key.
    2. Matrices are grouped by name. The layer is the number after the first component `layers`, `layer`, `h`, `block`
       or `blocks` that a number follows. Without such a word it is the only number that varies among names that
       differ in nothing but numbers. All other numbers (of experts, say) stay in the name.
    3. The stack is named with `*` in place of the layer's number; its layers are in numeric order.
    4. Layers of unequal shape form separate stacks, with `[BxA]` at the end of the name.
    5. A matrix that is alone is left out; with `alone` it is a stack of one layer, named by its key.
    """
    groups: list[Group] = []
    left_out: list[LeftOut] = []
    matrices: list[Entry] = []
    for entry in entries:
        if (unusable := _unusable(entry)) is not None:
            left_out.append(unusable)
        elif len(entry.shape) == 2:
            matrices.append(entry)
        else:
            L, b, a = entry.shape
            groups.append(Group(entry.name, L, (b, a), [entry.name]))
    families, unclear = _families(matrices)
    left_out += unclear
    for name, members in families.items():
        stacks, rest = _split_by_shape(name, members)
        groups += stacks
        left_out += rest
    if alone:
        single = {one.name for one in left_out if one.kind is Exclusion.ALONE}
        groups += [_of_matrices(entry.name, [entry]) for entry in matrices if entry.name in single]
        left_out = [one for one in left_out if one.name not in single]
    return _with_unique_names(groups, left_out)


def _unusable(entry: Entry) -> LeftOut | None:
    """A tensor that can be in no stack, with the reason; None if it can."""

    def because(reason: str, kind: Exclusion) -> LeftOut:
        return LeftOut(entry.name, reason, kind)

    if entry.dtype.startswith(("float8_", "float6_", "float4")):
        return because(
            f"{entry.dtype} needs its scales to be read; convert the checkpoint to bfloat16", Exclusion.DTYPE
        )
    if not is_floating(entry.dtype):
        return because(f"{entry.dtype} is not real floating point", Exclusion.DTYPE)
    if 0 in entry.shape:
        return because(f"shape {entry.shape} is empty", Exclusion.EMPTY)
    if is_lora_tensor(entry.name):
        return because(
            "a factor of an adapter, not an update; give the folder of the adapter, with its adapter_config.json, "
            "as --source",
            Exclusion.FACTOR,
        )
    if len(entry.shape) not in (2, 3):
        return because(f"{len(entry.shape)} axes; a layer has 2, a stack of layers 3", Exclusion.AXES)
    return None


def _families(matrices: list[Entry]) -> tuple[dict[str, list[_Member]], list[LeftOut]]:
    """Matrices by the name of their stack, and those whose name does not say which layer they are."""
    families: dict[str, list[_Member]] = {}
    left_out: list[LeftOut] = []
    alike: dict[tuple[str, ...], list[tuple[list[str], Entry]]] = {}
    for entry in matrices:
        if (span := layer_span(entry.name)) is not None:
            start, end = span
            name = f"{entry.name[:start]}*{entry.name[end:]}"
            families.setdefault(name, []).append(_Member(_canonical(entry.name[start:end]), entry))
        else:
            parts = _NUMBER.split(entry.name)  # text, number, text, .., text
            alike.setdefault(tuple(parts[::2]), []).append((parts, entry))
    for texts, members in alike.items():
        columns = zip(*(parts for parts, _ in members), strict=True)
        varying = [i for i, column in enumerate(columns) if len(set(column)) > 1]
        if len(varying) == 1:
            (i,) = varying
            parts = members[0][0]
            name = "".join([*parts[:i], "*", *parts[i + 1 :]])
            families.setdefault(name, []).extend(_Member(_canonical(p[i]), entry) for p, entry in members)
            continue
        reason, kind = "the only tensor of its kind; a stack of matrices needs two layers or more", Exclusion.ALONE
        if varying:
            kind = Exclusion.NAME
            reason = (
                f"{len(varying)} numbers vary among the names {'*'.join(texts)!r}, so which is the layer is unclear; "
                "rename it to stand after 'layers.'"
            )
        left_out += [LeftOut(entry.name, reason, kind) for _, entry in members]
    return families, left_out


def _canonical(digits: str) -> str:
    """The number without leading zeros; as text, for a file may hold more digits than int() takes."""
    return digits.lstrip("0") or "0"


def _split_by_shape(name: str, members: list[_Member]) -> tuple[list[Group], list[LeftOut]]:
    """One group per shape, layers in numeric order; a shape of one layer is left out."""
    members = sorted(members, key=lambda m: (len(m.number), m.number))
    for one, next_ in pairwise(members):
        if one.number == next_.number:
            reason = f"layer {one.number} of {name!r} is there twice: {one.entry.name!r} and {next_.entry.name!r}"
            return [], [LeftOut(m.entry.name, reason, Exclusion.NAME) for m in members]
    by_shape: dict[tuple[int, ...], list[Entry]] = {}
    for _, entry in members:
        by_shape.setdefault(entry.shape, []).append(entry)
    groups: list[Group] = []
    left_out: list[LeftOut] = []
    for (b, a), entries in by_shape.items():
        full_name = name if len(by_shape) == 1 else f"{name}[{b}x{a}]"
        if len(entries) > 1:
            groups.append(_of_matrices(full_name, entries))
        else:
            reason = f"the only layer of {full_name!r}; a stack of matrices needs two or more"
            left_out.append(LeftOut(entries[0].name, reason, Exclusion.ALONE))
    return groups, left_out


def _of_matrices(name: str, entries: list[Entry]) -> Group:
    b, a = entries[0].shape
    keys = [entry.name for entry in entries]
    return Group(name, len(keys), (b, a), keys, entries[0].transposed)  # names that differ by a number are of one kind


def _with_unique_names(groups: list[Group], left_out: list[LeftOut]) -> tuple[list[Group], list[LeftOut]]:
    """Drop stacks whose name is taken, as when a key itself contains `*`: results are filed by name."""
    unique: dict[str, Group] = {}
    for g in groups:
        if g.name in unique:
            reason = "another stack of the file has the same name; rename one"
            left_out.append(LeftOut(g.name, reason, Exclusion.NAME))
        else:
            unique[g.name] = g
    return list(unique.values()), left_out
