"""Does RaSA learn more and faster than LoRA at equal parameters, and does it forget less? all-MiniLM-L6-v2, trained.

    python -m experiments.train_adapters --float32 --rank 2                       the full protocol
    python -m experiments.train_adapters --float32 --rank 2 --only 'rasa(2,1)' 'lora(2)' --at-rate 1e-3
    python -m experiments.train_adapters --float32 --rank 8 --rates 3e-4 1e-3 3e-3
    python -m experiments.train_adapters --device cpu --rank 2 --data-starts --rates 3e-4 1e-3 3e-3 \\
        --out figures/train_adapters_cpu.jsonl                                    starts from data
    python -m experiments.train_adapters --device cpu --rank 8 --only 'rasa(8,1)' 'lora(8)' --at-rate 1e-3 \\
        --out figures/train_adapters_cpu.jsonl
    python -m experiments.train_adapters --float32 --task prose --rank 8 --only 'lora(8)' --rates 3e-4 1e-3 3e-3 \\
        --keep experiments/trained --out figures/train_adapters_prose.jsonl       adapters of a second task
    python -m experiments.train_adapters --smoke                      three steps of each method, for function only

Runs on a GPU and on CPUs draw other dropout masks, so that those of one file are to be from one kind of machine:
`train_adapters.jsonl` is from a GPU in float32, `train_adapters_cpu.jsonl` from CPUs with bfloat16 in training.

The task is that of the bundled updates (`finetune_minilm.py`): to find Python functions by their docstrings, InfoNCE
over a batch; training, validation and test pairs come from disjoint modules. Methods: full fine-tuning, LoRA of rank
r, RaSA (r, k), and LoRA of rank q + R, the most that RaSA's updates can express. All linear layers of the encoder are
adapted; adapters are `rasa_theory.adapter`, LoRA is its k = 0. Each method first takes one run at every learning rate
of one grid; the one with the best validation MRR is used for the seeds. Runs of one seed see the same batches and the
same dropout masks. Every finished run is a line of --out, and is not run again.

What a model was good at before: prose from Python's language reference and from the descriptions and licences of
installed packages; the task is to find, for a sentence, the one that follows it. Drift: one minus the mean cosine
between the embeddings of these sentences before and after.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread and one process per processor, see --jobs

import torch
from safetensors.torch import load_file, save_file

import rasa_theory as rt
from experiments.minilm.data import TASKS, Pair, Split, cached, pairs_of, split_by_module
from experiments.minilm.encoder import Encoder, bundled_checkpoint, machine
from experiments.minilm.sentences import consecutive
from experiments.minilm.training import info_nce, ranks, rate_at, shuffled_batches
from rasa_theory import adapter as adapters
from rasa_theory.problem import compute_device

TARGETS = ["encoder.layer.*"]
GRID = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
SHORT_RATE = 1e-4  # of the short full fine-tuning before the starts from data
TUNING_SEED = 100
BUDGETS = ((2, 1), (8, 1), (8, 4))  # of the reconstructions of full updates
PROSE_PACKAGES = ("numpy", "scipy", "torch", "transformers", "matplotlib", "safetensors", "tqdm")


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run, apart from the run itself."""

    steps: int = 200
    batch: int = 16
    warmup: int = 20
    temperature: float = 0.05
    query_tokens: int = 32
    code_tokens: int = 64
    prose_tokens: int = 48
    train_pairs: int = 3600
    validation_pairs: int = 400
    test_pairs: int = 600
    prose_pairs: int = 160  # of each of the two kinds
    task: str = "code"  # of `finetune_minilm.TASKS`
    every: int = 50  # steps between two looks at validation and prose
    bfloat16: bool = True  # autocast in training and at those looks; the test at the end is in float32
    short_steps: int = 30  # of full fine-tuning, and batches of the gradient, for the starts from data


@dataclass(frozen=True)
class Run:
    """One training run. `start`: zero, or for adapters from data `gradient` or `updates`."""

    method: str  # full, lora, rasa
    rank: int
    k: int
    learning_rate: float
    seed: int
    start: str = "zero"

    @property
    def name(self) -> str:
        if self.method == "full":
            return "full"
        budget = f"rasa({self.rank},{self.k})" if self.method == "rasa" else f"lora({self.rank})"
        return budget if self.start == "zero" else f"{budget} from {self.start}"

    def folder(self, task: str) -> str:
        """Where the trained adapter goes, such as lora-2-seed-0, or lora-2-prose-seed-0 for that task."""
        parts = [self.method, str(self.rank), str(self.k) if self.k else "", "" if task == "code" else task]
        return "-".join([*filter(None, parts), "seed", str(self.seed)])


