"""What a sweep costs, and what a pass over M is worth, against the sweeps of the paper and other people's CP code.

    python -m experiments.benchmark            # some minutes; figures/benchmark.csv, passes.csv and three pictures
    python -m experiments.benchmark --traces   # what passes.png shows, and no more: passes.csv
    python -m experiments.benchmark --quick --out DIR    # small sizes, for function

Part 1, `passes`: from the allocation start, error after every sweep, passes over M (the start's residual left out) and
seconds: 300 joint sweeps, the paper's sweeps, and the core's until its error is not above that of the joint ones; on
the first stack, k = r, also the CP sweeps of tensorly and pyttb from there; its whole traces are in passes.csv.
Part 2, `sweep`: seconds of one joint sweep beside its own two products with M, and of one CP sweep of tensorly, pyttb
and pygenten, where they are installed, on the same tensor, k = r, in one process, in alternating order. A sweep of
theirs is a tenth of what eleven take longer than one, from the same start, so that setting up does not count; the last
two compute in float64 and run there only.
Part 3, `growth`: the same seconds of ours where one of L, b, R and k grows, the others held fixed, in float32.
Part 4, `lora`: seconds of `solve_lora(.., "fast")` beside torch's svdvals; `error` is the width of its interval.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

import rasa_theory as rt
from experiments.support.rows import Row, read_rows, write_rows
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


def timed(jobs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each job, in alternating order, after one call to warm up."""
    clock: dict[str, list[float]] = {name: [] for name in jobs}
    for n in range(repeats + 1):
        for name, job in jobs.items() if n % 2 else reversed(jobs.items()):
            started = time.perf_counter()
            job()
            if n > 0:
                clock[name].append(time.perf_counter() - started)
    return clock


def gaussian(shape: tuple[int, int, int], dtype: str) -> rt.LayerStack:
    M = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    return rt.LayerStack(M, f"gaussian {'x'.join(map(str, shape))}")


def one_sweep(run: RasaDescent) -> None:
    """One sweep more; an error if it was not taken, since then there is nothing to time."""
    before = run.sweeps
    if run.run(before + 1, 0.0).sweeps == before:
        raise ArithmeticError(f"no sweep was taken: {run.stop_reason}")


