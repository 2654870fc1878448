"""LoRA as mlx-lm writes it: a folder with A^T (a, r) and B^T (r, b) for every module, and one scale for all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rasa_theory.common import InputError
from rasa_theory.formats.checkpoint import Checkpoint
from rasa_theory.formats.lora_options import MERGE
from rasa_theory.formats.spellings import Spelling, adapter_format, spelt
from rasa_theory.formats.stored_adapter import (
    FactorPair,
    StoredAdapter,
    beside_factors,
    check_gathered,
    factor_pair,
    unusable,
)
from rasa_theory.formats.tensors import Entry, Exclusion, LeftOut

MLX_WEIGHTS = "adapters.safetensors"


def mlx_adapter(folder: Path, file: Path, config: Mapping[str, Any]) -> StoredAdapter:
    """The adapter in a folder that mlx-lm has written, with the configuration `config` in `file`.

    Raises InputError if it is of another type than LoRA, or does not say its scaling, or has no weights in safetensors.
    """
    weights = folder / MLX_WEIGHTS
    if (kind := config.get("fine_tune_type") or "lora") != "lora":
        raise InputError(f"{file}: fine_tune_type is {kind!r}, whose update is not B A; {MERGE}")
    scaling = _scale(file, config["lora_parameters"])
    if not os.path.isfile(weights):
        raise InputError(f"{folder}: has {file.name} of MLX but no {MLX_WEIGHTS}; save the adapter as safetensors")
    checkpoint = Checkpoint(weights)
    sides_of: dict[str, dict[str, Entry]] = {}
    left_out: list[LeftOut] = []
    for name, entry in checkpoint.entries.items():
        key = spelt(name)
        if key is None or key.spelling is not Spelling.MLX:
            left_out.append(LeftOut(name, beside_factors(adapter_format(name)), Exclusion.NO_FACTOR))
            continue
        check_gathered(weights, entry)
        sides_of.setdefault(key.module, {})[key.side.value] = entry
    pairs: dict[str, FactorPair] = {}
    for module, sides in sides_of.items():
        refusal = unusable(sides)
        if refusal is None and f"{module}.m" in checkpoint.entries:
            refusal = f"{module}.m, the magnitudes of DoRA, stands beside them; {MERGE}", Exclusion.VARIANT
        if refusal is not None:
            left_out += [LeftOut(entry.name, *refusal) for entry in sides.values()]
            continue
        pairs[module] = factor_pair(weights, sides["A"], sides["B"], scaling, False, swapped=True)
    return StoredAdapter(folder, checkpoint, pairs, left_out, (file, weights))


def _scale(file: Path, parameters: Any) -> float:
    """The scale of all updates. Raises InputError unless the file has it, and no alpha that contradicts it."""
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not abs(scale) < 1e300:
        raise InputError(f"{file}: expected lora_parameters with a number as scale; mend it")
    alpha, rank = parameters.get("alpha"), parameters.get("rank")
    if alpha is not None and alpha != rank:
        raise InputError(
            f"{file}: has both scale {scale} and alpha {alpha}, which early versions of mlx-lm multiply by "
            "alpha / rank and later ones ignore; remove alpha, after multiplying scale by alpha / rank if it counted"
        )
    return float(scale)
