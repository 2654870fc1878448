"""A pretrained sentence encoder with its tokenizer."""

from __future__ import annotations

import copy
import importlib.util
import platform
from pathlib import Path
from typing import Any

import torch

from experiments.models.pretrained import MODELS
from rasa_theory.common import InputError


class Encoder:
    """A transformer with its tokenizer: texts -> unit vectors by mean pooling."""

    def __init__(self, model: torch.nn.Module, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    @classmethod
    def from_folder(cls, folder: Path) -> Encoder:
        """Read model and tokenizer. Raises InputError with the remedy if transformers is missing."""
        if importlib.util.find_spec("transformers") is None:
            raise InputError('transformers is missing: pip install -c constraints.txt -e ".[finetune]"')
        from transformers import AutoModel, AutoTokenizer

        model = AutoModel.from_pretrained(folder, local_files_only=True)
        return cls(model, AutoTokenizer.from_pretrained(folder, local_files_only=True))

    @classmethod
    def pretrained(cls, model: str = "minilm") -> Encoder:
        """Read a model of `MODELS`. Raises InputError with the remedy if its packages or transformers are missing."""
        return cls.from_folder(MODELS[model].folder())

    def __call__(self, texts: list[str], max_tokens: int) -> torch.Tensor:
        """(n,) texts -> (n, hidden), rows of unit norm."""
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
        tokens = {name: part.to(self.device) for name, part in tokens.items()}
        hidden = self.model(**tokens).last_hidden_state  # (n, tokens, hidden)
        mask = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    def clone(self) -> Encoder:
        return Encoder(copy.deepcopy(self.model), self.tokenizer)

    def to(self, device: str | torch.device) -> Encoder:
        """Move the weights to a device; returns the same encoder."""
        self.model.to(device)
        return self

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def machine(device: torch.device) -> str:
    """Name the GPU, or the processor with its threads and instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{platform.machine()}, {threads} thread{'s' * (threads > 1)}, {torch.backends.cpu.get_cpu_capability()}"
