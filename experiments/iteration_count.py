"""Iterations until RaSA is below LoRA's minimum: when "about 10" is right, when it is not, and why.

    python -m experiments.iteration_count --jobs 2                 an interrupted run goes on from the last row
    python -m experiments.iteration_count --jobs 2 --model synthetic
    python -m experiments.iteration_count --jobs 2 --model mpnet   L = 3, 6, 12 of its layers
    python -m experiments.iteration_count --jobs 2 --model mpnet --parts real --ks 1       a part of them
    python -m experiments.iteration_count --figure                 the figure alone, from the table
    python -m experiments.iteration_count --smoke

One attempt is the paper's: a random pool, then cycles of private SVDs, D, B_S, A_S. It ends ten cycles after the first
error below e_lora, or after 200. Parts:

    real        the bundled updates, r = 4, 8, 16, k = 1, 2, 4, r; of mpnet r = 8, k = 1, 8, 2
    synthetic   spectra j^-p, p = 0.3, 0.7, 1.2, flat to steep, by the share of common bases
    pool        size and kind of the random pool at the start: dyads of random unit vectors, of the layers' own singular
                vectors, or Gaussian matrices (rows and columns of unequal length)
    layers      the first 2, 3, 4, 6 of the bundled layers, the first 3, 6, 12 of mpnet, and 2 to 32 synthetic ones
    apart       2 to 32 synthetic layers without common bases

Written to --out: iteration_count.csv, one row per attempt: the first iteration below e_lora (empty: none), errors after
10, 30, 60 iterations and in the end, and the closed forms, all in units of e_lora; and iteration_count.png.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one process per processor, see --jobs

import torch
from matplotlib.figure import Figure

import rasa_theory as rt
from experiments.models.update_sets import FIRST_MODEL, MODEL_NAMES, RUNS, add_model_flags, chosen_updates, updates_of
from experiments.support.command import refuses_bad_input
from experiments.support.rows import Row, Table, of_models
from rasa_theory.commands.progress import ProgressBar
from rasa_theory.distributed import end_with_parent
from rasa_theory.plotting import style
from rasa_theory.solvers import median_iterations, random_attempt, random_start
from rasa_theory.sources import synthetic_stack

PARTS = ("real", "synthetic", "pool", "layers", "apart")
ITERATIONS = 200
SEEDS = 10


@dataclass(frozen=True)
class Case:
    """One attempt. `stack`: a bundled one, or `power:P` for sigma_j = j^-P with `overlap` of common bases."""

    part: str
    stack: str
    layers: int
    rank: int
    k: int
    seed: int
    overlap: float = 0.0
    pool: str = "units"
    size: float = 0.0
    model: str | None = FIRST_MODEL


MEASURES = ("iterations", "at_10", "at_30", "at_60", "end", "steps", "e_alloc", "floor", "e_lora")
COLUMNS = (*Case.__dataclass_fields__, *MEASURES)


def cases(
    seeds: int, model: str, kinds: Sequence[str] = ("query", "key", "value", "attention_output")
) -> Iterator[Case]:
    """Yield all attempts on a model, the cheap and telling ones first."""
    of_model = {"minilm": of_minilm, "mpnet": of_mpnet, "synthetic": of_synthetic}[model]
    for seed in range(seeds):
        for case in of_model(seed, kinds):
            yield replace(case, model=None if model == "synthetic" else MODEL_NAMES[model])


def of_minilm(seed: int, kinds: Sequence[str]) -> Iterator[Case]:
    for stack in kinds:
        for r in (8, 4, 16):
            for k in sorted({1, 2, 4, r}):
                yield Case("real", stack, 6, r, k, seed)
    for stack in ("attention_output", "query"):
        for pool in POOLS:
            for size in SIZES:
                yield Case("pool", stack, 6, 8, 1, seed, 0.0, pool, size)
        for L in (2, 3, 4):
            yield Case("layers", stack, L, 8, 1, seed)


def of_mpnet(seed: int, kinds: Sequence[str]) -> Iterator[Case]:
    for k in (1, 8, 2):
        for stack in kinds:
            yield Case("real", stack, 12, 8, k, seed)
            if k == 1:
                for L in (3, 6):
                    yield Case("layers", stack, L, 8, 1, seed)


def of_synthetic(seed: int, kinds: Sequence[str]) -> Iterator[Case]:
    for p in ("power:0.3", "power:0.7", "power:1.2"):
        for overlap in (0.0, 0.5, 1.0):
            for k in (1, 4):
                yield Case("synthetic", p, 6, 8, k, seed, overlap)
    for pool in POOLS:
        for size in SIZES:
            yield Case("pool", "power:0.7", 6, 8, 1, seed, 0.5, pool, size)
    for part, overlap in (("layers", 0.5), ("apart", 0.0)):
        for L in (2, 6, 12, 32):
            yield Case(part, "power:0.7", L, 8, 1, seed, overlap)


POOLS, SIZES = ("units", "own", "gaussian"), (0.01, 0.1, 0.3, 1.0)


@cache
def stack_of(model: str | None, name: str, layers: int, overlap: float, runs: Path) -> rt.LayerStack:
    if name.startswith("power"):
        return synthetic_stack(layers, (128, 128), name, overlap, seed=0)
    word = next(word for word, own in MODEL_NAMES.items() if own == model)
    whole = updates_of(word, runs=runs, kinds=[name])[name]
    return whole if layers == whole.layers else rt.LayerStack(whole.values[:layers], name)


@cache
def closed_forms(
    model: str | None, name: str, layers: int, overlap: float, runs: Path, rank: int, k: int
) -> dict[str, float]:
    stack, budget = stack_of(model, name, layers, overlap, runs), rt.RankBudget(rank, k)
    e_lora = rt.solve_lora(stack, rank).error
    return {
        "e_alloc": rt.allocation_bound(stack, budget).value / e_lora,
        "floor": rt.lower_bound(stack, budget).value / e_lora,
        "e_lora": e_lora,
    }


def start_of(stack: rt.LayerStack, case: Case) -> rt.RasaFactors:
    """Draw the random pool, whose terms have size^2 ||M||^2 in all; size 0 is D = 0.

    units: random unit columns and rows; own: random singular vectors of layers; gaussian: random lengths.
    """
    budget = rt.RankBudget(case.rank, case.k)
    factors = random_start(stack, budget, case.seed, case.size)
    if case.pool == "units":
        return factors
    generator = torch.Generator().manual_seed(case.seed + 10_000)
    R = budget.pool_rank(stack.layers)
    if case.pool == "own":
        U, _, Vh = torch.linalg.svd(stack.values.double(), full_matrices=False)
        layer = torch.randint(stack.layers, (R,), generator=generator)
        j = torch.randint(min(64, U.shape[2]), (R,), generator=generator)
        B_S, A_S = U[layer, :, j].T, Vh[layer, j]
    else:
        B_S = factors.shared_B * torch.rand(R, generator=generator, dtype=torch.float64).mul(4).sub(2).exp()
        A_S = factors.shared_A
    pool = torch.einsum("lr,rs,ls->", factors.mixing, (B_S.T @ B_S) * (A_S @ A_S.T), factors.mixing)
    D = factors.mixing * case.size * (stack.norm_squared / pool) ** 0.5
    return rt.RasaFactors(factors.private_B, factors.private_A, B_S, A_S, D)


def attempt(case: Case, runs: Path = RUNS) -> Row:
    """One row of the table."""
    torch.set_num_threads(1)
    of_stack = case.model, case.stack, case.layers, case.overlap, runs
    stack, budget = stack_of(*of_stack), rt.RankBudget(case.rank, case.k)
    bounds = closed_forms(*of_stack, case.rank, case.k)
    e_lora = bounds["e_lora"]
    run = random_attempt(stack, budget, e_lora, case.seed, start=start_of(stack, case), iterations=ITERATIONS)
    history = [error / e_lora for error in run.history]
    reached = {f"at_{n}": history[n] if n < len(history) else None for n in (10, 30, 60)}
    ends = {"iterations": run.iterations, "end": history[-1], "steps": len(history) - 1}
    return asdict(case) | ends | reached | bounds


# ------------------------------------------------------------------------------------------------ the table


def case_of(row: Row) -> Case:
    return Case(**{key: row[key] for key in Case.__dataclass_fields__})


def perform(missing: Sequence[Case], table: Table, jobs: int, runs: Path) -> None:
    """Run attempts over `jobs` processes, and add each to the table as it ends."""
    spawning = multiprocessing.get_context("spawn")
    with ProgressBar(len(missing), "attempts") as progress, spawning.Pool(jobs, end_with_parent) as pool:
        for done, row in enumerate(pool.imap_unordered(partial(attempt, runs=runs), missing), 1):
            progress(done, "")
            table.add([{key: f"{x:.6g}" if isinstance(x, float) else x for key, x in row.items()}])


def summary(rows: Sequence[Row], keys: Sequence[str]) -> list[Row]:
    """Group rows by the values of `keys`: lower median and range of the iterations, and the number that crossed."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    lines = []
    for values, group in groups.items():
        counts = [None if row["iterations"] is None else int(row["iterations"]) for row in group]
        crossed = sorted(n for n in counts if n is not None)
        lines.append(
            dict(zip(keys, values, strict=True))
            | {"median": median_iterations(counts), "first": crossed[0] if crossed else None,
               "last": crossed[-1] if crossed else None, "crossed": len(crossed), "attempts": len(group),
               **{f"by_{most}": sum(n <= most for n in crossed) for most in (10, 30, 60)},
               "room": 1 - group[0]["e_alloc"]}
        )  # fmt: skip
    return lines


