"""Processes started as torchrun does: one sentence and one exit status when one fails, dies or is interrupted."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.extraction import extracts, written
from tests.helpers.problems import decaying
from tests.helpers.processes import Pool


def started(processes: int, *arguments: str) -> list[subprocess.Popen[str]]:
    """Start processes by environment variables, as torchrun does. Nobody ends the rest: all statuses can be read."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=shared | {"RANK": str(n), "LOCAL_RANK": str(n), "WORLD_SIZE": str(processes)},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored if pytest is in background
        )
        for n in range(processes)
    ]


def ended(run: list[subprocess.Popen[str]]) -> tuple[list[int], str, str]:
    """Return exit statuses, standard output and standard error of all processes, in their order."""
    try:
        texts = [one.communicate(timeout=60) for one in run]
    finally:
        for one in run:
            one.kill()
    return [one.returncode for one in run], "".join(out for out, _ in texts), "".join(err for _, err in texts)


FAULTY = """
import os, sys
from rasa_theory.commands import reconstruct
from rasa_theory import LayerStack

left = 1

def failing(product):
    def failing_product(stack, X):
        global left
        left -= 1
        if left == 0 and os.environ["RANK"] == "1":
            if sys.argv[1] == "memory":
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 123456789 bytes.")
            os.truncate(sys.argv[3], 60_000)
        return product(stack, X)

    return failing_product

LayerStack.right, LayerStack.left = failing(LayerStack.right), failing(LayerStack.left)
sys.exit(reconstruct.main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        pytest.param(
            "memory",
            "there is not enough memory (one array asked for 0.115 GiB); take fewer or smaller stacks",
            marks=pytest.mark.slow,
        ),
        ("file", "u.npy: ends at byte 60000, amid a stack; write it again"),
    ],
)
def test_what_fails_in_one_process_amid_a_pass_ends_all_with_one_sentence(
    tmp_path: Path, what: str, sentence: str
) -> None:
    path = tmp_path / "u.npy"
    np.save(path, decaying(12, 32, 24))  # the layers of the second process are the last
    command = ["--source", str(path), "--memory", "100KB", "--rank", "2", "--start", "lora", "--seeds", "0"]
    statuses, _, err = ended(started(2, "-c", FAULTY, what, *command, "--quiet", "--out", "none"))
    (said,) = (line for line in err.split("\n") if line.startswith("rasa reconstruct: "))
    assert said.startswith("rasa reconstruct: process 1 of 2: ")
    assert sentence in said
    assert statuses == [2, 2]


DIES = """
import os, signal, sys
from rasa_theory.commands import extract
from rasa_theory.extraction import run

real, left = run.extract_stack, 2

def dies(*arguments):
    global left
    left -= 1
    if left == 0 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)

