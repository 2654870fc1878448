"""Layers over several processes: the same answers as in one, counted traffic, and one sentence when one fails."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import rasa_theory as rt
from rasa_theory import linalg
from rasa_theory.commands import extract
from rasa_theory.common import InputError
from rasa_theory.distributed import LayerSharding, Processes, balanced_shares
from rasa_theory.solvers import RasaDescent, cancellation, term_size, updates
from rasa_theory.sources import open_source, planted_stack
from tests.helpers.problems import decaying, noise
from tests.helpers.processes import Pool

STARTS = ("best", "allocation", "lora", "random", "common", "pencil")


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool(4)
    yield pool
    pool.close()


def dealt(processes: Processes, values: Any, **options: Any) -> rt.LayerStack:
    sharding = LayerSharding.of(len(values), processes)
    return rt.LayerStack(torch.as_tensor(values)[sharding.local], sharding=sharding, **options)


# ---- the same answers


def solved(processes: Processes, values: Any, rank: int, k: int, options: dict[str, Any]) -> tuple[Any, ...]:
    stack, budget = dealt(processes, values), rt.RankBudget(rank, k)
    found = rt.solve_rasa(stack, budget, rt.SolverOptions(**options))
    again = rt.reconstruction_error(stack, found.factors)
    drop = rt.mixing_drop(stack, rt.RasaFactors.from_lora(rt.solve_lora(stack, rank).factors, budget))
    floors = [floor.value for floor in rt.bounds.closed_floors(stack, budget)]
    whole = found.factors.gathered()
    facts = (found.error, again, rt.solve_lora(stack, rank).error, rt.allocation_bound(stack, budget).value, drop)
    words = (found.stop_reason.name, found.start, found.sweeps, found.data_passes, whole.layers, whole.parameters)
    return facts, floors, found.layer_errors, words


def check_same(pool: Pool, worlds: tuple[int, ...], *arguments: Any) -> None:
    ((facts, floors, errors, words),) = pool.run(1, solved, *arguments)
    for world_size in worlds:
        answers = pool.run(world_size, solved, *arguments)
        assert all(answer == answers[0] for answer in answers)  # bit by bit
        other, other_floors, other_errors, other_words = answers[0]
        assert other_words == words
        assert np.allclose(other[:4], facts[:4], rtol=1e-10, atol=0)
        assert np.isclose(other[4], facts[4], rtol=1e-8, atol=1e-12 * facts[2])
        assert np.allclose(other_floors, floors, rtol=1e-10, atol=1e-12 * facts[2])
        assert np.allclose(other_errors, errors, rtol=1e-9, atol=1e-12 * facts[2])


@pytest.mark.parametrize("start", STARTS)
def test_two_three_and_four_processes_give_the_errors_of_one(pool: Pool, start: str) -> None:
    """Seven layers: every share is uneven."""
    worlds = (3,) if start == "best" else (2, 3, 4)  # the race is of the other starts
    check_same(pool, worlds, decaying(7, 24, 20, 2), 3, 1, {"start": start, "max_sweeps": 1 + (start != "best")})


@pytest.mark.parametrize("sweep", ["joint", "paper"])
def test_the_other_sweeps(pool: Pool, sweep: str) -> None:
    check_same(pool, (3,), decaying(5, 24, 20, 1), 3, 2, {"start": "lora", "sweep": sweep, "max_sweeps": 12})


@pytest.mark.parametrize("start", ["random", "lora"])
def test_bases_that_grow_do_so_by_what_all_layers_show(pool: Pool, start: str) -> None:
    """Too large for bases of the whole space; at LoRA's optimum the directions are noise, and random ones are tried."""
    check_same(pool, (2,), decaying(3, 90, 80, 1), 2, 1, {"start": start, "max_sweeps": 2})


def test_fewer_layers_than_processes(pool: Pool) -> None:
    """The last processes hold none."""
    check_same(pool, (4,), decaying(2, 24, 20, 1), 3, 1, {"start": "random", "max_sweeps": 2})


@settings(max_examples=8)
@given(
    st.tuples(st.integers(1, 5), st.integers(6, 14), st.integers(6, 14)),
    st.integers(1, 3),
    st.integers(0, 3),
    st.integers(0, 100),
)
def test_small_stacks_in_two_processes(pool: Pool, shape: tuple[int, int, int], rank: int, k: int, seed: int) -> None:
    options = {"start": "allocation", "max_sweeps": 2, "sweep": "joint"}
    check_same(pool, (2,), decaying(*shape, seed), rank, min(rank, k), options)


