"""The real fine-tuning updates that come with the package, or with its repository."""

from __future__ import annotations

import importlib.resources
import json
from pathlib import Path
from typing import Any, NamedTuple

from rasa_theory.common import InputError
from rasa_theory.formats import Checkpoint
from rasa_theory.sources.catalogue import Catalogue, Reader, catalogue_of


class BundledSet(NamedTuple):
    """The stem of the two files of a set, and the command that makes them in a clone of the repository."""

    stem: str
    command: str


BUNDLED = {
    "minilm-code": BundledSet("minilm_code", "python -m experiments.finetune --seeds 0 1 --ship 0"),
    "mpnet-code": BundledSet("mpnet_code", "python -m experiments.finetune --model mpnet --seeds 0 1 --ship 0"),
}
DEFAULT = "minilm-code"
_KINDS = ("query", "key", "value", "attention_output", "intermediate", "output")


def open_bundled(name: str, memory: int | None = None) -> Catalogue:
    """The stacks of a bundled set: tuned - base of some kinds of linear layers, (L, b, a) each, in float64.

    Of minilm-code these are query, key, value and attention output, (6, 384, 384) each. Raises InputError for an
    unknown name, and for a set whose file is not here.
    """
    disk = Checkpoint(_file(name, "safetensors"))
    entries = sorted(disk.entries.values(), key=lambda entry: _KINDS.index(entry.name))
    return catalogue_of(name, entries, Reader(disk.read, disk.file_of, disk.part), memory=memory)


def provenance(name: str) -> dict[str, Any]:
    """The origin of a bundled set: model, data, training settings, retrieval before and after.

    Raises InputError for an unknown name, and for a set whose file is not here.
    """
    facts: dict[str, Any] = json.loads(_file(name, "json").read_text(encoding="utf-8"))
    return facts


def is_bundled(name: str) -> bool:
    """Whether there is a bundled set of this name, and its file is in this installation."""
    return name in BUNDLED and _path(name, "safetensors").is_file()


def _path(name: str, suffix: str) -> Path:
    return Path(str(importlib.resources.files("rasa_theory"))) / "data" / f"{BUNDLED[name].stem}.{suffix}"


def _file(name: str, suffix: str) -> Path:
    if name not in BUNDLED:
        raise InputError(f"no bundled set is named {name!r}; there are: {', '.join(BUNDLED)}")
    file = _path(name, suffix)
    if not file.is_file():
        raise InputError(
            f"the set {name} is not in this installation ({file} is missing): wheels leave it out for its size; "
            f"in a clone of the repository it is made by {BUNDLED[name].command}"
        )
    return file
