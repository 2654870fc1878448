"""Floors from products alone, against the exact ones, planted optima and everything that the solver finds."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rasa_theory import LayerStack, RankBudget, SolverOptions, linalg, lower_bound, solve_lora, solve_rasa
from rasa_theory.bounds import FAILURE, closed_floors, estimates, floor_slack
from rasa_theory.bounds.probable import _clipped, _rank, _split, _stack
from tests.helpers.problems import noise, orthogonal, planted
from tests.helpers.strategies import fewer_examples

CERTIFY = {"rank": _rank, "stack": _stack, "clipped": _clipped, "split": _split}


def decaying(L, b, a, power=0.6, seed=0):
    """Updates with singular values j^-power in bases of their own, beside a common part."""
    rng = np.random.default_rng(seed)
    m = min(b, a)
    sigma = np.arange(1, m + 1) ** -power
    own = [(orthogonal(b, seed + 2 * i)[:, :m] * sigma) @ orthogonal(a, seed + 2 * i + 1)[:m] for i in range(L)]
    common = np.outer(rng.standard_normal(b), rng.standard_normal(a)) / np.sqrt(b * a)
    return np.stack([M + 0.7 * common for M in own])


def leading(M, budget):
    return LayerStack(M).with_spectra("leading", budget).unit()


@pytest.mark.parametrize(("shape", "r", "k"), [((3, 130, 110), 2, 1), ((2, 120, 160), 3, 1), ((3, 110, 110), 1, 1)])
@pytest.mark.parametrize("power", [0.2, 0.6, 1.5])
def test_every_floor_is_just_below_the_exact_one_of_its_name(shape, r, k, power):
    M, budget = decaying(*shape, power), RankBudget(r, k)
    unit = leading(M, budget)
    e_lora = solve_lora(LayerStack(M).unit(), r).error
    goal = 1e-6 * e_lora
    exact = {(q, name): [] for q in (r - k, 0) for name in CERTIFY}
    for one in (budget, RankBudget(r, r)):
        for floor in closed_floors(LayerStack(M).unit(), one):
            if floor.name != "zero":
                exact[one.private_rank, floor.name].append(floor.value)
    for choice, captured in estimates(unit, budget):
        view = unit.transpose() if choice.transposed else unit
        value = CERTIFY[choice.name](view, choice, goal)
        nearest = min(exact[choice.budget.private_rank, choice.name], key=lambda x: abs(x - value))
        other = 1e-6 * unit.norm_squared if choice.name == "clipped" else 0.0  # for the Y_i are others, as good
        assert nearest - 2e-4 * e_lora <= value <= nearest + floor_slack(unit, choice.name) + other
        assert unit.norm_squared - captured == pytest.approx(value, abs=5e-3 * e_lora)


@pytest.mark.parametrize("M", [decaying(3, 130, 120, seed=s) for s in range(3)] + [noise(3, 64, 60, s) for s in (1, 2)])
def test_the_floor_is_within_a_ten_thousandth_of_the_highest_exact_one(M):
    """In noise the estimate of the clipped floor is the highest, and too high by 1 % of e_lora."""
    budget = RankBudget(2, 1)
    e_lora = solve_lora(LayerStack(M), 2).error
    exact, probable = (lower_bound(LayerStack(M), budget, spectra=s) for s in ("exact", "leading"))
    assert -1e-9 * e_lora <= exact.value - probable.value <= 1e-4 * e_lora
    assert probable.name == f"{exact.name}, probable"
    assert (exact.failure, probable.failure) == (0.0, FAILURE)
    assert lower_bound(LayerStack(M), budget).name == exact.name  # small layers are exact


KINDS = ("gaussian", "decaying", "planted", "low rank", "equal", "one layer dominates", "zero layer", "single")


def stack_of(kind, seed):
    M = decaying(3, 84, 92, seed=seed)
    if kind == "gaussian":
        M = noise(3, 84, 92, seed)
    elif kind == "planted":
        M = planted(seed, 3, 84, 92).values
    elif kind == "low rank":
        rng = np.random.default_rng(seed)
        M = rng.standard_normal((3, 84, 3)) @ rng.standard_normal((3, 3, 92))
    elif kind == "equal":
        M = np.stack([M[0]] * 3)
    elif kind == "one layer dominates":
        M = M * np.array([1e4, 1.0, 1e-4])[:, None, None]
    elif kind == "zero layer":
        M[1] = 0
    elif kind == "single":
        M = M.astype(np.float32)
    return M


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 2**16), ranks=st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 1)]), power=st.integers(-90, 90))
@fewer_examples(20)
def test_no_floor_is_above_the_exact_one_or_the_best_point_found(kind, seed, ranks, power):
    M, budget = stack_of(kind, seed), RankBudget(*ranks)
    if kind != "single":
        M = M * 2.0**power
    stack = LayerStack(M)
    value = lower_bound(stack, budget, spectra="leading").value
    exact = lower_bound(stack, budget, spectra="exact")
    assert value <= exact.value + floor_slack(stack, "split")
    found = solve_rasa(stack, budget, SolverOptions(effort="quick", max_sweeps=5, spectra="leading")).error
    assert linalg.not_above(value, found, stack.rounding)


def test_the_floor_of_a_zero_stack_is_zero():
    bound = lower_bound(LayerStack(np.zeros((2, 90, 80))), RankBudget(2, 1), spectra="leading")
    assert (bound.value, bound.name) == (0.0, "zero")


@pytest.mark.slow
def test_products_alone_are_asked_for(monkeypatch):
    """No decomposition of a matrix with as many rows or columns as a layer, and no Gram matrix of one."""
    b, a, r, k = 700, 660, 2, 1
    M = decaying(3, b, a)
    stack, sizes = LayerStack(M), []

    def watched(function):
        def call(X, *args, **kwargs):
            sizes.append(tuple(X.shape[-2:]))
            return function(X, *args, **kwargs)

        return call

    for module, name in itertools.product((torch.linalg,), ("svd", "svdvals", "eigh", "eigvalsh", "qr", "cholesky_ex")):
        monkeypatch.setattr(module, name, watched(getattr(module, name)))
    budget = RankBudget(r, k)
    solution = solve_rasa(stack, budget, SolverOptions(effort="quick", spectra="leading"))
    floor = lower_bound(stack, budget, spectra="leading")
    assert 0 < floor.value <= solution.error <= solve_lora(stack.with_spectra("leading", budget), r).error
    assert max(min(size) for size in sizes) < min(b, a) / 4
