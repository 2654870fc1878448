"""The config.json beside a checkpoint, and the types of model that it names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rasa_theory.formats.safetensors import read_json


def config_file(checkpoint: Path) -> Path | None:
    """The config.json in a checkpoint's directory, or beside its file; None if there is none."""
    file = (checkpoint if checkpoint.is_dir() else checkpoint.parent) / "config.json"
    return file if os.path.exists(file) else None


def model_config(checkpoint: Path) -> dict[str, Any]:
    """The object in a checkpoint's config.json; {} without one. Raises InputError if it holds no JSON object."""
    file = config_file(checkpoint)
    return {} if file is None else read_json(file)


def model_types(checkpoint: Path) -> frozenset[str]:
    """`model_type` in a checkpoint's config.json, and of its parts, such as a decoder; maybe empty.

    Raises InputError if there is a config.json that holds no JSON object.
    """
    config = model_config(checkpoint)
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    return frozenset(kind for part in parts if isinstance(kind := part.get("model_type"), str))
