"""Spectra, subspaces, solves, and the one tolerance."""

import math

import numpy as np
import pytest
import torch

from rasa_theory import linalg
from tests.helpers.problems import noise, orthogonal

EPS = np.finfo(float).eps


def tensor(x):
    return torch.as_tensor(np.ascontiguousarray(x))


@pytest.mark.parametrize("shape", [(2, 5, 3), (3, 2, 4, 6), (4, 1)])
def test_both_svds_agree_and_multiply_back(shape):
    M = tensor(np.random.default_rng(0).standard_normal(shape))
    for U, S, Vh in (linalg.svd(M), linalg.svd_by_qr_iteration(M)):
        assert torch.allclose((U * S[..., None, :]) @ Vh, M, rtol=0, atol=1e-14)
        assert np.allclose(S, np.linalg.svd(M.numpy(), compute_uv=False), rtol=1e-13)


def test_a_failing_divide_and_conquer_is_done_again(monkeypatch):
    def fail(*args, **kwargs):
        raise torch.linalg.LinAlgError

    M = tensor(noise(2, 4, 3))
    monkeypatch.setattr(torch.linalg, "svd", fail)
    assert np.allclose(linalg.svd(M)[1], np.linalg.svd(M.numpy(), compute_uv=False), rtol=1e-13)
    B, A = linalg.leading_part_from(M, torch.zeros_like(M[:, :3]))
    assert torch.allclose(B @ A, M, rtol=0, atol=1e-14)


def test_a_nan_spectrum_is_done_again(monkeypatch):
    M, S = tensor(noise(1, 4, 3)[0]), torch.full((3,), math.nan)
    monkeypatch.setattr(torch.linalg, "svd", lambda *args, **kwargs: (S, S, S))
    monkeypatch.setattr(torch.linalg, "svdvals", lambda *args, **kwargs: S)
    for values in (linalg.svd(M)[1], linalg.singular_values(M)):
        assert np.allclose(values, np.linalg.svd(M.numpy(), compute_uv=False), rtol=1e-13)


def test_tail_energy():
    S = torch.tensor([[3.0, 2.0, 1.0], [5.0, 0.0, 0.0]])
    assert linalg.tail_energy(S, 1).tolist() == [5.0, 0.0]
    assert linalg.tail_energy(S, 3).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (7, 1), (1, 7)])
@pytest.mark.parametrize("spectrum", [1.0, 1e-1, 1e-8, 0.0])
def test_best_low_rank_meets_eckart_young_even_near_zero(shape, spectrum, exact):
    """Everything after the third singular value is `spectrum` of it: the Gram short cut must not be seen."""
    m = min(shape)
    S = np.array([1.0 if j < 3 else spectrum / (1 + j) for j in range(m)])
    M = orthogonal(shape[0])[:, :m] * S @ orthogonal(shape[1], 1)[:m]
    for rank in (0, 1, min(3, m), m):
        B, A = linalg.best_low_rank(tensor(M), rank, exact=exact)
        assert B.shape == (shape[0], rank)
        assert A.shape == (rank, shape[1])
        error = float(((M - (B @ A).numpy()) ** 2).sum())
        best = float((S[rank:] ** 2).sum())
        tolerance = linalg.rounding(float(np.linalg.norm(M)), shape, EPS)
        assert linalg.not_above(error, best, tolerance)
        assert linalg.not_above(best, error, tolerance)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_best_low_rank_sees_singular_values_that_a_gram_matrix_cannot(shape):
    """1e-8 and below are rounding noise once squared; at rank 2 and 3 they decide which terms are kept."""
    m = min(shape)
    S = np.array([1.0, 1e-8, 1e-9, *[1e-10] * (m - 3)])
    M = orthogonal(shape[0])[:, :m] * S @ orthogonal(shape[1], 1)[:m]
    for rank in (2, 3):
        B, A = linalg.best_low_rank(tensor(M), rank)
        error, best = float(((M - (B @ A).numpy()) ** 2).sum()), float((S[rank:] ** 2).sum())
        assert linalg.not_above(error, best, linalg.rounding(1.0, shape, EPS))


def test_best_low_rank_where_all_singular_values_coincide():
    """Every Gram matrix is I to rounding; of two of them LAPACK's syevr finds no leading eigenvector at all."""
    for seed in range(400):
        M = orthogonal(7, seed)
        B, A = linalg.best_low_rank(tensor(M), 1)
        assert float(((M - (B @ A).numpy()) ** 2).sum()) == pytest.approx(6, rel=1e-13)


