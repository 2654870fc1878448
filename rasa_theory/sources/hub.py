"""Models of the Hub by their id, downloaded or taken from the cache by huggingface_hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from rasa_theory.common import InputError
from rasa_theory.formats import PICKLES

_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", re.ASCII)
_FILES = (".safetensors", ".npy", ".npz", *PICKLES)
_WANTED = ("*.safetensors", "*.safetensors.index.json", "config.json", "adapter_config.json")


def is_hub_id(name: str) -> bool:
    """Whether a name that is no file or folder here may be a model's id on the Hub: `org/name` or `org/name@revision`.

    A name that ends as a file of updates does, or begins with a folder that is here, is a path with a mistake in it.
    """
    match = _ID.fullmatch(name)
    return match is not None and not match[1].endswith(_FILES) and not os.path.exists(match[1].split("/")[0])


def snapshot(name: str) -> Path:
    """The folder of a model's snapshot: only its safetensors and configurations are fetched, if they are not cached.

    Raises InputError, in one sentence, without huggingface_hub, and if the model is neither there nor in the cache.
    """
    match = _ID.fullmatch(name)
    if match is None:
        raise InputError(f"{name!r} is no id of a model on the Hub, such as org/name")
    try:
        import huggingface_hub
    except ImportError:
        raise InputError(
            f"{name!r} is no file or folder here; to take it from the Hub, install the extra hub "
            "(pip install 'rasa-theory[hub]')"
        ) from None
    try:
        return Path(huggingface_hub.snapshot_download(match[1], revision=match[2], allow_patterns=list(_WANTED)))
    except Exception as error:  # of the network, the server, the cache or the disk, each with a type of its own
        why = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
        raise InputError(
            f"{name!r} is no file or folder here, and could not be had from the Hub or its cache "
            f"({type(error).__name__}: {why[:200]}); check the id and the connection, or download the model first"
        ) from None
