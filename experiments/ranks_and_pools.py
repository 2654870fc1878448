"""e_rasa / e_lora over ranks r and shared ranks k: how the gain grows, and what of it k = r/8 has.

    python -m experiments.ranks_and_pools --kinds query attention_output --ranks 4 8 16 32    # 45 minutes on one core
    python -m experiments.ranks_and_pools --model synthetic
    python -m experiments.ranks_and_pools --model mpnet --kinds query attention_output --ranks 4 8 16   # three quarters

The paper finds that training is best at k = r/8. This is the same question for reconstruction: r = 4, 8, 16, 32 and
k = 1, 2, r/8, r/4, r/2, r. All k of a stack and r are solved as one path, with the same effort. Written to --out, path
by path, so that an interrupted run goes on:

    ranks_and_pools.png    the gain over LoRA against k, and what of it is left in bfloat16, means of two kinds
    ranks_and_pools.csv    one row per model, stack, r and k. Errors are squared and in units of e_lora:
      allocation, best_found, floor    the split of the gain (`rt.gain`), with closed floors; `floors.csv` has higher
                                       ones of some rows
      mixing_drop      certified lower bound on the gain: D alone is solved anew at the LoRA embedding of Theorem 3.1
      allocated        LoRA with allocated ranks at the parameters of RaSA, its mixing included
      cancellation     the largest pool term or B~_i A~_i over the norm of its layer
      uncancelled      best error without cancellation: no term is larger than its layer (k = 1 and r/8 alone)
      bfloat16         the error of the best factors, rounded to bfloat16; lora_bfloat16: of LoRA's factors
      by_loss          median over pool terms of the number of layers that they serve (`rt.pool_participation`)
    e_lora_share is e_lora / ||M||^2.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import rasa_theory as rt
from experiments.models.update_sets import MODEL_NAMES, add_model_flags, chosen_updates, corner
from experiments.support.command import refuses_bad_input
from experiments.support.rows import Row, Table
from experiments.support.timing import percents
from rasa_theory import methods
from rasa_theory.commands.progress import ProgressBar
from rasa_theory.plotting import style

KEY = ("model", "stack", "r", "k", "effort")
COLUMNS = (
    *KEY, "layers", "b", "a", "e_lora_share", "allocation", "best_found", "floor", "floor_name",
    "mixing_drop", "allocated", "cancellation", "uncancelled", "bfloat16", "lora_bfloat16", "by_loss", "stop",
    "seconds",
)  # fmt: skip
RANKS = (8, 16, 4, 32)
"""The ranks, those of which most is known first."""
SHOWN_KINDS, SHOWN_EFFORT = ("query", "attention_output"), "quick"
"""What the figure and the pages are of: both models have these kinds."""


def shared_ranks(r: int) -> list[int]:
    """k = 1, 2, r/8, r/4, r/2, r, where they are whole numbers."""
    return sorted({k for k in (1, 2) if k <= r} | {r // n for n in (8, 4, 2, 1) if r % n == 0})


def path(stack: rt.LayerStack, r: int, ks: Sequence[int], options: rt.SolverOptions) -> Iterator[Row]:
    """The rows of one stack and r, without the model."""
    lora = rt.solve_lora(stack, r)
    lora_bfloat16 = rounded(stack, lora.factors) / lora.error
    for k, solution in rt.solve_path(stack, r, ks, options).items():
        budget = rt.RankBudget(r, k)
        gain = rt.gain(stack, budget, solution=solution)
        terms = solution.factors.parameters // sum(stack.shape)
        embeddings = [rt.RasaFactors.from_lora(lora.factors, budget, pooled) for pooled in ("smallest", "largest")]
        row = {
            "stack": stack.name, "r": r, "k": k, "layers": stack.layers, "b": stack.shape[0], "a": stack.shape[1],
            "effort": options.effort, "e_lora_share": gain.e_lora / stack.norm_squared,
            "allocation": gain.e_allocation / gain.e_lora, "best_found": gain.e_rasa / gain.e_lora,
            "floor": gain.floor.value / gain.e_lora, "floor_name": gain.floor.name,
            "mixing_drop": max(rt.mixing_drop(stack, start) for start in embeddings) / gain.e_lora,
            "allocated": methods.fit_allocated(stack, terms).error / gain.e_lora,
            "cancellation": solution.cancellation,
            "bfloat16": rounded(stack, solution.factors) / gain.e_lora, "lora_bfloat16": lora_bfloat16,
            "by_loss": float(rt.pool_participation(solution.factors).by_loss.median()),
            "stop": solution.stop_reason.name,
        }  # fmt: skip
        if k in (1, r // 8):
            bounded = rt.solve_rasa(stack, budget, replace(options, max_cancellation=1.0))
            row["uncancelled"] = bounded.error / gain.e_lora
        yield row


def rounded(stack: rt.LayerStack, factors: rt.RasaFactors | rt.LoraFactors) -> float:
    """The error of the factors after they were rounded to bfloat16."""
    return rt.reconstruction_error(stack, factors.to(torch.bfloat16).to(torch.float64))


def measured(
    model: str, stacks: dict[str, rt.LayerStack], ranks: Sequence[int], options: rt.SolverOptions, table: Table
) -> None:
    """Add the rows that the table has not, path by path."""
    missing = [
        (stack, r)
        for r in ranks
        for stack in stacks.values()
        if any(
            {"model": model, "stack": stack.name, "r": r, "k": k, "effort": options.effort} not in table
            for k in shared_ranks(r)
        )
    ]
    done = percents([weight(*task) for task in missing])
    with ProgressBar(100, "%") as progress:
        for percent, (stack, r) in zip(done, missing, strict=True):
            progress(percent, f"{model}, {stack.name}, r = {r}")
            began = time.perf_counter()
            rows = [{"model": model} | row for row in path(stack, r, shared_ranks(r), options)]
            seconds = round((time.perf_counter() - began) / len(rows), 1)
            table.add([row | {"seconds": seconds} for row in rows])


def weight(stack: rt.LayerStack, r: int) -> int:
    """About the work of one path, for the forecast: sweeps of each k cost passes over M and steps of the pool."""
    b, a = stack.shape
    return len(shared_ranks(r)) * stack.layers * (b * a + (b + a) * stack.layers * r)


def report(rows: Sequence[Row]) -> Iterator[str]:
    """Lines of a table."""
    yield f"{'':38}{'r':>4}{'k':>4}{'allocation':>12}{'sharing':>10}{'unknown':>10}{'uncancelled':>13}{'bfloat16':>10}"
    for row in rows:
        uncancelled = None if row["uncancelled"] is None else 1 - row["uncancelled"]
        parts = (1 - row["allocation"], row["allocation"] - row["best_found"], row["best_found"] - row["floor"])
        columns = zip((*parts, uncancelled, rounded_gain(row)), (12, 10, 10, 13, 10), strict=True)
        numbers = "".join(f"{'' if x is None else f'{100 * x:.3f} %':>{width}}" for x, width in columns)
        yield f"{row['model']:18}{row['stack']:20}{row['r']:>4}{row['k']:>4}{numbers}"


def gain(row: Row) -> float:
    """How far the best error found lies below LoRA's, in units of e_lora."""
    return float(1 - row["best_found"])


