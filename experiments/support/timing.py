"""Seconds of work, and the most memory of a command."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rasa_theory.solvers import RasaDescent


def timed(
    jobs: Mapping[str, Callable[[], Any]], repeats: int, now: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each job, `repeats` times, after one call to warm up.

    The order alternates from round to round, so that a machine that slows down or speeds up favours none of them.
    `now` reads the clock; work on a device needs one that waits for the device.
    """
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    order = list(jobs.items())
    for n in range(repeats + 1):
        for name, job in order if n % 2 else reversed(order):
            began = now()
            job()
            if n > 0:
                seconds[name].append(now() - began)
    return seconds


def one_sweep(run: RasaDescent) -> None:
    """Run one sweep more. Raises ArithmeticError if none was taken, since then there is nothing to time."""
    before = run.sweeps
    if run.run(before + 1, 0.0).sweeps == before:
        raise ArithmeticError(f"no sweep was taken: {run.stop_reason}")


def percents(loads: Sequence[float]) -> list[int]:
    """Percent of all work that is done before each task; `loads` is the work of the tasks, in any unit."""
    before, whole = itertools.accumulate(loads, initial=0.0), sum(loads) or 1.0
    return [round(100 * done / whole) for done, _ in zip(before, loads, strict=False)]


def measured(command: list[str]) -> tuple[float, float]:
    """Seconds of a command, and the most memory in MiB that its process held (Linux)."""
    began, peak = time.perf_counter(), 0.0
    with tempfile.TemporaryFile("w+") as messages:
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=messages)
        while child.poll() is None:
            with contextlib.suppress(OSError, StopIteration):  # the process may end meanwhile
                lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
                peak = max(peak, float(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024)
            time.sleep(0.05)
        seconds = time.perf_counter() - began
        if child.returncode != 0:
            messages.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed: {messages.read().strip().splitlines()[-1:]}")
    return seconds, peak
