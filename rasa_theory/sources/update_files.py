"""Stacks of a checkpoint that holds updates."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rasa_theory.formats import ModelCheckpoint, architecture, model_types
from rasa_theory.sources.catalogue import Catalogue, Reader, catalogue_of
from rasa_theory.sources.tensor_updates import Updates


def open_checkpoint(path: Path, memory: int | None = None, alone: bool = False) -> Catalogue:
    """The stacks of a checkpoint, with matrices (out, in); `alone` as for `grouping.group`.

    Beside a config.json they have the names and the roles of that model. Without one, every matrix is an update.
    Raises InputError as `find_shards` does, if a config.json is not sound, and if no stack remains.
    """
    model, models = architecture(path), model_types(path)
    checkpoint = ModelCheckpoint(path, model, models)
    entries = list(checkpoint.entries.values())
    if not models:
        entries = [entry._replace(place=None) for entry in entries]
    updates = Updates({entry.name: entry for entry in entries}, checkpoint)
    reader = Reader(updates.read, checkpoint.file_of, checkpoint.part)
    catalogue = catalogue_of(str(path), entries, reader, checkpoint.left_out, memory, alone)
    return dataclasses.replace(catalogue, files=checkpoint.files, updates=updates)
