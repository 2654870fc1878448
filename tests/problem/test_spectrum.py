"""Spectral ranks: known answers, laws, and refused input."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given

import rasa_theory as rt
from tests.helpers.problems import noise
from tests.helpers.strategies import nasty_stacks


@pytest.mark.parametrize("n", [1, 3, 8])
@pytest.mark.parametrize("c", [1.0, 1e-200, 1e200])
def test_n_equal_singular_values_have_rank_n(n, c):
    sigma = c * torch.cat([torch.ones(n), torch.zeros(8 - n)]).double()
    ranks = rt.spectral_ranks(sigma, (0.5, 0.99, 1.0))
    assert ranks.stable.tolist() == pytest.approx([n], rel=1e-14)
    assert ranks.entropy.tolist() == pytest.approx([n], rel=1e-14)
    assert ranks.energy.tolist() == [[math.ceil(n / 2), n, n]]


def test_of_a_spectrum_by_hand():
    """Energies 9, 4, 2, 1 of 16."""
    ranks = rt.spectral_ranks(torch.tensor([[3.0, 2.0, math.sqrt(2), 1.0]], dtype=torch.float64), (0.5, 0.8125, 0.9))
    p = np.array([9, 4, 2, 1]) / 16
    assert ranks.stable.tolist() == pytest.approx([16 / 9])
    assert ranks.entropy.tolist() == pytest.approx([float(np.exp(-(p * np.log(p)).sum()))])
    assert ranks.energy.tolist() == [[1, 2, 3]]  # 13/16 = 0.8125 is reached by two
    assert ranks.shares == (0.5, 0.8125, 0.9)


def test_layers_of_a_stack_and_one_of_zeros():
    M = noise(3, 6, 5)
    M[1] = 0
    ranks = rt.spectral_ranks(rt.LayerStack(M))
    S = np.linalg.svd(M, compute_uv=False)
    norms = (M**2).sum((1, 2))
    assert ranks.stable.tolist() == pytest.approx([norms[0] / S[0, 0] ** 2, 0, norms[2] / S[2, 0] ** 2])
    assert ranks.stable[1] == ranks.entropy[1] == 0
    assert ranks.energy[1].tolist() == [0, 0, 0]
    assert ranks.shares == (0.5, 0.9, 0.99)


@given(nasty_stacks())
def test_order_of_the_ranks_and_independence_of_scale_and_orientation(problem):
    ranks, others = rt.spectral_ranks(problem.stack), rt.spectral_ranks(problem.stack.unit().transpose())
    m = min(problem.stack.shape)
    assert (ranks.stable <= ranks.entropy * (1 + 1e-12)).all()
    assert (ranks.entropy <= m * (1 + 1e-12)).all()
    assert (ranks.energy.diff(dim=1) >= 0).all()
    assert (ranks.energy <= m).all()
    assert torch.equal(ranks.stable, others.stable)
    assert torch.equal(ranks.energy, others.energy)


@pytest.mark.parametrize(
    ("sigma", "shares", "sentence"),
    [
        (torch.tensor([1.0, 2.0]), (0.5,), "falling along each layer"),
        (torch.tensor([1.0, -1.0]), (0.5,), "at least 0"),
        (torch.tensor([math.inf, 1.0]), (0.5,), "must be finite"),
        (torch.tensor([math.nan]), (0.5,), "must be finite"),
        (torch.ones(2, 2, 2), (0.5,), r"need shape \(L, m\) or \(m,\), found \(2, 2, 2\)"),
        (torch.ones(0), (0.5,), r"found \(0,\)"),
        (torch.ones(2), (1.5,), "must be above 0 and at most 1, got 1.5"),
        (torch.ones(2), (0.0,), "must be above 0 and at most 1, got 0.0"),
    ],
)
def test_bad_input_is_refused(sigma, shares, sentence):
    with pytest.raises(rt.InputError, match=sentence):
        rt.spectral_ranks(sigma, shares)
