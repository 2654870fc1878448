"""The sources of the updates that experiments measure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from experiments.models import update_sets as sets
from experiments.update_spectra import relative_norms
from rasa_theory.common import InputError
from rasa_theory.formats import write_halves


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Runs of both models that were made again."""
    for model, task in (("minilm", "code"), ("minilm", "prose"), ("mpnet", "code"), ("mpnet", "prose")):
        file = sets.run_file(model, task, 0, tmp_path)
        file.parent.mkdir()
        kinds = {name: torch.ones(2, 4, 4) for name in ("query", "key", "value", "attention_output")}
        write_halves(kinds | {"output": torch.ones(2, 4, 8)}, file)
    return tmp_path


@pytest.mark.parametrize(("model", "task"), [("minilm", "code"), ("minilm", "prose"), ("mpnet", "code")])
def test_updates_of_the_repository_come_before_those_of_a_run_that_was_made_again(
    model: str, task: str, runs: Path
) -> None:
    """Else published numbers would be continued with other updates as soon as somebody trains again."""
    stacks, published = (sets.updates_of(model, task, 0, each) for each in (runs, runs / "none"))
    assert published.keys() <= stacks.keys()
    assert all(torch.equal(stacks[kind].values, stack.values) for kind, stack in published.items())
    width = 384 if model == "minilm" else 768
    assert stacks["query"].shape == (width, width)
    assert sets.updates_of(model, task, 0, runs, ["output"])["output"].shape == (4, 8)


def test_a_run_gives_the_kinds_that_the_repository_has_not(runs: Path) -> None:
    square = sets.updates_of("mpnet", runs=runs)
    assert {kind: stack.shape[0] for kind, stack in square.items()} == {
        "query": 768, "key": 4, "value": 4, "attention_output": 768,
    }  # fmt: skip
    assert square["key"].values.dtype == torch.float64
    assert sets.updates_of("mpnet", "prose", 0, runs)["query"].shape == (4, 4)


def test_kinds_that_belong_together_are_of_one_run(runs: Path) -> None:
    together = sets.updates_of_one_run("mpnet", "code", 0, runs, ["query", "key"])
    assert together is not None
    assert {kind: stack.shape for kind, stack in together.items()} == {"query": (4, 4), "key": (4, 4)}
    bundled = sets.updates_of_one_run("mpnet", "code", 0, runs, ["query", "attention_output"])
    assert bundled is not None
    assert {stack.shape for stack in bundled.values()} == {(768, 768)}
    assert sets.updates_of_one_run("mpnet", "code", 0, runs, ["key", "intermediate"]) is None
    assert sets.updates_of_one_run("mpnet", "code", 1, runs, ["key"]) is None


def test_a_run_that_cannot_be_read_is_not_taken_for_a_missing_one(runs: Path) -> None:
    sets.run_file("mpnet", "code", 0, runs).write_bytes(b"cut off")
    with pytest.raises(InputError, match=r"updates\.safetensors"):
        sets.updates_of_one_run("mpnet", "code", 0, runs, ["key"])


def test_a_run_is_used_where_the_bundled_file_is_not(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wheels leave out mpnet's updates for their size."""
    monkeypatch.setattr(sets, "is_bundled", lambda name: False)
    assert sets.updates_of("mpnet", runs=runs)["query"].shape == (4, 4)
    with pytest.raises(InputError, match="--model mpnet --task code --seeds 0"):
        sets.updates_of("mpnet", runs=runs / "none")


def test_norms_are_of_the_run_that_the_updates_are_of(runs: Path) -> None:
    record = sets.run_file("mpnet", "code", 0, runs).with_name("run.json")
    record.write_text(json.dumps({"update": {kind: {"relative_norm": [123.0]} for kind in ("query", "key")}}))
    norms = relative_norms("mpnet", runs)
    assert norms["key"] == [123.0]
    assert len(norms["query"]) == 12
    assert max(norms["query"]) < 1


def test_missing_runs_name_the_command_that_makes_them(tmp_path: Path) -> None:
    command = f"python -m experiments.finetune --model mpnet --task code --seeds 1 --runs {tmp_path} makes it"
    with pytest.raises(InputError, match=command):
        sets.updates_of("mpnet", "code", 1, tmp_path)


def test_the_synthetic_stacks_differ_in_what_their_layers_share() -> None:
    stacks = sets.updates_of("synthetic")
    assert {stack.layers for stack in stacks.values()} == {sets.SYNTHETIC_LAYERS}
    own, common = (stack.values for stack in stacks.values())
    cosines = [float(torch.cosine_similarity(x[0].flatten(), x[1].flatten(), 0)) for x in (own, common)]
    assert abs(cosines[0]) < 0.03
    assert cosines[1] > 0.1