@pytest.mark.parametrize(("power", "near"), [(2.0, 1e-12), (0.6, 1e-3), (0.0, 1e-2)])
def test_subspace_iteration_is_at_least_as_good_as_its_guess_and_near_the_best(power, near):
    """Batches of a spectrum j^-power; guesses of nothing, of a wrong and of the best row space; zero matrices."""
    q, (b, a) = 3, (60, 50)
    U, V = (torch.as_tensor(orthogonal(n, seed=n)[:, :a]) for n in (b, a))
    sigma = torch.arange(1, a + 1, dtype=torch.float64) ** -power
    E = ((U * sigma) @ V.mT).expand(3, b, a)
    guess = torch.stack([torch.zeros(q, a, dtype=torch.float64), V[:, -q:].mT, V[:, :q].mT])
    B, A = linalg.leading_part_from(E, guess)
    errors = ((E - B @ A) ** 2).sum((1, 2))
    best = float((sigma[q:] ** 2).sum())
    assert torch.allclose(A @ A.mT, torch.eye(q, dtype=torch.float64).expand(3, q, q), atol=1e-12)
    assert ((errors >= best * (1 - 1e-12)) & (errors <= best + near * float((sigma**2).sum()))).all()
    assert abs(float(errors[2]) - best) <= 1e-12 * float((sigma**2).sum())  # as good as the guess
    B, A = linalg.leading_part_from(torch.zeros_like(E), guess)
    assert not (B @ A).any()


def test_best_low_rank_has_one_orthonormal_factor():
    for M in (noise(1, 12, 9)[0], noise(1, 9, 12)[0]):
        B, A = linalg.best_low_rank(tensor(M), 2)
        eye = torch.eye(2, dtype=torch.float64)
        assert min(float((B.mT @ B - eye).abs().max()), float((A @ A.mT - eye).abs().max())) < 1e-13


def quadratic(G, g, x):
    return float((x * (G @ x)).sum() - 2 * (x * g).sum())


def test_solve_increment_solves_a_regular_system():
    K, g = noise(1, 9, 4)[0], noise(1, 4, 2, 1)[0]
    G = K.T @ K
    x = linalg.solve_increment(tensor(G), tensor(g), tensor(np.diag(G)), torch.zeros(4, dtype=torch.float64))
    assert np.allclose(x, np.linalg.solve(G, g), rtol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 1e-8, 1e8])
def test_solve_increment_reaches_the_minimum_of_a_singular_system(scale):
    """Two equal columns and one dead one, columns of very unequal size: the minimum, and 0 for the dead one."""
    K = noise(1, 9, 4)[0] * np.array([1, 1, scale, 0])
    K[:, 1] = K[:, 0]
    G, g = K.T @ K, K.T @ noise(1, 9, 1, 1)[0]
    x = linalg.solve_increment(tensor(G), tensor(g), tensor(np.diag(G)), torch.zeros(4, dtype=torch.float64)).numpy()
    best = quadratic(G, g, np.linalg.lstsq(K, noise(1, 9, 1, 1)[0], rcond=None)[0])
    assert quadratic(G, g, x) == pytest.approx(best, rel=1e-12)
    assert x[3] == 0
    assert x[0] == pytest.approx(x[1], rel=1e-12)


@pytest.mark.parametrize("gap", [1e-3, 1e-6, 1e-7, 1e-8, 1e-12, 0.0])
def test_solve_increment_never_raises_the_quadratic(gap):
    """Two columns that agree to `gap`, so that the Gram matrix is singular to rounding below 1e-8."""
    for seed in range(20):
        K, y = noise(1, 9, 4, seed)[0], noise(1, 9, 1, seed + 100)[0]
        K[:, 1] = K[:, 0] + gap * K[:, 1]
        G, g = K.T @ K, K.T @ y
        x = linalg.solve_increment(tensor(G), tensor(g), tensor(np.diag(G)), torch.full((4,), EPS).double()).numpy()
        assert linalg.not_above(
            float(((y - K @ x) ** 2).sum()), float((y**2).sum()), linalg.rounding(float(np.linalg.norm(y)), (9, 4), EPS)
        )


