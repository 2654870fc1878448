"""The searched floors from products: at the same point just below the exact formula, and never above what is found."""

import math

import numpy as np
import pytest
import torch

from rasa_theory import FloorOptions, LayerStack, RankBudget, SolverOptions, linalg, lower_bound, solve_lora, solve_rasa
from rasa_theory.bounds import FAILURE, ProjectedProblem, SearchScale, dual_value, two_sided_value
from rasa_theory.bounds.applied import (
    Capping,
    Side,
    ThinDivision,
    applied_dual_value,
    applied_two_sided_value,
    captured_energy,
)
from tests.helpers.problems import decaying, noise, orthogonal

OPTIONS = FloorOptions(max_iterations=12)


def leading_view(M, budget):
    return LayerStack(M).with_spectra("leading", budget).unit()


def random_point(view, budget, seed, width=20):
    """Any valid division: U of random blocks, uneven s, and Y_i, Y'_i of the size of the layers."""
    rng = np.random.default_rng(seed)
    L, (b, a) = view.layers, view.shape
    T = Capping.of(view, L * budget.rank)
    Vb, Va = (torch.from_numpy(orthogonal(n, seed + n)[:, :width].copy()) for n in (b, a))
    s = torch.from_numpy(rng.uniform(0.2, 0.8, L))
    size = math.sqrt(view.norm_squared / (L * width))
    K, F, H = (
        torch.from_numpy(size * rng.standard_normal(shape)) for shape in ((L, width, a), (L, width, 3), (L, width, 3))
    )
    return ThinDivision(T, Vb, Va, s, torch.from_numpy(rng.uniform(-0.5, 0.5, L)), 0.1 * K, 0.3 * F, 0.3 * H)


def largest(S, m):
    return np.clip(np.linalg.eigvalsh(S)[::-1][:m], 0, None).sum()


def captured(gs, Ys, budget):
    """`CapturedEnergy` in numpy."""
    rest = [g - Y for g, Y in zip(gs, Ys, strict=True)]
    L = len(gs)
    own = sum(largest(x, budget.private_rank) for x in rest)
    return own + largest(sum(Ys), L * budget.rank) + largest(sum(rest), budget.pool_rank(L))


def of_point(unit_M, budget, division):
    """The formula of `two_sided_value` in numpy, from the thin factors of a division."""
    a = unit_M.shape[2]
    W, c, Vb, Va = (x.numpy() for x in (division.T.W, division.T.c, division.Vb, division.Va))
    T = np.eye(a) - (W * c) @ W.T
    columns, rows = [], []
    for M, s, e, K in zip(unit_M, division.s.tolist(), division.e.tolist(), division.K.numpy(), strict=True):
        A = M @ T
        U = A @ (s * np.eye(a) + e * Va @ Va.T) + Vb @ K
        V = A - U
        columns.append(M @ M.T - A @ A.T + U @ U.T / s)
        rows.append(V.T @ V / (1 - s))
    total = (unit_M**2).sum()
    for gs, basis, F in ((columns, Vb, division.F), (rows, Va, division.H)):
        total -= captured(gs, [basis @ f @ f.T @ basis.T for f in F.numpy()], budget)
    return total