def test_planted_factors_are_found(pool: Pool) -> None:
    stack, _ = planted_stack(5, (30, 28), rt.RankBudget(2, 1))
    values = stack.values.numpy()
    (alone,) = pool.run(1, solved, values, 2, 1, {})
    for found in pool.run(3, solved, values, 2, 1, {}):
        assert found[3][1] == alone[3][1]
        assert max(found[0][0], alone[0][0]) <= stack.rounding**2


# ---- one process alone decides, or all


def one_layer_is_singular(processes: Processes) -> tuple[list[float], float]:
    sharding = LayerSharding.of(3, processes)
    G = torch.eye(2).double().repeat(3, 1, 1)
    G[2] = 1.0
    g, noise = torch.ones(3, 2, 1).double(), torch.full((3, 1), 1e-14).double()
    own = sharding.local
    x, value = linalg.solve_layers(
        G[own], g[own], torch.ones(2).double(), noise[own], sharding, lambda x: (x * x).sum()
    )
    return sharding.all_gather(x).flatten().tolist(), float(value)


def test_all_take_the_safe_way_where_one_layer_needs_it(pool: Pool) -> None:
    (alone,) = pool.run(1, one_layer_is_singular)
    for found in pool.run(2, one_layer_is_singular):
        assert found[0] == alone[0]
        assert np.isclose(found[1], alone[1], rtol=1e-15)
    assert np.allclose(alone[0], [1, 1, 1, 1, 0.5, 0.5])


def in_order(processes: Processes, terms: list[float]) -> float:
    sharding = LayerSharding.of(len(terms), processes)
    own = [torch.tensor(x, dtype=torch.float64) for x in terms[sharding.local]]
    return float(sharding.sum_in_order(torch.zeros(()).double(), own))


def test_a_sum_in_order_is_the_same_to_the_last_bit(pool: Pool) -> None:
    terms = [1.0, *8 * [1e-16]]  # in any other order more than 1
    assert {found for n in (1, 2, 3, 4) for found in pool.run(n, in_order, terms)} == {sum(terms)}


def most_of_all(processes: Processes, values: Any) -> tuple[float, float, list[float]]:
    stack = dealt(processes, values)
    f = rt.RasaFactors.from_lora(rt.solve_lora(stack, 2).factors, rt.RankBudget(2, 1))
    f = f.scaled(torch.tensor([1.0, 2.0, 5.0]).double()[stack.sharding.local])
    mixing = torch.arange(1.0, 10.0).double().reshape(3, 3)[stack.sharding.local]
    evened = dataclasses.replace(f, mixing=mixing).evened()
    return cancellation(stack, f), term_size(stack, f), evened.mixing.abs().amax(1).tolist()


def test_the_largest_and_the_sums_are_those_of_all_layers(pool: Pool) -> None:
    """The largest lies in the last process."""
    (alone,) = pool.run(1, most_of_all, decaying())
    found = pool.run(3, most_of_all, decaying())
    assert [x[0] for x in found] == [alone[0]] * 3
    assert np.allclose([x[1] for x in found], alone[1], rtol=1e-14)
    assert [x for one in found for x in one[2]] == alone[2]


def first_without_private_terms(processes: Processes, values: Any) -> list[float]:
    unit = dealt(processes, values).unit()
    f = rt.RasaFactors.from_lora(rt.solve_lora(unit, 2).factors, rt.RankBudget(2, 1))
    kept = torch.tensor([0.0, 1.0, 1.0]).double()[unit.sharding.local, None, None]
    f = dataclasses.replace(f, private_A=f.private_A * kept)
    return RasaDescent(unit, f, "joint", "lora").run(1, 0.0).history


def test_private_terms_lack_only_where_no_layer_has_any(pool: Pool) -> None:
    """The first layer has none, and is alone in its process."""
    (alone,) = pool.run(1, first_without_private_terms, decaying())
    for found in pool.run(3, first_without_private_terms, decaying()):
        assert np.allclose(found, alone, rtol=1e-12)


# ---- traffic


