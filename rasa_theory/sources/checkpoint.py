"""Checkpoints in safetensors: one file or a directory of them, alone or as the pair base and tuned. No pickles."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rasa_theory.sources.catalogue import Catalogue, Reader, catalogue_of
from rasa_theory.sources.grouping import Entry, LeftOut, is_floating
from rasa_theory.sources.headers import opened
from rasa_theory.sources.orientation import model_types, oriented
from rasa_theory.sources.shards import find_shards
from rasa_theory.storage import Difference, FileRows

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_KINDS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<i2"}


class Checkpoint:
    """The tensors of a `.safetensors` file, or of a directory of them, read by key; `left_out`: those never looked at.

    Raises InputError as `find_shards` does.
    """

    def __init__(self, path: Path) -> None:
        self._of, self.left_out = find_shards(path)
        self.entries: dict[str, Entry] = {}
        for key, header in self._of.items():
            stored = header.tensors[key]
            self.entries[key] = Entry(key, stored.shape, _dtype_name(stored.dtype))

    @property
    def files(self) -> tuple[Path, ...]:
        """All files, in order of their names."""
        return tuple(sorted({header.file for header in self._of.values()}))

    def file_of(self, key: str) -> str:
        """The file that holds this tensor."""
        return str(self._of[key].file)

    def read(self, key: str) -> Tensor:
        """The tensor, in the dtype of the file. Raises InputError if the file has been changed meanwhile."""
        header = self._of[key]
        header.check_unchanged()
        with opened(header.file) as tensors:
            tensor: Tensor = tensors.get_tensor(key)
        return tensor

    def part(self, key: str) -> FileRows:
        """The same tensor, to be read in blocks of rows. Raises InputError as `read` does."""
        header = self._of[key]
        header.check_unchanged()
        dtype, shape, offset, _ = header.tensors[key]
        return FileRows(header.file, offset, shape[-1], np.dtype(_KINDS[dtype]), dtype == "BF16")


def open_checkpoint(path: Path, memory: int | None = None, alone: bool = False) -> Catalogue:
    """The stacks of a checkpoint, their matrices as (out, in); `alone` as for `grouping.group`.

    Raises InputError as `find_shards` does, if a config.json is not sound, and if no stack remains.
    """
    checkpoint = Checkpoint(path)
    reader = Reader(checkpoint.read, checkpoint.file_of, checkpoint.part)
    entries = oriented(checkpoint.entries.values(), model_types(path))
    found = catalogue_of(str(path), entries, reader, checkpoint.left_out, memory, alone)
    return dataclasses.replace(found, files=checkpoint.files)


def open_pair(base: Path, tuned: Path, memory: int | None = None, alone: bool = False) -> Catalogue:
    """The stacks of updates, tuned - base in float32 (float64 if either is), of the tensors that both have.

    Tensors that only one has, or whose shapes differ, are left out. The config.json of `tuned`,
    or else of `base`, says which are Conv1D. Raises InputError as `open_checkpoint` does.
    """
    before, after = Checkpoint(base), Checkpoint(tuned)
    entries: list[Entry] = []
    left_out = [*before.left_out, *after.left_out]
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

    entries = oriented(entries, model_types(tuned) or model_types(base))
    found = catalogue_of(f"{tuned} minus {base}", entries, Reader(read, file_of, part), left_out, memory, alone)
    return dataclasses.replace(found, files=before.files + after.files)


def _dtype_name(name: str) -> str:
    """F8_E4M3 -> float8_e4m3, I64 -> i64."""
    return _DTYPES.get(name, f"float{name[1:].lower()}" if name[:2] in ("F8", "F6", "F4") else name.lower())
