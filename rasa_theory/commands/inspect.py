"""The command `rasa inspect` measures updates before a rank is chosen, and recommends ranks.

Exit status: 0 all well, 2 bad input or usage, 130 interrupted. After an interruption the same command resumes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch

from rasa_theory.commands import flags
from rasa_theory.commands.console import (
    exit_status,
    leaving_no_empty_folder,
    memory_size,
    naming_flags,
    output_folder,
    say_interrupted,
    say_notes,
)
from rasa_theory.commands.parser import Parser
from rasa_theory.commands.progress import ProgressBar, RowPrinter, print_line, terminal_width
from rasa_theory.common import InputError, environment, keeping_interrupts, wrapped
from rasa_theory.distributed import Processes
from rasa_theory.extraction import STORED
from rasa_theory.inspection import (
    FILES,
    RANKS,
    EnergyTable,
    InspectionFolder,
    InspectionJob,
    InspectSettings,
    RankGoal,
    inspection_folder,
    inspection_notes,
    inspection_report,
    left_out_rows,
    measure_all,
    recommendation_lines,
    stack_row,
    warnings,
)
from rasa_theory.problem import compute_device

_NAME = "rasa inspect"
_ON_NO_MEMORY = "take fewer modules (--modules), or --memory, with which large stacks stay on disk"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    return exit_status(_NAME, lambda processes: run(words, processes), _ON_NO_MEMORY)


def flag_parser() -> Parser:
    """Return the parser of the command's flags."""
    parser = Parser(
        prog=_NAME,
        description="Measure fine-tuning updates before a rank is chosen: their size, their spectra and what layers "
        "share, with the certified error of a LoRA of every rank.",
        epilog=flags.with_examples(
            "Interrupted, it goes on where it was when the same command is given again. Another goal for the same "
            "updates is answered from the folder, without measuring again.",
            "inspect",
        ),
    )
    flags.add_sources(
        parser,
        source="instead of the two: updates (tuned minus base): a .safetensors, .npy or .npz file, a directory of "
        "safetensors, the folder of a PEFT LoRA adapter, or a bundled set",
        adapters="instead: PEFT LoRA adapters of one base; one stack per module, over the adapters",
    )
    add = parser.add_argument
    add(
        "--ranks",
        type=flags.whole_numbers,
        default=RANKS,
        metavar="R,R",
        help=f"ranks to report; spectra are measured up to the largest ({','.join(map(str, RANKS))})",
    )
    add("--error", type=float, metavar="E", help="recommend ranks that miss at most this share of the squared norm")
    add("--energy", type=float, metavar="E", help="recommend ranks that hold at least this share of the squared norm")
    add("--size", type=memory_size, metavar="SIZE", help="recommend ranks whose parameters take at most this, as 80MB")
    add(
        "--dtype",
        choices=tuple(STORED),
        default="float32",
        help="dtype of the adapter, for sizes (default: %(default)s)",
    )
    add(
        "--out",
        default="rasa-inspect",
        metavar="DIR",
        help="folder of the files (default: %(default)s); none writes nothing",
    )
    add("--overwrite", action="store_true", help="replace what another inspection has left in the folder")
    flags.add_running(parser)
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the flags of the command."""
    return flag_parser().parse_args(arguments)


def run(arguments: list[str], processes: Processes) -> int:
    """Run the command in this process; return its exit status. Raises InputError for bad input."""
    args = parse(arguments)
    if not processes.alone:
        raise InputError("inspect runs in one process; start it without torchrun")
    goal = _goal(args)
    job = _job(args)
    text = sys.stderr if args.json else sys.stdout
    if args.dry_run:
        print_line(job.forecast(), text)
        return 0
    with leaving_no_empty_folder(args.out):
        out = output_folder(args.out, flags.named_sources(args))
        folder = None if out is None else inspection_folder(out, job.plan(), args.overwrite)
        say_notes(job.catalogue.notes)
        report = _inspected(job, folder, goal, args, arguments)
    if report is None:
        return 130
    is_changed = any(row["norm_squared"] for row in report["stacks"])
    lines = [] if is_changed else [f"Updates: {report['source']}"]  # there is no table
    lines += [*inspection_notes(report), *recommendation_lines(report)]
    if out is not None:
        lines += wrapped(f"Files: {out}/ ({', '.join(FILES)})")
    for warning in report["warnings"]:  # last, where eyes are
        lines += ["", *wrapped(warning)]
    print_line("\n".join(lines), text)
    if args.json:
        print_line(json.dumps(report, indent=1, allow_nan=False), sys.stdout)
    return 0


def _goal(args: argparse.Namespace) -> RankGoal | None:
    """The goal of the recommendation, None without one. Raises InputError for two of them, or one out of range."""
    goals = (args.error, args.energy, args.size)
    if goals == (None, None, None):
        return None
    with naming_flags(flags.NAMES):
        return RankGoal(*goals)


def _job(args: argparse.Namespace) -> InspectionJob:
    """The job that the flags describe. Raises InputError if they select no stack, or allow too little memory."""
    with naming_flags(flags.NAMES):
        settings = InspectSettings(args.ranks)
        device = compute_device(args.device)
    catalogue = flags.open_catalogue(args, alone=True).matching(args.modules)
    job = InspectionJob(catalogue, settings, device, args.adapters is not None, args.memory)
    with naming_flags(flags.NAMES):
        job.check()
    return job


def _inspected(
    job: InspectionJob,
    folder: InspectionFolder | None,
    goal: RankGoal | None,
    args: argparse.Namespace,
    arguments: Sequence[str],
) -> dict[str, Any] | None:
    """Measure what is not measured yet, print every row of the table when it is finished, and write the files.

    Returns the report, None if interrupted.
    """
    ranks = job.settings.ranks
    table = EnergyTable(job.outline(), ranks, terminal_width())
    printer = RowPrinter([f"Updates: {job.catalogue.source}", *table.head()], args.json)
    progress = ProgressBar(len(job.catalogue.stacks), "stacks", args.quiet)

    def show(row: dict[str, Any]) -> None:
        printer.print(table.rows(stack_row(row, ranks)), progress)

    with folder or contextlib.nullcontext():
        try:
            with keeping_interrupts():
                with progress:
                    rows = measure_all(job, folder, progress, show)
                left_out = left_out_rows(job, folder)
        except KeyboardInterrupt:
            done = 0 if folder is None else folder.finished_parts
            out = None if folder is None else folder.out
            say_interrupted(done, len(job.catalogue.stacks), "stacks", out)
            return None
        except InputError:
            if folder is not None:
                folder.abandon()
            raise
        about = {
            "schema": 1, "command": ["rasa", "inspect", *arguments], "source": job.catalogue.source,
            "plan": job.plan(), "environment": environment(job.device, torch.float64),
        }  # fmt: skip
        report = about | inspection_report(rows, job.settings, goal, STORED[args.dtype].itemsize)
        report |= {"left_out": left_out, "warnings": warnings(report)}
        if folder is not None:
            folder.finish(report)
    return report
