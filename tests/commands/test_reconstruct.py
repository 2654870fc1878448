"""The command, end to end: its files, its JSON, its laws, and what it says to bad input."""

from __future__ import annotations

import csv
import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import rasa_theory as rt
from rasa_theory.commands import extract, flags, inspect, reconstruct
from rasa_theory.commands.console import memory_size
from rasa_theory.common import write_file
from rasa_theory.reconstruction import ResultsFolder, StudyProgress, study_job
from rasa_theory.solvers import EFFORTS, STARTS

study = importlib.import_module("rasa_theory.reconstruction.driver")
SCHEMA = json.loads((Path(rt.__file__).parent / "data" / "results.schema.json").read_text(encoding="utf-8"))


@pytest.fixture
def stack_file(tmp_path: Path) -> Path:
    values = np.random.default_rng(0).standard_normal((3, 12, 10)) * np.logspace(0, -1, 10)
    path = tmp_path / "updates.npy"
    np.save(path, values)
    return path


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any], str]:
    """The exit status, results and standard error of the command, with a short search unless the arguments say more."""
    effort = () if {"--effort", "--start"} & {*arguments} else ("--effort", "quick")
    status = reconstruct.main([*arguments, *effort, "--json", "--quiet"])
    out, err = capsys.readouterr()
    return status, json.loads(out) if out else {}, err


def check_laws(results: dict[str, Any]) -> None:
    jsonschema.validate(results, SCHEMA)
    for row in results["stacks"]:
        close = 10 * max(row["shape"]) * 2.3e-16 * math.sqrt(row["norm_squared"])
        errors = []
        for entry in row["runs"]:
            chain = [entry["lower_bound"], entry["e_rasa"], entry["e_allocation"], row["e_lora"]]
            for below, above in pairwise(chain):
                assert math.sqrt(below) <= math.sqrt(above) + close
            assert entry["mixing_drop"] >= 0
            assert math.isclose(math.fsum(entry["layer_errors"]), entry["e_rasa"], rel_tol=1e-12)
            errors.append(entry["e_rasa"])
        assert all(math.sqrt(b) <= math.sqrt(a) + close for a, b in pairwise(errors))