# ---------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Data:
    """Pairs for the task, from disjoint modules, and pairs of sentences that follow one another."""

    train: list[Pair]
    validation: list[Pair]
    test: list[Pair]
    prose: dict[str, list[tuple[str, str]]]
    python: str  # the version whose standard library this is

    @classmethod
    def collected(cls, settings: Settings, folder: Path | None) -> Data:
        """From what is installed here, or was where `folder` was filled, see `finetune_minilm.kept`."""
        held = settings.test_pairs + settings.validation_pairs
        split = Split(settings.train_pairs, held)
        train, held_out = split_by_module(pairs_of(settings.task, folder), split)
        test = held_out[: settings.test_pairs]
        tested = {pair.module for pair in test}
        validation = [pair for pair in held_out[settings.test_pairs :] if pair.module not in tested]
        prose = {
            kind: _some(cached(folder, f"prose-{kind}", collect), settings.prose_pairs)
            for kind, collect in (("reference", _reference), ("packages", _package_texts))
        }
        return cls(train, validation, test, prose, cached(folder, "python", platform.python_version))


@dataclass(frozen=True)
class Task:
    """What is to be learned, and how."""

    settings: Settings
    data: Data


def _some(pairs: Sequence[tuple[str, str]], number: int) -> list[tuple[str, str]]:
    ordered = sorted(pairs, key=lambda pair: hashlib.sha256("".join(pair).encode()).hexdigest())
    return [(before, after) for before, after in ordered[:number]]


def _reference() -> list[tuple[str, str]]:
    from pydoc_data.topics import topics

    return sorted({pair for text in topics.values() for pair in consecutive(text)})


def _package_texts() -> list[tuple[str, str]]:
    found: set[tuple[str, str]] = set()
    for package in PROSE_PACKAGES:
        for file in importlib.metadata.distribution(package).files or []:
            if re.search(r"METADATA|LICEN[CS]E|NOTICE|COPYING|\.md$|\.rst$", file.name):
                try:
                    found.update(consecutive(Path(str(file.locate())).read_text(encoding="utf-8")))
                except (OSError, UnicodeDecodeError):
                    continue
    return sorted(found)


# ------------------------------------------------------------------------------------------------ measures


@torch.no_grad()
def embedded(encoder: Encoder, texts: Sequence[str], tokens: int) -> torch.Tensor:
    """(n,) texts -> (n, hidden) unit vectors, float32; texts of like length go together."""
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
    """Validation MRR, and what is left of before: MRR on each kind of prose, and the drift of its embeddings.

    Fills `before` with the embeddings if it is empty.
    """
    encoder.model.eval()
    settings = task.settings
    found: dict[str, Any] = {"drift": {}, "prose_mrr": {}}
    with torch.autocast(encoder.device.type, torch.bfloat16, enabled=settings.bfloat16):
        found["validation_mrr"] = retrieval(encoder, task.data.validation, settings)
        for kind, pairs in task.data.prose.items():
            both = embedded(encoder, [s for pair in pairs for s in pair], settings.prose_tokens)
            before.setdefault(kind, both)
            found["prose_mrr"][kind] = mrr(both[::2], both[1::2])
            found["drift"][kind] = 1 - float((both * before[kind]).sum(1).mean())
    encoder.model.train()
    return found


# ------------------------------------------------------------------------------------------------ training


def batches(task: Task, seed: int) -> Iterator[list[Pair]]:
    """Batches without end, the same for every method."""
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
    """AdamW with warm-up and linear decay, gradients of norm at most 1; the loss of each step. `watch`(steps done)."""
    settings = task.settings
    torch.manual_seed(seed)  # dropout
    optimiser = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    encoder.model.train()
    source, losses = batches(task, seed), []
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


def prepared(encoder: Encoder, run: Run, task: Task) -> tuple[list[torch.nn.Parameter], adapters.Adapter | None]:
    """The parameters that a run trains, and the adapter that they belong to."""
    if run.method == "full":
        return list(encoder.model.parameters()), None
    budget = rt.RankBudget(run.rank, run.k)
    factors = None if run.start == "zero" else factors_of_data(run, task, encoder.device)
    adapter = adapters.inject(encoder.model, TARGETS, budget, seed=run.seed)
    if factors is not None:
        for kind, terms in adapter.terms.items():
            start_from(terms, factors[kind].to(torch.float32, encoder.device), run.start == "updates")
    return [p for p in adapter.parameters() if p.requires_grad], adapter


