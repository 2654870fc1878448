"""The flags that commands share, and what they stand for: where updates come from, how to solve, how to run."""

from __future__ import annotations

import argparse

import torch

from rasa_theory.bounds import CERTIFICATES
from rasa_theory.commands.console import memory_size
from rasa_theory.common import InputError
from rasa_theory.distributed import Processes, local_process
from rasa_theory.problem import compute_device
from rasa_theory.solvers import STARTS, SolverOptions
from rasa_theory.sources import Catalogue, open_source

NAMES = {"max_sweeps": "sweeps", "shared_rank": "k"}
"""Flags that are not called as in the library, for `console.naming_flags`."""
EXAMPLES = {
    "reconstruct": {
        "the bundled updates, RaSA with one shared rank of eight": "--rank 8 --k 1",
        "your own model, one kind of module at a time": (
            "--base BASE_DIR --tuned TUNED_DIR --modules '*q_proj*' --dtype float32 --rank 8 --k 0,1,2,4"
        ),
        "what that would run and take, before anything is computed": (
            "--base BASE_DIR --tuned TUNED_DIR --modules '*q_proj*' --dtype float32 --rank 8 --k 1 --dry-run"
        ),
        "how much the LoRAs of several tasks have in common": "--adapters TASK_1_DIR TASK_2_DIR --rank 4 --k 1",
    },
    "verify": {
        "the laws on 300 random instances": "--instances 300 --seed 0",
        "what they are": "--list",
        "two families only, with floors of the dual kind": (
            "--families planted,gaussian --instances 8 --certificate dual"
        ),
        "an instance that failed, once more": "--replay rasa-verify/FILE.npz",
    },
    "extract": {
        "the best LoRA of a fine-tuned model, for PEFT": (
            "--base BASE_DIR --tuned TUNED_DIR --rank 16 --k 0 --out adapter"
        ),
        "the same with a shared rank, after a look at sizes and memory": (
            "--base BASE_DIR --tuned TUNED_DIR --rank 16 --k 1 --format lora-exact-rasa --out adapter --dry-run"
        ),
        "ranks layer by layer, to miss at most 10 % of the squared norm": (
            "--base BASE_DIR --tuned TUNED_DIR --rank auto --error 0.1 --out adapter"
        ),
        "several LoRAs of one base, compressed together": (
            "--adapters TASK_1_DIR TASK_2_DIR --rank 4 --k 1 --format lora-exact-rasa --out adapters"
        ),
    },
}
"""Command -> what for -> flags, as --help shows them."""
_SOURCES = {"adapters": "--adapters", "source": "--source", "base": "--base with --tuned"}


def with_examples(text: str, command: str) -> str:
    """The end of a command's --help: `text`, then its `EXAMPLES`."""
    lines = [f"  # {what}\n  python -m rasa_theory.{command} {flags}" for what, flags in EXAMPLES[command].items()]
    return "\n".join([text, "", "examples:", *lines])


def add_sources(parser: argparse.ArgumentParser, source: str, adapters: str) -> None:
    """--base, --tuned, --source, --adapters and --modules; the two texts say what these two are for."""
    add = parser.add_argument
    add("--base", metavar="P", help="a checkpoint before fine-tuning: a .safetensors file or a directory of them")
    add("--tuned", metavar="P", help="the checkpoint after it; the update is tuned - base")
    add("--source", metavar="S", help=source)
    add("--adapters", nargs="+", metavar="DIR", help=adapters)
    add("--modules", action="append", default=[], metavar="GLOB", help="keep the stacks whose name matches; repeatable")


def check_sources(args: argparse.Namespace) -> str | None:
    """The attribute of the one source given: `base` (with `tuned`), `source` or `adapters`; None if there is none.

    Raises InputError if there are two, or half a pair.
    """
    if (args.base is None) != (args.tuned is None):
        raise InputError("--base and --tuned go together: name both checkpoints")
    given = [name for name in _SOURCES if getattr(args, name) is not None]
    if len(given) > 1:
        raise InputError(f"{_SOURCES[given[0]]} and {_SOURCES[given[1]]} exclude each other; give one of them")
    return given[0] if given else None


def given_source(args: argparse.Namespace, default: str | None = None, alone: bool = False) -> Catalogue:
    """All stacks of the source given, or of `default`, whatever --modules says; `alone` as for `open_source`.

    Raises InputError as `check_sources` and `open_source` do, and if no source is given and there is no default.
    """
    if check_sources(args) is None and default is None:
        raise InputError("give --base and --tuned, two checkpoints, or --source, one that holds updates, or --adapters")
    source = args.source if args.source is not None else default or ""
    return open_source(
        source, base=args.base, tuned=args.tuned, adapters=args.adapters, memory=args.memory, alone=alone
    )


def add_solver(parser: argparse.ArgumentParser) -> None:
    """--start, --certificate, --sweeps, --rtol and --seed."""
    add, options = parser.add_argument, SolverOptions
    add("--start", choices=("best", *STARTS), default="best", help="where the solver starts (%(default)s: a race)")
    add(
        "--certificate",
        choices=CERTIFICATES,
        default="closed",
        help="floors up to this kind: dual and two-sided take up to minutes per stack and k (%(default)s)",
    )
    add("--sweeps", type=int, default=options.max_sweeps, metavar="N", help="at most so many sweeps (%(default)s)")
    add(
        "--rtol",
        type=float,
        default=options.rtol,
        metavar="X",
        help="stop when a sweep gains less than this share (%(default)s)",
    )
    add("--seed", type=int, default=0, metavar="S", help="of everything random (%(default)s)")


def solver_options(args: argparse.Namespace) -> SolverOptions:
    """What the flags of `add_solver` ask for, --certificate aside."""
    return SolverOptions(start=args.start, max_sweeps=args.sweeps, rtol=args.rtol, seed=args.seed)


def add_running(parser: argparse.ArgumentParser) -> None:
    """--device, --memory, --json, --quiet and --dry-run."""
    add = parser.add_argument
    add("--device", default="auto", help="auto (cuda, else cpu), cpu, cuda:1, ..")
    add(
        "--memory",
        type=memory_size,
        metavar="SIZE",
        help="such as 2GiB: larger stacks stay in their .npy or .safetensors files, read in parts on every pass, and "
        "their SVDs in a temporary file; half is for the work on one layer (default: no limit)",
    )
    add("--json", action="store_true", help="print the results as JSON, everything else on standard error")
    add("--quiet", action="store_true", help="no progress bar")
    add("--dry-run", action="store_true", help="only say what would run, and what it takes")


def device(args: argparse.Namespace, processes: Processes) -> torch.device:
    """That of --device; of several processes, each takes the GPU of its number on this machine, LOCAL_RANK.

    Raises InputError as `compute_device` does, and if there are fewer GPUs than processes here.
    """
    found = compute_device(args.device)
    if processes.alone or found.type != "cuda":
        return found
    local, there = local_process(), torch.cuda.device_count()
    if args.device not in ("auto", "cuda"):
        raise InputError(
            f"device {args.device} is one for all processes; each takes its own with --device cuda or auto", "device"
        )
    if local >= there:
        raise InputError(
            f"device cuda: {there} GPUs are here for process {local + 1}; start so many, or --device cpu", "device"
        )
    return torch.device("cuda", local)
