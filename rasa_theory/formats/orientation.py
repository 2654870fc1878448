"""Which matrices a model has as (in, out), not (out, in): the Conv1D weights of GPT-2 and its relatives."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from rasa_theory.formats.names import Entry
from rasa_theory.formats.safetensors import read_json

_CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"})
_CONV1D = re.compile(r"(?:\A|\.)(c_attn|q_attn|c_fc|c_proj)(?:\.weight)?\Z")
_WIDENING = ("c_attn", "c_fc")  # more outputs than inputs, in every model that has them


def model_types(checkpoint: Path) -> frozenset[str]:
    """`model_type` of the config.json in a checkpoint's directory and of its parts, such as a decoder; maybe none.

    Raises InputError if there is a config.json that holds no JSON object.
    """
    file = (checkpoint if checkpoint.is_dir() else checkpoint.parent) / "config.json"
    if not os.path.exists(file):
        return frozenset()
    config = read_json(file)
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    return frozenset(kind for part in parts if isinstance(kind := part.get("model_type"), str))


def oriented(entries: Iterable[Entry], models: frozenset[str]) -> list[Entry]:
    """The same entries, with the shape of Conv1D matrices flipped to (out, in) = (b, a) and `transposed` set.

    Which they are is said by the names c_attn, q_attn, c_fc and c_proj in models of the types that have Conv1D, and in
    no others. Where no type is known, by these names, unless a c_attn or c_fc has more rows than columns: then its
    rows are its outputs, and the model has Linear modules of these names.
    """
    entries = list(entries)
    kinds = {e.name: found[1] for e in entries if len(e.shape) == 2 and (found := _CONV1D.search(e.name))}
    tall = any(e.shape[0] > e.shape[1] for e in entries if kinds.get(e.name) in _WIDENING)
    conv1d = bool(models & _CONV1D_MODELS) if models else not tall
    if not conv1d:
        return entries
    return [e._replace(shape=e.shape[::-1], transposed=True) if e.name in kinds else e for e in entries]


def called_conv1d(name: str) -> bool:
    """Whether a module or its weight has one of the names of Conv1D: c_attn, q_attn, c_fc, c_proj."""
    return _CONV1D.search(name) is not None


def adapted_conv1d(modules: Collection[str], fan_in_fan_out: bool) -> set[str]:
    """Those modules of a PEFT adapter whose weights are (in, out), by the flag in its configuration.

    PEFT has one flag for all modules, and sets it to what each is as it wraps them: as saved, it speaks of the last.
    True: the modules called c_attn, q_attn, c_fc or c_proj, beside which there may be Linear ones, or, where none is
    called so, all. False: none is known to be one; before a Linear module those of these names may be all the same.
    """
    if not fan_in_fan_out:
        return set()
    return {module for module in modules if called_conv1d(module)} or set(modules)
