"""The origin of "about 10 iterations to beat LoRA": the size of the random pool at the start.

    python -m experiments.pool_start

Paper sweeps start from random pools whose terms have size^2 ||M||^2 in all. Size 0 is D = 0: no layer uses the pool
yet, so that the first private SVD is the SVD of M_i itself. The stacks are bundled ones and a synthetic one. Joint
sweeps from the last factors then find the minimum in whose basin they lie. Written to --out:

    pool_start.csv    one row per stack, size and seed: the first iteration below e_lora (empty: none), the error after
                      the iterations and after the joint sweeps, both squared and in units of e_lora
    pool_start.png    medians and ranges of both
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import rasa_theory as rt
from experiments.support.rows import Row, write_rows
from rasa_theory.commands.progress import ProgressBar
from rasa_theory.plotting import style
from rasa_theory.solvers import median_iterations, random_start
from rasa_theory.sources import synthetic_stack

COLUMNS = ("stack", "size", "seed", "iterations", "error", "error_after_joint_sweeps")
ITERATIONS = 60


def stacks_by_name(names: list[str]) -> Iterator[rt.LayerStack]:
    """The bundled stacks of these names; `synthetic` is a stack with sigma_j = j^-0.7 and half-common bases."""
    bundled = {stack.name: stack for stack in rt.load("minilm-code")[0]}
    for name in names:
        yield synthetic_stack(spectrum="power:0.7", overlap=0.5) if name == "synthetic" else bundled[name]


def attempt(
    stack: rt.LayerStack, budget: rt.RankBudget, e_lora: float, size: float, seed: int, iterations: int, joint: int
) -> Row:
    """One row of the table."""
    start = random_start(stack, budget, seed, size)
    paper = rt.solve_rasa(
        stack, budget, rt.SolverOptions(start=start, sweep="paper", max_sweeps=iterations, rtol=0, max_cancellation=1e4)
    )
    after = rt.solve_rasa(
        stack,
        budget,
        rt.SolverOptions(start=paper.factors, sweep="joint", max_sweeps=joint, rtol=0, max_cancellation=1e4),
    )
    crossing = next((n for n, error in enumerate(paper.history) if error < e_lora), None)
    values = (stack.name, size, seed, crossing, paper.history[-1] / e_lora, after.error / e_lora)
    return dict(zip(COLUMNS, values, strict=True))


def plot(rows: list[Row], iterations: int = ITERATIONS) -> Figure:
    """Above: first iteration below LoRA against the size of the pool, `never` on top. Below: the final errors."""
    names, sizes = (list(dict.fromkeys(row[key] for row in rows)) for key in ("stack", "size"))
    figure = style.new_figure(4.2, title="How large may the random pool start?")
    ((above,), (below,)) = style.panels(figure, 2, 1, sharex=True)
    never = iterations * 1.12
    for n, (name, color, marker) in enumerate(zip(names, style.COLOURS, style.MARKERS, strict=False)):
        groups = [[row for row in rows if row["stack"] == name and row["size"] == size] for size in sizes]
        positions = [i + 0.17 * (n - (len(names) - 1) / 2) for i in range(len(sizes))]
        counts = [[row["iterations"] for row in group] for group in groups]
        medians = [median_iterations(c) for c in counts]
        above.plot(positions, [never if m is None else m for m in medians], marker, color=color, ms=5, label=name)
        for x, group in zip(positions, counts, strict=True):
            heights = [never if c is None else c for c in group]
            above.plot([x] * len(heights), heights, marker, color=color, ms=2.2, alpha=0.6)
        ends = [sorted(row["error_after_joint_sweeps"] for row in group) for group in groups]
        middle = [e[(len(e) - 1) // 2] for e in ends]
        low = [m - e[0] for m, e in zip(middle, ends, strict=True)]
        high = [e[-1] - m for m, e in zip(middle, ends, strict=True)]
        below.errorbar(positions, middle, [low, high], fmt=marker, color=color, ms=4, lw=1, capsize=2)
    above.axhline(never, color=style.PALE, zorder=0)
    ticks = MaxNLocator(integer=True, steps=[1, 2, 5, 10]).tick_values(0, iterations)
    ticks = [t for t in ticks if t <= iterations]
    above.set_yticks([*ticks, never], [*(f"{t:g}" for t in ticks), "never"])
    above.set_ylim(0, never * 1.08)
    style.name(above, y="iterations to beat LoRA\n(large: median)")
    style.legend_above(above, len(names), bbox_to_anchor=(-0.2, 1))
    below.axhline(1.0, color=style.INK, linewidth=1.2, zorder=0)
    below.set_xticks(range(len(sizes)), ["D = 0" if size == 0 else f"{size:g}" for size in sizes])
    style.name(below, "norm of the first pool / $\\|M\\|$",
               "final error / $e_{\\mathrm{LoRA}}$\n(median, range)")  # fmt: skip
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stacks", nargs="+", default=["query", "attention_output", "synthetic"])
    parser.add_argument("--sizes", nargs="+", type=float, default=[0, 0.01, 0.03, 0.1, 0.3, 1, 3])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--k", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=ITERATIONS)
    parser.add_argument("--joint-sweeps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("figures"))
    options = parser.parse_args(arguments)

    budget = rt.RankBudget(options.rank, options.k)
    rows: list[Row] = []
    with ProgressBar(len(options.stacks) * len(options.sizes) * options.seeds, "attempts") as progress:
        for stack in stacks_by_name(options.stacks):
            e_lora = rt.solve_lora(stack, options.rank).error
            for size in options.sizes:
                for seed in range(options.seeds):
                    progress(len(rows), f"{stack.name}, size {size:g}")
                    rows.append(attempt(stack, budget, e_lora, size, seed, options.iterations, options.joint_sweeps))
    write_rows(options.out / "pool_start.csv", COLUMNS, rows)
    style.save(plot(rows, options.iterations), options.out / "pool_start.png")
    for name in options.stacks:
        for size in options.sizes:
            group = [row for row in rows if row["stack"] == name and row["size"] == size]
            counts = [row["iterations"] for row in group]
            ends = [row["error_after_joint_sweeps"] for row in group]
            crossed = sum(count is not None for count in counts)
            print(
                f"{name:18} size {size:<5g} median {median_iterations(counts) or 'never'!s:6}"
                f" {crossed} of {len(counts)}"
                f"  in the end {min(ends):.5f} .. {max(ends):.5f}  mean {math.fsum(ends) / len(ends):.5f}"
            )


if __name__ == "__main__":
    main()
