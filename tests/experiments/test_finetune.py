"""A two-step run of the experiment that makes the bundled updates, on a tiny random BERT."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import BertConfig, BertModel

from experiments import finetune as experiment
from experiments.models.data import split_by_module, standard_library_pairs
from experiments.models.encoder import Encoder


def letters(texts: list[str], max_length: int, **_: object) -> dict[str, torch.Tensor]:
    """A tokenizer of single bytes."""
    codes = [list(text.encode()[:max_length]) for text in texts]
    width = max(map(len, codes))
    ids = torch.tensor([code + [0] * (width - len(code)) for code in codes])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def tiny() -> Encoder:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=256, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    return Encoder(BertModel(config, add_pooling_layer=False), letters)


def test_two_steps_change_every_kind_and_are_shipped_to_half_precision(tmp_path: Path) -> None:
    settings = replace(experiment.Settings(), train_pairs=40, test_pairs=20, steps=2, batch=4, warmup=1)
    train, test = split_by_module(standard_library_pairs(), settings.split)
    assert (len(train), len(test)) == (40, 20)
    assert {pair.module for pair in train}.isdisjoint(pair.module for pair in test)
    base = tiny()
    tuned = base.clone()
    assert len(experiment.finetune(tuned, train, settings, seed=0)) == 2
    deltas = experiment.updates(base.model, tuned.model)
    assert {kind: tuple(delta.shape) for kind, delta in deltas.items()} == dict.fromkeys(experiment.KINDS, (2, 16, 16))
    assert all(float(delta[i].norm()) > 0 for delta in deltas.values() for i in range(2))
    assert 1 / 20 <= experiment.retrieval(tuned, test, settings)["mrr"] <= 1

    experiment.ship(deltas, {"seed": 0}, tmp_path, "minilm_code")
    assert json.loads((tmp_path / "minilm_code.json").read_text(encoding="utf-8")) == {"seed": 0}
    with safe_open(tmp_path / "minilm_code.safetensors", "pt") as file:
        for kind, delta in deltas.items():
            scale = 2.0 ** -int(file.metadata()[f"{kind}.log2_scale"])
            shipped = file.get_tensor(kind).double() * scale
            assert float((shipped - delta.double()).abs().max()) <= 2.0**-11 * float(delta.abs().max())


def test_the_same_seed_gives_the_same_losses() -> None:
    settings = replace(experiment.Settings(), train_pairs=40, test_pairs=20, steps=2, batch=4, warmup=1)
    train, _ = split_by_module(standard_library_pairs(), settings.split)
    first, second = (experiment.finetune(tiny(), train, settings, seed=3) for _ in range(2))
    assert first == second
