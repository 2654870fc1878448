"""The package as it is, on more instances than the quick test tries: some faults show on one instance of many only."""

from __future__ import annotations

import json

import pytest

from rasa_theory.commands import verify


@pytest.mark.slow
def test_every_law_holds_on_four_instances_of_every_family(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--instances", "64", "--seed", "0", "--out", "none", "--jobs", "1", "--json", "--quiet"]
    assert verify.main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["failures"] == []