@pytest.mark.parametrize("level", [1e-3, 1e-9])
def test_solve_increment_is_the_same_by_cholesky_and_by_eigenvectors(level):
    """A batch with one Gram matrix for all, and one with its own; two right hand sides each."""
    K, g = tensor(noise(3, 9, 4)), tensor(noise(3, 4, 2, 1))
    for G in (K.mT @ K, (K.mT @ K)[:1]):
        variance = torch.full((3, 4), level**2).double()
        expected = linalg.solve_by_eigenvectors(G, g, torch.zeros_like(variance))
        x, sound = linalg.solve_by_cholesky(G, g, variance)
        assert bool(sound)
        assert torch.allclose(x, expected, rtol=1e-11)
        assert torch.allclose(x, torch.linalg.solve(G, g), rtol=1e-11)


def test_cholesky_is_trusted_only_where_the_gain_is_four_times_the_loss_and_the_matrix_regular():
    """G = diag(1, 1/4): an error e of y costs e_1^2 + 4 e_2^2; y = (1, 1) gains 5."""
    G, y = torch.diag(tensor([1.0, 0.25])), tensor([[1.0], [1.0]])
    loss = tensor([0.5, 0.1875])  # 0.5 + 4 * 0.1875 = 5 / 4
    x, sound = linalg.solve_by_cholesky(G, y, loss)
    assert x.flatten().tolist() == [1.0, 4.0]
    assert bool(sound)
    assert not bool(linalg.solve_by_cholesky(G, y, loss * (1 + 1e-12))[1])
    for small in (0.0, 1e-14, -1.0):
        assert not bool(linalg.solve_by_cholesky(torch.diag(tensor([1.0, small])), y, torch.zeros(2).double())[1])
    batch = torch.stack([G, torch.diag(tensor([1.0, 0.0]))])
    assert not bool(linalg.solve_by_cholesky(batch, y.expand(2, -1, -1), torch.zeros(2, 2).double())[1])


def test_solve_increment_does_not_act_on_noise():
    G, g = torch.eye(3, dtype=torch.float64), torch.tensor([[1.0], [1e-3], [0.0]], dtype=torch.float64)
    noise_of_rows = torch.full((3,), 0.3, dtype=torch.float64)
    x = linalg.solve_increment(G, g, torch.ones(3, dtype=torch.float64), noise_of_rows)
    assert x[:, 0].tolist() == [1.0, 0.0, 0.0]


def test_solve_increment_measures_noise_in_the_scaled_coordinates():
    """Rows of unequal size: each is signal or noise by its own measure, whatever the size of the others."""
    size = torch.tensor([1e-8, 1.0, 1e8], dtype=torch.float64)
    for g, noise_of_rows, kept in (
        ([1e-4, 1.0, 1e4], [1e-5, 0.1, 1e3], [True, True, True]),
        ([1e-4, 1.0, 1e4], [1e-3, 0.1, 1e3], [False, True, True]),
        ([1e-4, 1.0, 1e4], [1e-5, 0.1, 1e5], [True, True, False]),
    ):
        x = linalg.solve_increment(torch.diag(size), tensor(g)[:, None], size, tensor(noise_of_rows))[:, 0]
        expected = torch.where(torch.tensor(kept), tensor(g) / size, 0.0)
        assert torch.allclose(x, expected, rtol=1e-12, atol=0)


def test_solve_increment_of_nothing():
    assert linalg.solve_increment(torch.zeros(0, 0), torch.zeros(0, 4), torch.zeros(0), torch.zeros(0)).shape == (0, 4)


def test_thin_products():
    M, X = tensor(noise(4, 60, 9)), tensor(noise(1, 9, 7, 1)[0])
    MX = linalg.product(M, X)
    assert torch.allclose(MX, torch.einsum("iba,an->ibn", M, X))
    assert torch.allclose(linalg.product(M, X.expand(4, -1, -1)), MX)


def test_the_tolerance():
    assert linalg.rounding(2.0, (3, 7), 0.5) == 70.0
    assert linalg.not_above(4.0, 1.0, 1.0)
    assert not linalg.not_above(4.0, 1.0, 0.999)
    assert linalg.not_above(-1.0, 0.0, 0.0)
    assert not linalg.not_above(math.nan, 1.0, 1.0)
    assert not linalg.not_above(1.0, math.nan, 1.0)


def test_tf32_is_allowed_within_only():
    flags = torch.backends.cuda.matmul
    before = flags.allow_tf32
    for allowed in (False, True):
        with linalg.tf32(allowed):
            assert flags.allow_tf32 == (allowed or before)
        assert flags.allow_tf32 == before
