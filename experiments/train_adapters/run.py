"""One run from start to end, the protocol over all runs, and the command."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import itertools
import math
import multiprocessing
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import rasa_theory as rt
from experiments.models.data import TASKS
from experiments.models.encoder import Encoder, machine
from experiments.support.command import refuses_bad_input
from experiments.support.rows import Row, append_rows, read_rows
from experiments.train_adapters import __doc__ as description
from experiments.train_adapters.protocol import PROSE_PACKAGES, Data, Run, Settings, Task, best_rate
from experiments.train_adapters.starts import adapted, factors_of_data, kinds, start_from, updates
from experiments.train_adapters.training import look, retrieval, train
from rasa_theory.common import InputError
from rasa_theory.distributed import end_with_parent
from rasa_theory.peft import save_as_lora
from rasa_theory.peft.library import PeftModel
from rasa_theory.problem import compute_device

GRID = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
TUNING_SEED = 100
"""The first of the seeds that rates are chosen on."""
BUDGETS = ((2, 1), (8, 1), (8, 4))
"""Budgets of the reconstructions of full updates."""


def prepared(encoder: Encoder, run: Run, task: Task) -> tuple[list[torch.nn.Parameter], PeftModel | None]:
    """Return the parameters that a run trains, and the adapter that holds them (None for full fine-tuning)."""
    if run.method == "full":
        return list(encoder.model.parameters()), None
    budget = rt.RankBudget(run.rank, run.k)
    factors = None if run.start == "zero" else factors_of_data(run, task, encoder.device)
    adapter = adapted(encoder, budget, run.seed)
    if factors is not None:
        for kind, one in factors.items():
            start_from(adapter, kind, one.to(torch.float32, encoder.device), run.start == "updates")
    return [p for p in adapter.parameters() if p.requires_grad], adapter


def execute(run: Run, task: Task, device: str, tuning: bool, keep: Path | None = None) -> dict[str, Any]:
    """Do one run from start to end; in tuning, validation at the end is the only measurement."""
    started, settings = time.perf_counter(), task.settings
    encoder = Encoder.pretrained().to(device)
    row: dict[str, Any] = {"name": run.name, "run": asdict(run), "tuning": tuning, "settings": asdict(settings)}
    before: dict[str, torch.Tensor] = {}
    row["looks"] = [] if tuning else [{"step": 0} | look(encoder, task, before)]
    plain = {name: value.clone() for name, value in encoder.model.state_dict().items()} if run.method == "full" else {}
    parameters, adapter = prepared(encoder, run, task)
    if row["looks"] and run.start == "updates":  # which starts at another model than the one before
        row["looks"] = [{"step": 0} | look(encoder, task, before)]

    def watch(step: int) -> None:
        if step == settings.steps or (not tuning and step % settings.every == 0):
            row["looks"].append({"step": step} | look(encoder, task, before))

    row["losses"] = train(encoder, parameters, task, run.learning_rate, run.seed, watch)
    row["trained_parameters"] = sum(p.numel() for p in parameters)
    if not tuning:
        encoder.model.eval()
        row["test_mrr"] = retrieval(encoder, task.data.test, settings)
        stacks = updates(encoder, plain, adapter)
        row["updates"] = {kind: about(stack) for kind, stack in stacks.items()}
        if run.method == "full":
            start = "best" if settings.steps > 10 else "allocation"  # for function only, without a search
            row["reconstruction"] = {
                f"{r},{k}": {kind: reconstruction(stack, r, k, start) for kind, stack in stacks.items()}
                for r, k in BUDGETS
            }
        elif adapter is not None and keep is not None:
            keep_half(adapter, keep / run.folder(settings.task))
    return row | {
        "seconds": round(time.perf_counter() - started, 1),
        "machine": machine(encoder.device),
        "python_of_the_data": task.data.python,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
    }


def keep_half(adapter: PeftModel, folder: Path) -> None:
    """Write the adapter for PEFT in half precision, which takes half the room."""
    file = save_as_lora(folder, adapter) / "adapter_model.safetensors"
    save_file({name: value.half() for name, value in load_file(file).items()}, file, {"format": "pt"})


def about(stack: torch.Tensor) -> dict[str, Any]:
    """Norms and leading singular values of every layer."""
    sigma = torch.linalg.svdvals(stack.double())[:, :32]
    return {
        "norms": [float(f"{x:.4g}") for x in torch.linalg.vector_norm(stack, dim=(1, 2))],
        "sigma": [[float(f"{x:.4g}") for x in row if x > 1e-6 * row[0]] for row in sigma],
    }


def reconstruction(stack: torch.Tensor, rank: int, k: int, start: str = "best") -> dict[str, float]:
    """Squared errors of LoRA and RaSA of a budget on the full update, over its energy."""
    M = rt.LayerStack(stack.double())
    lora, rasa = rt.solve_lora(M, rank), rt.solve_rasa(M, rt.RankBudget(rank, k), rt.SolverOptions(start=start))
    total = M.norm_squared
    return {"e_lora": lora.error / total, "e_rasa": rasa.error / total}


# ---------------------------------------------------------------------------------------------- the protocol


def methods(rank: int, data_starts: bool) -> list[Run]:
    """Return the compared methods at rank r, each as a run without rate and seed."""
    layers = len(next(iter(kinds().values())))
    shared = sorted({1, max(1, rank // 2)})
    if data_starts:
        budgets = [("lora", 0), *(("rasa", k) for k in shared)]
        return [Run(method, rank, k, 0.0, 0, start) for method, k in budgets for start in ("gradient", "updates")]
    full = [Run("full", 0, 0, 0.0, 0)]
    rasa = [Run("rasa", rank, k, 0.0, 0) for k in shared]
    wide = [Run("lora", rank - k + layers * k, 0, 0.0, 0) for k in shared]
    return [*full, Run("lora", rank, 0, 0.0, 0), *rasa, *wide]


def named(runs: Sequence[Run], only: Sequence[str] | None) -> list[Run]:
    """Return the runs of these names, or all of them. Raises InputError for a name that no run has."""
    names = [run.name for run in runs]
    if unknown := [name for name in only or [] if name not in names]:
        raise InputError(f"--only {unknown[0]!r} is none of {', '.join(names)}")
    return [run for run in runs if not only or run.name in only]


class Runs:
    """The finished runs of some settings in a file of JSON lines."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path = path
        self.rows = [row for row in read_rows(path) if row["settings"] == asdict(settings)]

    def find(self, run: Run, tuning: bool) -> Row | None:
        return next((row for row in self.rows if row["run"] == asdict(run) and row["tuning"] == tuning), None)

    def get(self, run: Run, tuning: bool) -> Row:
        """The row of a finished run. Raises LookupError if it is missing."""
        if (row := self.find(run, tuning)) is None:
            raise LookupError(f"{self.path} has no row of {run}")
        return row

    def add(self, row: Row) -> None:
        self.rows.append(row)
        append_rows(self.path, [row])


