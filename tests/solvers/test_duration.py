"""Forecasts of a solver's time beside what was measured, and the size of a core before it is made."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from experiments.support.rows import read_rows
from rasa_theory import LayerStack, RankBudget
from rasa_theory.solvers import SearchCore, allocation_start, solver_seconds
from rasa_theory.solvers.search.core import core_side
from tests.helpers.problems import falling

MEASURED = [row for row in read_rows(Path("figures/at_size.csv")) if row["way"] == "leading"]


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: f"{row['layers']} x {row['n']}^2")
def test_large_layers_take_what_is_forecast_within_a_factor_of_one_and_a_half(row) -> None:
    stack = SimpleNamespace(layers=row["layers"], shape=(row["n"], row["n"]))
    forecast = solver_seconds(row["lora_seconds"], [stack], RankBudget(8, 1))
    assert forecast / 1.5 < row["seconds"] < 1.5 * forecast


def test_stacks_share_the_time_of_lora_by_their_entries() -> None:
    stack = SimpleNamespace(layers=4, shape=(2048, 2048))
    one, both = (
        solver_seconds(seconds, stacks, RankBudget(8, 1)) for seconds, stacks in ((1.0, [stack]), (2.0, 2 * [stack]))
    )
    assert both == pytest.approx(2 * one)


@pytest.mark.parametrize(("r", "k"), [(4, 1), (6, 3), (40, 2)])
def test_the_size_of_a_core_is_known_before(r: int, k: int) -> None:
    stack, budget = LayerStack(torch.as_tensor(falling(3, 120, 100))), RankBudget(r, k)
    core = SearchCore.at(stack.unit(), allocation_start(stack.unit(), budget))
    assert tuple(core.K.shape) == (3, core_side(120, 3 * r), core_side(100, 3 * r))
