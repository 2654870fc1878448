"""Weights stored as (in, out) instead of (out, in): the Conv1D modules of GPT-2 and its relatives."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from rasa_theory.formats.roles import Place, Role
from rasa_theory.formats.tensors import Entry

_CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"})
_CONV1D = re.compile(r"(?:\A|\.)(c_attn|q_attn|c_fc|c_proj)(?:\.weight)?\Z")
_WIDENING = ("c_attn", "c_fc")  # more outputs than inputs, in every model that has them


def oriented(entries: Iterable[Entry], models: frozenset[str]) -> list[Entry]:
    """Entries with the shape of Conv1D matrices flipped to (out, in) = (b, a) and `transposed` set.

    Conv1D matrices are those called c_attn, q_attn, c_fc or c_proj, in models of a type that has Conv1D. If the
    type is missing, the names alone decide, unless a c_attn or c_fc has more rows than columns: its rows are then its
    outputs, so the model has Linear modules of these names.
    """
    entries = list(entries)
    matches = {entry.name: _CONV1D.search(entry.name) for entry in entries if len(entry.shape) == 2}
    word_of = {name: match[1] for name, match in matches.items() if match is not None}
    has_tall = any(entry.shape[0] > entry.shape[1] for entry in entries if word_of.get(entry.name) in _WIDENING)
    has_conv1d = bool(models & _CONV1D_MODELS) if models else not has_tall
    if not has_conv1d:
        return entries
    by = "by the model's type and its name" if models else "by its name"
    turned = Place(Role.CONV1D, by)
    return [e._replace(shape=e.shape[::-1], transposed=True, place=turned) if e.name in word_of else e for e in entries]


def called_conv1d(name: str) -> bool:
    """True if a module or its weight has one of the names of Conv1D: c_attn, q_attn, c_fc, c_proj."""
    return _CONV1D.search(name) is not None


def adapted_conv1d(modules: Collection[str], fan_in_fan_out: bool) -> set[str]:
    """The modules of a PEFT adapter whose weights are (in, out), by the flag in its configuration.

    PEFT stores a single `fan_in_fan_out` and overwrites it as each module is wrapped, so that the saved value describes
    the last one. If it is true, the modules called c_attn, q_attn, c_fc or c_proj are transposed; without such a name,
    all modules are. If it is false, none is assumed to be, though modules before the last may be Conv1D all the same.
    """
    if not fan_in_fan_out:
        return set()
    return {module for module in modules if called_conv1d(module)} or set(modules)
