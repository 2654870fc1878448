"""The package as it is, on more instances than the quick test tries: some faults show on one instance of many only."""

from __future__ import annotations

import json

import pytest

from rasa_theory.commands import verify
from rasa_theory.verification import VerificationSettings, draw_instance, run_trial
from tests.helpers.subjects import HONEST, nearly_dependent, solver

LAW = "answer_meets_optimum"


@pytest.mark.parametrize("number", [1, 105, 125])
def test_an_exact_fit_by_nearly_dependent_pool_columns_counts_as_reached(number: int) -> None:
    instance = draw_instance("equal", number, seed=0)
    assert run_trial(instance, HONEST, VerificationSettings(), [LAW]).outcomes[LAW].holds


@pytest.mark.parametrize("number", [0, 1, 7])
def test_the_allowance_for_nearly_dependent_columns_does_not_let_lora_pass(number: int) -> None:
    instance = draw_instance("equal", number, seed=0)
    assert not run_trial(instance, solver(nearly_dependent), VerificationSettings(), [LAW]).outcomes[LAW].holds


@pytest.mark.slow
def test_every_law_holds_on_four_instances_of_every_family(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--instances", "64", "--seed", "0", "--out", "none", "--jobs", "1", "--json", "--quiet"]
    assert verify.main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["failures"] == []
