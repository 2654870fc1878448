"""Checkpoints in safetensors: one file or a directory of them. Pickles are never opened."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from rasa_theory.formats.halves import UnscaledRows, scale_of, unscaled
from rasa_theory.formats.safetensors import Header, opened
from rasa_theory.formats.shards import find_shards
from rasa_theory.formats.tensors import Entry
from rasa_theory.formats.wrappers import unwrapped
from rasa_theory.problem import Part


class _Place(NamedTuple):
    """Where a tensor is: the header of its file, and its key there.

    The file holds the tensor times 2^`scale`; None if it holds the tensor itself.
    """

    header: Header
    key: str
    scale: int | None


class Checkpoint:
    """The tensors of a `.safetensors` file, or of a directory of them, read by name.

    Names are the keys of the files less the wrappers in them (`unwrapped`). `entries` describes the tensors; `left_out`
    has those that an index does not name. A tensor that its file holds times a power of two (`halves`) is in float64
    here, without that power. Raises InputError as `find_shards` and `scale_of` do.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        header_of, self.left_out = find_shards(path)
        name_of = unwrapped(header_of)
        self._place_of = {name_of[key]: _Place(header, key, scale_of(header, key)) for key, header in header_of.items()}
        self.entries: dict[str, Entry] = {}
        for name, (header, key, scale) in self._place_of.items():
            stored = header.tensors[key]
            self.entries[name] = Entry(name, stored.shape, stored.dtype if scale is None else "float64")

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that hold tensors, in order of their names."""
        return tuple(sorted({place.header.file for place in self._place_of.values()}))

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata in the headers of all files."""
        headers = {place.header.file: place.header for place in self._place_of.values()}
        return {key: text for file in sorted(headers) for key, text in headers[file].metadata.items()}

    def file_of(self, name: str) -> str:
        """The file that holds this tensor."""
        return str(self._place_of[name].header.file)

    def read(self, name: str) -> Tensor:
        """The tensor, in the dtype of its entry. Raises InputError if the file has been changed meanwhile."""
        header, key, scale = self._place_of[name]
        header.check_unchanged()
        with opened(header.file) as tensors:
            tensor: Tensor = tensors.get_tensor(key)
        return tensor if scale is None else unscaled(tensor, scale)

    def part(self, name: str) -> Part:
        """The rows of a tensor, read in blocks on demand. Raises InputError as `read` does."""
        header, key, scale = self._place_of[name]
        rows = header.rows(key)
        return rows if scale is None else UnscaledRows(rows, scale)
