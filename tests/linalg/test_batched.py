"""Sums over layers, against einsum; stacks of several blocks of rows, so that the blocks are put together."""

import torch

from rasa_theory.linalg import batched
from rasa_theory.solvers import updates
from tests.helpers.problems import noise


def test_sums_over_layers():
    X, Y, B = (
        torch.as_tensor(noise(20, 600, 7)),
        torch.as_tensor(noise(20, 30, 7, 1)),
        torch.as_tensor(noise(1, 600, 7)[0]),
    )
    w = torch.as_tensor(noise(1, 20, 7, 2)[0])
    assert len(list(batched.row_blocks(X))) > 1
    assert torch.allclose(batched.total(X), X.sum(0))
    assert torch.allclose(batched.outer(X, Y), torch.einsum("inm,ipm->np", X, Y))
    assert torch.allclose(batched.weighted(X, w), torch.einsum("inm,im->nm", X, w))
    assert torch.allclose(batched.each(X[:, :7].mT[0], X[:, :7]), torch.einsum("nm,imp->inp", X[0, :7].T, X[:, :7]))
    assert torch.allclose(updates.column_products(B, X), torch.einsum("nm,inm->im", B, X))
    assert batched.weighted(X[:, :, :0], w[:, :0]).shape == (600, 0)
    assert batched.outer(X[:, :, :0], Y[:, :, :0]).abs().max() == 0