def sweep_traffic(processes: Processes, values: Any, rank: int, k: int) -> tuple[int, int]:
    stack, budget = dealt(processes, values), rt.RankBudget(rank, k)
    unit = stack.unit()
    factors = rt.RasaFactors.from_lora(rt.solve_lora(unit, rank).factors, budget)
    norms = unit.layer_norms()
    before = processes.communication.reductions, processes.communication.reduced_bytes
    updates.joint_sweep((unit.right, unit.left), norms, factors)
    return processes.communication.reductions - before[0], processes.communication.reduced_bytes - before[1]


def test_a_sweep_reduces_right_hand_sides_and_grams_and_nothing_else(pool: Pool) -> None:
    """Per side one reduction of n R + R^2 + 2 R numbers, and one of 4 that decides and measures."""
    L, b, a, rank, k = 5, 24, 20, 3, 2
    R = L * k
    for found in pool.run(2, sweep_traffic, decaying(L, b, a), rank, k):
        assert found == (4, 8 * ((b + a) * R + 2 * (R * R + 2 * R) + 8))


# ---- sources


def loaded(processes: Processes, path: str, memory: int | None) -> tuple[str, list[float], tuple[int, ...]]:
    stack = open_source(path, memory=memory).stacks[0].load(None, None, processes)
    return stack.name, stack.layer_norms_squared, tuple(stack.values.shape)


@pytest.mark.parametrize("kind", ["npy", "npz", "safetensors", "one tensor", "bundled"])
@pytest.mark.parametrize("memory", [None, 60_000])
def test_each_process_reads_its_own_layers(pool: Pool, tmp_path: Path, kind: str, memory: int | None) -> None:
    values, path = decaying(5, 16, 18), tmp_path / f"x.{kind}"
    if kind == "npy":
        np.save(path, values)
    elif kind == "npz":
        memory = None
        np.savez(path, **{f"layers.{i}.w": M for i, M in enumerate(values)})
    elif kind == "bundled":
        path, memory = Path("minilm-code"), None
    elif kind == "one tensor":
        path = tmp_path / "x.safetensors"
        save_file({"w": torch.as_tensor(values)}, path)
    else:
        save_file({f"layers.{i}.w": torch.as_tensor(M.copy()) for i, M in enumerate(values)}, path)
    ((name, norms, shape),) = pool.run(1, loaded, str(path), memory)
    found = pool.run(3, loaded, str(path), memory)
    assert all(one[:2] == (name, norms) for one in found)
    assert sum(one[2][0] for one in found) == shape[0]


def refusal(processes: Processes, path: str) -> str:
    try:
        open_source(path).stacks[0].load(None, None, processes)
    except InputError as error:
        return str(error)
    return ""


def test_what_is_wrong_in_one_process_is_said_in_all(pool: Pool, tmp_path: Path) -> None:
    values = {f"layers.{i}.w": M for i, M in enumerate(decaying(4, 6, 5))}
    values["layers.3.w"][2, 1] = np.nan
    np.savez(tmp_path / "x.npz", **values)
    first, second = pool.run(2, refusal, str(tmp_path / "x.npz"))
    assert first == f"process 1 of 2: {second}"
    assert "layer 3, entry (2, 1) is nan" in second
    assert "x.npz" in second


def floor_of(processes: Processes) -> str:
    try:
        rt.lower_bound(dealt(processes, decaying()), rt.RankBudget(2, 1), "dual")
    except InputError as error:
        return str(error)
    return ""


def test_a_floor_that_needs_all_layers_in_one_process_is_refused(pool: Pool) -> None:
    for said in pool.run(2, floor_of):
        assert said.startswith("certificate dual is searched for in all layers")


# ---- extract: whole stacks


@pytest.fixture
def pair(tmp_path: Path) -> list[str]:
    """Two checkpoints of five kinds of unequal size, and an embedding, which no adapter can name."""
    made = {f"layers.{i}.{kind}.weight": noise(1, 12 + 2 * n, 10, 10 * n + i)[0]
            for n, kind in enumerate("abcde") for i in range(2)}  # fmt: skip
    made["embed.weight"] = noise(1, 30, 8, 99)[0]
    save_file({key: torch.as_tensor(M) for key, M in made.items()}, tmp_path / "tuned.safetensors")
    save_file(
        {key: torch.zeros(M.shape, dtype=torch.float64) for key, M in made.items()}, tmp_path / "base.safetensors"
    )
    return ["--base", str(tmp_path / "base.safetensors"), "--tuned", str(tmp_path / "tuned.safetensors"), "--quiet"]


