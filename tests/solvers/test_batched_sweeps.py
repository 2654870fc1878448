"""Sweeps on many factors side by side: the joint sweep, literal minimisers with multipliers, and the bound on terms."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor

from rasa_theory import LayerStack, RankBudget, RasaFactors
from rasa_theory.solvers import Batch, BatchedSweeps, Multipliers, inside, random_start, refitted, updates
from rasa_theory.solvers.search import sweeps, update_private
from tests.helpers.problems import falling, noise, orthogonal_columns, random_factors

RANKS = pytest.mark.parametrize(("r", "k"), [(3, 1), (2, 2)])  # q = 2 and q = 0
NO_LIMIT = torch.full((3,), math.inf, dtype=torch.float64)


def started(r: int, k: int, seed: int, L: int = 3, b: int = 9, a: int = 7) -> tuple[LayerStack, RasaFactors]:
    """A stack and factors with private terms, from a random pool."""
    stack = LayerStack(falling(L, b, a))
    return stack, updates.with_private_terms(stack, random_start(stack, RankBudget(r, k), seed, 0.5)).normalised()


def all_updates(batch: Batch) -> Tensor:
    return batch.Bt @ batch.At + batch.pool_updates()


def random_multipliers(D: Tensor, size: float) -> Multipliers:
    generator = torch.Generator().manual_seed(0)
    pool, private = (size * torch.rand(shape, generator=generator).double() for shape in (D.shape, D.shape[:2]))
    return Multipliers(pool, private)


def literal_value(K: Tensor, batch: Batch, multipliers: Multipliers) -> Tensor:
    """||E||^2, and the multipliers times the squared norms of pool terms and of B~_i A~_i."""
    norms = torch.linalg.vector_norm(batch.B, dim=1) * torch.linalg.vector_norm(batch.A, dim=2)
    terms = (batch.D * norms[:, None]) ** 2
    private = ((batch.Bt @ batch.At) ** 2).sum((2, 3))
    fit = (batch.residual(K) ** 2).sum((1, 2, 3))
    return fit + (multipliers.pool * terms).sum((1, 2)) + (multipliers.private * private).sum(1)


# ---- a batch


def test_a_batch_gives_its_factors_back_and_their_updates() -> None:
    factors = [random_factors(3, 6, 5, 3, 1, seed) for seed in range(3)]
    batch = Batch.of(factors)
    for one, other in zip(factors, batch.factors(), strict=True):
        assert all(torch.allclose(x, other.named()[name]) for name, x in one.named().items())
    expected = torch.stack([torch.stack([f.update(i) for i in range(3)]) for f in factors])
    assert torch.allclose(all_updates(batch), expected, atol=1e-13)
    assert torch.allclose(all_updates(batch.transpose()), expected.mT, atol=1e-13)
    K = torch.as_tensor(noise(3, 6, 5))
    assert torch.allclose(batch.residual(K), K - expected, atol=1e-13)


def test_parts_of_batches() -> None:
    one, other = (Batch.of([random_factors(3, 6, 5, 3, 1, 10 * n + seed) for seed in range(2)]) for n in range(2))
    both = one.joined(other)
    assert torch.equal(both.select(torch.tensor([3, 0])).D, torch.stack([other.D[1], one.D[0]]))
    mixed = one.where(torch.tensor([True, False]), other)
    assert torch.equal(mixed.Bt, torch.stack([one.Bt[0], other.Bt[1]]))


def test_beyond_is_a_straight_line_with_unit_columns_where_sweeps_look() -> None:
    one, other = (Batch.of([random_factors(3, 6, 5, 3, 1, seed)] * 2) for seed in range(2))
    found = one.beyond(other, torch.tensor([0.0, 1.5]).double())
    assert torch.allclose(all_updates(found)[0], all_updates(one)[0], atol=1e-13)
    line = Batch(one.Bt, *(x + 1.5 * (x - y) for x, y in zip(one[1:], other[1:], strict=True)))
    assert torch.allclose(all_updates(found)[1], all_updates(line)[1], atol=1e-12)
    assert torch.allclose(torch.linalg.vector_norm(found.B, dim=1), torch.ones(2, 3).double())
    assert torch.allclose(torch.linalg.vector_norm(found.A, dim=2), torch.ones(2, 3).double())


@RANKS
def test_private_terms_are_the_best_beside_the_pool_and_refitted_weights_lower_the_error(r: int, k: int) -> None:
    K = torch.as_tensor(noise(3, 6, 5))
    batch = Batch.of([random_factors(3, 6, 5, r, k, seed) for seed in range(2)])
    best = update_private(K, batch)
    left = torch.linalg.svdvals(K - batch.pool_updates())[..., r - k :]
    errors = (best.residual(K) ** 2).sum((1, 2, 3))
    assert torch.allclose(errors, (left**2).sum((1, 2)))
    assert torch.equal(best.D, batch.D)
    again = refitted(K, batch)
    assert torch.equal(again.B, batch.B)
    assert bool(((again.residual(K) ** 2).sum((1, 2, 3)) < 0.9 * errors).all())


# ---- without multipliers


@RANKS
def test_without_multipliers_a_sweep_is_the_joint_sweep(r: int, k: int) -> None:
    stack, f = started(r, k, 0)
    for _ in range(8):
        half = updates.joint_sweep((stack.right, stack.left), stack.layer_norms(), f)
        found = BatchedSweeps(stack.values, Batch.of([f]), NO_LIMIT).run(1)
        expected = torch.stack([half.factors.update(i) for i in range(3)])
        assert torch.allclose(all_updates(found.batch)[0], expected, atol=1e-9)
        assert float(found.errors[0]) == pytest.approx(float(half.error), rel=1e-9)
        f = half.factors


@RANKS
@pytest.mark.parametrize("common", [(5, 4), (9, 4), (5, 7)])
def test_only_leading_rows_and_columns_of_the_pool_move(r: int, k: int, common: tuple[int, int]) -> None:
    stack, f = started(r, k, 0)
    B, A = f.shared_B.clone(), f.shared_A.clone()
    B[common[0] :], A[:, common[1] :] = 0.0, 0.0
    f = RasaFactors(f.private_B, f.private_A, B, A, f.mixing).normalised()
    half = updates.joint_sweep((stack.right, stack.left), stack.layer_norms(), f, common)
    found = BatchedSweeps(stack.values, Batch.of([f]), NO_LIMIT, common).run(1)
    expected = torch.stack([half.factors.update(i) for i in range(3)])
    assert torch.allclose(all_updates(found.batch)[0], expected, atol=1e-9)
    assert not found.batch.B[:, common[0] :].any()
    assert not found.batch.A[:, :, common[1] :].any()


@RANKS
def test_side_by_side_each_does_what_it_does_alone(r: int, k: int) -> None:
    """Strides included: twelve sweeps, in which some extrapolations pay and others do not."""
    starts = [started(r, k, seed) for seed in range(3)]
    K = starts[0][0].values
    together = BatchedSweeps(K, Batch.of([f for _, f in starts]), NO_LIMIT).run(12)
    for n, (_, f) in enumerate(starts):
        alone = BatchedSweeps(K, Batch.of([f]), NO_LIMIT).run(12)
        assert float(together.errors[n]) == pytest.approx(float(alone.errors[0]), rel=1e-9)
        assert torch.allclose(all_updates(together.batch)[n], all_updates(alone.batch)[0], atol=1e-7)


@RANKS
@pytest.mark.parametrize("limit", [math.inf, 1.0])
def test_errors_are_the_residuals_of_the_batch_and_never_rise_without_a_bound(r: int, k: int, limit: float) -> None:
    starts = [started(r, k, seed) for seed in range(3)]
    K = starts[0][0].values
    running = BatchedSweeps(K, Batch.of([f for _, f in starts]), limit * torch.linalg.matrix_norm(K))
    before = torch.full((3,), math.inf).double()
    for _ in range(30):
        running.run(1)
        direct = (running.batch.residual(K) ** 2).sum((1, 2, 3))
        assert torch.allclose(running.errors, direct, rtol=1e-9, atol=1e-12)
        if limit == math.inf:
            assert bool((running.errors <= before * (1 + 1e-12)).all())
        before = running.errors


@RANKS
def test_strides_grow_where_they_pay_and_shrink_where_they_do_not(r: int, k: int) -> None:
    """Sweep by sweep beside the rule for one factor."""
    stack, f = started(r, k, 1)
    K, norm = stack.values, stack.norm_squared
    running = BatchedSweeps(K, Batch.of([f]), NO_LIMIT)
    point = before = Batch.of([f])
    error, stride, strides = math.inf, 0.0, []
    for _ in range(40):
        running.run(1)
        batch = point.beyond(before, torch.tensor([stride]).double())
        for side in (K, K.mT):
            batch, value = sweeps.batched_half(side, norm, batch, Multipliers.zero(batch.D), None)
            batch = batch.transpose()
        if float(value) < error:
            before, point, error = point, batch, float(value)
            stride = 1.3 * stride if stride else 1.0
        else:
            stride = stride / 2 if stride > 0.5 else 0.0
        strides.append(stride)
        assert float(running.errors[0]) == pytest.approx(error, rel=1e-6)  # rounding grows
    assert any(late < early for early, late in pairwise(strides))
    assert max(strides) > 2


def test_runs_are_cut_and_joined_with_all_that_they_remember() -> None:
    """Two that run on side by side, and the same two parted and brought together again."""
    starts = [started(3, 1, seed) for seed in range(3)]
    K, batch = starts[0][0].values, Batch.of([f for _, f in starts])
    limits = torch.linalg.matrix_norm(K) / 2
    plain, parted = (BatchedSweeps(K, batch, limits).run(5) for _ in range(2))
    last = BatchedSweeps(K, batch, limits).run(5)
    last.select(torch.tensor([2]))
    parted.select(torch.tensor([1]))
    parted.join(last)
    plain.run(5)
    parted.run(5)
    assert torch.allclose(parted.errors, plain.errors[1:], rtol=1e-9)
    assert torch.allclose(parted.multipliers.pool, plain.multipliers.pool[1:], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_layers_without_curvature_do_not_blow_up(seed: int) -> None:
    """A zero layer, and pool terms that become parallel: its Gram matrix is rounding alone, and indefinite."""
    M = np.random.default_rng(0).standard_normal((2, 5, 5))
    M[1] = 0
    K, budget = torch.as_tensor(M), RankBudget(3, 1)
    batch = Batch.of([random_start(LayerStack(K), budget, 10 * seed + n, 0.7) for n in range(10)])
    limits = 8 * torch.linalg.matrix_norm(K).clamp_min(1e-14)
    running = BatchedSweeps(K, update_private(K, batch), limits)
    for _ in range(300):
        running.run(1)
        assert torch.allclose(running.errors, (running.batch.residual(K) ** 2).sum((1, 2, 3)), atol=1e-6)
    assert float(running.batch.D.abs().max()) <= 100


def test_where_cholesky_fails_nothing_moves() -> None:
    G = torch.tensor([[[1.0, 1.0], [1.0, 1.0 - 1e-9]], [[2.0, 0.0], [0.0, 2.0]]], dtype=torch.float64)
    found = sweeps.solved(G, torch.ones(2, 2, 1).double(), torch.ones(()).double())
    assert found[:, :, 0].tolist() == [[0.0, 0.0], pytest.approx([0.5, 0.5])]


# ---- with multipliers


def minimiser(residuals: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """The x (size,) that minimises ||residuals(x)||^2, for residuals affine in x."""
    first = residuals(torch.zeros(size).double())
    J = torch.stack([residuals(e) - first for e in torch.eye(size).double()], 1)
    return torch.linalg.lstsq(J, -first[:, None], driver="gelsd").solution[:, 0]


@RANKS
def test_a_half_sweep_is_the_literal_minimiser_with_multipliers(r: int, k: int) -> None:
    """All B~_i and B_S for the given D, then all B~_i and D for that B_S with unit columns."""
    L, b, a, q, R = 3, 5, 4, r - k, 3 * k
    K = torch.as_tensor(noise(L, b, a))
    batch = Batch.of([random_factors(L, b, a, r, k, 0)])
    batch = batch._replace(At=torch.linalg.qr(batch.At.mT)[0].mT)
    multipliers = random_multipliers(batch.D, 2.0)
    mu, nu = multipliers.pool[0], multipliers.private[0]
    _, At, _, A, D = (part[0] for part in batch)

    def stacked(Bt: Tensor, B: Tensor, D: Tensor) -> Tensor:
        E = K - Bt @ At - (B * D[:, None]) @ A
        terms = mu.sqrt()[:, None] * D[:, None] * B  # rows of A are of unit norm
        return torch.cat([E.flatten(), terms.flatten(), (nu.sqrt()[:, None, None] * (Bt @ At)).flatten()])

    n = L * b * q
    x = minimiser(lambda x: stacked(x[:n].reshape(L, b, q), x[n:].reshape(b, R), D), n + b * R)
    B = x[n:].reshape(b, R)
    B = B / torch.linalg.vector_norm(B, dim=0)
    x = minimiser(lambda x: stacked(x[:n].reshape(L, b, q), B, x[n:].reshape(L, R)), n + L * R)
    found, values = sweeps.batched_half(K, float((K * K).sum()), batch, multipliers, None)
    sign = torch.sign((found.B[0] * B).sum(0))
    assert torch.allclose(found.B[0] * sign, B, atol=1e-7)
    assert torch.allclose(found.D[0] * sign, x[n:].reshape(L, R), atol=1e-7)
    assert torch.allclose(found.Bt[0] @ At, x[:n].reshape(L, b, q) @ At, atol=1e-7)
    assert float(values[0]) == pytest.approx(float(literal_value(K, found, multipliers)[0]), rel=1e-10)


@RANKS
def test_what_is_minimised_never_rises_while_the_multipliers_stay(r: int, k: int) -> None:
    starts = [started(r, k, seed) for seed in range(3)]
    K, batch = starts[0][0].values, Batch.of([f for _, f in starts])
    norm, multipliers = float((K * K).sum()), random_multipliers(batch.D, 0.2)
    before = torch.full((3,), math.inf).double()
    for _ in range(20):
        for side in (K, K.mT):
            batch, values = sweeps.batched_half(side, norm, batch, multipliers, None)
            assert torch.allclose(values, literal_value(side, batch, multipliers), rtol=1e-9)
            assert bool((values <= before * (1 + 1e-12)).all())
            before, batch = values, batch.transpose()


def test_multipliers_begin_small_grow_beyond_the_limit_and_switch_off_below() -> None:
    mu = torch.tensor([[[0.0, 0.0, 1e-3, 1e-3, 1e-7]]]).double()
    norms = torch.tensor([[[0.9, 2.0, 1.5, 0.01, 0.3]]]).double()
    found = Multipliers(mu, torch.tensor([[0.1]]).double()).updated(
        Multipliers(norms, torch.tensor([[50.0]]).double()), torch.tensor([1.0]).double()
    )
    assert found.pool.flatten().tolist() == pytest.approx([0.0, 2e-6, 1.5e-3, 2.5e-4, 0.0])
    assert found.private.flatten().tolist() == pytest.approx([0.4])


def test_where_the_bound_is_not_active_the_multipliers_switch_off() -> None:
    """Multipliers that are there for no reason hold the terms small at first, and are gone after some sweeps."""
    K = torch.as_tensor(orthogonal_columns().values)
    batch = update_private(K, Batch.of([random_start(LayerStack(K), RankBudget(2, 1), 0, 0.7)]))
    limits, multipliers = 8 * torch.linalg.matrix_norm(K), random_multipliers(batch.D, 1.0)
    running = BatchedSweeps(K, batch, limits, multipliers=multipliers).run(3)
    free = BatchedSweeps(K, batch, limits).run(200)
    assert float(running.errors[0]) > 1.05 * float(free.errors[0])
    running.run(197)
    assert not running.multipliers.pool.any()
    assert not running.multipliers.private.any()
    assert float(running.errors[0]) == pytest.approx(float(free.errors[0]), rel=1e-3)


BORDER_RANK = torch.tensor([[[0.0, 1.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]]]).double()  # rank 3, border rank 2


def constrained_minimum(K: np.ndarray, limits: np.ndarray, starts: int) -> float:
    """The lowest squared error of K_i = B D_i A, R = 2, with terms of layer i at most limits[i], by SLSQP."""

    def parts(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        B, A, D = x[:4].reshape(2, 2), x[4:8].reshape(2, 2), x[8:].reshape(2, 2)
        return B / np.linalg.norm(B, axis=0), A / np.linalg.norm(A, axis=1)[:, None], D

    def error(x: np.ndarray) -> float:
        B, A, D = parts(x)
        return float(((K - (B * D[:, None]) @ A) ** 2).sum())

    rng = np.random.default_rng(0)
    bounds = [(None, None)] * 8 + [(-limit, limit) for limit in np.repeat(limits, 2)]
    runs = [
        scipy.optimize.minimize(
            error, rng.standard_normal(12), method="SLSQP", bounds=bounds, options={"maxiter": 500, "ftol": 1e-12}
        )
        for _ in range(starts)
    ]
    return min(run.fun for run in runs)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1.0, *(pytest.param(x, marks=pytest.mark.slow) for x in (0.8, 1.5))])
def test_where_the_bound_is_active_the_result_is_the_constrained_minimum(limit: float) -> None:
    """The infimum of this tensor is 0, with terms that grow for ever: within a limit the minimum is above it."""
    limits = limit * torch.linalg.matrix_norm(BORDER_RANK)
    stack = LayerStack(BORDER_RANK)
    batch = Batch.of([random_start(stack, RankBudget(1, 1), seed, 0.7) for seed in range(8)])
    running = BatchedSweeps(BORDER_RANK, batch, limits).run(600)
    batch, errors = inside(BORDER_RANK, running.batch, limits)
    assert bool(running.multipliers.pool[int(errors.argmin())].any())
    assert bool((batch.D.abs() <= limits[:, None]).all())
    lowest, tighter = (constrained_minimum(BORDER_RANK.numpy(), x * limits.numpy(), 20) for x in (1.0, 0.98))
    assert lowest * (1 - 1e-6) <= float(errors.min()) <= tighter * (1 + 1e-3)


@RANKS
@pytest.mark.parametrize("limit", [0.2, 1.0, 8.0])
def test_inside_is_feasible_and_the_error_is_the_residual(r: int, k: int, limit: float) -> None:
    K = torch.as_tensor(noise(3, 6, 5))
    batch = Batch.of([random_factors(3, 6, 5, r, k, seed) for seed in range(4)])
    limits = limit * torch.linalg.matrix_norm(K) * torch.tensor([1.0, 0.5, 1.0]).double()
    found, errors = inside(K, batch, limits)
    private = torch.linalg.matrix_norm(found.Bt @ found.At)
    assert bool((found.D.abs() <= limits[:, None] * (1 + 1e-12)).all())
    assert bool((private <= limits * (1 + 1e-12)).all())
    assert torch.allclose(errors, (found.residual(K) ** 2).sum((1, 2, 3)))
    kept = batch.D.abs() <= limits[:, None]
    assert torch.equal(found.D[kept], batch.D[kept])
    assert torch.equal(torch.sign(found.D), torch.sign(batch.D))
    if limit == 0.2:
        assert not bool(kept.all())
    values = torch.linalg.svdvals(K - found.pool_updates())  # the best of rank q in a ball is the leading part, cut
    size = torch.linalg.vector_norm(values[..., : r - k], dim=-1)
    missed = (torch.linalg.vector_norm(values[..., r - k :], dim=-1) ** 2 + (size - limits).clamp_min(0) ** 2).sum(1)
    assert torch.allclose(errors, missed)
