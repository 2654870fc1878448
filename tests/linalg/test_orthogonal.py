"""Orthonormal bases, whatever they are made of."""

import numpy as np
import pytest
import torch

from rasa_theory.linalg import orthogonal
from tests.helpers.problems import noise


def tensor(x):
    return torch.as_tensor(np.ascontiguousarray(x))


@pytest.mark.parametrize("dependent", [False, True])
def test_orthonormal_rows(dependent):
    A = noise(2, 3, 5)
    if dependent:
        A[:, 2] = A[:, 0]
    T, Q = orthogonal.orthonormal_rows(tensor(A))
    assert np.allclose(T @ Q, A, rtol=0, atol=1e-14)
    assert np.allclose(Q @ Q.mT, np.eye(3), rtol=0, atol=1e-14)


@pytest.mark.parametrize("lead", [(), (3,)])
def test_columns_beside_a_basis_are_orthonormal_even_where_nothing_new_is_given(lead):
    """X holds a new direction, the same but for 1e-9, one of U's, zero, and the new one again."""
    generator = torch.Generator().manual_seed(1)
    Q = torch.linalg.qr(torch.randn(*lead, 12, 12, generator=generator, dtype=torch.float64))[0]
    U, new = Q[..., :6], Q[..., 6]
    for basis in (U, torch.eye(12, 6, dtype=torch.float64).expand(*lead, 12, 6)):
        outside = new if basis is U else torch.eye(12, dtype=torch.float64)[7].expand(*lead, 12)
        X = torch.stack([outside, outside + 1e-9 * Q[..., 9], basis[..., 0], 0 * outside, outside], -1)
        Q_X = orthogonal.orthonormal_beside(basis, X)
        both = torch.cat([basis, Q_X], -1)
        assert float((both.mT @ both - torch.eye(11, dtype=torch.float64)).abs().max()) <= 1e-14
        assert float(((Q_X[..., 0] * outside).sum(-1).abs() - 1).abs().max()) <= 1e-14
        inside = both @ (both.mT @ X)
        assert float((inside - X).abs().max()) <= 1e-14


def test_a_batch_of_no_matrices_has_no_columns_beside_it():
    """Of a process that holds no layer."""
    assert orthogonal.orthonormal_beside(torch.empty(0, 9, 3), torch.empty(0, 9, 2)).shape == (0, 9, 2)


def test_completing_columns():
    C = torch.linalg.qr(torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    X = torch.randn(2, 7, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for Q, n in ((torch.cat([C, orthogonal.complement(C)], 2), 7), (orthogonal.completed(C, X), 5)):
        assert Q.shape == (2, 7, n)
        assert torch.equal(Q[:, :, :3], C)
        assert float((Q.mT @ Q - torch.eye(n, dtype=torch.float64)).abs().max()) <= 1e-14
    assert float((Q @ (Q.mT @ X) - X).abs().max()) <= 1e-14


def graded(condition, dtype=torch.float64):
    """(2, 40, 6), singular values from 1 to 1 / condition."""
    Q = torch.linalg.qr(torch.randn(2, 40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    W = torch.linalg.qr(torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    return (Q * torch.logspace(0, -np.log10(condition), 6, dtype=torch.float64) @ W).to(dtype)


@pytest.mark.parametrize(("dtype", "eps"), [(torch.float64, 1e-15), (torch.float32, 5e-7)])
@pytest.mark.parametrize("condition", [1, 1e3, 1e6])
def test_qr_by_cholesky_factors(dtype, eps, condition):
    """Twice is enough: orthonormal to rounding, triangular, and the factors multiply back, in either precision."""
    X = graded(condition, dtype)
    Q, T, sound = orthogonal.cholesky_qr(X)
    assert bool(sound)
    assert Q.dtype == T.dtype == dtype
    assert float((Q.mT @ Q - torch.eye(6, dtype=dtype)).abs().max()) <= 3 * eps
    assert float((Q @ T - X).abs().max()) <= 3 * eps
    assert torch.equal(T, T.triu())
    signs = T.diagonal(dim1=-2, dim2=-1).sign()
    if dtype == torch.float64:
        expected = torch.linalg.qr(X)[1]
        expected = expected * expected.diagonal(dim1=-2, dim2=-1).sign()[..., None]
        assert torch.allclose(signs[..., None] * T, expected, atol=1e-14)


def test_qr_by_cholesky_factors_says_where_it_is_not_sound():
    equal = graded(1)
    equal[1, :, 3] = equal[1, :, 0]
    infinite = torch.full((2, 9, 3), torch.inf, dtype=torch.float64)
    for X in (graded(1e9), equal, torch.zeros(2, 9, 3, dtype=torch.float64), infinite, infinite * 0):
        assert not bool(orthogonal.cholesky_qr(X)[2])
    assert bool(orthogonal.cholesky_qr(torch.zeros(2, 9, 0))[2])


@pytest.mark.parametrize(("dtype", "gap"), [(torch.float32, 1e-3), (torch.float32, 3e-5), (torch.float64, 1e-12)])
def test_columns_that_nearly_depend_are_kept(dtype, gap):
    """Two columns at a small angle: both lie in the span, far below the rounding of what they could build."""
    Q = torch.linalg.qr(torch.as_tensor(noise(1, 80, 3)[0]))[0].to(dtype)
    X = torch.stack([Q[:, 0], Q[:, 0] + gap * Q[:, 1]], 1)
    for P in (orthogonal.orthonormal_columns(X), torch.cat([Q[:, 2:], orthogonal.orthonormal_beside(Q[:, 2:], X)], 1)):
        assert float((P @ (P.mT @ X) - X).abs().max()) <= 4 * torch.finfo(dtype).eps


def test_orthonormal_columns_are_extended_by_orthonormal_ones():
    C = torch.linalg.qr(torch.randn(2, 9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    for n in (3, 4, 9):
        Q = orthogonal.extended(C, n)
        assert torch.equal(Q[..., :3], C)
        torch.testing.assert_close(Q.mT @ Q, torch.eye(n).double().expand(2, n, n), rtol=0, atol=1e-14)
