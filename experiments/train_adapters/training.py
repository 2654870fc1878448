"""The measures of a model, and one training run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from experiments.models.data import Pair
from experiments.models.encoder import Encoder
from experiments.models.training import info_nce, ranks, rate_at, shuffled_batches
from experiments.train_adapters.protocol import Settings, Task


@torch.no_grad()
def embedded(encoder: Encoder, texts: Sequence[str], tokens: int) -> torch.Tensor:
    """(n,) texts -> (n, hidden) unit vectors, float32; texts of similar length share a batch."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    out: dict[int, torch.Tensor] = {}
    for first in range(0, len(order), 32):
        part = order[first : first + 32]
        out |= dict(zip(part, encoder([texts[i] for i in part], tokens).float(), strict=True))
    return torch.stack([out[i] for i in range(len(texts))])


def mrr(queries: torch.Tensor, answers: torch.Tensor) -> float:
    """Mean reciprocal rank of answer i among all answers to query i."""
    with torch.autocast(queries.device.type, enabled=False):  # bfloat16 would make ties
        return float((1 / ranks(queries, answers).double()).mean())


def retrieval(encoder: Encoder, pairs: list[Pair], settings: Settings) -> float:
    return mrr(
        embedded(encoder, [p.docstring for p in pairs], settings.query_tokens),
        embedded(encoder, [p.body for p in pairs], settings.code_tokens),
    )


def look(encoder: Encoder, task: Task, before: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Measure validation MRR, and for each kind of prose its MRR and the drift of its embeddings.

    `before` holds the embeddings before training; where it is empty, it is filled.
    """
    encoder.model.eval()
    settings = task.settings
    measured: dict[str, Any] = {"drift": {}, "prose_mrr": {}}
    with torch.autocast(encoder.device.type, torch.bfloat16, enabled=settings.bfloat16):
        measured["validation_mrr"] = retrieval(encoder, task.data.validation, settings)
        for kind, pairs in task.data.prose.items():
            both = embedded(encoder, [s for pair in pairs for s in pair], settings.prose_tokens)
            before.setdefault(kind, both)
            measured["prose_mrr"][kind] = mrr(both[::2], both[1::2])
            measured["drift"][kind] = 1 - float((both * before[kind]).sum(1).mean())
    encoder.model.train()
    return measured


def batches(task: Task, seed: int) -> Iterator[list[Pair]]:
    """Yield batches without end, the same for every method."""
    return shuffled_batches(task.data.train, task.settings.batch, seed)


def contrastive_loss(encoder: Encoder, batch: list[Pair], settings: Settings) -> torch.Tensor:
    with torch.autocast(encoder.device.type, torch.bfloat16, enabled=settings.bfloat16):
        q = encoder([p.docstring for p in batch], settings.query_tokens)
        c = encoder([p.body for p in batch], settings.code_tokens)
    return info_nce(q.float(), c.float(), settings.temperature)


def train(
    encoder: Encoder,
    parameters: list[torch.nn.Parameter],
    task: Task,
    learning_rate: float,
    seed: int,
    watch: Callable[[int], None],
) -> list[float]:
    """Train by AdamW with warm-up and linear decay, gradients clipped to norm 1; returns the loss of each step.

    `watch` is called with the number of steps after each of them.
    """
    settings = task.settings
    torch.manual_seed(seed)  # dropout
    optimiser = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    encoder.model.train()
    source = batches(task, seed)
    losses: list[float] = []
    for step in range(settings.steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * rate_at(step, settings.steps, settings.warmup)
        loss = contrastive_loss(encoder, next(source), settings)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        losses.append(round(float(loss.detach()), 4))
        watch(step + 1)
    return losses
