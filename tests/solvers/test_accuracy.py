"""How much the terms of factors cancel, and what rounding hides of an exact fit, against the definitions."""

import dataclasses

import numpy as np
import pytest
import torch

from rasa_theory import LayerStack
from rasa_theory.solvers import cancellation, unresolved
from tests.helpers.problems import noise, random_factors


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


COSINES = {"orthogonal": 0.0, "nearly equal": 0.9998, "equal": 1.0}


def unit_columns(n, cosine):
    columns = torch.eye(n, 3, dtype=torch.float64)
    columns[:2, 1] = torch.tensor([cosine, np.sqrt(1 - cosine**2)])
    return columns  # singular values sqrt(1 + cosine), 1, sqrt(1 - cosine)


@pytest.mark.parametrize(("of_B", "of_A", "sigma"), [
    ("nearly equal", "nearly equal", np.sqrt(1 - 0.9998)), ("equal", "equal", 1.0),
    ("orthogonal", "nearly equal", 1.0), ("nearly equal", "orthogonal", 1.0),
])  # fmt: skip
def test_an_exact_fit_is_less_resolved_by_one_over_the_least_singular_value_of_unit_columns_or_rows(of_B, of_A, sigma):
    stack, f = LayerStack(noise(3, 7, 6)), random_factors(3, 7, 6, 3, 1)

    def with_pool(of_B, of_A):
        B, A = 100 * unit_columns(7, COSINES[of_B]), unit_columns(6, COSINES[of_A]).mT / 100
        return dataclasses.replace(f, shared_B=B, shared_A=A)

    resolved = unresolved(stack, with_pool("orthogonal", "orthogonal"))
    assert unresolved(stack, with_pool(of_B, of_A)) == pytest.approx(resolved / sigma, rel=1e-9)
