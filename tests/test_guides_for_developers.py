"""The examples of docs/development run as they stand, and do what their pages say."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import rasa_theory as rt
from experiments.support.rows import read_rows
from rasa_theory.methods import METHODS, at_parameters
from rasa_theory.solvers.starts import STARTS
from rasa_theory.verification import LAWS, Subject, VerificationSettings, draw_instance, run_trial

ROOT = Path(__file__).resolve().parents[1]


def names_of(page: str) -> dict[str, Any]:
    """The names that the Python of a page defines."""
    text = (ROOT / "docs" / "development" / f"{page}.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, f"{page}.md", "exec"), names)
    return names


@pytest.fixture
def equal_layers() -> rt.LayerStack:
    generator = torch.Generator().manual_seed(0)
    return rt.LayerStack(torch.randn(6, 5, generator=generator, dtype=torch.float64).expand(3, 6, 5))


def test_the_start_reaches_the_optimum_of_equal_layers(
    equal_layers: rt.LayerStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = names_of("add_a_start")["MEAN"]
    monkeypatch.setitem(STARTS, start.name, start)
    budget = rt.RankBudget(1, 1)
    solution = rt.solve_rasa(equal_layers, budget, rt.SolverOptions(start="mean"))
    assert solution.start == "mean"
    assert solution.history[0] == pytest.approx(rt.lower_bound(equal_layers, budget).value)
    assert start.make(equal_layers.unit(), rt.RankBudget(2, 2), 0) is None


def test_the_method_is_compared(equal_layers: rt.LayerStack, monkeypatch: pytest.MonkeyPatch) -> None:
    method = names_of("add_a_method")["MEAN"]
    monkeypatch.setitem(METHODS, method.name, method)
    fits = at_parameters(equal_layers, math.prod(equal_layers.shape), ["lora", "mean"])
    assert fits["mean"].error == pytest.approx(0, abs=1e-20)
    assert fits["mean"].parameters == method.parameters(3, (6, 5)) == 30
    assert "mean" not in at_parameters(equal_layers, 20, ["mean"], slack=0)


def test_the_law_holds_and_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LAWS, "lora_below_energy", names_of("add_a_law")["LAW"])
    settings = VerificationSettings(sweeps=2)

    def doubled(stack: rt.LayerStack, rank: int) -> rt.LoraSolution:
        solution = rt.solve_lora(stack, rank)
        return rt.LoraSolution(
            solution.error + 2 * stack.norm_squared, solution.interval, solution.layer_errors, solution.factors
        )

    for subject, holds in ((Subject(), True), (Subject(solve_lora=doubled), False)):
        trial = run_trial(draw_instance("gaussian", 0, seed=0), subject, settings, ["lora_below_energy"])
        assert trial.outcomes["lora_below_energy"].holds is holds


def test_the_figure_shows_the_data() -> None:
    rows = read_rows(ROOT / "figures" / "floors.csv")
    (ax,) = names_of("add_a_figure")["plot"](rows).axes
    heights = [y for line in ax.get_lines() for y in line.get_ydata()]
    assert sorted(heights) == sorted(row["closed"] for row in rows)