# ----------------------------------------------------------------------------------------------- the figure


def plot(rows: Sequence[Row]) -> Figure:
    """Crossings by stack and k, by spectrum and overlap, by the pool at the start, by the number of layers."""
    of = {part: [row for row in rows if row["part"] == part] for part in ("real", "synthetic", "pool", "layers")}
    eight = [row for row in of["real"] if row["rank"] == 8]
    one = [row for row in [*of["layers"], *eight] if row["k"] == 1 and row["stack"] in NAMES]
    groups = [
        (eight, "stack", "k", "bundled updates: k shared ranks of 8"),
        ([row for row in of["synthetic"] if row["k"] == 1], "stack", "overlap", "made spectra: share of common bases"),
        ([row for row in of["pool"] if row["stack"] == "attention_output"], "pool", "size",
         "attention output: size of the first pool / $\\|M\\|$"),
        (one, "stack", "layers", "number of layers L"),
    ]  # fmt: skip
    groups = [group for group in groups if group[0]]
    title = "When does RaSA beat LoRA within 10 iterations?"
    figure = style.new_figure(0.5 + 1.6 * max(len(groups), 1), title=title)
    if groups:
        panels = style.panels(figure, len(groups))[:, 0]
        for axes, (group, outer, inner, label) in zip(panels, groups, strict=True):
            _columns(axes, group, outer, inner)
            style.name(axes, label, "iterations")
        style.legend_above(panels[0], 3, bbox_to_anchor=(-0.1, 1.1), handletextpad=0.1)
    return figure


