"""The paper's iteration count: where an attempt crosses, how long it runs, and the median over attempts."""

import math

import pytest

from rasa_theory import LayerStack, RankBudget, linalg
from rasa_theory.solvers import median_iterations, random_attempt, random_start
from tests.helpers import reference
from tests.helpers.problems import SHAPES, noise

NEVER = 0.0  # no error is below it


def first_below(history, level):
    """The literal count: the first iteration with an error below `level`."""
    return next((n for n, error in enumerate(history) if error < level), None)


@pytest.mark.parametrize(("L", "b", "a", "r", "k", "seed"), SHAPES)
def test_beside_the_literal_iterations(L, b, a, r, k, seed):
    """From a pool that is in use, for from D = 0 the literal B_S is 0 by minimum norm, and stays."""
    M, budget = noise(L, b, a, seed), RankBudget(r, k)
    stack = LayerStack(M)
    start = random_start(stack, budget, seed, size=0.3)
    f = reference.Factors(*(t.numpy() for t in start.named().values()))
    expected = [reference.error(M, *f)]
    for _ in range(20):
        f = reference.paper_sweep(M, *f)
        expected.append(reference.error(M, *f))
    level = (expected[3] + expected[4]) / 2
    attempt = random_attempt(stack, budget, level, seed, start=start)
    assert attempt.history[:21] == pytest.approx(expected, rel=1e-8)
    assert attempt.iterations == first_below(expected, level) == 4


@pytest.mark.parametrize("c", [1.0, 1e3, 1e-70])
@pytest.mark.parametrize("crossing", [1, 7, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 25))])
def test_an_error_counts_as_below_only_beyond_rounding(crossing, c):
    """With e_lora at the very error of an iteration, or above it by less than rounding, the next one is the first."""
    stack, budget = LayerStack(c * noise(3, 9, 8)), RankBudget(2, 1)
    history = random_attempt(stack, budget, NEVER, seed=0).history
    margin = linalg.rounding(math.sqrt(stack.norm_squared), stack.shape, stack.eps)
    for extra, expected in ((0.0, crossing + 1), (0.5, crossing + 1), (2.0, crossing)):
        e_lora = (math.sqrt(history[crossing]) + extra * margin) ** 2
        attempt = random_attempt(stack, budget, e_lora, seed=0)
        assert attempt.iterations == expected
        assert attempt.history == history[: len(attempt.history)]


def test_in_float32_the_margin_is_that_of_the_residual_which_is_float64():
    stack, budget = LayerStack(noise(3, 9, 8), dtype="float32"), RankBudget(2, 1)
    history = random_attempt(stack, budget, NEVER, seed=0).history
    e_lora = (math.sqrt(history[7]) + 1e-12 * math.sqrt(stack.norm_squared)) ** 2
    assert random_attempt(stack, budget, e_lora, seed=0).iterations == 7


def test_an_attempt_ends_ten_after_its_crossing_but_not_before_the_thirtieth_nor_after_the_sixtieth():
    stack, budget = LayerStack(noise(3, 9, 8)), RankBudget(2, 1)
    history = random_attempt(stack, budget, NEVER, seed=0).history
    assert len(history) == 1 + 60
    for crossing, iterations in ((3, 30), (20, 30), (25, 35), (55, 60)):
        attempt = random_attempt(stack, budget, (history[crossing - 1] + history[crossing]) / 2, seed=0)
        assert (attempt.iterations, len(attempt.history)) == (crossing, 1 + iterations)


def test_its_first_step_is_the_private_svd_of_the_stack_itself():
    """D = 0: after the first iteration the error is at most what rank q leaves, and the seed decides it."""
    M, budget = noise(3, 9, 8), RankBudget(3, 1)
    first, again, other = (random_attempt(LayerStack(M), budget, NEVER, seed) for seed in (0, 0, 1))
    assert first.history[0] == pytest.approx((M**2).sum(), rel=1e-13)
    assert reference.rank_bound(M, 3, 1) < first.history[1] < reference.e_lora(M, 2)
    assert first == again
    assert first.history[1] != other.history[1]
    assert (first.seed, first.iterations) == (0, None)


@pytest.mark.parametrize(
    ("counts", "median"),
    [
        ([], None),
        ([7], 7),
        ([None], None),
        ([9, 3], 3),
        ([5, 1, 3], 3),
        ([8, 2, 6, 4], 4),
        ([None, 4], 4),
        ([None, None, 1], None),
        ([None, 2, None, 1], 2),
        ([10, 9, None, 100, None], 100),
    ],
)
def test_the_lower_median_with_never_as_infinity(counts, median):
    assert median_iterations(counts) == median
