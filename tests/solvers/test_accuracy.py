"""How much the terms of factors cancel, and how far rounding keeps sweeps from an exact fit, by the definitions."""

import dataclasses

import numpy as np
import pytest
import torch

from rasa_theory import LayerStack
from rasa_theory.solvers import cancellation, unresolved
from tests.helpers.problems import noise, orthogonal, random_factors


@pytest.mark.parametrize(("private", "mixing"), [(100.0, 1.0), (1.0, 100.0)])
def test_cancellation_is_the_largest_norm_of_a_private_or_a_pool_term_over_that_of_its_layer(private, mixing):
    stack, f = LayerStack(noise(3, 7, 6)), random_factors(3, 7, 6, 3, 1)
    f = dataclasses.replace(f, private_B=private * f.private_B, mixing=mixing * f.mixing)
    Bt, At, B_S, A_S, D = (x.numpy() for x in f.named().values())
    norms = np.sqrt(stack.layer_norms_squared)
    terms = [np.linalg.norm(Bt[i] @ At[i]) / norms[i] for i in range(3)]
    for j in range(B_S.shape[1]):
        terms += list(np.abs(D[:, j]) * np.linalg.norm(np.outer(B_S[:, j], A_S[j])) / norms)
    assert cancellation(stack, f) == pytest.approx(max(terms), rel=1e-12)


def unit_columns(n, cosine):
    columns = torch.eye(n, 3, dtype=torch.float64)
    columns[:2, 1] = torch.tensor([cosine, np.sqrt(1 - cosine**2)])
    return torch.as_tensor(orthogonal(n, 5)) @ columns  # singular values sqrt(1 + cosine), 1, sqrt(1 - cosine)


def with_pool(B, A):
    f = random_factors(3, 7, 6, 3, 1)
    mixing = torch.ones(3, B.shape[1], dtype=torch.float64)
    return dataclasses.replace(f, shared_B=B, shared_A=A.mT.contiguous(), mixing=mixing)


@pytest.mark.parametrize(("of_B", "of_A", "sigma"), [
    (0.9998, 0.9998, np.sqrt(1 - 0.9998)), (1 - 1e-10, 1 - 1e-10, np.sqrt(1e-10)), (1.0, 1.0, 1.0),
    (0.0, 0.9998, 1.0), (0.9998, 0.0, 1.0), (0.9998, 1 - 1e-10, np.sqrt(1 - 0.9998)),
])  # fmt: skip
@pytest.mark.parametrize("size", [1.0, 1e-20])
def test_an_exact_fit_is_less_resolved_by_one_over_the_smallest_singular_value_of_unit_columns(of_B, of_A, sigma, size):
    stack, lengths = LayerStack(noise(3, 7, 6)), torch.tensor([100.0, 1.0, 0.01], dtype=torch.float64) * size
    plain = with_pool(unit_columns(7, 0.0), unit_columns(6, 0.0))
    given = with_pool(unit_columns(7, of_B) * lengths, unit_columns(6, of_A) / lengths)
    assert unresolved(stack, given) == pytest.approx(unresolved(stack, plain) / sigma, rel=1e-5)


@pytest.mark.parametrize("B", [torch.zeros(7, 0), torch.zeros(7, 2), torch.ones(7, 9), torch.eye(7).repeat(1, 2)])
def test_empty_zero_equal_and_wide_pools_hide_nothing(B):
    pool = with_pool(B.double(), torch.zeros(6, B.shape[1], dtype=torch.float64))
    terms = pool.private_B.shape[2] + B.shape[1]
    one_term = with_pool(torch.zeros(7, 1, dtype=torch.float64), torch.zeros(6, 1, dtype=torch.float64))
    stack = LayerStack(noise(3, 7, 6))
    assert unresolved(stack, pool) == pytest.approx(
        unresolved(stack, one_term) * np.sqrt(terms / (terms - B.shape[1] + 1))
    )
