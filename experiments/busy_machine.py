"""python -m experiments.busy_machine: seconds of our work on idle cores, and beside processes that keep all cores busy.

Two jobs, each in a process of its own: the default command, and core sweeps of 16 x 768^2 at R = 64. The busy processes
are started here, one for each core, and do nothing but count. On a fair scheduler work on one thread gets two thirds of
a core beside two busy processes on two cores, so that 1.5 times the idle time is the least to expect. The script warns
if other processes use the cores, since then the idle times are none. Writes busy_machine.csv; no picture.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import rasa_theory as rt
from experiments.support.rows import Row, write_rows
from rasa_theory.solvers import RasaDescent, random_start

COLUMNS = ("job", "idle_seconds", "busy_seconds", "ratio", "busy_processes", "cores", "load_before", "passive", "torch")
LAYERS, SIZE, BUDGET = 16, 768, rt.RankBudget(8, 4)  # R = L k = 64
SWEEPS = 3  # timed, after one to warm up
COMMAND = ["-m", "rasa_theory.reconstruct", "--rank", "8", "--k", "1", "--quiet", "--out", "none"]
_SPIN = "while True: pass"


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """`count` processes that keep a core busy each, until the context ends."""
    # Each reads the pipe that this process holds, in a thread, and ends when it closes: also if this one is killed.
    code = "import os, sys, threading\ndef end():\n    sys.stdin.read()\n    os._exit(0)\n"
    code += f"threading.Thread(target=end, daemon=True).start()\n{_SPIN}"
    spinning = [subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) for _ in range(count)]
    try:
        time.sleep(0.5 if count else 0)  # until they spin
        yield
    finally:
        for one in spinning:
            one.kill()
            one.wait()


def run_command(sources: list[str]) -> float:
    """Seconds of the default command, its start included."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *COMMAND, *sources], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def sweep_seconds(layers: int, size: int) -> float:
    """The median of the seconds of a core sweep, in a new process, which has passive waiting from its beginning."""
    command = [sys.executable, "-m", "experiments.busy_machine", "--sweeps", str(layers), str(size)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def time_sweeps(layers: int, size: int) -> float:
    """The same in this process."""
    generator = torch.Generator().manual_seed(0)
    unit = rt.LayerStack(torch.randn(layers, size, size, dtype=torch.float64, generator=generator)).unit()
    run = RasaDescent(unit, random_start(unit, BUDGET, 0), "core", "random").run(1, 0.0)
    seconds = []
    for n in range(SWEEPS):
        began = time.perf_counter()
        run.run(n + 2, 0.0)
        seconds.append(time.perf_counter() - began)
    return sorted(seconds)[SWEEPS // 2]


def measure(job: str, work: Callable[[], float], processes: int) -> Row:
    """A row: the job on cores that nothing else of ours uses, then beside the busy processes."""
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"{job}: the load is {load:.1f} before it starts, so that its idle time is not idle", file=sys.stderr)
    idle = work()
    with busy(processes):
        beside = work()
    facts = (round(idle, 2), round(beside, 2), round(beside / idle, 2), processes, cores(), round(load, 1))
    values = (job, *facts, os.environ.get("OMP_WAIT_POLICY", ""), torch.__version__)
    row = dict(zip(COLUMNS, values, strict=True))
    print(row, flush=True)
    return row


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=cores(), help="busy processes (one for each core)")
    parser.add_argument("--smoke", action="store_true", help="one stack of the command, and sweeps of 4 x 96^2")
    parser.add_argument("--out", type=Path, default=Path("figures"))
    parser.add_argument("--sweeps", type=int, nargs=2, metavar=("L", "N"), help="print seconds of a sweep of L x N^2")
    args = parser.parse_args(arguments)
    if args.sweeps is not None:
        print(time_sweeps(*args.sweeps))
        return
    size = (4, 96) if args.smoke else (LAYERS, SIZE)
    sources = ["--modules", "query", "--seeds", "1"] if args.smoke else []
    jobs: dict[str, Callable[[], float]] = {
        f"core sweep of {size[0]} x {size[1]}^2, R = {BUDGET.pool_rank(size[0])}": lambda: sweep_seconds(*size),
        "default command": lambda: run_command(sources),
    }
    rows = [measure(job, work, args.processes) for job, work in jobs.items()]
    write_rows(args.out / "busy_machine.csv", COLUMNS, rows)


if __name__ == "__main__":
    main()
