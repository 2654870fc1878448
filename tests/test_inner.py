"""Sweeps on the core: the plain sweeps, never a higher error, and the same when they are replayed."""

import dataclasses
import itertools

import pytest
import reference
import torch
from problems import SHAPES, falling, noise

from rasa_theory import LayerStack, RankBudget, inner
from rasa_theory.algebra import Unchecked
from rasa_theory.inner import core_sweeps
from rasa_theory.starts import random_start
from rasa_theory.updates import joint_sweep, normalise_pool, update_private


def plain(factors):
    return reference.Factors(*(t.numpy() for t in factors.named().values()))


@pytest.mark.parametrize(("L", "b", "a", "r", "k", "seed"), SHAPES)
def test_one_sweep_on_all_of_m_is_the_joint_sweep(L, b, a, r, k, seed):
    M, budget = noise(L, b, a, seed), RankBudget(r, k)
    stack = LayerStack(M)
    f = update_private(stack, random_start(stack, budget, seed, size=0.3))
    expected = plain(f)
    for _ in range(20):
        f, error = core_sweeps(stack.values, f, (b, a), 1)
        expected = reference.joint_sweep(M, *expected)
        assert error == pytest.approx(reference.error(M, *expected), rel=1e-8)


@pytest.mark.parametrize(("L", "b", "a", "r", "k", "seed"), SHAPES)
def test_steps_beyond_the_last_point_never_raise_the_error(L, b, a, r, k, seed):
    stack, budget = LayerStack(noise(L, b, a, seed)), RankBudget(r, k)
    f = update_private(stack, random_start(stack, budget, seed, size=0.3))
    errors = [core_sweeps(stack.values, f, (b, a), n)[1] for n in (1, 2, 5, 10, 20)]
    assert all(y <= x for x, y in itertools.pairwise(errors))


@pytest.mark.parametrize("dead", [False, True])
def test_replayed_sweeps_are_the_checked_ones(dead, monkeypatch):
    """As on a GPU, but for the recording: the same numbers, also where the fast way is not sound."""
    monkeypatch.setattr(inner, "Recorded", lambda function: function)
    stack, budget = LayerStack(falling(3, 30, 20)), RankBudget(3, 2)
    f = normalise_pool(update_private(stack, random_start(stack, budget, 0, size=0.3)))
    if dead:
        f = dataclasses.replace(f, mixing=f.mixing * torch.tensor([1.0, 0, 1, 1, 1, 1], dtype=torch.float64))
    sweeps = [inner._sweeps_on(stack.values, (30, 20), replayed=replayed) for replayed in (False, True)]
    before = f
    for step in (0.0, 0.0, 0.7, 1.3):
        (checked, error), (found, replayed_error) = (swept(f, before, step) for swept in sweeps)
        assert replayed_error == pytest.approx(error, rel=1e-12)
        for x, y in zip(found.named().values(), checked.named().values(), strict=True):
            assert torch.allclose(x, y, rtol=0, atol=1e-9)
        f, before = checked, f


def test_unchecked_sweeps_say_where_they_are_not_sound():
    """A pool term that no layer uses leaves a zero in the Gram matrix: Cholesky fails, and eigenvectors are needed."""
    stack, budget = LayerStack(falling(3, 30, 20)), RankBudget(3, 2)
    f = normalise_pool(update_private(stack, random_start(stack, budget, 0, size=0.3)))
    norms = torch.tensor(stack.layer_norms_squared, dtype=torch.float64).sqrt()
    for mixing, sound in ((f.mixing, True), (f.mixing * (torch.arange(6) > 0), False)):
        algebra = Unchecked()
        joint_sweep((stack.right, stack.left), norms, dataclasses.replace(f, mixing=mixing), algebra=algebra)
        assert bool(algebra.sound) == sound
