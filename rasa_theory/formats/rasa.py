"""The adapter layout of RaSA's authors (zwhe99/RaSA)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from rasa_theory.formats.names import PEFT_PREFIX, ModuleNames
from rasa_theory.problem import RasaFactors


def rasa_tensors(modules: ModuleNames, factors: RasaFactors) -> dict[str, Tensor]:
    """The authors' adapter with these updates: `evened` factors, private terms with the mixing 1."""
    even = factors.evened()
    mixing = torch.cat([even.mixing.new_ones(even.layers, even.private_A.shape[1]), even.mixing], 1)
    return rasa_layout(modules, even.private_B, even.private_A, mixing, even.shared_B, even.shared_A)


def rasa_layout(
    modules: ModuleNames,
    private_B: Iterable[Tensor],
    private_A: Iterable[Tensor],
    mixing: Iterable[Tensor],
    shared_B: Tensor,
    shared_A: Tensor,
) -> dict[str, Tensor]:
    """The authors' adapter (zwhe99/RaSA): x -> [rasa_B | shared_B] (mixing * ([rasa_A; shared_A] x)), scaling 1.

    Of every module B~_i (b, q), A~_i (q, a) and its mixing (q + R,), first of the private terms; and the pool. The
    pool's keys hold the kind of module, with dots written as `__`.
    """
    kind = modules.kind.replace(".", "__")
    tensors = {
        f"base_model.rasa_shared_A.{kind}.weight": shared_A,
        f"base_model.rasa_shared_B.{kind}.weight": shared_B,
    }
    for name, Bt, At, d in zip(modules.names, private_B, private_A, mixing, strict=True):
        tensors[f"{PEFT_PREFIX}{name}.rasa_A.weight"] = At
        tensors[f"{PEFT_PREFIX}{name}.rasa_B.weight"] = Bt
        tensors[f"{PEFT_PREFIX}{name}.rasa_mixing.weight"] = d
    return tensors


def rasa_config(modules: Sequence[str], rank: int, k: int, transposed: bool, base: str | None) -> dict[str, Any]:
    """adapter_config.json of the authors' fork of PEFT."""
    return {
        "peft_type": "RASA",
        "base_model_name_or_path": base,
        "task_type": None,
        "inference_mode": True,
        "r": rank,
        "rasa_k": k,
        "rasa_alpha": 1,
        "rasa_dropout": 0.0,
        "target_modules": list(modules),
        "fan_in_fan_out": transposed,
        "bias": "none",
    }
