"""What a sweep costs, and what a pass over M is worth, against the sweeps of the paper and other people's CP code.

    python experiments/benchmark.py            # some minutes; figures/benchmark.csv, figures/passes.png
    python experiments/benchmark.py --quick --out DIR    # small sizes, for function

Part 1, `passes`: from the allocation start, error after every sweep, passes over M (the start's residual left out) and
seconds: 300 joint sweeps, the paper's sweeps, and the core's until its error is not above that of the joint ones.
Part 2, `sweep`: seconds of one joint sweep beside its own two products with M, and of one CP sweep of tensorly (and
pyttb, where it is installed) on the same tensor, k = r, in one process, in alternating order.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import rasa_theory as rt
from rasa_theory.descent import Descent
from rasa_theory.sources.synthetic import synthetic_stack
from rasa_theory.starts import allocation_start, random_start

COLUMNS = (
    "part", "stack", "layers", "b", "a", "rank", "k", "dtype", "threads", "method", "sweeps", "passes",
    "seconds", "seconds_min", "error", "error_joint", "torch", "machine",
)  # fmt: skip


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
    run = Descent(unit, allocation_start(unit, budget), sweep, "allocation")
    begun, passes, clock, trace = unit.data_passes, [0], 0.0, [run.history[0]]
    while run.sweeps < sweeps and run.stop_reason is None and run.best_error > target:
        started = time.perf_counter()
        run.run(run.sweeps + 1, 0.0)
        clock += time.perf_counter() - started
        passes.append(unit.data_passes - begun)
        trace.append(run.best_error)
    return {"passes": passes, "errors": trace, "seconds": clock, "sweeps": run.sweeps}


def part_passes(stacks: list[rt.LayerStack], ks: list[int], rank: int, joint: int, rows: list[dict[str, Any]]) -> Any:
    """The rows, and the curves of the first stack for the figure: k -> method -> trace."""
    curves: dict[int, dict[str, Any]] = {}
    for stack in stacks:
        e_lora = rt.solve_lora(stack, rank).error / stack.scale**2
        for k in ks:
            budget = rt.RankBudget(rank, k)
            plain = traced(stack, budget, "joint", joint)
            target = plain["errors"][-1]
            core = traced(stack, budget, "core", 40, target)
            runs = {"joint": plain, "core": core}
            if stack is stacks[0]:
                longer, paper = traced(stack, budget, "core", 20), traced(stack, budget, "paper", joint // 5)
                curves[k] = {
                    name: run | {"e_lora": e_lora} for name, run in (runs | {"core": longer, "paper": paper}).items()
                }
            for method, run in runs.items():
                row = facts(stack, budget, part="passes", method=method, sweeps=run["sweeps"], passes=run["passes"][-1])
                row |= {"seconds": run["seconds"], "error": run["errors"][-1] / e_lora, "error_joint": target / e_lora}
                rows.append(row)
            hit = "reached" if core["errors"][-1] <= target else "NOT REACHED"
            print(
                f"{stack.name:24} k = {k}: {joint} joint sweeps {target / e_lora:.5f} of e_lora "
                f"({plain['passes'][-1]} passes, {plain['seconds']:.1f} s), {hit} by the core after "
                f"{core['passes'][-1]} passes, {core['seconds']:.1f} s",
                flush=True,
            )
    return curves


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


def part_sweep(shape: tuple[int, int, int], rank: int, k: int, dtype: str, repeats: int, rows: list[Any]) -> None:
    """One joint sweep, its two products, and one sweep of other people's CP code on the same tensor."""
    M = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    stack, budget = rt.LayerStack(M, f"gaussian {'x'.join(map(str, shape))}"), rt.RankBudget(rank, k)
    unit, (L, b, a), R = stack.unit(), shape, budget.pool_rank(shape[0])
    run = Descent(unit, random_start(unit, budget, 0, size=0.1), "joint", "random")
    run.run(1, 0.0)
    width = R + budget.private_rank
    X, Y = torch.randn(L, a, width, dtype=M.dtype), torch.randn(L, b, width, dtype=M.dtype)
    jobs: dict[str, Callable[[], Any]] = {
        "joint": lambda: run.run(run.sweeps + 1, 0.0),
        "its two products": lambda: (unit.right(X), unit.left(Y)),
    }
    if budget.private_rank == 0 and importlib.util.find_spec("tensorly"):
        import tensorly
        from tensorly.decomposition import parafac

        tensorly.set_backend("pytorch")
        factors = [torch.randn(n, R, dtype=M.dtype) for n in shape]
        start = tensorly.cp_tensor.CPTensor((torch.ones(R, dtype=M.dtype), factors))
        jobs["tensorly parafac"] = lambda: parafac(M, R, n_iter_max=1, init=start, tol=0, normalize_factors=False)
    if budget.private_rank == 0 and importlib.util.find_spec("pyttb"):
        import pyttb

        tensor = pyttb.tensor(M.numpy())
        jobs["pyttb cp_als"] = lambda: pyttb.cp_als(tensor, R, maxiters=1, printitn=0)
    clock = timed(jobs, repeats)
    base = min(clock["joint"])
    for method, seconds in clock.items():
        rows.append(
            facts(
                stack, budget, part="sweep", method=method, seconds=statistics.median(seconds), seconds_min=min(seconds)
            )
        )
        print(
            f"{stack.name:24} r = {rank}, k = {k}, {dtype}: {method:18} {min(seconds):.4f} s (median "
            f"{statistics.median(seconds):.4f}), {min(seconds) / base:.2f} of a joint sweep",
            flush=True,
        )


def draw(curves: dict[int, dict[str, Any]], title: str, path: Path) -> None:
    """Error against passes, one panel per k."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(curves), figsize=(3.6 * len(curves), 3.4), squeeze=False)
    for panel, (k, methods) in zip(axes[0], curves.items(), strict=True):
        for name, run in methods.items():
            ratios = [e / run["e_lora"] for e in run["errors"]]
            panel.semilogx([max(p, 1) for p in run["passes"]], ratios, label=f"{name} sweeps", marker=".", markersize=3)
        panel.set_title(f"k = {k}")
        panel.set_xlabel("passes over M (the start drawn at 1)")
        panel.grid(alpha=0.3)
    axes[0][0].set_ylabel("error / e_lora")
    axes[0][0].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--out", type=Path, default=Path("figures"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    rows: list[dict[str, Any]] = []
    bundled = list(rt.load("minilm-code")[0])
    if options.quick:
        small = rt.LayerStack(bundled[0].values[:, :96, :96], "query, a crop")
        curves = part_passes([small], [1, 4], 8, 50, rows)
        part_sweep((4, 96, 96), 4, 4, "float32", 3, rows)
    else:
        curves = part_passes(bundled, [1, 2, 4, 8], 8, 300, rows)
        synthetic = synthetic_stack(16, (768, 768), spectrum="power:0.5", overlap=0.5, seed=0)
        wide = rt.LayerStack(synthetic.values.float(), "synthetic power:0.5")
        part_passes([wide], [1, 2, 4, 8], 8, 300, rows)
        for shape, rank, k in (((16, 768, 768), 4, 4), ((16, 768, 768), 8, 4), ((6, 384, 384), 8, 1)):
            for dtype in ("float32", "float64"):
                part_sweep(shape, rank, k, dtype, 7, rows)
    with open(options.out / "benchmark.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    title = f"From the allocation start, {(bundled[0] if not options.quick else small).name}, r = 8"
    draw(curves, title, options.out / "passes.png")


if __name__ == "__main__":
    main()
