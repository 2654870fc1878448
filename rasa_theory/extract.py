"""python -m rasa_theory.extract: from two checkpoints to an adapter that loads, with a report of what it misses.

Exit status: 0 all well, 2 bad input or usage, 130 interrupted; the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from rasa_theory import linalg
from rasa_theory.bounds import CERTIFICATES
from rasa_theory.console import (
    Parser,
    exit_status,
    memory_size,
    naming_flags,
    output_folder,
    progress_bar,
    say_left_out,
    write_file,
)
from rasa_theory.descent import Callback
from rasa_theory.errors import InputError
from rasa_theory.exports import FORMATS, Modules
from rasa_theory.extract_report import extraction_csv, extraction_table, model_card
from rasa_theory.extraction import STORED, ExtractSettings, extract_stack
from rasa_theory.inputs import compute_device, compute_dtype
from rasa_theory.plotting import plot_extraction
from rasa_theory.problem import RankBudget, check_memory
from rasa_theory.ranks import RankTarget, allocate_ranks
from rasa_theory.rasa import SolverOptions
from rasa_theory.sources import Catalogue, LeftOut, StackSource, base_of, open_source
from rasa_theory.starts import STARTS
from rasa_theory.study import environment
from rasa_theory.workplace import Workplace, identity

_FLAGS = {"max_sweeps": "sweeps", "max_cancellation": "max-cancellation", "shared_rank": "k"}
_UNSET = object()
_EMBEDDING = re.compile(r"embed|(?:\A|\.)w[tp]e\.weight\Z")
_PROBLEMS = 2  # said of many
_ON_NO_MEMORY = "take fewer modules (--modules), --compute float32, or --memory, with which large stacks stay on disk"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return exit_status("rasa_theory.extract", lambda: _run(_parse(given), given), _ON_NO_MEMORY)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m rasa_theory.extract",
        description="Extract a LoRA or RaSA adapter from fine-tuned weights, with the error of every layer.",
        epilog="Interrupted, it goes on where it was when the same command is given again.",
    )
    add = parser.add_argument
    add("--base", metavar="P", help="a checkpoint before fine-tuning: a .safetensors file or a directory of them")
    add("--tuned", metavar="P", help="the checkpoint after it")
    add("--source", metavar="S", help="instead of the two: a checkpoint that holds updates, tuned minus base")
    add(
        "--adapters",
        nargs="+",
        metavar="DIR",
        help="instead: LoRA adapters of one base, for PEFT, compressed together: one stack per module, over the "
        "adapters; an adapter of each goes into a folder of its own",
    )
    add("--modules", action="append", default=[], metavar="GLOB", help="keep the stacks whose name matches; repeatable")
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
    add("--start", choices=("best", *STARTS), default="best", help="where the solver starts (%(default)s: a race)")
    add("--certificate", choices=CERTIFICATES, default="closed", help="floors up to this kind (%(default)s)")
    add("--sweeps", type=int, default=SolverOptions.max_sweeps, metavar="N", help="at most so many (%(default)s)")
    add("--rtol", type=float, default=SolverOptions.rtol, metavar="X", help="stop below this gain (%(default)s)")
    add("--seed", type=int, default=0, metavar="S", help="of everything random (%(default)s)")
    add("--device", default="auto", help="auto (cuda, else cpu), cpu, cuda:1, ..")
    add("--memory", type=memory_size, metavar="SIZE", help="such as 2GiB: larger stacks stay in their files")
    add("--json", action="store_true", help="print the report as JSON, everything else on standard error")
    add("--quiet", action="store_true", help="no progress bar")
    add("--dry-run", action="store_true", help="only say what would be extracted, and how large it is")
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
    with naming_flags(_FLAGS):
        return RankTarget(1 - args.error if args.error is not None else args.energy, args.parameters)


def _run(args: argparse.Namespace, given: list[str]) -> int:
    target = _target(args)
    with naming_flags(_FLAGS):
        solver = SolverOptions(start=args.start, max_sweeps=args.sweeps, rtol=args.rtol, seed=args.seed)
        k = args.k if args.k is not _UNSET else (1 if target is None else 0)
        settings = ExtractSettings(args.rank, k, args.format, args.dtype, args.certificate, solver, target)
        dtype, device = compute_dtype(args.compute), compute_device(args.device)
    catalogue = _catalogue(args)
    modules = [_modules(s, args) for s in catalogue.stacks]
    _check(catalogue, modules, settings, args)
    text = sys.stderr if args.json else sys.stdout
    if args.dry_run:
        print(_plan(catalogue, settings, dtype), file=text)
        return 0
    out = output_folder(args.out)
    if out is None:
        raise InputError("--out none writes no adapter; name a folder")
    say_left_out(catalogue.left_out, "report.json")
    place = Workplace(out, _plan_of(catalogue, modules, settings, args))
    command = ["python", "-m", "rasa_theory.extract", *given]
    if place.finished:
        print(f"{out} is finished already; nothing is left to do", file=sys.stderr)
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    else:
        try:
            rows = _extracted(catalogue, modules, settings, place, dtype, device, args.quiet)
        except InputError:
            place.abandon()
            raise
        if rows is None:
            return 130
        if not any(row["norm_squared"] for row in rows):
            place.clear()
            raise InputError(f"{catalogue.source}: every update is zero, there is nothing to extract")
        report = {
            "schema": 1, "command": command, "source": catalogue.source,
            "base": place.plan["settings"]["base"], "plan": place.plan,
            "environment": environment(device, dtype), "stacks": rows,
            "left_out": [{"name": name, "reason": reason} for name, reason in catalogue.left_out],
        }  # fmt: skip
        write_adapter(place, report)
    print(extraction_table(report), file=text)
    print(f"Files: {out}/ ({', '.join(sorted(p.name for p in out.iterdir() if p.is_file()))})", file=text)
    if args.json:
        print(json.dumps(report, indent=1, allow_nan=False))
    return 0


def _catalogue(args: argparse.Namespace) -> Catalogue:
    if (args.base is None) != (args.tuned is None):
        raise InputError("--base and --tuned go together: name both checkpoints")
    if sum(given is not None for given in (args.base, args.source, args.adapters)) != 1:
        raise InputError("give --base and --tuned, two checkpoints, or --source, one that holds updates, or --adapters")
    if args.adapters is not None:
        found = open_source("", adapters=args.adapters, memory=args.memory)
        return found.matching(args.modules)
    if args.source is not None:
        found = open_source(args.source, memory=args.memory, alone=True)
    else:
        found = open_source("", base=args.base, tuned=args.tuned, memory=args.memory, alone=True)
    return _nameable(found.matching(args.modules))


def _modules(source: StackSource, args: argparse.Namespace) -> Modules:
    if args.adapters is not None:
        return Modules(tuple(f"{task}/{args.prefix}{source.name}" for task in range(source.layers)))
    return Modules.of(source.keys, source.transposed, args.prefix)


def _tasks(args: argparse.Namespace) -> list[list[str | None]] | None:
    """The folder and the base of every adapter, where several are compressed together."""
    if args.adapters is None:
        return None
    return [
        [f"{task}-{Path(path).resolve().name}", args.base_name or base_of(Path(path))]
        for task, path in enumerate(args.adapters)
    ]


def _nameable(catalogue: Catalogue) -> Catalogue:
    """The stacks whose layers are weights of modules; the others move to `left_out`."""
    kept: list[StackSource] = []
    left_out = list(catalogue.left_out)
    for source in catalogue.stacks:
        reason = None
        if len(source.keys) != source.layers:
            reason = "one tensor with three axes, whose layers are no modules"
        elif unnamed := [key for key in source.keys if not key.endswith(".weight")]:
            reason = f"{unnamed[0]!r} is not the weight of a module, so no adapter can name it"
        elif _EMBEDDING.search(source.keys[0]):
            reason = "an embedding, for which adapters have other tensors"
        if reason is None:
            kept.append(source)
        else:
            left_out.append(LeftOut(source.name, reason))
    if not kept:
        raise InputError(f"{catalogue.source}: no stack remains ({left_out[-1].name!r}: {left_out[-1].reason})")
    return dataclasses.replace(catalogue, stacks=kept, left_out=left_out)


def _check(
    catalogue: Catalogue, modules: Sequence[Modules], settings: ExtractSettings, args: argparse.Namespace
) -> None:
    """All that can be known to fail before anything is read, in one sentence."""
    problems = []
    for source in catalogue.stacks:
        try:
            RankBudget(settings.rank or 1, 0).check_fits(source)
            if args.memory is not None:
                check_memory(source, args.memory)
        except InputError as error:
            problems.append(str(error))
    if settings.format == "rasa":
        kinds = [m.kind.replace(".", "__") for m in modules]
        problems += [f"two stacks are of the kind {k!r}, which has one pool; keep one with --modules"
                     for k in sorted({k for k in kinds if kinds.count(k) > 1})]  # fmt: skip
    if args.adapters is not None and settings.format not in ("lora", "lora-exact-rasa"):
        problems.append(f"format {settings.format} is for one model; write adapters as lora or lora-exact-rasa")
    elif settings.format == "diff" and (turned := [s.name for s in catalogue.stacks if _unclear(catalogue, s)]):
        problems.append(
            f"{turned[0]!r} may be stored transposed: it is called like a Conv1D, but the adapter's fan_in_fan_out is "
            "false; set that to true if it is one, or write another --format"
        )
    if not args.dry_run and settings.target is None:
        problems += _room(Path(args.out), _bytes(catalogue, settings), settings)
    if problems:
        more = f"; and {len(problems) - _PROBLEMS} more of this kind" if len(problems) > _PROBLEMS else ""
        raise InputError("; ".join(problems[:_PROBLEMS]) + more)


def _unclear(catalogue: Catalogue, source: StackSource) -> bool:
    """Whether the stack comes from factors of what is called like a Conv1D, and the adapter does not say it is one."""
    adapter = any(path.name == "adapter_config.json" for path in catalogue.files)
    called = source.keys[0].removesuffix(".weight").endswith(("c_attn", "q_attn", "c_fc", "c_proj"))
    return adapter and called and not source.transposed


def _room(out: Path, needed: int, settings: ExtractSettings) -> list[str]:
    """The sentence that says that the disk is too small, if it is: for the parts and the whole, less what is there."""
    parent = out
    while not parent.exists():
        parent = parent.parent
    there = sum(file.stat().st_size for file in out.rglob("*.safetensors")) if out.is_dir() else 0
    wanted, free = (1 if settings.format == "diff" else 2) * needed - there, shutil.disk_usage(parent).free
    if wanted <= free:
        return []
    return [f"--out {out} needs {wanted / 2**30:.3g} GiB, of which {free / 2**30:.3g} GiB are free; name another disk"]


def _bytes(catalogue: Catalogue, settings: ExtractSettings) -> int:
    """About how large the adapter will be."""
    numbers = 0
    for s in catalogue.stacks:
        L, (b, a) = s.layers, s.shape
        r = min(b, a) if settings.rank is None else settings.rank  # at most
        k = r if settings.k is None else settings.k
        rank = r - k + L * k if settings.format == "lora-exact-rasa" else r
        numbers += L * (b * a if settings.format == "diff" else rank * (b + a))
    if settings.target is not None and settings.target.parameters is not None:
        numbers = min(numbers, settings.target.parameters)
    return numbers * STORED[settings.dtype].itemsize


def _plan(catalogue: Catalogue, settings: ExtractSettings, dtype: torch.dtype) -> str:
    lines, largest = [f"Source {catalogue.source}. Would extract, format {settings.format}:"], 0
    for s in catalogue.stacks:
        L, (b, a) = s.layers, s.shape
        size = L * b * a * dtype.itemsize
        largest = max(largest, s.memory(dtype, settings.exact(s.shape)))
        turned = ", stored transposed" if s.transposed else ""
        lines.append(f"  {s.name}: {L} x {b} x {a}{turned} ({size / 2**20:.1f} MiB)")
    lines.append(
        f"r = {_said(settings.rank)}, k = {_said(settings.k)}; the adapter takes at most about "
        f"{_bytes(catalogue, settings) / 2**20:.1f} MiB"
    )
    if exact := [s for s in catalogue.stacks if settings.exact(s.shape)]:
        lines.append(
            f"Exact SVDs take up to about {_svd_seconds(exact):.0f} s here, by one timed now; the solver comes on top."
        )
    lines.append(f"One stack is in memory at a time: about {largest / 2**20:.0f} MiB at most, beside the libraries.")
    lines += [f"  left out: {name}: {reason}" for name, reason in catalogue.left_out]
    return "\n".join(lines)


def _base(args: argparse.Namespace, catalogue: Catalogue) -> str | None:
    """What the adapter says that it belongs to: what is asked for, the base given, or that of the source's adapter."""
    given: str | None = args.base_name or args.base
    if given is None and (configs := [path for path in catalogue.files if path.name == "adapter_config.json"]):
        given = base_of(configs[0].parent)
    return given