WITHIN = {
    "within 10": (style.BLUE, "o"),
    "later": (style.ORANGE, "s"),
    "never in 200": (style.VERMILION, "x"),
}
"""The colour and marker of an attempt, by its first iteration below LoRA; the same in every panel."""
NAMES = {
    "attention_output": "attn. output", "power:0.3": "$\\sigma_j = j^{-0.3}$", "power:0.7": "$\\sigma_j = j^{-0.7}$",
    "power:1.2": "$\\sigma_j = j^{-1.2}$", "query": "query", "units": "units", "own": "own", "gaussian": "Gaussian",
}  # fmt: skip
"""Names of stacks and pools in the figure."""


def _columns(axes: Any, rows: Sequence[Row], outer: str, inner: str) -> None:
    """Draw a column of attempts per value of `inner`, grouped by `outer`; attempts that never cross stand on top."""
    never, ticks, x = ITERATIONS * 1.6, [], 0.0
    for name in dict.fromkeys(row[outer] for row in rows):
        begin = x
        for value in sorted({row[inner] for row in rows if row[outer] == name}):
            group = [row for row in rows if row[outer] == name and row[inner] == value]
            counts = [row["iterations"] for row in group]
            jitter = [x + 0.5 * (i / max(len(counts) - 1, 1) - 0.5) for i in range(len(counts))]
            for label, (color, marker) in WITHIN.items():
                points = [(at, n or never) for at, n in zip(jitter, counts, strict=True) if _within(n) == label]
                if points:
                    axes.plot(*zip(*points, strict=True), marker, ms=2.6, mew=0.7, color=color)
            median = median_iterations(counts)
            axes.plot([x - 0.38, x + 0.38], [median or never] * 2, color=style.INK, lw=1.5)
            ticks.append((x, f"{value:g}".replace("0.", ".")))
            x += 1
        at = {"xycoords": ("data", "axes fraction"), "ha": "center", "va": "bottom"}
        style.note(axes, NAMES.get(name, name), ((begin + x - 1) / 2, 1.0), **at)
        x += 0.7
    axes.axhline(10, color=style.GREY, lw=0.8, zorder=0)
    for label, (color, marker) in WITHIN.items():
        axes.plot([], [], marker, ms=4, color=color, label=label)
    axes.set_yscale("log")
    axes.set_ylim(0.7, never * 1.6)
    axes.set_yticks([1, 10, 100, never], ["1", "10", "100", "never"])
    axes.minorticks_off()
    axes.set_xticks([t for t, _ in ticks], [text for _, text in ticks])


