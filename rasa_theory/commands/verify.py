"""The command `rasa verify` tries the laws around Theorem 3.1 on random instances of many families.

Exit status: 0 every law held, 1 a law failed, 2 bad input or usage, 130 interrupted (finished instances are tallied).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from rasa_theory.bounds import CERTIFICATES
from rasa_theory.commands.console import exit_status, naming_flags, output_folder, say_interrupted
from rasa_theory.commands.flags import with_examples
from rasa_theory.commands.parser import Parser
from rasa_theory.commands.progress import ProgressBar, print_line
from rasa_theory.common import InputError, environment, keeping_interrupts, write_file
from rasa_theory.distributed import Processes
from rasa_theory.solvers import SolverOptions
from rasa_theory.verification import (
    FAMILIES,
    Instance,
    Replay,
    Run,
    Subject,
    Tally,
    Trial,
    VerificationSettings,
    describe,
    instances_in_turn,
    load_replay,
    replay_path,
    results,
    run_trial,
    save_replay,
    shared_trials,
    suitable_jobs,
    table,
    trials,
    verdict_lines,
)

_NAME = "rasa verify"
_INSTANCES = 300
_SAMPLE_SECONDS = 5.0  # of a dry run, at most, and the instance in hand


def main(arguments: Sequence[str] | None = None, subject: Subject | None = None) -> int:
    """Run the command and return its exit status. `subject` is under test, the package itself by default."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    return exit_status(
        _NAME, lambda processes: _run(parse(words), words, subject, processes), "give --replay a smaller stack"
    )


