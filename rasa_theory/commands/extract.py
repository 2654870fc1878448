"""python -m rasa_theory.extract: from two checkpoints to an adapter that loads, with a report of what it misses.

Exit status: 0 all well, 2 bad input or usage, 130 interrupted; the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rasa_theory.bounds import RankTarget, allocate_ranks
from rasa_theory.commands import flags
from rasa_theory.commands.console import Parser, exit_status, naming_flags, output_folder, progress_bar, say_left_out
from rasa_theory.common import InputError, environment, write_file
from rasa_theory.distributed import Processes, balanced_shares
from rasa_theory.extraction import (
    FORMATS,
    STORED,
    ExtractionFolder,
    ExtractSettings,
    Job,
    check,
    extract_stack,
    extraction_csv,
    extraction_table,
    forecast,
    model_card,
)
from rasa_theory.formats import CONFIG_FILE, Exclusion, LeftOut, ModuleNames, base_of
from rasa_theory.plotting import plot_extraction, style
from rasa_theory.problem import compute_dtype
from rasa_theory.solvers import Callback
from rasa_theory.sources import Catalogue, StackSource

_UNSET = object()
_EMBEDDING = re.compile(r"embed|(?:\A|\.)w[tp]e\.weight\Z")
_ON_NO_MEMORY = "take fewer modules (--modules), --compute float32, or --memory, with which large stacks stay on disk"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return exit_status(
        "rasa_theory.extract",
        lambda processes: _run(_parse(given), given, processes),
        _ON_NO_MEMORY,
        "; stacks that were finished are in --out, and the same command goes on from there",
    )


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m rasa_theory.extract",
        description="Extract a LoRA or RaSA adapter from fine-tuned weights, with the error of every layer.",
        epilog=flags.with_examples(
            "Interrupted, it goes on where it was when the same command is given again.",
            "extract",
        ),
    )
    flags.add_sources(
        parser,
        source="instead of the two: a checkpoint that holds updates, tuned minus base",
        adapters="instead: LoRA adapters of one base, for PEFT, compressed together: one stack per module, over the "
        "adapters; an adapter of each goes into a folder of its own",
    )
    add = parser.add_argument
    add("--rank", type=_number_or_auto, default=16, metavar="R", help="rank budget r of a layer, or auto (%(default)s)")
    add("--energy", type=float, metavar="E", help="with --rank auto: keep this share of the squared norm")
    add("--error", type=float, metavar="E", help="with --rank auto: miss at most this share of the squared norm")
    add("--parameters", type=int, metavar="N", help="with --rank auto: spend at most so many numbers")
    add(
        "--k",
        type=_number_or_auto,
        default=_UNSET,
        metavar="K",
        help="ranks given to RaSA's pool; 0: LoRA alone; auto: the best of 1, 2, 4, .. (1; 0 with --rank auto)",
    )
    add(
        "--format",
        choices=FORMATS,
        default="lora",
        help="lora: the best LoRA of rank r, for PEFT; lora-exact-rasa: the RaSA solution as a LoRA of rank "
        "r - k + L k, for PEFT; rasa: the layout of its authors' fork of PEFT; diff: dense updates (%(default)s)",
    )
    add("--out", required=True, metavar="DIR", help="folder of the adapter")
    add("--dtype", choices=tuple(STORED), default="float32", help="of the files (%(default)s)")
    add("--compute", choices=("float64", "float32"), default="float64", help="dtype of the computation (%(default)s)")
    add("--prefix", default="", metavar="P", help="put before the names of modules, such as transformer.")
    add("--base-name", metavar="NAME", help="base_model_name_or_path in the adapter (what --base says)")
    flags.add_solver(parser)
    flags.add_running(parser)
    return parser.parse_args(arguments)


def _number_or_auto(text: str) -> int | None:
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor auto") from None


def _target(args: argparse.Namespace) -> RankTarget | None:
    """What --rank auto aims at. Raises InputError if that is not said, or said without it."""
    given = [flag for flag in ("energy", "error", "parameters") if getattr(args, flag) is not None]
    if args.rank is not None:
        if given:
            raise InputError(f"--{given[0]} goes with --rank auto, and nothing else")
        return None
    if len(given) != 1:
        raise InputError("--rank auto needs exactly one of --energy, --error and --parameters")
    if args.error is not None and not 0 <= args.error < 1:
        raise InputError(f"--error must be at least 0 and below 1, got {args.error}")
    with naming_flags(flags.NAMES):
        return RankTarget(1 - args.error if args.error is not None else args.energy, args.parameters)


def _job(args: argparse.Namespace, processes: Processes) -> Job:
    """What the flags ask for. Raises InputError if that is nothing, or cannot be."""
    target = _target(args)
    with naming_flags(flags.NAMES):
        k = args.k if args.k is not _UNSET else (1 if target is None else 0)
        settings = ExtractSettings(
            args.rank, k, args.format, args.dtype, args.certificate, flags.solver_options(args), target
        )
        dtype, device = compute_dtype(args.compute), flags.device(args, processes)
    catalogue = flags.given_source(args, alone=True).matching(args.modules)
    unnamed: list[StackSource] = []
    if args.adapters is None:
        catalogue, unnamed = _nameable(catalogue)
    modules = [_modules(s, args) for s in catalogue.stacks]
    return Job(catalogue, modules, settings, dtype, device, unnamed, _base(args, catalogue), _tasks(args), args.memory)


def _run(args: argparse.Namespace, given: list[str], processes: Processes) -> int:
    with processes.raise_together():
        job = _job(args, processes)
    processes.from_first(lambda: check(job, None if args.dry_run else Path(args.out)))
    text = sys.stderr if args.json else sys.stdout
    if args.dry_run:
        if processes.first:
            print(forecast(job, Path(args.out), processes.world_size), file=text)
        return 0
    out = processes.from_first(lambda: output_folder(args.out))
    if out is None:
        raise InputError("--out none writes no adapter; name a folder")
    processes = processes.with_long_timeout()
    with _entered(out, job, processes) as place:
        if processes.first:
            say_left_out(job.catalogue.left_out, "report.json")
        if place is None:
            report = _finished_before(out) if processes.first else {}
        elif not _extracted(job, place, processes, args.quiet):
            return 130
        else:
            about = {
                "schema": 1, "command": ["python", "-m", "rasa_theory.extract", *given],
                "source": job.catalogue.source, "base": job.base, "plan": place.plan,
                "environment": environment(job.device, job.dtype, processes.world_size),
            }  # fmt: skip
            report = processes.from_first(functools.partial(_written, job, place, about))
    if not processes.first:
        return 0
    print(f"Updates: {report['source']}", file=text)
    print(extraction_table(report), file=text)
    print(f"Files: {out}/ ({', '.join(sorted(p.name for p in out.iterdir() if p.is_file()))})", file=text)
    if args.json:
        print(json.dumps(report, indent=1, allow_nan=False))
    return 0


@contextlib.contextmanager
def _entered(out: Path, job: Job, processes: Processes) -> Iterator[ExtractionFolder | None]:
    """The folder, kept for this run by process 0; None if it is finished.

    All processes write their stacks there. Raises InputError as ExtractionFolder does, and if one of them does not see
    the folder.
    """
    with contextlib.ExitStack() as held:

        def enter() -> dict[str, Any] | None:
            place = ExtractionFolder(out, job.plan())
            return None if place.finished else held.enter_context(place).plan

        plan = processes.from_first(enter)
        if plan is None:
            yield None
            return
        with processes.raise_together():
            place = ExtractionFolder(out, plan)
            if not place.begun:
                raise InputError(
                    f"--out {out} is not the folder that process 0 sees; name one that all processes share"
                )
        yield place


def _finished_before(out: Path) -> dict[str, Any]:
    print(f"{out} is finished already; nothing is left to do", file=sys.stderr)
    report: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return report


def _modules(source: StackSource, args: argparse.Namespace) -> ModuleNames:
    if args.adapters is not None:
        return ModuleNames(tuple(f"{task}/{args.prefix}{source.name}" for task in range(source.layers)))
    return ModuleNames.of(source.keys, source.transposed, args.prefix)


def _base(args: argparse.Namespace, catalogue: Catalogue) -> str | None:
    """What the adapter says that it belongs to: what is asked for, the base given, or that of the source's adapter."""
    given: str | None = args.base_name or args.base
    if given is None and (configs := [path for path in catalogue.files if path.name == CONFIG_FILE]):
        given = base_of(configs[0].parent)
    return given


