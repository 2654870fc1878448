"""safetensors files, and the JSON files beside them, read and written. A file that is not sound is refused.

A file is the length of the header (8 bytes), the header (JSON: dtype, shape and place of every tensor), and the data.
"""

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
from typing import IO, Any, NamedTuple, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from rasa_theory.common import InputError, UnsoundFile
from rasa_theory.formats.names import name_in_task
from rasa_theory.problem import FileRows

_LARGEST_JSON = 100_000_000  # bytes; the limit of safetensors for its headers
_LONGEST_REASON = 200  # letters
_LONGEST_POINTER = 64  # bytes that tell what a file is
_COPIED = 1 << 24  # bytes at a time
_ADVICE = "download or write it again"


class _Dtype(NamedTuple):
    """A floating dtype: its usual name, torch's, and numpy's for the same bits. numpy has no bfloat16."""

    name: str
    torch: torch.dtype
    numpy: str


_DTYPES = {
    "F64": _Dtype("float64", torch.float64, "<f8"),
    "F32": _Dtype("float32", torch.float32, "<f4"),
    "F16": _Dtype("float16", torch.float16, "<f2"),
    "BF16": _Dtype("bfloat16", torch.bfloat16, "<i2"),
}
_CODES = {dtype.torch: code for code, dtype in _DTYPES.items()}


# ---- reading


class Stored(NamedTuple):
    """A tensor in a file: the file's code of its dtype (BF16), its shape, its first byte in the file, its bytes."""

    code: str
    shape: tuple[int, ...]
    offset: int
    size: int

    @property
    def dtype(self) -> str:
        """The usual name of the dtype: float32 for F32, float8_e4m3 for F8_E4M3, i64 for I64."""
        if self.code in _DTYPES:
            return _DTYPES[self.code].name
        return f"float{self.code[1:].lower()}" if self.code[:2] in ("F8", "F6", "F4") else self.code.lower()


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file: its tensors by key, and the stamp (bytes, time of change) when it was read.

    `metadata` is the texts that the file holds beside its tensors.
    """

    file: Path
    tensors: dict[str, Stored]
    stamp: tuple[int, int]
    metadata: dict[str, str]

    def check_unchanged(self) -> None:
        """Raise InputError if the file is gone, or has been written since its header was read."""
        with _naming_damage(self.file):
            if _stamp(self.file) != self.stamp:
                raise ValueError("it has changed since it was opened")

    def rows(self, key: str) -> FileRows:
        """The rows of a floating tensor, read in blocks on demand. Raises InputError as `check_unchanged` does."""
        self.check_unchanged()
        code, shape, offset, _ = self.tensors[key]
        return FileRows(self.file, offset, shape[-1], np.dtype(_DTYPES[code].numpy), code == "BF16")


def read_header(file: Path) -> Header:
    """The header of a safetensors file; no memory is allocated for data. Raises UnsoundFile.

    safetensors itself refuses lengths, offsets and shapes that do not fit the bytes of the file. It takes the last of
    two tensors of one name, and JSON nested deeper than Python can follow: both are refused here.
    """
    with _naming_damage(file):
        stamp = _stamp(file)
        _refuse_what_stands_for_it(file, stamp[0])
        with safe_open(file, framework="pt"), file.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            header = parse_json(stream.read(size))
        metadata = header.pop("__metadata__", None) or {}
        tensors = {}
        for key, info in sorted(header.items()):
            start, stop = info["data_offsets"]
            tensors[key] = Stored(info["dtype"], tuple(info["shape"]), 8 + size + start, stop - start)
    return Header(file, tensors, stamp, metadata)


def _refuse_what_stands_for_it(file: Path, size: int) -> None:
    """Raise ValueError if a file of this size is what is left in place of one that was not downloaded whole."""
    with file.open("rb") as stream:
        beginning = stream.read(_LONGEST_POINTER)
        if size == 0:
            raise ValueError("it is empty")
        if beginning.startswith(b"version https://git-lfs"):
            raise ValueError("it is a pointer of git-lfs that stands for the weights: run git lfs pull")
        if beginning[:9].lower() == b"<!doctype" or beginning[:5].lower() == b"<html":
            raise ValueError("it is a web page, probably an error message of the server")
        if len(beginning) < 8:
            raise ValueError(f"it ends after {size} bytes")
        (length,) = struct.unpack("<Q", beginning[:8])
        if beginning[8:9] != b"{" or length > _LARGEST_JSON:
            return  # not the beginning of a safetensors file: safetensors says why
        if 8 + length > size:
            raise ValueError(f"it ends after {size} bytes, within its header of {length}: it was cut off")
        stream.seek(8)
        end = 8 + length + _end_of_data(stream.read(length))
        if size < end:
            raise ValueError(f"it ends after {size} of {end} bytes: it was cut off")


def _end_of_data(header: bytes) -> int:
    """Bytes of data that a header asks for; 0 if it does not say, and safetensors will refuse it."""
    try:
        entries = [entry for entry in json.loads(header).values() if isinstance(entry, dict)]
        return max((max(entry.get("data_offsets", [0])) for entry in entries), default=0)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return 0


@contextlib.contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A safetensors file, open for reading by key. Raises UnsoundFile if it is damaged or cannot be opened."""
    with _naming_damage(file):
        _stamp(file)
        with safe_open(file, framework="pt") as tensors:
            yield tensors


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file by key. Raises UnsoundFile if it is damaged."""
    read_header(file)  # refuses more than safetensors itself
    with _naming_damage(file):
        return load_file(file)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file of at most 100 MB. Raises UnsoundFile if there is none."""
    try:
        size, _ = _stamp(file)
        if size > _LARGEST_JSON:
            raise ValueError(f"it has {size} bytes, more than {_LARGEST_JSON}")
        value = parse_json(file.read_bytes())
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__}")
    except (OSError, ValueError) as error:
        raise UnsoundFile(f"{file}: not a sound file with one JSON object ({_short(error)})", _ADVICE) from None
    return value


