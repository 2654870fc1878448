"""The search behind the dual and the two-sided floor: what both owe, and what it stands on."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rasa_theory import FloorOptions, InputError, LayerStack, RankBudget, linalg, lower_bound
from rasa_theory.bounds import Evaluation, Search, SearchScale, capped_weights, smoothed_ky_fan
from rasa_theory.linalg import not_above
from tests.helpers import reference
from tests.helpers.problems import KNOWN, decaying, noise, shared_bases
from tests.helpers.strategies import best_error, nasty_stacks

QUICK = FloorOptions(max_iterations=30)


@pytest.mark.slow
@pytest.mark.parametrize(("certificate", "before"), [("dual", "closed"), ("two-sided", "dual")])
@given(problem=nasty_stacks())
def test_the_floor_is_between_the_one_before_and_every_error(certificate, before, problem):
    stack, budget, few = problem.stack, problem.budget, FloorOptions(max_iterations=6)
    floor = lower_bound(stack, budget, certificate, few)
    assert floor.value >= lower_bound(stack, budget, before, few).value
    assert not_above(floor.value, best_error(problem), stack.rounding)


@pytest.mark.parametrize("certificate", ["dual", "two-sided"])
@pytest.mark.parametrize("name", sorted(set(KNOWN) | {"shared bases"}))
def test_it_meets_the_known_optimum_and_does_not_pass_it(certificate, name):
    problem = (KNOWN | {"shared bases": shared_bases})[name]()
    stack = LayerStack(problem.values)
    floor = lower_bound(stack, problem.budget, certificate, QUICK).value
    assert not_above(floor, problem.e_rasa, stack.rounding)
    assert problem.e_rasa * (1 - 1e-9) <= floor


DUAL, TWO_SIDED = ("dual", 10, 30, 2e-3), ("two-sided", 20, 120, 5e-3)


@pytest.mark.parametrize(
    ("certificate", "b", "iterations", "close", "c"),
    [
        *((*DUAL, c) for c in (1e-100, 1e100, -3.0)),
        *(pytest.param(*TWO_SIDED, c, marks=pytest.mark.slow) for c in (1e-100, 1e100, -3.0)),
    ],
)
def test_scaled_and_transposed(certificate, b, iterations, close, c):
    """Digits differ, so the path of the search does."""
    M, budget, options = decaying(b=b, a=b + 1), RankBudget(3, 1), FloorOptions(max_iterations=iterations)
    expected = lower_bound(LayerStack(M), budget, certificate, options)
    assert expected.name == certificate
    for values in (c * M, c * M.transpose(0, 2, 1)):
        floor = lower_bound(LayerStack(values), budget, certificate, options)
        assert floor.value == pytest.approx(c**2 * expected.value, rel=close)


# ---- limits


def test_limits_end_it_and_the_watch_sees_it():
    """One search on each side for the dual floor; then one stage on each side and the rest on the better one."""
    stack, budget = LayerStack(decaying()), RankBudget(4, 1)
    seen = []
    lower_bound(stack, budget, "two-sided", FloorOptions(max_iterations=7), seen.append)
    assert [p.search for p in seen] == ["dual"] * 14 + ["two-sided"] * 14
    assert [p.iteration for p in seen] == [*range(1, 8)] * 4
    assert seen[6].value <= seen[13].value * 2
    seen.clear()
    lower_bound(stack, budget, "dual", FloorOptions(max_seconds=1e-9), seen.append)
    assert [p.search for p in seen] == ["dual"] * 2
    seen.clear()
    lower_bound(stack, budget, "two-sided", FloorOptions(max_seconds=1e-9), seen.append)
    assert len(seen) <= 5


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

    def objective(blocks, mu):
        (x,) = blocks
        calls.append(mu)
        if len(calls) == 3:
            raise linalg.LinAlgError
        return Evaluation(float((x**2).sum()), float((x**2).sum()), [2 * x])

    x0 = [torch.full((2,), 3.0, dtype=torch.float64)]
    search = Search("dual", objective, x0, SearchScale.of(stack, budget), FloorOptions())
    search.run(math.inf)
    assert len(calls) == 3
    assert not search.can_improve(math.inf)
    assert float((search.solution[0] ** 2).sum()) == search.best <= 18


def test_stages_smooth_less_and_less_each_from_where_the_last_one_ended():
    """The objective sees the point and the smoothing; a deadline that has passed leaves one iteration."""
    stack, budget = LayerStack(decaying()).unit(), RankBudget(3, 1)
    seen = []

    def objective(blocks, mu):
        (x,) = blocks
        seen.append((mu, x))
        smooth = float(((x - mu) ** 4).sum())
        return Evaluation(smooth, smooth + 1e3, [4 * (x - mu) ** 3])

    def search():
        return Search(
            "dual",
            objective,
            [torch.full((2,), 3.0, dtype=torch.float64)],
            SearchScale.of(stack, budget),
            FloorOptions(),
        )

    search().run(math.inf)
    smoothing = list(dict.fromkeys(mu for mu, _ in seen))
    assert smoothing == sorted(smoothing, reverse=True)
    assert len(smoothing) > 1
    for mu, next_mu in itertools.pairwise(smoothing):
        ends = [x for at, x in seen if at == mu], [x for at, x in seen if at == next_mu]
        assert float((ends[0][-1] - mu).abs().max()) < 0.1 > float((ends[1][0] - mu).abs().max())
    one = search()
    one.run(-math.inf)
    assert not one.can_improve(-math.inf)
    assert one.can_improve(math.inf)
