"""What sweeps cost, and where the solver ends, at the size of an 8B model's layers: made for one large GPU.

    python -m experiments.gpu_scale                      # figures/gpu_scale.json; minutes for each configuration
    python -m experiments.gpu_scale --configs 32x4096x4096:8:1 --repeats 5
    python -m experiments.gpu_scale --smoke --out FILE   # tiny stacks on the CPU, for function

Needs torch, numpy, scipy and safetensors, and the package, from the checkout if it is not installed. For every stack,
r and k it writes a record, again after each of its stages, so that a run that stops loses nothing; a stage that fails,
for want of memory say, leaves its reason in `failed`. Records of other configurations in the file are kept. A record
holds the hardware, and the most memory of the device that each stage held.

The stacks are made on the device, in float32, without an SVD of a full matrix: M_i = c_i (U_i diag(s) V_i^T + G_i),
with c_i from 0.5 for the first layer to 1.5 for the last, and s_j = j^-0.7 for j <= p = min(512, min(b, a) / 4); U_i
and V_i orthonormalise sqrt(0.5) G + sqrt(0.5) G'_i, G common to all layers, so that layers overlap; G_i is Gaussian
with norm s_p, so that the tail goes on where the power law ends.

The start is made of the terms that a randomised subspace iteration finds: q leading ones of a layer private, the R next
largest of all layers in the pool. e_lora is the certified interval of `solve_lora(.., method="fast")`, and
`e_rasa_over_e_lora` one too. `--default` runs the default solver as well, with its exact SVDs and its search.
`--figure` draws what the file holds (needs matplotlib).
"""

from __future__ import annotations

import argparse
import gc
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import rasa_theory as rt
from experiments.support import looks
from experiments.support.rows import Row, put_record, read_rows
from experiments.support.timing import one_sweep, timed
from rasa_theory.bounds import allocate_pool
from rasa_theory.linalg import thin_qr
from rasa_theory.plotting import style
from rasa_theory.problem import SVD, compute_device
from rasa_theory.solvers import RasaDescent, random_start, sweeps_on

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Config = tuple[int, int, int, int, int]  # L, b, a, r, k
FULL = ",".join(f"32x{b}x4096:{r}:{k}" for b in (4096, 14336) for r in (8, 64) for k in (1, 8))
SMOKE = "4x48x48:4:1,4x48x48:4:4,4x96x48:4:2"
OVERLAP, DECAY, ITERATIONS, SEED = 0.5, 0.7, 4, 0


class OutOfTime(Exception):
    """Ends a solve that has taken as long as it may."""


def now(device: torch.device) -> float:
    """Seconds, after all work on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def spread(seconds: list[float]) -> dict[str, float]:
    return {"min": min(seconds), "median": statistics.median(seconds)}


def hardware(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    found: dict[str, Any] = {
        "device": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }  # fmt: skip
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found |= {"device": card.name, "memory": card.total_memory, "cuda": torch.version.cuda}
    return found


def copy_speed(size: int, repeats: int, device: torch.device) -> float:
    """Bytes read and written in a second by a copy of `size` bytes on the device, at its fastest."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    seconds = timed({"copy": lambda: target.copy_(source)}, repeats, lambda: now(device))["copy"]
    return 2 * source.numel() * 4 / min(seconds)


