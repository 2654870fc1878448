"""The settings of the experiment, its runs, and its data."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.models.data import Pair, Split, cached, pairs_of, split_by_module
from experiments.models.sentences import consecutive
from experiments.support.rows import Row
from rasa_theory.common import InputError

PROSE_PACKAGES = ("numpy", "scipy", "torch", "transformers", "matplotlib", "safetensors", "tqdm")


@dataclass(frozen=True)
class Settings:
    """All settings of the experiment, the same for every run."""

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
    prose_pairs: int = 160  # for each of the two kinds
    task: str = "code"  # one of `experiments.models.data.TASKS`
    every: int = 50  # steps between two measurements on validation and prose
    bfloat16: bool = True  # autocast in training and these measurements; the test at the end is in float32
    short_steps: int = 30  # steps of full fine-tuning, and batches of the gradient, for the starts from data


@dataclass(frozen=True)
class Run:
    """One training run. `start` is zero, or `gradient` or `updates` for adapters that start from data."""

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
        """Name of the trained adapter's folder: lora-2-seed-0, or lora-2-prose-seed-0 for that task."""
        parts = [self.method, str(self.rank), str(self.k) if self.k else "", "" if task == "code" else task]
        return "-".join([*filter(None, parts), "seed", str(self.seed)])


@dataclass(frozen=True)
class Data:
    """Pairs for the task, from disjoint modules, and pairs of sentences that follow one another."""

    train: list[Pair]
    validation: list[Pair]
    test: list[Pair]
    prose: dict[str, list[tuple[str, str]]]
    python: str  # the version of Python whose standard library the pairs are from

    @classmethod
    def collected(cls, settings: Settings, folder: Path | None) -> Data:
        """Collect texts from the packages of this machine, or read them from `folder`, see `cached`."""
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
    """The data of a run and its settings."""

    settings: Settings
    data: Data


def best_rate(trials: Iterable[Row]) -> float:
    """The learning rate of the highest mean validation MRR over tuning seeds, the lowest of equal ones.

    Raises InputError if rates were tried with different numbers of seeds, so that their means are not comparable.
    """
    scores: dict[float, list[float]] = defaultdict(list)
    for row in trials:
        scores[float(row["run"]["learning_rate"])].append(float(row["looks"][-1]["validation_mrr"]))
    counts = {len(values) for values in scores.values()}
    if len(counts) != 1:
        numbers = " and ".join(map(str, sorted(counts))) or "no"
        raise InputError(f"rates were tried with {numbers} tuning seeds: finish these runs, or take the others out")
    return max(sorted(scores), key=lambda rate: statistics.fmean(scores[rate]))


def _some(pairs: Sequence[tuple[str, str]], number: int) -> list[tuple[str, str]]:
    ordered = sorted(pairs, key=lambda pair: hashlib.sha256("".join(pair).encode()).hexdigest())
    return [(before, after) for before, after in ordered[:number]]


def _reference() -> list[tuple[str, str]]:
    from pydoc_data.topics import topics

    return sorted({pair for text in topics.values() for pair in consecutive(text)})


def _package_texts() -> list[tuple[str, str]]:
    pairs: set[tuple[str, str]] = set()
    for package in PROSE_PACKAGES:
        for file in importlib.metadata.distribution(package).files or []:
            if re.search(r"METADATA|LICEN[CS]E|NOTICE|COPYING|\.md$|\.rst$", file.name):
                try:
                    pairs.update(consecutive(Path(str(file.locate())).read_text(encoding="utf-8")))
                except (OSError, UnicodeDecodeError):
                    continue
    return sorted(pairs)
