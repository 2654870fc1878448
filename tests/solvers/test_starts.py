"""The algebraic starts: planted factors found again, exactly and under noise; known optima; where they do not apply."""

import dataclasses
import math

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given

from experiments import recovery
from rasa_theory import (
    LayerStack,
    RankBudget,
    RasaFactors,
    SolverOptions,
    StopReason,
    allocation_bound,
    load,
    lower_bound,
    reconstruction_error,
    solve_lora,
    solve_path,
    solve_rasa,
)
from rasa_theory.linalg import not_above
from rasa_theory.problem import subspaces
from rasa_theory.solvers import STARTS, common_start, pencil_start
from tests.helpers.problems import noise, planted, shared_bases
from tests.helpers.strategies import nasty_stacks

ALGEBRAIC = {"common": common_start, "pencil": pencil_start}
BOTH = pytest.mark.parametrize("name", ALGEBRAIC)
SMALL = [(6, 80, 70, 4, 2), (8, 100, 90, 4, 1), (5, 60, 60, 3, 3)]
LARGER = (16, 160, 160, 8, 1)


def planted_factors(seed, L, b, a, r, k):
    """Those that `planted` is made of: it draws the pool first, then the private terms."""
    rng, R, q = np.random.default_rng(seed), L * k, r - k
    shapes = {"shared_B": (b, R), "mixing": (L, R), "shared_A": (R, a), "private_B": (L, b, q), "private_A": (L, q, a)}
    return RasaFactors(**{name: torch.as_tensor(rng.standard_normal(shape)) for name, shape in shapes.items()})


def largest_angle(one, other):
    """Of two factorisations: the largest sine between matched pool terms, and the distance of the private terms.

    Pool terms are compared as unit tensors d_j (x) b_j (x) a_j up to sign, so neither scale nor order counts; private
    ones as products, relative to their norm.
    """

    def unit(X):
        return X / torch.linalg.vector_norm(X, dim=0)

    cosines = (unit(one.shared_B).mT @ unit(other.shared_B)) * (unit(one.shared_A.mT).mT @ unit(other.shared_A.mT))
    cosines = (cosines * (unit(one.mixing).mT @ unit(other.mixing))).abs()
    rows, columns = scipy.optimize.linear_sum_assignment(-cosines.numpy())
    pool = math.sqrt(max(0.0, 1 - float(cosines[rows, columns].min())))
    private = [f.private_B @ f.private_A for f in (one, other)]
    return pool, float(
        torch.linalg.vector_norm(private[0] - private[1]) / max(1.0, torch.linalg.vector_norm(private[0]))
    )


def with_noise(seed, shape, eta):
    """A planted stack with normal noise of eta times its norm; and the noise's energy."""
    M = planted(seed, *shape).values
    N = noise(*shape[:3], seed + 10_000)
    N *= eta * np.linalg.norm(M) / np.linalg.norm(N)
    return LayerStack(M + N), float((N**2).sum())


def left_over(L, b, a, r, k):
    """The share of the noise that a fit of so many free parameters leaves: 1 - dof / (L b a)."""
    return 1 - recovery.degrees_of_freedom((L, b, a, r, k)) / (L * b * a)


# ---- without noise


@pytest.mark.parametrize("shape", [*SMALL, LARGER])
@pytest.mark.parametrize("seed", range(3))
def test_the_default_finds_planted_factors_again(shape, seed):
    *_, r, k = shape
    stack, truth = LayerStack(planted(seed, *shape).values), planted_factors(seed, *shape)
    solution = solve_rasa(stack, RankBudget(r, k))
    assert solution.error <= 1e-24 * stack.norm_squared
    assert solution.stop_reason is StopReason.CONVERGED
    assert solution.start == "common"
    pool, private = largest_angle(truth, solution.factors)
    assert pool <= 1e-6  # a sine; its square is what rounding touches
    assert private <= 1e-10


@BOTH
@pytest.mark.parametrize("shape", [*SMALL, LARGER, (2, 8, 9, 3, 1), (3, 20, 7, 2, 1), (4, 9, 30, 2, 2)])
def test_each_start_alone_is_exact(name, shape):
    *_, r, k = shape
    stack = LayerStack(planted(7, *shape).values)
    factors = ALGEBRAIC[name](stack, RankBudget(r, k), seed=1)
    assert reconstruction_error(stack, factors) <= 1e-20 * stack.norm_squared
    assert max(largest_angle(planted_factors(7, *shape), factors)) <= 1e-5


def test_common_needs_no_room_for_all_private_spaces_side_by_side():
    """L r = 32 exceeds b and a, L q = 24 is far below (L - 1)(a - R) = 98."""
    shape = (8, 24, 22, 4, 1)
    assert pencil_start(LayerStack(planted(0, *shape).values), RankBudget(4, 1)) is None
    for seed in range(3):
        stack = LayerStack(planted(seed, *shape).values)
        solution = solve_rasa(stack, RankBudget(4, 1))
        assert solution.start == "common"
        assert solution.error <= 1e-20 * stack.norm_squared


