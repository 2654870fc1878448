"""The file of every tensor of a checkpoint: one file, all files of a directory, or the files that an index names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from rasa_theory.common import InputError, UnsoundFile
from rasa_theory.formats.safetensors import Header, read_header, read_json
from rasa_theory.formats.tensors import Exclusion, LeftOut

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_PICKLE_INDEXES = tuple(f"{suffix}.index.json" for suffix in PICKLES)
_TENSORS_SHOWN = 5
_UNFINISHED = (".incomplete", ".part", ".crdownload", ".aria2", ".download", ".tmp")
_TRAINING_STATE = re.compile(r"(?:optimizer|scheduler|scaler|training_args|rng_state|random_states|trainer_state)")
_SHARD = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.safetensors")
_ORIGINAL = re.compile(r"consolidated(?:[.-].*)?\.safetensors")  # a copy under the names of the authors' own code
_MOST_SHARDS = 10_000
_PROBLEMS_SHOWN = 200  # more than the largest checkpoints have files


class Shards(NamedTuple):
    """The header of the file that holds each tensor, by key, and the tensors that an index does not name."""

    header_of: dict[str, Header]
    left_out: list[LeftOut]


def find_shards(path: Path) -> Shards:
    """Find the tensors of a `.safetensors` file or of a directory: those that its index names, or all of all files.

    Raises InputError, one sentence with all problems, if there is no such file, or a file is missing, damaged or a
    pickle; if a tensor is not where the index says, or two files have it and no index says which.
    """
    if path.is_dir() and (index := _index(path)) is not None:
        return _named_by(index)
    headers, problems = _read([(str(file), file) for file in _files(path)])
    if problems:
        raise InputError(f"{_first(problems)}; download or write {'it' if len(problems) == 1 else 'them'} again")
    header_of: dict[str, Header] = {}
    for header in headers.values():
        for key in header.tensors:
            if key in header_of:
                raise InputError(
                    f"{path}: tensor {key!r} is in both {header_of[key].file.name} and {header.file.name}; "
                    "name the one file that is meant"
                )
            header_of[key] = header
    return Shards(header_of, [])


def _index(directory: Path) -> Path | None:
    """The only index of a directory, or None. Raises InputError if there are several."""
    found = sorted(directory.glob("*.safetensors.index.json"))
    indexes = [file for file in found if not _ORIGINAL.fullmatch(file.name.removesuffix(".index.json"))] or found
    if len(indexes) > 1:
        names = ", ".join(file.name for file in indexes)
        raise InputError(f"{directory}: the directory has {len(indexes)} indexes ({names}); keep the one that is meant")
    return indexes[0] if indexes else None


def _named_by(index: Path) -> Shards:
    """The tensors in the files where the index places them; other tensors of these files are left out.

    Raises InputError if a file with the index's own name is there, and the index does not name it: transformers loads
    that file, other programs the shards, and one of the two may be left over from before a model was saved again.
    """
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise InputError(f"{index}: expected weight_map, the name of a file for every tensor; download it again")
    single = index.with_name(index.name.removesuffix(".index.json"))
    if single.name not in places.values() and os.path.exists(single):
        raise InputError(
            f"{index.parent}: has both {single.name} and {index.name} with its shards, of which one may be left over; "
            f"name the file ({single}), or remove it"
        )
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
        LeftOut(key, f"in {header.file}, where {index.name} does not look for it", Exclusion.UNINDEXED)
        for name, header in headers.items()
        for key in header.tensors
        if places.get(key) != name
    ]
    return Shards({key: headers[name] for key, name in sorted(places.items())}, unnamed)


def _read(files: Iterable[tuple[str, Path]]) -> tuple[dict[str, Header], list[str]]:
    """The headers of (name, file) by name, and a sentence for every file that cannot be read."""
    headers: dict[str, Header] = {}
    problems: list[str] = []
    for name, file in files:
        try:
            headers[name] = read_header(file)
        except UnsoundFile as error:
            problems.append(error.finding)
    return headers, problems


def _refusal(directory: Path, name: str) -> str | None:
    """The reason why the file that an index names is not read, or None."""
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
    if not target.is_relative_to(_enclosing_folder(directory.resolve())):
        return f"{name!r} is a link out of the directory, to {target}: put the file itself there"
    return None


def _enclosing_folder(directory: Path) -> Path:
    """The folder that links of a checkpoint may not leave: the directory itself, or the model's in a hub's cache.

    In the cache a checkpoint is models--<name>/snapshots/<revision>, and its files are links into models--<name>/blobs.
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
    if path.suffix.lower() == ".gguf":
        raise InputError(
            f"{path}: GGUF is of llama.cpp, and mostly quantised; take the model that it was converted from"
        )
    if path.suffix.lower() != ".safetensors":
        raise InputError(f"{path}: a checkpoint is a .safetensors file or a directory of them")
    if not path.exists():
        raise InputError(f"{path} does not exist")
    return [path]