def _said(number: int | None) -> str:
    return "auto" if number is None else str(number)


def _svd_seconds(sources: Sequence[StackSource]) -> float:
    """From one SVD of at most 512 x 512, by the cubes of the sizes; larger ones are up to three times faster."""
    m = min(512, max(min(s.shape) for s in sources))
    matrix = torch.randn(m, m, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    began = time.perf_counter()
    linalg.svd(matrix)
    return (time.perf_counter() - began) * sum(s.layers * math.prod(s.shape) * min(s.shape) for s in sources) / m**3


def _plan_of(
    catalogue: Catalogue, modules: Sequence[Modules], settings: ExtractSettings, args: argparse.Namespace
) -> dict[str, Any]:
    """What two runs must have in common to share a folder."""
    return {
        "inputs": [identity(path) for path in catalogue.files],
        "settings": settings.plain() | {"compute": args.compute, "base": _base(args, catalogue), "tasks": _tasks(args)},
        "stacks": [
            {"name": s.name, "shape": list(s.shape), "transposed": s.transposed, "modules": list(m.names)}
            for s, m in zip(catalogue.stacks, modules, strict=True)
        ],
    }


def _extracted(
    catalogue: Catalogue,
    modules: Sequence[Modules],
    settings: ExtractSettings,
    place: Workplace,
    dtype: torch.dtype,
    device: torch.device,
    quiet: bool,
) -> list[dict[str, Any]] | None:
    """The rows of all stacks, those that are new written; None if interrupted."""
    rows: list[dict[str, Any]] = []
    try:
        ranks = place.note("ranks.json", lambda: _allocated(catalogue, settings, dtype, device, quiet))
        with progress_bar(len(catalogue.stacks), "stacks", quiet) as show:
            for n, source in enumerate(catalogue.stacks):
                row = place.row(n)
                if row is None:
                    show(n, f"{source.name}: reading")
                    extracted = extract_stack(
                        source.load(dtype, device), modules[n], settings, ranks[n], _told(show, n, source)
                    )
                    place.add(n, extracted)
                    row = extracted.row
                rows.append(row)
    except KeyboardInterrupt:
        done = sum(place.row(n) is not None for n in range(len(catalogue.stacks)))
        print(
            f"interrupted; {done} of {len(catalogue.stacks)} stacks are done, the same command goes on from there",
            file=sys.stderr,
        )
        return None
    return rows


def _told(show: Callable[[int, str], None], n: int, source: StackSource) -> Callback:
    return lambda progress: show(n, f"{source.name}: from {progress.start}, sweep {progress.sweep}")


def _allocated(
    catalogue: Catalogue, settings: ExtractSettings, dtype: torch.dtype, device: torch.device, quiet: bool
) -> Sequence[Sequence[int] | None]:
    """The rank of every layer of every stack where the settings have a target: spectra of all of them, first."""
    if settings.target is None:
        return [None] * len(catalogue.stacks)
    spectra = []
    with progress_bar(len(catalogue.stacks), "spectra", quiet) as show:
        for n, source in enumerate(catalogue.stacks):
            show(n, source.name)
            stack = source.load(dtype, device)
            unchanged = torch.zeros(stack.layers, min(stack.shape), dtype=torch.float64)
            spectra.append(stack.singular_values() if stack.norm_squared > 0 else unchanged)
    ranks = allocate_ranks(spectra, [sum(source.shape) for source in catalogue.stacks], settings.target)
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
    write_file(out / "report.png", lambda f: figure.savefig(f, format="png", dpi=150))
    write_file(out / "README.md", lambda f: f.write(model_card(report).encode()))
    write_file(out / "report.json", lambda f: f.write((json.dumps(report, indent=1, allow_nan=False) + "\n").encode()))
    place.clear()


if __name__ == "__main__":
    sys.exit(main())
