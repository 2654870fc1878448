"""Checkpoints in safetensors: one file or a directory of them, alone or as the pair base and tuned. No pickles."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rasa_theory.errors import InputError
from rasa_theory.sources.catalogue import Catalogue, Reader, catalogue_of
from rasa_theory.sources.grouping import Entry, LeftOut, is_floating
from rasa_theory.storage import Difference, FileRows

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_KINDS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<i2"}


class Checkpoint:
    """The tensors of a `.safetensors` file, or of all such files in a directory, read by key.

    Raises InputError if `path` is neither, a file is damaged, or two files have a tensor of the same name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Entry] = {}
        self._file: dict[str, Path] = {}
        for file in _files(path):
            with opened(file) as tensors:
                for key in sorted(tensors.keys()):
                    if key in self._file:
                        raise InputError(
                            f"{path}: tensor {key!r} is in both {self._file[key].name} and {file.name}; "
                            "name the one file that is meant"
                        )
                    header = tensors.get_slice(key)
                    self._file[key] = file
                    self.entries[key] = Entry(key, tuple(header.get_shape()), _dtype_name(header.get_dtype()))

    @property
    def files(self) -> tuple[Path, ...]:
        """All files, in order of their names."""
        return tuple(sorted(set(self._file.values())))

    def file_of(self, key: str) -> str:
        """The file that holds this tensor."""
        return str(self._file[key])

    def read(self, key: str) -> Tensor:
        """The tensor, in the dtype of the file. Raises InputError if the file has been damaged meanwhile."""
        with opened(self._file[key]) as tensors:
            tensor: Tensor = tensors.get_tensor(key)
        return tensor

    def part(self, key: str) -> FileRows:
        """The same tensor, to be read in blocks of rows. Raises InputError as `read` does."""
        file = self._file[key]
        with opened(file), file.open("rb") as stream:  # 8 bytes for the size of the header, the header, the data
            (size,) = struct.unpack("<Q", stream.read(8))
            found = json.loads(stream.read(size))[key]
        kind, (offset, _) = found["dtype"], found["data_offsets"]
        return FileRows(file, 8 + size + offset, found["shape"][-1], np.dtype(_KINDS[kind]), kind == "BF16")


def open_checkpoint(path: Path, memory: int | None = None) -> Catalogue:
    """The stacks of a checkpoint. Raises InputError as Checkpoint does, and if no stack remains."""
    checkpoint = Checkpoint(path)
    reader = Reader(checkpoint.read, checkpoint.file_of, checkpoint.part)
    found = catalogue_of(str(path), checkpoint.entries.values(), reader, memory=memory)
    return dataclasses.replace(found, files=checkpoint.files)


def open_pair(base: Path, tuned: Path, memory: int | None = None) -> Catalogue:
    """The stacks of updates, tuned - base in float32 (float64 if either is), of the tensors that both have.

    Tensors that only one has, or whose shapes differ, are left out. Raises InputError as `open_checkpoint` does.
    """
    before, after = Checkpoint(base), Checkpoint(tuned)
    entries: list[Entry] = []
    left_out: list[LeftOut] = []
    for key in before.entries | after.entries:
        if key not in after.entries or key not in before.entries:
            there, missing = (base, tuned) if key in before.entries else (tuned, base)
            left_out.append(LeftOut(key, f"in {there} but not in {missing}"))
            continue
        old, new = before.entries[key], after.entries[key]
        if old.shape != new.shape:
            left_out.append(LeftOut(key, f"shape {old.shape} in {base}, {new.shape} in {tuned}"))
            continue
        dtypes = (old.dtype, new.dtype)
        unusable = [dtype for dtype in dtypes if not is_floating(dtype)]
        wider = "float64" if "float64" in dtypes else "float32"
        entries.append(Entry(key, old.shape, unusable[0] if unusable else wider))
    wide = {entry.name: torch.float64 if entry.dtype == "float64" else torch.float32 for entry in entries}

    def read(key: str) -> Tensor:
        return after.read(key).to(wide[key]) - before.read(key).to(wide[key])

    def file_of(key: str) -> str:
        return f"{after.file_of(key)} minus {before.file_of(key)}"

    def part(key: str) -> Difference:
        return Difference(after.part(key), before.part(key), wide[key])

    found = catalogue_of(f"{tuned} minus {base}", entries, Reader(read, file_of, part), left_out, memory)
    return dataclasses.replace(found, files=before.files + after.files)


@contextlib.contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A safetensors file, open for reading by key. Raises InputError if it is damaged or cannot be opened."""
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: not a sound safetensors file ({error}); download or write it again") from None


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        if files := sorted(path.glob("*.safetensors")):
            return files
        pickles = [p.name for p in sorted(path.iterdir()) if p.suffix.lower() in PICKLES]
        hint = f"; {pickles[0]} is a pickle, which is never opened: convert it to safetensors" if pickles else ""
        raise InputError(f"{path}: the directory has no .safetensors file{hint}")
    if path.suffix.lower() in PICKLES:
        raise InputError(f"{path}: pickles are never opened, for they can run code; convert the file to safetensors")
    if path.suffix.lower() != ".safetensors":
        raise InputError(f"{path}: a checkpoint is a .safetensors file or a directory of them")
    if not path.exists():
        raise InputError(f"{path} does not exist")
    return [path]


def _dtype_name(name: str) -> str:
    """F8_E4M3 -> float8_e4m3, I64 -> i64."""
    return _DTYPES.get(name, f"float{name[1:].lower()}" if name[:2] in ("F8", "F6", "F4") else name.lower())
