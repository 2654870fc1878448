"""Names of modules without the wrappers around them: torch.compile, FSDP, activation checkpoints, DDP, Lightning."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from itertools import accumulate

COMPILED = "_orig_mod."
"""What torch.compile puts into the names of a model's parts."""

_WRAPPERS = frozenset(
    {COMPILED.removesuffix("."), "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
)
_MAYBE = "module"  # the wrapper of DDP and DeepSpeed, but also a legal name of a real module


def unwrapped(keys: Collection[str]) -> dict[str, str]:
    """The name of every tensor less the wrappers in it, wherever they stand, by its key.

    `module` is a wrapper where every name with the same beginning goes on with it. If two names would become one, all
    stay as they are.
    """
    parts_of = {key: [part for part in key.split(".") if part not in _WRAPPERS] for key in keys}
    if any(_MAYBE in parts[:-1] for parts in parts_of.values()):
        counts = Counter(beginning for parts in parts_of.values() for beginning in _beginnings(parts))
        parts_of = {key: _without_modules(parts, counts) for key, parts in parts_of.items()}
    names = {key: ".".join(parts) for key, parts in parts_of.items()}
    return names if len(set(names.values())) == len(names) else {key: key for key in keys}


def _beginnings(parts: Sequence[str]) -> list[str]:
    """What stands before each component, "" before the first, and the whole at last."""
    return list(accumulate(parts, lambda name, part: f"{name}{part}.", initial=""))


def _without_modules(parts: Sequence[str], counts: Counter[str]) -> list[str]:
    """The components less each `module` that all names with the same beginning have; the last one always stays."""
    before = _beginnings(parts)
    return [
        part
        for i, part in enumerate(parts)
        if part != _MAYBE or i == len(parts) - 1 or counts[before[i]] != counts[before[i + 1]]
    ]