def _files_in(directory: Path) -> list[Path]:
    """The files of a directory without an index, less consolidated ones beside others: they hold the model again."""
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        raise InputError(f"{directory}: the directory cannot be read ({error.strerror or error})") from None
    if files := [name for name in names if name.endswith(".safetensors")]:
        _refuse_lacking_shards(directory, names)
        return [directory / name for name in files if not _ORIGINAL.fullmatch(name)] or [directory / n for n in files]
    raise InputError(f"{directory}: the directory has no .safetensors file{_hint(directory, names)}")


def _refuse_lacking_shards(directory: Path, names: Iterable[str]) -> None:
    """Raise InputError if files are numbered as shards, `-00001-of-00003`, and some are not there."""
    shards: dict[tuple[str, int], set[int]] = {}
    for name in names:
        if (match := _SHARD.fullmatch(name)) is not None and int(match[3]) <= _MOST_SHARDS:
            shards.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    for (stem, count), numbers in shards.items():
        if missing := [f"{stem}-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1) if i not in numbers]:
            raise InputError(f"{directory}: {_first(missing, _TENSORS_SHOWN, ', ')} not there; download the rest")


def _hint(directory: Path, names: Sequence[str]) -> str:
    """What is there instead of safetensors, and what to do: the end of a sentence, or nothing."""

    def first(*ends: str) -> str | None:
        return next((name for name in names if name.lower().endswith(ends)), None)

    if (name := first(*_UNFINISHED)) is not None:
        return f"; {name} is a download that was not finished: resume it"
    if directory.name.startswith("models--"):
        return "; it is a model in a hub's cache: give the folder of one revision in snapshots/" + (
            "" if _has_children(directory / "snapshots") else ", which is not there: download the model again"
        )
    weights = [name for name in names if not _TRAINING_STATE.match(name)]
    for name in weights:
        if name.lower().endswith(PICKLES):
            return f"; {name} is a pickle, which is never opened: convert it to safetensors"
        if name.lower().endswith(_PICKLE_INDEXES):
            return f"; {name} names pickles, which are never opened: convert them to safetensors"
    if (name := first(".gguf")) is not None:
        return f"; {name} is of llama.cpp, and mostly quantised: take the model that it was converted from"
    if (name := first(".distcp")) is not None:
        return f"; {name} is a shard of torch's distributed checkpoints: save a full state dict in safetensors"
    if name := next((name for name in names if re.fullmatch("global_step[0-9]+", name)), None):
        return f"; {name} is DeepSpeed's: run zero_to_fp32.py, and convert the result to safetensors"
    if folders := [name for name in names if _has_children(directory / name, "*.safetensors")]:
        return f"; its folders {_first(folders, _TENSORS_SHOWN, ', ')} have some: give one of them"
    if len(weights) < len(names):
        return f"; {next(n for n in names if n not in weights)} is the state of a training, not weights"
    return ""


def _has_children(folder: Path, pattern: str = "*") -> bool:
    return folder.is_dir() and any(folder.glob(pattern))


def _first(texts: list[str], most: int = _PROBLEMS_SHOWN, between: str = "; ") -> str:
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return between.join(texts[:most]) + more
