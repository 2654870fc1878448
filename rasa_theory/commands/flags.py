"""The flags that several commands share: sources of updates, options of the solver, and options of the run."""

from __future__ import annotations

import argparse

import torch

from rasa_theory.bounds import CERTIFICATES
from rasa_theory.commands.console import memory_size
from rasa_theory.common import InputError
from rasa_theory.distributed import Processes, local_process
from rasa_theory.problem import SPECTRA, compute_device
from rasa_theory.solvers import EFFORTS, STARTS, SolverOptions
from rasa_theory.sources import Catalogue, open_source

NAMES = {"max_sweeps": "sweeps", "shared_rank": "k"}
"""Names of the library whose flag has another name, for `console.naming_flags`."""
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
        "an instance that failed, once more": "--replay rasa-verify/failures/FILE.npz",
    },
    "extract": {
        "the best LoRA of a fine-tuned model, for PEFT": ("--base BASE_DIR --tuned TUNED_DIR --rank 16 --out adapter"),
        "sizes, memory and time of the same with a shared rank, before anything is computed": (
            "--base BASE_DIR --tuned TUNED_DIR --rank 16 --k 1 --format lora-exact-rasa --out adapter --dry-run"
        ),
        "ranks layer by layer, to miss at most 10 % of the squared norm": (
            "--base BASE_DIR --tuned TUNED_DIR --rank auto --error 0.1 --out adapter"
        ),
        "several LoRAs of one base, compressed together": (
            "--adapters TASK_1_DIR TASK_2_DIR --rank 4 --k 1 --format lora-exact-rasa --out adapters"
        ),
    },
    "inspect": {
        "how large the updates of a model are, and how fast their spectra fall": "--base BASE_DIR --tuned TUNED_DIR",
        "the least rank that misses at most a tenth of the squared norm": (
            "--base BASE_DIR --tuned TUNED_DIR --error 0.1"
        ),
        "sizes and time of a search for the best ranks of a file of 100 MB": (
            "--base BASE_DIR --tuned TUNED_DIR --size 100MB --dry-run"
        ),
    },
}
"""The examples of --help by command: a purpose -> the flags that serve it."""
_SOURCES = {"adapters": "--adapters", "source": "--source", "base": "--base with --tuned"}


def with_examples(text: str, command: str) -> str:
    """Return the end of the --help of `command`: `text`, then its `EXAMPLES`."""
    lines = [f"  # {purpose}\n  rasa {command} {flags}" for purpose, flags in EXAMPLES[command].items()]
    return "\n".join([text, "", "examples:", *lines])


def add_sources(parser: argparse.ArgumentParser, source: str, adapters: str) -> None:
    """Add --base, --tuned, --source, --adapters and --modules; `source` and `adapters` are the help of those two."""
    add = parser.add_argument_group("updates").add_argument
    add(
        "--base",
        metavar="P",
        help="a checkpoint before fine-tuning: a .safetensors file, a directory of them, or org/name on the Hub",
    )
    add("--tuned", metavar="P", help="the checkpoint after it; the update is tuned - base")
    add("--source", metavar="S", help=source)
    add("--adapters", nargs="+", metavar="DIR", help=adapters)
    add("--modules", action="append", default=[], metavar="GLOB", help="keep the stacks whose name matches; repeatable")


def check_sources(args: argparse.Namespace) -> str | None:
    """Return the attribute of the one source on the command line, or None without a source.

    It is `base` (with `tuned`), `source` or `adapters`. Raises InputError for two sources, or for half a pair.
    """
    if (args.base is None) != (args.tuned is None):
        raise InputError("--base and --tuned go together: name both checkpoints")
    present = [name for name in _SOURCES if getattr(args, name) is not None]
    if len(present) > 1:
        raise InputError(f"{_SOURCES[present[0]]} and {_SOURCES[present[1]]} exclude each other; give one of them")
    return present[0] if present else None


def named_sources(args: argparse.Namespace) -> list[str | None]:
    """All sources on the command line; None where a flag is not given."""
    return [args.source, args.base, args.tuned, *(args.adapters or ())]


