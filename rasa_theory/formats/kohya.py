"""LoRA in one file, as kohya's sd-scripts write it and ComfyUI and diffusers read it: keys, tensors and metadata.

The update of a module is up @ down alpha / r, with down (r, in), up (out, r) and a scalar alpha. A convolution
(out, in, k, k) has down (r, in, k, k) and up (out, r, 1, 1), whose product is its weight as a matrix (out, in k k).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rasa_theory.formats.names import ModuleNames
from rasa_theory.formats.spellings import kohya_name
from rasa_theory.formats.tensors import padded_with_zeros
from rasa_theory.problem import LoraFactors, balanced

KOHYA_FILE = "lora.safetensors"

_DOWN, _UP, _ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"
_TEXT_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel")


def kohya_prefix(architecture: str | None) -> str:
    """The beginning of all keys: `lora_te_` for a text encoder, `lora_unet_` for a UNet or a diffusion transformer."""
    return "lora_te_" if architecture in _TEXT_ENCODERS else "lora_unet_"


def kohya_tensors(
    modules: ModuleNames, factors: LoraFactors, ranks: Sequence[int], prefix: str = "lora_unet_"
) -> dict[str, Tensor]:
    """The factors of every module by key, the leading `ranks[i]` terms, and alpha = r; none for a module of rank 0."""
    tensors = {}
    for i, (name, rank) in enumerate(zip(modules.names, ranks, strict=True)):
        if rank == 0:
            continue
        B, A = balanced(factors.B[i, :, :rank], factors.A[i, :rank])
        module = kohya_name(name, prefix)
        if modules.kernel:
            tensors[module + _DOWN] = A.reshape(rank, -1, *modules.kernel)
            tensors[module + _UP] = B.reshape(*B.shape, *(1 for _ in modules.kernel))
        else:
            tensors[module + _DOWN] = A
            tensors[module + _UP] = B
        tensors[module + _ALPHA] = torch.tensor(float(rank), dtype=torch.float32)
    return tensors


def kohya_factors(
    modules: ModuleNames, tensors: Mapping[str, Tensor], shape: tuple[int, int], prefix: str = "lora_unet_"
) -> LoraFactors:
    """The factors of a file in float64, B (L, b, r) times alpha / r and A (L, r, a), r the largest rank.

    Modules of less rank, or without tensors, are filled up with zeros. `shape` is (b, a).
    """
    (b, a), L = shape, len(modules.names)
    parts = [kohya_name(name, prefix) for name in modules.names]
    r = max((len(tensors[part + _DOWN]) for part in parts if part + _DOWN in tensors), default=0)
    B, A = torch.zeros(L, b, r, dtype=torch.float64), torch.zeros(L, r, a, dtype=torch.float64)
    for i, part in enumerate(parts):
        if part + _DOWN in tensors:
            down, up = tensors[part + _DOWN].double().flatten(1), tensors[part + _UP].double().flatten(1)
            rank = len(down)
            B[i, :, :rank], A[i, :rank] = up * (float(tensors[part + _ALPHA]) / rank), down
    return LoraFactors(B, A)


def kohya_metadata(ranks: Sequence[int], base: str | None) -> dict[str, str]:
    """The metadata of the file for modules of these ranks: rank and alpha as sd-scripts name them."""
    dim = str(ranks[0]) if len(set(ranks)) == 1 else "Dynamic"
    names = {"ss_network_module": "networks.lora", "ss_network_dim": dim, "ss_network_alpha": dim}
    return {"format": "pt", **names, **({} if base is None else {"ss_sd_model_name": base})}


@dataclass(frozen=True)
class KohyaFile:
    """The `Finish` of such a file: factors padded with zeros to `rank`, and alpha = r; with None they stay."""

    rank: int | None

    def key(self, key: str) -> str:
        return key

    def tensor(self, key: str, tensor: Tensor) -> Tensor:
        if self.rank is None:
            return tensor
        if key.endswith(_ALPHA):
            return torch.full_like(tensor, self.rank)
        return padded_with_zeros(tensor, 0 if key.endswith(_DOWN) else 1, self.rank)