def perform(
    runs: Sequence[Run], tuning: bool, rows: Runs, task: Task, device: str, jobs: int, keep: Path | None
) -> None:
    """Do the missing runs, one process per job; a finished run is written at once."""
    missing = [run for run in runs if rows.find(run, tuning) is None]
    if not missing:
        return
    tasks = [(run, task, device, tuning, keep) for run in missing]
    started = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(min(jobs, len(tasks)), end_with_parent, maxtasksperchild=12) as pool:
        for n, row in enumerate(pool.imap_unordered(_execute, tasks)):
            rows.add(row)
            left = (time.perf_counter() - started) / (n + 1) * (len(tasks) - n - 1)
            mrr = row["looks"][-1]["validation_mrr"]
            title = f"{row['name']} rate {row['run']['learning_rate']:g} seed {row['run']['seed']}"
            print(
                f"{title}: validation MRR {mrr:.4f}, {row['seconds']} s; "
                f"{len(tasks) - n - 1} runs, {left / 60:.0f} min left",
                flush=True,
            )


def _execute(arguments: tuple[Run, Task, str, bool, Path | None]) -> dict[str, Any]:
    torch.set_num_threads(1)
    return execute(*arguments)


def trials(run: Run, rates: Sequence[float], seeds: int) -> list[Run]:
    """Return the runs that choose the learning rate of a method."""
    return [replace(run, learning_rate=rate, seed=TUNING_SEED + n) for rate in rates for n in range(seeds)]


