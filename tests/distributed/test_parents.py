"""Workers end with their parent, also if it is killed.

A pipe tells: reading standard output ends only when no process holds it any longer.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rasa_theory.distributed import parents

PATIENCE = 20  # seconds, far more than workers take, and less than a survivor computes

# The module is loaded by its path, since the package would import torch, which takes seconds.
WORKER = """
import importlib.util, multiprocessing, os, subprocess, sys, time

def begin():
    spec = importlib.util.spec_from_file_location("parents", PATH)
    parents = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(parents)
    parents.end_with_parent()
    os.write(1, b"computing\\n")  # at once, so that the lines of two workers do not mix

def work():
    begin()
    end = time.monotonic() + 60  # so that a survivor does not compute for ever
    while time.monotonic() < end:
        pass
"""
BRIEF = """
def work_briefly():
    begin()
    time.sleep(2.5)  # longer than a look at the parent takes to come round
    print("finished", flush=True)
    sys.exit()
"""
POOL = """
if __name__ == "__main__":
    workers = [multiprocessing.get_context("spawn").Process(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
"""
TORCHRUN = """
if __name__ == "__main__":
    if sys.argv[-1] == "worker":
        work()
    subprocess.call([sys.executable, __file__, "worker"])
"""


def start(tmp_path: Path, code: str, **variables: str) -> subprocess.Popen[str]:
    script = tmp_path / "script.py"
    script.write_text(f"PATH = {parents.__file__!r}\n{WORKER}{code}", encoding="utf-8")
    environment = os.environ | variables
    return subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment)


def assert_all_end(run: subprocess.Popen[str], how: signal.Signals) -> None:
    """Send the signal to the parent alone, and expect that nobody holds its standard output soon after."""
    run.send_signal(how)
    try:
        run.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        pytest.fail(f"a worker outlived its parent by {PATIENCE} s")
    assert run.returncode == -how


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_workers_of_multiprocessing_end_with_their_parent(tmp_path: Path, how: signal.Signals) -> None:
    run = start(tmp_path, POOL)
    assert [run.stdout.readline() for _ in range(2)] == ["computing\n"] * 2  # type: ignore[union-attr]
    assert_all_end(run, how)


def test_a_process_of_torchrun_ends_with_it(tmp_path: Path) -> None:
    run = start(tmp_path, TORCHRUN, TORCHELASTIC_RUN_ID="none")
    assert run.stdout.readline() == "computing\n"  # type: ignore[union-attr]
    assert_all_end(run, signal.SIGKILL)


@pytest.mark.slow
def test_any_other_process_outlives_its_parent(tmp_path: Path) -> None:
    """A command may be started by a shell that ends at once."""
    run = start(tmp_path, BRIEF + TORCHRUN.replace("work()", "work_briefly()"))
    assert run.stdout.readline() == "computing\n"  # type: ignore[union-attr]
    run.kill()
    assert run.communicate(timeout=PATIENCE)[0] == "finished\n"


VERIFY = """
import itertools
from rasa_theory.verification import FAMILIES, VerificationSettings, instances_in_turn, trials

if __name__ == "__main__":
    keys = instances_in_turn(list(FAMILIES), 10_000, 0)
    for trial in trials(keys, VerificationSettings(), 2):
        print("tried", flush=True)
"""


@pytest.mark.slow  # the workers import torch
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_workers_of_verify_end_with_it(tmp_path: Path, how: signal.Signals) -> None:
    run = start(tmp_path, VERIFY)
    assert run.stdout.readline() == "tried\n"  # type: ignore[union-attr]
    assert_all_end(run, how)