def _tasks(args: argparse.Namespace) -> list[list[str | None]] | None:
    """The folder and the base of every adapter, where several are compressed together."""
    if args.adapters is None:
        return None
    return [
        [f"{task}-{Path(path).resolve().name}", args.base_name or base_of(Path(path))]
        for task, path in enumerate(args.adapters)
    ]


def _nameable(catalogue: Catalogue) -> tuple[Catalogue, list[StackSource]]:
    """The stacks whose layers are weights of modules; and the others, which move to `left_out`."""
    kept: list[StackSource] = []
    unnamed: list[StackSource] = []
    left_out = list(catalogue.left_out)
    for source in catalogue.stacks:
        reason = None
        if len(source.keys) != source.layers:
            reason = "one tensor with three axes, whose layers are no modules"
        elif strange := [key for key in source.keys if not key.endswith(".weight")]:
            reason = f"{strange[0]!r} is not the weight of a module, so no adapter can name it"
        elif _EMBEDDING.search(source.keys[0]):
            reason = "an embedding, for which adapters have other tensors"
        if reason is None:
            kept.append(source)
        else:
            unnamed.append(source)
            left_out.append(LeftOut(source.name, reason, Exclusion.NO_MODULE))
    if not kept:
        raise InputError(f"{catalogue.source}: no stack remains ({left_out[-1].name!r}: {left_out[-1].reason})")
    return dataclasses.replace(catalogue, stacks=kept, left_out=left_out), unnamed


