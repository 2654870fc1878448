"""python -m rasa_theory.reconstruct: how well LoRA and RaSA of one budget reconstruct fine-tuning updates.

Exit status: 0 all well, 1 a checked law failed, 2 bad input or usage, 130 interrupted (what was finished is written).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from rasa_theory.commands import flags
from rasa_theory.commands.console import Parser, exit_status, naming_flags, output_folder, progress_bar, say_left_out
from rasa_theory.common import InputError, identity, write_file
from rasa_theory.distributed import ALONE, LayerSharding, Processes
from rasa_theory.formats import read_tensors, safetensors_bytes
from rasa_theory.plotting import plot_iterations, style
from rasa_theory.problem import LayerStack, RankBudget, check_memory, compute_dtype
from rasa_theory.reconstruction import (
    WEIGHTS,
    StudyProgress,
    StudySettings,
    StudyState,
    history_csv,
    new_results,
    study_steps,
    table,
    verdict_lines,
)
from rasa_theory.solvers import SolverOptions
from rasa_theory.sources import DEFAULT, Catalogue, StackSource, check_synthetic, synthetic_stack

_SYNTHETIC = {"layers": 6, "shape": (384, 384), "spectrum": "power:0.7", "overlap": 0.0}
_ON_NO_MEMORY = (
    "take fewer or smaller stacks (--modules), --dtype float32, or --memory, with which large ones stay on disk; "
    "--dry-run says how much a run needs"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return exit_status(
        "rasa_theory.reconstruct",
        lambda processes: _run(_parse(given), given, processes),
        _ON_NO_MEMORY,
        "; stacks that were finished are in --out, and the same command goes on from there",
    )


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m rasa_theory.reconstruct",
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
    add("--rank", type=int, default=8, metavar="R", help="rank budget r of a layer (%(default)s)")
    add("--k", type=_whole_numbers, default=(1,), metavar="K", help="ranks given to the pool; 0,1,2 is a path (1)")
    add("--weight", choices=WEIGHTS, default="none", help="layer: scale every layer's update to unit norm first")
    flags.add_solver(parser)
    add(
        "--max-cancellation",
        type=float,
        default=SolverOptions.max_cancellation,
        metavar="X",
        help="stop where a term of a layer exceeds so many times the norm of the layer (%(default)s); inf allows all",
    )
    add("--seeds", type=int, default=5, metavar="N", help="random attempts at the iteration count (%(default)s)")
    add("--dtype", choices=("float64", "float32"), default="float64", help="of the computation (%(default)s)")
    add(
        "--tf32",
        action="store_true",
        help="float32 products may round to TF32 on CUDA, final errors do not; does nothing on the CPU",
    )
    add(
        "--out", default="rasa-results", metavar="DIR", help="folder for the results (%(default)s); none writes nothing"
    )
    flags.add_running(parser)
    made = parser.add_argument_group("with --source synthetic")
    made.add_argument("--layers", type=int, metavar="L", help="layers (6)")
    made.add_argument("--shape", type=_shape, metavar="B,A", help="of a layer (384,384)")
    made.add_argument("--spectrum", metavar="S", help="flat, power:P (j^-P) or exp:C (power:0.7)")
    made.add_argument("--overlap", type=float, metavar="X", help="0: own singular bases (default), 1: common ones")
    args = parser.parse_args(arguments)
    for name, default in _SYNTHETIC.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif args.source != "synthetic":
            raise InputError(f"--{name} goes with --source synthetic, and nothing else")
    return args


def _whole_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number or a list such as 0,1,2") from None


def _shape(text: str) -> tuple[int, int]:
    try:
        b, a = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape such as 384,384") from None
    return b, a


def _catalogue(args: argparse.Namespace) -> Catalogue:
    if args.source != "synthetic":
        return flags.given_source(args, DEFAULT)
    flags.check_sources(args)
    if args.memory is not None:
        raise InputError("--memory goes with files; a synthetic stack is made in memory as a whole")
    with naming_flags(flags.NAMES):
        check_synthetic(args.layers, args.shape, args.spectrum, args.overlap, args.seed)

    def make(
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        processes: Processes = ALONE,
        tf32: bool = False,
    ) -> LayerStack:
        sharding = LayerSharding.of(args.layers, processes)
        with processes.raise_together():  # made as a whole in each
            stack = synthetic_stack(args.layers, args.shape, args.spectrum, args.overlap, args.seed)
        return LayerStack(stack.values[sharding.local], "synthetic", dtype, device, sharding=sharding, tf32=tf32)

    return Catalogue("synthetic", [StackSource("synthetic", args.layers, args.shape, make)], [])


def _run(args: argparse.Namespace, given: list[str], processes: Processes) -> int:
    with naming_flags(flags.NAMES):
        solver = dataclasses.replace(flags.solver_options(args), max_cancellation=args.max_cancellation)
        settings = StudySettings(args.rank, args.k, solver, args.certificate, args.seeds, args.weight)
        flags.check_certificate(args, processes)
        dtype, device = compute_dtype(args.dtype), flags.device(args, processes)
    with processes.raise_together():
        whole = _catalogue(args)
    catalogue = whole.matching(args.modules)
    for source in catalogue.stacks:
        RankBudget(args.rank, 0).check_fits(source)
        if args.memory is not None:
            with naming_flags(flags.NAMES):
                check_memory(source, args.memory)
    text = sys.stderr if args.json else sys.stdout
    if args.dry_run:
        if processes.first:
            print(_forecast(catalogue, settings, dtype, device, args.memory, processes.world_size), file=text)
        return 0
    out = processes.from_first(lambda: output_folder(args.out))
    if processes.first:
        say_left_out(whole.left_out, "results.json")

    command = ["python", "-m", "rasa_theory.reconstruct", *given]
    plan = _plan(args, catalogue, settings)
    state = processes.from_first(lambda: _begun(out, plan, settings)) or StudyState(
        new_results(settings, catalogue.source, command), {}
    )
    state.results |= {"command": command, "unfinished": plan, "theorem_3_1": "undecided"}
    state.results["left_out"] = [{"name": name, "reason": reason} for name, reason in catalogue.left_out]
    finished = [row["name"] for row in state.results["stacks"]]
    sources = [source for source in catalogue.stacks if source.name not in finished]
    writing, interrupted = out is not None and processes.first, False
    if finished and processes.first:
        print(f"{', '.join(finished)}: finished before, taken up from {out}", file=sys.stderr)

    def load(source: StackSource) -> LayerStack:
        return source.load(dtype, device, processes, args.tf32)

    left = len(sources) * len(settings.ks)
    try:
        with _bar(len(sources), settings, args.quiet or not processes.first) as watch:
            for _ in study_steps(map(load, sources), settings, state, watch):
                left -= 1
                if left == 0:
                    del state.results["unfinished"]
                if writing:
                    write_results(state, out)
    except KeyboardInterrupt:
        processes.tell_interrupted()
        interrupted = True
        if state.results["theorem_3_1"] == "holds":
            state.results["theorem_3_1"] = "undecided"
        if writing and state.results["stacks"]:
            write_results(state, out)

    status = 130 if interrupted else 1 if state.results["theorem_3_1"] == "violated" else 0
    if not processes.first:
        return status
    print(table(state.results), file=text)
    for line in verdict_lines(state.results, interrupted):
        print(line, file=text)
    if writing and state.results["stacks"]:
        print(
            f"Files: {out}/ (results.json, history.csv, factors.safetensors, iterations.png, iterations.svg)", file=text
        )
    if args.json:
        print(json.dumps(state.results, indent=1, allow_nan=False))
    return status


def _plan(args: argparse.Namespace, catalogue: Catalogue, settings: StudySettings) -> dict[str, Any]:
    """What two runs must have in common, for the later one to take up what the other has finished: plain data."""
    made = {name: getattr(args, name) for name in _SYNTHETIC} if args.source == "synthetic" else None
    plan = {
        "inputs": [identity(path) for path in catalogue.files],
        "source": catalogue.source,
        "synthetic": made,
        "settings": f"{settings}, {args.dtype}, tf32={args.tf32}",
        "stacks": [[source.name, source.layers, *source.shape] for source in catalogue.stacks],
    }
    settled: dict[str, Any] = json.loads(json.dumps(plan))
    return settled


def _begun(out: Path | None, plan: dict[str, Any], settings: StudySettings) -> StudyState | None:
    """What a run of the same plan has finished in the folder `out` before it ended early: whole stacks alone."""
    try:
        assert out is not None
        results = json.loads((out / "results.json").read_text(encoding="utf-8"))
        if results.get("unfinished") != plan:
            return None
        rows = [row for row in results["stacks"] if [run["k"] for run in row["runs"]] == list(settings.ks)]
        names = [f"{row['name']}/{run['k']}/" for row in rows for run in row["runs"]]
        tensors = read_tensors(out / "factors.safetensors") if rows else {}
    except (AssertionError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    kept = {key: tensor for key, tensor in tensors.items() if any(map(key.startswith, names))}
    if not rows or len(kept) != 5 * len(names):
        return None
    return StudyState(results | {"stacks": rows}, kept)


def _forecast(
    catalogue: Catalogue,
    settings: StudySettings,
    dtype: torch.dtype,
    device: torch.device,
    limit: int | None,
    world_size: int,
) -> str:
    lines, largest = [f"Source {catalogue.source}, on {device} in {str(dtype).removeprefix('torch.')}. Would solve:"], 0
    for source in catalogue.stacks:
        L, (b, a) = source.layers, source.shape
        size = L * b * a * dtype.itemsize
        largest = max(largest, dataclasses.replace(source, layers=-(-L // world_size)).memory(dtype))
        ks = ", ".join(str(k) for k in settings.ks)
        widest = max(RankBudget(settings.rank, k).private_rank + L * k for k in settings.ks)
        lines.append(
            f"  {source.name}: {L} x {b} x {a} ({size / 2**20:.1f} MiB), r = {settings.rank}, k = {ks}, "
            f"update rank up to {min(widest, b, a)}, {settings.seeds} random attempts each"
        )
    of_it = "" if world_size == 1 else f", its layers over {world_size} processes"
    each = "" if world_size == 1 else " in each"
    lines.append(
        f"One stack is in memory at a time{of_it}: about {largest / 2**20:.0f} MiB at most{each}, beside the libraries."
    )
    if limit is not None and largest > limit:
        lines.append(f"At most {limit / 2**20:.4g} MiB of that are in memory, the rest on disk.")
    lines += [f"  left out: {name}: {reason}" for name, reason in catalogue.left_out]
    return "\n".join(lines)


@contextlib.contextmanager
def _bar(stacks: int, settings: StudySettings, quiet: bool) -> Iterator[Callable[[StudyProgress], None]]:
    """Progress on standard error: tasks done (a solve, attempt or floor), stack, start, step, error, time left."""
    with progress_bar(stacks * sum(settings.tasks(k) for k in settings.ks), "tasks", quiet) as show:

        def watch(progress: StudyProgress) -> None:
            counted, valued = ("iteration", "at") if progress.doing.endswith("floor") else ("sweep", "error")
            value = "" if progress.ratio is None else f", {valued} {progress.ratio:.4f} e_lora"
            where = f"{progress.stack}, k = {progress.k}: {progress.doing}"
            show(progress.tasks_done, f"{where}, {counted} {progress.sweep}{value}")

        yield watch


# ---- files


def write_results(state: StudyState, out: Path) -> None:
    """Write all files of a run into the folder `out`, each whole or not at all. Raises InputError if that fails."""
    figure = plot_iterations(state.results)
    write_file(
        out / "results.json", lambda f: f.write((json.dumps(state.results, indent=1, allow_nan=False) + "\n").encode())
    )
    write_file(out / "history.csv", lambda f: f.write(history_csv(state.results).encode()))
    write_file(out / "factors.safetensors", lambda f: f.write(safetensors_bytes(state.factors)))
    write_file(out / "iterations.png", lambda f: style.save(figure, f))
    write_file(out / "iterations.svg", lambda f: style.save(figure, f, "svg"))
