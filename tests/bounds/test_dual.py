"""The dual floor: the formula read literally, what it may never do, and what the search gains."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rasa_theory import FloorOptions, LayerStack, RankBudget, SolverOptions, lower_bound, solve_lora, solve_rasa
from rasa_theory.bounds import dual_value, rounding_allowance, search_dual
from rasa_theory.linalg import not_above
from tests.helpers import reference
from tests.helpers.problems import SHAPES, decaying, noise, planted
from tests.helpers.strategies import best_error, nasty_stacks


def factors(stack, seed, size=1.0, p=None):
    """Random F_i, F_i F_i^T as large as M_i M_i^T times `size`."""
    b = stack.shape[0]
    F = np.random.default_rng(seed).standard_normal((stack.layers, b, p or b))
    return torch.tensor(F * math.sqrt(size * stack.norm_squared / (F**2).sum()))


def allowance(stack, budget, F):
    """What `dual_value` takes off."""
    L, (b, a) = stack.layers, stack.shape
    energy = stack.norm_squared + float((F**2).sum())
    return rounding_allowance(L * (a + F.shape[2]) + b, L * budget.rank, energy)


# ---- the formula


@pytest.mark.parametrize(("L", "b", "a", "r", "k", "seed"), SHAPES)
@pytest.mark.parametrize("size", [0.0, 0.1, 0.7])
def test_the_value_is_the_literal_formula_less_its_allowance(L, b, a, r, k, seed, size):
    M, budget = noise(L, b, a, seed), RankBudget(r, k)
    stack = LayerStack(M)
    F = factors(stack, seed, size)
    literal = reference.dual_bound(M, (F @ F.mT).numpy(), r, k)
    off = allowance(stack, budget, F)
    assert literal - 1.5 * off <= dual_value(stack, budget, F) <= literal - 0.5 * off


@given(nasty_stacks(scales=(1.0,)), st.integers(0, 99), st.sampled_from([1e-3, 0.1, 0.5, 1.0, 30.0]), st.booleans())
def test_no_psd_matrices_whatever_lift_the_value_above_an_error(problem, seed, size, flip):
    stack = problem.stack.transpose() if flip else problem.stack
    F = factors(stack, seed, size, p=1 + seed % 3)
    assert not_above(dual_value(stack, problem.budget, F), best_error(problem), stack.rounding)


@pytest.mark.parametrize("seed", range(12))
def test_rounding_never_lifts_the_value_of_an_exact_stack_above_zero(seed):
    """Updates of the budget itself leave nothing; Y_i = Gamma_i makes the formula 0 but for rounding."""
    problem = planted(seed, L=3, b=12, a=9, r=2, k=1)
    stack = LayerStack(problem.values)
    assert dual_value(stack, problem.budget, torch.tensor(problem.values)) < 0


@pytest.mark.parametrize("seed", range(3))
def test_at_the_same_point_a_larger_rank_has_a_lower_value(seed):
    stack = LayerStack(decaying(seed=seed))
    F = factors(stack, seed, 0.2)
    values = [dual_value(stack, RankBudget(r, 1), F) for r in range(1, 9)]
    assert values == sorted(values, reverse=True)


def test_factors_that_are_not_finite_give_no_floor():
    stack = LayerStack(noise(2, 4, 4))
    assert dual_value(stack, RankBudget(2, 1), torch.full((2, 4, 1), math.nan)) == -math.inf
    assert dual_value(stack, RankBudget(2, 1), torch.full((2, 4, 1), 1e200, dtype=torch.float64)) == -math.inf


# ---- the search

MORE = [(0, 1), (1, 1), (2, 1), (1, 2), (2, 2)]


@pytest.mark.parametrize(("seed", "k"), [(0, 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)])
def test_it_gains_on_the_closed_form_and_one_iteration_is_valid(seed, k):
    stack, budget = LayerStack(decaying(3, 32, 32, seed)), RankBudget(4, k)
    e_lora = solve_lora(stack, 4).error
    error = solve_rasa(stack, budget, SolverOptions(sweep="joint", max_sweeps=50, effort="quick")).error
    values = [search_dual(stack.unit(), budget, FloorOptions(n), None) * stack.scale**2 for n in (1, 240)]
    assert values[0] < values[1] <= error
    assert values[1] >= lower_bound(stack, budget).value + 0.01 * e_lora


@pytest.mark.slow
@pytest.mark.parametrize(("width", "cost"), [(24, 0.02), (36, 0.005)])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_looking_at_the_leading_directions_only_costs_little(seed, width, cost):
    """2 L r of 48 directions cost at most 2 % of e_lora, 3 L r 1/2 %; 5 L r is what is taken unasked."""
    stack, budget = LayerStack(decaying(3, 48, 48, seed)), RankBudget(4, 1)
    e_lora = solve_lora(stack, 4).error / stack.scale**2
    few, all_ = (search_dual(stack.unit(), budget, FloorOptions(width=n), None) for n in (width, 48))
    assert all_ - cost * e_lora <= few <= all_ + 0.002 * e_lora
