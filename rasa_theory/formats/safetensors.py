"""Headers of safetensors files, and the JSON files beside them: read once, and refused where they are not sound."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rasa_theory.common import InputError, UnsoundFile
from rasa_theory.formats.names import of_task

_LARGEST_JSON = 100_000_000  # bytes; safetensors allows its headers as many
_LONGEST_REASON = 200  # letters
_ADVICE = "download or write it again"


class Stored(NamedTuple):
    """A tensor in a file: its dtype as the file calls it (BF16), its shape, its first byte in the file, its bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file holds, by key, and the stamp (bytes, time of change) it had when that was read."""

    file: Path
    tensors: dict[str, Stored]
    stamp: tuple[int, int]

    def check_unchanged(self) -> None:
        """Raise InputError if the file is gone, or has been written since its header was read."""
        with _sound(self.file):
            if _stamp(self.file) != self.stamp:
                raise ValueError("it has changed since it was opened")


def read_header(file: Path) -> Header:
    """The header of a safetensors file; nothing is allocated for data. Raises UnsoundFile.

    safetensors itself refuses lengths, offsets and shapes that do not fit the bytes that are there, but takes the last
    of two tensors of one name: refused here, as is JSON nested deeper than Python can follow.
    """
    with _sound(file):
        stamp = _stamp(file)
        with safe_open(file, framework="pt"), file.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            found = parse_json(stream.read(size))
        found.pop("__metadata__", None)
        tensors = {}
        for key, info in sorted(found.items()):
            start, stop = info["data_offsets"]
            tensors[key] = Stored(info["dtype"], tuple(info["shape"]), 8 + size + start, stop - start)
    return Header(file, tensors, stamp)


@contextlib.contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A safetensors file, open for reading by key. Raises UnsoundFile if it is damaged or cannot be opened."""
    with _sound(file):
        _stamp(file)
        with safe_open(file, framework="pt") as tensors:
            yield tensors


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file of at most 100 MB. Raises UnsoundFile if there is none."""
    try:
        size, _ = _stamp(file)
        if size > _LARGEST_JSON:
            raise ValueError(f"it has {size} bytes, more than {_LARGEST_JSON}")
        found = parse_json(file.read_bytes())
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}")
    except (OSError, ValueError) as error:
        raise UnsoundFile(f"{file}: not a sound file with one JSON object ({_why(error)})", _ADVICE) from None
    return found


def parse_json(content: bytes) -> Any:
    """The value that UTF-8 JSON stands for.

    Raises ValueError if it is none, nested deeper than Python can follow, or an object has a key twice or one that is
    not Unicode.
    """
    try:
        return json.loads(content.decode(), object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"{twice!r} is there twice")
    for key in found:
        key.encode()  # halves of a surrogate pair, which nothing could print
    return found


@contextlib.contextmanager
def _sound(file: Path) -> Iterator[None]:
    """Say in one sentence that a file is damaged, whatever is found in its bytes."""
    try:
        yield
    except (SafetensorError, OSError, ValueError) as error:
        raise UnsoundFile(f"{file}: not a sound safetensors file ({_why(error)})", _ADVICE) from None


def _why(error: Exception) -> str:
    """What an error says, in one short line: it may quote the file."""
    text = "".join(c if c.isprintable() else "?" for c in str(error)[: _LONGEST_REASON + 1])
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]} .."


def _stamp(file: Path) -> tuple[int, int]:
    """Bytes and time of change of a regular file; ValueError for any other: opening a pipe would wait for ever."""
    found = os.stat(file)
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("not a regular file")
    return found.st_size, found.st_mtime_ns


_COPIED = 1 << 24  # bytes at a time


_STORED = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write_safetensors(tensors: Mapping[str, Tensor], out: IO[bytes], metadata: dict[str, str]) -> None:
    """A safetensors file of `tensors`, written one by one, so that no second copy of all of them is made."""
    header = _Header(metadata)
    for key, tensor in tensors.items():
        header.add(key, _STORED[tensor.dtype], list(tensor.shape), tensor.nbytes)
    out.write(header.encoded())
    for tensor in tensors.values():
        bits = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor  # which numpy does not know
        out.write(np.ascontiguousarray(bits.numpy()).data)


def join_safetensors(parts: Sequence[Path], out: IO[bytes], metadata: dict[str, str], task: int | None = None) -> None:
    """All tensors of `parts`, or those of one task, as one safetensors file, copied piece by piece.

    Raises InputError if two parts hold a tensor of the same name.
    """
    header = _Header(metadata)
    pieces: list[tuple[Path, int, int]] = []  # part, first byte, how many
    for part in parts:
        for key, stored in read_header(part).tensors.items():
            if (name := of_task(key, task)) is None:
                continue
            if name in header.entries:
                raise InputError(f"two stacks would write the tensor {name!r}; keep one of them with --modules")
            header.add(name, stored.dtype, stored.shape, stored.size)
            pieces.append((part, stored.offset, stored.size))
    out.write(header.encoded())
    for part, first, size in pieces:
        with part.open("rb") as file:
            file.seek(first)
            while size > 0:
                size -= out.write(file.read(min(size, _COPIED)))


class _Header:
    """The beginning of a safetensors file whose tensors follow in the order in which they are added."""

    def __init__(self, metadata: dict[str, str]) -> None:
        self.entries: dict[str, Any] = {"__metadata__": metadata}
        self._offset = 0

    def add(self, key: str, dtype: str, shape: Sequence[int], size: int) -> None:
        offsets = [self._offset, self._offset + size]
        self.entries[key] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        self._offset += size

    def encoded(self) -> bytes:
        """With its length before it, padded to a multiple of 8 bytes."""
        text = json.dumps(self.entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text
