"""Factor types: shapes, updates, the embedding of LoRA, and how much they hold."""

import numpy as np
import pytest
import torch

from rasa_theory import InputError, LayerStack, LoraFactors, RankBudget, RasaFactors, reconstruction_error, solve_lora
from rasa_theory.problem import RankOneTerms, balanced, lora_parameters
from rasa_theory.solvers import move_to_pool
from tests.helpers.problems import noise, random_factors

L, b, a, r, k = 3, 6, 5, 4, 1


def lora(seed=0):
    return LoraFactors(torch.as_tensor(noise(L, b, r, seed)), torch.as_tensor(noise(L, r, a, seed + 1)))


def rasa(q=r - k, R=L * k):
    shapes = (L, b, q), (L, q, a), (1, b, R), (1, R, a), (1, L, R)
    Bt, At, B_S, A_S, D = (torch.as_tensor(noise(*shape, seed)) for seed, shape in enumerate(shapes))
    return RasaFactors(Bt, At, B_S[0], A_S[0], D[0])


def literal(f):
    return [f.private_B[i] @ f.private_A[i] + f.shared_B @ torch.diag(f.mixing[i]) @ f.shared_A for i in range(L)]


@pytest.mark.parametrize("pooled", ["smallest", "largest"])
@pytest.mark.parametrize("shared_rank", range(r + 1))
def test_the_embedding_of_lora_has_the_same_updates(pooled, shared_rank):
    """Theorem 3.1, by construction and not by a solver."""
    factors = RasaFactors.from_lora(lora(), RankBudget(r, shared_rank), pooled)
    assert factors.shared_B.shape == (b, L * shared_rank)
    assert factors.private_B.shape == (L, b, r - shared_rank)
    for i in range(L):
        assert torch.allclose(factors.update(i), lora().update(i), rtol=0, atol=1e-13)


def test_a_pool_alone_has_no_private_terms():
    f = rasa()
    factors = RasaFactors.from_pool(RankOneTerms(f.shared_B, f.shared_A, f.mixing), 2)
    assert factors.private_B.shape == (L, b, 2)
    for i in range(L):
        expected = f.shared_B @ torch.diag(f.mixing[i]) @ f.shared_A
        assert torch.allclose(factors.update(i), expected, rtol=0, atol=1e-14)


def test_the_embedding_gives_away_the_terms_that_it_is_told_to():
    smallest = RasaFactors.from_lora(lora(), RankBudget(r, 1), "smallest")
    largest = RasaFactors.from_lora(lora(), RankBudget(r, 1), "largest")
    assert torch.equal(smallest.shared_A, lora().A[:, 3])
    assert torch.equal(largest.shared_A, lora().A[:, 0])
    assert torch.equal(smallest.mixing, torch.eye(3, dtype=torch.float64))


def test_the_embedding_of_the_optimum_has_the_error_e_lora():
    stack = LayerStack(noise(L, b, a))
    solution = solve_lora(stack, 2)
    for shared_rank in (0, 1, 2):
        factors = RasaFactors.from_lora(solution.factors, RankBudget(2, shared_rank))
        assert reconstruction_error(stack, factors) == pytest.approx(solution.error, rel=1e-13)


def test_update_is_the_equation_and_may_be_had_by_rows():
    factors = rasa()
    for i, expected in enumerate(literal(factors)):
        assert torch.allclose(factors.update(i), expected, rtol=0, atol=1e-14)
        assert torch.allclose(factors.update(i, slice(2, 4)), expected[2:4], rtol=0, atol=1e-14)
        assert torch.allclose(factors.transpose().update(i), expected.mT, rtol=0, atol=1e-14)
        assert torch.allclose(factors.scaled(-3.0).update(i), -3 * expected, rtol=0, atol=1e-13)
        one_each = factors.scaled(torch.tensor([1.0, 0.0, 2.0]))
        assert torch.allclose(one_each.update(i), (1.0, 0.0, 2.0)[i] * expected, rtol=0, atol=1e-13)
        assert factors.to(torch.float32).update(i).dtype == torch.float32