@pytest.mark.parametrize("shape", SMALL)
@pytest.mark.parametrize("seed", range(2))
def test_a_pool_of_which_each_layer_uses_about_half(shape, seed):
    """Then no direction is common to all layers, and it is the pencil that finds the factors."""
    *_, r, k = shape
    truth = planted_factors(seed, *shape)
    used = (np.arange(shape[0])[:, None] + np.zeros(shape[0] * k)) % 2  # every second layer, another choice per term
    used = torch.as_tensor(np.random.default_rng(seed).permuted(used, axis=0))
    truth = dataclasses.replace(truth, mixing=truth.mixing * used)
    stack = LayerStack(torch.stack([truth.update(i) for i in range(shape[0])]))
    solution = solve_rasa(stack, RankBudget(r, k))
    assert solution.start == "pencil"
    assert solution.error <= 1e-20 * stack.norm_squared
    assert max(largest_angle(truth, solution.factors)) <= 1e-5


# ---- under noise


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "eta", "seed"),
    [*((s, eta, 0) for s in SMALL for eta in (1e-3, 0.1, 0.3)), (SMALL[1], 0.1, 7), (LARGER, 0.3, 6)],
)
def test_under_noise_the_error_is_what_statistics_leave(shape, eta, seed):
    """The last two are seeds at which private spaces not weighted by energy leave single layers in local minima."""
    *_, r, k = shape
    stack, energy = with_noise(seed, shape, eta)
    solution = solve_rasa(stack, RankBudget(r, k), SolverOptions(start="common", max_sweeps=60))
    assert solution.error == pytest.approx(left_over(*shape) * energy, rel=0.02)


def test_of_several_pencils_the_best_counts():
    """A single one multiplies small noise by thousands at some of these seeds, the best of four by tens at most."""
    shape = SMALL[0]
    for seed in range(20):
        stack, energy = with_noise(seed, shape, 1e-6)
        assert reconstruction_error(stack, pencil_start(stack, RankBudget(4, 2), seed)) <= 100 * energy


@pytest.mark.parametrize("seed", range(3))
def test_directions_near_the_noise_hardly_count(seed):
    """Before any sweep the error is within a quarter of what statistics leave; with equal weights a half above."""
    stack, energy = with_noise(seed, SMALL[2], 0.3)
    error = reconstruction_error(stack, common_start(stack, RankBudget(3, 3)))
    assert error <= 1.25 * left_over(*SMALL[2]) * energy


@pytest.mark.slow
def test_a_miss_does_not_look_like_a_hit():
    """Both end; the certified floor tells them apart, by a factor."""
    shape = SMALL[0]
    stack, budget = with_noise(0, shape, 0.1)[0], RankBudget(4, 2)
    floor = lower_bound(stack, budget).value
    hit, miss = (
        solve_rasa(stack, budget, SolverOptions(start=name, max_sweeps=60)).error for name in ("best", "random")
    )
    assert hit <= 1.6 * floor
    assert miss >= 2 * floor


# ---- other stacks


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_shared_bases_reach_their_optimum(seed):
    problem = shared_bases(seed)
    solution = solve_rasa(LayerStack(problem.values), problem.budget, SolverOptions(seed=seed))
    assert solution.error == pytest.approx(problem.e_rasa, rel=1e-9)


@pytest.mark.parametrize("seed", range(10))
def test_small_planted_stacks_reach_zero(seed):
    stack = LayerStack(planted(seed).values)
    assert solve_rasa(stack, RankBudget(2, 1)).error <= 1e-20 * stack.norm_squared


def test_on_bundled_updates_neither_promises_anything():
    for stack in load("minilm-code")[0][::3]:  # one that reads the residual stream, one that writes it
        for k in (1, 4, 8):
            assert not any(
                start.is_worth_racing(stack.unit(), RankBudget(8, k))
                for start in STARTS.values()
                if start.is_worth_racing is not None
            )


# ---- where they do not apply


@pytest.mark.parametrize(
    ("values", "r", "k"),
    [
        (noise(1, 9, 8), 2, 1),  # one layer
        (noise(3, 9, 8), 2, 0),  # no pool
        (noise(3, 5, 5), 4, 2),  # R = 6 exceeds b and a
        (noise(3, 8, 8), 5, 1),  # private spaces meet, and L r exceeds b and a
        (np.zeros((3, 9, 8)), 2, 1),
    ],
)
@BOTH
def test_where_the_conditions_fail_allocation_takes_the_place(name, values, r, k):
    stack, budget = LayerStack(values), RankBudget(r, k)
    assert ALGEBRAIC[name](stack, budget) is None
    assert not STARTS[name].is_worth_racing(stack.unit(), budget)
    solution = solve_rasa(stack, budget, SolverOptions(start=name, max_sweeps=3))
    assert solution.start == "allocation"
    assert not_above(solution.error, allocation_bound(stack, budget).value, stack.rounding)


