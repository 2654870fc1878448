"""Storage of the entries of a stack: in memory, or in files that are read a few rows at a time."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rasa_theory.common import DamagedFile, InputError


class Storage(Protocol):
    """The stored matrices of a stack, (L, b, a), read in blocks of rows of one layer."""

    @property
    def shape(self) -> tuple[int, int, int]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def rows(self, layer: int, start: int, stop: int) -> Tensor:
        """Return M_layer[start:stop] in `dtype`. Callers do not write to it."""
        ...


@dataclass(frozen=True)
class InMemory:
    """Entries in memory: one tensor (L, b, a)."""

    values: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        L, b, a = self.values.shape
        return L, b, a

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def rows(self, layer: int, start: int, stop: int) -> Tensor:
        return self.values[layer, start:stop]


class Part(Protocol):
    """Some rows of a stack, (n, a)."""

    def read(self, start: int, stop: int) -> Tensor:
        """Return rows start .. stop - 1, (stop - start, a)."""
        ...


@dataclass(frozen=True)
class FileRows:
    """Rows of `width` numbers, stored one after the other in a file from byte `offset` on.

    `kind` is the dtype in the file. numpy has no bfloat16: such entries are read as int16, and `bfloat16` is true.
    Files are read, not mapped, so that memory holds only the requested rows.
    """

    path: Path
    offset: int
    width: int
    kind: np.dtype[Any]
    bfloat16: bool = False

    def read(self, start: int, stop: int) -> Tensor:
        first, count = self.offset + start * self.width * self.kind.itemsize, (stop - start) * self.width
        try:
            array = np.fromfile(self.path, self.kind, count, offset=first)
        except OSError as error:
            raise DamagedFile(f"{self.path}: cannot be read ({error.strerror or error})") from None
        if len(array) < count:
            raise DamagedFile(f"{self.path}: ends at byte {first + array.nbytes}, amid a stack; write it again")
        values = torch.from_numpy(array.astype(native(self.kind), copy=False)).reshape(-1, self.width)
        return values.view(torch.bfloat16) if self.bfloat16 else values


@dataclass(frozen=True)
class Difference:
    """The rows tuned - base, subtracted in `dtype`."""

    tuned: Part
    base: Part
    dtype: torch.dtype

    def read(self, start: int, stop: int) -> Tensor:
        return self.tuned.read(start, stop).to(self.dtype) - self.base.read(start, stop).to(self.dtype)


@dataclass(frozen=True)
class OnDisk:
    """A stack that is read from its parts: one part per layer, or a single part with all layers below each other.

    The stack begins at layer `first` of a single part. `alone`: every part is one layer, even if there is only one.
    """

    parts: Sequence[Part]
    shape: tuple[int, int, int]
    dtype: torch.dtype
    first: int = 0
    alone: bool = False

    def rows(self, layer: int, start: int, stop: int) -> Tensor:
        if self.alone or len(self.parts) > 1:
            return self.parts[layer].read(start, stop).to(self.dtype)
        first = (self.first + layer) * self.shape[1]
        return self.parts[0].read(first + start, first + stop).to(self.dtype)


@dataclass(frozen=True)
class Divided:
    """The storage `whole` in `dtype`, with every layer i divided by largest[i] and then by relative[i]."""

    whole: Storage
    dtype: torch.dtype
    largest: Sequence[float]
    relative: Sequence[float]

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.whole.shape

    def rows(self, layer: int, start: int, stop: int) -> Tensor:
        return self.whole.rows(layer, start, stop).to(self.dtype) / self.largest[layer] / self.relative[layer]


@dataclass(frozen=True)
class Factored:
    """Products B_i A_i that are not formed: B (L, b, m), A (L, m, a), padded by 0 where a layer has fewer terms.

    Raises InputError if the shapes, dtypes or devices disagree, or an axis is empty.
    """

    B: Tensor
    A: Tensor

    def __post_init__(self) -> None:
        B, A = self.B, self.A
        fits = B.ndim == A.ndim == 3 and B.shape[0] == A.shape[0] and B.shape[2] == A.shape[1]
        if not fits or 0 in (*B.shape[1:], *A.shape[1:]):
            raise InputError(
                f"factors need shapes (L, b, m) and (L, m, a) without an empty axis, found {tuple(B.shape)} and "
                f"{tuple(A.shape)}; give B before A, with a term of rank one for each column of B"
            )
        if (B.dtype, B.device) != (A.dtype, A.device):
            raise InputError(f"factor B is {B.dtype} on {B.device}, A is {A.dtype} on {A.device}; give both the same")

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.B.shape[0], self.B.shape[1], self.A.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        return self.B.dtype

    def rows(self, layer: int, start: int, stop: int) -> Tensor:
        return self.B[layer, start:stop] @ self.A[layer]

    def product(self, X: Tensor, transposed: bool) -> Tensor:
        """Return B_i (A_i X), (L, b, n), for X (a, n) or (L, a, n).

        If `transposed`, return A_i^T (B_i^T X), (L, a, n), for X (b, n) or (L, b, n).
        """
        if transposed:
            return (X.mT @ self.B @ self.A).mT
        return (X.mT @ self.A.mT @ self.B.mT).mT

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> Factored:
        """Return the same factors in another dtype or on another device; `device` None changes no device."""
        return Factored(self.B.to(device, dtype), self.A.to(device, dtype))

    def divided(self, largest: Sequence[float], relative: Sequence[float]) -> Factored:
        """Return factors of B_i A_i divided by largest[i] and then by relative[i], as `Divided` does."""
        first, second = (self.B.new_tensor(x)[:, None, None] for x in (largest, relative))
        return Factored(self.B / first / second, self.A)


class Spill:
    """A float64 tensor (L, n, m) that is written matrix by matrix into an unnamed temporary file, and then mapped.

    Pages of the map are cached in memory and dropped under memory pressure. Raises InputError if the folder for
    temporary files (TMPDIR) has no room.
    """

    def __init__(self, *shape: int) -> None:
        self._shape = shape
        with self._enough_room():
            self._file = tempfile.TemporaryFile()  # noqa: SIM115

    def add(self, matrix: Tensor) -> None:
        """Write the next matrix, (n, m)."""
        with self._enough_room():
            self._file.write(np.ascontiguousarray(matrix.numpy()).data)

    def tensor(self) -> Tensor:
        """Map the file as a tensor (L, n, m). The file disappears with the last tensor that uses it."""
        with self._enough_room():
            self._file.flush()
        with self._file:
            return torch.from_numpy(np.memmap(self._file, np.float64, "c", shape=self._shape))

    @contextlib.contextmanager
    def _enough_room(self) -> Iterator[None]:
        """Turn errors of the file system into an InputError that names the size and the folder."""
        try:
            yield
        except OSError as error:
            size = 8 * math.prod(self._shape) / 2**30
            raise InputError(
                f"the exact SVDs need a temporary file of {size:.3g} GiB in {tempfile.gettempdir()} "
                f"({error.strerror or error}); set TMPDIR to a folder with more room"
            ) from None


def native(kind: np.dtype[Any]) -> np.dtype[Any]:
    """Return `kind` in native byte order and with at most 64 bits, as torch requires."""
    return np.dtype(np.float64) if kind.itemsize > 8 else kind.newbyteorder("=")
