"""numpy files: a `.npy` file is one stack, mapped from disk; a `.npz` file holds stacks or matrices. No pickles."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from rasa_theory.common import InputError
from rasa_theory.formats import Entry, Exclusion, LeftOut
from rasa_theory.problem import FileRows, native
from rasa_theory.sources.catalogue import Catalogue, Reader, catalogue_of

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def open_npy(path: Path, memory: int | None = None) -> Catalogue:
    """The one stack of a `.npy` file, an (L, b, a) array, named by the file's stem.

    Raises InputError if the file is damaged, holds Python objects, or an array of other axes or dtype.
    """
    with _naming_damage(path), path.open("rb") as stream:
        entry = _entry(stream, path.stem, path.stat().st_size, path)
    if len(entry.shape) != 3:
        raise InputError(
            f"{path}: expected one array with three axes (layers, b, a), found shape "
            f"{entry.shape}; matrices go into one .npz, each under a name with its layer number"
        )

    def read(key: str) -> Tensor:
        with _naming_damage(path):  # mode "c": torch wants writable memory; the file itself is never written
            return _as_tensor(np.lib.format.open_memmap(path, mode="c"))

    def part(key: str) -> FileRows:
        with _naming_damage(path), path.open("rb") as stream:
            shape, columns_first, dtype = _HEADERS[np.lib.format.read_magic(stream)](stream)
            if columns_first:
                raise InputError(
                    f"{path}: the array is in Fortran order, whose layers cannot be read one by one; save it in C "
                    "order (numpy.ascontiguousarray)"
                )
            return FileRows(path, stream.tell(), shape[2], dtype)

    catalogue = catalogue_of(str(path), [entry], Reader(read, lambda key: str(path), part), memory=memory)
    return dataclasses.replace(catalogue, files=(path,))


def open_npz(path: Path, memory: int | None = None) -> Catalogue:
    """The stacks of a `.npz` file. Raises InputError if it is damaged, holds Python objects, or no stack."""
    with _naming_damage(path), zipfile.ZipFile(path) as archive:
        members = {m.filename.removesuffix(".npy"): m for m in archive.infolist() if m.filename.endswith(".npy")}
        left_out = [
            LeftOut(n, "not a numpy array", Exclusion.NO_ARRAY) for n in archive.namelist() if not n.endswith(".npy")
        ]
        entries = []
        for key, member in members.items():
            with archive.open(member) as stream:
                entries.append(_entry(stream, key, member.file_size, path))

    def read(key: str) -> Tensor:
        with _naming_damage(path), zipfile.ZipFile(path) as archive, archive.open(f"{key}.npy") as stream:
            return _as_tensor(np.lib.format.read_array(stream, allow_pickle=False))

    catalogue = catalogue_of(str(path), entries, Reader(read, lambda key: str(path)), left_out, memory)
    return dataclasses.replace(catalogue, files=(path,))


@contextlib.contextmanager
def _naming_damage(path: Path) -> Iterator[None]:
    """Turn every error that numpy and zipfile raise on the bytes of a file into one sentence that names the file."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        why = str(error).split("\n")[0].rstrip(".") or type(error).__name__
        raise InputError(f"{path}: not a sound {path.suffix} file ({why}); save numeric arrays again") from None


def _entry(stream: IO[bytes], key: str, size: int, path: Path) -> Entry:
    """Name, shape and dtype from the header of an array in `size` bytes; no data is read."""
    version = np.lib.format.read_magic(stream)
    if version not in _HEADERS:
        raise ValueError(f"format version {version[0]}.{version[1]} is not for numeric arrays")
    shape, _, dtype = _HEADERS[version](stream)
    if dtype.hasobject:
        raise InputError(f"{path}: {key!r} holds Python objects; pickles are never opened, save numeric arrays")
    left = size - stream.tell()
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > left:
        raise ValueError(f"{key!r} claims {dtype.name} of shape {shape}, but {left} bytes of data are there")
    return Entry(key, shape, dtype.name)


def _as_tensor(array: np.ndarray[Any, Any]) -> Tensor:
    """The array as a tensor, in native byte order and at most 64 bits; memory is shared where possible."""
    return torch.from_numpy(array.astype(native(array.dtype), copy=False))