def extracts(processes: Processes, arguments: list[str], breaks: str = "", error: Exception | None = None) -> Any:
    """What the command returns or says in this process, and the stacks that it has read; it fails at stack `breaks`."""
    real, read = extract.extract_stack, []

    def watched(stack: rt.LayerStack, *rest: Any) -> Any:
        read.append(stack.name)
        if stack.name == breaks and error is not None:
            raise error
        return real(stack, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extract, "extract_stack", watched)
        try:
            return extract._run(extract._parse(arguments), arguments, processes), read
        except InputError as problem:
            return str(problem), read


def written(out: Path) -> dict[str, Any]:
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    files["README.md"] = files["README.md"].replace(str(out).encode(), b"OUT")  # its command
    report = json.loads(files.pop("report.json"))
    processes = report["environment"].pop("processes", 1)
    del report["command"]
    return {"report": report, "processes": processes} | files


@pytest.mark.parametrize(
    "options",
    [
        ["--rank", "2", "--k", "1", "--format", "rasa", "--start", "lora"],
        ["--rank", "2", "--k", "1", "--format", "lora-exact-rasa", "--start", "lora"],
        ["--rank", "auto", "--energy", "0.8"],
        ["--rank", "3", "--k", "0", "--format", "diff"],
    ],
)
def test_stacks_dealt_over_processes_give_the_files_of_one(
    pool: Pool, pair: list[str], tmp_path: Path, options: list[str]
) -> None:
    common = [*pair, *options, "--sweeps", "2", "--out"]
    ((status, all_stacks),) = pool.run(1, extracts, [*common, str(tmp_path / "one")])
    two = pool.run(2, extracts, [*common, str(tmp_path / "two")])
    assert [status, *(one[0] for one in two)] == [0, 0, 0]
    assert all(one[1] for one in two)  # both have had some
    assert sorted(two[0][1] + two[1][1]) == sorted(all_stacks)  # and none was read twice
    alone, both = written(tmp_path / "one"), written(tmp_path / "two")
    assert (alone.pop("processes"), both.pop("processes")) == (1, 2)
    assert alone == both
    assert any("norm_squared" in row for row in alone["report"]["left_out"])


