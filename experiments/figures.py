"""Draw every picture in figures/ again from the data beside it.

    python -m experiments.figures                     all of them, in seconds
    python -m experiments.figures recovery growth     these
    python -m experiments.figures --list              pictures, their data and their commands
    python -m experiments.figures --from-scratch      make the data first, by every experiment's own command: hours
    python -m experiments.figures --formats png svg   for papers too

From scratch, experiments run one after the other, each into its own folder below --scratch. When one has ended well,
its data are moved beside the pictures. Interrupted, the same command goes on where the experiment can: with the next
row, or from its beginning. An experiment whose needs are not met, such as a GPU, is left out with a message; its
picture is drawn from the data beside it. A picture without data is left as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from experiments.registry import EXPERIMENTS, PICTURES
from rasa_theory.plotting import style

ROOT = Path(__file__).resolve().parents[1]
SECONDS = "seconds.json"
"""Duration of each experiment when it was last run from scratch: name -> seconds, machine."""


# ----------------------------------------------------------------------------------------------- from scratch


def duration(name: str, figures: Path) -> str:
    """Time that an experiment took when it was last run from scratch."""
    path = figures / SECONDS
    records = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if name not in records:
        return "no record"
    seconds = records[name]["seconds"]
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


def note_seconds(name: str, seconds: float, figures: Path) -> None:
    """Record the duration of an experiment on this machine."""
    path = figures / SECONDS
    records = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    machine = f"{platform.machine()}, {os.cpu_count()} processors"
    records[name] = {"seconds": round(seconds), "machine": machine}
    path.write_text(json.dumps(records, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def perform(name: str, figures: Path, scratch: Path) -> bool:
    """Run an experiment's commands, and move its data beside the pictures; False if a command failed."""
    experiment, out, began = EXPERIMENTS[name], scratch / name, time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    for command in experiment.commands:
        words = [word.format(out=out.resolve()) for word in shlex.split(command)]
        print(f"{name}: python {shlex.join(words)}  (last time: {duration(name, figures)} in all)", flush=True)
        status = subprocess.call([sys.executable, *words], cwd=ROOT)
        if status != 0:
            print(f"{name}: failed with status {status}; its data are as before", flush=True)
            return False
    for file in experiment.data:
        there, here = (file, file) if isinstance(file, str) else file
        shutil.move(out / there, figures / here)
    shutil.rmtree(out)
    note_seconds(name, time.perf_counter() - began, figures)
    return True


# ------------------------------------------------------------------------------------------------ the command


def draw(name: str, figures: Path, out: Path, formats: Sequence[str]) -> bool:
    """Draw a picture from its data; without data, print a line and return False."""
    picture = PICTURES[name]
    data = figures / picture.data
    for kind in formats:  # each from a new figure, since saving one shifts its layout a little
        figure = picture.draw(data) if data.exists() else None
        if figure is None:
            print(f"{name}: no data for it in {data}; left as it is")
            return False
        style.save(figure, out / f"{name}.{kind}", kind)
    print(f"{name}: drawn from {data}")
    return True


def print_list(figures: Path) -> None:
    """Print every experiment with its commands, pictures and data."""
    for name, experiment in EXPERIMENTS.items():
        print(f"{name}  ({duration(name, figures)})" + f"  needs {experiment.needs}" * bool(experiment.needs))
        for command in experiment.commands:
            print(f"    python {command.format(out='figures')}")
        for key, picture in experiment.pictures.items():
            missing = "" if (figures / picture.data).exists() else "  (no data yet)"
            print(f"    -> {key}.png from {picture.data}{missing}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="pictures; by default all of them")
    parser.add_argument("--list", action="store_true", help="print pictures, data and commands, and draw nothing")
    parser.add_argument("--from-scratch", action="store_true", help="make the data again first")
    parser.add_argument("--formats", nargs="+", choices=("png", "svg", "pdf"), default=["png"])
    parser.add_argument("--figures", type=Path, default=ROOT / "figures", help="folder of the data (%(default)s)")
    parser.add_argument("--out", type=Path, help="folder for the pictures; by default beside the data")
    parser.add_argument("--scratch", type=Path, default=ROOT / "build" / "figures", help="for --from-scratch")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in PICTURES]:
        parser.error(f"{unknown[0]!r} is none of {', '.join(PICTURES)}")
    if options.list:
        print_list(options.figures)
        return 0
    names, good = options.names or list(PICTURES), True
    if options.from_scratch:
        for name, experiment in EXPERIMENTS.items():
            if options.names and not experiment.pictures.keys() & set(names):
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
