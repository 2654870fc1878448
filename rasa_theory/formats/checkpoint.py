"""Checkpoints in safetensors: one file or a directory of them. Pickles are never opened."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from rasa_theory.formats.safetensors import Header, opened
from rasa_theory.formats.shards import find_shards
from rasa_theory.formats.tensors import Entry
from rasa_theory.formats.wrappers import unwrapped
from rasa_theory.problem import FileRows


class _Place(NamedTuple):
    """Where a tensor is: the header of its file, and its key there."""

    header: Header
    key: str


class Checkpoint:
    """The tensors of a `.safetensors` file, or of a directory of them, read by name.

    Names are the keys of the files less the wrappers in them (`unwrapped`). `entries` describes the tensors; `left_out`
    has those that an index does not name. Raises InputError as `find_shards` does.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        header_of, self.left_out = find_shards(path)
        name_of = unwrapped(header_of)
        self._place_of = {name_of[key]: _Place(header, key) for key, header in header_of.items()}
        self.entries: dict[str, Entry] = {}
        for name, (header, key) in self._place_of.items():
            stored = header.tensors[key]
            self.entries[name] = Entry(name, stored.shape, stored.dtype)

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that hold tensors, in order of their names."""
        return tuple(sorted({header.file for header, _ in self._place_of.values()}))

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata in the headers of all files."""
        headers = {header.file: header for header, _ in self._place_of.values()}
        return {key: text for file in sorted(headers) for key, text in headers[file].metadata.items()}

    def file_of(self, name: str) -> str:
        """The file that holds this tensor."""
        return str(self._place_of[name].header.file)

    def read(self, name: str) -> Tensor:
        """The tensor, in the dtype of the file. Raises InputError if the file has been changed meanwhile."""
        header, key = self._place_of[name]
        header.check_unchanged()
        with opened(header.file) as tensors:
            tensor: Tensor = tensors.get_tensor(key)
        return tensor

    def part(self, name: str) -> FileRows:
        """The rows of a tensor, read in blocks on demand. Raises InputError as `read` does."""
        header, key = self._place_of[name]
        return header.rows(key)