def flag_parser() -> Parser:
    """Return the parser of the command's flags."""
    parser = Parser(
        prog="rasa verify",
        description="Try the laws around Theorem 3.1 on random instances: order of the bounds, nesting, known optima, "
        "invariances, monotone histories, reported errors.",
        epilog=with_examples(
            "A failing instance is written to --out, in a file that --replay tries again.",
            "verify",
        ),
    )
    add = parser.add_argument
    add("--instances", type=int, metavar="N", help=f"number of instances, of the families in turn ({_INSTANCES})")
    add("--seed", type=int, metavar="S", help="of everything random (0)")
    add("--families", metavar="A,B", help="only these (all); --list names them")
    add("--sweeps", type=int, metavar="N", help=f"maximum number of sweeps ({VerificationSettings().sweeps})")
    add("--certificate", choices=CERTIFICATES, help="which lower bounds to spend time on (closed)")
    add("--jobs", type=int, metavar="N", help="number of processes (one per processor if that is worth it)")
    add("--replay", metavar="FILE", help="try the laws again that failed on the instance in this .npz file")
    add("--dry-run", action="store_true", default=None, help="say what would be tried, and how long it takes")
    add("--list", action="store_true", help="say what the families and laws are")
    add(
        "--out",
        default="rasa-verify",
        metavar="DIR",
        help="folder for the files (default: %(default)s); none writes nothing",
    )
    add("--json", action="store_true", help="print the tally as JSON, everything else on standard error")
    add("--quiet", action="store_true", help="no progress bar")
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the flags of the command. Raises InputError for flags that do not go with --replay."""
    args = flag_parser().parse_args(arguments)
    for name in ("instances", "seed", "families", "jobs", "dry_run"):
        if args.replay is not None and getattr(args, name) is not None:
            raise InputError(f"--replay tries one instance; --{name.replace('_', '-')} does not go with it")
    args.instances = _INSTANCES if args.instances is None else args.instances
    args.seed = 0 if args.seed is None else args.seed
    return args


def _run(args: argparse.Namespace, arguments: list[str], subject: Subject | None, processes: Processes) -> int:
    if args.list:
        if processes.first:
            print_line(describe(), sys.stdout)
        return 0
    flags = {"sweeps": args.sweeps, "certificate": args.certificate}
    chosen = {name: value for name, value in flags.items() if value is not None}
    with naming_flags({}):
        settings = VerificationSettings(**chosen)
        SolverOptions(seed=args.seed)
    if args.replay is not None:
        if not processes.alone:
            raise InputError("--replay tries one instance; run one process")
        replay = load_replay(Path(args.replay), **chosen)
        settings = replay.settings
        instances = 1
        trials: Iterator[Trial] = (
            run_trial(one.instance, subject or Subject(), one.settings, one.laws) for one in [replay]
        )
    else:
        trials = _trials(args, settings, subject, processes)
        instances = args.instances

    if args.dry_run:
        if processes.first:
            print_line(_forecast(args, settings, processes), sys.stderr if args.json else sys.stdout)
        return 0
    out = None if args.replay is not None else processes.from_first(lambda: output_folder(args.out))
    tally = Tally()
    started = time.perf_counter()
    interrupted = False
    broken = False
    try:
        with keeping_interrupts(), ProgressBar(instances, "instances", args.quiet or not processes.first) as show:
            show(0, "")
            for trial in trials:
                file = _write_replay(trial, settings, out) if args.replay is None and processes.first else args.replay
                tally.add(trial, file)
                show(tally.instances, _done(trial.instance, tally))
    except KeyboardInterrupt:
        processes.board.tell_interrupted()
        interrupted = True
    except BrokenProcessPool:
        print_line(f"{_NAME}: a process died, of lack of memory perhaps; try --jobs 1", sys.stderr)
        interrupted = broken = True

    run = Run(
        command=["rasa", "verify", *arguments],
        settings=settings,
        seed=args.seed,
        instances=instances,
        environment=environment(torch.device("cpu"), torch.float64, processes.world_size),
        seconds=time.perf_counter() - started,
    )
    if processes.first:
        _report(results(tally, run), args.json, out, interrupted)
        if interrupted:
            say_interrupted(tally.instances, instances, "instances", out, goes_on=False)
    return 2 if broken else 130 if interrupted else 1 if tally.failures else 0


def _trials(
    args: argparse.Namespace, settings: VerificationSettings, subject: Subject | None, processes: Processes
) -> Iterator[Trial]:
    """All laws on the requested instances, of the families in turn.

    A `subject` is tested in this process. Processes that torchrun has started share the instances, in place of --jobs.

    Raises InputError for an impossible number or family.
    """
    for name in ("instances", "jobs"):
        if (number := getattr(args, name)) is not None and number < 1:
            raise InputError(f"--{name} must be at least 1, got {number}")
    keys = instances_in_turn(_families(args), args.instances, args.seed)
    if not processes.alone:
        if args.jobs is not None:
            raise InputError("--jobs starts processes, as torchrun has; give one of the two")
        return shared_trials(keys, settings, processes)
    return trials(keys, settings, suitable_jobs(args.instances) if args.jobs is None else args.jobs, subject)


def _families(args: argparse.Namespace) -> list[str]:
    """The families of --families, all without it. Raises InputError for an unknown one."""
    families = list(FAMILIES) if args.families is None else args.families.split(",")
    for name in families:
        if name not in FAMILIES:
            raise InputError(f"--families: {name!r} is none of {', '.join(FAMILIES)}")
    return families


def _forecast(args: argparse.Namespace, settings: VerificationSettings, processes: Processes) -> str:
    """What the run would try, and its seconds, by an instance of each family tried now, for some seconds at most."""
    families = _families(args)[: args.instances]
    started, tried = time.perf_counter(), 0
    sample = trials(instances_in_turn(families, len(families), args.seed), settings, 1)
    while time.perf_counter() - started < _SAMPLE_SECONDS and next(sample, None) is not None:
        tried += 1
    jobs = (args.jobs or suitable_jobs(args.instances)) if processes.alone else processes.world_size
    seconds = (time.perf_counter() - started) / tried * args.instances / min(jobs, args.instances)
    return (
        f"Would try the laws on instances: {args.instances}, of families: {len(families)}, in processes: {jobs}.\n"
        f"It takes about {max(1, seconds):.0f} s here, by the first {tried} tried now."
    )


def _done(instance: Instance, tally: Tally) -> str:
    (L, b, a), budget = instance.draw.values.shape, instance.draw.budget
    failed = f"; {len(tally.failures)} failed so far" if tally.failures else ""
    return f"{instance.family}, {L} x {b} x {a}, r = {budget.rank}, k = {budget.shared_rank}{failed}"


def _write_replay(trial: Trial, settings: VerificationSettings, out: Path | None) -> str | None:
    """Write the file that reproduces a failing trial. Returns its name, or None if there is none.

    If it cannot be written, a sentence is printed and the run goes on, so that the violation is not lost.
    """
    if out is None or not trial.failed:
        return None
    instance, folder = trial.instance, out / "failures"
    path = replay_path(instance, folder)
    try:
        output_folder(str(folder))
        write_file(path, lambda file: save_replay(Replay(instance, list(trial.failed), settings), file))
    except InputError as error:
        print_line(f"{_NAME}: {error}", sys.stderr)
        return None
    return str(path)


def _report(outcome: dict[str, Any], as_json: bool, out: Path | None, interrupted: bool) -> None:
    text = sys.stderr if as_json else sys.stdout
    encoded = json.dumps(outcome, indent=1, allow_nan=False)
    lines = [table(outcome)] if outcome["families"] else []
    lines += verdict_lines(outcome, interrupted)
    if out is not None:
        write_file(out / "verify.json", lambda file: file.write(f"{encoded}\n".encode()))
        lines.append(f"File: {out / 'verify.json'}")
    print_line("\n".join(lines), text)
    if as_json:
        print_line(encoded, sys.stdout)
