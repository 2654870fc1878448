"""The laws: one function each, evidence -> the worst margin of its comparisons, in units of their tolerance.

A law holds where its margin is at most 1. The margin is None where the law does not apply. Errors are squared, and
x <= y between them means sqrt(x) <= sqrt(y) + tolerance. The tolerance is `stack.rounding`, 10 max(b, a) eps ||M||, or
`measurable`, the same with the size of the terms where they cancel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from rasa_theory.bounds import floor_slack
from rasa_theory.problem import LayerStack, layer_residuals
from rasa_theory.solvers import RasaSolution, SolverOptions, StopReason, drop_allowance, measurable, unresolved
from rasa_theory.verification.evidence import Evidence, MixingStep, VerificationSettings, residual

Margin = float | None


@dataclass(frozen=True)
class Law:
    """A statement in a few words, and the function that measures how far an instance is from breaking it."""

    statement: str
    margin: Callable[[Evidence], Margin]


def excess(x: float, y: float, tolerance: float) -> float:
    """sqrt(x) - sqrt(y) in units of `tolerance`. NaN exceeds everything."""
    return _in_units(math.sqrt(max(x, 0.0)) - math.sqrt(max(y, 0.0)), tolerance) if x == x and y == y else math.inf


def difference(x: float, y: float, tolerance: float) -> float:
    """The distance of sqrt(x) and sqrt(y) in units of `tolerance`."""
    return max(excess(x, y, tolerance), excess(y, x, tolerance))


def _in_units(amount: float, tolerance: float) -> float:
    """amount / tolerance, and 0 for 0 / 0."""
    if amount != amount:
        return math.inf
    return amount / tolerance if tolerance > 0 else math.copysign(math.inf, amount) if amount else 0.0


def _squared(error: float, tolerance: float) -> float:
    """The tolerance of a squared error for a `tolerance` in units of norm."""
    return 2 * math.sqrt(max(error, 0.0)) * tolerance + tolerance**2


# ---- the order floor <= e_rasa <= e_alloc <= e_lora


def _theorem(e: Evidence) -> Margin:
    return excess(residual(e.values, e.answer.factors), e.lora.error, e.stack.rounding)


def _answer_below_allocation(e: Evidence) -> Margin:
    return excess(e.answer.error, e.closed.e_allocation, e.stack.rounding)


def _allocation_below_lora(e: Evidence) -> Margin:
    return excess(e.closed.e_allocation, e.lora.error, e.stack.rounding)


def _floor(name: str) -> Callable[[Evidence], Margin]:
    return lambda e: excess(e.closed.floors.get(name, 0.0), e.lowest, e.stack.rounding)


def _certificate(e: Evidence) -> Margin:
    return excess(e.certificate.value, e.lowest, e.stack.rounding)


def _probable_floor(e: Evidence) -> Margin:
    return excess(e.probable.value, e.lowest, e.stack.rounding)


def _certificate_is_the_best(e: Evidence) -> Margin:
    return excess(max(e.closed.floors.values()), e.certificate.value, e.stack.rounding)


# ---- nesting in k


def _allocation_nested(e: Evidence) -> Margin:
    bounds = [e.allocation_at(k) for k in range(e.budget.rank + 1)]
    return max(excess(y, x, e.stack.rounding) for x, y in pairwise(bounds))


def _path_nested(e: Evidence) -> Margin:
    errors = [e.path[k].error for k in range(e.budget.rank + 1)]
    return max(excess(y, x, e.stack.rounding) for x, y in pairwise(errors))


def _path_begins_at_lora(e: Evidence) -> Margin:
    return difference(e.path[0].error, e.lora.error, e.stack.rounding)


# ---- Theorem 3.1's embedding, and the drop of re-solving D


def _lora_factors(e: Evidence) -> Margin:
    return difference(residual(e.values, e.lora.factors), e.lora.error, e.stack.rounding)


def _embedding(e: Evidence) -> Margin:
    return max(difference(step.before, e.lora.error, e.stack.rounding) for step in e.embeddings)


def _drop_nonnegative(e: Evidence) -> Margin:
    steps = [*e.embeddings, e.random_mixing]
    return max(0.0 if step.drop >= 0 else math.inf for step in steps)


def _drop_measured(e: Evidence) -> Margin:
    return max(_drop_margin(e, step) for step in (*e.embeddings, e.random_mixing))


def _drop_margin(e: Evidence, step: MixingStep) -> float:
    tolerance = drop_allowance(e.stack, step.factors, step.before, step.solved, step.after)
    return _in_units(abs(step.before - step.after - step.drop), tolerance)


# ---- what a solution says of itself


def _falls(e: Evidence, solution: RasaSolution) -> float:
    tolerance = measurable(e.stack, solution.factors)
    return max((excess(y, x, tolerance) for x, y in pairwise(solution.history)), default=0.0)


def _answer_falls(e: Evidence) -> Margin:
    return _falls(e, e.answer)


def _random_falls(sweep: str) -> Callable[[Evidence], Margin]:
    return lambda e: _falls(e, e.random_runs[sweep])


def _solutions(e: Evidence) -> list[RasaSolution]:
    return [e.answer, *e.random_runs.values()]


def _history_ends_at_the_error(e: Evidence) -> Margin:
    return max(difference(min(s.history), s.error, measurable(e.stack, s.factors)) for s in _solutions(e))


def _error_is_the_residual(e: Evidence) -> Margin:
    return max(_reporting(e, solution) for solution in _solutions(e))


def _reporting(e: Evidence, solution: RasaSolution) -> float:
    measured = layer_residuals(e.values, solution.factors)
    pairs = [(solution.error, math.fsum(measured)), *zip(solution.layer_errors, measured, strict=True)]
    return max(difference(x, y, measurable(e.stack, solution.factors)) for x, y in pairs)


def _crossing(e: Evidence) -> Margin:
    """The count names the first iteration with an error below e_lora. Tried on every fourth instance: it is slow."""
    if e.instance.number % 4:
        return None
    history, count = e.attempt.history, e.attempt.iterations
    before = history if count is None else history[:count]
    margins = [excess(e.lora.error, x, e.stack.rounding) for x in before]
    return max(margins if count is None else [*margins, excess(history[count], e.lora.error, e.stack.rounding)])


def _power_of_two(e: Evidence) -> Margin:
    """Exactly: the scaling inside the package only moves exponents."""
    options, c = SolverOptions(start="random", max_sweeps=1, rtol=0, seed=e.instance.seed), 2.0**20
    scaled = LayerStack(e.values * c, e.stack.name)
    one, other = (e.subject.solve_rasa(stack, e.budget, options) for stack in (e.stack, scaled))
    return 0.0 if other.history == [c**2 * x for x in one.history] and other.error == c**2 * one.error else math.inf


# ---- known optima


def _floor_below_optimum(e: Evidence) -> Margin:
    if e.known is None:
        return None
    floors = [e.certificate.value, *e.closed.floors.values()]
    return max(excess(floor, e.known.e_rasa, e.stack.rounding) for floor in floors)


def _answer_above_optimum(e: Evidence) -> Margin:
    return None if e.known is None else excess(e.known.e_rasa, e.lowest, e.stack.rounding)


def _floor_meets_optimum(e: Evidence) -> Margin:
    """A floor lies at most twice its allowance below the truth: `floor_slack`, and `rounding` where it is in norm."""
    if e.known is None or "floor" not in e.known.met_by:
        return None
    tolerance = floor_slack(e.stack, e.certificate.name) + _squared(e.known.e_rasa, 2 * e.stack.rounding)
    return _in_units(e.known.e_rasa - e.certificate.value, tolerance)


def _allocation_meets_optimum(e: Evidence) -> Margin:
    if e.known is None or "allocation" not in e.known.met_by:
        return None
    return difference(e.closed.e_allocation, e.known.e_rasa, e.stack.rounding)


def _answer_meets_optimum(e: Evidence) -> Margin:
    """Where allocation is the optimum, always; else where the solver had its sweeps and ended by itself.

    Cut short it may end at a closed-form start: of equal layers those are saddles. Sweeps end when one of them gains
    less than rtol of the error; the families for which this is asked converge by more than half a sweep, so that less
    than that is left to gain. Where the fit is exact they end where rounding hides it, see `unresolved`.
    """
    if e.known is None or "solver" not in e.known.met_by:
        return None
    ended = e.answer.stop_reason is not StopReason.SWEEP_LIMIT and e.settings.sweeps >= VerificationSettings().sweeps
    if "allocation" not in e.known.met_by and not ended:
        return None
    optimum, rtol = e.known.e_rasa, SolverOptions().rtol
    rounding = measurable(e.stack, e.answer.factors)
    if optimum <= rounding**2:
        rounding += unresolved(e.stack, e.answer.factors)
    tolerance = _squared(optimum, rounding) + rtol * optimum
    return _in_units(e.answer.error - optimum, tolerance)


# ---- invariances of the closed forms


def _unchanged(e: Evidence, values: Tensor, c: float = 1.0) -> float:
    """The worst distance of e_lora, e_alloc and each floor of `values` from c^2 times the value of the instance.

    Two computed floors of one truth lie at most `floor_slack` below it each, or twice `rounding` in norm.
    """
    other = LayerStack(values, e.stack.name)
    new, old, close = e.forms(other), e.closed, other.rounding
    margins = [difference(x, c**2 * y, close) for x, y in zip(new[:2], old[:2], strict=True)]
    for name in old.floors.keys() | new.floors.keys():
        x, y = new.floors.get(name, 0.0), c**2 * old.floors.get(name, 0.0)
        slack = max(floor_slack(other, name), c**2 * floor_slack(e.stack, name))
        margins.append(_in_units(abs(x - y), slack + _squared(y, 2 * close)))
    return max(margins)


def _scaled(e: Evidence) -> Margin:
    c = float(e.rng().uniform(0.2, 5.0)) * (-1) ** e.instance.number
    return _unchanged(e, e.values * c, c)


def _rotated(e: Evidence) -> Margin:
    rng = e.rng()
    U, V = (torch.from_numpy(np.linalg.qr(rng.standard_normal((n, n)))[0]) for n in e.stack.shape)
    return _unchanged(e, (U @ e.values.double() @ V).to(e.values.dtype))


def _permuted(e: Evidence) -> Margin:
    return _unchanged(e, e.values[torch.from_numpy(e.rng().permutation(e.stack.layers))])


def _transposed(e: Evidence) -> Margin:
    return _unchanged(e, e.values.mT.contiguous())


def _padded(e: Evidence) -> Margin:
    right, below = (int(n) for n in e.rng().integers(0, 4, 2))
    return _unchanged(e, torch.nn.functional.pad(e.values, (0, right, 0, below)))


LAWS = {
    "answer_below_lora": Law("Theorem 3.1: the residual of the answer is at most e_lora", _theorem),
    "answer_below_allocation": Law("e_rasa <= e_alloc", _answer_below_allocation),
    "allocation_below_lora": Law("e_alloc <= e_lora", _allocation_below_lora),
    "rank_floor": Law("the rank floor is not above the least error of any point found", _floor("rank")),
    "stack_floor": Law("the stack floor is not above it", _floor("stack")),
    "clipped_floor": Law("the clipped floor is not above it", _floor("clipped")),
    "split_floor": Law("the split floor is not above it", _floor("split")),
    "certificate": Law("the floor of --certificate is not above it", _certificate),
    "probable_floor": Law("the closed floor from products alone is not above it", _probable_floor),
    "certificate_is_the_best": Law("no closed floor is above the floor of --certificate", _certificate_is_the_best),
    "allocation_nested": Law("e_alloc(k+1) <= e_alloc(k)", _allocation_nested),
    "path_nested": Law("e_rasa(k+1) <= e_rasa(k) along a path", _path_nested),
    "path_begins_at_lora": Law("the path begins at e_rasa(0) = e_lora", _path_begins_at_lora),
    "lora_factors": Law("LoRA's factors leave e_lora", _lora_factors),
    "embedding": Law("LoRA's factors as RaSA factors leave e_lora", _embedding),
    "drop_nonnegative": Law("mixing_drop >= 0", _drop_nonnegative),
    "drop_measured": Law("mixing_drop is what re-solving D gains", _drop_measured),
    "answer_falls": Law("the answer's history never rises", _answer_falls),
    "joint_falls": Law("joint sweeps from a random start never raise the error", _random_falls("joint")),
    "paper_falls": Law("iterations of the paper from a random start never raise it", _random_falls("paper")),
    "history_ends_at_error": Law("the least error of a history is that of the answer", _history_ends_at_the_error),
    "error_is_residual": Law("reported errors, of each layer too, are the direct residual", _error_is_the_residual),
    "crossing": Law("the count is the first iteration below e_lora", _crossing),
    "power_of_two": Law("2^20 M changes no digit of a history", _power_of_two),
    "floor_below_optimum": Law("known optimum: no floor is above it", _floor_below_optimum),
    "answer_above_optimum": Law("known optimum: no point found is below it", _answer_above_optimum),
    "floor_meets_optimum": Law("known optimum that a floor meets: it does", _floor_meets_optimum),
    "allocation_meets_optimum": Law("known optimum without sharing: it is e_alloc", _allocation_meets_optimum),
    "answer_meets_optimum": Law("known optimum that sweeps reach for certain: they do", _answer_meets_optimum),
    "scaled": Law("closed forms of c M are c^2 times those of M", _scaled),
    "rotated": Law("U M_i V with orthogonal U, V changes no closed form", _rotated),
    "permuted": Law("the order of layers changes none", _permuted),
    "transposed": Law("M_i^T changes none", _transposed),
    "padded": Law("zero rows and columns change none", _padded),
}
"""Every law by name, in the order in which they are tried."""
