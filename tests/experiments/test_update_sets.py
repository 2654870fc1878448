"""The sources of the updates that experiments measure."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from experiments.models import update_sets as sets
from rasa_theory.common import InputError
from rasa_theory.formats import write_halves


def test_updates_of_a_run_come_before_those_of_the_repository_but_for_the_published_set(tmp_path: Path) -> None:
    for model, task in (("minilm", "code"), ("minilm", "prose"), ("mpnet", "code")):
        file = sets.run_file(model, task, 0, tmp_path)
        file.parent.mkdir()
        write_halves({"query": torch.ones(2, 4, 4), "output": torch.ones(2, 4, 8)}, file)
    assert sets.source_of("minilm", "code", 0, tmp_path) == "minilm-code"
    for model, task in (("minilm", "prose"), ("mpnet", "code")):
        assert sets.source_of(model, task, 0, tmp_path) == str(sets.run_file(model, task, 0, tmp_path))
    assert sets.source_of("mpnet", "code", 0, tmp_path / "none") == "mpnet-code"
    square = sets.updates_of("mpnet", runs=tmp_path)
    assert list(square) == ["query"]
    assert square["query"].values.dtype == torch.float64
    assert sets.updates_of("mpnet", runs=tmp_path, kinds=["output"])["output"].shape == (4, 8)


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