def _extracted(job: Job, place: ExtractionFolder, processes: Processes, quiet: bool) -> bool:
    """Write the part and the row of every stack that is new, and the norms of what is left out; False if interrupted.

    The stacks are dealt over the processes as wholes, by the cost of their SVDs; each reads those that it has, and
    nothing else. Where one fails, the others end with the stack that they are at.
    """
    stacks, mine = job.catalogue.stacks, processes.process
    try:
        ranks = _ranks(job, place, processes, quiet or not processes.first)
        left = processes.from_first(lambda: [n for n in range(len(stacks)) if place.row(n) is None])
        share = _shares([stacks[n] for n in left], processes)[mine]
        with (
            processes.raise_together(),
            progress_bar(len(stacks), "stacks", quiet or not processes.first) as show,
        ):
            for n in (left[i] for i in share):
                if processes.ending:
                    break
                source = stacks[n]
                show(place.done, f"{source.name}: reading")
                stack = source.load(job.dtype, job.device)
                place.add(n, extract_stack(stack, job.modules[n], job.settings, ranks[n], _told(show, place, source)))
            for n in _shares(job.unnamed, processes)[mine]:
                if processes.ending:
                    break
                show(place.done, f"{job.unnamed[n].name}: norm")
                place.note(_norm_of(n), functools.partial(_norm, job.unnamed[n]))
    except KeyboardInterrupt:
        processes.tell_interrupted()
        if processes.first:
            print(
                f"interrupted; {place.done} of {len(stacks)} stacks are done, the same command goes on from there",
                file=sys.stderr,
            )
        return False
    except InputError:
        if processes.first:
            place.abandon()
        raise
    return True


def _shares(sources: Sequence[StackSource], processes: Processes) -> list[list[int]]:
    return balanced_shares([s.layers * math.prod(s.shape) * min(s.shape) for s in sources], processes.world_size)


def _norm_of(n: int) -> str:
    return f"norm-{n:05d}.json"