def made_stack(layers: int, b: int, a: int, device: torch.device, tf32: bool = False) -> rt.LayerStack:
    """The stack that the module's docstring describes; the numbers depend on the kind of device."""
    generator = torch.Generator(device).manual_seed(SEED)
    p = max(1, min(512, min(b, a) // 4))
    s = torch.arange(1, p + 1, device=device, dtype=torch.float32) ** -DECAY
    common = [torch.randn(n, p, generator=generator, device=device) for n in (b, a)]
    M = torch.empty(layers, b, a, device=device)
    for i in range(layers):
        U, V = (
            torch.linalg.qr(
                math.sqrt(OVERLAP) * G
                + math.sqrt(1 - OVERLAP) * torch.randn(G.shape, generator=generator, device=device)
            )[0]
            for G in common
        )
        M[i].normal_(generator=generator).mul_(s[-1] / (math.sqrt(b) + math.sqrt(a)))
        M[i].addmm_(U * s, V.mT).mul_(0.5 + i / max(layers - 1, 1))
    return rt.LayerStack(M, f"power:{DECAY} of rank {p} in a Gaussian tail", tf32=tf32)


def leading_terms(unit: rt.LayerStack, width: int, iterations: int) -> SVD:
    """About the `width` leading singular terms of every layer, by a randomised subspace iteration."""
    generator = torch.Generator(unit.device).manual_seed(SEED)
    X = torch.randn(unit.shape[1], width, generator=generator, device=unit.device, dtype=unit.dtype)
    for _ in range(iterations):
        Q = thin_qr(unit.right(X))[0]  # (L, b, width)
        X, T = thin_qr(unit.left(Q))  # M_i^T Q = X T
    W, S, Zh = torch.linalg.svd(T.double())  # M_i is about Q Q^T M_i = Q (X T)^T = (Q Z) diag(S) (X W)^T
    return SVD(Q @ Zh.mT.to(Q.dtype), S.to(Q.dtype), (X @ W.to(X.dtype)).mT)


def start_from(terms: SVD, budget: rt.RankBudget) -> rt.RasaFactors:
    """q leading terms of every layer private, the R next largest in the pool, each for the layer it comes from."""
    (U, S, Vh), q = terms, budget.private_rank
    layer, index = allocate_pool(S, budget)
    mixing = torch.zeros(len(S), len(layer), dtype=S.dtype, device=S.device)
    mixing[layer, torch.arange(len(layer), device=S.device)] = S[layer, index]
    private = U[:, :, :q] * S[:, None, :q], Vh[:, :q]
    return rt.RasaFactors(*private, U[layer, :, index].mT, Vh[layer, index], mixing)


class Run:
    """The stages of one configuration, each of which adds to `record`; units are those of M / scale."""

    def __init__(self, stack: rt.LayerStack, budget: rt.RankBudget, options: argparse.Namespace) -> None:
        (b, a), L = stack.shape, stack.layers
        self.unit, self.budget, self.options, self.device = stack.unit(), budget, options, stack.device
        self.ranks = budget.private_rank + budget.pool_rank(L)
        self.size = L * b * a * stack.values.element_size()
        self.record: dict[str, Any] = {
            "layers": L, "b": b, "a": a, "rank": budget.rank, "k": budget.shared_rank, "dtype": "float32",
            "tf32": stack.tf32, "stack": stack.name, "stack_bytes": self.size, "hardware": hardware(stack.device),
        }  # fmt: skip
        self.stages = [self.start, self.lora, self.joint, self.core, self.solve]
        if self.device.type == "cuda":
            self.stages.append(self.pieces)
        if options.default:
            self.stages.append(self.default)

    def clocked(self, jobs: dict[str, Callable[[], Any]]) -> dict[str, dict[str, float]]:
        """Least and median seconds of each job on the device."""
        clock = timed(jobs, self.options.repeats, lambda: now(self.device))
        return {name: spread(seconds) for name, seconds in clock.items()}

    def start(self) -> None:
        """Factors to start from."""
        width = min(*self.unit.shape, self.budget.rank + max(8, 3 * self.budget.shared_rank))
        began = now(self.device)
        self.given = start_from(leading_terms(self.unit, width, ITERATIONS), self.budget)
        self.record |= {"start_seconds": now(self.device) - began}

    def lora(self) -> None:
        """The interval of e_lora."""
        began = now(self.device)
        self.interval = rt.solve_lora(self.unit, self.budget.rank, method="fast").interval
        self.record |= {
            "lora_fast_seconds": now(self.device) - began,
            "e_lora_over_norm": [e / self.unit.norm_squared for e in self.interval],
        }  # fmt: skip

    def joint(self) -> None:
        """A joint sweep beside its two products, and the speed at which they read M."""
        L, (b, a) = self.unit.layers, self.unit.shape
        X, Y = (torch.randn(L, self.ranks, n, device=self.device).mT for n in (a, b))
        run = RasaDescent(self.unit, self.given, "joint", "given")
        jobs = {
            "joint_sweep": lambda: one_sweep(run),
            "two_products": lambda: (self.unit.right(X), self.unit.left(Y)),
        }
        clock = self.clocked(jobs)
        products, copied = clock["two_products"]["min"], copy_speed(min(self.size, 2**31), 5, self.device)
        self.record |= {f"{name}_seconds": seconds for name, seconds in clock.items()}
        self.record |= {
            "joint_sweep_over_products": clock["joint_sweep"]["min"] / products,
            "joint_sweep_reads_bytes_per_second": 2 * self.size / clock["joint_sweep"]["min"],
            "two_products_read_bytes_per_second": 2 * self.size / products,
            "two_products_operations_per_second": 4 * L * b * a * self.ranks / products,
            "copy_bytes_per_second": copied,
            "joint_sweep_reads_over_copy": 2 * self.size / clock["joint_sweep"]["min"] / copied,
        }

    def core(self) -> None:
        """Core sweeps after one to warm up, which makes the bases: they grow, so that later ones cost more."""
        run = RasaDescent(self.unit, self.given, "core", "given")
        clock = []
        for _ in range(self.options.repeats + 1):
            began = now(self.device)
            one_sweep(run)
            clock.append(now(self.device) - began)
            if len(clock) > 1 and sum(clock) > self.options.limit:
                break
        self.record |= {"core_sweep_seconds": spread(clock[1:]), "core_sweep_seconds_each": clock}

    def solve(self) -> None:
        """`solve_rasa` from the given start to its stop, or to the limit in seconds."""
        upper = self.interval[1]
        trace = [[0.0, rt.reconstruction_error(self.unit, self.given) / upper]]
        began, read = now(self.device), self.unit.data_passes

        def after_sweep(progress: rt.Progress) -> None:
            trace.append([now(self.device) - began, progress.error / upper])
            self.record["solve_trace"] = trace  # seconds, error over the upper side of e_lora
            if trace[-1][0] > self.options.limit:
                raise OutOfTime

        solver = rt.SolverOptions(start=self.given, max_sweeps=self.options.max_sweeps)
        try:
            found = rt.solve_rasa(self.unit, self.budget, solver, after_sweep)
        except OutOfTime:
            error, stop = min(e for _, e in trace) * upper, f"{self.options.limit} seconds were over."
        else:
            error, stop = found.error, found.stop_reason.value
            self.record |= {"cancellation": found.cancellation}
        self.record |= {
            "solve_seconds": now(self.device) - began, "solve_sweeps": len(trace) - 1, "stop": stop,
            "data_passes": self.unit.data_passes - read,
            "e_rasa_over_e_lora": [error / upper, error / self.interval[0]],
        }  # fmt: skip

    def pieces(self) -> None:
        """What only a GPU does otherwise: sweeps on a core, replayed and checked, and QR, ours and torch's."""
        L, n = self.unit.layers, min(8 * self.ranks, *self.unit.shape)
        core = rt.LayerStack(torch.randn(L, n, n, device=self.device, dtype=torch.float64))
        point = random_start(core, self.budget, SEED, size=0.1).normalised()
        checked, replayed = (sweeps_on(core.values, (n, n), replayed) for replayed in (False, True))
        point, _ = replayed(point)  # checked; gives private terms to a start that has none, which no replay would stand
        thin = torch.randn(L, self.unit.shape[0], self.ranks, device=self.device)
        jobs: dict[str, Callable[[], Any]] = {
            "core_sweep_checked": lambda: checked(point),
            "core_sweep_replayed": lambda: replayed(point),
            "thin_qr": lambda: thin_qr(thin),
            "householder_qr": lambda: torch.linalg.qr(thin),
        }
        clock = self.clocked(jobs)
        self.record["pieces"] = {"core": n, **{f"{name}_seconds": seconds for name, seconds in clock.items()}}

    def default(self) -> None:
        """The default solver, and how much of it goes into the SVDs of the stack, which exact e_lora needs too."""
        began = now(self.device)
        e_lora = rt.solve_lora(self.unit, self.budget.rank).error
        decomposed = now(self.device)
        found = rt.solve_rasa(self.unit, self.budget)
        self.record["default"] = {
            "svd_seconds": decomposed - began, "solve_seconds": now(self.device) - decomposed,
            "start": found.start, "stop": found.stop_reason.value, "sweeps": found.sweeps,
            "data_passes": found.data_passes, "e_rasa_over_e_lora": found.error / e_lora,
        }  # fmt: skip

    def go(self, save: Callable[[dict[str, Any]], None]) -> None:
        """All stages; the first that fails is noted, and those after it are tried if there is a start."""
        for stage in self.stages:
            name = stage.__name__
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            try:
                stage()
            except (RuntimeError, ArithmeticError) as error:  # torch.OutOfMemoryError is a RuntimeError
                self.record.setdefault("failed", {})[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            if self.device.type == "cuda":
                peaks = self.record.setdefault("peak_device_bytes", {})
                peaks[name] = torch.cuda.max_memory_allocated(self.device)
            free(self.device)
            save(self.record)
            print(f"{title(self.record)} {name}: {self.record.get('failed', {}).get(name, 'done')}", flush=True)
            if not hasattr(self, "given"):
                return


def free(device: torch.device) -> None:
    """Give memory that nobody holds back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def title(record: dict[str, Any]) -> str:
    """The configuration, as --configs has it."""
    return "{layers}x{b}x{a}:{rank}:{k}".format(**record) + (" tf32" if record["tf32"] else "")


def plot(records: list[Row]) -> Figure:
    """A bar for every stack, r and k: seconds for LoRA's certified optimum, then for RaSA from start to stop."""
    done = [record for record in records if "e_rasa_over_e_lora" in record and not record["tf32"]]
    sizes = list(dict.fromkeys((record["layers"], record["b"], record["a"]) for record in done))
    figure = style.new_figure(1.2 + 0.2 * len(done) + 0.25 * len(sizes),
                              title="How fast are layers of an 8B model's size?")  # fmt: skip
    ((ax,),) = style.panels(figure)
    y, ticks = 0.0, []
    for size in sizes:
        text = "{} layers of {} × {}".format(*size)
        style.note(ax, text, (0, y - 0.8), xytext=(3, 0), textcoords="offset points", va="center", weight="bold")
        for record in (record for record in done if (record["layers"], record["b"], record["a"]) == size):
            lora, rasa = record["lora_fast_seconds"], record["start_seconds"] + record["solve_seconds"]
            ax.barh(y, lora, 0.75, color=looks.METHODS["lora"].color)
            ax.barh(y, rasa, 0.75, lora, color=looks.METHODS["rasa"].color)
            style.note(ax, f"{lora + rasa:.1f} s, {record['solve_sweeps']} sweeps", (lora + rasa, y), xytext=(3, 0),
                       textcoords="offset points", va="center")  # fmt: skip
            ticks.append((y, f"r = {record['rank']}, k = {record['k']}"))
            y += 0.9
        y += 1.1
    ax.barh(0, 0, color=looks.METHODS["lora"].color, label="LoRA, certified")
    ax.barh(0, 0, color=looks.METHODS["rasa"].color, label="RaSA, to its stop")
    ax.set_yticks([at for at, _ in ticks], [label for _, label in ticks])
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(y - 1.4, -1.4)
    ax.set_xlim(0, 1.42 * ax.get_xlim()[1])
    machines = sorted({record["hardware"]["device"] for record in done})
    style.name(ax, f"seconds on {' / '.join(machines)}, float32")
    style.legend_above(ax, 2)
    return figure


def parsed(text: str) -> list[Config]:
    """LxBxA:R:K, with commas between."""
    numbers = ([int(n) for n in one.replace("x", ":").split(":")] for one in text.split(","))
    return [(layers, b, a, rank, k) for layers, b, a, rank, k in numbers]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", help="LxBxA:R:K, .. (layers, rows, columns, r, k)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=5, help="timed sweeps of each kind")
    parser.add_argument("--max-sweeps", type=int, default=100, help="of the solve")
    parser.add_argument(
        "--limit", type=float, default=120.0, help="seconds for one solve, and for the timed core sweeps"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny stacks on the CPU, few sweeps")
    parser.add_argument("--tf32", action="store_true", help="products may round to TF32")
    parser.add_argument("--default", action="store_true", help="the default solver too, which takes SVDs: minutes")
    parser.add_argument(
        "--figure", action="store_true", help="draw what the file holds, beside it, and measure nothing"
    )
    parser.add_argument("--out", type=Path, default=Path("figures/gpu_scale.json"))
    options = parser.parse_args(arguments)
    if options.figure:
        style.save(plot(read_rows(options.out)), options.out.with_suffix(".png"))
        return
    if options.smoke:
        options.repeats, options.max_sweeps = 2, 4
    device = compute_device("cpu" if options.smoke else options.device)
    made: tuple[int, int, int] | None = None
    stack: rt.LayerStack | None = None
    for layers, b, a, rank, k in parsed(options.configs or (SMOKE if options.smoke else FULL)):
        if made != (layers, b, a):
            stack = None  # before the next one is made
            free(device)
            made, stack = (layers, b, a), made_stack(layers, b, a, device, options.tf32)
        assert stack is not None
        Run(stack, rt.RankBudget(rank, k), options).go(lambda record: put_record(options.out, record, title))
        free(device)


if __name__ == "__main__":
    main()
