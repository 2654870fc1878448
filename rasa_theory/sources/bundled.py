"""The real fine-tuning updates that come with the package."""

from __future__ import annotations

import importlib.resources
import json
from importlib.resources.abc import Traversable
from typing import Any

import torch

from rasa_theory.common import InputError
from rasa_theory.distributed import ALONE, LayerSharding, Processes
from rasa_theory.formats import opened
from rasa_theory.problem import LayerStack
from rasa_theory.sources.catalogue import Catalogue, StackSource

BUNDLED = {"minilm-code": "minilm_code"}
DEFAULT = "minilm-code"
_KINDS = ("query", "key", "value", "attention_output")


def open_bundled(name: str, memory: int | None = None) -> Catalogue:
    """The stacks of a bundled set: tuned - base of query, key, value and attention output, (6, 384, 384) each.

    The file holds half precision times 2^s, with s in the metadata. Loading undoes the scale exactly, in float64,
    before the conversion to another dtype. Raises InputError for an unknown name.
    """
    resource = _resource(name, "safetensors")
    with importlib.resources.as_file(resource) as path, opened(path) as tensors:
        shapes = {kind: tuple(tensors.get_slice(kind).get_shape()) for kind in _KINDS}
    return Catalogue(name, [_stack_source(resource, kind, shapes[kind], memory) for kind in _KINDS], [])


def provenance(name: str) -> dict[str, Any]:
    """The origin of a bundled set: model, data, training settings, retrieval before and after.

    Raises InputError for an unknown name.
    """
    facts: dict[str, Any] = json.loads(_resource(name, "json").read_text(encoding="utf-8"))
    return facts


def _resource(name: str, suffix: str) -> Traversable:
    if name not in BUNDLED:
        raise InputError(f"no bundled set is named {name!r}; there are: {', '.join(BUNDLED)}")
    return importlib.resources.files("rasa_theory") / "data" / f"{BUNDLED[name]}.{suffix}"


def _stack_source(resource: Traversable, kind: str, shape: tuple[int, int, int], memory: int | None) -> StackSource:
    def load(
        dtype: torch.dtype | None, device: torch.device | None, processes: Processes = ALONE, tf32: bool = False
    ) -> LayerStack:
        sharding = LayerSharding.of(shape[0], processes)
        with importlib.resources.as_file(resource) as path, opened(path) as tensors:
            half = tensors.get_slice(kind)[sharding.local]
            s = int(tensors.metadata()[f"{kind}.log2_scale"])
        return LayerStack(half.double() * 2.0**-s, kind, dtype, device, memory, sharding, tf32=tf32)

    L, b, a = shape
    return StackSource(kind, L, (b, a), load, (kind,))