def _within(iterations: int | None) -> str:
    """The key of WITHIN."""
    return "never in 200" if iterations is None else "within 10" if iterations <= 10 else "later"


@refuses_bad_input
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, help="run these parts alone, see above (all)"
    )
    parser.add_argument("--ks", nargs="+", type=int, help="run these shared ranks alone (all)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path("figures"))
    parser.add_argument("--figure", action="store_true", help="draw the table, run nothing")
    parser.add_argument("--smoke", action="store_true", help="a few attempts of each part")
    args = parser.parse_args(arguments)
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {args.jobs}")
    table = Table(args.out / "iteration_count.csv", COLUMNS, tuple(Case.__dataclass_fields__))
    if not args.figure:
        kinds = tuple(chosen_updates(args))
        selected = [
            case
            for case in cases(1 if args.smoke else args.seeds, args.model, kinds)
            if case.part in args.parts and (args.ks is None or case.k in args.ks)
        ]
        if args.smoke:
            small = [case for case in selected if case.rank == 8 and case.layers <= 6]
            selected = [*small[:1], *small[1::7]]
        if not selected:
            parser.error(f"--model {args.model} has none of these --parts and --ks")
        perform([case for case in selected if asdict(case) not in table], table, args.jobs, args.runs)
    style.save(plot(of_models(table.rows, FIRST_MODEL)), args.out / "iteration_count.png")
    for line in summary(table.rows, ("model", "part", "stack", "layers", "rank", "k", "overlap", "pool", "size")):
        print({key: round(x, 4) if isinstance(x, float) and math.isfinite(x) else x for key, x in line.items()})


if __name__ == "__main__":
    main()
