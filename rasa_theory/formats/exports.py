"""Factors -> the files that other tools load: PEFT's LoRA, the adapter layout of RaSA's authors, dense differences.

A layer's update is (b, a) = (out, in), as the weight of a Linear; `Modules` says which modules of the model they are.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from rasa_theory.common.errors import InputError
from rasa_theory.formats.safetensors import read_header
from rasa_theory.problem.factors import LoraFactors, RasaFactors, balanced
from rasa_theory.sources.grouping import LAYER_WORDS

FORMATS = ("lora", "lora-exact-rasa", "rasa", "diff")
_PEFT = "base_model.model."
_COPIED = 1 << 24  # bytes at a time
_STORED = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Modules:
    """The modules of a model whose updates a stack holds, one per layer in order.

    `names` are the keys of their weights less ".weight"; `transposed` if those weights are (in, out), as in a Conv1D.
    Where layers are tasks, names are `task/module`, task a number; see `of_task`.
    """

    names: tuple[str, ...]
    transposed: bool = False

    @classmethod
    def of(cls, keys: Sequence[str], transposed: bool = False, prefix: str = "") -> Modules:
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


def lora_tensors(modules: Modules, factors: LoraFactors, ranks: Sequence[int] | None = None) -> dict[str, Tensor]:
    """PEFT's LoRA weights of every module, its leading `ranks[i]` terms (all of them if None); none for rank 0."""
    tensors = {}
    for i, name in enumerate(modules.names):
        rank = factors.B.shape[2] if ranks is None else ranks[i]
        if rank == 0:
            continue
        B, A = balanced(factors.B[i, :, :rank], factors.A[i, :rank])
        tensors[f"{_PEFT}{name}.lora_A.weight"] = A
        tensors[f"{_PEFT}{name}.lora_B.weight"] = B
    return tensors


def rasa_tensors(modules: Modules, factors: RasaFactors) -> dict[str, Tensor]:
    """The authors' adapter with these updates: `evened` factors, private terms with the mixing 1."""
    even = factors.evened()
    mixing = torch.cat([even.mixing.new_ones(even.layers, even.private_A.shape[1]), even.mixing], 1)
    return rasa_layout(modules, even.private_B, even.private_A, mixing, even.shared_B, even.shared_A)


def rasa_layout(
    modules: Modules,
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
        tensors[f"{_PEFT}{name}.rasa_A.weight"] = At
        tensors[f"{_PEFT}{name}.rasa_B.weight"] = Bt
        tensors[f"{_PEFT}{name}.rasa_mixing.weight"] = d
    return tensors


def dense_tensor(modules: Modules, factors: LoraFactors | RasaFactors, i: int) -> tuple[str, Tensor]:
    """The update of layer i itself, by the key and in the orientation of the weight."""
    update = factors.update(i)
    return f"{modules.names[i]}.weight", update.mT if modules.transposed else update


def lora_config(ranks: dict[str, int], transposed: bool, base: str | None) -> dict[str, Any]:
    """PEFT's adapter_config.json for modules of these ranks; the scaling alpha / r is 1 everywhere.

    Keys of a pattern are regular expressions that PEFT lets match the end of a name: anchored, they match one module.
    """
    counts = list(ranks.values())
    common = max(set(counts), key=lambda rank: (counts.count(rank), rank))
    others = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != common}
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "task_type": None,
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": list(ranks),
        "fan_in_fan_out": transposed,
        "bias": "none",
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "use_rslora": False,
    }


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


def of_task(name: str, task: int | None) -> str | None:
    """The key or module of one task, without its number; None for another task's. None for `task`: the name itself."""
    if task is None:
        return name
    found = re.fullmatch(rf"(base_model\.model\.)?{task}/(.+)", name)
    return (found[1] or "") + found[2] if found else None


def write_safetensors(tensors: Mapping[str, Tensor], out: IO[bytes], metadata: dict[str, str]) -> None:
    """A safetensors file of `tensors`, written one by one, so that no second copy of all of them is made."""
    header = _Header(metadata)
    for key, tensor in tensors.items():
        header.add(key, _STORED[tensor.dtype], list(tensor.shape), tensor.nbytes)
    out.write(header.encoded())
    for tensor in tensors.values():
        bits = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor  # which numpy does not know
        out.write(np.ascontiguousarray(bits.numpy()).data)


def join_safetensors(parts: Sequence[Path], out: IO[bytes], metadata: dict[str, str], task: int | None = None) -> None:
    """All tensors of `parts`, or those of one task, as one safetensors file, copied piece by piece.

    Raises InputError if two parts hold a tensor of the same name.
    """
    header = _Header(metadata)
    pieces: list[tuple[Path, int, int]] = []  # part, first byte, how many
    for part in parts:
        for key, stored in read_header(part).tensors.items():
            if (name := of_task(key, task)) is None:
                continue
            if name in header.entries:
                raise InputError(f"two stacks would write the tensor {name!r}; keep one of them with --modules")
            header.add(name, stored.dtype, stored.shape, stored.size)
            pieces.append((part, stored.offset, stored.size))
    out.write(header.encoded())
    for part, first, size in pieces:
        with part.open("rb") as file:
            file.seek(first)
            while size > 0:
                size -= out.write(file.read(min(size, _COPIED)))


class _Header:
    """The beginning of a safetensors file whose tensors follow in the order in which they are added."""

    def __init__(self, metadata: dict[str, str]) -> None:
        self.entries: dict[str, Any] = {"__metadata__": metadata}
        self._offset = 0

    def add(self, key: str, dtype: str, shape: Sequence[int], size: int) -> None:
        offsets = [self._offset, self._offset + size]
        self.entries[key] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        self._offset += size

    def encoded(self) -> bytes:
        """With its length before it, padded to a multiple of 8 bytes."""
        text = json.dumps(self.entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text
