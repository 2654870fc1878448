"""The command `rasa reconstruct` compares LoRA and RaSA of one budget on fine-tuning updates.

Exit status: 0 all well, 1 a checked law failed, 2 bad input or usage, 130 interrupted (finished stacks are written).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rasa_theory.bounds import CERTIFICATES, check_certificate
from rasa_theory.commands import flags
from rasa_theory.commands.console import (
    exit_status,
    leaving_no_empty_folder,
    naming_flags,
    output_folder,
    say_interrupted,
    say_left_out,
)
from rasa_theory.commands.parser import Parser
from rasa_theory.commands.progress import ProgressBar, RowPrinter, print_line, terminal_width
from rasa_theory.common import InputError, occupied, wrapped
from rasa_theory.distributed import Processes
from rasa_theory.formats import Exclusion
from rasa_theory.problem import RankBudget, check_memory, compute_dtype, least_memory
from rasa_theory.reconstruction import (
    SEARCHING,
    WEIGHTS,
    ResultsFolder,
    StudyJob,
    StudyProgress,
    StudySettings,
    StudyState,
    StudyTable,
    explanation_lines,
    run_study,
    stacks_left,
    take_up,
    verdict_lines,
)
from rasa_theory.sources import DEFAULT, Catalogue, synthetic_catalogue

_PAGE = "docs/guides/reconstruct.md"
_SYNTHETIC = {"layers": 6, "shape": (384, 384), "spectrum": "power:0.7", "overlap": 0.0}
_ON_NO_MEMORY = (
    "take fewer or smaller stacks (--modules), --dtype float32, or --memory, with which large ones stay on disk; "
    "--dry-run says how much a run needs"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    return exit_status(
        "rasa reconstruct",
        lambda processes: _run(parse(words), words, processes),
        _ON_NO_MEMORY,
        "; stacks that were finished are in --out, and the same command goes on from there",
    )


def flag_parser() -> Parser:
    """Return the parser of the command's flags."""
    parser = Parser(
        prog="rasa reconstruct",
        description="Reconstruct fine-tuning updates by LoRA and by RaSA at the same budget of ranks.",
        epilog=flags.with_examples(
            "Errors are squared Frobenius norms, summed over layers. Files go to --out after every finished part.",
            "reconstruct",
        ),
    )
    flags.add_sources(
        parser,
        source=f"instead of the two: updates (tuned minus base, not weights): {DEFAULT} (default), synthetic, a "
        ".safetensors, .npy or .npz file, a directory of safetensors, or the folder of a PEFT LoRA adapter",
        adapters="instead: PEFT LoRA adapters of one base; one stack per module, over the adapters",
    )
    add = parser.add_argument
    add("--rank", type=int, default=8, metavar="R", help="rank budget r of a layer (default: %(default)s)")
    add(
        "--k",
        type=flags.whole_numbers,
        default=(1,),
        metavar="K",
        help="ranks of a layer that go to the pool; 0,1,2 is a path (1)",
    )
    add("--weight", choices=WEIGHTS, default="none", help="layer: scale every layer's update to unit norm first")
    flags.add_solver(parser)
    add(
        "--seeds",
        type=int,
        default=5,
        metavar="N",
        help="random attempts at the iteration count (default: %(default)s)",
    )
    add(
        "--dtype",
        choices=("float64", "float32"),
        default="float64",
        help="dtype of the computation (default: %(default)s)",
    )
    add(
        "--tf32",
        action="store_true",
        help="float32 products may round to TF32 on CUDA, final errors do not; does nothing on the CPU",
    )
    add(
        "--out",
        default="rasa-results",
        metavar="DIR",
        help="folder for the results (default: %(default)s); none writes nothing",
    )
    add("--overwrite", action="store_true", help="replace what another reconstruction has left in the folder")
    add("--verbose", action="store_true", help="say of every row where the solver started and why it stopped")
    flags.add_running(parser)
    synthetic = parser.add_argument_group("with --source synthetic")
    synthetic.add_argument("--layers", type=int, metavar="L", help="layers (6)")
    synthetic.add_argument("--shape", type=_shape, metavar="B,A", help="shape of a layer (384,384)")
    synthetic.add_argument("--spectrum", metavar="S", help="flat, power:P (j^-P) or exp:C (power:0.7)")
    synthetic.add_argument("--overlap", type=float, metavar="X", help="0: own singular bases (default), 1: common ones")
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the flags of the command. Raises InputError for flags that need --source synthetic."""
    args = flag_parser().parse_args(arguments)
    for name, default in _SYNTHETIC.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif args.source != "synthetic":
            raise InputError(f"--{name} goes with --source synthetic, and nothing else")
    return args


def _shape(text: str) -> tuple[int, int]:
    try:
        b, a = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape such as 384,384") from None
    return b, a


def _run(args: argparse.Namespace, words: list[str], processes: Processes) -> int:
    with naming_flags(flags.NAMES):
        settings = _settings(args, processes)
        dtype = compute_dtype(args.dtype)
        device = flags.selected_device(args, processes)
    with processes.raise_together():
        whole = _catalogue(args)
    synthetic = {name: getattr(args, name) for name in _SYNTHETIC} if args.source == "synthetic" else None
    catalogue = whole.matching(args.modules).of_rank(args.rank)
    job = StudyJob(catalogue, settings, dtype, device, args.tf32, synthetic, args.memory)
    _check_stacks(job)
    text = sys.stderr if args.json else sys.stdout
    if args.dry_run:
        if processes.first:
            print_line(job.forecast(processes.world_size), text)
        return 0

    processes.from_first(lambda: catalogue.check_changed("there is nothing to reconstruct"))
    if processes.first:
        say_left_out([one for one in catalogue.left_out if one.kind is not Exclusion.UNSELECTED], "results.json")
    with leaving_no_empty_folder(args.out), contextlib.ExitStack() as locks:
        out = processes.from_first(lambda: output_folder(args.out, flags.named_sources(args)))
        folder = None if out is None else ResultsFolder(out, job.plan())
        if folder is not None:
            processes.from_first(lambda: _enter(folder, locks, args.overwrite))
        return _run_in(folder, job, words, processes, args)


def _enter(folder: ResultsFolder, locks: contextlib.ExitStack, overwrite: bool) -> None:
    """Lock the folder. Raises InputError if another run has locked it, or if it holds another reconstruction."""
    locks.enter_context(folder)
    if not overwrite and (conflict := folder.conflict()):
        raise occupied(conflict)


def _run_in(
    folder: ResultsFolder | None, job: StudyJob, words: list[str], processes: Processes, args: argparse.Namespace
) -> int:
    """Run the study, or what is left of it, in this folder; return the exit status."""
    state = take_up(job, ["rasa", "reconstruct", *words], folder, args.overwrite, processes)
    interrupted = False
    try:
        _study(job, state, folder, processes, args)
    except KeyboardInterrupt:
        interrupted = True
    if processes.first:
        out = None if folder is None else folder.out
        _report(state.results, interrupted, out, args)
        if interrupted:
            finished = [row for row in state.results["stacks"] if len(row["runs"]) == len(job.settings.ks)]
            say_interrupted(len(finished), len(job.catalogue.stacks), "stacks", out)
    return 130 if interrupted else 1 if state.results["theorem_3_1"] == "violated" else 0


def _settings(args: argparse.Namespace, processes: Processes) -> StudySettings:
    """Return the settings of the study. Raises InputError for values out of range."""
    solver = flags.solver_options(args)
    settings = StudySettings(args.rank, args.k, solver, args.certificate, args.seeds, args.weight)
    check_certificate(args.certificate, processes.alone)
    return settings


def _catalogue(args: argparse.Namespace) -> Catalogue:
    """Open the source with all its stacks. Raises InputError as `flags.open_catalogue` and `synthetic_catalogue` do."""
    if args.source != "synthetic":
        return flags.open_catalogue(args, DEFAULT)
    flags.check_sources(args)
    if args.memory is not None:
        raise InputError("--memory goes with files; a synthetic stack is made in memory as a whole")
    with naming_flags(flags.NAMES):
        return synthetic_catalogue(args.layers, args.shape, args.spectrum, args.overlap, args.seed)


def _check_stacks(job: StudyJob) -> None:
    """Raise InputError if the rank does not fit a stack, or if a stack needs more memory than --memory allows."""
    for source in job.catalogue.stacks:
        RankBudget(job.settings.rank, 0).check_fits(source)
    if job.memory is not None:
        exact = job.settings.exact
        largest = max(job.catalogue.stacks, key=lambda source: least_memory(source, exact(source)))
        with naming_flags(flags.NAMES):
            check_memory(largest, job.memory, exact(largest))


def _study(
    job: StudyJob, state: StudyState, folder: ResultsFolder | None, processes: Processes, args: argparse.Namespace
) -> None:
    """Run the study with a bar of progress, and print every row of the table when it is finished."""
    settings, results = job.settings, state.results
    names = [source.name for source in job.catalogue.stacks]
    table = StudyTable(names, settings.seeds, terminal_width(), args.verbose)
    head = [f"Updates: {results['source']}; rank budget {settings.rank}", *table.head()]
    printer = RowPrinter(head, args.json)
    tasks = len(stacks_left(job, state)) * sum(settings.tasks(k) for k in settings.ks)
    with ProgressBar(tasks, "tasks", args.quiet or not processes.first) as progress:

        def show(row: dict[str, Any], run: dict[str, Any]) -> None:
            if processes.first:
                printer.print(table.rows(row, run), progress)

        if results["stacks"] and folder is not None and processes.first:
            taken = f"{len(results['stacks'])} of {len(names)} stacks"
            print_line(f"{taken} were finished before and are taken up from {folder.out}", sys.stderr)
        for row in results["stacks"]:
            for run in row["runs"]:
                show(row, run)
        run_study(
            job, state, folder, processes, lambda told: progress(told.tasks_done, progress_line(told)), finished=show
        )


def _report(results: dict[str, Any], interrupted: bool, out: Path | None, args: argparse.Namespace) -> None:
    """Print what the table means, the verdict, the files, and where to go next; with --json also the results.

    With --json all the rest is on standard error.
    """
    if results["stacks"]:
        lines = [*explanation_lines(results, terminal_width()), *verdict_lines(results, interrupted)]
        lines += wrapped(f"Files: {out}/ ({', '.join(ResultsFolder.FILES)})") if out is not None else []
        lines += wrapped(f"Next: {_next(args, out)}.") if not interrupted else []
        print_line("\n".join(lines), sys.stderr if args.json else sys.stdout)
    if args.json:
        print_line(json.dumps(results, indent=1, allow_nan=False), sys.stdout)


def _next(args: argparse.Namespace, out: Path | None) -> str:
    """What a reader of the table may want: a closer limit, the figure, the page."""
    closest, steps = CERTIFICATES[-1], []
    if args.certificate != closest:
        steps.append(f"--certificate {closest} --out OTHER for a closer limit (minutes a row)")
    if out is not None and args.seeds > 0:
        steps.append("the random starts in iterations.png")
    return "; ".join([*steps, f"every word in {_PAGE}"])


def progress_line(progress: StudyProgress) -> str:
    """One line for the progress bar: stack, k, current task, its step, and the error there."""
    valued, step = "error", f"sweep {progress.sweep}"
    if progress.doing == SEARCHING:
        valued, step = "lowest error", f"step {progress.sweep} of {progress.max_sweeps}"
    elif progress.doing.endswith("floor"):
        valued, step = "at", f"iteration {progress.sweep}"
    value = "" if progress.ratio is None else f", {valued} {progress.ratio:.4f} e_lora"
    return f"{progress.stack}, k = {progress.k}: {progress.doing}, {step}{value}"