def parse_json(content: bytes) -> Any:
    """The value of UTF-8 JSON.

    Raises ValueError if it is not JSON, or is nested deeper than Python can follow. An object that has a key twice,
    or a key that is not Unicode, is refused too.
    """
    try:
        return json.loads(content.decode(), object_pairs_hook=_with_unique_keys)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _with_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"{twice!r} is there twice")
    for key in members:
        key.encode()  # raises for halves of a surrogate pair, which could not be printed
    return members


@contextlib.contextmanager
def _naming_damage(file: Path) -> Iterator[None]:
    """Turn every error that the bytes of a file can cause into one sentence that names the file."""
    try:
        yield
    except (SafetensorError, OSError, ValueError) as error:
        raise UnsoundFile(f"{file}: not a sound safetensors file ({_short(error)})", _ADVICE) from None


def _short(error: Exception) -> str:
    """The text of an error, printable and on one short line: it may quote the file."""
    text = "".join(c if c.isprintable() else "?" for c in str(error)[: _LONGEST_REASON + 1])
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]} .."


def _stamp(file: Path) -> tuple[int, int]:
    """Bytes and time of change of a regular file. Raises ValueError for any other, since opening a pipe would hang."""
    facts = os.stat(file)
    if not stat.S_ISREG(facts.st_mode):
        raise ValueError("not a regular file")
    return facts.st_size, facts.st_mtime_ns


# ---- writing


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """A small safetensors file as bytes, in the order that the library safetensors chooses: by dtype, then by name."""
    return save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, metadata)


def write_safetensors(tensors: Mapping[str, Tensor], out: IO[bytes], metadata: dict[str, str]) -> None:
    """Write tensors as a safetensors file, one by one, without a second copy of all of them."""
    header = _HeaderToWrite(metadata)
    for key, tensor in tensors.items():
        header.add(key, _CODES[tensor.dtype], list(tensor.shape), tensor.nbytes)
    out.write(header.encoded())
    for tensor in tensors.values():
        out.write(_bytes(tensor))


def _bytes(tensor: Tensor) -> memoryview:
    """The entries of a tensor, as a file has them."""
    bits = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
    return np.ascontiguousarray(bits.numpy()).data


class Finish(Protocol):
    """The last step from the parts of an adapter to its file, which only all parts together decide."""

    def key(self, key: str) -> str:
        """The key of a tensor in the file."""
        ...

    def tensor(self, key: str, tensor: Tensor) -> Tensor:
        """The tensor in the file; of a tensor on the meta device, its shape alone."""
        ...


def join_safetensors(
    parts: Sequence[Path],
    out: IO[bytes],
    metadata: dict[str, str],
    task: int | None = None,
    finish: Finish | None = None,
) -> None:
    """Join safetensors files into one, or only their tensors of one task, copied piece by piece.

    `finish` renames and pads them; one padded tensor is in memory at a time. Raises InputError if two parts hold a
    tensor of the same name.
    """
    header = _HeaderToWrite(metadata)
    pieces: list[tuple[Path, str, Stored]] = []
    for part in parts:
        for key, stored in read_header(part).tensors.items():
            if (name := name_in_task(key, task)) is None:
                continue
            shape, size = stored.shape, stored.size
            if finish is not None:
                dtype = _DTYPES[stored.code].torch
                final = finish.tensor(name, torch.empty(shape, dtype=dtype, device="meta"))
                name, shape, size = finish.key(name), tuple(final.shape), final.nbytes
            if name in header.entries:
                raise InputError(f"two stacks would write the tensor {name!r}; keep one of them with --modules")
            header.add(name, stored.code, shape, size)
            pieces.append((part, key, stored))
    out.write(header.encoded())
    for part, key, stored in pieces:
        if finish is not None:
            with opened(part) as tensors:
                out.write(_bytes(finish.tensor(name_in_task(key, task) or key, tensors.get_tensor(key))))
            continue
        with part.open("rb") as file:
            file.seek(stored.offset)
            remaining = stored.size
            while remaining > 0:
                if not (block := file.read(min(remaining, _COPIED))):
                    raise InputError(f"{part} was cut off while it was read; delete its folder to begin anew")
                remaining -= out.write(block)


class _HeaderToWrite:
    """The beginning of a safetensors file whose tensors follow in the order in which they are added."""

    def __init__(self, metadata: dict[str, str]) -> None:
        self.entries: dict[str, Any] = {"__metadata__": metadata}
        self._offset = 0

    def add(self, key: str, code: str, shape: Sequence[int], size: int) -> None:
        offsets = [self._offset, self._offset + size]
        self.entries[key] = {"dtype": code, "shape": shape, "data_offsets": offsets}
        self._offset += size

    def encoded(self) -> bytes:
        """The header with its length before it, padded to a multiple of 8 bytes."""
        text = json.dumps(self.entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text
