"""The update of a trained model, and adapters that start from a short fine-tuning or from the first gradient."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import torch

import rasa_theory as rt
from experiments.minilm.encoder import Encoder
from experiments.train_adapters.protocol import Run, Task
from experiments.train_adapters.training import batches, contrastive_loss, train
from rasa_theory import adapter as adapters

TARGETS = ["encoder.layer.*"]
SHORT_RATE = 1e-4
"""Learning rate of the short full fine-tuning."""


def updates(
    encoder: Encoder, plain: dict[str, torch.Tensor], adapter: adapters.Adapter | None
) -> dict[str, torch.Tensor]:
    """Return the update of every adapted layer, by kind, (L, b, a), on the CPU."""
    if adapter is not None:
        return {
            kind: torch.stack([terms.update(i) for i in range(len(terms.targets.names))]).cpu()
            for kind, terms in adapter.terms.items()
        }
    after = encoder.model.state_dict()
    return {kind: torch.stack([after[f"{n}.weight"] - plain[f"{n}.weight"] for n in names]).cpu()
            for kind, names in kinds().items()}  # fmt: skip


@cache
def kinds() -> dict[str, tuple[str, ...]]:
    encoder = Encoder.pretrained()
    adapter = adapters.inject(encoder.model, TARGETS, rt.RankBudget(1, 0))
    return {kind: terms.targets.names for kind, terms in adapter.terms.items()}


def factors_of_data(run: Run, task: Task, device: torch.device) -> dict[str, rt.RasaFactors]:
    """Reconstruct, by kind, the update of a short full fine-tuning, or minus the first gradient, with RaSA.

    The batches are drawn with another seed than the batches of the run itself.
    """
    encoder, settings = Encoder.pretrained().to(device), task.settings
    plain = {name: value.clone() for name, value in encoder.model.state_dict().items()}
    if run.start == "updates":
        steps = settings.short_steps
        short = replace(task, settings=replace(settings, steps=steps, warmup=min(settings.warmup, steps)))
        train(encoder, list(encoder.model.parameters()), short, SHORT_RATE, run.seed + 1000, lambda _: None)
        stacks = updates(encoder, plain, None)
    else:
        torch.manual_seed(run.seed)
        encoder.model.train()
        source = batches(task, run.seed + 1000)
        for _ in range(settings.short_steps):
            contrastive_loss(encoder, next(source), settings).backward()
        weights = dict(encoder.model.named_parameters())
        stacks = {
            kind: -torch.stack([gradient(weights[f"{name}.weight"]) for name in names]).cpu()
            for kind, names in kinds().items()
        }
    budget = rt.RankBudget(run.rank, run.k)
    return {kind: rt.solve_rasa(rt.LayerStack(M.double()), budget).factors.to(torch.float32)
            for kind, M in stacks.items()}  # fmt: skip


def gradient(weight: torch.nn.Parameter) -> torch.Tensor:
    """Return the gradient of a weight that took part in the loss."""
    if weight.grad is None:
        raise ValueError("a weight has no gradient: the loss does not depend on it")
    return weight.grad


@torch.no_grad()
def start_from(terms: adapters.Terms, factors: rt.RasaFactors, with_update: bool) -> None:
    """Set the adapter to reconstructed factors, in the scales of its own initialisation.

    With `with_update` the adapter starts at the update itself, its scale in B. Otherwise it starts at no update, B = 0.
    Both have rows of A as long as Kaiming's initialisation on average, and D as reconstructed, at most as large as the
    initial mixing.
    """
    q = terms.budget.private_rank
    d = terms.mixing[0].clone()  # equal in all layers
    even = factors.evened()
    length = math.sqrt(1 / 3)  # of a row with a entries, uniform in +-1/sqrt(a)
    for i in range(even.layers):
        norms = even.private_A[i].norm(dim=1).clamp_min(1e-30)
        terms.private_A[i].copy_(even.private_A[i] * (length / norms)[:, None])
        if with_update:
            terms.private_B[i].copy_(even.private_B[i] * norms / (length * d[:q]))
        terms.mixing[i][q:] = d[q:] * even.mixing[i]
    norms = even.shared_A.norm(dim=1).clamp_min(1e-30)
    terms.shared_A.copy_(even.shared_A * (length / norms)[:, None])
    if with_update:
        terms.shared_B.copy_(even.shared_B * norms / (length * d[q:]))
