"""Stacks of updates in safetensors, with matrices of Conv1D turned to (out, in)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rasa_theory.formats import (
    Checkpoint,
    ModelCheckpoint,
    adapter_in_tensors,
    architecture,
    model_config,
    model_types,
    refuse_quantised,
)
from rasa_theory.sources.adapters import catalogue_of_adapter
from rasa_theory.sources.catalogue import Catalogue, Reader, catalogue_of
from rasa_theory.sources.tensor_updates import Updates


def open_checkpoint(
    path: Path, memory: int | None = None, alone: bool = False, convolutions: bool = False
) -> Catalogue:
    """The stacks of a checkpoint, with matrices (out, in).

    `alone` is as for `grouping.group`, `convolutions` as for `ModelCheckpoint`.

    Beside a config.json they have the names and the roles of that model. Without one, every matrix is an update. If the
    keys are those of an adapter, the stacks are the adapter's updates. Raises InputError as `find_shards` and
    `adapter_in_tensors` do, if a config.json is not sound, if weights are quantised, and if no stack remains.
    """
    disk = Checkpoint(path)
    if (adapter := adapter_in_tensors(disk, convolutions)) is not None:
        return catalogue_of_adapter(adapter, memory, alone)
    refuse_quantised(path, disk.entries.values(), model_config(path))
    model, models = architecture(path), model_types(path)
    checkpoint = ModelCheckpoint(disk, model, models, convolutions)
    entries = list(checkpoint.entries.values())
    if not models:
        entries = [entry._replace(place=None) for entry in entries]
    updates = Updates({entry.name: entry for entry in entries}, checkpoint)
    reader = Reader(updates.read, checkpoint.file_of, checkpoint.part)
    catalogue = catalogue_of(str(path), entries, reader, checkpoint.left_out, memory, alone)
    notes = (_may_be_weights(path),) if models else ()
    return dataclasses.replace(catalogue, files=checkpoint.files, updates=updates, notes=notes)


def _may_be_weights(path: Path) -> str:
    """The sentence on a source of updates beside the config.json of a model: it may be that model."""
    return (
        f"The tensors of {path} are taken for updates, though a config.json lies beside them. If they are the weights "
        "of a model, give it as --tuned, and the model before fine-tuning as --base."
    )