def _written(job: Job, place: ExtractionFolder, about: dict[str, Any]) -> dict[str, Any]:
    """The report, of rows and norms that lie in the folder, once it is written with all final files.

    Raises InputError if there is nothing to write.
    """
    rows = [row for n in range(len(job.catalogue.stacks)) if (row := place.row(n)) is not None]
    norms = {source.name: place.noted(_norm_of(n)) for n, source in enumerate(job.unnamed)}
    if not any(row["norm_squared"] for row in rows):
        place.clear()
        changed = [name for name, norm in norms.items() if norm]
        only = f"; only {changed[0]!r} has changed, which no adapter of these formats can hold" if changed else ""
        raise InputError(f"{job.catalogue.source}: every update is zero, there is nothing to extract{only}")
    left_out = [
        {"name": name, "reason": reason} | ({"norm_squared": norm} if (norm := norms.get(name)) is not None else {})
        for name, reason in job.catalogue.left_out
    ]
    report = about | {"stacks": rows, "left_out": left_out}
    write_adapter(place, report)
    return report


def _norm(source: StackSource) -> float | None:
    """||M||^2 of a stack of which nothing is written; None if it cannot be read, or holds entries that are not finite.

    In the dtype of the file, so that it takes no more memory than need be.
    """
    try:
        return source.load(None, None).norm_squared
    except InputError:
        return None


def _told(show: Callable[[int, str], None], place: ExtractionFolder, source: StackSource) -> Callback:
    return lambda progress: show(place.done, f"{source.name}: from {progress.start}, sweep {progress.sweep}")


def _ranks(job: Job, place: ExtractionFolder, processes: Processes, quiet: bool) -> Sequence[Sequence[int] | None]:
    """The rank of every layer of every stack where the settings have a target, decided once, by all spectra.

    Raises InputError if the target leaves nothing.
    """
    name = "ranks.json"
    found: Sequence[Sequence[int] | None] | None = processes.from_first(lambda: place.noted(name))
    if found is None:
        spectra = [] if job.settings.target is None else _spectra(job, processes, quiet)
        found = processes.from_first(lambda: place.note(name, lambda: _allocated(job, spectra)))
    assert found is not None
    return found


def _spectra(job: Job, processes: Processes, quiet: bool) -> list[Tensor]:
    """The singular values of all stacks, (L, min(b, a)) each; every process takes those of its share."""
    stacks, found = job.catalogue.stacks, {}
    share = _shares(stacks, processes)[processes.process]
    with processes.raise_together(), progress_bar(len(share), "spectra", quiet) as show:
        for done, n in enumerate(share):
            if processes.ending:
                break
            show(done, stacks[n].name)
            stack = stacks[n].load(job.dtype, job.device)
            unchanged = torch.zeros(stack.layers, min(stack.shape), dtype=torch.float64)
            found[n] = stack.spectra.singular_values().cpu() if stack.norm_squared > 0 else unchanged
    of_all = {n: spectrum for one in processes.all_gather_objects(found) for n, spectrum in one.items()}
    return [of_all[n] for n in range(len(stacks))]


def _allocated(job: Job, spectra: Sequence[Tensor]) -> Sequence[Sequence[int] | None]:
    stacks, target = job.catalogue.stacks, job.settings.target
    if target is None:
        return [None] * len(stacks)
    ranks = allocate_ranks(spectra, [sum(source.shape) for source in stacks], target)
    if not any(map(any, ranks)):
        raise InputError(
            "the target leaves every layer rank 0: the updates are zero, or one term costs more than allowed"
        )
    return ranks


def write_adapter(place: ExtractionFolder, report: dict[str, Any]) -> None:
    """All final files, the report last, which says that the others are there; then the parts go."""
    out, figure = place.out, plot_extraction(report)
    place.finish(report["stacks"])
    write_file(out / "report.csv", lambda f: f.write(extraction_csv(report).encode()))
    write_file(out / "report.png", lambda f: style.save(figure, f))
    write_file(out / "README.md", lambda f: f.write(model_card(report).encode()))
    write_file(out / "report.json", lambda f: f.write((json.dumps(report, indent=1, allow_nan=False) + "\n").encode()))
    place.clear()
