"""python -m rasa_theory.extract: from two checkpoints to an adapter that loads, with a report of what it misses.

Exit status: 0 all well, 2 bad input or usage, 130 interrupted; the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from rasa_theory import flags, style
from rasa_theory.console import (
    Parser,
    exit_status,
    naming_flags,
    output_folder,
    progress_bar,
    say_left_out,
    write_file,
)
from rasa_theory.descent import Callback
from rasa_theory.distributed import Processes
from rasa_theory.errors import InputError
from rasa_theory.exports import FORMATS, Modules
from rasa_theory.extract_report import extraction_csv, extraction_table, model_card
from rasa_theory.extraction import STORED, ExtractSettings, extract_stack
from rasa_theory.inputs import compute_device, compute_dtype
from rasa_theory.plotting import plot_extraction
from rasa_theory.preflight import Job, check, forecast
from rasa_theory.ranks import RankTarget, allocate_ranks
from rasa_theory.sources import Catalogue, LeftOut, StackSource, base_of
from rasa_theory.study import environment
from rasa_theory.workplace import Workplace

_UNSET = object()
_EMBEDDING = re.compile(r"embed|(?:\A|\.)w[tp]e\.weight\Z")
_ON_NO_MEMORY = "take fewer modules (--modules), --compute float32, or --memory, with which large stacks stay on disk"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return exit_status("rasa_theory.extract", lambda processes: _run(_parse(given), given, processes), _ON_NO_MEMORY)


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


def _job(args: argparse.Namespace) -> Job:
    """What the flags ask for. Raises InputError if that is nothing, or cannot be."""
    target = _target(args)
    with naming_flags(flags.NAMES):
        k = args.k if args.k is not _UNSET else (1 if target is None else 0)
        settings = ExtractSettings(
            args.rank, k, args.format, args.dtype, args.certificate, flags.solver_options(args), target
        )
        dtype, device = compute_dtype(args.compute), compute_device(args.device)
    catalogue = flags.given_source(args, alone=True).matching(args.modules)
    unnamed: list[StackSource] = []
    if args.adapters is None:
        catalogue, unnamed = _nameable(catalogue)
    modules = [_modules(s, args) for s in catalogue.stacks]
    return Job(catalogue, modules, settings, dtype, device, unnamed, _base(args, catalogue), _tasks(args), args.memory)


def _run(args: argparse.Namespace, given: list[str], processes: Processes) -> int:
    if not processes.alone:
        raise InputError("extract works in one process; start it without torchrun, or with --nproc-per-node 1")
    job = _job(args)
    check(job, None if args.dry_run else Path(args.out))
    text = sys.stderr if args.json else sys.stdout
    if args.dry_run:
        print(forecast(job, Path(args.out)), file=text)
        return 0
    out = output_folder(args.out)
    if out is None:
        raise InputError("--out none writes no adapter; name a folder")
    place = Workplace(out, job.plan())
    say_left_out(job.catalogue.left_out, "report.json")
    if place.finished:
        print(f"{out} is finished already; nothing is left to do", file=sys.stderr)
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    else:
        with place:
            found = _extracted(job, place, args.quiet)
            if found is None:
                return 130
            report = {
                "schema": 1, "command": ["python", "-m", "rasa_theory.extract", *given],
                "source": job.catalogue.source, "base": job.base, "plan": place.plan,
                "environment": environment(job.device, job.dtype), **found,
            }  # fmt: skip
            write_adapter(place, report)
    print(f"Updates: {report['source']}", file=text)
    print(extraction_table(report), file=text)
    print(f"Files: {out}/ ({', '.join(sorted(p.name for p in out.iterdir() if p.is_file()))})", file=text)
    if args.json:
        print(json.dumps(report, indent=1, allow_nan=False))
    return 0


def _modules(source: StackSource, args: argparse.Namespace) -> Modules:
    if args.adapters is not None:
        return Modules(tuple(f"{task}/{args.prefix}{source.name}" for task in range(source.layers)))
    return Modules.of(source.keys, source.transposed, args.prefix)


def _base(args: argparse.Namespace, catalogue: Catalogue) -> str | None:
    """What the adapter says that it belongs to: what is asked for, the base given, or that of the source's adapter."""
    given: str | None = args.base_name or args.base
    if given is None and (configs := [path for path in catalogue.files if path.name == "adapter_config.json"]):
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
            left_out.append(LeftOut(source.name, reason))
    if not kept:
        raise InputError(f"{catalogue.source}: no stack remains ({left_out[-1].name!r}: {left_out[-1].reason})")
    return dataclasses.replace(catalogue, stacks=kept, left_out=left_out), unnamed


