"""How much the terms of factors cancel, against the definition."""

import dataclasses

import numpy as np
import pytest

from rasa_theory import LayerStack
from rasa_theory.solvers import cancellation
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
