"""Grouping of tensors into stacks, from their names, shapes and dtypes alone; no values are read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

from rasa_theory.formats import Entry, Exclusion, LeftOut, Place, adapter_format, is_floating, layer_span

_NUMBER = re.compile(r"([0-9]+)")


class Group(NamedTuple):
    """The tensors of one stack: `layers` matrices of `shape` (b, a).

    `keys` has one key per layer, in order, or with `is_one_tensor` the one key of a tensor (L, b, a) that is the stack
    itself, also where L is 1. `transposed`: the model has each matrix as (a, b). `place`: what the tensors are in their
    model, None in a file of updates.
    """

    name: str
    layers: int
    shape: tuple[int, int]
    keys: list[str]
    transposed: bool = False
    place: Place | None = None
    is_one_tensor: bool = False

    @property
    def in_model(self) -> tuple[int, int]:
        """The shape of a matrix as the model has it."""
        b, a = self.shape
        return (a, b) if self.transposed else (b, a)


class _Member(NamedTuple):
    """A matrix, and its name cut at the numbers: text, number, text, .., text."""

    parts: tuple[str, ...]
    entry: Entry

    def alike(self, position: int) -> tuple[object, ...]:
        """What the layers of one stack have in common where the number at `position` is that of the layer."""
        place = self.entry.place
        role = None if place is None else (place.role, place.kernel)
        others = self.parts[:position] + self.parts[position + 1 :]
        return others, self.entry.shape, self.entry.transposed, role

    def name(self, position: int) -> str:
        """The name of its stack, with `*` in place of the layer's number."""
        return "".join([*self.parts[:position], "*", *self.parts[position + 1 :]])


def group(entries: Iterable[Entry], alone: bool = False) -> tuple[list[Group], list[LeftOut]]:
    """Group tensors into stacks. Returns the stacks, and the tensors that form none, each with the reason.

    1. A tensor with three axes is a stack, named by its key.
    2. The layers of a stack of matrices differ in one number of their names, and have equal shapes. The layer is the
       number after the first component `layers`, `layer`, `h`, `block` or `blocks` that a number follows, if at least
       half of the names that differ in nothing but numbers then form stacks. Otherwise it is the number with which the
       most matrices stand in stacks, the stacks being as few as possible: `attentions.*` or `transformer_blocks.*` of
       a UNet. All other numbers (of experts, say) stay in the name.
    3. The stack is named with `*` in place of the layer's number; its layers are in numeric order.
    4. Layers of unequal shape form separate stacks, with `[BxA]` at the end of the name.
    5. A matrix that is alone is left out; with `alone` it is a stack of one layer, named by its key.
    6. Tensors that are no linear maps of their model (`Entry.place`) are left out as what they are.
    """
    groups: list[Group] = []
    left_out: list[LeftOut] = []
    families: dict[tuple[str, ...], list[_Member]] = {}
    for entry in entries:
        if (unusable := _unusable(entry)) is not None:
            left_out.append(unusable)
        elif len(entry.shape) == 2:
            parts = tuple(_NUMBER.split(entry.name))
            families.setdefault(parts[::2], []).append(_Member(parts, entry))
        else:
            L, b, a = entry.shape
            groups.append(Group(entry.name, L, (b, a), [entry.name], entry.transposed, entry.place, is_one_tensor=True))
    for members in families.values():
        stacks, single = _stacks(members)
        groups += stacks
        if alone:
            groups += [_of_matrices(one.name, [entry]) for one, entry in single]
        else:
            left_out += [one for one, _ in single]
    return _with_unique_names(groups), left_out


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
    if (kind := adapter_format(entry.name)) is not None:
        return because(
            f"a factor of an adapter, not an update ({kind}); give the adapter alone as --source, the folder with its "
            "adapter_config.json if it has one",
            Exclusion.FACTOR,
        )
    if entry.place is not None and not entry.place.role.is_matrix:
        return because(entry.place.reason, Exclusion.AXES if len(entry.shape) == 1 else Exclusion.ROLE)
    if len(entry.shape) not in (2, 3):
        axes = "1 axis" if len(entry.shape) == 1 else f"{len(entry.shape)} axes"
        return because(f"{axes}; a layer has 2, a stack of layers 3", Exclusion.AXES)
    return None