def _extracted(job: Job, place: Workplace, quiet: bool) -> dict[str, list[dict[str, Any]]] | None:
    """What the report says of all stacks, those that are new written, and of what is left out; None if interrupted."""
    rows: list[dict[str, Any]] = []
    norms: dict[str, float | None] = {}
    stacks = job.catalogue.stacks
    try:
        ranks = place.note("ranks.json", lambda: _allocated(job, quiet))
        with progress_bar(len(stacks), "stacks", quiet) as show:
            for n, source in enumerate(stacks):
                row = place.row(n)
                if row is None:
                    show(n, f"{source.name}: reading")
                    stack = source.load(job.dtype, job.device)
                    extracted = extract_stack(stack, job.modules[n], job.settings, ranks[n], _told(show, n, source))
                    place.add(n, extracted)
                    row = extracted.row
                rows.append(row)
            for n, source in enumerate(job.unnamed):
                show(len(stacks), f"{source.name}: norm")
                norms[source.name] = place.note(f"norm-{n:05d}.json", functools.partial(_norm, source))
    except KeyboardInterrupt:
        done = sum(place.row(n) is not None for n in range(len(stacks)))
        print(
            f"interrupted; {done} of {len(stacks)} stacks are done, the same command goes on from there",
            file=sys.stderr,
        )
        return None
    except InputError:
        place.abandon()
        raise
    if not any(row["norm_squared"] for row in rows):
        place.clear()
        changed = [name for name, norm in norms.items() if norm]
        only = f"; only {changed[0]!r} has changed, which no adapter of these formats can hold" if changed else ""
        raise InputError(f"{job.catalogue.source}: every update is zero, there is nothing to extract{only}")
    left_out = [
        {"name": name, "reason": reason} | ({"norm_squared": norm} if (norm := norms.get(name)) is not None else {})
        for name, reason in job.catalogue.left_out
    ]
    return {"stacks": rows, "left_out": left_out}


def _norm(source: StackSource) -> float | None:
    """||M||^2 of a stack of which nothing is written; None if it cannot be read, or holds entries that are not finite.

    In the dtype of the file, so that it takes no more memory than need be.
    """
    try:
        return source.load(None, None).norm_squared
    except InputError:
        return None


def _told(show: Callable[[int, str], None], n: int, source: StackSource) -> Callback:
    return lambda progress: show(n, f"{source.name}: from {progress.start}, sweep {progress.sweep}")


def _allocated(job: Job, quiet: bool) -> Sequence[Sequence[int] | None]:
    """The rank of every layer of every stack where the settings have a target: spectra of all of them, first."""
    stacks, target = job.catalogue.stacks, job.settings.target
    if target is None:
        return [None] * len(stacks)
    spectra = []
    with progress_bar(len(stacks), "spectra", quiet) as show:
        for n, source in enumerate(stacks):
            show(n, source.name)
            stack = source.load(job.dtype, job.device)
            unchanged = torch.zeros(stack.layers, min(stack.shape), dtype=torch.float64)
            spectra.append(stack.singular_values() if stack.norm_squared > 0 else unchanged)
    ranks = allocate_ranks(spectra, [sum(source.shape) for source in stacks], target)
    if not any(map(any, ranks)):
        raise InputError(
            "the target leaves every layer rank 0: the updates are zero, or one term costs more than allowed"
        )
    return ranks


def write_adapter(place: Workplace, report: dict[str, Any]) -> None:
    """All final files, the report last, which says that the others are there; then the parts go."""
    out, figure = place.out, plot_extraction(report)
    place.finish(report["stacks"])
    write_file(out / "report.csv", lambda f: f.write(extraction_csv(report).encode()))
    write_file(out / "report.png", lambda f: style.save(figure, f))
    write_file(out / "README.md", lambda f: f.write(model_card(report).encode()))
    write_file(out / "report.json", lambda f: f.write((json.dumps(report, indent=1, allow_nan=False) + "\n").encode()))
    place.clear()


if __name__ == "__main__":
    sys.exit(main())
