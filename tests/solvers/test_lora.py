"""e_lora by certified leading parts: the interval holds it, whatever the spectrum and whatever the search misses."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

from rasa_theory import InputError, LayerStack, linalg, solve_lora
from rasa_theory.linalg import krylov, lanczos
from rasa_theory.problem import layer_errors
from rasa_theory.solvers import lora
from tests.helpers.problems import noise, orthogonal, tail
from tests.helpers.strategies import fewer_examples

EPS = np.finfo(float).eps
N = 160


def with_spectrum(S, b=N, a=N + 10, seed=0):
    """One layer (b, a) with these singular values."""
    S = np.asarray(S, dtype=float)
    return (orthogonal(b, seed)[:, : len(S)] * S) @ orthogonal(a, seed + 1)[: len(S)]


def power(p, n=N):
    return np.arange(1, n + 1.0) ** -p


def two(S):
    """A stack of two unrelated layers with these singular values."""
    return np.stack([with_spectrum(S), with_spectrum(S, seed=5)])


STACKS = {
    "power 0.5": two(power(0.5)),
    "power 1": two(power(1)),
    "geometric": two(0.8 ** np.arange(N)),
    "gaussian": noise(2, N, N + 10),
    "low rank": two(power(1)[:6]),
    "lower rank than asked": two([3.0, 2.0]),
    "rank deficient": two(np.r_[power(0.5)[:70], np.zeros(N - 70)]),
    "cluster across r": two(np.r_[3, 2, [1] * 6, 0.5 * power(0.3, 100)]),
    "all equal": two(np.ones(N)),
    "steep": two(10.0 ** -np.arange(N)),
    "zero": np.zeros((2, N, N)),
    "one zero layer": np.stack([with_spectrum(power(1)), np.zeros((N, N + 10))]),
    "uneven": two(power(0.5)) * np.array([1.0, 1e-9])[:, None, None],
    "thin": noise(2, 3, 200),
    "tall": with_spectrum(power(1, 100), 300, 100)[None],
    "wide": with_spectrum(power(1, 100), 100, 300)[None],
    "one entry": np.pad(np.ones((1, 1, 1)), ((0, 0), (0, N - 1), (0, N - 1))),
}
DECAYING = ("power 0.5", "power 1", "geometric", "low rank", "rank deficient", "cluster across r", "tall", "wide")


def holds(solution, M, rank):
    """Whether the interval holds the e_lora of the entries of M, to the rounding of the SVD beside it."""
    M = np.asarray(M, dtype=float)
    size = np.abs(M).max() or 1.0
    expected, norm = tail(M / size, rank), np.linalg.norm(M / size)
    low, high = (x / size**2 for x in solution.interval)
    rounding = linalg.rounding(norm, M.shape[1:], EPS) ** 2 + 10 * EPS * norm**2
    return low - rounding <= expected <= high + rounding and low <= solution.error / size**2 <= high


@pytest.fixture
def no_svd(monkeypatch):
    """Fails where a layer is handed over to its SVD."""

    def refuse(*_):
        raise AssertionError("the SVD was taken")

    monkeypatch.setattr(lanczos, "leading_part_by_svd", refuse)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("name", STACKS)
def test_the_interval_holds_and_is_narrow(name, rank):
    M = STACKS[name]
    for values in (M, M.transpose(0, 2, 1), M.astype(np.float32)):
        stack = LayerStack(values)
        solution = solve_lora(stack, rank, method="fast")
        assert holds(solution, values, rank)
        low, high = solution.interval
        assert high - low <= lora.WIDTH * stack.norm_squared


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("name", DECAYING)
def test_decaying_spectra_need_no_svd(name, rank, no_svd):
    for values in (STACKS[name], STACKS[name].astype(np.float32)):
        assert holds(solve_lora(LayerStack(values), rank, method="fast"), values, rank)


@pytest.mark.parametrize("scale", [1e-100, 1e100, -3.0])
@pytest.mark.parametrize("name", ["power 0.5", "low rank", "gaussian"])
def test_scales(name, scale):
    M = STACKS[name]
    solution, scaled = (solve_lora(LayerStack(values), 2, method="fast") for values in (M, scale * M))
    assert holds(scaled, scale * M, 2)
    assert scaled.error == pytest.approx(scale**2 * solution.error, rel=1e-6, abs=scale**2 * 1e-20)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["power 0.5", "gaussian", "wide", "cluster across r"])
def test_the_factors_have_the_error_reported(name, dtype):
    M = STACKS[name].astype(dtype)
    stack, rank = LayerStack(M), 3
    solution, exact = solve_lora(stack, rank, method="fast"), solve_lora(stack, rank)
    assert layer_errors(stack, solution.factors) == pytest.approx(
        solution.layer_errors, rel=10 * float(np.finfo(dtype).eps)
    )
    assert math.fsum(solution.layer_errors) == solution.error
    assert solution.error >= exact.error * (1 - 1e-12)
    B, A = solution.factors.B, solution.factors.A
    assert (B.dtype, A.dtype, B.shape, A.shape) == (
        exact.factors.B.dtype, exact.factors.A.dtype, exact.factors.B.shape, exact.factors.A.shape,
    )  # fmt: skip
    assert torch.allclose(A @ A.mT, torch.eye(rank, dtype=A.dtype), atol=20 * np.finfo(dtype).eps)
    sigma = torch.linalg.vector_norm(B, dim=1)
    assert bool((sigma.diff() <= 1e-6).all())
    assert np.allclose(sigma, np.linalg.svd(M, compute_uv=False)[:, :rank], rtol=1e-4)


def test_it_is_deterministic_and_reads_the_data_once():
    stack = LayerStack(STACKS["power 1"])
    one = solve_lora(stack, 2, method="fast")
    assert stack.data_passes == 1
    two, other = solve_lora(stack, 2, method="fast"), solve_lora(stack, 2, method="fast", seed=1)
    assert (one.error, one.interval) == (two.error, two.interval)
    assert torch.equal(one.factors.B, two.factors.B)
    assert other.interval != one.interval
    assert other.error == pytest.approx(one.error, rel=1e-6)


def test_full_rank_and_one_layer():
    M = noise(1, 6, 5)
    solution = solve_lora(LayerStack(M), 5, method="fast")
    assert solution.error == 0
    assert holds(solution, M, 5)


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=6),
    st.floats(0, 3),
    st.integers(1, 3),
    st.integers(0, 2**16),
    st.sampled_from([np.float32, np.float64]),
)
@fewer_examples(4)
def test_random_spectra(leading, p, rank, seed, dtype):
    """A few arbitrary singular values before a power law of arbitrary height."""
    height = np.random.default_rng(seed).random()
    M = with_spectrum(np.r_[leading, height * power(p, 90)], 96, 110, seed)[None].astype(dtype)
    solution = solve_lora(LayerStack(M), rank, method="fast", seed=seed)
    assert holds(solution, M, rank)
    assert solution.interval[1] - solution.interval[0] <= lora.WIDTH * LayerStack(M).norm_squared


# ---- the lower side cannot be made to lie


@pytest.mark.parametrize("hidden", [2.0, 0.9, 0.5])
def test_a_direction_that_the_search_cannot_see_is_seen_by_the_probes(monkeypatch, hidden):
    """Singular values `hidden` (on the last axes, where the start is exactly zero), 1, 2^-0.5, ..: one is missed."""
    M = np.zeros((1, N + 1, N + 11))
    M[0, -1, -1] = hidden
    M[0, :-1, :-1] = with_spectrum(power(0.5))
    assert holds(solve_lora(LayerStack(M), 4, method="fast"), M, 4)
    whole, svds = krylov.random_block, []

    def blind(*args):
        block = whole(*args)
        block[-1] = 0
        return block

    by_svd = lanczos.leading_part_by_svd
    monkeypatch.setattr(lanczos, "leading_part_by_svd", lambda *args: svds.append(args) or by_svd(*args))
    monkeypatch.setattr(krylov, "random_block", blind)
    solution = solve_lora(LayerStack(M), 4, method="fast")
    assert holds(solution, M, 4)
    assert len(svds) == (hidden >= 0.5)  # sigma_4 of the rest is 0.5


@pytest.mark.parametrize("name", ["power 0.5", "gaussian", "all equal", "low rank"])
@pytest.mark.parametrize("seed", range(5))
def test_tau_bounds_the_norm_whatever_basis_and_beta(name, seed):
    """Also for a beta that is far off, where the recurrence grows or the bound is beta itself."""
    M = torch.as_tensor(STACKS[name][0])
    V = torch.linalg.qr(torch.as_tensor(noise(1, M.shape[1], 6, seed)[0]))[0]
    if seed % 2:
        V = torch.linalg.svd(M)[2][:6].mT.contiguous()
    true = float(torch.linalg.matrix_norm(M - (M @ V) @ V.mT, 2)) ** 2
    norm = float(torch.linalg.matrix_norm(M))
    omega = torch.as_tensor(noise(1, M.shape[1], 16, seed + 100)[0])
    for beta in (true / 50, true / 2, true, 3 * true, 1e-6 * norm**2):
        if beta < 1e-10 * norm**2:
            continue
        bounds = list(lanczos.norm_bounds(M, V, omega, beta, 1e-2, norm))
        assert len(bounds) == lanczos.STEPS + 1
        assert min(bounds) >= true
        assert min(bounds) >= beta
        if beta == true:
            assert min(bounds) <= 1.1 * true


def test_tau_exceeds_the_norm_where_the_probes_are_as_poor_as_allowed():
    """||u^T omega||^2 exactly c, and M of rank one beside V: the bound is met with equality, whatever k."""
    M, c = torch.zeros(40, 40, dtype=torch.float64), 0.25
    M[0, 0] = 1.0
    V = torch.eye(40, dtype=torch.float64)[:, 1:3]
    omega = torch.zeros(40, 16, dtype=torch.float64)
    omega[0, 0] = math.sqrt(c)
    for beta in (0.3, 0.9, 1.0):
        for k, tau in enumerate(lanczos.norm_bounds(M, V, omega, beta, c, 1.0)):
            assert tau >= 1
            assert k > 4 or tau <= 1 + 1e-7


def test_tau_scales_with_the_matrix():
    M, V = torch.as_tensor(STACKS["power 0.5"][0]), torch.eye(N + 10, 3, dtype=torch.float64)
    omega, norm = torch.as_tensor(noise(1, N + 10, 16)[0]), float(torch.linalg.matrix_norm(M))
    whole = list(lanczos.norm_bounds(M, V, omega, 0.9, 0.1, norm))
    small = list(lanczos.norm_bounds(M / 1024, V, omega, 0.9 / 1024**2, 0.1, norm / 1024))
    assert [x * 1024**2 for x in small] == pytest.approx(whole, rel=1e-12)


def test_what_rounding_may_do_to_tau():
    """M beside V is 0, so that only the rounding error of M y is left; and probes that it may drown prove nothing."""
    M, V = torch.eye(40, dtype=torch.float64), torch.eye(40, dtype=torch.float64)
    omega, norm = torch.ones(40, 16, dtype=torch.float64), math.sqrt(40)
    omega[-1] = 2
    V = V[:, :-1]
    M[-1, -1] = 0
    size, kappa = 2 * math.sqrt(16), 5 * math.sqrt(39) * 40 * EPS * norm
    tau = next(lanczos.norm_bounds(M, V, omega, 1e-20, 1e-6, norm))
    assert tau == pytest.approx((kappa * size) ** 2 / 1e-6, rel=1e-9, abs=0)
    s = kappa / math.sqrt(1e-3)
    drowned = (8 * s * (1 + s) * size) ** 2  # as much as rounding can hide after one step
    assert math.isfinite(list(lanczos.norm_bounds(M, V, omega, 1e-3, 1.01 * drowned, norm))[1])
    assert list(lanczos.norm_bounds(M, V, omega, 1e-3, 0.99 * drowned, norm))[1:] == [math.inf] * lanczos.STEPS


def test_the_failures_of_all_layers_and_attempts_add_up_to_that_of_the_call(monkeypatch):
    part, bounds, failures, quantiles = lanczos.leading_part, lanczos.norm_bounds, [], []

    def watched_part(M, rank, goal, failure, generator):
        failures.append(failure)
        return part(M, rank, goal, failure, generator)

    def watched_bounds(*args):
        quantiles.append((args[2].shape[1], args[4]))
        return bounds(*args)

    monkeypatch.setattr(lanczos, "leading_part", watched_part)
    monkeypatch.setattr(lanczos, "norm_bounds", watched_bounds)
    solve_lora(LayerStack(STACKS["power 1"]), 2, method="fast")
    assert math.fsum(failures) == pytest.approx(1e-10)
    assert len(quantiles) == 2
    for probes, c in quantiles:
        assert chi2.cdf(c, probes) * lanczos.ATTEMPTS == pytest.approx(1e-10 / 2)


@pytest.mark.parametrize("name", ["low rank", "lower rank than asked"])
def test_near_zero_the_error_is_the_direct_residual(name, no_svd):
    stack = LayerStack(STACKS[name])
    assert solve_lora(stack, 6, method="fast").error <= stack.rounding**2


@pytest.mark.parametrize("seed", range(20))
def test_the_certificate_for_bases_of_every_quality(seed):
    """V from exact singular vectors to nearly random ones; tau exact."""
    rng = np.random.default_rng(seed)
    S = np.sort(rng.random(30))[::-1] * rng.choice([1.0, 0.3], 30)
    M = torch.as_tensor(with_spectrum(S, 30, 35, seed))
    V = torch.linalg.svd(M)[2][:8].mT + 10.0 ** rng.integers(-6, 0) * torch.as_tensor(noise(1, 35, 8, seed)[0])
    basis = lanczos.ritz(M, V)
    tau = float(torch.linalg.matrix_norm(M - basis.MV @ basis.V.mT, 2)) ** 2
    for rank in range(1, 9):
        true = float((torch.linalg.svdvals(M)[:rank] ** 2).sum())
        assert lanczos.most_captured(basis, rank, tau, 0.0) >= true * (1 - 1e-14)
    assert float(basis.theta[:4].sum()) <= float((torch.linalg.svdvals(M)[:4] ** 2).sum()) * (1 + 1e-14)


def test_the_certificate_without_residual_and_with():
    """G = diag(4, 1) coupled by rho: with V = e_1 and t = theta_1, C = rho^2 / (t - tau)."""
    exact = lanczos.ritz(torch.diag(torch.tensor([2.0, 1.0]).double()), torch.eye(2, 1).double())
    assert lanczos.most_captured(exact, 1, 1.0, 0.0) == pytest.approx(4)
    M = torch.linalg.cholesky(torch.tensor([[4.0, 0.3], [0.3, 1.0]]).double()).mT.contiguous()
    basis = lanczos.ritz(M, torch.eye(2, 1).double())
    assert lanczos.most_captured(basis, 1, 1.0, 0.0) == pytest.approx(4 + 1.1 * 0.09 / 3, rel=1e-6)
    assert lanczos.most_captured(basis, 1, 1.0, 0.1) == pytest.approx(4 + (1.1 * 0.09 + 11 * 0.01) / 3, rel=1e-6)


def test_the_allowance_is_taken_off_and_added():
    M = torch.as_tensor(STACKS["power 1"][0])
    part = lanczos.leading_part(M, 3, 1e-6, 1e-10, torch.Generator().manual_seed(0))
    allowance = lanczos.ALLOWANCE * math.sqrt(3 * 22) * max(M.shape) * EPS * float((M**2).sum())
    assert part is not None
    assert part.high - part.error == pytest.approx(allowance, rel=1e-2)
    assert part.error - part.low >= allowance * 0.99


def test_bad_input_is_named():
    stack = LayerStack(noise(2, 3, 4), "mine")
    with pytest.raises(InputError, match="unknown method 'quick'; known: auto, exact, fast"):
        solve_lora(stack, 1, method="quick")
    with pytest.raises(InputError, match=r"rank 4 exceeds min\(b, a\) = 3 of stack 'mine'"):
        solve_lora(stack, 4, method="fast")


def test_the_svd_of_a_layer_that_cannot_be_searched_is_taken_only_in_memory_for_it():
    """All singular values alike: no search ends, and the memory is for anything but an SVD."""
    flat = torch.linalg.qr(torch.randn(1, 80, 80, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    with pytest.raises(InputError, match="twice what the exact SVD of one takes"):
        solve_lora(LayerStack(flat, memory=2 * 4 * 8 * 80 * 80), 1, "fast")
    assert solve_lora(LayerStack(flat, memory=2 * 8 * 8 * 80 * 80), 1, "fast").error == pytest.approx(79)


def test_work_on_a_whole_layer_is_refused_where_memory_is_too_little_for_it():
    small = LayerStack(torch.ones(2, 6, 5), memory=2 * 4 * 8 * 6 * 5 - 1)
    for work in (small.spectra.singular_values, lambda: list(small.tiles(rows=6))):
        with pytest.raises(InputError, match="twice what the work on one takes"):
            work()
    assert len(list(small.tiles(rows=5))) == 4  # in parts it goes
