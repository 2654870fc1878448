"""The adapter layout of RaSA's authors (zwhe99/RaSA): keys, tensors and configuration, written and read.

Every module has B~_i (b, q), A~_i (q, a) and a mixing (q + R,), first of the private terms, then of the pool. The pool
of its kind is B_S (b, R), A_S (R, a). At scaling 1 the module adds, for an input x,
[rasa_B | shared_B] (mixing * ([rasa_A; shared_A] x)).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rasa_theory.common import InputError
from rasa_theory.formats.names import PEFT_PREFIX, ModuleNames
from rasa_theory.problem import RasaFactors

_PRIVATE_A = re.compile(rf"{re.escape(PEFT_PREFIX)}(.+)\.rasa_A\.weight")


def _module_key(module: str, part: str) -> str:
    """The key of a tensor of one module; `part` is A, B or mixing."""
    return f"{PEFT_PREFIX}{module}.rasa_{part}.weight"


def _pool_key(kind: str, side: str) -> str:
    """The key of one side of the pool, A or B. It holds the kind of module, with dots written as `__`."""
    return f"base_model.rasa_shared_{side}.{kind.replace('.', '__')}.weight"


# ---- tensors


def rasa_layout(
    modules: ModuleNames,
    private_B: Iterable[Tensor],
    private_A: Iterable[Tensor],
    mixing: Iterable[Tensor],
    shared_B: Tensor,
    shared_A: Tensor,
) -> dict[str, Tensor]:
    """The tensors by key, not copied: B~_i, A~_i and the mixing (q + R,) of each module, and the sides of the pool."""
    tensors = {_pool_key(modules.kind, "A"): shared_A, _pool_key(modules.kind, "B"): shared_B}
    for name, Bt, At, d in zip(modules.names, private_B, private_A, mixing, strict=True):
        tensors[_module_key(name, "A")] = At
        tensors[_module_key(name, "B")] = Bt
        tensors[_module_key(name, "mixing")] = d
    return tensors


def rasa_tensors(modules: ModuleNames, factors: RasaFactors) -> dict[str, Tensor]:
    """The adapter of these updates: `evened` factors, with the mixing 1 for private terms."""
    even = factors.evened()
    mixing = torch.cat([even.mixing.new_ones(even.layers, even.private_A.shape[1]), even.mixing], 1)
    return rasa_layout(modules, even.private_B, even.private_A, mixing, even.shared_B, even.shared_A)


def rasa_factors(modules: ModuleNames, tensors: Mapping[str, Tensor]) -> RasaFactors:
    """The factors of an adapter in float64; the mixing of the private terms goes into B~_i."""

    def of_modules(part: str) -> list[Tensor]:
        return [tensors[_module_key(name, part)].double() for name in modules.names]

    At, Bt, mixing = of_modules("A"), of_modules("B"), of_modules("mixing")
    q = At[0].shape[0]
    return RasaFactors(
        private_B=torch.stack([B * d[:q] for B, d in zip(Bt, mixing, strict=True)]),
        private_A=torch.stack(At),
        shared_B=tensors[_pool_key(modules.kind, "B")].double(),
        shared_A=tensors[_pool_key(modules.kind, "A")].double(),
        mixing=torch.stack([d[q:] for d in mixing]),
    )


def rasa_modules(tensors: Iterable[str], file: Path) -> list[str]:
    """The modules of an adapter, from its keys. Raises InputError, naming `file`, if there is none."""
    modules = [match[1] for key in tensors if (match := _PRIVATE_A.fullmatch(key))]
    if not modules:
        raise InputError(f"{file}: no tensor is called {_module_key('<module>', 'A')}")
    return modules


# ---- the configuration


@dataclass(frozen=True)
class RasaConfig:
    """The fields of the adapter_config.json of the authors' fork of PEFT that decide about the updates.

    `alpha` enters only the initial mixing; the scaling of a stored adapter is 1.
    """

    rank: int
    shared_rank: int
    alpha: float = 1
    dropout: float = 0.0

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> RasaConfig:
        """The fields of a configuration that was read from a file. They are not checked: missing ones are None."""
        return cls(*(config.get(key) for key in ("r", "rasa_k", "rasa_alpha", "rasa_dropout")))  # type: ignore[arg-type]

    def plain(self, modules: Sequence[str], transposed: bool, base: str | None) -> dict[str, Any]:
        """The whole file for these modules of the base model `base`; `transposed`: their weights are (in, out)."""
        return {
            "peft_type": "RASA",
            "base_model_name_or_path": base,
            "task_type": None,
            "inference_mode": True,
            "r": self.rank,
            "rasa_k": self.shared_rank,
            "rasa_alpha": self.alpha,
            "rasa_dropout": self.dropout,
            "target_modules": list(modules),
            "fan_in_fan_out": transposed,
            "bias": "none",
        }
