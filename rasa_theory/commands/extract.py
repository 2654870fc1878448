"""The command `rasa extract` writes an adapter from two checkpoints, and reports its errors.

Exit status: 0 all well, 2 bad input or usage, 130 interrupted. After an interruption the same command resumes.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rasa_theory.bounds import RankTarget
from rasa_theory.commands import flags
from rasa_theory.commands.console import (
    exit_status,
    leaving_no_empty_folder,
    naming_flags,
    output_folder,
    say_interrupted,
    say_notes,
)
from rasa_theory.commands.parser import Parser
from rasa_theory.commands.progress import ProgressBar, RowPrinter, print_line, terminal_width
from rasa_theory.common import InputError, environment, keeping_interrupts, read_run_json, wrapped
from rasa_theory.distributed import Processes
from rasa_theory.extraction import (
    FORMATS,
    POOLED,
    RANKS,
    STORED,
    ErrorTable,
    ExtractionFolder,
    ExtractSettings,
    Job,
    check,
    difference_table,
    entered,
    extract_all,
    finish,
    forecast,
    is_difference,
    job_of,
    remove_other_extraction,
    report_notes,
)
from rasa_theory.formats import CONFIG_FILE, LAYOUTS, BaseModel, base_of, kohya_prefix
from rasa_theory.problem import compute_dtype
from rasa_theory.sources import Catalogue

_UNSET = object()
_ON_NO_MEMORY = "take fewer modules (--modules), --compute float32, or --memory, with which large stacks stay on disk"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    return exit_status(
        "rasa extract",
        lambda processes: run(words, processes),
        _ON_NO_MEMORY,
        "; stacks that were finished are in --out, and the same command goes on from there",
    )


def flag_parser() -> Parser:
    """Return the parser of the command's flags."""
    parser = Parser(
        prog="rasa extract",
        description="Extract a LoRA or RaSA adapter from fine-tuned weights, with the error of every layer.",
        epilog=flags.with_examples(
            "Interrupted, it goes on where it was when the same command is given again.",
            "extract",
        ),
    )
    flags.add_sources(
        parser,
        source="instead of the two: a file of updates, tuned minus base, or one LoRA adapter",
        adapters="instead: LoRA adapters of one base, for PEFT, compressed together: one stack per module, over the "
        "adapters; an adapter of each goes into a folder of its own",
    )
    add = parser.add_argument_group("ranks and files").add_argument
    add("--exclude", action="append", default=[], metavar="GLOB", help="leave these stacks out; repeatable")
    add(
        "--rank",
        type=_number_or_auto,
        default=16,
        metavar="R",
        help="rank budget r of a layer, or auto; a matrix with fewer rows or columns is taken whole "
        "(default: %(default)s)",
    )
    add("--energy", type=float, metavar="E", help="with --rank auto: keep this share of the squared norm")
    add("--error", type=float, metavar="E", help="with --rank auto: miss at most this share of the squared norm")
    add("--parameters", type=int, metavar="N", help="with --rank auto: use at most this number of parameters")
    add(
        "--k",
        type=_number_or_auto,
        default=_UNSET,
        metavar="K",
        help="ranks of a layer that go to RaSA's pool; 0: LoRA alone; auto: the best of 1, 2, 4, .. (1 for "
        "lora-exact-rasa and rasa; 0 for the formats without a pool, where it would concern the report alone)",
    )
    add(
        "--format",
        choices=FORMATS,
        default="lora",
        help="lora: the best LoRA of rank r, for PEFT; lora-exact-rasa: the RaSA solution as a LoRA of rank "
        "r - k + L k, for PEFT; rasa: a layout of its authors' forks of PEFT; kohya: the best LoRA in one file, for "
        "ComfyUI and diffusers; dense: the same as dense updates; diff: tuned minus base, of all tensors "
        "(default: %(default)s)",
    )
    add(
        "--ranks",
        choices=RANKS,
        default=RANKS[0],
        help="one: all factors padded with zeros to the largest rank, which every consumer reads right; own: the "
        "smallest file, with ranks in patterns, for PEFT alone (default: %(default)s)",
    )
    add(
        "--layout",
        choices=LAYOUTS,
        default=LAYOUTS[0],
        help="of format rasa: mixing is the layout of zwhe99/RaSA, private that of zwhe99/peft (default: %(default)s)",
    )
    add(
        "--save-modules",
        action="store_true",
        help="put embeddings, output layers and norms that changed into modules_to_save, whole",
    )
    add("--out", required=True, metavar="DIR", help="folder of the adapter")
    add("--overwrite", action="store_true", help="replace what another extraction has left in the folder")
    add("--dtype", choices=tuple(STORED), default="float32", help="dtype of the files (default: %(default)s)")
    add(
        "--compute",
        choices=("float64", "float32"),
        default="float64",
        help="dtype of the computation (default: %(default)s)",
    )
    add(
        "--prefix",
        metavar="P",
        help="put before the names of modules, such as transformer.; of format kohya the beginning of all keys "
        "(lora_unet_, or lora_te_ for a text encoder)",
    )
    add("--base-name", metavar="NAME", help="base_model_name_or_path in the adapter (what --base says)")
    flags.add_solver(parser, "solver and floors, with --k")
    flags.add_running(parser)
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the flags of the command."""
    return flag_parser().parse_args(arguments)


def _number_or_auto(text: str) -> int | None:
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor auto") from None


def _target(args: argparse.Namespace) -> RankTarget | None:
    """Return the target of --rank auto, None for a rank. Raises InputError if the target is missing or superfluous."""
    targets = [flag for flag in ("energy", "error", "parameters") if getattr(args, flag) is not None]
    if args.rank is not None:
        if targets:
            raise InputError(f"--{targets[0]} goes with --rank auto alone; give that, or leave it out")
        return None
    if len(targets) != 1:
        raise InputError("--rank auto needs exactly one of --energy, --error and --parameters")
    if args.error is not None and not 0 <= args.error < 1:
        raise InputError(f"--error is a share, at least 0 and below 1, as 0.3 for 30 %; got {args.error}")
    with naming_flags(flags.NAMES):
        return RankTarget(1 - args.error if args.error is not None else args.energy, args.parameters)


def _job(args: argparse.Namespace, processes: Processes) -> Job:
    """Return the job that the flags describe. Raises InputError if they contradict each other or select no stack."""
    target = _target(args)
    with naming_flags(flags.NAMES):
        dtype = compute_dtype(args.compute)
        device = flags.selected_device(args, processes)
        solver = flags.solver_options(args)
    catalogue = (
        flags.open_catalogue(args, alone=True, convolutions=args.format == "kohya")
        .matching(args.modules)
        .without(args.exclude)
    )
    base = _base(args, catalogue)
    with naming_flags(flags.NAMES):
        settings = ExtractSettings(
            args.rank,
            args.k if args.k is not _UNSET else int(args.format in POOLED),
            args.format,
            args.dtype,
            args.certificate,
            solver,
            target,
            args.ranks,
            args.layout,
            _prefix(args, base),
            args.save_modules,
        )
    return job_of(catalogue, settings, dtype, device, base, _tasks(args), args.memory)


def run(arguments: list[str], processes: Processes) -> int:
    """Run the command in this process, one of `processes`; return its exit status. Raises InputError for bad input."""
    args = parse(arguments)
    with processes.raise_together():
        job = _job(args, processes)
    processes.from_first(lambda: check(job, None if args.dry_run else Path(args.out)))
    text = sys.stderr if args.json else sys.stdout
    if args.dry_run:
        if processes.first:
            print_line(forecast(job, Path(args.out), processes.world_size), text)
        return 0
    with leaving_no_empty_folder(args.out):
        return _run_in(job, processes, arguments, args)


def _run_in(job: Job, processes: Processes, arguments: list[str], args: argparse.Namespace) -> int:
    """Extract into the folder of --out; return the exit status."""
    out = processes.from_first(lambda: output_folder(args.out, flags.named_sources(args)))
    if out is None:
        raise InputError("--out none writes no adapter; name a folder")
    processes = processes.with_long_timeout()
    if args.overwrite:
        processes.from_first(lambda: remove_other_extraction(out, job.plan()))
    with entered(out, job, processes) as folder:
        if processes.first:
            say_notes(job.catalogue.notes)
        table = ErrorTable(job.outline(), job.settings.rank, job.settings.k != 0, terminal_width())
        if folder is None:
            report = _earlier_report(out, table, args.json) if processes.first else {}
        elif not _extract(job, folder, processes, table, args):
            return 130
        else:
            about = {
                "schema": 1, "command": ["rasa", "extract", *arguments],
                "source": job.catalogue.source, "base": job.base.name, "plan": folder.plan,
                "environment": environment(job.device, job.dtype, processes.world_size),
            }  # fmt: skip
            report = processes.from_first(functools.partial(finish, job, folder, about))
    if processes.first:
        _print(report, table, out, args.json)
    return 0


def _extract(
    job: Job, folder: ExtractionFolder, processes: Processes, table: ErrorTable, args: argparse.Namespace
) -> bool:
    """Extract all stacks, with progress bars, and print every row of the table when its stack is finished.

    If interrupted, say how to resume and return False.
    """
    printer = RowPrinter([f"Updates: {job.catalogue.source}", *table.head()], args.json)
    progress: ProgressBar | None = None

    def bar(total: int, unit: str) -> ProgressBar:
        nonlocal progress
        progress = ProgressBar(total, unit, args.quiet or not processes.first)
        return progress

    def show(row: dict[str, Any]) -> None:
        if progress is not None:
            printer.print(table.rows(row), progress)

    try:
        with keeping_interrupts():
            extract_all(job, folder, processes, bar, None if job.settings.format == "diff" else show)
    except KeyboardInterrupt:
        processes.board.tell_interrupted()
        if processes.first:
            say_interrupted(folder.finished_parts, len(job.catalogue.stacks), "stacks", folder.out)
        return False
    return True


def _earlier_report(out: Path, table: ErrorTable, as_json: bool) -> dict[str, Any]:
    """The report of a finished extraction, whose rows are printed."""
    print_line(f"{out} is finished already; nothing is left to do", sys.stderr)
    report = read_run_json(out / "report.json")
    if not is_difference(report):
        rows = [line for row in report["stacks"] for line in table.rows(row)]
        lines = [f"Updates: {report['source']}", *table.head(), *rows]
        print_line("\n".join(lines), sys.stderr if as_json else sys.stdout)
    return report


def _print(report: dict[str, Any], table: ErrorTable, out: Path, as_json: bool) -> None:
    """Print what comes after the rows: sums, notes, and the names of the files; of format diff the table as well.

    With `as_json` it goes to standard error, beside the JSON.
    """
    if is_difference(report):
        lines = [f"Updates: {report['source']}", *difference_table(report), *report_notes(report)]
    else:
        lines = [*table.total(report), *report_notes(report, table.prefix)]
    names = Counter(re.sub(r"-\d{5}\.", "-*.", path.name) for path in out.iterdir() if path.is_file())
    files = ", ".join(name if names[name] == 1 else f"{names[name]} {name}" for name in sorted(names))
    lines += wrapped(f"Files: {out}/ ({files})")
    print_line("\n".join(lines), sys.stderr if as_json else sys.stdout)
    if as_json:
        print_line(json.dumps(report, indent=1, allow_nan=False), sys.stdout)


def _prefix(args: argparse.Namespace, base: BaseModel) -> str:
    """The beginning of the names of modules, or of format kohya of all keys."""
    if args.prefix is not None:
        return str(args.prefix)
    return kohya_prefix(base.architecture) if args.format == "kohya" else ""


def _base(args: argparse.Namespace, catalogue: Catalogue) -> BaseModel:
    """The base model: its name from --base-name, --base, or the adapter that is the source; its class from a config."""
    name: str | None = args.base_name or args.base
    if name is None and (configs := [path for path in catalogue.files if path.name == CONFIG_FILE]):
        name = base_of(configs[0].parent)
    return BaseModel.of(name, [Path(path).expanduser() for path in (args.base, args.tuned, name) if path is not None])


def _tasks(args: argparse.Namespace) -> list[list[str | None]] | None:
    """Return the folder and the base of every adapter of --adapters, None without that flag."""
    if args.adapters is None:
        return None
    return [
        [f"{task}-{Path(path).resolve().name}", args.base_name or base_of(Path(path))]
        for task, path in enumerate(args.adapters)
    ]