def open_catalogue(
    args: argparse.Namespace, default: str | None = None, alone: bool = False, convolutions: bool = False
) -> Catalogue:
    """Open the source on the command line, or `default`, with all its stacks; --modules is not applied.

    `alone` and `convolutions` are passed to `open_source`. Raises InputError as `check_sources` and `open_source` do,
    and if there is neither a source nor a default.
    """
    if check_sources(args) is None and default is None:
        raise InputError("give --base and --tuned, two checkpoints, or --source, one that holds updates, or --adapters")
    source = args.source if args.source is not None else default or ""
    return open_source(
        source,
        base=args.base,
        tuned=args.tuned,
        adapters=args.adapters,
        memory=args.memory,
        alone=alone,
        convolutions=convolutions,
    )


def add_solver(parser: argparse.ArgumentParser, group: str = "solver and floors") -> None:
    """Add a group of this title.

    It has --start, --effort, --max-cancellation, --certificate, --sweeps, --rtol, --spectra and --seed.
    """
    add, options = parser.add_argument_group(group).add_argument, SolverOptions
    add(
        "--start",
        choices=("best", *STARTS),
        default="best",
        metavar="NAME",
        help="where the solver starts (default: %(default)s, a search with many starts of all kinds): %(choices)s",
    )
    add(
        "--effort",
        choices=EFFORTS,
        help=f"how long the search of --start best takes (default: {options.effort}); quick: a few seconds for each "
        "stack and k; thorough: until nothing has changed for as long as it took to get there, for a number to publish",
    )
    add(
        "--max-cancellation",
        type=float,
        default=options.max_cancellation,
        metavar="C",
        help="the bound on terms: none exceeds C >= 1 times the norm of its layer (default: %(default)s); inf: none",
    )
    add(
        "--certificate",
        choices=CERTIFICATES,
        default="closed",
        help="floors up to this kind: dual and two-sided take up to minutes per stack and k (default: %(default)s)",
    )
    add(
        "--sweeps",
        type=int,
        default=options.max_sweeps,
        metavar="N",
        help="maximum number of sweeps (default: %(default)s)",
    )
    add(
        "--rtol",
        type=float,
        default=options.rtol,
        metavar="X",
        help="stop when a sweep gains less than this share (default: %(default)s)",
    )
    add(
        "--spectra",
        choices=SPECTRA,
        default=options.spectra,
        help="leading: all from products with M, for large layers; floors then hold but for a probability of 1e-10; "
        "exact: from SVDs; auto: exact below 768 rows or columns, or where ranks are large (default: %(default)s)",
    )
    add("--seed", type=int, default=0, metavar="S", help="seed of everything random (default: %(default)s)")


def solver_options(args: argparse.Namespace) -> SolverOptions:
    """Return the solver options of the flags that `add_solver` adds; --certificate is not one of them.

    Raises InputError for --effort beside a start that is not searched for, and for values out of range.
    """
    if args.effort is not None and args.start != "best":
        raise InputError(
            f"--effort is for the search of --start best, and --start {args.start} has none; leave one of them out"
        )
    return SolverOptions(
        start=args.start,
        effort=args.effort or SolverOptions.effort,
        max_sweeps=args.sweeps,
        rtol=args.rtol,
        seed=args.seed,
        max_cancellation=args.max_cancellation,
        spectra=args.spectra,
    )


def add_running(parser: argparse.ArgumentParser) -> None:
    """Add --device, --memory, --json, --quiet and --dry-run."""
    add = parser.add_argument_group("the run").add_argument
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


def whole_numbers(text: str) -> tuple[int, ...]:
    """The numbers of 1,2,4 or of 8; raises argparse.ArgumentTypeError for anything else."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number or a list such as 1,2,4") from None


def selected_device(args: argparse.Namespace, processes: Processes) -> torch.device:
    """Return the device of --device. Several processes on CUDA each take the GPU of their LOCAL_RANK.

    Raises InputError as `compute_device` does, and if this machine has fewer GPUs than processes.
    """
    device = compute_device(args.device)
    if processes.alone or device.type != "cuda":
        return device
    local_rank = local_process()
    gpus = torch.cuda.device_count()
    if args.device not in ("auto", "cuda"):
        raise InputError(
            f"device {args.device} is one for all processes; each takes its own with --device cuda or auto", "device"
        )
    if local_rank >= gpus:
        raise InputError(
            f"device cuda: {gpus} GPUs are here for process {local_rank + 1}; start so many, or --device cpu", "device"
        )
    return torch.device("cuda", local_rank)