@pytest.mark.parametrize("shared_rank", range(r + 1))
def test_parameters(shared_rank):
    """LoRA's L r (a + b), and L R more for the mixing."""
    factors = RasaFactors.from_lora(lora(), RankBudget(r, shared_rank))
    assert lora_parameters(L, (b, a), r) == sum(t.numel() for t in (lora().A, lora().B)) == L * r * (a + b)
    assert factors.parameters == L * r * (a + b) + L * L * shared_rank


def test_update_rank():
    wide = RasaFactors.from_lora(LoraFactors(torch.ones(2, 30, 4), torch.ones(2, 4, 20)), RankBudget(4, 1))
    assert wide.update_rank == 4 - 1 + 2 * 1
    assert rasa(q=3, R=9).update_rank == 5  # not more than min(b, a)
    assert max(int(torch.linalg.matrix_rank(rasa(q=1, R=3).update(i))) for i in range(L)) == rasa(q=1, R=3).update_rank


@pytest.mark.parametrize(("old", "new"), [(0, 1), (0, 4), (1, 2), (1, 3), (2, 4), (3, 3)])
def test_moving_private_terms_to_the_pool_changes_no_update(old, new):
    factors = rasa(q=r - old, R=L * old)
    moved = move_to_pool(factors, RankBudget(r, new))
    assert moved.private_B.shape == (L, b, r - new)
    assert moved.shared_B.shape == (b, L * new)
    for i in range(L):
        assert torch.allclose(moved.update(i), factors.update(i), rtol=0, atol=1e-13)


def replaced(**tensors):
    return lambda: RasaFactors(**(rasa().named() | tensors))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (replaced(private_A=torch.zeros(L, 2, a)), r"private_A has shape \(3, 2, 5\), .* need \(3, 3, 5\)"),
        (replaced(shared_B=torch.zeros(b, 4)), r"shared_B has shape \(6, 4\), the other factors need \(6, 3\)"),
        (replaced(mixing=torch.zeros(L)), r"mixing has shape \(3,\), the other factors need \(3, 3\)"),
        (replaced(private_B=torch.zeros(b, 3)), r"axes \(L, b, q\) and shared_A axes \(R, a\), found shapes \(6, 3\)"),
        (lambda: LoraFactors(torch.zeros(L, b, 2), torch.zeros(L, 3, a)), r"A has shape \(3, 3, 5\), .* \(3, 2, 5\)"),
        (lambda: LoraFactors(torch.zeros(b, 2), torch.zeros(2, a)), r"three axes, found shapes \(6, 2\) and \(2, 5\)"),
        (lambda: RasaFactors.from_lora(lora(), RankBudget(3, 1)), "LoRA factors have rank 4, the budget has rank 3"),
        (lambda: RasaFactors.from_lora(lora(), RankBudget(4, 1), "best"), "must be 'smallest' or 'largest', got"),
    ],
)
def test_shapes_that_disagree_are_named(make, sentence):
    with pytest.raises(InputError, match=sentence):
        make()


def test_named_is_the_constructor():
    again = RasaFactors(**rasa().named())
    assert list(again.named()) == ["private_B", "private_A", "shared_B", "shared_A", "mixing"]
    assert all(torch.equal(x, rasa().named()[name]) for name, x in again.named().items())


def test_factors_of_rasa_as_those_of_a_lora():
    """B = [B~_i, B_S D_i], A = [A~_i; A_S]: the same updates, of rank q + R."""
    f = random_factors(3, 7, 6, 3, 1)
    lora = f.as_lora()
    assert lora.B.shape == (3, 7, 2 + 3)
    for i in range(3):
        assert torch.allclose(lora.update(i), f.update(i), rtol=0, atol=1e-14)


def test_balanced_terms():
    B, A = (torch.as_tensor(x) for x in (noise(2, 7, 3) * np.array([1e6, 1.0, 0.0]), noise(2, 3, 5, 1)))
    b, a = balanced(B, A)
    assert torch.allclose(b @ a, B @ A, rtol=1e-12)
    sizes = torch.linalg.vector_norm(b, dim=1), torch.linalg.vector_norm(a, dim=2)
    assert torch.allclose(sizes[0][:, :2], sizes[1][:, :2], rtol=1e-12)
    assert not b[:, :, 2].any()