def our_jobs(stack: rt.LayerStack, budget: rt.RankBudget) -> dict[str, Callable[[], Any]]:
    """One joint sweep, and its two products alone, with thin factors that lie as those of a sweep do."""
    unit, L, (b, a) = stack.unit(), stack.layers, stack.shape
    run = RasaDescent(unit, random_start(unit, budget, 0, size=0.1), "joint", "random")
    one_sweep(run)
    width = budget.pool_rank(L) + budget.private_rank
    X, Y = (torch.randn(L, width, n, dtype=stack.dtype).mT for n in (a, b))
    return {"joint": lambda: one_sweep(run), "its two products": lambda: (unit.right(X), unit.left(Y))}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing that compiled code prints is seen."""
    kept, nowhere = [os.dup(n) for n in (1, 2)], os.open(os.devnull, os.O_WRONLY)
    for n in (1, 2):
        os.dup2(nowhere, n)
    try:
        yield
    finally:
        for n, old in zip((1, 2), kept, strict=True):
            os.dup2(old, n)
            os.close(old)
        os.close(nowhere)


def their_sweeps(M: torch.Tensor, factors: list[torch.Tensor]) -> dict[str, Callable[[int], Any]]:
    """Other people's CP by alternating least squares on the tensor M: so many sweeps from `factors`, (n, R) per axis.

    All but pygenten's return factors.
    """
    sweeps: dict[str, Callable[[int], Any]] = {}
    R = factors[0].shape[1]
    if importlib.util.find_spec("tensorly"):
        import tensorly
        from tensorly.decomposition import parafac

        tensorly.set_backend("pytorch")
        start = tensorly.cp_tensor.CPTensor((torch.ones(R, dtype=M.dtype), factors))

        def parafacs(n: int) -> list[torch.Tensor]:
            weights, (first, *others) = parafac(M, R, n_iter_max=n, init=start, tol=0, normalize_factors=False)
            return [first * weights, *others]

        sweeps["tensorly parafac"] = parafacs
    if M.dtype == torch.float64 and importlib.util.find_spec("pyttb"):
        import pyttb

        tensor = pyttb.tensor(M.numpy())
        begin = pyttb.ktensor([np.asfortranarray(F.numpy()) for F in factors])

        def cp_als(n: int) -> list[torch.Tensor]:
            found = pyttb.cp_als(tensor, R, maxiters=n, init=begin, printitn=0, stoptol=0)[0]
            first, *others = (torch.as_tensor(F) for F in found.factor_matrices)
            return [first * torch.as_tensor(found.weights), *others]

        sweeps["pyttb cp_als"] = cp_als
        if importlib.util.find_spec("pygenten"):
            with quiet():
                import pygenten

                given = pygenten.make_gt_tensor(tensor)
                guess = pygenten.Ktensor(np.ones(R), [F.numpy() for F in factors])
            method = {"mttkrp_method": pygenten.MttkrpPhan, "printitn": 0, "tol": 0}  # Phan's, for dense tensors

            def genten(n: int) -> None:
                with quiet():
                    pygenten.cp_als(given, rank=R, init=guess, maxiters=n, **method)

            sweeps["pygenten cp_als"] = genten
    return sweeps


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


AXES: dict[str, tuple[str, Callable[[Row], Any]]] = {
    "L": ("layers L (R = {k} L)", lambda row: row["layers"]),
    "b": ("rows b", lambda row: row["b"]),
    "R": ("ranks of the pool R (q = {q})", lambda row: row["layers"] * row["k"]),
    "k": ("shared ranks k (r = {rank})", lambda row: row["k"]),
}
"""What an axis of growth is called, and its value in a row."""
OURS = {
    "joint": ("joint sweep", style.BLUE, "o-"),
    "its two products": ("its two products", style.ORANGE, "s--"),
}
PEERS = {
    "joint": ("joint", style.BLUE, "o"),
    "tensorly parafac": ("tensorly", style.GREEN, "^"),
    "pyttb cp_als": ("pyttb", style.PURPLE, "D"),
    "pygenten cp_als": ("pygenten", style.VERMILION, "v"),
}
SWEEPS = {
    "joint sweeps": (style.BLUE, ".-"), "core sweeps": (style.ORANGE, ".-"), "paper sweeps": (style.GREEN, ".-"),
    "tensorly parafac": (style.VERMILION, "x--"), "pyttb cp_als": (style.PURPLE, "+--"),
}  # fmt: skip
"""Names, colours and markers of what the figures show."""


def plot_growth(rows: list[Row]) -> Figure:
    """Seconds of a joint sweep and of its products, one panel per axis."""
    base = next(row for row in rows if row["axis"] == "R")
    figure = style.new_figure(5.4)
    axes = style.panels(figure, 2, 2, sharey=True)
    for n, (panel, (axis, (label, value))) in enumerate(zip(axes.flat, AXES.items(), strict=True)):
        for method, (name, color, look) in OURS.items():
            points = [row for row in rows if row["axis"] == axis and row["method"] == method]
            x, y = [value(p) for p in points], [p["seconds_min"] for p in points]
            panel.loglog(x, y, look, color=color, label=name)
            if n == 0:
                at = {"ha": "right", "xytext": (0, 9)} if method == "joint" else {"va": "top", "xytext": (8, -3)}
                style.note(panel, name, (x[1], y[1]), textcoords="offset points", color=color, **at)
        panel.set_xticks(x, [str(t) for t in x])
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.tick_params(axis="x", which="minor", length=0)
        style.grid(panel)
        first = points[0]
        style.name(panel, label.format(**first, q=first["rank"] - first["k"]), "seconds" if n % 2 == 0 else "")
    shape = "{layers} x {b} x {a}, {dtype}".format(**base)
    figure.suptitle(f"One joint sweep around {shape}", fontsize=style.MEDIUM)
    return figure


def plot_cost(rows: list[Row]) -> Figure:
    """Seconds of a sweep over those of the two products of a joint one, against the operations of these."""
    figure = style.new_figure(4.2)
    panel = style.panels(figure)[0, 0]
    ends = []
    for (method, dtype), values in sorted(costs(rows).items()):
        name, color, marker = PEERS[method]
        look = {"markerfacecolor": "none"} if dtype == "float32" else {}
        panel.loglog(*zip(*values, strict=True), marker, color=color, markersize=6, **look)
        ends.append((*max(values), f"{name}, {dtype}", color))
    panel.axhline(1.0, color=style.INK, linewidth=1)
    panel.set_ylim(bottom=min(0.8, panel.get_ylim()[0]))
    panel.set_yticks([1, 2, 5, 10], ["1", "2", "5", "10"])
    panel.yaxis.set_minor_formatter(NullFormatter())
    style.name(panel, "operations of the two products, 4 L b a (q + R)", "seconds of a sweep / of the products")
    style.grid(panel)
    style.label_ends(panel, ends, 0.075)
    return figure


def costs(rows: list[Row]) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """By method and dtype: operations of the two products of a joint sweep, and seconds over theirs."""
    points: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        if row["part"] in ("sweep", "growth"):
            point = tuple(row[name] for name in ("part", "layers", "b", "a", "rank", "k", "dtype"))
            points.setdefault(point, {})[row["method"]] = row["seconds_min"]
    series: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for (_, L, b, a, rank, k, dtype), seconds in points.items():
        products, operations = seconds["its two products"], 4 * L * b * a * (rank - k + L * k)
        for method, least in seconds.items():
            if method != "its two products":
                series.setdefault((method, dtype), []).append((operations, least / products))
    return series


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


def plot_passes(traces: list[Row]) -> Figure:
    """Error against passes and against seconds, one line of panels per k; the start is drawn at one pass."""
    ks = sorted({row["k"] for row in traces})
    figure = style.new_figure(1.0 + 2.1 * len(ks))
    axes = style.panels(figure, len(ks), 2, sharex="col", sharey="row")
    for (left, right), k in zip(axes, ks, strict=True):
        for method, (color, look) in SWEEPS.items():
            run = [row for row in traces if row["k"] == k and row["method"] == method]
            passes, seconds, errors = ([row[key] for row in run] for key in ("passes", "seconds", "error"))
            if run:
                settings = {"color": color, "markersize": 4, "linewidth": 1, "label": method}
                left.semilogx([max(p, 1) for p in passes], errors, look, **settings)
                right.semilogx(seconds[1:], errors[1:], look, **settings)
        for panel in (left, right):
            style.grid(panel)
        style.name(left, y=f"k = {k}:\nerror / $e_{{\\mathrm{{LoRA}}}}$")
    style.name(axes[-1, 0], "passes over M")
    style.name(axes[-1, 1], "seconds")
    style.legend(figure, *axes[-1, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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


if __name__ == "__main__":
    main()
