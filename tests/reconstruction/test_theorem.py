"""The verdict: each of its laws can fail, and the numbers beside it are what they are called."""

import dataclasses
import importlib

import pytest

from rasa_theory import (
    Bound,
    InputError,
    LayerStack,
    RankBudget,
    RasaFactors,
    SolverOptions,
    lower_bound,
    mixing_drop,
    reconstruction_error,
    solve_lora,
    solve_rasa,
)
from rasa_theory import study as run_study
from rasa_theory.solvers import drop_allowance, random_start
from rasa_theory.verification import draw_instance
from tests.helpers.problems import noise

study = importlib.import_module("rasa_theory.reconstruction.theorem")
driver = importlib.import_module("rasa_theory.reconstruction.driver")

STACK, BUDGET = LayerStack(100 * noise(3, 9, 8)), RankBudget(3, 1)
LORA = solve_lora(STACK, 3)
SOLUTION = solve_rasa(STACK, BUDGET, SolverOptions(max_sweeps=20, effort="quick"))
FLOOR = Bound(0.5 * SOLUTION.error, "clipped")


def failed(lora=LORA, solution=SOLUTION, floor=FLOOR):
    """The laws that do not hold."""
    return {law for law, holds in study.check_theorem(STACK, BUDGET, lora, solution, floor)[1].items() if not holds}


def test_every_law_holds_on_what_was_solved():
    assert failed() == set()


@pytest.mark.parametrize("factor", [1 - 1e-9, 1 + 1e-9])
def test_a_wrong_e_lora_is_noticed_on_either_side(factor):
    lora = dataclasses.replace(LORA, error=LORA.error * factor)
    assert failed(lora=lora) == {"embedding_reproduces_eckart_young"}


def test_an_answer_above_e_lora_is_noticed_from_its_factors_and_not_from_its_claim():
    solution = dataclasses.replace(SOLUTION, factors=random_start(STACK, BUDGET))
    assert failed(solution=solution) == {"answer_is_not_above_e_lora"}


def test_a_floor_above_the_answer_is_noticed():
    assert failed(floor=Bound(SOLUTION.error * (1 + 1e-9), "clipped")) == {"floor_is_not_above_answer"}
    assert failed(floor=Bound(SOLUTION.error, "clipped")) == set()


@pytest.mark.slow
@pytest.mark.parametrize("amount", [2.0, -2.0, -1e6])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_drop_that_is_not_what_solving_d_gives_is_noticed(dtype, amount, monkeypatch):
    """In units of what the measured drop is known to; errors at given factors are measured in float64 always."""
    stack, real = LayerStack(STACK.values, dtype=dtype), study.resolve_mixing
    lora, solution = solve_lora(stack, 3), solve_rasa(stack, BUDGET, SolverOptions(max_sweeps=20, effort="quick"))

    def doctored(stack, factors):
        solved, _ = real(stack, factors)
        before, after = (reconstruction_error(stack, f) for f in (factors, solved))
        return solved, before - after + amount * drop_allowance(stack, factors, before, solved, after)

    assert all(study.check_theorem(stack, BUDGET, lora, solution, FLOOR)[1].values())
    monkeypatch.setattr(study, "resolve_mixing", doctored)
    checks = study.check_theorem(stack, BUDGET, lora, solution, FLOOR)[1]
    assert {law for law, holds in checks.items() if not holds} == {"mixing_drop_is_what_solving_d_gives"}


def test_a_negative_drop_is_noticed(monkeypatch):
    monkeypatch.setattr(study, "resolve_mixing", lambda stack, factors: (factors, -1e-300))
    assert failed() == {"mixing_drop_is_what_solving_d_gives"}


@pytest.mark.parametrize("number", [91, 119])
def test_terms_that_cancel_are_no_violation(number):
    """Layers that differ by 1e-6: re-solving D makes terms of 40 ||M||."""
    draw = draw_instance("near-duplicates", number, seed=0).draw
    stack, budget = LayerStack(draw.values), draw.budget
    lora, solution = (
        solve_lora(stack, budget.rank),
        solve_rasa(stack, budget, SolverOptions(max_sweeps=1, effort="quick")),
    )
    _, checks = study.check_theorem(stack, budget, lora, solution, lower_bound(stack, budget))
    assert all(checks.values())