@BOTH
@given(problem=nasty_stacks())
def test_no_stack_makes_them_crash(name, problem):
    stack, budget = problem.stack, problem.budget
    factors = ALGEBRAIC[name](stack.unit(), budget, 0)
    if factors is not None:
        assert math.isfinite(reconstruction_error(stack.unit(), factors))
    solve_rasa(stack, budget, SolverOptions(start=name, max_sweeps=2))


@BOTH
def test_a_path_over_k_goes_through(name):
    stack = LayerStack(planted(0, 3, 12, 11, 3, 1).values)
    path = solve_path(stack, 3, range(4), SolverOptions(start=name, max_sweeps=20))
    assert path[0].start == "allocation"
    assert path[1].error <= 1e-20 * stack.norm_squared
    assert all(not_above(path[k + 1].error, path[k].error, stack.rounding) for k in range(3))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_the_bounds_holds_from_the_race(seed):
    for values, r, k in ((with_noise(seed, (4, 20, 18, 2, 2), 1.0)[0].values, 2, 2), (noise(4, 20, 18, seed), 3, 1)):
        stack, budget = LayerStack(values), RankBudget(r, k)
        e_alloc = allocation_bound(stack, budget).value
        assert not_above(
            solve_rasa(stack, budget, SolverOptions(max_sweeps=30, effort="quick")).error, e_alloc, stack.rounding
        )
        assert not_above(e_alloc, solve_lora(stack, r).error, stack.rounding)


# ---- seeds, scales and dtypes


@BOTH
def test_the_same_seed_gives_the_same_factors(name):
    stack, budget = with_noise(0, SMALL[2], 0.1)[0], RankBudget(3, 3)
    one, two, other = (ALGEBRAIC[name](stack, budget, seed) for seed in (0, 0, 1))
    assert all(torch.equal(x, two.named()[key]) for key, x in one.named().items())
    assert not torch.equal(one.mixing, other.mixing)


@BOTH
@pytest.mark.parametrize("c", [2.0**-300, 2.0**300])
def test_a_power_of_two_changes_no_digit(name, c):
    M, budget = planted(0, 3, 12, 11, 3, 1).values, RankBudget(3, 1)
    one, other = (ALGEBRAIC[name](LayerStack(x).unit(), budget) for x in (M, c * M))
    assert torch.equal(one.mixing, other.mixing)
    assert torch.equal(one.private_B, other.private_B)


@pytest.mark.parametrize("shape", SMALL)
def test_float32_is_exact_to_its_own_rounding(shape):
    *_, r, k = shape
    stack = LayerStack(planted(0, *shape).values.astype(np.float32))
    solution = solve_rasa(stack, RankBudget(r, k))
    assert solution.factors.mixing.dtype == torch.float32
    assert math.sqrt(solution.error) <= 10 * stack.rounding


@BOTH
def test_the_transposed_stack_has_the_transposed_factors(name):
    stack, budget = LayerStack(planted(0, 3, 12, 11, 3, 1).values), RankBudget(3, 1)
    one, other = ALGEBRAIC[name](stack, budget), ALGEBRAIC[name](stack.transpose(), budget).transpose()
    assert max(largest_angle(one, other)) <= 1e-6


def test_common_finds_the_pools_spaces():
    shape = SMALL[0]
    truth, spectrum = planted_factors(0, *shape), subspaces.shared_subspace_spectrum
    assert float(spectrum(LayerStack(planted(0, *shape).values), 14).columns[11]) == pytest.approx(1.0, abs=1e-12)
    factors = common_start(LayerStack(planted(0, *shape).values), RankBudget(4, 2))
    for found, planted_ in ((factors.shared_B, truth.shared_B), (factors.shared_A.mT, truth.shared_A.mT)):
        Q = torch.linalg.qr(planted_)[0]
        assert float(torch.linalg.vector_norm(found - Q @ (Q.mT @ found))) <= 1e-10


@pytest.mark.slow
def test_the_recovery_experiment_on_a_small_shape():
    shape = (6, 40, 36, 3, 1)
    exact, noisy = (recovery.attempt(shape, noise, 0, "best", 100) for noise in (0.0, 0.01))
    assert recovery.degrees_of_freedom(shape) == 6 * 2 * 74 + 6 * 74 + 36
    assert exact["recovered"] == noisy["recovered"] == 1
    assert exact["error"] <= 1e-18
    assert noisy["error"] == pytest.approx(1, abs=0.02)
    assert noisy["distance"] == pytest.approx(1, abs=0.15)