@pytest.mark.slow
def test_bundled_updates_in_a_subprocess(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rasa_theory.reconstruct", "--rank", "8", "--k", "1", "--modules", "query"]
    command += ["--seeds", "1", "--sweeps", "20", "--effort", "quick", "--json", "--quiet"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    check_laws(results)
    assert results["theorem_3_1"] == "holds"
    assert results == json.loads((tmp_path / "rasa-results" / "results.json").read_text(encoding="utf-8"))
    row = results["stacks"][0]
    assert (row["name"], row["layers"], row["shape"]) == ("query", 6, [384, 384])
    assert row["runs"][0]["parameters"]["extra_percent"] == pytest.approx(100 * 36 / (6 * 8 * 768))
    assert {p.name for p in (tmp_path / "rasa-results").iterdir()} == {
        "results.json", "history.csv", "factors.safetensors", "iterations.png", "iterations.svg"
    }  # fmt: skip


@pytest.mark.slow
def test_a_path_over_k_writes_factors_that_have_the_reported_errors(
    stack_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results"
    status, results, _ = run(
        ["--source", str(stack_file), "--rank", "3", "--k", "0,1,3", "--seeds", "2", "--out", str(out)], capsys
    )
    assert status == 0
    check_laws(results)
    stack = rt.LayerStack(np.load(stack_file), "updates")
    tensors = load_file(out / "factors.safetensors")
    for entry in results["stacks"][0]["runs"]:
        prefix = f"updates/{entry['k']}/"
        factors = rt.RasaFactors(**{n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        assert rt.reconstruction_error(stack, factors) == pytest.approx(entry["e_rasa"], rel=1e-12)
    with (out / "history.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    curves = sum(
        len(e["history"]) + sum(len(a["history"]) for a in e["attempts"]) for e in results["stacks"][0]["runs"]
    )
    assert len(rows) == curves


@pytest.mark.slow
def test_each_certificate_is_at_least_the_one_before(stack_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    floors = []
    for certificate in ("closed", "dual", "two-sided"):
        arguments = ["--source", str(stack_file), "--rank", "2", "--seeds", "0", "--out", "none", "--k", "0,1"]
        status, results, _ = run([*arguments, "--certificate", certificate], capsys)
        assert status == 0
        check_laws(results)
        floors.append([entry["lower_bound"] for entry in results["stacks"][0]["runs"]])
        if certificate != "closed":
            assert results["stacks"][0]["runs"][1]["lower_bound_name"] == certificate
    assert floors[0][0] == floors[1][0] == floors[2][0]
    assert floors[0][1] < floors[1][1] < floors[2][1]


def test_same_seed_same_numbers(stack_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--source", str(stack_file), "--rank", "2", "--seeds", "2", "--out", "none", "--sweeps", "40"]
    first, second = (run(arguments, capsys)[1]["stacks"][0]["runs"][0] for _ in range(2))
    for entry in (first, second):
        del entry["seconds"]
    assert first == second


@pytest.mark.slow
def test_effort_search_and_bound_are_said_of_every_run(stack_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--source", str(stack_file), "--rank", "3", "--k", "0,1,2", "--seeds", "0", "--out", "none"]
    status, results, err = run([*arguments, "--effort", "default", "--verbose"], capsys)
    assert status == 0
    check_laws(results)
    none, *searched = results["stacks"][0]["runs"]
    assert none["search"] is None
    assert [(one["effort"], one["max_cancellation"]) for one in (none, *searched)] == [("default", 8.0)] * 3
    assert all(one["cancellation"] <= 8 * 1.001 for one in searched)
    assert all(1 <= one["search"]["near_best"] <= one["search"]["starts"] for one in searched)
    assert all(one["search"]["moves"] > 0 for one in searched)
    near = [f"starts near the lowest: {one['search']['near_best']} of {one['search']['starts']}" for one in searched]
    assert [line.partition("starts near")[1] for line in err.splitlines()].count("starts near") == 2
    assert all(one in " ".join(err.split()) for one in near)

    _, quick, err = run([*arguments[:5], "1", *arguments[6:], "--effort", "quick", "--max-cancellation", "inf"], capsys)
    jsonschema.validate(quick, SCHEMA)
    (one,) = quick["stacks"][0]["runs"]
    assert (one["effort"], one["max_cancellation"], one["search"]["moves"]) == ("quick", None, 0)
    assert one["search"]["starts"] < searched[0]["search"]["starts"]
    assert "starts near" not in err, "--verbose says it"


@pytest.mark.parametrize("start", STARTS)
def test_every_start_can_be_asked_for(start: str, stack_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--source", str(stack_file), "--rank", "3", "--start", start, "--sweeps", "2", "--seeds", "0"]
    status, results, err = run([*arguments, "--out", "none", "--verbose"], capsys)
    assert status == 0
    jsonschema.validate(results, SCHEMA)
    (one,) = results["stacks"][0]["runs"]
    assert one["search"] is None
    assert "starts near" not in err
    assert f"start: {one['start']}; stop: sweep limit; limit by floor: {one['lower_bound_name']}\n" in err
    assert one["start"] in ((start, "allocation") if STARTS[start].is_worth_racing is not None else (start,))


def test_progress_of_the_search_is_said() -> None:
    told: list[StudyProgress] = []
    stack = rt.LayerStack(np.random.default_rng(0).standard_normal((2, 110, 100)), "updates")  # larger than its core
    solver = rt.SolverOptions(max_sweeps=2)
    (row,) = rt.study([stack], rank=2, ks=(1,), solver=solver, seeds=0, watch=told.append)["stacks"]
    steps = [one for one in told if one.doing == "searching"]
    first = [one.sweep for one in steps[: steps[0].max_sweeps + 1]]
    assert first == list(range(steps[0].max_sweeps + 1))
    assert steps[0].max_sweeps == len(EFFORTS["default"].heats) + EFFORTS["default"].rounds
    lowest = row["runs"][0]["e_rasa"] / row["e_lora"]
    ratios = [one.ratio or 0.0 for one in steps[: len(first)]]
    assert lowest * 0.99 <= ratios[-1] < ratios[0]
    assert reconstruct.progress_line(StudyProgress("query", 1, "searching", 2, 5, 0.99512, 0)) == (
        "query, k = 1: searching, step 2 of 5, lowest error 0.9951 e_lora"
    )
    assert reconstruct.progress_line(StudyProgress("query", 1, "solving from lora", 2, 5, None, 0)) == (
        "query, k = 1: solving from lora, sweep 2"
    )
    assert reconstruct.progress_line(StudyProgress("query", 1, "dual floor", 2, 5, 0.9, 0)) == (
        "query, k = 1: dual floor, iteration 2, at 0.9000 e_lora"
    )


@pytest.mark.slow
def test_layer_weights_scale_errors_and_scale_factors_back(
    stack_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = np.load(stack_file) * np.array([1.0, 1e3, 0.0]).reshape(3, 1, 1)
    np.save(stack_file, values)
    out = tmp_path / "out"
    arguments = ["--source", str(stack_file), "--rank", "2", "--seeds", "0", "--weight", "layer", "--out", str(out)]
    status, results, _ = run(arguments, capsys)
    assert status == 0
    assert results["stacks"][0]["layer_norms_squared"] == pytest.approx([1.0, 1.0, 0.0])
    tensors = {name.removeprefix("updates/1/"): t for name, t in load_file(out / "factors.safetensors").items()}
    errors = rt.layer_errors(rt.LayerStack(values), rt.RasaFactors(**tensors))
    norms = [float(np.sum(m * m)) or 1.0 for m in values]
    assert [e / n for e, n in zip(errors, norms, strict=True)] == pytest.approx(
        results["stacks"][0]["runs"][0]["layer_errors"], rel=1e-9, abs=1e-25
    )


def test_a_violated_law_is_exit_status_1(
    stack_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = study.lower_bound
    monkeypatch.setattr(study, "lower_bound", lambda *a, **b: rt.Bound(3 * real(*a, **b).value + 1e3, "clipped"))
    status, results, err = run(["--source", str(stack_file), "--rank", "2", "--seeds", "0", "--out", "none"], capsys)
    assert status == 1
    assert results["theorem_3_1"] == "violated"
    assert "FAILED on updates (k = 1): floor is not above answer" in err


def test_a_local_minimum_above_lora_is_undecided_and_not_called_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "updates.npy"
    np.save(path, np.random.default_rng(0).standard_normal((3, 60, 50)))
    arguments = ["--source", str(path), "--rank", "3", "--start", "random", "--sweeps", "1", "--seeds", "0"]
    status, results, err = run([*arguments, "--out", "none"], capsys)
    assert (status, results["theorem_3_1"]) == (0, "undecided")
    assert "On updates (k = 1) the start random ended above e_lora, in a local minimum" in " ".join(err.split())
    assert "FAILED" not in err


def test_what_is_left_out_is_said_in_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, rng = tmp_path / "updates.npz", np.random.default_rng(0)
    shapes = {
        "h.0.q": (6, 5),
        "h.1.q": (6, 5),
        "h.2.q": (6, 4),
        "bias": (6,),
        "one": (6, 5),
        "two": (3,),
        "three": (2,),
    }
    np.savez(path, **{name: rng.standard_normal(shape) for name, shape in shapes.items()})
    arguments = ["--source", str(path), "--rank", "2", "--sweeps", "1", "--seeds", "0", "--out", "none", "--quiet"]
    status, results, err = run(arguments, capsys)
    lines = [line for line in err.splitlines() if line.startswith("left out: ")]
    assert status == 0
    assert len(results["left_out"]) == 5
    assert len(lines) == 4
    assert lines[-1] == "left out: 2 more, listed by --dry-run and in results.json"
    assert run([*arguments, "--modules", "h.*"], capsys)[2].count("left out") == err.count("left out")


def test_updates_that_are_zero_are_said_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "zero.npy", np.zeros((2, 4, 3)))
    arguments = ["--source", str(tmp_path / "zero.npy"), "--rank", "1", "--seeds", "0", "--out", "none"]
    status, _, err = run(arguments, capsys)
    assert status == 0
    assert "zero: all updates are zero; nothing to reconstruct" in err


@pytest.mark.slow
def test_where_lora_is_exact_the_table_says_why_it_is_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(0)
    low = generator.standard_normal((2, 6, 2)) @ generator.standard_normal((2, 2, 5))
    np.savez(tmp_path / "x.npz", low=low, full=generator.standard_normal((2, 6, 5)))
    arguments = ["--source", str(tmp_path / "x.npz"), "--rank", "2", "--seeds", "0", "--out", "none"]
    said = "LoRA of rank 2 is exact on low: the updates have no higher rank; ask for a lower --rank"
    assert said in " ".join(run(arguments, capsys)[2].split())
    assert "is exact on" not in run([*arguments[:3], "1", *arguments[4:]], capsys)[2]


def test_flags_of_synthetic_stacks_go_with_no_other_source(
    stack_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reconstruct.main(["--source", str(stack_file), "--layers", "3"]) == 2
    assert "--layers goes with --source synthetic, and nothing else" in capsys.readouterr().err


def test_an_empty_source_is_not_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert reconstruct.main(["--source", "", "--out", "none"]) == 2
    assert "'' does not exist" in capsys.readouterr().err


@pytest.mark.slow
def test_a_reader_that_leaves_is_no_error(stack_file: Path) -> None:
    command = [sys.executable, "-m", "rasa_theory.reconstruct", "--source", str(stack_file), "--rank", "2"]
    command += ["--seeds", "0", "--sweeps", "2", "--effort", "quick", "--quiet", "--json", "--out", "none"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()  # type: ignore[union-attr]
        assert b"Traceback" not in process.stderr.read()  # type: ignore[union-attr]
        assert process.wait() == 0


@pytest.mark.parametrize("error", [None, ImportError])
def test_interruption_keeps_what_was_finished(
    stack_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: type[Exception] | None,
) -> None:
    """Also where it arrives as the cause of another error."""
    real, calls = study.random_attempt, []

    def interrupted(*arguments: Any) -> rt.Attempt:
        calls.append(1)
        if len(calls) == 3:
            if error is None:
                raise KeyboardInterrupt
            raise error from KeyboardInterrupt()
        return real(*arguments)

    monkeypatch.setattr(study, "random_attempt", interrupted)
    out = tmp_path / "out"
    status, results, err = run(
        ["--source", str(stack_file), "--rank", "2", "--k", "1,2", "--seeds", "2", "--out", str(out)], capsys
    )
    assert status == 130
    assert [entry["k"] for entry in results["stacks"][0]["runs"]] == [1]
    assert results["theorem_3_1"] == "undecided"
    assert err.endswith("interrupted: 0 of 1 stacks finished; the same command begins anew\n")
    assert json.loads((out / "results.json").read_text(encoding="utf-8")) == results


@pytest.mark.parametrize("violated", [False, True])
def test_interrupted_after_the_last_stack_the_same_command_gives_the_verdict(
    stack_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    violated: bool,
) -> None:
    words = ["--source", str(stack_file), "--rank", "2", "--k", "1", "--seeds", "0", "--out", str(tmp_path / "out")]

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(study_job, "add_norms", interrupted)
        status, results, err = run(words, capsys)
    assert (status, results["theorem_3_1"]) == (130, "undecided")
    assert err.endswith("the same command goes on from there\n")
    if violated:
        results["stacks"][0]["runs"][0]["theorem_3_1"] = "violated"
        (tmp_path / "out/results.json").write_text(json.dumps(results), encoding="utf-8")
    status, again, _ = run(words, capsys)
    assert (status, again["theorem_3_1"]) == ((1, "violated") if violated else (0, "holds"))
    assert "plan" in again
    assert "unfinished" not in again
    assert again["stacks"] == results["stacks"]


def test_interrupted_in_the_last_writing_all_is_written(
    stack_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ResultsFolder.write

    def interrupted(self: ResultsFolder, state: Any) -> None:
        if "plan" in state.results:
            monkeypatch.undo()
            raise KeyboardInterrupt
        real(self, state)

    monkeypatch.setattr(ResultsFolder, "write", interrupted)
    words = ["--source", str(stack_file), "--rank", "2", "--k", "1", "--seeds", "0", "--out", str(tmp_path / "out")]
    status, results, _ = run(words, capsys)
    assert (status, results["theorem_3_1"]) == (0, "holds")
    assert json.loads((tmp_path / "out/results.json").read_text(encoding="utf-8")) == results


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_real_interrupt_keeps_what_was_finished(tmp_path: Path) -> None:
    """SIGINT to the command itself, as soon as the first of sixteen k is in the file."""
    asked = list(range(1, 17))
    command = [sys.executable, "-m", "rasa_theory.reconstruct", "--source", "synthetic", "--shape", "48,40"]
    command += ["--rank", "16", "--k", ",".join(map(str, asked)), "--rtol", "0", "--seeds", "1", "--sweeps", "30"]
    command += ["--effort", "quick"]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # else ignored where pytest runs in background
    )
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "results.json").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in out + err
    assert "UNDECIDED" in out
    assert "interrupted, the rest was not run." in " ".join(out.split())
    assert err.splitlines()[-1] == "interrupted: 0 of 1 stacks finished; the same command begins anew"
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    check_laws(results)
    finished = [entry["k"] for entry in results["stacks"][0]["runs"]]
    assert finished == asked[: len(finished)]
    assert 0 < len(finished) < len(asked)
    assert results["theorem_3_1"] == "undecided"
    tensors = load_file(tmp_path / "factors.safetensors")
    assert {name.split("/")[1] for name in tensors} == {str(k) for k in finished}
    assert not list(tmp_path.glob(".*"))  # no half-written file


def test_interrupted_as_a_file_is_made_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, umask = Path.open, os.umask(0o27)
    try:
        write_file(tmp_path / "whole", lambda f: f.write(b"all"))
    finally:
        os.umask(umask)
    assert (tmp_path / "whole").stat().st_mode & 0o777 == 0o640

    def interrupted(path: Path, *rest: Any) -> Any:
        real(path, *rest).close()
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "open", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "whole", lambda f: f.write(b"other"))
    monkeypatch.undo()
    assert [file.name for file in tmp_path.iterdir()] == ["whole"]
    assert (tmp_path / "whole").read_bytes() == b"all"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--rank", "0"], "rank must be at least 1, got 0 (--rank)"),
        (["--rank", "-3"], "rank must be at least 1, got -3 (--rank)"),
        (["--rank", "two"], "argument --rank: 'two' is not a whole number"),
        (["--rank", "2", "--k", "3"], "shared_rank 3 exceeds rank 2 (--k)"),
        (["--k", "-1"], "shared_rank must be at least 0, got -1 (--k)"),
        (["--k", ""], "argument --k: '' is not a whole number"),
        (["--k", "0.5"], "'0.5' is not a whole number"),
        (["--k", "one"], "'one' is not a whole number"),
        (["--rank", "11"], r"rank 11 exceeds min(b, a) = 10 of stack 'updates' (12 x 10)"),
        (["--start", "warm"], "invalid choice: 'warm'"),
        (["--start", "lora", "--effort", "quick"], "the search of --start best, and --start lora has none; leave one"),
        (["--effort", "slow"], "argument --effort: invalid choice: 'slow'"),
        (["--max-cancellation", "0.5"], "max_cancellation must be at least 1, got 0.5 (--max-cancellation)"),
        (["--max-cancellation", "nan"], "max_cancellation must be at least 1, got nan (--max-cancellation)"),
        (["--max-cancellation", "all"], "argument --max-cancellation: 'all' is not a number"),
        (["--rtol", "nan"], "rtol must be at least 0 and below 1, got nan"),
        (["--rtol", "x"], "argument --rtol: 'x' is not a number"),
        (["--sweeps", "0"], "max_sweeps must be at least 1, got 0 (--sweeps)"),
        (["--seed", "-1"], "seed must be at least 0, got -1 (--seed)"),
        (["--seed", str(2**64)], f"seed must be below 2^62, got {2**64} (--seed)"),
        (["--dtype", "float16"], "argument --dtype: invalid choice: 'float16'"),
        (["--device", "toaster"], "device 'toaster' is not available on this machine; use cpu or auto (--device)"),
        (["--device", "cuda:99"], "device 'cuda:99' is not available"),
        (["--modules", "nothing*"], "no stack matches --modules 'nothing*'"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--base", "x"], "--base and --tuned go together"),
        (["--seeds", "-2"], "seeds must be at least 0"),
    ],
)
def test_bad_usage_is_one_sentence_and_exit_status_2(
    arguments: list[str], sentence: str, stack_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = reconstruct.main(["--source", str(stack_file), "--out", "none", *arguments])
    out, err = capsys.readouterr()
    assert status == 2
    assert out == ""
    assert err.count("\n") == 1
    assert sentence in err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--overlap", "1.5"], "overlap must lie between 0 and 1, got 1.5 (--overlap)"),
        (["--overlap", "nan"], "overlap must lie between 0 and 1, got nan (--overlap)"),
        (["--overlap", "x"], "argument --overlap: 'x' is not a number"),
        (["--spectrum", "log:2"], "spectrum 'log:2' is not flat, power:P or exp:C"),
        (["--spectrum", "power:-1"], "such as power:0.7 (--spectrum)"),
        (["--spectrum", ""], "spectrum '' is not flat"),
        (["--layers", "0"], "layers must be at least 1, got 0 (--layers)"),
        (["--shape", "0,9"], "shape must be two numbers B,A of at least 1, got (0, 9) (--shape)"),
        (["--shape", "9"], "'9' is not a shape such as 384,384"),
        (["--shape", f"1,{10**20}"], "layers and shape must be below 2^63"),
    ],
)
@pytest.mark.parametrize("mode", [[], ["--dry-run"]])
def test_a_synthetic_stack_is_refused_before_any_progress(
    arguments: list[str], sentence: str, mode: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    status = reconstruct.main(["--source", "synthetic", "--rank", "2", "--out", str(out), *mode, *arguments])
    printed, err = capsys.readouterr()
    assert (status, printed) == (2, "")
    assert err.startswith("rasa reconstruct: ")  # no bar before it
    assert sentence in err
    assert err.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("shape", "wanted"), [("1,100000000000000", " (one array asked for 7.45e+05 GiB)"), (f"1,{2**62}", "")]
)
def test_a_stack_too_large_for_memory_is_one_sentence_and_exit_status_2(
    shape: str, wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beyond any address space, so that the allocation fails at once."""
    arguments = ["--source", "synthetic", "--rank", "1", "--shape", shape, "--out", "none", "--quiet"]
    status = reconstruct.main(arguments)
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert err.startswith(f"rasa reconstruct: there is not enough memory{wanted}; take fewer or smaller stacks")
    assert err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("weight", ["layer", "none"])
def test_a_stack_larger_than_the_memory_gives_the_same_results(
    weight: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "updates.npy", np.random.default_rng(0).standard_normal((20, 12, 10)) * np.logspace(0, -1, 10))
    arguments = ["--source", str(tmp_path / "updates.npy"), "--rank", "2", "--seeds", "2", "--sweeps", "5", "--tf32"]
    arguments += ["--effort", "quick", "--weight", weight]
    found = []
    for limit in ([], ["--memory", "15KiB"]):  # of a stack of 19 KiB
        out = tmp_path / f"out{len(found)}"
        status, results, err = run([*arguments, *limit, "--out", str(out)], capsys)
        assert status == 0, err
        check_laws(results)
        assert results == json.loads((out / "results.json").read_text(encoding="utf-8"))
        found.append(results["stacks"][0])
    whole, streamed = found
    (one,), (other,) = whole.pop("runs"), streamed.pop("runs")
    assert streamed.pop("e_lora_interval") == pytest.approx(whole.pop("e_lora_interval"), rel=1e-9)
    assert streamed.pop("layer_norms_squared") == pytest.approx(whole.pop("layer_norms_squared"), rel=1e-12)
    for key in ("e_lora", "norm_squared"):
        assert streamed.pop(key) == pytest.approx(whole.pop(key), rel=1e-12)
    assert streamed == whole
    for key in ("e_rasa", "e_allocation", "lower_bound", "layer_errors", "history"):
        assert other[key] == pytest.approx(one[key], rel=1e-9)
    for key in ("start", "data_passes", "stop_reason", "lower_bound_name", "iterations_to_beat_lora"):
        assert other[key] == one[key]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--memory", "plenty"], "'plenty' is not a size such as 2GiB, 500MB or 4096B"),
        (["--memory", "5iB"], "'5iB' is not a size"),
        (["--memory", "0"], "memory must be at least 1 byte, got 0"),
        (["--memory", "14KiB"], "is too little for stack 'updates': its layers of 12 x 10 need"),
        (["--memory", "1GiB", "--source", "synthetic"], "--memory goes with files"),
    ],
)
def test_memory_that_cannot_be(
    arguments: list[str], sentence: str, stack_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*arguments, "--source", str(stack_file)] if "synthetic" not in arguments else arguments
    status, _, err = run([*given, "--rank", "2", "--out", "none"], capsys)
    assert status == 2
    assert sentence in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GiB", 2**31), ("1.5 mib", 3 * 2**19), ("500MB", 500_000_000), ("4096", 4096), ("7B", 7), ("3KB", 3000)],
)
def test_sizes(text: str, size: int) -> None:
    assert memory_size(text) == size


def test_an_error_that_is_not_one_of_input_or_memory_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(flags, "open_source", fails)
    with pytest.raises(RuntimeError, match="a bug"):
        reconstruct.main(["--out", "none"])


BAD_FILES: dict[str, tuple[Any, str]] = {
    "nan.npy": (np.full((2, 3, 4), np.nan), "stack 'nan': layer 0, entry (0, 0) is nan; all entries must be finite"),
    "inf.npy": (np.full((2, 3, 4), np.inf), "stack 'inf': layer 0, entry (0, 0) is inf"),
    "whole.npy": (np.ones((2, 3, 4), int), "no stack remains ('whole': int64 is not real floating point)"),
    "complex.npy": (np.ones((2, 3, 4), complex), "complex128 is not real floating point"),
    "objects.npy": (np.ones((2, 3, 4), object), "'objects' holds Python objects; pickles are never opened"),
    "flat.npy": (np.ones((3, 4)), "expected one array with three axes (layers, b, a), found shape (3, 4)"),
    "deep.npy": (np.ones((1, 2, 3, 4)), "expected one array with three axes (layers, b, a), found shape (1, 2, 3, 4)"),
    "empty.npy": (np.ones((0, 3, 4)), "shape (0, 3, 4) is empty"),
    "cut.npy": (b"\x93NUMPY\x01", "not a sound .npy file"),
    "cut.safetensors": (b"\x10\0\0\0\0\0\0\0{", "not a sound safetensors file"),
    "forged.safetensors": (b"\xff" * 7 + b"\x3f{}", "not a sound safetensors file"),
    "missing.npy": (None, "does not exist; give a file, a directory or a bundled set (minilm-code, mpnet-code)"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_one_sentence_and_exit_status_2(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, sentence = BAD_FILES[name]
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        np.save(tmp_path / name, content, allow_pickle=True)
    status = reconstruct.main(["--source", str(tmp_path / name), "--rank", "2", "--out", "none", "--quiet"])
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert str(tmp_path / name) in err
    assert sentence in err


def test_a_directory_without_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reconstruct.main(["--source", str(tmp_path), "--rank", "2", "--out", "none"]) == 2
    assert f"{tmp_path}: the directory has no .safetensors file" in capsys.readouterr().err


@pytest.mark.parametrize("command", [reconstruct, inspect, extract])
def test_the_output_does_not_go_into_the_source(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """There the factors would be read as updates the next time."""
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
        save_file({f"layers.{i}.q.weight": torch.randn(12, 12) for i in range(2)}, tmp_path / name / "x.safetensors")
    monkeypatch.chdir(tmp_path / "base")
    for sources in (["--source", "../base"], ["--base", str(tmp_path / "base"), "--tuned", "../tuned"]):
        assert command.main([*sources, "--out", "."]) == 2
        assert f"--out . is the source {sources[1]} itself; name another folder" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "base").iterdir()] == ["x.safetensors"]


def test_results_are_no_source(stack_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["--rank", "2", "--seeds", "1", "--effort", "quick", "--out"]
    assert reconstruct.main(["--source", str(stack_file), *run, str(tmp_path / "results")]) == 0
    for source in ("results", "results/factors.safetensors"):
        assert reconstruct.main(["--source", str(tmp_path / source), *run, "none"]) == 2
        assert "is a factor that reconstruct has written, not an update; give the source" in capsys.readouterr().err


def test_output_paths_that_are_no_folder(stack_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, sentence in (
        (str(stack_file), "is not a folder that can be made: File exists; name another folder"),
        (str(stack_file / "below"), "is not a folder that can be made: Not a directory"),
        ("", "--out '' names no folder; name one, or none to write nothing"),
    ):
        assert reconstruct.main(["--source", str(stack_file), "--rank", "2", "--out", path]) == 2
        err = capsys.readouterr().err
        assert sentence in err
        assert err.count("\n") == 1


def short_run(source: Path, out: Path) -> list[str]:
    """The arguments of a run of one start, without --rank."""
    return ["--source", str(source), "--start", "lora", "--seeds", "0", "--quiet", "--out", str(out)]


@pytest.mark.slow
def test_another_run_in_the_folder_is_kept_unless_asked(
    stack_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results"
    command = [*short_run(stack_file, out), "--rank"]
    assert reconstruct.main([*command, "2"]) == 0
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    for other in (["3"], ["2", "--k", "2"], ["2", "--weight", "layer"], ["2", "--modules", "up*"]):
        status = reconstruct.main([*command, *other])
        assert status == (0 if other[-1] == "up*" else 2), other  # the same stack, whatever selects it
    assert "holds a reconstruction with other settings (weight)" in capsys.readouterr().err
    assert json.loads((out / "results.json").read_text())["rank"] == 2
    assert {path.name for path in out.iterdir()} == files.keys()
    assert reconstruct.main([*command, "3", "--overwrite"]) == 0
    assert json.loads((out / "results.json").read_text())["rank"] == 3


def test_an_interrupted_run_of_other_settings_is_kept(
    stack_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results"
    command = [*short_run(stack_file, out), "--rank"]
    assert reconstruct.main([*command, "2"]) == 0
    results = json.loads((out / "results.json").read_text())
    results["unfinished"] = results.pop("plan")
    (out / "results.json").write_text(json.dumps(results))
    assert reconstruct.main([*command, "1"]) == 2
    del results["unfinished"]  # written by a version that kept no plan
    (out / "results.json").write_text(json.dumps(results))
    assert reconstruct.main([*command, "2"]) == 2
    assert capsys.readouterr().err.count("--overwrite") == 2


def test_a_finished_study_is_taken_up_and_computed_anew_if_asked(
    stack_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "results"
    command = [*short_run(stack_file, out), "--rank", "2"]
    assert reconstruct.main(command) == 0
    first = json.loads((out / "results.json").read_text())
    capsys.readouterr()
    solved = []
    real = study.solve_lora
    monkeypatch.setattr(study, "solve_lora", lambda *words: solved.append(1) or real(*words))
    assert reconstruct.main(command) == 0
    assert (json.loads((out / "results.json").read_text()), solved) == (first, [])
    assert "1 of 1 stacks were finished before" in capsys.readouterr().err
    assert reconstruct.main([*command, "--overwrite"]) == 0
    assert solved


def test_factors_of_another_run_are_not_taken_up(stack_file: Path, tmp_path: Path) -> None:
    """A run of other settings that dies between its two files leaves its factors beside the results before."""
    out, other = tmp_path / "results", tmp_path / "other"
    assert reconstruct.main([*short_run(stack_file, out), "--rank", "3"]) == 0
    assert reconstruct.main([*short_run(stack_file, other), "--rank", "2"]) == 0
    (other / "factors.safetensors").replace(out / "factors.safetensors")
    assert reconstruct.main([*short_run(stack_file, out), "--rank", "3"]) == 0
    (key,) = (key for key in load_file(out / "factors.safetensors") if key.endswith("private_B"))
    assert load_file(out / "factors.safetensors")[key].shape[2] == 2, "q = r - k"


def test_two_runs_do_not_share_a_folder(
    stack_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "results"
    real, status = study.solve_lora, []

    def meanwhile(*words: Any) -> Any:
        monkeypatch.undo()
        status.append(reconstruct.main([*short_run(stack_file, out), "--rank", "3"]))
        return real(*words)

    monkeypatch.setattr(study, "solve_lora", meanwhile)
    assert reconstruct.main([*short_run(stack_file, out), "--rank", "2"]) == 0
    assert status == [2]
    assert f"another process is reconstructing into {out}" in capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == sorted(ResultsFolder.FILES)


def test_dry_run_only_says_what_would_run(stack_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "none-made"
    assert reconstruct.main(["--source", str(stack_file), "--rank", "2", "--dry-run", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "updates: 3 x 12 x 10" in text
    assert re.search(r"LoRA takes about \S+ s here, by a layer timed now", text)
    assert re.search(r"solver and closed floors some 5\.\d+ s more; the random attempts \S+ to \S+ s", text)
    assert not out.exists()


def test_dry_run_forecasts_the_seconds_of_large_layers(stack_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--source", str(stack_file), "--rank", "2", "--dry-run", "--spectra", "leading", "--k"]
    assert reconstruct.main([*arguments, "1"]) == 0
    text = capsys.readouterr().out
    numbers = re.search(
        r"LoRA takes about (\S+) s .* floors some (\S+) s more; the random attempts (\S+) to (\S+) s", text
    )
    assert numbers is not None
    lora, more, least, most = map(float, numbers.groups())
    assert more == pytest.approx(14 * lora + 7, rel=0.01)
    assert (least, most) == (pytest.approx(255 * lora, rel=0.02), pytest.approx(510 * lora, rel=0.02))
    assert reconstruct.main([*arguments, "0"]) == 0
    assert "floors" not in capsys.readouterr().out


def test_synthetic_and_float32(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--source", "synthetic", "--layers", "3", "--shape", "14,11", "--overlap", "0.5", "--rank", "3"]
    status, results, _ = run([*arguments, "--dtype", "float32", "--seeds", "1", "--out", "none"], capsys)
    assert status == 0
    assert results["environment"]["dtype"] == "float32"
    jsonschema.validate(results, SCHEMA)


def test_figure_has_a_panel_for_every_stack_and_k() -> None:
    stacks = [rt.LayerStack(torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(i)), f"s{i}") for i in (0, 1)]
    results = rt.study(stacks, rank=2, ks=(0, 1), seeds=1, solver=rt.SolverOptions(effort="quick"))
    figure = rt.plot_iterations(results)
    titles = [title for ax in figure.axes if (title := ax.get_title(loc="right"))]
    assert [title.splitlines()[0] for title in titles] == ["s0, k = 1", "s1, k = 1"]
