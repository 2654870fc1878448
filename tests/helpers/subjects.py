"""Subjects of the verification with one thing wrong each, and the command that tries them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

import rasa_theory as rt
from rasa_theory.commands import verify
from rasa_theory.verification import Subject

SCHEMA = json.loads((Path(rt.__file__).parent / "data" / "verify.schema.json").read_text(encoding="utf-8"))
HONEST = Subject()


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


def nearly_dependent(stack: Any, budget: Any, options: Any, solution: Any) -> dict[str, Any]:
    """Only LoRA, on equal layers: the pool's columns are equal but for relative noise of 1e-13."""
    factors = rt.RasaFactors.from_lora(rt.solve_lora(stack, budget.rank).factors, budget)
    noise = torch.randn(factors.shared_B.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return at_factors(stack, dataclasses.replace(factors, shared_B=factors.shared_B * (1 + 1e-13 * noise)))


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


def floors_by_shape(axis: int) -> Subject:
    """Floors that are lower the longer one axis is."""
    return Subject(
        closed_floors=lambda stack, budget: [
            rt.Bound(bound.value * (1 - 1e-3 * stack.shape[axis]), bound.name)
            for bound in HONEST.closed_floors(stack, budget)
        ]
    )


def certificate(factor: float) -> Subject:
    return Subject(lower_bound=lambda *asked: rt.Bound(rt.lower_bound(*asked).value * factor, "scaled"))


def drop(factor: float, where: Callable[[rt.RasaFactors], bool] = lambda factors: True) -> Subject:
    def resolve(stack: rt.LayerStack, factors: rt.RasaFactors) -> tuple[rt.RasaFactors, float]:
        solved, found = HONEST.resolve_mixing(stack, factors)
        return solved, found * (factor if where(factors) else 1)

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


def swapped(kind: str) -> Subject:
    """The embedding of this kind with the layers' mixing in the wrong order."""

    def embed(factors: rt.LoraFactors, budget: rt.RankBudget, pooled: str) -> rt.RasaFactors:
        right = rt.RasaFactors.from_lora(factors, budget, pooled)
        return dataclasses.replace(right, mixing=right.mixing.flip(0)) if pooled == kind else right

    return Subject(embed=embed)


def all_share(factors: rt.RasaFactors) -> bool:
    """So at a random pool; at an embedding every pool term serves one layer."""
    return bool((factors.mixing != 0).all())


def run(arguments: list[str], capsys: pytest.CaptureFixture[str], subject: Subject = HONEST) -> tuple[int, Any, str]:
    status = verify.main([*arguments, "--json", "--quiet"], subject)
    out, err = capsys.readouterr()
    if not out:
        return status, None, err
    jsonschema.validate(json.loads(out), SCHEMA)
    return status, json.loads(out), err
