"""Solvers on views whose spectra are leading directions."""

import numpy as np
import pytest

from rasa_theory import LayerStack, RankBudget, SolverOptions, linalg, reconstruction_error, solve_rasa
from rasa_theory.problem import squared_error
from rasa_theory.solvers import random_start, updates
from tests.helpers.problems import decaying

BUDGET = RankBudget(3, 1)


def leading(values):
    return LayerStack(values).with_spectra("leading", BUDGET).unit()


def test_private_terms_from_products_are_the_best_ones(monkeypatch):
    stack = leading(decaying(3, 150, 130, 1))
    factors = random_start(stack, BUDGET, 0, 0.5)
    best = squared_error(stack, updates.update_private(stack, factors, exact=True))

    def refused(*_, **__):
        raise AssertionError("a decomposition was taken")

    monkeypatch.setattr(linalg, "best_low_rank", refused)
    found = updates.update_private(stack, factors)
    assert best * (1 - 1e-12) <= squared_error(stack, found) <= best + 1e-7 * stack.norm_squared


@pytest.mark.slow
@pytest.mark.parametrize("start", ["allocation", "near-allocation", "lora", "common", "pencil", "greedy", "subspace"])
def test_every_start_works_from_leading_directions(start):
    values = decaying(3, 120, 140, 1)
    solution = solve_rasa(LayerStack(values), BUDGET, SolverOptions(start=start, max_sweeps=3, spectra="leading"))
    exact = solve_rasa(LayerStack(values), BUDGET, SolverOptions(start=start, max_sweeps=3, spectra="exact"))
    assert solution.error == pytest.approx(reconstruction_error(LayerStack(values), solution.factors), rel=1e-9)
    assert solution.error <= 1.02 * exact.error


@pytest.mark.slow
def test_the_search_is_as_good_as_from_svds():
    rng = np.random.default_rng(0)
    common = np.einsum("bj,lj,ja->lba", *(rng.standard_normal(s) for s in ((120, 3), (3, 3), (3, 130))))
    values = decaying(3, 120, 130, 2) + 0.02 * common
    errors = [
        solve_rasa(LayerStack(values), BUDGET, SolverOptions(effort="quick", max_sweeps=30, spectra=spectra)).error
        for spectra in ("exact", "leading")
    ]
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)
