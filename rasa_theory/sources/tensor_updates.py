"""The updates of a source tensor by tensor, and their norms, also of tensors that are in no stack."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rasa_theory.common import InputError
from rasa_theory.formats import Entry, ModelCheckpoint, is_floating
from rasa_theory.problem import Difference

_SUSPICIOUS = 0.5  # of ||tuned - base|| / ||base||; a fine-tune is at 0.001 to 0.1, two strangers at 1 or more
_LARGE = 2**24  # entries of a tensor that is measured in blocks
_PIECE = 2**15
_PROBE = 4096  # entries that are compared first, since most pairs differ by more than rounding in any of them
_ROUNDED = (torch.bfloat16, torch.float16)


class Norms(NamedTuple):
    """The squared norms of an update, and of the weights before it (None: the source has updates alone).

    `rounding`: dtypes in which both sides are equal, so that the update is at most the rounding of such a dtype.
    """

    update: float
    base: float | None = None
    rounding: frozenset[str] = frozenset()

    @property
    def relative(self) -> float | None:
        """||update|| / ||base||, not squared; None without a base or where the base is zero."""
        return math.sqrt(self.update / self.base) if self.base else None

    def facts(self) -> dict[str, Any]:
        """What a report says beside the norm of the update; nothing without a base."""
        if self.base is None:
            return {}
        return {"base_norm_squared": self.base, "relative_norm": self.relative, "rounding": sorted(self.rounding)}

    def plain(self) -> dict[str, Any]:
        """All norms as plain data."""
        return {"norm_squared": self.update} | self.facts()

    @classmethod
    def of_plain(cls, plain: Mapping[str, Any]) -> Norms:
        """The norms in plain data, such as a row of a report."""
        return cls(plain["norm_squared"], plain.get("base_norm_squared"), frozenset(plain.get("rounding", ())))

    @classmethod
    def together(cls, several: Iterable[Norms]) -> Norms:
        """The norms of several tensors as of one."""
        several = list(several)
        bases = [one.base for one in several if one.base is not None]
        base = math.fsum(bases) if bases and len(bases) == len(several) else None
        rounding = frozenset.intersection(*(one.rounding for one in several)) if several else frozenset()
        return cls(math.fsum(one.update for one in several), base, rounding)


def pair_warning(norms: Norms, source: str) -> str | None:
    """A sentence that the two checkpoints may be no pair, or differ by rounding alone; None if neither is so."""
    if (relative := norms.relative) is not None and relative >= _SUSPICIOUS:
        return (
            f"WARNING: {source}: ||tuned - base|| is {relative:.2g} times ||base||, while a fine-tune is at 0.001 to "
            "0.1. These may be no pair: check that --tuned was trained from --base."
        )
    if norms.update > 0 and norms.rounding:
        dtype = sorted(norms.rounding)[0]
        return (
            f"WARNING: {source}: the pair differs by the rounding of {dtype} and nothing else. There is no fine-tuning "
            "in it: check that the checkpoints are those that are meant."
        )
    return None


class Updates:
    """The updates of all tensors that a checkpoint of updates holds, or that both checkpoints of a pair hold.

    `entries` describes them by name. `read` and `tuned` give values, `norms` the norms of every matrix of a tensor,
    which reading has measured already where it was read before. `is_pair`: they are differences of two checkpoints.
    """

    is_pair = False

    def __init__(self, entries: Mapping[str, Entry], after: ModelCheckpoint) -> None:
        self.entries = entries
        self._after = after
        self._measured: dict[str, tuple[Norms, ...]] = {}

    def read(self, name: str) -> Tensor:
        """The update of a tensor. Raises InputError if its file cannot be read."""
        update = self._after.read(name)
        self._measured[name] = tuple(Norms(_squared(one)) for one in _matrices(update))
        return update

    def tuned(self, name: str) -> Tensor | None:
        """The tensor after fine-tuning, in the dtype of its file; None where the source has updates alone."""
        return None

    def norms(self, name: str) -> tuple[Norms, ...] | None:
        """The norms of the tensor's update, one for each of the matrices that it stacks.

        None if it is not there in one shape in both checkpoints, cannot be read, or has entries that are not finite. A
        large tensor is read in blocks of rows where its file allows it.
        """
        entry = self.entries.get(name)
        if entry is None or not is_floating(entry.dtype):
            return None
        if name not in self._measured:
            try:
                self._measured[name] = self._measure(entry)
            except InputError:
                return None
        norms = self._measured[name]
        return norms if all(math.isfinite(one.update) and math.isfinite(one.base or 0) for one in norms) else None

    def _measure(self, entry: Entry) -> tuple[Norms, ...]:
        """The norms of a tensor that has not been read."""
        if len(entry.shape) == 2 and math.prod(entry.shape) > _LARGE and self.is_in_rows(entry.name):
            rows, width = entry.shape[::-1] if entry.transposed else entry.shape
            height = max(1, _LARGE // width)
            blocks = [(start, min(start + height, rows)) for start in range(0, rows, height)]
            return (Norms.together(self._norms_of_rows(entry.name, *block) for block in blocks),)
        self.read(entry.name)
        return self._measured[entry.name]

    def is_in_rows(self, name: str) -> bool:
        """Whether the tensor can be read in blocks of rows."""
        return self._after.is_in_file(name)

    def _norms_of_rows(self, name: str, start: int, stop: int) -> Norms:
        return Norms(_squared(self._after.part(name).read(start, stop)))


@dataclass(frozen=True)
class PairedKeys:
    """The name in the tuned checkpoint of each tensor of the base, and the dtype of the difference."""

    in_tuned: Mapping[str, str]
    dtype_of: Mapping[str, torch.dtype] = field(default_factory=dict)


class Differences(Updates):
    """The updates tuned - base of a pair, read by the name in the base."""

    is_pair = True

    def __init__(
        self, entries: Mapping[str, Entry], before: ModelCheckpoint, after: ModelCheckpoint, keys: PairedKeys
    ) -> None:
        super().__init__(entries, after)
        self._before, self._keys = before, keys

    def read(self, name: str) -> Tensor:
        dtype = self._keys.dtype_of[name]
        tuned, base = self._after.read(self._keys.in_tuned[name]).to(dtype), self._before.read(name).to(dtype)
        update = tuned - base
        if name not in self._measured:
            self._measured[name] = _norms_of_pair(tuned, base, update)
        return update

    def tuned(self, name: str) -> Tensor | None:
        return self._after.read(self._keys.in_tuned[name])

    def part(self, name: str) -> Difference:
        """The rows of an update, read in blocks on demand."""
        return Difference(
            self._after.part(self._keys.in_tuned[name]), self._before.part(name), self._keys.dtype_of[name]
        )

    def is_in_rows(self, name: str) -> bool:
        return self._after.is_in_file(self._keys.in_tuned[name]) and self._before.is_in_file(name)

    def _norms_of_rows(self, name: str, start: int, stop: int) -> Norms:
        dtype, part = self._keys.dtype_of[name], self.part(name)
        tuned, base = part.tuned.read(start, stop).to(dtype), part.base.read(start, stop).to(dtype)
        return _norms_of_pair(tuned, base, tuned - base)[0]

    def file_of(self, name: str) -> str:
        """The two files of a tensor, for errors."""
        return f"{self._after.file_of(self._keys.in_tuned[name])} minus {self._before.file_of(name)}"


def _norms_of_pair(tuned: Tensor, base: Tensor, update: Tensor) -> tuple[Norms, ...]:
    rounding = _equal_in(tuned, base)
    return tuple(
        Norms(_squared(one), _squared(old), rounding)
        for one, old in zip(_matrices(update), _matrices(base), strict=True)
    )


def _matrices(tensor: Tensor) -> list[Tensor]:
    return list(tensor) if tensor.ndim == 3 else [tensor]


def _squared(tensor: Tensor) -> float:
    """The squared norm in float64, in pieces that stay in the cache: eight times as fast as one conversion of all."""
    pieces = (piece.double() for piece in tensor.flatten().split(_PIECE))
    return math.fsum(float(piece.dot(piece)) for piece in pieces)


def _equal_in(tuned: Tensor, base: Tensor) -> frozenset[str]:
    """The dtypes of 16 bits in which both are equal."""
    few = tuned.flatten()[:_PROBE], base.flatten()[:_PROBE]
    return frozenset(
        str(dtype).removeprefix("torch.")
        for dtype in _ROUNDED
        if torch.equal(few[0].to(dtype), few[1].to(dtype)) and torch.equal(tuned.to(dtype), base.to(dtype))
    )
