"""Which files of a checkpoint hold which tensors: one file, all files of a directory, or those that an index names."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from rasa_theory.common import InputError, UnsoundFile
from rasa_theory.formats.names import LeftOut
from rasa_theory.formats.safetensors import Header, read_header, read_json

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_PICKLE_INDEXES = tuple(f"{suffix}.index.json" for suffix in PICKLES)
_TENSORS_SHOWN = 5
_PROBLEMS_SHOWN = 200  # more than the largest checkpoints have files


class Shards(NamedTuple):
    """The header of the file that holds each tensor, and the tensors that an index does not name."""

    of: dict[str, Header]
    left_out: list[LeftOut]


def find_shards(path: Path) -> Shards:
    """The tensors of a `.safetensors` file, or of a directory: those its index names, without one all of all files.

    Raises InputError, one sentence with everything that was found, if there is no such file, a file is missing,
    damaged or a pickle, a tensor is not where the index says, or two files have it and no index says which.
    """
    if path.is_dir() and (index := _index(path)) is not None:
        return _named_by(index)
    headers, problems = _read([(str(file), file) for file in _files(path)])
    if problems:
        raise InputError(f"{_first(problems)}; download or write {'it' if len(problems) == 1 else 'them'} again")
    of: dict[str, Header] = {}
    for header in headers.values():
        for key in header.tensors:
            if key in of:
                raise InputError(
                    f"{path}: tensor {key!r} is in both {of[key].file.name} and {header.file.name}; "
                    "name the one file that is meant"
                )
            of[key] = header
    return Shards(of, [])


def _index(directory: Path) -> Path | None:
    """The one index of a directory, or None. Raises InputError if there are several."""
    found = sorted(directory.glob("*.safetensors.index.json"))
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise InputError(f"{directory}: the directory has {len(found)} indexes ({names}); keep the one that is meant")
    return found[0] if found else None


def _named_by(index: Path) -> Shards:
    """The tensors where the index says that they are; other tensors of these files are left out."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise InputError(f"{index}: expected weight_map, the name of a file for every tensor; download it again")
    refusals = {name: _refusal(index.parent, name) for name in sorted(set(places.values()))}
    headers, unsound = _read([(name, index.parent / name) for name, why in refusals.items() if why is None])
    absent: dict[str, list[str]] = {}
    for key, name in places.items():
        if name in headers and key not in headers[name].tensors:
            absent.setdefault(name, []).append(repr(key))
    problems = [why for why in refusals.values() if why is not None] + unsound
    problems += [f"{name!r} has not got {_first(keys, _TENSORS_SHOWN, ', ')}" for name, keys in absent.items()]
    if problems:
        raise InputError(f"{index}: {_first(problems)}; download the checkpoint again, in safetensors")
    unnamed = [
        LeftOut(key, f"in {header.file}, where {index.name} does not look for it")
        for name, header in headers.items()
        for key in header.tensors
        if places.get(key) != name
    ]
    return Shards({key: headers[name] for key, name in sorted(places.items())}, unnamed)


def _read(files: Iterable[tuple[str, Path]]) -> tuple[dict[str, Header], list[str]]:
    """The headers of files, by the name given, and what is wrong with those that cannot be read."""
    headers: dict[str, Header] = {}
    problems: list[str] = []
    for name, file in files:
        try:
            headers[name] = read_header(file)
        except UnsoundFile as error:
            problems.append(error.finding)
    return headers, problems


def _refusal(directory: Path, name: str) -> str | None:
    """Why an entry of an index is no file to be read; None if it is one."""
    path, suffix = Path(name), Path(name).suffix.lower()
    if suffix in PICKLES:
        return f"{name!r} is a pickle, which is never opened: convert it to safetensors"
    if suffix != ".safetensors" or not name.isprintable():
        return f"{name!r} is not the name of a .safetensors file"
    if path.is_absolute() or ".." in path.parts:
        return f"{name!r} leads out of the directory"
    if not os.path.exists(directory / path):  # unlike Path.exists, False also for names too long
        return f"{name!r} is missing"
    target = (directory / path).resolve()
    if not target.is_relative_to(_walls(directory.resolve())):
        return f"{name!r} is a link out of the directory, to {target}: put the file itself there"
    return None


def _walls(directory: Path) -> Path:
    """The folder that links of a checkpoint may not leave: `directory`, or, in a model hub's cache, that of the model.

    There a checkpoint is models--<name>/snapshots/<revision>, and its files are links into models--<name>/blobs.
    """
    for folder in (directory, *directory.parents):
        if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
            return folder.parent.parent
    return directory


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return _files_in(path)
    if path.suffix.lower() in PICKLES:
        raise InputError(f"{path}: pickles are never opened, for they can run code; convert the file to safetensors")
    if path.suffix.lower() != ".safetensors":
        raise InputError(f"{path}: a checkpoint is a .safetensors file or a directory of them")
    if not path.exists():
        raise InputError(f"{path} does not exist")
    return [path]


def _files_in(directory: Path) -> list[Path]:
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        raise InputError(f"{directory}: the directory cannot be read ({error.strerror or error})") from None
    if files := [directory / name for name in names if name.endswith(".safetensors")]:
        return files
    hint = ""
    for name in names:
        if name.lower().endswith(PICKLES):
            hint = f"; {name} is a pickle, which is never opened: convert it to safetensors"
            break
        if name.lower().endswith(_PICKLE_INDEXES):
            hint = f"; {name} names pickles, which are never opened: convert them to safetensors"
    raise InputError(f"{directory}: the directory has no .safetensors file{hint}")


def _first(texts: list[str], most: int = _PROBLEMS_SHOWN, between: str = "; ") -> str:
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return between.join(texts[:most]) + more
