"""Majorants of matrices that are only applied, against exact eigenvalues, whatever the matrix is."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from rasa_theory.linalg import Majorant, Operator, closest_majorant, depth_within, leading_guess, majorant, stream
from rasa_theory.linalg.chebyshev import largest_argument
from rasa_theory.linalg.majorant import PROBES, STEPS, columns_for, norm_bounds, ritz

EPS = float(torch.finfo(torch.float64).eps)
N = 90
SPECTRA = {
    "power": np.arange(1, N + 1) ** -1.5,
    "flat": np.ones(N),
    "clusters": np.repeat([1.0, 0.5, 0.1], N // 3),
    "steep": 0.5 ** np.arange(N),
    "low rank": np.r_[1.0, 0.5, 0.2, np.zeros(N - 3)],
    "one value": np.r_[1.0, np.zeros(N - 1)],
    "zero": np.zeros(N),
    "indefinite": np.linspace(1, -1.5, N),
    "negative": -np.arange(1, N + 1) / N,
    "two levels": np.r_[np.full(4, 1.0), np.full(N - 4, 1 - 1e-9)],
}


def matrix(spectrum, seed=0):
    Q = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(spectrum), len(spectrum))))[0]
    S = (Q * spectrum) @ Q.T
    return torch.as_tensor((S + S.T) / 2)


def operator(S, dtype=torch.float64, columns=None):
    """S, applied; `columns` notes the width of every product."""
    n, norm = len(S), float(torch.linalg.matrix_norm(S))

    def apply(X):
        if columns is not None:
            columns.append(X.shape[1])
        return S.to(X.dtype) @ X

    return Operator(apply, n, norm, n * EPS * norm, dtype)


def ky_fan(S, m):
    return float(torch.linalg.eigvalsh(S).flip(0)[:m].clamp_min(0).sum())


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@given(
    name=st.sampled_from(sorted(SPECTRA)),
    seed=st.integers(0, 2**16),
    m=st.sampled_from([1, 2, 3, 5, 20, 60]),
    exponent=st.sampled_from([-100, -20, 0, 3, 100]),
    single=st.booleans(),
    share=st.sampled_from([1e-10, 1e-6, 1e-2]),
)
def test_no_sum_or_eigenvalue_is_above_its_bound(name, seed, m, exponent, single, share):
    scale = 10.0**exponent
    single = single and abs(exponent) < 30
    S = scale * matrix(SPECTRA[name], seed)
    S32 = operator(S, torch.float32 if single else torch.float64)
    found = majorant(S32, m, share * max(ky_fan(S, N), S32.norm), 1e-10, generator(seed))
    slack = 1e-13 * float(torch.linalg.matrix_norm(S))
    values = torch.linalg.eigvalsh(S).flip(0)
    for j in (1, m, m + 1):
        assert found.ky_fan(j) >= ky_fan(S, j) - slack
        assert found.eigenvalue(j) >= float(values[j - 1]) - slack
    f = torch.linspace(0.2, 1, len(found.theta), dtype=torch.float64)
    D = torch.eye(N, dtype=torch.float64) - found.V * (1 - f) @ found.V.mT
    assert found.ky_fan(m, f) >= ky_fan(D @ S @ D, m) - slack
    minus = torch.diag(found.theta.abs() * torch.linspace(0.9, 0, len(f), dtype=torch.float64))
    assert found.ky_fan(m, minus=minus) >= ky_fan(S - found.V @ minus @ found.V.mT, m) - slack


LARGE = 300
LARGE_SPECTRA = {
    "power": np.arange(1, LARGE + 1) ** -1.5,
    "low rank": np.r_[1.0, 0.5, 0.2, np.zeros(LARGE - 3)],
    "indefinite": np.arange(1, LARGE + 1) ** -1.0 - 0.05,
    "steep": 0.5 ** np.arange(LARGE),
}


@pytest.mark.parametrize("name", sorted(LARGE_SPECTRA))
def test_the_goal_is_met_without_forming_the_matrix(name):
    columns, m = [], 3
    S = matrix(LARGE_SPECTRA[name])
    goal = 1e-8 * float(torch.linalg.matrix_norm(S))
    found = majorant(operator(S, columns=columns), m, goal, 1e-10, generator())
    assert 0 <= found.ky_fan(m) - ky_fan(S, m) <= goal
    assert max(columns) < LARGE / 10


@pytest.mark.parametrize("m", [1, 4, 40])
def test_where_products_do_not_do_the_matrix_is_formed(m):
    columns, S = [], matrix(SPECTRA["flat"])
    found = majorant(operator(S, columns=columns), m, 1e-9, 1e-10, generator())
    assert N in columns
    assert found.ky_fan(m) == pytest.approx(m, rel=1e-9)


def test_zeros_are_never_formed():
    columns = []
    found = majorant(operator(matrix(SPECTRA["zero"]), columns=columns), 4, 1e-9, 1e-10, generator())
    assert (columns, found.ky_fan(4), found.V.shape) == ([], pytest.approx(0, abs=1e-300), (N, columns_for(4)))


def test_the_bound_is_that_of_the_formula():
    """S = [[2, x], [x, 1]], V the first axis, tau = 1: KF_1 <= t + (2 - t + 1.1 x^2 / (t - 1)), at the best t."""
    x = 0.3
    S = torch.tensor([[2.0, x], [x, 1.0]], dtype=torch.float64)
    basis = ritz(operator(S), torch.eye(2, 1, dtype=torch.float64))
    assert basis is not None
    found = basis._replace(tau=1.0)
    assert float(found.theta[0]) == pytest.approx(2)
    assert found.ky_fan(1) == pytest.approx(2 + 1.1 * x**2 / (16 * math.sqrt(1.1) * x), rel=0.2)
    assert found.ky_fan(1) >= float(torch.linalg.eigvalsh(S)[-1])
    assert found.ky_fan(2) >= 3


def test_a_sum_takes_what_the_basis_leaves_out_where_that_is_larger():
    """diag(3, 1) in the basis and at most tau = 2 beside it, five rows in all: KF_3 <= 3 + 2 + 2."""
    V, theta = torch.eye(5, 2, dtype=torch.float64), torch.tensor([3.0, 1.0], dtype=torch.float64)
    found = Majorant(V, theta, torch.zeros(2, 2, dtype=torch.float64), 2.0, 0.0)
    assert [found.ky_fan(m) for m in (1, 2, 3, 4, 5)] == pytest.approx([3, 5, 7, 9, 10])
    assert found.eigenvalue(2) == pytest.approx(2)
    assert found.scaled(4.0).ky_fan(3) == pytest.approx(28)


def test_rounding_of_the_products_is_added():
    V, theta = torch.eye(5, 2, dtype=torch.float64), torch.tensor([3.0, 1.0], dtype=torch.float64)
    found = Majorant(V, theta, torch.zeros(2, 2, dtype=torch.float64), 0.5, 0.01)
    assert found.ky_fan(2) >= 4 + 0.01 * math.sqrt(2)
    assert found.eigenvalue(1) >= 3.01


def test_probes_fail_as_often_as_they_may():
    """A single direction beside V: the bound fails exactly where ||u^T omega||^2 is below its quantile."""
    n, allowed, draws = 12, 0.05, 2000
    S = torch.zeros(n, n, dtype=torch.float64)
    S[0, 0] = 1.0
    V, c = torch.eye(n, dtype=torch.float64)[:, 1:3], float(scipy.stats.chi2(PROBES).ppf(allowed))
    random = generator(1)
    failures = 0
    for _ in range(draws):
        omega = torch.randn(n, PROBES, generator=random, dtype=torch.float64)
        tau = min(tau for k, tau in zip(range(6), norm_bounds(operator(S), V, omega, 0.5, c, 0.0), strict=False))
        failures += tau < 1
    low, high = scipy.stats.binom(draws, allowed).interval(1 - 1e-6)
    assert low <= failures <= high


@pytest.mark.parametrize("name", ["power", "indefinite", "clusters", "flat"])
def test_tau_bounds_what_any_basis_leaves_out(name):
    S = matrix(SPECTRA[name], 3)
    V = torch.linalg.qr(torch.randn(N, 7, generator=generator(2), dtype=torch.float64))[0]
    P = torch.eye(N, dtype=torch.float64) - V @ V.mT
    true = float(torch.linalg.eigvalsh(P @ S @ P)[-1])
    omega = torch.randn(N, PROBES, generator=generator(4), dtype=torch.float64)
    for beta in (true / 30, true / 2, true, 4 * true):
        bounds = list(norm_bounds(operator(S), V, omega, beta, 1e-2, 1e-12))
        assert 1 <= len(bounds) <= STEPS + 1
        assert min(bounds) >= true * (1 - 1e-12)


def test_tau_scales_with_the_matrix():
    S, V = matrix(SPECTRA["power"]), torch.eye(N, 3, dtype=torch.float64)
    omega = torch.randn(N, PROBES, generator=generator(4), dtype=torch.float64)
    whole = list(norm_bounds(operator(S), V, omega, 0.2, 0.1, 1e-12))
    small = list(norm_bounds(operator(S / 1024), V, omega, 0.2 / 1024, 0.1, 1e-12 / 1024))
    assert [x * 1024 for x in small] == pytest.approx(whole, rel=1e-12)


def test_what_rounding_may_hide_is_no_bound():
    """Errors as large as the probes: nothing can be concluded."""
    S = matrix(SPECTRA["power"])
    omega = torch.randn(N, PROBES, generator=generator(4), dtype=torch.float64)
    bounds = list(norm_bounds(operator(S), torch.eye(N, 2, dtype=torch.float64), omega, 0.1, 1e-2, 1.0))
    assert len(bounds) == 1
    assert math.isfinite(bounds[0])


@pytest.mark.parametrize("m", [1, 3, 50])
def test_a_guess_has_the_columns_that_a_majorant_takes(m):
    S = matrix(SPECTRA["power"])
    V = leading_guess(operator(S, torch.float32), m, 1e-6, generator())
    assert V.shape == (N, min(columns_for(m), N))
    assert V.dtype == torch.float32
    V = V.double()
    assert float((V.mT @ S @ V).diagonal()[:m].sum()) == pytest.approx(ky_fan(S, m), rel=1e-4)


def test_without_rounding_the_bounds_are_met_from_above():
    """Diagonal matrices and axes: every number is exact, so that nothing hides a lost allowance."""
    S = torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5], dtype=torch.float64))
    basis = ritz(operator(S), torch.eye(5, 2, dtype=torch.float64))
    assert basis is not None
    found = basis._replace(tau=2.0)
    for m, exact in enumerate((8.0, 12.0, 14.0, 15.0, 15.5), 1):
        assert found.ky_fan(m) > exact
        assert found.eigenvalue(m) > [8.0, 4.0, 2.0, 1.0, 0.5][m - 1]
    assert found.ky_fan(2, torch.tensor([0.5, 1.0], dtype=torch.float64)) > 6.0
    assert found.ky_fan(1, minus=torch.diag(torch.tensor([6.0, 0.0], dtype=torch.float64))) > 4.0


@pytest.mark.parametrize(
    ("value", "bound"), [(math.nan, math.inf), (math.inf, math.inf), (0.0, 0.3), (1e305, math.inf)]
)
def test_values_out_of_range_are_no_bounds(value, bound):
    assert largest_argument(0, 0.3, value, 1.0) == bound


def test_purposes_have_streams_of_their_own():
    streams = [("layers", False, 5, n) for n in range(50)] + [("common", False, 5), ("pooled", False), ("pooled", True)]
    first = {float(torch.randn(1, generator=stream(*one), dtype=torch.float64)) for one in streams}
    assert len(first) == len(streams)
    assert torch.equal(torch.rand(3, generator=stream("a", 1)), torch.rand(3, generator=stream("a", 1)))


@given(
    name=st.sampled_from(sorted(name for name in SPECTRA if SPECTRA[name].min() >= 0)),
    seed=st.integers(0, 2**16),
    m=st.sampled_from([1, 2, 3, 7]),
    depth=st.integers(2, 5),
    exponent=st.sampled_from([-100, 0, 100]),
)
def test_all_sums_lie_between_their_bounds_however_short_the_search(name, seed, m, depth, exponent):
    S = 10.0**exponent * matrix(SPECTRA[name], seed)
    depth = depth_within(N, m, depth) or 2
    found = closest_majorant(operator(S), m, 1e-8 * ky_fan(S, N), depth, 1e-10, generator(seed))
    assert (found is None) == (name == "zero")
    if found is None:
        return
    low, high = found.ky_fan_sums(m)
    slack = 1e-13 * float(torch.linalg.matrix_norm(S))
    for r in range(1, m + 1):
        assert float(low[r - 1]) - slack <= ky_fan(S, r) <= float(high[r - 1]) + slack


def test_all_sums_at_once_are_as_close_as_each_alone():
    S = matrix(SPECTRA["power"])
    found = closest_majorant(operator(S), 5, 1e-6, 3, 1e-10, generator())
    high = found.ky_fan_sums(5)[1]
    for r in (1, 2, 4, 5):  # the orders whose own t is tried
        assert float(high[r - 1]) <= found.ky_fan(r) + 2 * math.sqrt(r) * found.error + 1e-15
    assert float(high[2]) - ky_fan(S, 3) <= found.ky_fan(4) - ky_fan(S, 4) + 1e-12, "that of a greater rank serves"


def test_a_longer_search_comes_closer_until_the_goal_is_met():
    S = matrix(SPECTRA["flat"] + SPECTRA["power"])
    widths = []
    for depth in (2, 3):
        found = closest_majorant(operator(S), 3, 0.0, depth, 1e-10, generator())
        widths.append(found.ky_fan(3) - float(found.theta[:3].sum()))
    assert widths[0] > 2 * widths[1] > 0
    columns = []
    closest_majorant(operator(S, columns=columns), 3, ky_fan(S, N), 3, 1e-10, generator())
    eager = len(columns)
    columns.clear()
    closest_majorant(operator(S, columns=columns), 3, 0.0, 3, 1e-10, generator())
    assert eager < len(columns)


def test_the_depth_fits_into_half_of_the_space():
    for n, m in ((90, 1), (90, 7), (2048, 128), (1025, 128)):
        depth = depth_within(n, m, 12)
        block = m + 8 if m <= 24 else max(32, m // 2)
        assert depth == 12 or depth * block <= n / 2 < (depth + 1) * block
        assert (depth - 1) * block >= columns_for(m), "the basis is complete"
    assert depth_within(40, 12, 12) == 0
