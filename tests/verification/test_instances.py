"""Instances are drawn from seed, family and number alone, by one process or several."""

from __future__ import annotations

import json

import pytest
import torch

from rasa_theory.commands import verify
from rasa_theory.verification import (
    draw_instance,
    suitable_jobs,
)
from tests.helpers.subjects import run


@pytest.mark.slow
def test_an_instance_depends_on_seed_family_and_number_alone(capsys: pytest.CaptureFixture[str]) -> None:
    one, same, other = (draw_instance("planted", 3, seed).draw for seed in (5, 5, 6))
    assert torch.equal(one.values, same.values)
    assert one.values.shape != other.values.shape or not torch.equal(one.values, other.values)
    arguments = ["--families", "thin", "--instances", "2", "--seed", "7", "--out", "none"]
    first, second = (run(arguments, capsys)[1] for _ in range(2))
    assert first["families"] == second["families"]


@pytest.mark.slow
def test_two_processes_find_what_one_does(capsys: pytest.CaptureFixture[str]) -> None:
    """The same numbers, the instances in the same order."""
    arguments = ["--families", "thin,planted", "--instances", "6", "--seed", "7", "--out", "none", "--json", "--quiet"]
    found = []
    for jobs in ("1", "2"):
        assert verify.main([*arguments, "--jobs", jobs]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["families"] == found[1]["families"]
    assert found[0]["finished"] == found[1]["finished"] == 6


def test_processes_are_as_many_as_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(4)), raising=False)
    assert [suitable_jobs(n) for n in (1, 49, 50, 99, 1000)] == [1, 1, 2, 3, 4]