def rounded_gain(row: Row) -> float:
    """The same after the factors of both were rounded to bfloat16."""
    return float(row["lora_bfloat16"] - row["bfloat16"])


def shown(rows: Sequence[Row]) -> list[Row]:
    """The rows of `SHOWN_KINDS` and `SHOWN_EFFORT`, at those r and k of a model that all these kinds have.

    Raises ValueError if a point stands there twice.
    """
    own = [row for row in rows if row["stack"] in SHOWN_KINDS and row["effort"] == SHOWN_EFFORT]
    kinds = Counter((row["model"], row["r"], row["k"]) for row in own)
    if len({tuple(row[key] for key in KEY) for row in own}) < len(own):
        raise ValueError("a stack has two rows of the same r and k")
    return [row for row in own if kinds[row["model"], row["r"], row["k"]] == len(SHOWN_KINDS)]


def mean_over_kinds(rows: Sequence[Row], value: Callable[[Row], float]) -> dict[tuple[int, int], float]:
    """The mean of a value over the kinds of one model, by r and k."""
    groups: dict[tuple[int, int], list[float]] = {}
    for row in rows:
        groups.setdefault((row["r"], row["k"]), []).append(value(row))
    return {point: statistics.fmean(own) for point, own in sorted(groups.items())}


def draw_means(ax: Axes, means: dict[tuple[int, int], float], look: tuple[str, str], line: str) -> None:
    """Draw the means of one model and r, by (r, k), in per cent: a line, and markers, that of k = r/8 filled."""
    colour, marker = look
    ax.plot([k for _, k in means], [100 * mean for mean in means.values()], line, color=colour, lw=1)
    for (r, k), mean in means.items():
        is_eighth = 8 * k == r
        fill = colour if is_eighth else style.WHITE
        ax.plot(k, 100 * mean, marker, color=colour, ms=5 if is_eighth else 3, mfc=fill, zorder=3)


