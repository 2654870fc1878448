"""Seconds of a sweep over several processes: measured on this machine, and modelled for machines with GPUs.

    python -m experiments.scaling --out DIR             a minute; 1, 2 and 4 processes that share the cores
    python -m experiments.scaling --smoke --out DIR     seconds, for function only

Every row of scaling.csv is one of three kinds. `strong` (L layers in all) and `weak` (L per process) are measured:
seconds of a joint sweep, and the counted bytes that a process put into reductions, beside the formula

    8 ((b + a) R + 2 (R^2 + 2 R) + 8),    R = L k.

Each side has one reduction of a right-hand side, a Gram matrix and two vectors, and one of four scalars. `model` is

    seconds = products / speed + rest + reductions latency + 2 (P - 1) / P bytes / bandwidth

with products of 4 L_p b a (R + q) flops, L_p = ceil(L / P). For this machine all its constants are measured; `rest`
comes from the sweep of one process, which is therefore no test of the model. `predicted` stands beside `seconds`.
Processes that outnumber the cores share them. For several GPUs the constants are the makers' figures and the
measurements of one GPU, see `MACHINES`.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from experiments.support.rows import Row, read_rows, write_rows
from experiments.support.timing import timed
from rasa_theory import LayerStack, RankBudget, RasaFactors, solve_lora
from rasa_theory.distributed import ALONE, LayerSharding, Processes, end_with_parent
from rasa_theory.plotting import style
from rasa_theory.solvers import updates

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Task = tuple[Callable[..., dict[str, float]], tuple[Any, ...]]
"""A function of the processes and more arguments, and these."""

RANK, K = 8, 1
SIZES = {"measured": (16, 1024, 1024), "smoke": (4, 48, 40)}
TARGETS = {"32 x 4096 x 4096": (32, 4096, 4096), "80 x 8192 x 28672": (80, 8192, 28672)}


@dataclass(frozen=True)
class Machine:
    """The constants of the model."""

    speed: float  # flops a second of thin products in one process
    latency: float  # seconds of a reduction
    bandwidth: float  # bytes a second between processes
    fixed: float = 0.0  # seconds of a sweep beside its products, for any number of layers
    each: float = 0.0  # seconds of a sweep beside its products, for each layer of the process


# Products and the rest of a sweep are measured on one H200 (figures/gpu_scale.json): 24.8 Tflop/s, and 7.2 ms for 32
# layers, mostly launches of kernels, assumed to be the same for fewer layers. Not measured are the links, at 60 % of
# the makers' figures (NVLink 450 GB/s each way, InfiniBand 400 Gb/s for each GPU), and the latencies, which are usual
# values over 8 and over 32 GPUs.
MACHINES = {
    "8 GPUs": (8, Machine(24.8e12, 30e-6, 270e9, 7.2e-3)),
    "4 nodes x 8 GPUs": (32, Machine(24.8e12, 80e-6, 30e9, 7.2e-3)),
}


def bytes_of_sweep(layers: int, b: int, a: int, width: int = 8) -> int:
    """Bytes that a process puts into the reductions of one joint sweep."""
    R = layers * K
    return width * ((b + a) * R + 2 * (R * R + 2 * R) + 8)


def flops_of_sweep(held: int, layers: int, b: int, a: int) -> float:
    """Flops of the two products with M."""
    return 4.0 * held * b * a * (layers * K + RANK - K)


def predicted(machine: Machine, layers: int, b: int, a: int, world_size: int, width: int) -> float:
    """Seconds of a joint sweep in float64 (`width` 8) or float32 (4)."""
    held = math.ceil(layers / world_size)
    seconds = flops_of_sweep(held, layers, b, a) / machine.speed + machine.fixed + machine.each * held
    if world_size > 1:
        wire = 2 * (world_size - 1) / world_size * bytes_of_sweep(layers, b, a, width)
        seconds += 4 * machine.latency + wire / machine.bandwidth
    return seconds


def bytes_held(layers: int, b: int, a: int, world_size: int) -> float:
    """Bytes of one process in float32, in a joint sweep: M, its products of both sides, and factors."""
    held, R = math.ceil(layers / world_size), layers * K
    return 4.0 * (held * b * a + held * (b + a) * (R + 2 * RANK) + (b + a) * R)


# ---- measured


def sweeps(processes: Processes, layers: int, b: int, a: int, count: int) -> dict[str, float]:
    """Least seconds of a joint sweep, and the bytes of its reductions."""
    sharding = LayerSharding.of(layers, processes)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(layers, b, a, generator=generator, dtype=torch.float64)[sharding.local]
    stack = LayerStack(values, sharding=sharding)
    unit = stack.unit()
    lora = solve_lora(unit, RANK, "fast")
    factors, norms = RasaFactors.from_lora(lora.factors, RankBudget(RANK, K)), unit.layer_norms()
    taken = []
    for _ in range(count + 1):
        before, began = processes.communication.reduced_bytes, time.perf_counter()
        factors, _ = updates.joint_sweep((unit.right, unit.left), norms, factors)
        taken.append(time.perf_counter() - began)
        counted = processes.communication.reduced_bytes - before
    return {"seconds": min(taken[1:]), "bytes": counted}


def machine_here(processes: Processes, b: int, a: int, layers: int) -> dict[str, float]:
    """Speed of thin products, alone; latency and bandwidth of reductions between these processes."""
    M = torch.randn(layers, b, a, dtype=torch.float64)
    X = torch.randn(a, layers * K + RANK - K, dtype=torch.float64)
    stack = LayerStack(M)
    seconds = _least(lambda: stack.right(X))
    facts = {"speed": 2.0 * layers * b * a * X.shape[1] / seconds}
    if not processes.alone:
        small, large = torch.ones(4, dtype=torch.float64), torch.ones(1 << 20, dtype=torch.float64)
        facts["latency"] = _least(lambda: processes.all_reduce(small), 40)
        wire = 2 * (processes.world_size - 1) / processes.world_size * large.numel() * 8
        facts["bandwidth"] = wire / max(_least(lambda: processes.all_reduce(large), 10) - facts["latency"], 1e-9)
    return facts


def _least(action: Any, count: int = 5) -> float:
    return min(timed({"action": action}, count)["action"])  # others use these cores too


def _work(process: int, world_size: int, port: int, tasks: list[Task], pipe: Any) -> None:
    end_with_parent()
    torch.set_num_threads(1)
    meeting = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=meeting, rank=process, world_size=world_size)
    processes = Processes(dist.group.WORLD)
    results = [function(processes, *arguments) for function, arguments in tasks]
    if process == 0:
        pipe.send(results)
    dist.barrier()
    dist.destroy_process_group()


def over(world_size: int, *tasks: Task) -> list[dict[str, float]]:
    """Run tasks in `world_size` processes; returns the result of process 0 for each task."""
    if world_size == 1:
        torch.set_num_threads(1)
        return [function(ALONE, *arguments) for function, arguments in tasks]
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here, there = context.Pipe()
    workers = [context.Process(target=_work, args=(p, world_size, port, list(tasks), there)) for p in range(world_size)]
    for worker in workers:
        worker.start()
    results: list[dict[str, float]] = here.recv()
    for worker in workers:
        worker.join()
    return results


def measured(size: tuple[int, int, int], worlds: Sequence[int], count: int) -> list[Row]:
    """Return the rows of the two measured kinds."""
    layers, b, a = size
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    rows: list[Row] = []
    each = 0.0
    for world_size in worlds:
        weak = layers // max(worlds) * world_size
        shares = {"strong": layers, "weak": weak}
        tasks: list[Task] = [(machine_here, (b, a, math.ceil(layers / world_size)))]
        tasks += [(sweeps, (share, b, a, count)) for share in shares.values()]
        rounds = [over(world_size, *tasks) for _ in range(1 if count < 5 else 3)]
        facts = {key: (min if key == "latency" else max)(one[0][key] for one in rounds) for key in rounds[0][0]}
        results = [min((one[n] for one in rounds), key=lambda x: x["seconds"]) for n in (1, 2)]
        if world_size == 1:
            each = max(results[0]["seconds"] - flops_of_sweep(layers, layers, b, a) / facts["speed"], 0.0) / layers
        between = facts.get("latency", 0.0), facts.get("bandwidth", math.inf)
        machine = Machine(facts["speed"], *between, each=each * max(1.0, world_size / cores))
        for (kind, share), one in zip(shares.items(), results, strict=True):
            rows.append(
                {
                    "kind": kind, "where": f"{cores} cores", "layers": share, "b": b, "a": a, "processes": world_size,
                    "seconds": one["seconds"],
                    "predicted": predicted(machine, share, b, a, world_size, 8),  # its speed was measured in this crowd
                    "bytes": int(one["bytes"]),
                    "formula": bytes_of_sweep(share, b, a) if world_size > 1 else 0,
                    "gib_held": 2 * bytes_held(share, b, a, world_size) / 2**30,
                }
            )  # fmt: skip
            print({key: rows[-1][key] for key in ("kind", "processes", "layers", "seconds", "predicted", "bytes")})
    return rows


def modelled() -> list[Row]:
    """Return the rows of the model, in float32."""
    rows = []
    for layers, b, a in TARGETS.values():
        cases = [("1 GPU", 1, MACHINES["8 GPUs"][1])] + [(name, n, machine) for name, (n, machine) in MACHINES.items()]
        for where, world_size, machine in cases:
            rows.append(
                {
                    "kind": "model", "where": where, "layers": layers, "b": b, "a": a, "processes": world_size,
                    "seconds": "", "predicted": predicted(machine, layers, b, a, world_size, 4), "bytes": "",
                    "formula": bytes_of_sweep(layers, b, a, 4) if world_size > 1 else 0,
                    "gib_held": bytes_held(layers, b, a, world_size) / 2**30,
                }
            )  # fmt: skip
    return rows


# ---- the figure


def plot(rows: list[Row]) -> Figure:
    """Left: seconds of a sweep on this machine, measured and modelled. Right: seconds on GPUs, modelled."""
    figure = style.new_figure(3.8, title="Does sharding make a sweep faster?")
    ((above,), (below,)) = style.panels(figure, 2, 1)
    ends = []
    for kind, color, marker in zip(("strong", "weak"), style.COLOURS, style.MARKERS, strict=False):
        points = sorted((row["processes"], row["seconds"], row["predicted"]) for row in rows if row["kind"] == kind)
        x, seconds, model = zip(*points, strict=True)
        above.plot(x, seconds, marker + "-", color=color, ms=4)
        above.plot(x, model, "--", color=color)
        ends += [(x[-1], seconds[-1], kind, color), (x[-1], model[-1], f"{kind}, model", color)]
    above.set(ylim=(0, 1.15 * max(row["seconds"] or 0 for row in rows)), xticks=x)
    style.name(above, f"processes, on {rows[0]['where']}", "seconds of a sweep")
    style.label_ends(above, ends, 0.13)
    ends = []
    for (layers, b, a), color, marker in zip(TARGETS.values(), style.COLOURS[2:], style.MARKERS[2:], strict=False):
        pairs = sorted(
            (row["processes"], row["predicted"])
            for row in rows
            if row["kind"] == "model" and (row["layers"], row["b"], row["a"]) == (layers, b, a)
        )
        x, model = zip(*pairs, strict=True)
        below.loglog(x, model, marker + "--", color=color, ms=4)
        ends.append((x[-1], model[-1], f"{layers} layers,\n{b} × {a}", color))
    below.set_xticks(x, [str(number) for number in x])
    below.minorticks_off()
    style.name(below, "GPUs (a model, not measured)", "seconds of a sweep")
    style.label_ends(below, ends, 0.2)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="small, for function only")
    parser.add_argument("--out", type=Path, default=Path("figures"))
    args = parser.parse_args(arguments)
    worlds = (1, 2) if args.smoke else (1, 2, 4)
    rows = measured(SIZES["smoke" if args.smoke else "measured"], worlds, 2 if args.smoke else 5) + modelled()
    write_rows(args.out / "scaling.csv", list(rows[0]), rows)
    style.save(plot(read_rows(args.out / "scaling.csv")), args.out / "scaling.png")


if __name__ == "__main__":
    main()