def execute(run: Run, task: Task, device: str, tuning: bool, keep: Path | None = None) -> dict[str, Any]:
    """One run from start to end; in tuning, validation at the end is all that is measured."""
    started, settings = time.perf_counter(), task.settings
    encoder = Encoder.from_folder(bundled_checkpoint()).to(device)
    row: dict[str, Any] = {"name": run.name, "run": asdict(run), "tuning": tuning, "settings": asdict(settings)}
    before: dict[str, torch.Tensor] = {}
    row["looks"] = [] if tuning else [{"step": 0} | look(encoder, task, before)]
    plain = {name: value.clone() for name, value in encoder.model.state_dict().items()} if run.method == "full" else {}
    parameters, adapter = prepared(encoder, run, task)
    if row["looks"] and run.start == "updates":  # which begins elsewhere than the model before
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
            start = "best" if settings.steps > 10 else "allocation"  # for function only, without a race
            row["reconstruction"] = {
                f"{r},{k}": {kind: reconstruction(stack, r, k, start) for kind, stack in stacks.items()}
                for r, k in BUDGETS
            }
        elif keep is not None:
            keep_half(adapter, keep / run.folder(settings.task))
    return row | {
        "seconds": round(time.perf_counter() - started, 1),
        "machine": machine(encoder.device),
        "python_of_the_data": task.data.python,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
    }


def keep_half(adapter: adapters.Adapter, folder: Path) -> None:
    """The adapter for PEFT, in half precision, which takes half the room."""
    file = adapters.save(adapter, folder, format="lora-exact-rasa") / "adapter_model.safetensors"
    save_file({name: value.half() for name, value in load_file(file).items()}, file, {"format": "pt"})


# ----------------------------------------------------------------------------------- updates and starts from data


def updates(
    encoder: Encoder, plain: dict[str, torch.Tensor], adapter: adapters.Adapter | None
) -> dict[str, torch.Tensor]:
    """The update of every adapted layer, by kind, (L, b, a), on the CPU."""
    if adapter is not None:
        return {
            kind: torch.stack([terms.update(i) for i in range(len(terms.targets.names))]).cpu()
            for kind, terms in adapter.terms.items()
        }
    after = encoder.model.state_dict()
    return {kind: torch.stack([after[f"{n}.weight"] - plain[f"{n}.weight"] for n in names]).cpu()
            for kind, names in _kinds().items()}  # fmt: skip


@cache
def _kinds() -> dict[str, tuple[str, ...]]:
    encoder = Encoder.from_folder(bundled_checkpoint())
    adapter = adapters.inject(encoder.model, TARGETS, rt.RankBudget(1, 0))
    return {kind: terms.targets.names for kind, terms in adapter.terms.items()}


def about(stack: torch.Tensor) -> dict[str, Any]:
    """Norms and leading singular values of every layer."""
    sigma = torch.linalg.svdvals(stack.double())[:, :32]
    return {
        "norms": [float(f"{x:.4g}") for x in torch.linalg.vector_norm(stack, dim=(1, 2))],
        "sigma": [[float(f"{x:.4g}") for x in row if x > 1e-6 * row[0]] for row in sigma],
    }


def reconstruction(stack: torch.Tensor, rank: int, k: int, start: str = "best") -> dict[str, float]:
    """How well LoRA and RaSA of a budget fit the full update: squared errors, relative."""
    M = rt.LayerStack(stack.double())
    lora, rasa = rt.solve_lora(M, rank), rt.solve_rasa(M, rt.RankBudget(rank, k), rt.SolverOptions(start=start))
    total = M.norm_squared
    return {"e_lora": lora.error / total, "e_rasa": rasa.error / total}


def factors_of_data(run: Run, task: Task, device: torch.device) -> dict[str, rt.RasaFactors]:
    """RaSA's reconstruction, by kind, of a short full fine-tuning or of minus the first gradient.

    On batches that the run itself does not see first: those of another seed.
    """
    encoder, settings = Encoder.from_folder(bundled_checkpoint()).to(device), task.settings
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
        stacks = {kind: -torch.stack([weights[f"{n}.weight"].grad for n in names]).cpu()  # type: ignore[arg-type]
                  for kind, names in _kinds().items()}  # fmt: skip
    budget = rt.RankBudget(run.rank, run.k)
    return {kind: rt.solve_rasa(rt.LayerStack(M.double()), budget).factors.to(torch.float32)
            for kind, M in stacks.items()}  # fmt: skip


@torch.no_grad()
def start_from(terms: adapters.Terms, factors: rt.RasaFactors, with_update: bool) -> None:
    """Begin at reconstructed factors, in the scales that the adapter begins with.

    `with_update`: at the update itself, its scale in B. Otherwise at no update, B = 0, with the rows of A as long as
    Kaiming's, and D as reconstructed, at most what the mixing of the pool begins with.
    """
    q = terms.budget.private_rank
    d = terms.mixing[0].clone()  # alike in all layers
    even = factors.evened()
    length = math.sqrt(1 / 3)  # of a row of a numbers, uniform in +-1/sqrt(a)
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


# ---------------------------------------------------------------------------------------------- the protocol


