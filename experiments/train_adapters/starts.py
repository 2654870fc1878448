"""The update of a trained model, and adapters that start from a short fine-tuning or from the first gradient."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import torch

import rasa_theory as rt
from experiments.models.encoder import Encoder
from experiments.train_adapters.protocol import Run, Task
from experiments.train_adapters.training import batches, contrastive_loss, train
from rasa_theory.peft import RasaConfig
from rasa_theory.peft.library import PeftModel, get_peft_model

TARGETS = r"encoder\.layer\..*\.(query|key|value|dense)"
"""Every linear layer of the encoder, as a regular expression."""

SHORT_RATE = 1e-4
"""Learning rate of the short full fine-tuning."""


def updates(encoder: Encoder, plain: dict[str, torch.Tensor], adapter: PeftModel | None) -> dict[str, torch.Tensor]:
    """Return the update of every adapted layer, by kind, (L, b, a), on the CPU."""
    if adapter is not None:
        tuner = adapter.base_model
        return {
            pool.name: torch.stack([tuner.layer(name).update("default") for name in pool.modules]).cpu()
            for pool in tuner.pools("default")
        }
    after = encoder.model.state_dict()
    return {kind: torch.stack([after[f"{n}.weight"] - plain[f"{n}.weight"] for n in names]).cpu()
            for kind, names in kinds().items()}  # fmt: skip


def adapted(encoder: Encoder, budget: rt.RankBudget, seed: int) -> PeftModel:
    """Put an adapter of zero update into the encoder, and return the PeftModel around it."""
    config = RasaConfig(r=budget.rank, k=budget.shared_rank, target_modules=TARGETS, seed=seed)
    return get_peft_model(encoder.model, config)


@cache
def kinds() -> dict[str, tuple[str, ...]]:
    encoder = Encoder.pretrained()
    adapter = adapted(encoder, rt.RankBudget(1, 0), 0)
    return {pool.name: pool.modules for pool in adapter.base_model.pools("default")}


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
def start_from(adapter: PeftModel, kind: str, factors: rt.RasaFactors, with_update: bool) -> None:
    """Set the adapter of one kind of module to reconstructed factors, in the scales of its own initialisation.

    With `with_update` the adapter starts at the update itself, its scale in B. Otherwise it starts at no update, B = 0.
    Both have rows of A as long as Kaiming's initialisation on average, and D as reconstructed, at most as large as the
    initial mixing.
    """
    tuner = adapter.base_model
    pool = next(pool for pool in tuner.pools("default") if pool.name == kind)
    layers = [tuner.layer(name) for name in pool.modules]
    q = pool.budget.private_rank
    d = layers[0].rasa_mixing["default"].clone()  # equal in all layers
    even = factors.evened()
    length = math.sqrt(1 / 3)  # of a row with a entries, uniform in +-1/sqrt(a)
    for i, layer in enumerate(layers):
        if q:
            norms = even.private_A[i].norm(dim=1).clamp_min(1e-30)
            layer.rasa_private_A["default"].copy_(even.private_A[i] * (length / norms)[:, None])
            if with_update:
                layer.rasa_private_B["default"].copy_(even.private_B[i] * norms / (length * d[:q]))
        layer.rasa_mixing["default"][q:] = d[q:] * even.mixing[i]
    if (shared := layers[0].shared_of("default")) is not None:
        norms = even.shared_A.norm(dim=1).clamp_min(1e-30)
        shared[1].copy_(even.shared_A * (length / norms)[:, None])
        if with_update:
            shared[0].copy_(even.shared_B * norms / (length * d[q:]))
