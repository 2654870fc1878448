"""Tests that would notice a search that has become worse, on stacks whose lowest known error comes from elsewhere."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.best_found.kinds import SIZES, Problem, basis
from rasa_theory import LayerStack, RankBudget, RasaSolution, SolverOptions, solve_lora, solve_rasa
from rasa_theory.bounds import closed_floors

SLOW = pytest.mark.slow

# The lowest error of a plain search with bounded terms (8 ||M_i||) on seed 0 of each kind, from
# `python -m experiments.best_found reference`: another implementation, 50 starts of L-BFGS and a polish.
REFERENCES = [
    pytest.param("common_part", SIZES[0], 0.15286484594491717, marks=SLOW),
    ("input_dictionary", SIZES[0], 0.11524895732880794),
    ("shared_bases", SIZES[0], 0.2112881238045088),
    pytest.param("border_rank", SIZES[0], 0.004794055598694326, marks=SLOW),
    pytest.param("drift", SIZES[3], 0.07318941202576584, marks=SLOW),
    pytest.param("hidden_dyads_80", SIZES[3], 0.3596182975249903, marks=SLOW),
    pytest.param("orthogonal_terms", SIZES[3], 0.2351288798080388, marks=SLOW),
    pytest.param("common_columns_and_rows", SIZES[0], 0.1835981682494222, marks=SLOW),
    pytest.param("two_clusters", SIZES[0], 0.28589715380773845, marks=SLOW),
    pytest.param("steep", SIZES[3], 0.23251392874256316, marks=SLOW),
    pytest.param("rounding", SIZES[3], 0.3754314430525203, marks=SLOW),
    pytest.param("unequal_norms", SIZES[3], 0.10504596100596543, marks=SLOW),
]


def solved(M: np.ndarray, r: int, k: int, seed: int = 0) -> tuple[RasaSolution, float]:
    """The solution with default effort, and e_lora."""
    stack = LayerStack(M)
    return solve_rasa(stack, RankBudget(r, k), SolverOptions(seed=seed)), solve_lora(stack, r).error


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "size", "reference"), REFERENCES)
def test_as_low_as_a_plain_search(kind: str, size: object, reference: float) -> None:
    """Within a thousandth of e_lora, and inside the bound that the plain search kept."""
    problem = Problem(kind, size, 0)  # type: ignore[arg-type]
    solution, e_lora = solved(problem.values(), problem.size.rank, problem.size.k)
    assert solution.error <= reference + 1e-3 * e_lora
    assert solution.cancellation <= 8 * (1 + 1e-9)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=SLOW) for seed in (1, 2))])
def test_two_layers_equal_up_to_scale_reach_the_rank_bound(seed: int) -> None:
    """k = r: the pool of four terms serves both layers, so that each is approximated by rank four."""
    rng = np.random.default_rng(seed)
    M = np.array([1.0, -0.7])[:, None, None] * rng.standard_normal((1, 32, 30))
    solution, _ = solved(M, 2, 2, seed)
    optimum = float((np.linalg.svd(M, compute_uv=False)[:, 4:] ** 2).sum())
    assert solution.error == pytest.approx(optimum, rel=1e-6)
    assert max(floor.value for floor in closed_floors(LayerStack(M), RankBudget(2, 2))) == pytest.approx(optimum)


@SLOW
def test_layers_whose_input_directions_come_from_one_set() -> None:
    """Six layers 64 x 64 of rank 12, rows from 18 common directions: allocation gains nothing."""
    rng = np.random.default_rng(0)
    directions = basis(rng, 64, 18).T
    M = np.zeros((6, 64, 64))
    for i in range(6):
        rows = directions[rng.permutation(18)[:12]]
        M[i] = (basis(rng, 64, 12) * np.arange(1, 13) ** -0.5) @ rows
    solution, e_lora = solved(M, 4, 1)
    assert solution.error <= 0.93 * e_lora


def test_orthogonally_decomposable_tensors_are_found_under_noise() -> None:
    """k = r = 1, six terms with orthonormal vectors on all three axes: only noise is left, less what terms fit."""
    rng = np.random.default_rng(0)
    U, V, W = basis(rng, 24, 6), basis(rng, 20, 6), basis(rng, 6, 6)
    noise = 0.03 * rng.standard_normal((6, 24, 20))
    solution, e_lora = solved(np.einsum("bj,ij,aj->iba", U, W / np.arange(1, 7) ** 0.5, V) + noise, 1, 1)
    assert solution.error <= float((noise**2).sum()) < 0.9 * e_lora
