"""The names of modules in a model, and of tensors that hold their weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from rasa_theory.problem import LoraFactors, RasaFactors

PEFT_PREFIX = "base_model.model."
LAYER_WORDS = ("layers", "layer", "h", "block", "blocks")


@dataclass(frozen=True)
class ModuleNames:
    """The modules of a model whose updates a stack holds, one per layer in order.

    `names` are the keys of their weights less ".weight"; `transposed` if those weights are (in, out), as in a Conv1D.
    Where layers are tasks, names are `task/module`, task a number; see `of_task`.
    """

    names: tuple[str, ...]
    transposed: bool = False

    @classmethod
    def of(cls, keys: Sequence[str], transposed: bool = False, prefix: str = "") -> ModuleNames:
        """From the keys of weights in a checkpoint; `prefix` is put before every name."""
        return cls(tuple(prefix + key.removesuffix(".weight") for key in keys), transposed)

    @property
    def kind(self) -> str:
        """What follows the layer's number in the names, `self_attn.q_proj`; the name without numbers if none does."""
        if "/" in self.names[0]:
            return self.names[0].partition("/")[2]
        parts = self.names[0].split(".")
        for n, (word, number) in enumerate(pairwise(parts)):
            if word in LAYER_WORDS and number.isdecimal():
                return ".".join(parts[n + 2 :])
        return ".".join(part for part in parts if not part.isdecimal()) or self.names[0]


def dense_tensor(modules: ModuleNames, factors: LoraFactors | RasaFactors, i: int) -> tuple[str, Tensor]:
    """The update of layer i itself, by the key and in the orientation of the weight."""
    update = factors.update(i)
    return f"{modules.names[i]}.weight", update.mT if modules.transposed else update


def of_task(name: str, task: int | None) -> str | None:
    """The key or module of one task, without its number; None for another task's. None for `task`: the name itself."""
    if task is None:
        return name
    found = re.fullmatch(rf"(base_model\.model\.)?{task}/(.+)", name)
    return (found[1] or "") + found[2] if found else None


class Entry(NamedTuple):
    """A tensor as a file's header describes it; `dtype` by its usual name: float32, bfloat16, float8_e4m3, int64.

    `transposed`: the model has this matrix (b, a) as (a, b).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    transposed: bool = False


class LeftOut(NamedTuple):
    """A tensor, or a stack, that is not looked at, and why."""

    name: str
    reason: str


_FLOATING = re.compile(r"b?float(16|32|64|96|128)")


def is_floating(dtype: str) -> bool:
    """Whether values of this dtype can be computed with: real, floating, 16 bits or more."""
    return _FLOATING.fullmatch(dtype) is not None