def _stacks(family: Sequence[_Member]) -> tuple[list[Group], list[tuple[LeftOut, Entry]]]:
    """The stacks of matrices whose names differ in nothing but numbers, and those that are in none, with reasons."""
    position = _position_of_layer(family)
    if position is None:
        return [], [(_why_alone(one, family), one.entry) for one in family]
    groups: list[Group] = []
    single: list[tuple[LeftOut, Entry]] = []
    together: dict[tuple[object, ...], list[_Member]] = {}
    for member in family:
        together.setdefault(member.alike(position), []).append(member)
    shapes_of = Counter(name for members in together.values() for name in {members[0].name(position)})
    for members in together.values():
        name = members[0].name(position)
        b, a = members[0].entry.shape
        full_name = name if shapes_of[name] == 1 else f"{name}[{b}x{a}]"
        layers = sorted(members, key=lambda m: _in_order(m.parts[position]))
        if (twice := _layer_twice(layers, position)) is not None:
            single += [(LeftOut(m.entry.name, twice, Exclusion.NAME), m.entry) for m in layers]
        elif len(layers) > 1:
            groups.append(_of_matrices(full_name, [m.entry for m in layers]))
        else:
            reason = f"the only layer of {full_name!r}; a stack of matrices needs two or more"
            single.append((LeftOut(layers[0].entry.name, reason, Exclusion.ALONE), layers[0].entry))
    return groups, single


def _position_of_layer(family: Sequence[_Member]) -> int | None:
    """The place of the layer's number in the names cut at their numbers; None where none is."""
    columns = zip(*(member.parts for member in family), strict=True)
    varying = [i for i, column in enumerate(columns) if len(set(column)) > 1]
    stacked: dict[int, tuple[int, int]] = {}  # matrices in stacks of two or more, and minus the number of stacks
    for position in varying:
        sizes = Counter(member.alike(position) for member in family).values()
        stacked[position] = (sum(n for n in sizes if n > 1), -len(sizes))
    if (word := _after_word(family[0])) in stacked and 2 * stacked[word][0] >= len(family):
        return word
    if not any(matrices for matrices, _ in stacked.values()):
        return word if word >= 0 else None
    return max(stacked, key=lambda position: (stacked[position], position))


def _after_word(member: _Member) -> int:
    """The place of the number after a component such as `layers`, or -1."""
    span = layer_span(member.entry.name)
    if span is None:
        return -1
    return 1 + 2 * len(_NUMBER.findall(member.entry.name[: span[0]]))


def _why_alone(member: _Member, family: Sequence[_Member]) -> LeftOut:
    """A matrix of a family that forms no stack, with the reason."""
    columns = zip(*(other.parts for other in family), strict=True)
    varying = sum(len(set(column)) > 1 for column in columns)
    if varying < 2:
        reason = "the only tensor of its kind; a stack of matrices needs two layers or more"
        return LeftOut(member.entry.name, reason, Exclusion.ALONE)
    texts = "*".join(member.parts[::2])
    reason = f"{varying} numbers vary among the names {texts!r}, and with none of them two matrices form a stack"
    return LeftOut(member.entry.name, reason, Exclusion.NAME)


def _in_order(digits: str) -> tuple[int, str]:
    """A key that sorts numbers by value; as text, for a file may hold more digits than int() takes."""
    digits = digits.lstrip("0") or "0"
    return len(digits), digits


def _layer_twice(layers: Sequence[_Member], position: int) -> str | None:
    """A sentence on two of these layers, in order, that have the same number, such as 1 and 01; None without such."""
    for one, other in pairwise(layers):
        if _in_order(one.parts[position]) == _in_order(other.parts[position]):
            number = one.parts[position].lstrip("0") or "0"
            name = one.name(position)
            return f"layer {number} of {name!r} is there twice: {one.entry.name!r} and {other.entry.name!r}"
    return None


def _of_matrices(name: str, entries: list[Entry]) -> Group:
    b, a = entries[0].shape
    keys = [entry.name for entry in entries]
    return Group(name, len(keys), (b, a), keys, entries[0].transposed, entries[0].place)


def _with_unique_names(groups: list[Group]) -> list[Group]:
    """Number the stacks whose name is taken, as when a key itself contains `*`: results are filed by name."""
    unique: dict[str, Group] = {}
    for g in groups:
        name, number = g.name, 1
        while name in unique:
            number += 1
            name = f"{g.name}({number})"
        unique[name] = g._replace(name=name)
    return list(unique.values())
