"""Do solves recover planted factors? Recovery against noise, from the default search and from a random pool.

    python -m experiments.recovery

Stacks of normal factors of the budget, plus normal noise of a given share of their norm, for every shape
(L, b, a, r, k). The fit of dof free parameters takes up dof / (L b a) of the noise's energy on average, and leaves the
rest as its error. Written to --out:

    recovery.csv    one row per shape, noise, seed and start: the squared error over the expected one, and the squared
                    distance of the solution from the planted updates over the energy that the parameters take up
                    (without noise both over ||M||^2); and the error over the certified floor
    recovery.png    percentage of the seeds that recover

A run recovers if its error is at most 1.02 and its distance at most 1.5 in these units; without noise, if the error is
at most 1e-18 ||M||^2.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

import rasa_theory as rt
from experiments.support.rows import Row, write_rows
from rasa_theory.commands.progress import ProgressBar
from rasa_theory.plotting import style

Shape = tuple[int, int, int, int, int]
SHAPES: tuple[Shape, ...] = (
    (6, 80, 70, 4, 2),
    (8, 100, 90, 4, 1),
    (5, 60, 60, 3, 3),
    (16, 160, 160, 8, 1),
    (32, 320, 300, 8, 1),
)
COLUMNS = (
    "layers", "b", "a", "rank", "k", "noise", "seed", "start", "winner", "stop_reason", "sweeps", "seconds",
    "error", "distance", "error_over_floor", "recovered",
)  # fmt: skip


def degrees_of_freedom(shape: Shape) -> int:
    """Free parameters: L rank-q matrices, R pool terms up to the scale of b_j and a_j, and the mixing."""
    L, b, a, r, k = shape
    q, R = r - k, L * k
    return L * q * (a + b - q) + R * (a + b - 2) + L * R


def planted(shape: Shape, noise: float, seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Draw the planted updates and the noise, (L, b, a) each."""
    L, b, a, r, k = shape
    rng, q, R = np.random.default_rng(seed), r - k, L * k
    B_S, D, A_S = (rng.standard_normal(s) for s in ((b, R), (L, R), (R, a)))
    M = rng.standard_normal((L, b, q)) @ rng.standard_normal((L, q, a)) + (B_S * D[:, None]) @ A_S
    N = rng.standard_normal(M.shape)
    return M, noise * np.linalg.norm(M) / np.linalg.norm(N) * N


def attempt(shape: Shape, noise: float, seed: int, start: str, max_sweeps: int) -> Row:
    """One row of the table."""
    M, N = planted(shape, noise, seed)
    L, b, a, r, k = shape
    stack, budget = rt.LayerStack(M + N), rt.RankBudget(r, k)
    began = time.perf_counter()
    solution = rt.solve_rasa(
        stack,
        budget,
        rt.SolverOptions(start=start, sweep="joint", max_sweeps=max_sweeps, rtol=1e-9, seed=seed, max_cancellation=1e4),
    )
    seconds = time.perf_counter() - began
    energy, share = float((N**2).sum()), degrees_of_freedom(shape) / (L * b * a)
    left, taken = ((1 - share) * energy, share * energy) if noise else (stack.norm_squared,) * 2
    error = solution.error / left
    distance = rt.reconstruction_error(rt.LayerStack(M), solution.factors) / taken
    floor = rt.lower_bound(stack, budget).value
    recovered = (error <= 1.02 and distance <= 1.5) if noise else error <= 1e-18
    values = (
        *shape, noise, seed, start, solution.start, solution.stop_reason.name, solution.sweeps, round(seconds, 2),
        error, distance, solution.error / floor if floor > 0 else None, int(recovered),
    )  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))


def shape_of(row: Row) -> Shape:
    return row["layers"], row["b"], row["a"], row["rank"], row["k"]


def plot(rows: list[Row]) -> Figure:
    """A table of heat: shapes and starts by noise, each cell the percentage of the seeds that recover."""
    noises = sorted({row["noise"] for row in rows})
    shapes = list(dict.fromkeys(map(shape_of, rows)))
    figure = style.new_figure(1.6 + 0.36 * len(shapes), title="Are planted factors recovered? (% of seeds)")
    axes = style.panels(figure, 2, 1, sharex=True)[:, 0]
    for ax, start, name in zip(
        axes, ("best", "random"), ("from the default search", "from one random pool"), strict=True
    ):
        table = np.full((len(shapes), len(noises)), np.nan)
        for row in rows:
            group = [
                r for r in rows if shape_of(r) == shape_of(row) and (r["noise"], r["start"]) == (row["noise"], start)
            ]
            if group:
                share = sum(r["recovered"] for r in group) / len(group)
                table[shapes.index(shape_of(row)), noises.index(row["noise"])] = 100 * share
        style.heat_table(ax, table)
        ax.set_yticks(range(len(shapes)), ["{}×{}×{}: {}, {}".format(*shape) for shape in shapes])
        ax.set_xticks(range(len(noises)), [f"{noise:g}" for noise in noises])
        style.name(ax, y="L × b × a: r, k", title=name)
    axes[0].tick_params(axis="x", length=0)
    style.name(axes[1], "norm of noise / norm of updates")
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noises", nargs="+", type=float, default=[0, 1e-3, 0.1, 0.3, 1, 2])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--largest-seeds", type=int, default=3, help="seeds of the largest shape (%(default)s)")
    parser.add_argument(
        "--random-seeds", type=int, default=3, help="seeds of the runs from a random pool (%(default)s)"
    )
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="number of shapes (%(default)s)")
    parser.add_argument("--sweeps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("figures"))
    options = parser.parse_args(arguments)

    seeds = {shape: options.largest_seeds if shape is SHAPES[-1] else options.seeds for shape in SHAPES}
    runs = []
    for shape in SHAPES[: options.shapes]:
        for noise in options.noises:
            runs += [(shape, noise, seed, "best") for seed in range(seeds[shape])]
            runs += [(shape, noise, seed, "random") for seed in range(min(options.random_seeds, seeds[shape]))]
    rows: list[Row] = []
    with ProgressBar(len(runs), "runs") as progress:
        for shape, noise, seed, start in runs:
            progress(len(rows), f"{shape}, noise {noise:g}, seed {seed}, {start}")
            rows.append(attempt(shape, noise, seed, start, options.sweeps))
    write_rows(options.out / "recovery.csv", COLUMNS, rows)
    style.save(plot(rows), options.out / "recovery.png")
    for shape in dict.fromkeys(shape for shape, *_ in runs):
        for noise in options.noises:
            for start in ("best", "random"):
                group = [r for r in rows if (shape_of(r), r["noise"], r["start"]) == (shape, noise, start)]
                errors, distances = ([row[key] for row in group] for key in ("error", "distance"))
                print(
                    f"{shape!s:24} noise {noise:<6g} {start:7} {sum(row['recovered'] for row in group)} of {len(group)}"
                    f"  error {min(errors):.4g} .. {max(errors):.4g}  distance up to {max(distances):.4g}"
                    f"  {math.fsum(row['seconds'] for row in group) / len(group):.1f} s"
                )


if __name__ == "__main__":
    main()