def methods(rank: int, data_starts: bool) -> list[Run]:
    """The methods that are compared at rank r, each as a run without rate and seed."""
    layers = len(next(iter(_kinds().values())))
    shared = sorted({1, rank // 2})
    if data_starts:
        budgets = [("lora", 0), *(("rasa", k) for k in shared)]
        return [Run(method, rank, k, 0.0, 0, start) for method, k in budgets for start in ("gradient", "updates")]
    full = [Run("full", 0, 0, 0.0, 0)]
    rasa = [Run("rasa", rank, k, 0.0, 0) for k in shared]
    wide = [Run("lora", rank - k + layers * k, 0, 0.0, 0) for k in shared]
    return [*full, Run("lora", rank, 0, 0.0, 0), *rasa, *wide]


def named(runs: Sequence[Run], only: Sequence[str] | None) -> list[Run]:
    """The runs of these names; all of them if none is given. A name that no run has ends the program."""
    known = [run.name for run in runs]
    if unknown := [name for name in only or [] if name not in known]:
        raise SystemExit(f"--only {unknown[0]!r} is none of {', '.join(known)}")
    return [run for run in runs if not only or run.name in only]


class Rows:
    """The finished runs, a line of JSON each."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path, self.settings = path, asdict(settings)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.rows = [row for row in map(json.loads, lines) if row["settings"] == self.settings]

    def find(self, run: Run, tuning: bool) -> dict[str, Any] | None:
        return next((row for row in self.rows if row["run"] == asdict(run) and row["tuning"] == tuning), None)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, separators=(",", ":")) + "\n")


def perform(
    runs: Sequence[Run], tuning: bool, rows: Rows, task: Task, device: str, jobs: int, keep: Path | None
) -> None:
    """Run what is missing, one process per job; a run that is finished is written at once."""
    missing = [run for run in runs if rows.find(run, tuning) is None]
    if not missing:
        return
    tasks = [(run, task, device, tuning, keep) for run in missing]
    started = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(min(jobs, len(tasks)), maxtasksperchild=12) as pool:
        for n, row in enumerate(pool.imap_unordered(_execute, tasks)):
            rows.add(row)
            left = (time.perf_counter() - started) / (n + 1) * (len(tasks) - n - 1)
            found = row["looks"][-1]["validation_mrr"]
            what = f"{row['name']} rate {row['run']['learning_rate']:g} seed {row['run']['seed']}"
            print(
                f"{what}: validation MRR {found:.4f}, {row['seconds']} s; "
                f"{len(tasks) - n - 1} runs, {left / 60:.0f} min left",
                flush=True,
            )


def _execute(arguments: tuple[Run, Task, str, bool, Path | None]) -> dict[str, Any]:
    torch.set_num_threads(1)
    return execute(*arguments)


def chosen_rate(run: Run, rows: Rows, rates: Sequence[float] = GRID) -> float:
    """The learning rate with the best validation MRR."""

    def validation(rate: float) -> float:
        row = rows.find(replace(run, learning_rate=rate, seed=TUNING_SEED), True)
        assert row is not None
        return float(row["looks"][-1]["validation_mrr"])

    return max(rates, key=validation)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rank", type=int, default=2, help="r of LoRA and RaSA")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each method at its learning rate")
    parser.add_argument("--data-starts", action="store_true", help="the starts from data, in place of the methods")
    parser.add_argument("--rates", type=float, nargs="+", default=GRID, help="learning rates to choose from")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the methods these, such as 'rasa(2,1)'")
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
        parser.error(f"{', '.join(missing)} is missing: pip install -c constraints.txt -e '.[finetune]'")
    settings, rates = Settings(task=args.task, bfloat16=not args.float32), args.rates
    if args.smoke:
        settings = replace(settings, steps=3, batch=4, warmup=1, validation_pairs=20, test_pairs=20, prose_pairs=8,
                           every=3, short_steps=1)  # fmt: skip
        rates = GRID[:1]
    task, device = Task(settings, Data.collected(settings, args.data)), str(compute_device(args.device))

    def rates_of(run: Run) -> Sequence[float]:
        return GRID if run.method == "full" else rates  # its best one is far from the adapters'

    rows = Rows(args.out, settings)
    compared = named(methods(args.rank, args.data_starts), args.only)
    at_rate = rates[0] if args.smoke else args.at_rate
    if at_rate is None:
        trials = [replace(run, learning_rate=rate, seed=TUNING_SEED) for run in compared for rate in rates_of(run)]
        perform(trials, True, rows, task, device, args.jobs, None)
    final = [
        replace(run, learning_rate=at_rate or chosen_rate(run, rows, rates_of(run)), seed=seed)
        for seed in range(1 if args.smoke else args.seeds)
        for run in compared
    ]
    keep = args.keep if args.at_rate is None else None
    perform(final, False, rows, task, device, args.jobs, keep)


if __name__ == "__main__":
    main()
