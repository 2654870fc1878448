"""Sweeps on the core: the plain sweeps, never a higher error, and the same when they are replayed."""

import dataclasses

import pytest
import torch

from rasa_theory import LayerStack, RankBudget
from rasa_theory.linalg import Unchecked
from rasa_theory.solvers import ReplayedSweep, SweepOnCore, core_sweeps, joint_sweep, random_start, update_private
from tests.helpers import reference
from tests.helpers.problems import SHAPES, falling, noise


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
    before = reference.error(stack.values.numpy(), *plain(f))
    for n in (1, 2, 5, 10, 20):
        found, error = core_sweeps(stack.values, f, (b, a), n)
        measured = reference.error(stack.values.numpy(), *plain(found))
        assert error == pytest.approx(measured, rel=1e-10, abs=1e-12 * stack.norm_squared)
        assert measured <= before * (1 + 1e-12)
        before = measured


@pytest.mark.parametrize("dead", [False, True])
def test_replayed_sweeps_are_the_checked_ones(dead):
    """As on a GPU, but for the recording: the same numbers, also where the fast way is not sound."""
    soundness = []

    def not_recorded(function):
        def called(*tensors):
            facts, *factors = function(*tensors)
            soundness.append(bool(facts[1]))
            return facts, *factors

        return called

    stack, budget = LayerStack(falling(3, 30, 20)), RankBudget(3, 2)
    f = update_private(stack, random_start(stack, budget, 0, size=0.3)).normalised()
    sweep = SweepOnCore(stack.values, (30, 20))
    sweeps = [sweep, ReplayedSweep(sweep, not_recorded)]
    for swept in sweeps:
        swept(f)  # the first is checked in either case
    if dead:
        f = dataclasses.replace(f, mixing=f.mixing * torch.tensor([1.0, 0, 1, 1, 1, 1], dtype=torch.float64))
    for _ in range(4):
        (checked, error), (found, replayed_error) = (swept(f) for swept in sweeps)
        assert replayed_error == pytest.approx(error, rel=1e-12)
        assert torch.allclose(found.mixing, checked.mixing, rtol=0, atol=1e-9)
        for i in range(3):  # private factors may differ in sign
            assert torch.allclose(found.update(i), checked.update(i), rtol=0, atol=1e-9)
        f = checked
    assert soundness == [not dead, True, True, True]


def test_unchecked_steps_say_where_they_are_not_sound():
    """Each by itself: columns that depend, and a Gram matrix with a zero that Cholesky does not survive."""
    X, G, g = torch.as_tensor(noise(2, 9, 2)), torch.eye(3).double(), torch.ones(3, 1).double()
    size, level = torch.ones(3).double(), torch.full((3,), 1e-9).double()
    for depends, singular in ((False, False), (True, False), (False, True)):
        algebra = Unchecked()
        algebra.orthonormal(X * torch.tensor([1.0, 0.0 if depends else 1.0]).double())
        algebra.solve_increment(G * torch.tensor([1.0, 1.0, 0.0 if singular else 1.0]).double(), g, size, level)
        assert bool(algebra.sound) == (not depends and not singular)


def test_unchecked_sweeps_say_where_they_are_not_sound():
    """A pool term that no layer uses leaves a zero in the Gram matrix: Cholesky fails, and eigenvectors are needed."""
    stack, budget = LayerStack(falling(3, 30, 20)), RankBudget(3, 2)
    f = update_private(stack, random_start(stack, budget, 0, size=0.3)).normalised()
    norms = stack.layer_norms()
    for mixing, sound in ((f.mixing, True), (f.mixing * (torch.arange(6) > 0), False)):
        algebra = Unchecked()
        joint_sweep((stack.right, stack.left), norms, dataclasses.replace(f, mixing=mixing), algebra=algebra)
        assert bool(algebra.sound) == sound
