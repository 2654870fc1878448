"""The dual floor: the formula read literally, what it may never do, and what the search gains."""

import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import KNOWN, SHAPES, noise, planted, shared_bases
from strategies import nasty_stacks

from rasa_theory import (
    FloorOptions,
    InputError,
    LayerStack,
    RankBudget,
    SolverOptions,
    linalg,
    lower_bound,
    solve_lora,
    solve_rasa,
)
from rasa_theory.bounds.dual import dual_value, rounding_allowance, search_dual
from rasa_theory.bounds.search import Search, capped_weights, smoothed_ky_fan
from rasa_theory.linalg import not_above

QUICK = FloorOptions(max_iterations=30)


def decaying(L=3, b=16, a=18, seed=0):
    """A spectrum like that of fine-tuning updates."""
    return noise(L, b, a, seed) * np.arange(1, a + 1) ** -0.7


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


def best_error(problem):
    """The lowest error of two short solves."""
    found = (SolverOptions(start=start, max_sweeps=25, rtol=1e-5) for start in ("random", "allocation"))
    return min(solve_rasa(problem.stack, problem.budget, options).error for options in found)


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
@settings(max_examples=60)
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


@given(nasty_stacks())
@settings(max_examples=60)
def test_the_floor_is_between_the_closed_one_and_every_error(problem):
    stack, budget = problem.stack, problem.budget
    floor = lower_bound(stack, budget, "dual", FloorOptions(max_iterations=6))
    assert floor.value >= lower_bound(stack, budget).value
    assert not_above(floor.value, best_error(problem), stack.rounding)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", [1, 2])
def test_it_gains_on_the_closed_form_and_one_iteration_is_valid(seed, k):
    stack, budget = LayerStack(decaying(3, 32, 32, seed)), RankBudget(4, k)
    e_lora = solve_lora(stack, 4).error
    error = solve_rasa(stack, budget, SolverOptions(max_sweeps=50)).error
    values = [search_dual(stack.unit(), budget, FloorOptions(n), None) * stack.scale**2 for n in (1, 240)]
    assert values[0] < values[1] <= error
    assert values[1] >= lower_bound(stack, budget).value + 0.01 * e_lora


@pytest.mark.parametrize("name", sorted(set(KNOWN) | {"shared bases"}))
def test_it_meets_the_known_optimum_and_does_not_pass_it(name):
    problem = (KNOWN | {"shared bases": shared_bases})[name]()
    stack = LayerStack(problem.values)
    floor = lower_bound(stack, problem.budget, "dual", QUICK).value
    assert not_above(floor, problem.e_rasa, stack.rounding)
    assert floor >= lower_bound(stack, problem.budget).value
    assert problem.e_rasa * (1 - 1e-9) <= floor


@pytest.mark.parametrize("c", [1e-100, 1e100, -3.0])
def test_scaled_and_transposed(c):
    M, budget = decaying(b=10, a=11), RankBudget(3, 1)
    expected = lower_bound(LayerStack(M), budget, "dual", QUICK)
    assert expected.name == "dual"
    for values in (c * M, c * M.transpose(0, 2, 1)):
        floor = lower_bound(LayerStack(values), budget, "dual", QUICK)
        assert floor.value == pytest.approx(c**2 * expected.value, rel=2e-3)  # digits differ, so the path does


@pytest.mark.parametrize(("width", "cost"), [(24, 0.02), (36, 0.005)])
@pytest.mark.parametrize("seed", range(2))
def test_looking_at_the_leading_directions_only_costs_little(seed, width, cost):
    """2 L r of 48 directions cost at most 2 % of e_lora, 3 L r 1/2 %; 5 L r is what is taken unasked."""
    stack, budget = LayerStack(decaying(3, 48, 48, seed)), RankBudget(4, 1)
    e_lora = solve_lora(stack, 4).error / stack.scale**2
    few, all_ = (search_dual(stack.unit(), budget, FloorOptions(width=n), None) for n in (width, 48))
    assert all_ - cost * e_lora <= few <= all_ + 0.002 * e_lora


def test_limits_end_it_and_the_watch_sees_it():
    stack, budget = LayerStack(decaying()), RankBudget(4, 1)
    seen = []
    lower_bound(stack, budget, "dual", FloorOptions(max_iterations=7), seen.append)
    assert {p.search for p in seen} == {"dual"}
    assert [p.iteration for p in seen] == [*range(1, 8), *range(1, 8)]
    assert seen[6].value <= seen[-1].value * 2
    seen.clear()
    lower_bound(stack, budget, "dual", FloorOptions(max_seconds=1e-9), seen.append)
    assert len(seen) == 2


@pytest.mark.parametrize("name", ["max_iterations", "max_seconds", "rtol", "width"])
def test_limits_are_positive(name):
    with pytest.raises(InputError, match=f"{name} must be positive, got 0"):
        FloorOptions(**{name: 0})


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("max_iterations", 2.5, "max_iterations must be a whole number, got 2.5"),
        ("width", "all", "width must be a whole number, got 'all'"),
        ("max_seconds", None, "max_seconds must be a number, got None"),
        ("rtol", math.nan, "rtol must be positive, got nan"),
    ],
)
def test_limits_are_numbers(name, value, sentence):
    with pytest.raises(InputError, match=sentence):
        FloorOptions(**{name: value})


# ---- what the search stands on


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=9), st.integers(1, 9))
def test_capped_weights_are_the_nearest_point(w, m):
    """Optimal: x = clip(w - tau, 0, 1) with tau >= 0, and tau = 0 unless the sum is m."""
    w = torch.tensor(w, dtype=torch.float64)
    x = capped_weights(w, m)
    assert x.sum() <= m + 1e-12
    inner = (x > 1e-9) & (x < 1 - 1e-9)
    taus = (w - x)[inner]
    if x.sum() < m - 1e-9:
        assert torch.allclose(x, w.clamp(0, 1))
    elif len(taus):
        assert float(taus.max() - taus.min()) < 1e-12
        assert float(taus.min()) > -1e-12
        tau = float(taus[0])
        assert torch.allclose(x, (w - tau).clamp(0, 1))


def test_smoothing_hides_at_most_half_mu_m_and_its_gradient_is_the_maximiser():
    S = torch.tensor(noise(1, 6, 6)[0])
    S, mu, h = S + S.mT, 4.0, 1e-6  # so much that the maximiser has weights inside (0, 1)
    found = smoothed_ky_fan(S, 2, mu)
    assert found.exact == pytest.approx(reference.ky_fan(S.numpy(), 2))
    assert found.exact - mu * 2 / 2 <= found.smooth <= found.exact
    assert float((found.X @ found.X - found.X).abs().max()) > 0.1
    direction = torch.tensor(noise(1, 6, 6, 1)[0])
    direction = direction + direction.mT
    ends = [smoothed_ky_fan(S + sign * h * direction, 2, mu).smooth for sign in (1, -1)]
    assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(float((found.X * direction).sum()), rel=1e-6)


def test_an_eigenvalue_problem_that_fails_ends_the_search_at_what_it_has():
    stack, budget = LayerStack(decaying()).unit(), RankBudget(3, 1)
    calls = []

    def objective(x):
        calls.append(1)
        if len(calls) == 3:
            raise linalg.LinAlgError
        return float((x**2).sum()), float((x**2).sum()), [2 * x]

    search = Search.of("dual", stack, budget, FloorOptions(), None)
    (found,) = list(search.stages(objective, [torch.full((2,), 3.0, dtype=torch.float64)]))
    assert float((found[0] ** 2).sum()) == search.best <= 18