def test_the_drop_reported_is_the_larger_of_the_two_embeddings():
    drops = [mixing_drop(STACK, RasaFactors.from_lora(LORA.factors, BUDGET, p)) for p in ("smallest", "largest")]
    assert drops[0] != pytest.approx(drops[1], rel=0.1)
    assert study.check_theorem(STACK, BUDGET, LORA, SOLUTION, FLOOR)[0] == max(drops)


def test_starts_that_promise_nothing_are_undecided_above_e_lora_and_any_other_is_violated():
    above = {"one": True, "answer_is_not_above_e_lora": False}
    assert study.verdict(above, "random") == study.verdict(above, random_start(STACK, BUDGET)) == "undecided"
    assert study.verdict(above, "common") == study.verdict(above, "pencil") == "undecided"
    assert all(study.verdict(above, start) == "violated" for start in ("best", "allocation", "lora"))
    assert study.verdict({**above, "one": False}, "random") == "violated"
    assert study.verdict({"one": True}, "best") == "holds"


@pytest.mark.slow
def test_a_searched_floor_is_told_as_a_floor_and_counted_as_a_task():
    told = []
    quick = SolverOptions(max_sweeps=5, effort="quick")
    settings = driver.StudySettings(3, (0, 1), quick, "two-sided", seeds=1)
    run_study([STACK], 3, (0, 1), solver=quick, certificate="two-sided", seeds=1, watch=told.append)
    assert {p.doing for p in told if p.k == 1} >= {"dual floor", "two-sided floor", "random attempts"}
    (closed,) = run_study([STACK], 3, solver=quick, certificate="closed", seeds=0)["stacks"]
    (floor,) = (run["lower_bound"] for run in closed["runs"])
    assert all(p.ratio <= 1 for p in told if p.doing.endswith("floor"))
    assert max(p.ratio for p in told if p.doing.endswith("floor")) * LORA.error >= floor
    assert [settings.tasks(k) for k in (0, 1)] == [1, 3]
    assert told[-1].tasks_done <= 4
    with pytest.raises(InputError, match="unknown certificate 'best'; known: closed, dual, two-sided"):
        driver.StudySettings(certificate="best")


def test_the_row_of_a_run_has_the_parameters_and_ratios_that_it_names():
    results = run_study([STACK], rank=3, ks=(0, 2), seeds=1, solver=SolverOptions(max_sweeps=5, effort="quick"))
    (row,) = results["stacks"]
    for run, k in zip(row["runs"], (0, 2), strict=True):
        assert run["parameters"]["lora"] == 3 * 3 * (9 + 8)
        assert run["parameters"]["rasa"] == 3 * 3 * (9 + 8) + 3 * 3 * k
        assert run["parameters"]["extra_percent"] == pytest.approx(100 * 9 * k / 153)
        assert run["ratio"] == run["e_rasa"] / row["e_lora"]
        assert run["update_rank"] == min(3 - k + 3 * k, 8)
        assert len(run["attempts"]) == (1 if k else 0)


def test_one_violation_outweighs_what_is_undecided():
    def results(*verdicts):
        return {"stacks": [{"runs": [{"theorem_3_1": v}]} for v in verdicts]}

    assert study.overall_verdict(results("undecided", "violated", "holds")) == "violated"
    assert study.overall_verdict(results("holds", "undecided")) == "undecided"
    assert study.overall_verdict(results("holds", "holds")) == "holds"


def test_attempts_count_on_from_the_seed():
    results = run_study([STACK], rank=2, ks=(1,), seeds=3, solver=SolverOptions(max_sweeps=1, seed=40, effort="quick"))
    assert [a["seed"] for a in results["stacks"][0]["runs"][0]["attempts"]] == [40, 41, 42]


def test_settings_are_checked_before_anything_is_solved_and_each_k_counts_once():
    assert driver.StudySettings(rank=3, ks=(2, 1, 2)).ks == (1, 2)
    for bad, sentence in (
        ({"certificate": "clsoed"}, "unknown certificate 'clsoed'; known: closed"),
        ({"seeds": 1.5}, "seeds must be a whole number, got 1.5"),
        ({"seeds": -1}, "seeds must be at least 0"),
        ({"weight": "rows"}, "unknown weight 'rows'"),
        ({"ks": ()}, "no k was given"),
    ):
        with pytest.raises(InputError, match=sentence):
            driver.StudySettings(**bad)