@pytest.mark.parametrize(("r", "k"), [(2, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_a_two_sided_point_is_just_below_its_formula(r, k, seed):
    M = decaying(3, 120, 140, seed)
    budget = RankBudget(r, k)
    view = leading_view(M, budget)
    unit_M = np.asarray(M, dtype=np.float64) * math.sqrt(view.norm_squared / (M**2).sum())
    division = random_point(view, budget, seed)
    found, exact = applied_two_sided_value(view, budget, division, seed), of_point(unit_M, budget, division)
    assert exact - 3e-4 * solve_lora(view, r).error <= found <= exact + 1e-12 * view.norm_squared


@pytest.mark.parametrize(("r", "k"), [(2, 1), (3, 2)])
@pytest.mark.parametrize("seed", range(3))
def test_a_dual_point_is_just_below_its_formula(r, k, seed):
    M, budget = decaying(3, 120, 140, seed), RankBudget(r, k)
    for view in (leading_view(M, budget), leading_view(M, budget).transpose()):
        V = torch.from_numpy(orthogonal(view.shape[0], seed)[:, :15].copy())
        F = 0.1 * torch.from_numpy(np.random.default_rng(seed).standard_normal((3, 15, 4)))
        exact, found = dual_value(view, budget, V @ F), applied_dual_value(view, budget, V, F)
        slack = 1e-10 * view.norm_squared  # that `dual_value` takes off for its rounding
        assert exact - 3e-4 * solve_lora(view, r).error <= found <= exact + slack


def test_a_completed_division_is_the_same_thin_or_dense():
    M, budget = decaying(3, 40, 44), RankBudget(2, 1)
    view = leading_view(M, budget)
    capping = Capping.of(view, 6)
    T = capping.times(torch.eye(44, dtype=torch.float64))
    assert float(torch.linalg.eigvalsh(T)[-1]) <= 1 + 1e-14
    problem = ProjectedProblem(view, budget, capping.times, 12, SearchScale.of(view, budget).level)
    rng = np.random.default_rng(0)
    blocks = [x + 0.1 * torch.from_numpy(rng.standard_normal(x.shape)) for x in problem.initial_guess()]
    blocks[1] += torch.tensor([-2.0, 0.0, 1.5])  # s_i far from 1/2
    thin, dense = problem.complete_thin(blocks, capping), problem.complete(blocks, T)
    for i in range(3):
        A = view.values[i] @ T
        U = (
            A @ (thin.s[i] * torch.eye(44, dtype=torch.float64) + thin.e[i] * thin.Va @ thin.Va.mT)
            + thin.Vb @ thin.K[i]
        )
        torch.testing.assert_close(U, dense.U(i, A), rtol=0, atol=1e-12)
    torch.testing.assert_close(thin.Va @ thin.H, dense.H)
    assert applied_two_sided_value(view, budget, thin, 0) == pytest.approx(
        two_sided_value(view, budget, dense), abs=1e-6 * view.norm_squared
    )


@pytest.mark.slow
@pytest.mark.parametrize("certificate", ["dual", "two-sided"])
@pytest.mark.parametrize("kind", ["decaying", "noise", "zero layer", "single precision"])
def test_searched_floors_are_near_those_from_decompositions(certificate, kind):
    M = noise(3, 64, 60, 1) if kind == "noise" else decaying(3, 64, 60, 1)
    if kind == "zero layer":
        M[1] = 0
    if kind == "single precision":
        M = M.astype(np.float32)
    budget = RankBudget(2, 1)
    e_lora = solve_lora(LayerStack(M), 2).error
    exact, found = (lower_bound(LayerStack(M), budget, certificate, OPTIONS, spectra=s) for s in ("exact", "leading"))
    assert found.value == pytest.approx(exact.value, abs=5e-3 * e_lora)
    assert found.value <= solve_rasa(LayerStack(M), budget, SolverOptions("allocation", max_sweeps=5)).error
    assert (found.name, found.failure) == (f"{exact.name}, probable", FAILURE)


def test_a_point_that_is_not_finite_proves_nothing():
    M, budget = decaying(2, 40, 44), RankBudget(1, 1)
    view = leading_view(M, budget)
    division = random_point(view, budget, 0)
    assert math.isfinite(applied_two_sided_value(view, budget, division, 0))
    division.s[1] = 1.0
    assert applied_two_sided_value(view, budget, division, 0) == -math.inf
    assert applied_dual_value(view, budget, division.Vb, division.F * math.inf) == -math.inf


def test_a_captured_energy_counts_every_sum():
    """g_i diagonal, Y_i in the first two axes: each of the three sums has a value that can be read off."""
    M = np.zeros((2, 80, 80))
    view = leading_view(M + 1e-3 * noise(2, 80, 80), RankBudget(2, 1))
    g = [torch.diag(torch.tensor([5.0, 4.0, 3.0] + [0.0] * 77, dtype=torch.float64)) for _ in range(2)]
    V = torch.eye(80, 3, dtype=torch.float64)
    F = torch.tensor([[2.0, 0], [0, 1.0], [0, 0]], dtype=torch.float64).expand(2, 3, 2)
    whole = sum(g)
    side = Side("test", lambda i, _, X: g[i].to(X.dtype) @ X, lambda X: whole.to(X.dtype) @ X, [8.0, 8.0], V, F, 1e-15)
    # Y = diag(4, 1), g - Y = diag(1, 3, 3); sums over layers: 8 + 2, KF_1 = 3 twice, KF_2(2, 6, 6) = 12
    assert captured_energy(view, RankBudget(2, 1), side) == pytest.approx(10 + 6 + 12, rel=1e-5)


def test_the_streams_of_two_stages_differ():
    names = [("two-sided 1 rows", "own", False, 0), ("two-sided 2 rows", "own", False, 0)]
    first, second = (torch.randn(4, generator=linalg.stream(*name)) for name in names)
    assert not torch.equal(first, second)