def check(args: argparse.Namespace) -> None:
    """Raise InputError for numbers that no run can have, and for a file that cannot take its rows."""
    for flag in ("rank", "seeds", "tuning_seeds", "jobs"):
        if (value := getattr(args, flag)) < 1:
            raise InputError(f"--{flag.replace('_', '-')} must be at least 1, not {value}")
    for flag, rates in (("rates", args.rates), ("at-rate", [] if args.at_rate is None else [args.at_rate])):
        if wrong := [rate for rate in rates if not 0 < rate < math.inf]:
            raise InputError(f"--{flag} must be positive and finite, not {wrong[0]:g}")
        if len(set(rates)) < len(rates):
            raise InputError(f"--{flag} names a rate twice: {' '.join(f'{rate:g}' for rate in rates)}")
    if args.out.suffix != ".jsonl" or args.out.is_dir():
        raise InputError(f"--out {args.out} must be a .jsonl file, such as {args.out / 'train_adapters.jsonl'}")


@refuses_bad_input
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(description).split("\n")[0])
    parser.add_argument("--rank", type=int, default=2, help="r of LoRA and RaSA")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each method at its learning rate")
    parser.add_argument("--data-starts", action="store_true", help="the starts from data, in place of the methods")
    parser.add_argument("--rates", type=float, nargs="+", default=GRID, help="learning rates to choose from")
    parser.add_argument(
        "--tuning-seeds", type=int, default=1, help="tuning runs at each rate; the best mean validation MRR wins"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these methods alone, such as 'rasa(2,1)'")
    parser.add_argument("--at-rate", type=float, help="run the seeds at this rate, and tune nothing")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes, of one thread each")
    parser.add_argument("--out", type=Path, default=Path("figures/train_adapters.jsonl"))
    parser.add_argument("--keep", type=Path, help="folder for the trained adapters, as PEFT LoRA in half precision")
    parser.add_argument("--task", choices=sorted(TASKS), default=Settings.task, help="what is to be learned")
    parser.add_argument("--data", type=Path, help="folder for the pairs, to train on the same ones elsewhere")
    parser.add_argument("--device", default="auto", help="cuda, which the processes share, or cpu")
    parser.add_argument("--float32", action="store_true", help="no bfloat16 in training and validation")
    parser.add_argument("--smoke", action="store_true", help="three steps of each method on few pairs")
    args = parser.parse_args(arguments)
    if missing := [name for name in PROSE_PACKAGES if importlib.util.find_spec(name) is None]:
        raise InputError(f"{', '.join(missing)} is missing: pip install -c constraints.txt -e '.[finetune]'")
    check(args)
    compared, device = named(methods(args.rank, args.data_starts), args.only), str(compute_device(args.device))
    settings, rates = Settings(task=args.task, bfloat16=not args.float32), args.rates
    if args.smoke:
        settings = replace(settings, steps=3, batch=4, warmup=1, validation_pairs=20, test_pairs=20, prose_pairs=8,
                           every=3, short_steps=1)  # fmt: skip
        rates = GRID[:1]
    task = Task(settings, Data.collected(settings, args.data))

    def rates_of(run: Run) -> Sequence[float]:
        return GRID if run.method == "full" else rates  # its best one is far from the adapters'

    rows = Runs(args.out, settings)
    at_rate = rates[0] if args.smoke else args.at_rate
    chosen = {run.name: at_rate for run in compared}
    if at_rate is None:
        tried = {run.name: trials(run, rates_of(run), args.tuning_seeds) for run in compared}
        perform(list(itertools.chain(*tried.values())), True, rows, task, device, args.jobs, None)
        chosen = {name: best_rate(rows.get(run, True) for run in runs) for name, runs in tried.items()}
    final = [
        replace(run, learning_rate=chosen[run.name], seed=seed)
        for seed in range(1 if args.smoke else args.seeds)
        for run in compared
    ]
    keep = args.keep if args.at_rate is None else None
    perform(final, False, rows, task, device, args.jobs, keep)


if __name__ == "__main__":
    main()
