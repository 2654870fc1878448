"""The two-sided floor: the formula read literally, what it may never do, and what the search gains."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rasa_theory import FloorOptions, LayerStack, RankBudget, SolverOptions, lower_bound, solve_lora, solve_rasa
from rasa_theory.bounds import (
    Division,
    ProjectedProblem,
    SearchScale,
    cappings,
    search_two_sided,
    two_sided_value,
)
from rasa_theory.linalg import not_above
from tests.helpers import reference
from tests.helpers.problems import SHAPES, decaying, noise, planted
from tests.helpers.strategies import best_error, nasty_stacks

QUICK = FloorOptions(max_iterations=30)


def contraction(a, seed, least=0.0):
    """A random T (a, a), not symmetric, with singular values between `least` and 1."""
    rng = np.random.default_rng(seed)
    X, _, Y = np.linalg.svd(rng.standard_normal((a, a)))
    return X @ np.diag(rng.uniform(least, 1.0, a)) @ Y


def division(stack, seed, size=0.1, width=3, least=0.0):
    """Everything random: T, U_i near A_i times a number, s_i, F and H."""
    rng, L, (b, a) = np.random.default_rng(seed), stack.layers, stack.shape
    share, unit = rng.uniform(-0.2, 1.2, L), math.sqrt(stack.norm_squared / (L * b * a))
    U = 0.3 * unit * rng.standard_normal((L, b, a))
    factors = (torch.tensor(unit * math.sqrt(size) * rng.standard_normal((L, n, width))) for n in (b, a))
    return Division(
        torch.tensor(contraction(a, seed, least)),
        lambda i, A: share[i] * A + torch.tensor(U[i]),
        torch.tensor(rng.uniform(0.05, 0.95, L)),
        *factors,
    )


def literal(M, d, r, k):
    """The formula at a division, by plain numpy."""
    T, F, H = (x.numpy() for x in (d.T, d.F, d.H))
    U = np.stack([d.U(i, torch.tensor(m @ T)).numpy() for i, m in enumerate(M)])
    return reference.two_sided_bound(M, T, U, d.s.numpy(), F @ F.transpose(0, 2, 1), H @ H.transpose(0, 2, 1), r, k)


# ---- the formula


@pytest.mark.parametrize(("L", "b", "a", "r", "k", "seed"), SHAPES)
@pytest.mark.parametrize("size", [0.0, 0.3])
def test_the_value_is_the_literal_formula_less_its_allowance(L, b, a, r, k, seed, size):
    M, budget = noise(L, b, a, seed), RankBudget(r, k)
    stack = LayerStack(M)
    d = division(stack, seed, size)
    value, expected = two_sided_value(stack, budget, d), literal(M, d, r, k)
    assert value < expected
    assert value == pytest.approx(expected, abs=1e-8 * stack.norm_squared)


@given(
    nasty_stacks(scales=(1.0,)),
    st.integers(0, 999),
    st.sampled_from([0.0, 1e-3, 0.1, 1.0]),
    st.sampled_from([0.0, 0.9]),
)
def test_no_division_whatever_lifts_the_value_above_an_error(problem, seed, size, least):
    stack = problem.stack.transpose() if seed % 2 else problem.stack
    if stack.norm_squared == 0:
        return
    value = two_sided_value(stack, problem.budget, division(stack, seed, size, least=least))
    assert not_above(value, best_error(problem), stack.rounding)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.5, 0.3])
def test_near_the_best_division_the_value_stays_below_planted_factors(seed, share):
    """Mutations that lift the value show where the bound is tight: M_i = c_i M and s_i as the division."""
    clean = planted(seed, L=3, b=8, a=9, r=3, k=1)
    values = clean.values + 0.2 * noise(3, 8, 9, seed)
    stack, left = LayerStack(values), float(0.04 * (noise(3, 8, 9, seed) ** 2).sum())
    s = torch.full((3,), share, dtype=torch.float64)
    empty = torch.zeros(3, 8, 0), torch.zeros(3, 9, 0)
    d = Division(torch.eye(9, dtype=torch.float64), lambda i, A: share * A, s, *empty)
    assert not_above(two_sided_value(stack, clean.budget, d), left, stack.rounding)


def test_an_exact_stack_of_rank_one_is_reached_from_both_sides():
    """One dyad in all layers, R = 1 and a tail of known size: any s and U_i = s_i A_i give exactly the tail."""
    u, v = np.linalg.qr(noise(1, 6, 6)[0])[0], np.linalg.qr(noise(1, 7, 7)[0])[0]
    M = np.stack([u[:, :1] @ v[:, :1].T * 3 + 0.5 * u[:, 1:2] @ v[:, 1:2].T])
    stack = LayerStack(M)
    for s in (0.2, 0.5, 0.9):
        d = Division(
            torch.eye(7, dtype=torch.float64),
            lambda i, A, s=s: s * A,
            torch.tensor([s], dtype=torch.float64),
            torch.zeros(1, 6, 0, dtype=torch.float64),
            torch.zeros(1, 7, 0, dtype=torch.float64),
        )
        assert two_sided_value(stack, RankBudget(1, 1), d) == pytest.approx(0.25, rel=1e-6)


@pytest.mark.parametrize("seed", range(12))
def test_rounding_never_lifts_the_value_of_an_exact_stack_above_zero(seed):
    """One pool of rank R in all, T = I: U_i = s_i A_i makes the formula 0 but for rounding."""
    rng = np.random.default_rng(seed)
    M = np.einsum(
        "bj,ij,ja->iba", rng.standard_normal((9, 4)), rng.standard_normal((2, 4)), rng.standard_normal((4, 8))
    )
    d = Division(
        torch.eye(8, dtype=torch.float64),
        lambda i, A: 0.4 * A,
        torch.full((2,), 0.4, dtype=torch.float64),
        torch.zeros(2, 9, 0, dtype=torch.float64),
        torch.zeros(2, 8, 0, dtype=torch.float64),
    )
    assert two_sided_value(LayerStack(M), RankBudget(2, 2), d) < 0


def test_a_weight_that_is_no_contraction_is_made_one():
    """T T^T <= I is what the proof needs; 3 T gives the floor of T."""
    stack, budget = LayerStack(decaying()), RankBudget(3, 1)
    d = division(stack, 0)
    unit = d.T / torch.linalg.matrix_norm(d.T, 2)
    values = [
        two_sided_value(stack, budget, Division(T, lambda i, A: 0.5 * A, d.s, d.F, d.H)) for T in (unit, 3 * unit)
    ]
    assert values[1] == pytest.approx(values[0], rel=1e-9)


@pytest.mark.parametrize("seed", range(2))
def test_at_the_same_point_a_larger_rank_has_a_lower_value(seed):
    stack = LayerStack(decaying(seed=seed))
    values = [two_sided_value(stack, RankBudget(r, 1), division(stack, seed)) for r in range(1, 9)]
    assert values == sorted(values, reverse=True)


def test_what_is_no_division_gives_no_floor():
    stack, budget = LayerStack(decaying()), RankBudget(3, 1)
    d = division(stack, 0)
    for s in (0.0, 1.0, -0.5, 1.5, math.nan):
        bad = Division(d.T, d.U, torch.full((3,), s, dtype=torch.float64), d.F, d.H)
        assert two_sided_value(stack, budget, bad) == -math.inf
    for bad in (Division(d.T * math.nan, d.U, d.s, d.F, d.H), Division(d.T, lambda i, A: A * math.inf, d.s, d.F, d.H)):
        assert two_sided_value(stack, budget, bad) == -math.inf


# ---- the search


@pytest.mark.parametrize("k", [1, 3])
def test_gradients(k):
    """Of U, x, F and H, against differences along random directions."""
    stack, budget = LayerStack(decaying(2, 9, 10)).unit(), RankBudget(3, k)
    problem = ProjectedProblem(
        stack, budget, cappings(stack, (4,))[0].__matmul__, 7, SearchScale.of(stack, budget).level
    )
    rng = np.random.default_rng(0)
    point = [p + 0.1 * torch.tensor(rng.standard_normal(p.shape)) for p in problem.initial_guess()]
    gradients, h = problem.captured(point, 0.3).gradients, 1e-6
    for j, gradient in enumerate(gradients):
        direction = torch.tensor(rng.standard_normal(gradient.shape))
        ends = [
            problem.captured([p + sign * h * direction if i == j else p for i, p in enumerate(point)], 0.3).smooth
            for sign in (1, -1)
        ]
        assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(float((gradient * direction).sum()), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", [0.05, 0.3])
def test_the_floor_of_planted_factors_and_noise_is_below_the_noise(seed, size):
    clean = planted(seed, L=3, b=14, a=12, r=3, k=1)
    rest = size * noise(3, 14, 12, seed)
    stack = LayerStack(clean.values + rest)
    floor = lower_bound(stack, clean.budget, "two-sided", QUICK).value
    assert not_above(floor, float((rest**2).sum()), stack.rounding)


MORE = [(0, 1), (1, 1), (1, 2), (0, 4), (1, 4)]


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "k"), [(0, 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)])
def test_it_gains_on_one_side_and_one_iteration_is_valid(seed, k):
    stack, budget = LayerStack(decaying(3, 32, 32, seed)), RankBudget(4, k)
    e_lora = solve_lora(stack, 4).error
    error = solve_rasa(stack, budget, SolverOptions(sweep="joint", max_sweeps=50, effort="quick")).error
    dual = lower_bound(stack, budget, "dual").value
    values = [search_two_sided(stack.unit(), budget, FloorOptions(n), None) * stack.scale**2 for n in (1, 240)]
    assert values[0] < values[1] <= error
    assert values[1] >= dual + 0.01 * e_lora


@pytest.mark.parametrize(("width", "cost"), [(36, 0.03), pytest.param(44, 0.01, marks=pytest.mark.slow)])
@pytest.mark.parametrize("k", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_looking_at_the_leading_directions_only_costs_little(k, width, cost):
    """Of 48 directions, 3 L r cost at most 3 % of e_lora."""
    stack, budget = LayerStack(decaying(3, 48, 48)), RankBudget(4, k)
    e_lora = solve_lora(stack, 4).error / stack.scale**2
    few, all_ = (search_two_sided(stack.unit(), budget, FloorOptions(width=n), None) for n in (width, 48))
    assert all_ - cost * e_lora <= few <= all_ + 0.002 * e_lora


@pytest.mark.parametrize("r", [1, 2])
@pytest.mark.parametrize("size", [1e-9, 1e-80, 1e-161])
def test_what_lies_below_the_rounding_of_a_search_is_not_searched(size, r):
    """In units of 1e-322 the numbers of a search would be infinite, and its eigenvalue problems fail."""
    M, seen = np.zeros((3, 6, 6)), []
    for i, j in np.ndindex(3, 6):
        M[i, (i + j) % 6, (2 * i + j) % 6] = 1.0 if j < r else size
    stack, budget = LayerStack(M), RankBudget(r, 1)
    assert lower_bound(stack, budget, "two-sided", QUICK, seen.append) == lower_bound(stack, budget)
    assert seen == []
