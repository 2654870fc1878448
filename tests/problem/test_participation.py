"""Who owns the pool: known participations, losses by brute force, and the true rise of the error at a minimum."""

import dataclasses

import numpy as np
import pytest
import torch

from rasa_theory import LayerStack, RankBudget, RasaFactors, SolverOptions, pool_participation, solve_rasa
from rasa_theory.problem import layer_losses, participation_ratio
from tests.helpers.problems import SHAPES, decaying, noise, orthogonal, random_factors


def tensor(x):
    return torch.as_tensor(np.ascontiguousarray(x))


def pool(D, q=1, private=5.0):
    """Factors with mixing D (L, R) whose private terms and pool columns are all orthogonal to one another."""
    (L, R), n = D.shape, D.shape[1] + q
    B, A = orthogonal(n, 1), orthogonal(n, 2)
    return RasaFactors(
        tensor(np.stack([private * B[:, R:]] * L)), tensor(np.stack([A[R:]] * L)),
        tensor(B[:, :R]), tensor(A[:R]), tensor(D),
    )  # fmt: skip


@pytest.mark.parametrize("q", [0, 1, 2])
def test_one_layer_is_one_and_layers_alike_are_as_many_as_they_are(q):
    D = np.array([[2.0, -1.0, 0.5, 0.0], [0.0, 1.0, 0.5, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, -1.0, 0.0, 0.0]])
    found = pool_participation(pool(D, q))
    assert found.by_weight.tolist() == pytest.approx([1, 4, 2, 0], rel=1e-12)
    assert found.by_loss.tolist() == pytest.approx([1, 4, 2, 0], rel=1e-12)
    assert found.weights.numpy() == pytest.approx(D**2, abs=1e-14)
    assert found.losses.numpy() == pytest.approx(D**2, abs=1e-12)  # orthogonal and below the private terms: all is lost
    assert int(found.owners[0]) == 0


def test_one_layer_and_a_tenth_of_it_in_ten_others_is_a_participation_of_one_and_a_fifth():
    D = np.array([[1.0]] + [[0.1]] * 10)
    assert float(pool_participation(pool(D)).by_weight) == pytest.approx(1.1**2 / (1 + 10 * 1e-4), rel=1e-12)


def test_a_term_that_private_ones_take_up_weighs_and_is_not_missed():
    """The pool term is parallel to the private one of layer 0 and cancels half of it; layers 1 and 2 need it."""
    u, v = orthogonal(5, 1)[:, 0], orthogonal(4, 2)[:, 0]
    zero = np.zeros((2, 5, 1))
    factors = RasaFactors(
        tensor(np.concatenate([-20 * u[None, :, None], zero])), tensor(np.stack([v[None]] * 3)),
        tensor(np.stack([u, orthogonal(5, 1)[:, 1]], 1)), tensor(np.stack([v, orthogonal(4, 2)[:, 1]])),
        tensor(np.array([[10.0, 3.0], [0.0, 3.0], [0.0, 3.0]])),
    )  # fmt: skip
    found = pool_participation(factors)
    assert found.by_weight.tolist() == pytest.approx([1, 3])
    assert found.losses[:, 0].tolist() == pytest.approx([0, 0, 0], abs=1e-12)
    assert found.losses[:, 1].tolist() == pytest.approx([9, 0, 0])  # the empty private terms of 1 and 2 take it up
    assert found.owners.tolist()[1] == 0


@pytest.mark.parametrize(("L", "b", "a", "r", "k", "seed"), SHAPES)
def test_losses_are_singular_values_and_neither_scale_nor_dtype_matters(L, b, a, r, k, seed):
    f = random_factors(L, b, a, r, k, seed)
    found = pool_participation(f)
    Bt, At, B_S, A_S, D = (t.numpy() for t in f.named().values())
    literal = np.zeros((L, L * k))
    for i in range(L):
        for j in range(L * k):
            values = np.linalg.svd(Bt[i] @ At[i] + D[i, j] * np.outer(B_S[:, j], A_S[j]), compute_uv=False)
            literal[i, j] = values[r - k] ** 2 if r - k < len(values) else 0
    assert found.losses.numpy() == pytest.approx(literal, abs=1e-12)
    assert layer_losses(f).sum(0).numpy() == pytest.approx(literal.sum(0), abs=1e-12)
    assert bool((found.by_loss >= 1 - 1e-12).all())
    assert bool((found.by_loss <= L + 1e-12).all())
    c = torch.linspace(0.5, 3, L * k, dtype=torch.float64)
    other = dataclasses.replace(f, shared_B=f.shared_B * c, shared_A=f.shared_A * (2 / c**3)[:, None])
    other = dataclasses.replace(other, mixing=other.mixing * c**2 / 2)
    for x, y in zip(dataclasses.astuple(found)[:4], dataclasses.astuple(pool_participation(other))[:4], strict=True):
        assert torch.allclose(x, y, rtol=1e-9, atol=1e-12)
    rough = pool_participation(f.to(torch.float32))
    assert rough.by_weight.dtype == torch.float64
    assert torch.allclose(rough.by_weight, found.by_weight, rtol=1e-4)


def test_at_a_minimum_the_error_rises_by_at_most_the_loss_and_by_little_less():
    """Term j left out of layer i, its private terms optimal again: the SVD of what the other pool terms leave."""
    stack, budget = LayerStack(decaying(3, 14, 12)), RankBudget(3, 1)
    options = SolverOptions(start="allocation", sweep="joint", max_sweeps=1000, rtol=0)
    f = solve_rasa(stack, budget, options).factors.normalised()
    M, (_, _, B_S, A_S, D), q = stack.values.numpy(), (t.numpy() for t in f.named().values()), budget.private_rank

    def left(i, d):
        return float((np.linalg.svd(M[i] - (B_S * d) @ A_S, compute_uv=False)[q:] ** 2).sum())

    rises = np.array(
        [[left(i, np.where(np.arange(3) == j, 0, D[i])) - left(i, D[i]) for j in range(3)] for i in range(3)]
    )
    found = layer_losses(f).numpy()
    assert (rises <= found + 1e-3 * found.max()).all()
    assert (rises >= 0.9 * found - 1e-3 * found.max()).all()


def test_participation_of_numbers_whose_squares_underflow():
    x = torch.full((4, 2), 1e-200, dtype=torch.float64)
    assert participation_ratio(x).tolist() == pytest.approx([4, 4])
    assert participation_ratio(torch.zeros(4, 2)).tolist() == [0, 0]


def test_planted_pools_are_seen_as_what_they_are():
    """Three dyads that all five layers use, found by the solver: participation near 5, whatever the private terms."""
    rng = np.random.default_rng(0)
    U, V = orthogonal(20, 1)[:, :5], orthogonal(18, 2)[:, :5]
    D = rng.choice([-1.0, 1.0], (5, 5)) * (1 + 0.1 * rng.standard_normal((5, 5)))
    M = (U * D[:, None]) @ V.T + 0.01 * noise(5, 20, 18)
    found = pool_participation(solve_rasa(LayerStack(M), RankBudget(1, 1), SolverOptions(effort="quick")).factors)
    assert float(found.by_loss.min()) > 4.7
    assert float(found.by_weight.min()) > 4.7
