"""The command verify: what it prints and writes, its exit status, and bad usage."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import rasa_theory as rt
from rasa_theory.commands import verify
from rasa_theory.verification import (
    FAMILIES,
    LAWS,
    Subject,
)
from tests.helpers.subjects import fails, run


def test_what_is_raised_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--families", "thin", "--instances", "1", "--out", "none"]
    status, found, err = run(arguments, capsys, Subject(solve_rasa=fails))
    assert status == 1
    assert "power_of_two (ArithmeticError: no such number)" in err
    assert "again: no file was written; run with --out DIR" in err
    assert found["failures"][0]["replay"] is None


def test_a_violation_whose_file_cannot_be_written_is_told_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "failures").write_text("a file in the place of the folder", encoding="utf-8")
    arguments = ["--families", "thin", "--instances", "1", "--out", str(tmp_path)]
    status, found, err = run(arguments, capsys, Subject(solve_rasa=fails))
    assert (status, found["verdict"]) == (1, "violated")
    assert found["failures"][0]["file"] is None
    sentence = f"--out {tmp_path / 'failures'} is not a folder that can be made: File exists; name another folder"
    assert err.startswith(f"rasa verify: {sentence}\n")
    assert "again: no file was written; run with --out DIR" in err
    assert json.loads((tmp_path / "verify.json").read_text(encoding="utf-8")) == found


def test_an_interruption_tallies_what_was_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = []

    def bound(*given: Any) -> rt.Bound:
        asked.append(given[0].name)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return rt.lower_bound(*given)

    arguments = ["--families", "thin", "--instances", "9", "--out", str(tmp_path)]
    status, found, err = run(arguments, capsys, Subject(lower_bound=bound))
    assert status == 130
    assert (found["instances"], found["finished"], found["verdict"]) == (9, 2, "undecided")
    assert "UNDECIDED: 0 violations in" in err
    assert "interrupted, the rest was not run." in " ".join(err.split())
    kept = f"interrupted: 2 of 9 instances finished and kept in {tmp_path}/"
    assert err.endswith(f"{kept}; the same command begins anew\n")
    assert json.loads((tmp_path / "verify.json").read_text(encoding="utf-8")) == found


def test_the_list_and_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main(["--list"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in (*FAMILIES, *LAWS))
    assert max(map(len, out.splitlines())) <= 80
    assert verify.main(["--families", "thin", "--instances", "1", "--out", "none", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert all(f"\n{law} " in out for law in LAWS)
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--instances", "0"], "--instances must be at least 1, got 0"),
        (["--instances", "many"], "argument --instances: 'many' is not a whole number"),
        (["--seed", "-1"], "seed must be at least 0, got -1 (--seed)"),
        (["--families", "gaussian,odd"], "--families: 'odd' is none of gaussian, decaying"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--families", ""], "--families: '' is none of gaussian"),
        (["--sweeps", "0"], "sweeps must be at least 1, got 0 (--sweeps)"),
        (["--certificate", "best"], "argument --certificate: invalid choice: 'best'"),
        (["--out", ""], "--out '' names no folder"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--replay", "missing.npz"], "missing.npz does not exist"),
        (["--replay", "."], ".: not a sound .npz file"),
        (["--replay", "any.npz", "--jobs", "2"], "--replay tries one instance; --jobs does not go with it"),
        (["--replay", "any.npz", "--sweeps", "0"], "verify: sweeps must be at least 1, got 0 (--sweeps)"),
    ],
)
def test_bad_usage_is_one_sentence_and_exit_status_2(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status = verify.main(arguments)
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert err.startswith("rasa verify: ")
    assert sentence in err
    assert err.count("\n") == 1


def test_a_dry_run_says_how_much_and_how_long_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--families", "thin,planted", "--instances", "1000", "--jobs", "4", "--out", str(tmp_path / "out")]
    assert verify.main([*arguments, "--dry-run"]) == 0
    what, seconds = capsys.readouterr().out.splitlines()
    assert what == "Would try the laws on instances: 1000, of families: 2, in processes: 4."
    assert re.fullmatch(r"It takes about \d+ s here, by the first [12] tried now\.", seconds)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("streams", [("stdout",), ("stdout", "stderr")])
def test_a_violation_counts_where_nobody_reads_on(
    streams: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in `rasa verify | head -1` and `rasa verify 2>&1 | head -1`: the status stays, and the file is written."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as nobody:
        for stream in streams:
            monkeypatch.setattr(sys, stream, nobody)
        (tmp_path / "failures").write_text("a file in the place of the folder, which is said on stderr")
        arguments = ["--families", "thin", "--instances", "1", "--quiet", "--out", str(tmp_path)]
        assert verify.main(arguments, Subject(solve_rasa=fails)) == 1
    assert json.loads((tmp_path / "verify.json").read_text(encoding="utf-8"))["verdict"] == "violated"