@pytest.mark.parametrize("error", [InputError("is bad"), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_what_fails_in_one_process_leaves_finished_stacks_that_are_taken_up(
    pool: Pool, pair: list[str], tmp_path: Path, error: Exception
) -> None:
    common = [*pair, "--rank", "2", "--k", "0", "--out"]
    pool.run(1, extracts, [*common, str(tmp_path / "one")])
    command = [*common, str(tmp_path / "two")]
    said = [one[0] for one in pool.run(2, extracts, command, "layers.*.a.weight", error)]
    assert len([text for text in said if text.startswith("process ")]) >= 1
    assert all(text.endswith("is bad" if isinstance(error, InputError) else "not enough memory") for text in said)
    finished = len(list((tmp_path / "two" / ".extract").glob("[0-9]*.json")))
    assert 0 < finished < 5
    again = pool.run(3, extracts, command)  # another number of processes
    assert [one[0] for one in again] == [0, 0, 0]
    assert sum(len(one[1]) for one in again) == 5 - finished
    alone, both = written(tmp_path / "one"), written(tmp_path / "two")
    assert alone | {"processes": 3} == both
    assert pool.run(2, extracts, command) == [(0, []), (0, [])]  # finished before


def test_what_is_wrong_before_any_stack_is_said_in_all(pool: Pool, pair: list[str], tmp_path: Path) -> None:
    for options in (["--rank", "11"], ["--rank", "2", "--device", "cuda:77"], ["--rank", "auto", "--parameters", "1"]):
        said = [one[0] for one in pool.run(2, extracts, [*pair, *options, "--out", str(tmp_path / "out")])]
        assert said[1].endswith(said[0])
    assert not (tmp_path / "out" / ".extract").exists()


def test_the_costliest_are_dealt_first_to_who_has_least() -> None:
    assert balanced_shares([1, 5, 3, 4, 3], 2) == [[1, 4], [0, 2, 3]]
    assert balanced_shares([2, 2], 3) == [[0], [1], []]
    assert balanced_shares([3, 1, 2], 1) == [[0, 1, 2]]


# ---- processes that are started by torchrun, or as it does


def started(processes: int, *arguments: str) -> list[subprocess.Popen[str]]:
    """As torchrun would, without it: by environment variables; all statuses can be read, nobody ends the rest."""
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
    """Exit statuses, and what all have written, in their order."""
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


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("memory", "there is not enough memory (one array asked for 0.115 GiB); take fewer or smaller stacks"),
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
    (said,) = (line for line in err.split("\n") if line.startswith("rasa_theory.reconstruct: "))
    assert said.startswith("rasa_theory.reconstruct: process 1 of 2: ")
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


def test_a_killed_process_of_an_extraction_leaves_finished_stacks(pool: Pool, pair: list[str], tmp_path: Path) -> None:
    common = [*pair, "--rank", "2", "--k", "1", "--start", "lora", "--sweeps", "2", "--out"]
    pool.run(1, extracts, [*common, str(tmp_path / "one")])
    statuses, _, err = ended(started(2, "-c", DIES, *common, str(tmp_path / "two")))
    assert statuses == [2, -signal.SIGKILL]
    assert [line for line in err.split("\n") if line.startswith("rasa_theory.extract: ")] == [
        "rasa_theory.extract: process 1 of 2 no longer answers; stacks that were finished are in --out, and the same "
        "command goes on from there"
    ]
    finished = len(list((tmp_path / "two" / ".extract").glob("[0-9]*.json")))
    assert 0 < finished < 5
    assert [one[0] for one in pool.run(2, extracts, [*common, str(tmp_path / "two")])] == [0, 0]
    assert written(tmp_path / "two") == written(tmp_path / "one") | {"processes": 2}


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
    found = {}
    for one in Path("/proc").glob("[0-9]*/environ"):
        try:
            parent = re.search(r"PPid:\s+(\d+)", (one.parent / "status").read_text())
            if parent is not None and parent[1] == process.name:
                found[int(re.search(r"\0RANK=(\d+)\0", one.read_text())[1])] = int(one.parent.name)
        except (OSError, TypeError):
            continue
    return [found[n] for n in range(world_size)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_that_is_killed_is_named_and_the_same_command_goes_on(two_stacks: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["rasa_theory.reconstruct", "--source", str(two_stacks), "--rank", "2", "--start", "lora"]
    command += ["--sweeps", "5", "--rtol", "0", "--seeds", "1", "--max-cancellation", "inf", "--out", str(out)]
    run = torchrun(2, *command, "--quiet")
    wait_for(out / "results.json", run)
    os.kill(numbers(Path("/proc") / str(run.pid), 2)[1], signal.SIGKILL)
    _, err = run.communicate(timeout=60)
    said = [line for line in err.split("\n") if line.startswith("rasa_theory.reconstruct: ")]
    assert said == [
        "rasa_theory.reconstruct: process 1 of 2 no longer answers; stacks that were finished are in --out, "
        "and the same command goes on from there"
    ]
    assert run.returncode != 0
    statuses, text, err = ended(started(2, "-m", *command, "--quiet"))
    assert statuses == [0, 0], err
    assert "a.layers.*.w: finished before, taken up" in err
    assert text.count("Theorem 3.1, e_rasa(k) <= e_lora: HOLDS (2 pairs") == 1
    assert '"unfinished"' not in (out / "results.json").read_text()


def test_bad_input_of_one_process_is_one_sentence_and_exit_status_2(tmp_path: Path) -> None:
    values = {f"layers.{i}.w": M for i, M in enumerate(decaying(4, 6, 5))}
    values["layers.3.w"][2, 1] = np.nan
    np.savez(tmp_path / "x.npz", **values)
    command = ["rasa_theory.reconstruct", "--source", str(tmp_path / "x.npz"), "--rank", "2", "--out", "none"]
    statuses, _, err = ended(started(2, "-m", *command))
    (said,) = (line for line in err.split("\n") if line.startswith("rasa_theory.reconstruct: "))
    assert said.startswith("rasa_theory.reconstruct: process 1 of 2: ")
    assert statuses == [2, 2]
