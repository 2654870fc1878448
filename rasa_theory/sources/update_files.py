"""Stacks of a checkpoint that holds updates."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rasa_theory.formats import Checkpoint, model_types, oriented
from rasa_theory.sources.catalogue import Catalogue, Reader, catalogue_of


def open_checkpoint(path: Path, memory: int | None = None, alone: bool = False) -> Catalogue:
    """The stacks of a checkpoint, with matrices (out, in); `alone` as for `grouping.group`.

    Raises InputError as `find_shards` does, if a config.json is not sound, and if no stack remains.
    """
    checkpoint = Checkpoint(path)
    reader = Reader(checkpoint.read, checkpoint.file_of, checkpoint.part)
    entries = oriented(checkpoint.entries.values(), model_types(path))
    catalogue = catalogue_of(str(path), entries, reader, checkpoint.left_out, memory, alone)
    return dataclasses.replace(catalogue, files=checkpoint.files)
