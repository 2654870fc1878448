"""The four parts of the experiment, and its command."""

from __future__ import annotations

import argparse
import functools
import itertools
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import rasa_theory as rt
from experiments.benchmark import __doc__ as description
from experiments.benchmark.codes import their_sweeps
from experiments.benchmark.figure import plot_cost, plot_growth, plot_passes
from experiments.support.rows import Row, read_rows, write_rows
from experiments.support.timing import one_sweep, timed
from rasa_theory.plotting import style
from rasa_theory.solvers import RasaDescent, allocation_start, random_start
from rasa_theory.sources import synthetic_stack

COLUMNS = (
    "part", "axis", "stack", "layers", "b", "a", "rank", "k", "dtype", "threads", "method", "sweeps", "passes",
    "seconds", "seconds_min", "error", "error_joint", "torch", "machine",
)  # fmt: skip
TRACE = ("stack", "rank", "k", "method", "passes", "seconds", "error", "threads", "torch", "machine")


def facts(stack: rt.LayerStack, budget: rt.RankBudget, **more: Any) -> dict[str, Any]:
    """One row: what was run, on what."""
    b, a = stack.shape
    row = {
        "stack": stack.name, "layers": stack.layers, "b": b, "a": a, "rank": budget.rank, "k": budget.shared_rank,
        "dtype": str(stack.dtype).removeprefix("torch."), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "machine": platform.machine(),
    }  # fmt: skip
    return row | more


def traced(stack: rt.LayerStack, budget: rt.RankBudget, sweep: str, sweeps: int, target: float = 0.0) -> dict[str, Any]:
    """Passes, seconds and error after every sweep from the allocation start, until `sweeps` or `target`."""
    unit = stack.unit()
    run = RasaDescent(unit, allocation_start(unit, budget), sweep, "allocation")
    begun, passes, clock, trace = unit.data_passes, [0], [0.0], [run.history[0]]
    while run.sweeps < sweeps and run.stop_reason is None and run.best_error > target:
        started = time.perf_counter()
        run.run(run.sweeps + 1, 0.0)
        clock.append(clock[-1] + time.perf_counter() - started)
        passes.append(unit.data_passes - begun)
        trace.append(run.best_error)
    return {"passes": passes, "errors": trace, "clock": clock, "sweeps": run.sweeps}


