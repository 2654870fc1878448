"""Files of failing instances: tried again, made by hand, and damaged."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rasa_theory as rt
from rasa_theory.verification import (
    LAWS,
    Subject,
)
from tests.helpers.subjects import (
    allocation,
    drop,
    floor,
    rising,
    run,
    solver,
    worse_than_lora,
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("law", "family", "broken"),
    [
        ("answer_below_lora", "gaussian", solver(worse_than_lora)),
        ("rank_floor", "equal", floor("rank")),
        ("joint_falls", "gaussian", rising("random", "joint")),
        ("drop_measured", "gaussian", drop(1.01)),
        ("allocation_below_lora", "gaussian", allocation(lambda stack, budget: 2.0)),
        ("error_is_residual", "gaussian", solver(lambda *given: {"error": given[3].error * (1 - 1e-9)})),
    ],
)
def test_a_violation_is_exit_status_1_and_a_file_that_reproduces_it(
    law: str, family: str, broken: Subject, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--families", family, "--instances", "1", "--sweeps", "2", "--out", str(tmp_path / "with space")]
    status, found, err = run(arguments, capsys, broken)
    (failure,) = found["failures"]
    assert (status, found["verdict"]) == (1, "violated")
    assert law in {broken_law["name"] for broken_law in failure["laws"]}
    assert f"FAILED on {family} 0" in err
    assert f"again: {failure['replay']}" in err
    rasa, verify, *again = shlex.split(failure["replay"])
    assert (rasa, verify) == ("rasa", "verify")
    status, repeated, err = run(again, capsys, broken)
    assert status == 1
    assert repeated["failures"] == [failure]
    assert f"again: {failure['replay']}" in err
    status, repeated, _ = run(again, capsys)
    assert (status, repeated["verdict"]) == (0, "holds")
    assert {held["name"] for held in repeated["families"][0]["laws"]} == {held["name"] for held in failure["laws"]}


def test_a_file_made_by_hand_is_tried_on_every_law_and_a_wrong_optimum_is_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = np.random.default_rng(0).standard_normal((2, 5, 4))
    np.savez(tmp_path / "mine.npz", values=values, r=2, k=1)
    status, found, _ = run(["--replay", str(tmp_path / "mine.npz"), "--sweeps", "3"], capsys)
    assert (status, found["sweeps"], found["families"][0]["name"]) == (0, 3, "replay")
    assert {law["name"] for law in found["families"][0]["laws"]} == {n for n in LAWS if "optimum" not in n}
    optimum = rt.solve_lora(rt.LayerStack(values), 2).error
    np.savez(tmp_path / "wrong.npz", values=values, r=2, k=0, optimum=optimum * 1.01, law="answer_above_optimum")
    status, found, _ = run(["--replay", str(tmp_path / "wrong.npz")], capsys)
    assert status == 1
    assert [law["name"] for law in found["failures"][0]["laws"]] == ["answer_above_optimum"]


GOOD: dict[str, Any] = {"values": np.ones((2, 4, 3)), "r": 2, "k": 1}


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"values": None}, "it holds no 'values'; values (L, b, a), r and k are needed"),
        ({"values": np.full((2, 4, 3), np.nan)}, "layer 0, entry (0, 0) is nan"),
        ({"values": np.ones((4, 3))}, "expected three axes (layers, b, a), found shape (4, 3)"),
        ({"r": 4}, "rank 4 exceeds min(b, a) = 3"),
        ({"k": 3}, "shared_rank 3 exceeds rank 2"),
        ({"k": "one"}, "k must be a whole number, got 'one'"),
        ({"r": 2.7}, "r must be a whole number, got 2.7"),
        ({"r": math.inf}, "r must be a whole number, got inf"),
        ({"r": np.ones(2)}, "an entry is of the wrong kind"),
        ({"law": "gravity"}, "unknown law 'gravity'; --list names those that there are"),
        ({"law": np.array([], str)}, "its 'law' is empty"),
        ({"sweeps": 1.5}, "sweeps must be a whole number, got 1.5"),
        ({"optimum": -1.0}, "optimum must be a finite number, at least 0, got -1.0"),
        ({"optimum": math.nan}, "optimum must be a finite number, at least 0, got nan"),
        ({"certificate": "best"}, "unknown certificate 'best'; known: closed"),
        ({"optimum": 0.0, "met_by": ["luck"]}, "met_by holds ['luck']"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"values": np.ones((2, 4, 3), object)}, "not a sound .npz file"),
    ],
)
def test_bad_replays_are_one_sentence_and_exit_status_2(
    changed: dict[str, Any], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.npz"
    np.savez(path, **{name: value for name, value in (GOOD | changed).items() if value is not None})
    status, found, err = run(["--replay", str(path)], capsys)
    assert (status, found) == (2, None)
    assert err.startswith(f"rasa verify: {path}: ")
    assert sentence in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_damaged_files_and_those_of_another_kind_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "array.npy", GOOD["values"])
    np.savez_compressed(tmp_path / "whole.npz", **GOOD)
    whole = (tmp_path / "whole.npz").read_bytes()
    for n in range(0, len(whole), 17):
        (tmp_path / f"{n}.npz").write_bytes(whole[:n] + bytes([whole[n] ^ 255]) + whole[n + 1 :])
    unsound = 0
    for path in tmp_path.iterdir():
        status, _, err = run(["--replay", str(path), "--sweeps", "1"], capsys)
        assert status in (0, 2)  # some bytes, such as times, do not matter
        if status == 2:
            unsound += 1
            assert err.startswith(f"rasa verify: {path}: ")
            assert err.count("\n") == 1
    assert unsound > 5


def test_where_no_law_applies_nothing_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "none.npz", **GOOD, law="floor_below_optimum")  # but no optimum
    status, found, err = run(["--replay", str(tmp_path / "none.npz")], capsys)
    assert (status, found["verdict"], found["families"][0]["checks"]) == (0, "undecided", 0)
    assert "UNDECIDED: 0 violations in 0 checks on 1 instances" in err
