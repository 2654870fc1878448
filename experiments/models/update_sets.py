"""The updates that the experiments measure: of two models, after two tasks and from several seeds, and made ones.

    minilm       all-MiniLM-L6-v2: 6 layers, 384 wide
    mpnet        all-mpnet-base-v2: 12 layers, 768 wide
    synthetic    32 layers of 128 x 128 with sigma_j = j^-0.7, seed 0: with independent bases, and with half common ones

Updates of a model are taken from the repository, which holds few of them; the published numbers of these belong to
them. What it has not is read from --runs, the folder where `python -m experiments.finetune` leaves them. A run that is
made again on another machine rounds otherwise, and ends a few per cent away.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

import rasa_theory as rt
from experiments.models.pretrained import MODELS
from rasa_theory.common import InputError
from rasa_theory.sources import StackSource, is_bundled, open_source, synthetic_stack

FIRST_MODEL = MODELS["minilm"].name
MODEL_NAMES = {"minilm": FIRST_MODEL, "mpnet": MODELS["mpnet"].name, "synthetic": "synthetic"}
"""The name in the column `model` of the tables, by the word after --model."""
KINDS = ("query", "key", "value", "attention_output", "intermediate", "output")
RUNS = Path("rasa-finetune")
IN_REPOSITORY = {
    ("minilm", "code", 0): "minilm-code",
    ("mpnet", "code", 0): "mpnet-code",
    ("minilm", "prose", 0): str(Path(__file__).parents[1] / "trained" / "minilm_prose.safetensors"),
}
SPECTRUM, SYNTHETIC_LAYERS, SYNTHETIC_WIDTH = "power:0.7", 32, 128
OVERLAPS = {"independent bases": 0.0, "half common bases": 0.5}
"""The synthetic stacks, and the share of their bases that is common to all layers."""


def run_file(model: str, task: str, seed: int, runs: Path) -> Path:
    """The file of updates that `experiments.finetune` leaves."""
    return runs / f"{model}-{task}-seed-{seed}" / "updates.safetensors"


def sources_of(model: str, task: str, seed: int, runs: Path) -> list[dict[str, StackSource]]:
    """The stacks of these updates by name: those in the repository and those of the run in `runs`, where they exist."""
    file, own = run_file(model, task, seed, runs), IN_REPOSITORY.get((model, task, seed))
    sources = [own] if own is not None and (is_bundled(own) or Path(own).exists()) else []
    if file.exists():
        sources.append(str(file))
    return [{each.name: each for each in open_source(source).stacks} for source in sources]


def updates_of(
    model: str, task: str = "code", seed: int = 0, runs: Path = RUNS, kinds: Sequence[str] | None = None
) -> dict[str, rt.LayerStack]:
    """The stacks of a model by name, in float64: those of some kinds, or of all kinds with square matrices.

    Raises InputError if the updates, or one of the kinds, are missing.
    """
    if model == "synthetic":
        shape = SYNTHETIC_WIDTH, SYNTHETIC_WIDTH
        made = {name: synthetic_stack(SYNTHETIC_LAYERS, shape, SPECTRUM, overlap).values
                for name, overlap in OVERLAPS.items()}  # fmt: skip
        names = _chosen(model, kinds, list(made), list(made))
        return {name: rt.LayerStack(made[name], name) for name in names}
    sources: dict[str, StackSource] = {}
    for stacks in reversed(sources_of(model, task, seed, runs)):
        sources |= stacks  # a kind that both have is of the repository
    if not sources:
        raise InputError(
            f"{run_file(model, task, seed, runs)} is missing: python -m experiments.finetune --model {model} "
            f"--task {task} --seeds {seed} --runs {runs} makes it"
        )
    ordered = [kind for kind in KINDS if kind in sources]
    square = [kind for kind in ordered if len(set(sources[kind].shape)) == 1]
    return {kind: sources[kind].load(torch.float64, None) for kind in _chosen(model, kinds, ordered, square)}


def updates_of_one_run(
    model: str, task: str, seed: int, runs: Path, kinds: Sequence[str]
) -> dict[str, rt.LayerStack] | None:
    """The updates of these kinds, all of one run, in float64; None if no run has them all.

    Of several such runs it is the one in the repository.
    """
    for sources in sources_of(model, task, seed, runs):
        if set(kinds) <= set(sources):
            return {kind: sources[kind].load(torch.float64, None) for kind in kinds}
    return None


def _chosen(model: str, kinds: Sequence[str] | None, there: list[str], default: list[str]) -> list[str]:
    """The kinds to take, in their order. Raises InputError for one that is not there."""
    if missing := set(kinds or ()) - set(there):
        raise InputError(f"the updates of {model} have no {min(missing)!r}; there are: {', '.join(there)}", "kinds")
    return default if kinds is None else [name for name in there if name in kinds]


def add_model_flags(parser: argparse.ArgumentParser, models: Sequence[str] = tuple(MODEL_NAMES)) -> None:
    """Add --model, --kinds and --runs."""
    parser.add_argument("--model", choices=models, default="minilm", help="(minilm)")
    parser.add_argument("--kinds", nargs="+", metavar="KIND", help="such as query; by default all square ones")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of the trained updates (rasa-finetune)")


def chosen_updates(options: argparse.Namespace) -> dict[str, rt.LayerStack]:
    """The stacks that --model, --kinds and --runs name, after training on code from seed 0.

    Raises InputError if there are none.
    """
    return updates_of(options.model, runs=options.runs, kinds=options.kinds)


def corner(
    stacks: dict[str, rt.LayerStack], layers: int = 3, size: int = 20, count: int = 1
) -> dict[str, rt.LayerStack]:
    """Corners of the first `count` stacks, named so, for runs that only show that the code works."""
    return {
        f"{name} (corner)": rt.LayerStack(stack.values[:layers, :size, :size], f"{name} (corner)")
        for name, stack in list(stacks.items())[:count]
    }
