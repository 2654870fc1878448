"""The greedy allocation: the largest terms of all layers, those of the pool, and ranks that reach a target."""

import itertools

import numpy as np
import pytest
import torch

from rasa_theory import InputError, RankBudget
from rasa_theory.bounds import RankTarget, allocate_pool, allocate_ranks, largest_terms

SIGMAS = [torch.tensor([[4.0, 2.0, 1.0], [3.0, 3.0, 0.0]]), torch.tensor([[5.0, 1.0]])]
COSTS = [10, 40]


def spent(ranks):
    return sum(cost * sum(stack) for cost, stack in zip(COSTS, ranks, strict=True))


def kept(ranks):
    return sum(
        float((sigma[i, :r] ** 2).sum())
        for sigma, stack in zip(SIGMAS, ranks, strict=True)
        for i, r in enumerate(stack)
    )


def all_ranks():
    for flat in itertools.product(range(4), range(4), range(3)):
        yield [list(flat[:2]), list(flat[2:])]


def test_the_largest_terms_come_in_order_and_equal_ones_by_layer():
    layer, index = largest_terms(SIGMAS[0], 4)
    assert list(zip(layer.tolist(), index.tolist(), strict=True)) == [(0, 0), (1, 0), (1, 1), (0, 1)]
    assert len(largest_terms(SIGMAS[0], 9)[0]) == 6


def test_the_places_of_the_pool_go_to_the_largest_terms_that_are_not_private():
    S = torch.tensor([[9.0, 8.0, 7.0, 0.1], [9.0, 2.0, 1.0, 0.5]])
    layer, index = allocate_pool(S, RankBudget(2, 1))
    assert sorted(zip(layer.tolist(), index.tolist(), strict=True)) == [(0, 1), (0, 2)]
    layer, index = allocate_pool(S, RankBudget(4, 0))
    assert len(layer) == len(index) == 0


@pytest.mark.parametrize("energy", [0.1, 0.5, 0.8, 0.9, 0.99, 1.0])
def test_no_ranks_that_keep_as_much_cost_less_by_more_than_a_term(energy):
    total = sum(float((sigma**2).sum()) for sigma in SIGMAS)
    ranks = allocate_ranks(SIGMAS, COSTS, RankTarget(energy=energy))
    assert kept(ranks) >= energy * total * (1 - 1e-9)
    least = min(spent(other) for other in all_ranks() if kept(other) >= energy * total * (1 - 1e-9))
    assert spent(ranks) < least + max(COSTS)


@pytest.mark.parametrize("parameters", [10, 25, 42, 60, 78, 1000])
def test_no_ranks_of_as_many_parameters_keep_more(parameters):
    ranks = allocate_ranks(SIGMAS, COSTS, RankTarget(parameters=parameters))
    assert min(parameters, spent([[3, 2], [2]])) - max(COSTS) < spent(ranks) <= parameters
    best = max(kept(other) for other in all_ranks() if spent(other) <= spent(ranks))
    assert kept(ranks) == pytest.approx(best)


def test_zero_singular_values_are_never_taken():
    assert allocate_ranks(SIGMAS, COSTS, RankTarget(energy=1.0)) == [[3, 2], [2]]
    assert allocate_ranks([torch.zeros(2, 3)], [5], RankTarget(energy=1.0)) == [[0, 0]]
    assert allocate_ranks(SIGMAS, COSTS, RankTarget(parameters=9)) == [[0, 0], [0]]


def test_layers_in_order_of_falling_singular_values():
    sigma = torch.as_tensor(np.sort(np.random.default_rng(0).random((3, 7)))[:, ::-1].copy())
    (ranks,) = allocate_ranks([sigma], [4], RankTarget(energy=0.7))
    taken = torch.cat([sigma[i, :r] for i, r in enumerate(ranks)])
    left = torch.cat([sigma[i, r:] for i, r in enumerate(ranks)])
    assert float(taken.min()) >= float(left.max())


@pytest.mark.parametrize(
    "bad",
    [{}, {"energy": 0.5, "parameters": 3}, {"energy": 0.0}, {"energy": 1.1}, {"parameters": 0}, {"parameters": 2.5}],
)
def test_bad_targets(bad):
    with pytest.raises(InputError):
        RankTarget(**bad)
