"""Whole stacks dealt over processes by the extraction: the same files as one process writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from rasa_theory.common import InputError
from rasa_theory.distributed import balanced_shares
from tests.helpers.extraction import extracts, written
from tests.helpers.processes import Pool


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--rank", "2", "--k", "1", "--format", "rasa", "--start", "lora"],
        ["--rank", "2", "--k", "1", "--format", "lora-exact-rasa", "--start", "lora"],
        ["--rank", "auto", "--energy", "0.8"],
        ["--rank", "3", "--k", "0", "--format", "dense"],
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


@pytest.mark.slow
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
    wrong = ["--exclude", "nothing"], ["--rank", "2", "--device", "cuda:77"], ["--rank", "auto", "--parameters", "1"]
    for options in wrong:
        said = [one[0] for one in pool.run(2, extracts, [*pair, *options, "--out", str(tmp_path / "out")])]
        assert said[1].endswith(said[0])
    assert not (tmp_path / "out" / ".extract").exists()


def test_the_costliest_are_dealt_first_to_who_has_least() -> None:
    assert balanced_shares([1, 5, 3, 4, 3], 2) == [[1, 4], [0, 2, 3]]
    assert balanced_shares([2, 2], 3) == [[0], [1], []]
    assert balanced_shares([3, 1, 2], 1) == [[0, 1, 2]]
