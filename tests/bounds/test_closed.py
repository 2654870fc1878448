"""Closed forms against the literal ones, against known optima, and against everything that a solver can find."""

import math

import numpy as np
import pytest
from hypothesis import given

from rasa_theory import (
    InputError,
    LayerStack,
    RankBudget,
    SolverOptions,
    allocation_bound,
    lower_bound,
    solve_lora,
    solve_rasa,
)
from rasa_theory.bounds import clipped_floor, closed_floors, floor_slack, rank_floor, stack_floor
from rasa_theory.linalg import not_above
from tests.helpers import reference
from tests.helpers.problems import KNOWN, SHAPES, noise, orthogonal, planted, shared_bases
from tests.helpers.strategies import nasty_stacks

ALL_KNOWN = KNOWN | {"shared bases": shared_bases, "planted": planted}


def close(x, y, stack):
    return not_above(x, y, stack.rounding) and not_above(y, x, stack.rounding)


def floors(M, r, k):
    """Every closed floor, read literally."""
    T = M.transpose(0, 2, 1)
    m = len(M) * r
    halves = [(N, reference.capping(N, index)) for N in (M, T) for index in (m, m + m // 2)]
    return {
        "zero": 0.0,
        "rank": reference.rank_bound(M, r, k),
        "stack": max(reference.stack_bound(N, r) for N in (M, T)),
        "clipped": max(reference.dual_bound(N, reference.clipped_Y(N, r - k), r, k) for N in (M, T)),
        "split": max((reference.split_bound(N, C, r, k) for N, C in halves if C is not None), default=0.0),
    }


def aligned_rows():
    """Layers that share their rows, and have columns of their own."""
    return noise(3, 24, 24) * np.logspace(1, -1, 24)


def decaying():
    """sigma_j = j^-0.3 in four unrelated layers."""
    U, _, V = np.linalg.svd(noise(4, 20, 20))
    return U * np.arange(1, 21) ** -0.3 @ V


# ---- values


@pytest.mark.parametrize(("L", "b", "a", "r", "k", "seed"), SHAPES)
def test_against_the_literal_forms(L, b, a, r, k, seed):
    M, budget = noise(L, b, a, seed), RankBudget(r, k)
    stack, expected = LayerStack(M), floors(M, r, k)
    assert solve_lora(stack, r).error == pytest.approx(reference.e_lora(M, r), rel=1e-12)
    assert allocation_bound(stack, budget).value == pytest.approx(reference.allocation_bound(M, r, k), rel=1e-12)
    floor, best = lower_bound(stack, budget), max(expected.values())
    assert expected[floor.name] == pytest.approx(best, rel=1e-13)  # some coincide: clipped is stack at q = 0
    assert best - floor_slack(stack, floor.name) <= floor.value <= best


@pytest.mark.parametrize(("L", "b", "a", "r", "k", "seed"), SHAPES)
@pytest.mark.parametrize("flip", [False, True])
def test_each_floor_by_itself(L, b, a, r, k, seed, flip):
    """The clipped floor is the dual one at the clipped Y; Y = Gamma gives the stack floor."""
    M = noise(L, b, a, seed).transpose(0, 2, 1) if flip else noise(L, b, a, seed)
    stack, budget = LayerStack(M), RankBudget(r, k)
    clipped = reference.dual_bound(M, reference.clipped_Y(M, r - k), r, k)
    gamma = reference.dual_bound(M, M @ M.transpose(0, 2, 1), r, k)
    floors = [floor(stack.unit(), budget) for floor in (clipped_floor, stack_floor, rank_floor)]
    assert [floor.name for floor in floors] == ["clipped", "stack", "rank"]
    of_clipped, of_stack, rank = (floor.value * stack.scale**2 for floor in floors)
    assert of_clipped == pytest.approx(clipped, abs=floor_slack(stack, "stack"))
    assert of_stack == pytest.approx(reference.stack_bound(M, r), abs=floor_slack(stack, "stack"))
    assert of_stack == pytest.approx(gamma, abs=floor_slack(stack, "stack"))
    literal = reference.rank_bound(M, r, k)
    assert rank <= literal
    assert not_above(literal, rank, 2 * stack.rounding)  # one for the allowance that is taken off, one for comparing


def test_every_floor_is_the_best_one_somewhere():
    """A few examples: falling spectra favour `clipped`, equal layers `rank`, common rows `split`."""
    names = {lower_bound(LayerStack(p.values), p.budget).name for p in (make() for make in ALL_KNOWN.values())}
    names.add(lower_bound(LayerStack(decaying()), RankBudget(4, 1)).name)
    names.add(lower_bound(LayerStack(aligned_rows()), RankBudget(4, 4)).name)
    assert names == {"zero", "rank", "stack", "clipped", "split"}


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_floor_of_plain_cp_is_one_below_every_k(k):
    """e_rasa(r) <= e_rasa(k): on common rows the split form of k = r is above all forms of the k asked for."""
    stack = LayerStack(aligned_rows())
    own = max(floor.value for floor in closed_floors(stack, RankBudget(4, k)))
    floor = lower_bound(stack, RankBudget(4, k))
    assert floor == lower_bound(stack, RankBudget(4, 4))
    assert (
        own
        < 0.98 * floor.value
        < solve_rasa(stack, RankBudget(4, k), SolverOptions(sweep="joint", max_sweeps=30, effort="quick")).error
    )


def test_lora_interval_and_factors():
    M = noise(3, 6, 5)
    stack = LayerStack(M)
    solution = solve_lora(stack, 2)
    assert solution.interval[0] < reference.e_lora(M, 2) < solution.interval[1]
    assert solution.layer_errors == pytest.approx([reference.e_lora(m[None], 2) for m in M], rel=1e-12)
    residual = M - (solution.factors.B @ solution.factors.A).numpy()
    assert (residual**2).sum() == pytest.approx(solution.error, rel=1e-13)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", sorted(set(ALL_KNOWN) - {"planted", "zero"}))
def test_the_floor_meets_the_known_optimum(name, seed):
    problem = ALL_KNOWN[name](seed)
    stack = LayerStack(problem.values)
    floor = lower_bound(stack, problem.budget).value
    assert problem.e_rasa - floor_slack(stack, "split") <= floor
    assert not_above(floor, problem.e_rasa, stack.rounding)


@pytest.mark.parametrize("name", ["one layer", "nothing shared", "orthogonal columns", "orthogonal rows"])
def test_allocation_is_the_known_optimum_where_nothing_is_shared(name):
    problem = KNOWN[name]()
    bound = allocation_bound(LayerStack(problem.values), problem.budget)
    assert bound.value == pytest.approx(problem.e_rasa, rel=1e-12)
    assert bound.name == "allocation"


def test_the_floor_of_a_planted_stack_is_zero():
    problem = planted()
    assert lower_bound(LayerStack(problem.values), problem.budget).value <= LayerStack(problem.values).rounding ** 2


@pytest.mark.parametrize(("L", "b", "a", "r", "k", "seed"), SHAPES)
def test_float32_input_has_the_bounds_of_its_exact_values(L, b, a, r, k, seed):
    """The spectra are taken in float64, so float32 is not one digit worse."""
    M, budget = noise(L, b, a, seed).astype(np.float32), RankBudget(r, k)
    single, double = LayerStack(M), LayerStack(M.astype(float))
    assert lower_bound(single, budget).value == pytest.approx(lower_bound(double, budget).value, rel=1e-13)
    assert allocation_bound(single, budget).value == pytest.approx(allocation_bound(double, budget).value, rel=1e-13)
    assert solve_lora(single, r).error == pytest.approx(solve_lora(double, r).error, rel=1e-13)


# ---- laws


@given(nasty_stacks())
def test_allocation_is_between_the_floor_and_lora_and_falls_with_k(problem):
    stack = problem.stack
    above = solve_lora(stack, problem.r).error
    for k in range(problem.r + 1):
        budget = RankBudget(problem.r, k)
        e_alloc = allocation_bound(stack, budget).value
        assert not_above(e_alloc, above, stack.rounding)
        assert not_above(lower_bound(stack, budget).value, e_alloc, stack.rounding)
        above = e_alloc


@given(nasty_stacks())
def test_no_factors_are_below_the_floor(problem):
    """The adversary: the best that three starts find, on stacks that include exactly representable ones."""
    stack, budget = problem.stack, problem.budget
    floor = lower_bound(stack, budget).value
    for start in ("random", "allocation"):
        solution = solve_rasa(stack, budget, SolverOptions(start=start, sweep="joint", max_sweeps=25, rtol=1e-5))
        assert not_above(floor, solution.error, stack.rounding)


@pytest.mark.parametrize("size", [0.0, 1e-3, 0.1, 0.5])
@pytest.mark.parametrize("seed", range(4))
def test_no_floor_is_above_what_planted_factors_leave(seed, size):
    """The factors are known without a solver: what they leave is the noise, and the floor may not exceed it."""
    clean = planted(seed, L=4, b=8, a=9, r=3, k=1)
    values = clean.values + size * noise(4, 8, 9, seed)
    stack = LayerStack(values)
    left = float(((values - clean.values) ** 2).sum())
    assert not_above(lower_bound(stack, clean.budget).value, left, stack.rounding)


@given(nasty_stacks(scales=(1.0,)))
def test_invariances(problem):
    """Transposed, layers permuted, rotated on both sides, padded with zeros: one and the same problem."""
    M, budget = problem.values, problem.budget
    b, a = M.shape[1:]
    stack = LayerStack(M)
    changed = {
        "transposed": M.transpose(0, 2, 1),
        "permuted": M[np.random.default_rng(0).permutation(len(M))],
        "rotated": orthogonal(b) @ M @ orthogonal(a, 1),
        "padded": np.pad(M, ((0, 0), (0, 2), (0, 3))),
    }
    for values in changed.values():
        other = LayerStack(values)
        tolerance = floor_slack(other, "split") + floor_slack(stack, "split")
        assert close(solve_lora(other, problem.r).error, solve_lora(stack, problem.r).error, other)
        assert close(allocation_bound(other, budget).value, allocation_bound(stack, budget).value, other)
        assert (
            abs(lower_bound(other, budget).value - lower_bound(stack, budget).value)
            <= tolerance + 2 * math.sqrt(lower_bound(stack, budget).value) * other.rounding
        )


@pytest.mark.parametrize("c", [2.0**-332, 2.0**332])
def test_a_power_of_two_changes_no_digit(c):
    M, budget = noise(3, 6, 5), RankBudget(2, 1)
    for bound in (lower_bound, allocation_bound):
        assert bound(LayerStack(c * M), budget).value == c**2 * bound(LayerStack(M), budget).value
    assert solve_lora(LayerStack(c * M), 2).error == c**2 * solve_lora(LayerStack(M), 2).error


@pytest.mark.parametrize("c", [1e-100, 1e100, -3.0])
def test_c_squared(c):
    M, budget = noise(3, 6, 5), RankBudget(2, 1)
    stack = LayerStack(c * M)
    assert lower_bound(stack, budget).value == pytest.approx(c**2 * max(floors(M, 2, 1).values()), rel=1e-10)
    assert close(allocation_bound(stack, budget).value, c**2 * reference.allocation_bound(M, 2, 1), stack)
    assert close(solve_lora(stack, 2).error, c**2 * reference.e_lora(M, 2), stack)


def test_bad_input_is_named():
    stack = LayerStack(noise(2, 3, 4), "mine")
    with pytest.raises(InputError, match="unknown certificate 'best'; known: closed, dual, two-sided"):
        lower_bound(stack, RankBudget(1, 1), certificate="best")
    for bound in (lower_bound, allocation_bound):
        with pytest.raises(InputError, match=r"rank 4 exceeds min\(b, a\) = 3 of stack 'mine'"):
            bound(stack, RankBudget(4, 1))
    for rank, sentence in ((4, "rank 4 exceeds"), (0, "rank must be at least 1, got 0")):
        with pytest.raises(InputError, match=sentence):
            solve_lora(stack, rank)


def test_the_better_orientation_of_clipped_counts():
    """Columns are common to all layers, rows are not: the two sides certify different amounts, and both are tried."""
    rng = np.random.default_rng(0)
    M = orthogonal(12)[:, :4] @ rng.standard_normal((3, 4, 9)) + 0.3 * rng.standard_normal((3, 12, 9))
    budget = RankBudget(3, 1)
    for values in (M, M.transpose(0, 2, 1)):
        floors = [f.value for f in closed_floors(LayerStack(values), budget) if f.name == "clipped"]
        assert abs(floors[0] - floors[1]) > 0.01 * max(floors)
        assert lower_bound(LayerStack(values), budget).value >= max(floors)


@pytest.mark.parametrize("tail", [1.0, 1e-7, 1e-12])
def test_the_interval_of_e_lora_holds_it_near_zero_too(tail):
    """Singular values 1 (twice) and `tail` (six times): e_lora at r = 2 is 6 tail^2, known to `rounding` in norm."""
    M = (orthogonal(9)[:, :8] * np.array([1, 1, *[tail] * 6])) @ orthogonal(8, 1)
    stack = LayerStack(M[None])
    lora = solve_lora(stack, 2)
    low, high = lora.interval
    assert low <= 6 * tail**2 <= high
    assert math.sqrt(high) == pytest.approx(math.sqrt(lora.error) + stack.rounding, rel=1e-9)
    assert math.sqrt(low) == pytest.approx(max(math.sqrt(lora.error) - stack.rounding, 0.0), rel=1e-9)
