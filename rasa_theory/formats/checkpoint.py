"""Checkpoints in safetensors: one file or a directory of them. No pickles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from rasa_theory.formats.names import Entry
from rasa_theory.formats.safetensors import opened
from rasa_theory.formats.shards import find_shards
from rasa_theory.problem import FileRows

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_KINDS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<i2"}


class Checkpoint:
    """The tensors of a `.safetensors` file, or of a directory of them, read by key; `left_out`: those never looked at.

    Raises InputError as `find_shards` does.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
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


def _dtype_name(name: str) -> str:
    """F8_E4M3 -> float8_e4m3, I64 -> i64."""
    return _DTYPES.get(name, f"float{name[1:].lower()}" if name[:2] in ("F8", "F6", "F4") else name.lower())
