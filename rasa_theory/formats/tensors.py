"""Tensors as the header of a file describes them, and tensors that are left out, each with the reason."""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from rasa_theory.formats.roles import Place


class Entry(NamedTuple):
    """A tensor as a file's header describes it. `dtype` has its usual name: float32, bfloat16, float8_e4m3, int64.

    `transposed`: the model has this matrix (b, a) as (a, b). `place`: what the tensor is in its model; None in a file
    of updates, whose tensors are matrices by themselves.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    transposed: bool = False
    place: Place | None = None


class Exclusion(Enum):
    """The kinds of reason for which a tensor or a stack is left out. Code decides by these, people read the reason."""

    ROLE = "It is a part of the model that is no linear map: an embedding, a convolution, a norm, a router."
    AXES = "It has other axes than a matrix or a stack of matrices: a bias, a norm, a convolution."
    EMPTY = "One of its axes has length 0."
    DTYPE = "Its values cannot be computed with: whole numbers, complex numbers, or fewer than 16 bits."
    ALONE = "It is the only layer of its kind, and a stack needs two."
    NAME = "Its name does not say which layer it is, or is taken already."
    FACTOR = "It is a factor of an adapter, and stands where an update is expected."
    NO_FACTOR = "It belongs to an adapter, and is no factor of an update B A."
    VARIANT = "It belongs to a variant of LoRA whose update is not B A."
    NO_PARTNER = "The factor that it is multiplied with is missing."
    UNMATCHED = "Another checkpoint or adapter does not have it, or has it in another shape."
    UNINDEXED = "The index of the checkpoint does not look for it in this file."
    NARROW = "Its matrices have fewer rows or columns than the rank asked for."
    UNSELECTED = "It does not match the names asked for."
    NO_MODULE = "Its layers are not the weights of modules that an adapter can name."
    NO_ARRAY = "It is not a numpy array."


class _NameAndReason(NamedTuple):
    name: str
    reason: str


class LeftOut(_NameAndReason):
    """A tensor or a stack that is left out: the pair (name, reason), and the kind of the reason beside it.

    It stays a tuple of two, which unpacks and compares as such, because `rt.load` promises pairs.
    """

    kind: Exclusion

    def __new__(cls, name: str, reason: str, kind: Exclusion) -> LeftOut:
        left_out = super().__new__(cls, name, reason)
        left_out.kind = kind
        return left_out

    def __getnewargs__(self) -> tuple[str, str, Exclusion]:  # the arguments that pickle hands to __new__
        return self.name, self.reason, self.kind


class LeftOutGroup(NamedTuple):
    """Tensors that are left out for one reason. `label` names up to three, or says how many there are of what."""

    label: str
    reason: str
    names: list[str]


_NAMED = 3  # a larger group is counted
_NOUNS = {
    "biases": re.compile(r"bias\Z"),
    "norms": re.compile(r"(?i)norm|(?:\A|\.)ln[_.0-9]"),
    "tensors": re.compile(""),
}  # labels alone; what a tensor is says its reason


def grouped(left_out: Iterable[tuple[str, str]]) -> list[LeftOutGroup]:
    """The pairs (name, reason) of tensors that are left out, in groups of the same reason and the same noun.

    Groups are in the order of their first tensors.
    """
    names_of: dict[tuple[str, str], list[str]] = {}
    for name, reason in left_out:
        noun = next(noun for noun, pattern in _NOUNS.items() if pattern.search(name))
        names_of.setdefault((reason, noun), []).append(name)
    return [
        LeftOutGroup(", ".join(names) if len(names) <= _NAMED else f"{len(names)} {noun}", reason, names)
        for (reason, noun), names in names_of.items()
    ]


_FLOATING = re.compile(r"b?float(16|32|64|96|128)")


def is_floating(dtype: str) -> bool:
    """True if values of this dtype can be computed with: real, floating, 16 bits or more."""
    return _FLOATING.fullmatch(dtype) is not None


def padded_with_zeros(tensor: Tensor, axis: int, size: int | None) -> Tensor:
    """The tensor with zeros at the end of one axis, which then has at least this size (None: as it is)."""
    missing = 0 if size is None else size - tensor.shape[axis]
    if missing <= 0:
        return tensor
    shape = list(tensor.shape)
    shape[axis] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], axis)