def traced_cp(unit: rt.LayerStack, budget: rt.RankBudget, sweeps: int) -> dict[str, dict[str, Any]]:
    """The same of other people's CP codes, k = r, after 1, 2, 4, .. sweeps, each run anew from the allocation start.

    One of their sweeps reads M for each of its three factors. Seconds are of the whole call; the error is our residual.
    """
    start = allocation_start(unit, budget)
    begin = [start.mixing, start.shared_B, start.shared_A.mT]
    runs: dict[str, dict[str, Any]] = {}
    for name, codes in their_sweeps(unit.values, begin).items():
        if name == "pygenten cp_als":
            continue
        run: dict[str, list[Any]] = {"passes": [0], "errors": [rt.reconstruction_error(unit, start)], "clock": [0.0]}
        for n in itertools.takewhile(lambda n: n <= sweeps, (2**m for m in itertools.count())):
            started = time.perf_counter()
            D, B_S, At_S = codes(n)
            run["clock"].append(time.perf_counter() - started)
            run["passes"].append(3 * n)
            found = rt.RasaFactors(start.private_B, start.private_A, B_S, At_S.mT, D)
            run["errors"].append(rt.reconstruction_error(unit, found))
        runs[name] = run | {"sweeps": run["passes"][-1] // 3}
    return runs


def part_passes(stacks: list[rt.LayerStack], ks: list[int], rank: int, joint: int, rows: list[Row]) -> list[Row]:
    """The rows; and those of the figure, which are the whole traces of the first stack."""
    traces: list[Row] = []
    for stack in stacks:
        e_lora = rt.solve_lora(stack, rank).error / stack.scale**2
        for k in ks:
            budget = rt.RankBudget(rank, k)
            plain = traced(stack, budget, "joint", joint)
            target = plain["errors"][-1]
            core = traced(stack, budget, "core", 40, target)
            runs = {"joint": plain, "core": core}
            if stack is stacks[0] and k == rank:
                runs |= traced_cp(stack.unit(), budget, joint)
            if stack is stacks[0]:
                longer, paper = traced(stack, budget, "core", 20), traced(stack, budget, "paper", joint // 5)
                drawn = {"joint sweeps": plain, "core sweeps": longer, "paper sweeps": paper}
                drawn |= {name: run for name, run in runs.items() if name not in ("joint", "core")}
                same = {key: value for key, value in facts(stack, budget).items() if key in TRACE}
                traces += [
                    same | {"method": name, "passes": passes, "seconds": seconds, "error": error / e_lora}
                    for name, run in drawn.items()
                    for passes, seconds, error in zip(run["passes"], run["clock"], run["errors"], strict=True)
                ]
            for method, run in runs.items():
                row = facts(stack, budget, part="passes", method=method, sweeps=run["sweeps"], passes=run["passes"][-1])
                row |= {
                    "seconds": run["clock"][-1],
                    "error": run["errors"][-1] / e_lora,
                    "error_joint": target / e_lora,
                }
                rows.append(row)
            hit = "reached" if core["errors"][-1] <= target else "NOT REACHED"
            print(
                f"{stack.name:24} k = {k}: {joint} joint sweeps {target / e_lora:.5f} of e_lora "
                f"({plain['passes'][-1]} passes, {plain['clock'][-1]:.1f} s), {hit} by the core after "
                f"{core['passes'][-1]} passes, {core['clock'][-1]:.1f} s",
                flush=True,
            )
    return traces


def gaussian(shape: tuple[int, int, int], dtype: str) -> rt.LayerStack:
    M = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    return rt.LayerStack(M, f"gaussian {'x'.join(map(str, shape))}")


def our_jobs(stack: rt.LayerStack, budget: rt.RankBudget) -> dict[str, Callable[[], Any]]:
    """One joint sweep, and its two products alone, with thin factors that lie as those of a sweep do."""
    unit, L, (b, a) = stack.unit(), stack.layers, stack.shape
    run = RasaDescent(unit, random_start(unit, budget, 0, size=0.1), "joint", "random")
    one_sweep(run)
    width = budget.pool_rank(L) + budget.private_rank
    X, Y = (torch.randn(L, width, n, dtype=stack.dtype).mT for n in (a, b))
    return {"joint": lambda: one_sweep(run), "its two products": lambda: (unit.right(X), unit.left(Y))}


def noted(least: dict[str, float], median: dict[str, float], row: dict[str, Any], rows: list[Row]) -> None:
    """A row for the seconds of each method, also as a line."""
    for method, seconds in least.items():
        rows.append(row | {"method": method, "seconds": median[method], "seconds_min": seconds})
        print(
            f"{row['stack']:24} r = {row['rank']}, k = {row['k']}, {row['dtype']}: {method:18} {seconds:.4f} s (median "
            f"{median[method]:.4f}), {seconds / least['joint']:.2f} of a joint sweep",
            flush=True,
        )


def part_sweep(shape: tuple[int, int, int], rank: int, k: int, dtype: str, repeats: int, rows: list[Row]) -> None:
    """One joint sweep, its two products, and one sweep of other people's CP code on the same tensor."""
    stack, budget = gaussian(shape, dtype), rt.RankBudget(rank, k)
    jobs = our_jobs(stack, budget)
    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(n, budget.pool_rank(shape[0]), generator=generator).to(stack.dtype) for n in shape]
    theirs = their_sweeps(stack.values, start) if budget.private_rank == 0 else {}
    for name, sweeps in theirs.items():
        jobs |= {f"{name}, {n}": functools.partial(sweeps, n) for n in (1, 11)}
    clock = timed(jobs, repeats)
    for name in theirs:
        one, eleven = (clock.pop(f"{name}, {n}") for n in (1, 11))
        clock[name] = [(y - x) / 10 for x, y in zip(one, eleven, strict=True)]
    least, median = ({name: f(seconds) for name, seconds in clock.items()} for f in (min, statistics.median))
    least |= {name: median[name] for name in theirs}  # a difference of two times has no least that means anything
    noted(least, median, facts(stack, budget, part="sweep"), rows)


def part_growth(axes: dict[str, list[tuple[tuple[int, int, int], int, int]]], repeats: int, rows: list[Row]) -> None:
    """Seconds of a joint sweep and of its two products along each axis: shape, r and k of every point."""
    for axis, points in axes.items():
        for shape, rank, k in points:
            stack, budget = gaussian(shape, "float32"), rt.RankBudget(rank, k)
            clock = timed(our_jobs(stack, budget), repeats)
            least, median = ({name: f(seconds) for name, seconds in clock.items()} for f in (min, statistics.median))
            noted(least, median, facts(stack, budget, part="growth", axis=axis), rows)


def growth_axes(L: int, b: int, a: int, rank: int, k: int, count: int) -> dict[str, Any]:
    """`count` points on each axis around a base, by doubling."""
    q, doubled = rank - k, [2**n for n in range(count)]
    return {
        "L": [((L // 2 * n, b, a), rank, k) for n in doubled],
        "b": [((L, b // 2 * n, a), rank, k) for n in doubled],
        "R": [((L, b, a), q + n, n) for n in doubled],
        "k": [((L, b, a), rank, n) for n in doubled],
    }


def part_lora(shape: tuple[int, int, int], rank: int, repeats: int, rows: list[Row]) -> None:
    """e_lora without full SVDs beside all singular values; decaying and flat spectra."""
    L, b, a = shape
    decaying = synthetic_stack(L, (b, a), spectrum="power:0.5", overlap=0.5, seed=0).values.float()
    flat = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    for name, M in (("power:0.5", decaying), ("gaussian", flat)):
        stack = rt.LayerStack(M, f"{name} {'x'.join(map(str, shape))}")
        jobs: dict[str, Callable[[], Any]] = {
            "solve_lora fast": functools.partial(rt.solve_lora, stack, rank, "fast"),
            "torch svdvals": functools.partial(torch.linalg.svdvals, M),
        }
        clock = timed(jobs, repeats)
        low, high = rt.solve_lora(stack, rank, "fast").interval
        width = (high - low) / stack.norm_squared
        for method, seconds in clock.items():
            row = facts(stack, rt.RankBudget(rank, 0), part="lora", method=method)
            row |= {"seconds": statistics.median(seconds), "seconds_min": min(seconds), "error": width}
            rows.append(row)
            print(
                f"{stack.name:24} r = {rank}: {method:18} {min(seconds):.3f} s (median {row['seconds']:.3f})",
                flush=True,
            )
        print(f"{stack.name:24} r = {rank}: the interval is {width:.1e} ||M||^2 wide", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", action="store_true", help="only the traces of the first stack")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--out", type=Path, default=Path("figures"))
    options = parser.parse_args(arguments)

    rows: list[Row] = []
    bundled = list(rt.load("minilm-code")[0])
    if options.traces:
        traces = part_passes(bundled[:1], [1, 2, 4, 8], 8, 300, rows)
    elif options.quick:
        small = rt.LayerStack(bundled[0].values[:, :96, :96], "query, a crop")
        traces = part_passes([small], [1, 8], 8, 50, rows)
        for dtype in ("float32", "float64"):
            part_sweep((4, 96, 96), 4, 4, dtype, 3, rows)
        part_growth(growth_axes(4, 64, 48, 4, 1, 2), 3, rows)
        part_lora((2, 160, 160), 2, 1, rows)
    else:
        traces = part_passes(bundled, [1, 2, 4, 8], 8, 300, rows)
        synthetic = synthetic_stack(16, (768, 768), spectrum="power:0.5", overlap=0.5, seed=0)
        wide = rt.LayerStack(synthetic.values.float(), "synthetic power:0.5")
        part_passes([wide], [1, 2, 4, 8], 8, 300, rows)
        for shape, rank, k, repeats in (((16, 768, 768), 4, 4, 4), ((16, 768, 768), 8, 4, 7), ((6, 384, 384), 8, 1, 7)):
            for dtype in ("float32", "float64"):
                part_sweep(shape, rank, k, dtype, repeats, rows)
        part_growth(growth_axes(8, 384, 384, 8, 2, 4), 7, rows)
        part_lora((8, 2048, 2048), 8, 2, rows)
    write_rows(options.out / "passes.csv", TRACE, traces)
    style.save(plot_passes(traces), options.out / "passes.png")
    if not options.traces:
        write_rows(options.out / "benchmark.csv", COLUMNS, rows)
        rows = read_rows(options.out / "benchmark.csv")
        style.save(plot_cost(rows), options.out / "sweep_cost.png")
        style.save(plot_growth(rows), options.out / "growth.png")
