"""Checkpoints in safetensors: one file or a directory of them. Pickles are never opened."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from rasa_theory.formats.safetensors import opened
from rasa_theory.formats.shards import find_shards
from rasa_theory.formats.tensors import Entry
from rasa_theory.problem import FileRows


class Checkpoint:
    """The tensors of a `.safetensors` file, or of a directory of them, read by key.

    `entries` describes them; `left_out` has those that an index does not name. Raises InputError as `find_shards` does.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._header_of, self.left_out = find_shards(path)
        self.entries: dict[str, Entry] = {}
        for key, header in self._header_of.items():
            stored = header.tensors[key]
            self.entries[key] = Entry(key, stored.shape, stored.dtype)

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that hold tensors, in order of their names."""
        return tuple(sorted({header.file for header in self._header_of.values()}))

    def file_of(self, key: str) -> str:
        """The file that holds this tensor."""
        return str(self._header_of[key].file)

    def read(self, key: str) -> Tensor:
        """The tensor, in the dtype of the file. Raises InputError if the file has been changed meanwhile."""
        header = self._header_of[key]
        header.check_unchanged()
        with opened(header.file) as tensors:
            tensor: Tensor = tensors.get_tensor(key)
        return tensor

    def part(self, key: str) -> FileRows:
        """The rows of a tensor, read in blocks on demand. Raises InputError as `read` does."""
        return self._header_of[key].rows(key)