run.extract_stack = dies
sys.exit(extract.main(sys.argv[1:]))
"""


@pytest.mark.slow  # the roll call of the living takes 10 s
def test_a_killed_process_of_an_extraction_leaves_finished_stacks(pool: Pool, pair: list[str], tmp_path: Path) -> None:
    common = [*pair, "--rank", "2", "--k", "1", "--start", "lora", "--sweeps", "2", "--out"]
    pool.run(1, extracts, [*common, str(tmp_path / "one")])
    statuses, _, err = ended(started(2, "-c", DIES, *common, str(tmp_path / "two")))
    assert statuses == [2, -signal.SIGKILL]
    assert [line for line in err.split("\n") if line.startswith("rasa extract: ")] == [
        "rasa extract: process 1 of 2 no longer answers; stacks that were finished are in --out, and the same "
        "command goes on from there"
    ]
    finished = len(list((tmp_path / "two" / ".extract").glob("[0-9]*.json")))
    assert 0 < finished < 5
    assert [one[0] for one in pool.run(2, extracts, [*common, str(tmp_path / "two")])] == [0, 0]
    assert written(tmp_path / "two") == written(tmp_path / "one") | {"processes": 2}


@pytest.mark.slow  # two processes solve for seconds before they are interrupted
@pytest.mark.parametrize("whom", [(0, 1), (1,)])
def test_interrupted_all_processes_have_exit_status_130(
    two_stacks: Path, tmp_path: Path, whom: tuple[int, ...]
) -> None:
    """In a terminal all processes are told, and by torchrun too; one alone stops the others."""
    out = tmp_path / "out"
    command = ["--source", str(two_stacks), "--rank", "2", "--start", "lora", "--sweeps", "30", "--rtol", "0"]
    command += ["--seeds", "0", "--max-cancellation", "inf", "--quiet", "--out", str(out)]
    run = started(2, "-m", "rasa_theory.reconstruct", *command)
    wait_for(out / "results.json", run[0])
    for n in whom:
        run[n].send_signal(signal.SIGINT)
    statuses, text, err = ended(run)
    assert statuses == [130, 130], err
    assert "Traceback" not in err
    assert "interrupted" in text
    assert '"unfinished"' in (out / "results.json").read_text()


def wait_for(path: Path, run: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)


def torchrun(processes: int, *arguments: str) -> subprocess.Popen[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--master-port", str(port), "-m", "--", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.fixture
def two_stacks(tmp_path: Path) -> Path:
    path = tmp_path / "u.npz"
    np.savez(path, **{f"{kind}.layers.{i}.w": M for kind in "ab" for i, M in enumerate(decaying(3, 24, 20, ord(kind)))})
    return path


def numbers(process: Path, world_size: int) -> list[int]:
    """Process ids of the children that torchrun started, by their number."""
    children = {}
    for one in Path("/proc").glob("[0-9]*/environ"):
        try:
            parent = re.search(r"PPid:\s+(\d+)", (one.parent / "status").read_text())
            if parent is not None and parent[1] == process.name:
                children[int(re.search(r"\0RANK=(\d+)\0", one.read_text())[1])] = int(one.parent.name)
        except (OSError, TypeError):
            continue
    return [children[n] for n in range(world_size)]


@pytest.mark.slow  # starts torchrun and then two processes
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_that_is_killed_is_named_and_the_same_command_goes_on(two_stacks: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["rasa_theory.reconstruct", "--source", str(two_stacks), "--rank", "2", "--start", "lora"]
    command += ["--sweeps", "5", "--rtol", "0", "--seeds", "1", "--max-cancellation", "inf", "--out", str(out)]
    run = torchrun(2, *command, "--quiet")
    wait_for(out / "results.json", run)
    os.kill(numbers(Path("/proc") / str(run.pid), 2)[1], signal.SIGKILL)
    _, err = run.communicate(timeout=60)
    said = [line for line in err.split("\n") if line.startswith("rasa reconstruct: ")]
    assert said == [
        "rasa reconstruct: process 1 of 2 no longer answers; stacks that were finished are in --out, "
        "and the same command goes on from there"
    ]
    assert run.returncode != 0
    statuses, text, err = ended(started(2, "-m", *command, "--quiet"))
    assert statuses == [0, 0], err
    assert "1 of 2 stacks were finished before and are taken up" in err
    assert text.count("Theorem 3.1, e_rasa(k) <= e_lora: HOLDS (2 pairs") == 1
    assert '"unfinished"' not in (out / "results.json").read_text()


@pytest.mark.slow
def test_bad_input_of_one_process_is_one_sentence_and_exit_status_2(tmp_path: Path) -> None:
    values = {f"layers.{i}.w": M for i, M in enumerate(decaying(4, 6, 5))}
    values["layers.3.w"][2, 1] = np.nan
    np.savez(tmp_path / "x.npz", **values)
    command = ["rasa_theory.reconstruct", "--source", str(tmp_path / "x.npz"), "--rank", "2", "--out", "none"]
    statuses, _, err = ended(started(2, "-m", *command))
    (said,) = (line for line in err.split("\n") if line.startswith("rasa reconstruct: "))
    assert said.startswith("rasa reconstruct: process 1 of 2: ")
    assert statuses == [2, 2]
