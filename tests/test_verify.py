"""A bench that cannot fail proves nothing: every law is broken here, and the command must name it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import rasa_theory as rt
from rasa_theory.bench.evidence import BenchSettings, Subject
from rasa_theory.bench.instances import draw_instance
from rasa_theory.bench.laws import LAWS
from rasa_theory.bench.trial import run_trial

SCHEMA = json.loads((Path(rt.__file__).parent / "data" / "verify.schema.json").read_text(encoding="utf-8"))
HONEST = Subject()
FEW = BenchSettings(sweeps=2)


# ---- subjects with one thing wrong each


def solver(change: Callable[[rt.LayerStack, rt.RankBudget, Any, rt.RasaSolution], dict[str, Any]]) -> Subject:
    """Solutions of the package with some fields changed."""

    def solve(stack: rt.LayerStack, budget: rt.RankBudget, options: rt.SolverOptions) -> rt.RasaSolution:
        solution = rt.solve_rasa(stack, budget, options)
        return dataclasses.replace(solution, **change(stack, budget, options, solution))

    return Subject(solve_rasa=solve)


def at_factors(stack: rt.LayerStack, factors: rt.RasaFactors) -> dict[str, Any]:
    """What a solver that ends at `factors` says, with no lie in it."""
    errors = rt.layer_errors(stack, factors)
    return {"factors": factors, "error": math.fsum(errors), "layer_errors": errors, "history": [math.fsum(errors)]}


def worse_than_lora(stack: Any, budget: Any, options: Any, solution: rt.RasaSolution) -> dict[str, Any]:
    return at_factors(stack, solution.factors.scaled(0.0))


def only_lora(stack: Any, budget: Any, options: Any, solution: Any) -> dict[str, Any]:
    return at_factors(stack, rt.RasaFactors.from_lora(rt.solve_lora(stack, budget.rank).factors, budget))


def rising(start: str, sweep: str) -> Subject:
    def change(stack: Any, budget: Any, options: Any, solution: rt.RasaSolution) -> dict[str, Any]:
        if (options.start, options.sweep) != (start, sweep):
            return {}
        first, *rest = solution.history
        return {"history": [first, first * (1 + 1e-9), *rest]}

    return solver(change)


def last_digit(stack: rt.LayerStack, budget: Any, options: Any, solution: rt.RasaSolution) -> dict[str, Any]:
    """A tolerance that is not relative."""
    return {"error": solution.error * (1 + 2.3e-16 if stack.norm_squared > 1e9 else 1)}


def lora(change: Callable[[rt.LayerStack, rt.LoraSolution], float]) -> Subject:
    def solve(stack: rt.LayerStack, rank: int) -> rt.LoraSolution:
        solution = rt.solve_lora(stack, rank)
        return dataclasses.replace(solution, error=solution.error * change(stack, solution))

    return Subject(solve_lora=solve)


def allocation(factor: Callable[[rt.LayerStack, rt.RankBudget], float]) -> Subject:
    return Subject(
        allocation_bound=lambda stack, budget: rt.Bound(
            rt.allocation_bound(stack, budget).value * factor(stack, budget), "allocation"
        )
    )


def floor(name: str, factor: float = 1.01) -> Subject:
    """A closed floor that is 1 % too high."""
    return Subject(
        closed_floors=lambda stack, budget: [
            rt.Bound(bound.value * (factor if bound.name == name else 1), bound.name)
            for bound in HONEST.closed_floors(stack, budget)
        ]
    )


def certificate(factor: float) -> Subject:
    return Subject(lower_bound=lambda *asked: rt.Bound(rt.lower_bound(*asked).value * factor, "scaled"))


def drop(factor: float) -> Subject:
    def resolve(stack: rt.LayerStack, factors: rt.RasaFactors) -> tuple[rt.RasaFactors, float]:
        solved, found = HONEST.resolve_mixing(stack, factors)
        return solved, found * factor

    return Subject(resolve_mixing=resolve)


def path(change: Callable[[dict[int, rt.RasaSolution]], dict[int, rt.RasaSolution]]) -> Subject:
    return Subject(solve_path=lambda *asked: change(rt.solve_path(*asked)))


def counting(shift: int) -> Subject:
    def attempt(*asked: Any) -> rt.Attempt:
        found = rt.random_attempt(*asked)
        return dataclasses.replace(found, iterations=found.iterations + shift if found.iterations else None)

    return Subject(random_attempt=attempt)


def fails(*arguments: Any) -> Any:
    raise ArithmeticError("no such number")


def entry(stack: rt.LayerStack) -> float:
    return float(stack.values[0, 0, 0]) / math.sqrt(stack.norm_squared)


def swapped(factors: rt.LoraFactors, budget: rt.RankBudget, pooled: str) -> rt.RasaFactors:
    right = rt.RasaFactors.from_lora(factors, budget, pooled)
    return dataclasses.replace(right, mixing=right.mixing.flip(0))


BROKEN: list[tuple[str, str, Subject]] = [
    ("answer_below_lora", "gaussian", solver(worse_than_lora)),
    ("answer_below_allocation", "orthogonal-rows", solver(only_lora)),
    ("allocation_below_lora", "equal", allocation(lambda stack, budget: 1 + 1e9 * budget.shared_rank)),
    ("rank_floor", "equal", floor("rank")),
    ("stack_floor", "orthogonal-rows", floor("stack")),
    ("clipped_floor", "orthogonal-rows", floor("clipped")),
    ("certificate", "equal", certificate(1.01)),
    ("certificate_is_the_best", "equal", certificate(0.99)),
    ("allocation_nested", "gaussian", allocation(lambda stack, budget: 1.0 + (budget.shared_rank > 0))),
    ("path_nested", "gaussian", path(lambda found: dict(zip(found, reversed(found.values()), strict=True)))),
    ("path_begins_at_lora", "gaussian", path(lambda found: found | {0: found[max(found)]})),
    ("lora_factors", "gaussian", lora(lambda stack, solution: 1 - 1e-9)),
    ("embedding", "gaussian", Subject(embed=swapped)),
    ("drop_nonnegative", "gaussian", drop(-1.0)),
    ("drop_measured", "gaussian", drop(1.01)),
    ("drop_measured", "gaussian", drop(0.99)),
    ("answer_falls", "gaussian", rising("best", "joint")),
    ("joint_falls", "gaussian", rising("random", "joint")),
    ("paper_falls", "gaussian", rising("random", "paper")),
    (
        "history_ends_at_error",
        "gaussian",
        solver(lambda *given: {"history": [*given[3].history, 0.99 * given[3].error]}),
    ),
    ("error_is_residual", "gaussian", solver(lambda *given: {"error": given[3].error * (1 - 1e-9)})),
    ("error_is_residual", "gaussian", solver(lambda *given: {"layer_errors": given[3].layer_errors[::-1]})),
    ("error_is_residual", "gaussian", solver(lambda *given: {"error": math.nan})),
    ("crossing", "gaussian", counting(1)),
    ("crossing", "gaussian", counting(-1)),
    ("power_of_two", "gaussian", solver(last_digit)),
    ("floor_below_optimum", "shared-bases", floor("stack")),
    ("floor_meets_optimum", "shared-bases", certificate(0.99)),
    ("allocation_meets_optimum", "no-sharing", allocation(lambda stack, budget: 1 - 1e-9)),
    ("answer_meets_optimum", "orthogonal-rows", solver(only_lora)),
    ("scaled", "gaussian", lora(lambda stack, solution: 1 + 1e-9 * stack.norm_squared)),
    ("rotated", "gaussian", lora(lambda stack, solution: 1 + 1e-9 * entry(stack))),
    ("permuted", "gaussian", lora(lambda stack, solution: 1 + 1e-9 * solution.layer_errors[0] / solution.error)),
    ("transposed", "gaussian", allocation(lambda stack, budget: 1 + 1e-9 * stack.shape[0])),
    ("padded", "gaussian", allocation(lambda stack, budget: 1 + 1e-9 * sum(stack.shape))),
    ("answer_below_lora", "gaussian", Subject(solve_rasa=fails)),
]


@pytest.mark.parametrize(("law", "family", "broken"), BROKEN, ids=[f"{i}-{row[0]}" for i, row in enumerate(BROKEN)])
def test_a_broken_law_is_noticed_and_an_honest_one_holds(law: str, family: str, broken: Subject) -> None:
    instance = draw_instance(family, 0, seed=0)
    assert run_trial(instance, HONEST, FEW, [law]).outcomes[law].holds
    assert not run_trial(instance, broken, FEW, [law]).outcomes[law].holds


def test_every_law_is_broken_above() -> None:
    """But for the one that only a wrong optimum can break: see the next."""
    assert {law for law, _, _ in BROKEN} | {"answer_above_optimum"} == set(LAWS)
