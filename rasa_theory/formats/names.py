"""The grammar of names: modules of a model, the number of their layer, and the task that an adapter belongs to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from rasa_theory.problem import LoraFactors, RasaFactors

PEFT_PREFIX = "base_model.model."
"""The beginning of every key in PEFT's adapters, and in the authors': the two wrappers around the model."""

_LAYER = re.compile(r"(?:\A|\.)(?:layers|layer|h|block|blocks)\.([0-9]+)(?=\.|\Z)")
_IN_TASK = re.compile(rf"({re.escape(PEFT_PREFIX)})?([0-9]+)/(.+)")


def layer_span(name: str) -> tuple[int, int] | None:
    """Start and end of the layer's number in a dotted name, or None.

    It is the number after the first component `layers`, `layer`, `h`, `block` or `blocks` that a number follows.
    """
    match = _LAYER.search(name)
    return None if match is None else match.span(1)


@dataclass(frozen=True)
class ModuleNames:
    """The modules of a model that the layers of a stack belong to, one per layer in order.

    `names` are the keys of their weights less ".weight". `transposed`: those weights are (in, out), as in a Conv1D.
    `kernel`: the last axes (k, k) of the weights of convolutions, each of which is here the matrix (out, in k k).
    `parameter`: the one parameter with three axes that holds all of them, the experts of a mixture; None otherwise.
    Where the layers are tasks, names are `task/module` with the number of the task; see `name_in_task`.
    """

    names: tuple[str, ...]
    transposed: bool = False
    parameter: str | None = None
    kernel: tuple[int, ...] = ()

    @classmethod
    def of(cls, keys: Sequence[str], transposed: bool = False, prefix: str = "") -> ModuleNames:
        """The modules of these weights, from their keys in a checkpoint, with `prefix` before every name."""
        return cls(tuple(prefix + key.removesuffix(".weight") for key in keys), transposed)

    @classmethod
    def experts(cls, parameter: str, count: int, transposed: bool = False) -> ModuleNames:
        """The experts of one parameter with three axes, which are its layers: `parameter.0`, `parameter.1`, .."""
        return cls(tuple(f"{parameter}.{i}" for i in range(count)), transposed, parameter)

    @property
    def kind(self) -> str:
        """The part of the names that all layers share: `self_attn.q_proj`.

        It follows the task, or the number of the layer. Without either, it is the name less all of its numbers.
        """
        name = self.names[0] if self.parameter is None else self.parameter
        if "/" in name:
            return name.partition("/")[2]
        if (span := layer_span(name)) is not None:
            return name[span[1] + 1 :]
        return ".".join(part for part in name.split(".") if not part.isdecimal()) or name


def name_in_task(name: str, task: int | None) -> str | None:
    """The name of a module or a key in one task, less the task's number; None if it belongs to another task.

    With `task` None there are no tasks, and the name stays.
    """
    if task is None:
        return name
    match = _IN_TASK.fullmatch(name)
    return (match[1] or "") + match[3] if match is not None and match[2] == str(task) else None


def dense_tensor(modules: ModuleNames, factors: LoraFactors | RasaFactors, i: int) -> tuple[str, Tensor]:
    """The dense update of layer i: the key of the module's weight, and the matrix in the weight's orientation."""
    update = factors.update(i)
    return f"{modules.names[i]}.weight", update.mT if modules.transposed else update
