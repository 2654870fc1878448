"""The folder of a study: what an earlier run has finished is taken up, stack by stack."""

import itertools
import json
import math
import os
from pathlib import Path

import pytest

import rasa_theory as rt
from rasa_theory.formats import read_header, read_tensors, safetensors_bytes
from rasa_theory.reconstruction import ResultsFolder, StudySettings, StudyState, new_results, study_steps
from tests.helpers.problems import noise

PLAN = {"settings": "these"}


def finished_study(folder: ResultsFolder) -> StudyState:
    """Two stacks, written with the plan under `unfinished`, as between two stacks of a longer run."""
    settings = StudySettings(2, (0, 1), rt.SolverOptions("allocation", max_sweeps=3), seeds=0)
    state = StudyState(new_results(settings), {})
    state.results["unfinished"] = folder.plan
    for _ in study_steps([rt.LayerStack(noise(2, 5, 4, n), f"stack {n}") for n in range(2)], settings, state):
        folder.write(state)
    return state


def names(state: StudyState | None) -> list[str]:
    return [] if state is None else [row["name"] for row in state.results["stacks"]]


def test_finished_stacks_come_back_with_their_factors(tmp_path: Path) -> None:
    folder = ResultsFolder(tmp_path, PLAN)
    state = finished_study(folder)
    earlier = ResultsFolder(tmp_path, PLAN).finished_stacks((0, 1))
    assert names(earlier) == ["stack 0", "stack 1"]
    assert earlier.factors.keys() == state.factors.keys()
    assert ResultsFolder(tmp_path, {"settings": "others"}).finished_stacks((0, 1)) is None


def test_settings_that_differ_in_effort_or_bound_are_another_run() -> None:
    plans = [
        StudySettings(2, (1,), solver).plain()
        for solver in (
            rt.SolverOptions(),
            rt.SolverOptions(effort="thorough"),
            rt.SolverOptions(max_cancellation=4),
            rt.SolverOptions(max_cancellation=math.inf),
        )
    ]
    texts = {json.dumps(plan, allow_nan=False) for plan in plans}
    assert len(texts) == len(plans)


def test_a_stack_that_lacks_factors_is_done_again_and_the_others_are_kept(tmp_path: Path) -> None:
    folder = ResultsFolder(tmp_path, PLAN)
    finished_study(folder)
    path = tmp_path / "factors.safetensors"
    tensors = {key: tensor for key, tensor in read_tensors(path).items() if key != "stack 1/1/mixing"}
    path.write_bytes(safetensors_bytes(tensors, read_header(path).metadata))
    earlier = folder.finished_stacks((0, 1))
    assert names(earlier) == ["stack 0"]
    assert {key.split("/")[0] for key in earlier.factors} == {"stack 0"}


@pytest.mark.slow
@pytest.mark.parametrize("files_before", range(5))
def test_a_run_that_dies_between_its_files_loses_no_stack_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files_before: int
) -> None:
    folder = ResultsFolder(tmp_path, PLAN)
    state = finished_study(folder)
    first, second = state.results["stacks"]
    only_first = {key: tensor for key, tensor in state.factors.items() if key.startswith("stack 0/")}
    folder.write(StudyState(state.results | {"stacks": [first]}, only_first))
    replace, count = os.replace, itertools.count()

    def dies(source: Path, target: Path) -> None:
        if next(count) == files_before:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr("os.replace", dies)
    with pytest.raises(KeyboardInterrupt):
        folder.write(StudyState(state.results | {"stacks": [first, second]}, state.factors))
    earlier = folder.finished_stacks((0, 1))
    assert names(earlier) == (["stack 0"] if files_before < 2 else ["stack 0", "stack 1"])