def plot(rows: Sequence[Row]) -> Figure:
    """A panel for each model: the gain against k, a line for each r, and dashed what is left of it in bfloat16."""
    rows = shown(rows)
    present = {row["model"] for row in rows}
    models = [model for model in MODEL_NAMES.values() if model in present]
    figure = style.new_figure(0.9 + 1.7 * len(models), title="What does a larger pool gain over LoRA?")
    axes = style.panels(figure, len(models), sharex=True)[:, 0]
    ranks, ks = sorted({row["r"] for row in rows}), sorted({row["k"] for row in rows})
    looks = dict(zip(ranks, itertools.cycle(zip(style.COLOURS, style.MARKERS, strict=True)), strict=False))
    for ax, model in zip(axes, models, strict=True):
        for r, look in looks.items():
            own = [row for row in rows if (row["model"], row["r"]) == (model, r)]
            for value, line in ((gain, "-"), (rounded_gain, "--")):
                draw_means(ax, mean_over_kinds(own, value), look, line)
        ax.set_xscale("log", base=2)
        ax.set_xticks(ks, [str(k) for k in ks])
        ax.yaxis.set_major_locator(MaxNLocator(4))
        ax.margins(y=0.08)
        ax.set_ylim(bottom=0)
        style.grid(ax)
        style.name(ax, "k" if ax is axes[-1] else "", "gain, % of $e_{\\mathrm{LoRA}}$", model)
    first = axes[0]
    handles = [*(first.plot([], [], looks[r][1] + "-", color=looks[r][0], ms=3, mfc=style.WHITE)[0] for r in ranks),
               *first.plot([], [], "--", color=style.INK), *first.plot([], [], "o", color=style.INK)]  # fmt: skip
    labels = [*(f"r = {r}" for r in ranks), "in bfloat16", "filled: k = r / 8"]
    style.legend_above(first, 3, handles=handles, labels=labels, bbox_to_anchor=(-0.1, 1.15))
    return figure


@refuses_bad_input
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    parser.add_argument("--ranks", nargs="+", type=int, default=list(RANKS), help="the ranks r, in this order")
    parser.add_argument("--effort", default="quick", help="of the solver: quick, default or thorough (quick)")
    parser.add_argument("--sweeps", type=int, default=60, help="the most of each solution (60)")
    parser.add_argument("--smoke", action="store_true", help="a corner of one stack at rank 8, in seconds")
    parser.add_argument("--out", type=Path, default=Path("figures"))
    options = parser.parse_args(arguments)
    stacks, ranks = chosen_updates(options), options.ranks
    if options.smoke:
        stacks, ranks = corner(stacks), [8]
    table = Table(options.out / "ranks_and_pools.csv", COLUMNS, KEY)
    solver = rt.SolverOptions(effort=options.effort, max_sweeps=options.sweeps)
    if options.smoke:
        solver = rt.SolverOptions(start="allocation", max_sweeps=3)
    measured(MODEL_NAMES[options.model], stacks, ranks, solver, table)
    print(*report(table.rows), sep="\n")
    if shown(table.rows):
        style.save(plot(table.rows), options.out / "ranks_and_pools.png")


if __name__ == "__main__":
    main()
