"""Sweeps on the core: the plain sweeps where it is all of M, exact errors and sound bases where it is not."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from rasa_theory import (
    LayerStack,
    RankBudget,
    RasaFactors,
    SolverOptions,
    load,
    reconstruction_error,
    solve_lora,
    solve_rasa,
)
from rasa_theory.solvers import CoreSweep, Side, allocation_start, gradient, random_start, update_private
from rasa_theory.solvers.accuracy import cancellation, layer_sizes
from rasa_theory.solvers.sweeps import bounded
from rasa_theory.solvers.sweeps.bounded import bounded_sweeps
from tests.helpers import reference
from tests.helpers.problems import falling

# (L, b, a, r, k), wider than 3 (R + q): bases that grow and are cut down; no pool; no private terms; one layer; ..
NARROW = [(3, 60, 50, 3, 1), (3, 60, 50, 2, 0), (3, 50, 60, 2, 2), (1, 40, 50, 3, 1), (4, 90, 30, 2, 1)]
NARROW += [(2, 14, 14, 3, 1)]  # .. hardly any room


def started(stack, budget, start=allocation_start):
    """The unit stack, a sweep on it, and the state of factors in its units."""
    unit, sweep = stack.unit(), CoreSweep(stack.unit())
    factors = update_private(unit, start(unit, budget, 0)).normalised()
    return unit, sweep, sweep.begin(factors, reconstruction_error(unit, factors))


def plain(factors):
    return reference.Factors(*(t.numpy() for t in factors.named().values()))


def largest(x):
    return float(x.abs().max()) if x.numel() else 0.0


@pytest.mark.slow
@pytest.mark.parametrize(("L", "b", "a", "r", "k"), NARROW)
@pytest.mark.parametrize("start", [allocation_start, pytest.param(random_start, marks=pytest.mark.slow)])
def test_the_error_from_the_core_is_the_residual_and_the_bases_are_sound(L, b, a, r, k, start):
    stack, budget = LayerStack(falling(L, b, a)), RankBudget(r, k)
    unit, sweep, state = started(stack, budget, start)
    q, R = budget.private_rank, budget.pool_rank(L)
    before = reconstruction_error(unit, state.factors)
    for _ in range(12):
        state, error = sweep(state)
        f = state.factors
        assert error <= before * (1 + 1e-12)
        before = error
        assert error == pytest.approx(reconstruction_error(unit, f), rel=1e-12)
        for side, view, n in ((state.columns, unit, b), (state.rows, unit.transpose(), a)):
            U, eye = side.U, torch.eye(side.width, dtype=torch.float64)
            assert side.width <= max(3 * (R + q), n // 2) or side.is_whole
            assert largest(U.mT @ U - eye) <= 1e-13
            assert torch.equal(U[:, :, : side.common.shape[1]], side.common.expand(L, -1, -1))
            before_fresh = torch.cat([side.Z, view.values.mT @ side.fresh], 2)
            assert largest(side.turned(before_fresh) - view.values.mT @ U) <= 1e-13
        common = state.columns.common
        assert largest(common @ (common.mT @ f.shared_B) - f.shared_B) <= 1e-12


def test_private_columns_after_one_that_the_pool_has_too_keep_their_place():
    """The first column of B~_i depends on the pool's basis; what stands in for it must not cost the second one."""
    unit, budget = LayerStack(falling(2, 14, 14)).unit(), RankBudget(3, 1)
    f = random_start(unit, budget, 0, size=0.3)
    own = torch.randn(2, 14, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    f = dataclasses.replace(f, private_B=torch.cat([f.shared_B[:, :1].expand(2, 14, 1), own], 2))
    side = Side.of(unit, f)
    for _ in range(6):
        assert largest(side.U @ (side.U.mT @ f.private_B) - f.private_B) <= 1e-12
        assert largest(side.common @ (side.common.mT @ f.shared_B) - f.shared_B) <= 1e-12
        side, _ = side.multiplied(unit).cut_down(f)
        side = side.with_directions(f.shared_B, torch.zeros_like(f.private_B))  # nothing new, twice


@pytest.mark.parametrize("gap", [1e-3, 3e-4])
def test_nearly_parallel_pool_terms_are_not_lost_in_float32(gap):
    """Terms w b a^T and -w (b + gap c)(a + gap e)^T with w = 8: a basis without the small differences costs more."""
    generator = torch.Generator().manual_seed(0)
    B, A = (torch.linalg.qr(torch.randn(n, 3, generator=generator, dtype=torch.float64))[0] for n in (80, 70))
    near = [X[:, :2] @ torch.tensor([[1.0, 1.0], [0.0, gap]], dtype=torch.float64) for X in (B, A)]
    D = torch.tensor([[8.0, -8.0], [4.0, -4.0]], dtype=torch.float64)
    f = RasaFactors(torch.zeros(2, 80, 0), torch.zeros(2, 0, 70), near[0], near[1].mT, D).to(torch.float64).normalised()
    M = torch.stack([f.update(i) for i in range(2)]) + 1e-3 * torch.as_tensor(falling(2, 80, 70))
    stack = LayerStack(M.float())
    unit, given = stack.unit(), f.to(torch.float32).scaled(1 / stack.scale)
    sweep = CoreSweep(unit)
    _, error = sweep(sweep.begin(given, math.nan))
    assert error <= reconstruction_error(unit, given) * (1 + 1e-6)


def test_a_basis_that_is_cut_down_keeps_the_pool():
    """Most of its dimensions are own: a share of the width for the common ones would be less than R."""
    unit, budget = LayerStack(falling(3, 60, 50)).unit(), RankBudget(3, 2)
    f = random_start(unit, budget, 0, size=0.3)
    f = dataclasses.replace(f, private_B=torch.as_tensor(falling(3, 60, 1)))
    side = Side.of(unit, f)
    own = torch.as_tensor(falling(3, 60, 30, seed=1))
    side = side.multiplied(unit).with_directions(f.shared_B[:, :0], own).multiplied(unit)
    side, _ = side.restricted(f, 10)
    assert side.width == 10
    assert largest(side.common @ (side.common.mT @ f.shared_B) - f.shared_B) <= 1e-12
    assert largest(side.U @ (side.U.mT @ f.private_B) - f.private_B) <= 1e-12


def test_a_layer_that_owns_no_pool_term_keeps_its_private_ones():
    """Allocation gives the pool to two layers; the third is not lost from the common basis for it."""
    stack, budget = LayerStack(falling(3, 60, 50) * np.array([1, 1, 0.1])[:, None, None]), RankBudget(3, 1)
    _, _, state = started(stack, budget)
    f, common = state.factors, state.columns.common
    assert not f.mixing[2].any()
    assert largest(common @ (common.mT @ f.private_B) - f.private_B) <= 1e-12


@pytest.mark.parametrize(("L", "b", "a", "r", "k"), NARROW)
def test_new_directions_are_the_gradient_outside_the_basis(L, b, a, r, k):
    """By differences of the error: -1/2 its gradient with respect to A_S, and to A~_i for orthonormal B~_i."""
    stack, budget = LayerStack(falling(L, b, a)), RankBudget(r, k)
    unit, sweep, state = started(stack, budget)
    state, _ = sweep(state)
    side = state.columns.multiplied(unit)
    common, own = gradient(side.Z, side, state.factors, unit.layer_norms())
    p, M = plain(state.factors), unit.values.numpy()
    E = reference.residuals(M, *p)
    literal = sum(E[i].T @ p.B_S @ np.diag(p.D[i]) for i in range(L))
    if np.abs(literal).max(initial=0) > 1e-12:
        assert np.allclose(common.numpy(), literal, atol=1e-12)
    for i in range(L):
        projector = p.Bt[i] @ np.linalg.pinv(p.Bt[i])
        products = E[i].T @ projector @ E[i]
        if np.abs(products).max() > 1e-12 * np.abs(E[i]).max() ** 2:
            assert np.allclose(own[i].numpy() @ own[i].numpy().T, products, atol=1e-12)


def test_directions_that_are_rounding_noise_give_place_to_what_the_residual_shows():
    """At singular vectors the gradient is rounding: its last bits must not decide where the sweeps go."""
    stack, budget = LayerStack(falling(3, 60, 50)), RankBudget(3, 1)
    unit = stack.unit()
    f = allocation_start(unit, budget).normalised()
    side = Side.of(unit, f)
    E = reference.residuals(unit.values.numpy(), *plain(f))
    assert max(np.abs(E[i].T @ f.private_B[i].numpy()).max() for i in range(3)) <= 1e-12
    Z = side.multiplied(unit).Z
    found = [gradient(Z + shift, side, f, unit.layer_norms()) for shift in (0, 1e-16)]
    for first, second in zip(*found, strict=True):
        assert float(torch.linalg.vector_norm(first, dim=-2).min()) >= 1e-3
        assert largest(first - second) <= 1e-12


def test_a_small_stack_is_read_once():
    stack, budget = LayerStack(falling(3, 6, 6)), RankBudget(2, 0)  # without a pool nothing cancels: no residuals
    _, sweep, state = started(stack, budget)
    passes = stack.data_passes
    for _ in range(5):
        state, _ = sweep(state)
    assert stack.data_passes == passes + 1  # M^T I


def test_a_sweep_remembers_nothing_but_its_state():
    """A state begun with the same factors gives the same numbers, whatever the sweep did before."""
    stack, budget = LayerStack(falling(3, 60, 50)), RankBudget(3, 1)
    _, sweep, state = started(stack, budget)
    f = state.factors
    sweep(sweep(state)[0])
    again, error = sweep(sweep.begin(f, math.nan))
    _, fresh, expected = started(stack, budget)
    expected, expected_error = fresh(expected)
    assert error == expected_error
    assert torch.equal(again.factors.mixing, expected.factors.mixing)


@pytest.mark.slow
@pytest.mark.parametrize("k", [2, *(pytest.param(k, marks=pytest.mark.slow) for k in (1, 4, 8))])
def test_thirty_passes_are_worth_more_than_three_hundred_joint_sweeps(k):
    """On a crop of the bundled updates, from the same start: less than their error, within 30 passes of their 600.

    Terms may cancel more than by default: k = 2 ends at the default's limit otherwise, 1.5e-5 above plain sweeps.
    """
    query = next(stack for stack in load("minilm-code")[0] if stack.name == "query")
    stack, budget = LayerStack(query.values[:, :160, :160]), RankBudget(8, k)
    if k == 8:
        stack, budget = LayerStack(query.values[:4, :160, :160]), RankBudget(8, k)
    solve_lora(stack, 8)
    plain_run = solve_rasa(stack, budget, SolverOptions(start="allocation", sweep="joint", max_sweeps=300, rtol=0))
    passes = stack.data_passes
    run = solve_rasa(stack, budget, SolverOptions(start="allocation", max_sweeps=15, rtol=0, max_cancellation=20))
    assert run.error <= plain_run.error
    assert stack.data_passes - passes <= 32  # the start's residual and the final one on top


@pytest.mark.parametrize("scale", [0.37, 0.61, 1.0])
def test_bases_stay_orthonormal_where_the_layers_share_their_singular_vectors(scale):
    """New directions of one layer then lie in the bases of others, round after round."""
    rng = np.random.default_rng(0)
    U, V = np.linalg.qr(rng.standard_normal((20, 20)))[0][:, :18], np.linalg.qr(rng.standard_normal((18, 18)))[0]
    S = [rng.standard_normal(18) * np.arange(1, 19) ** -0.5 for _ in range(4)]
    unit = LayerStack(scale * np.stack([(U * s) @ V.T for s in S])).unit()
    sweep = CoreSweep(unit)
    state = sweep.begin(allocation_start(unit, RankBudget(3, 1)).normalised(), 0.0)
    for _ in range(3):
        state, error = sweep(state)
        for side in (state.columns, state.rows):
            assert largest(side.U.mT @ side.U - torch.eye(side.width, dtype=side.U.dtype)) <= 1e-12
        direct = reconstruction_error(unit, sweep.point(state))
        assert abs(error - direct) <= 1e-12 * unit.norm_squared


def test_sweeps_at_the_bound_go_on_with_the_multipliers_of_those_before(monkeypatch):
    unit = LayerStack(load("minilm-code")[0][0].values[:3, :12, :10]).unit()
    given, real = [], bounded.BatchedSweeps

    def watched(K, batch, limits, common, multipliers):
        given.append(multipliers)
        return real(K, batch, limits, common, multipliers)

    monkeypatch.setattr(bounded, "BatchedSweeps", watched)
    f, limits, before = random_start(unit, RankBudget(3, 3), 0, 0.5), 1.2 * layer_sizes(unit), None
    for _ in range(3):
        f, _, multipliers = bounded_sweeps(unit.values, f, unit.shape, 20, limits, before)
        assert given[-1] is before
        assert multipliers.pool.any()
        before = multipliers


def test_sweeps_from_a_point_at_the_bound_go_on():
    """The multipliers need some sweeps to settle: eight of them alone end above the start."""
    unit = LayerStack(load("minilm-code")[0][0].values[:3, :12, :10]).unit()
    options = SolverOptions(start="near-allocation", seed=3, max_sweeps=3, max_cancellation=1.2)
    start = solve_rasa(unit, RankBudget(3, 3), options)
    assert start.cancellation == pytest.approx(1.2)
    limits = 1.2 * layer_sizes(unit)
    factors, error, _ = bounded_sweeps(unit.values, start.factors, unit.shape, 8, limits, None)
    assert error == pytest.approx(reconstruction_error(unit, factors), rel=1e-9)
    assert error < 0.99 * start.error
    assert cancellation(unit, factors) <= 1.2 * (1 + 1e-9)
