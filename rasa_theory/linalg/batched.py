"""Sums and products over the local layers of a stack, batched.

`LayerSharding.all_reduce_together` adds the sums of the other processes. The starts and exchanges need the leading
parts of all layers at once, which are gathered for them.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

_BLOCK = 2**16  # entries


def total(x: Tensor) -> Tensor:
    """sum_i x_i: (L, ..) -> (..)."""
    return x.sum(0)


def outer(X: Tensor, Y: Tensor) -> Tensor:
    """sum_i X_i Y_i^T: (L, n, m), (L, p, m) -> (n, p)."""
    return beside(X) @ beside(Y).mT


def weighted(X: Tensor, weights: Tensor) -> Tensor:
    """sum_i X_i diag(w_i): (L, n, m), (L, m) -> (n, m)."""
    result = X.new_empty(X.shape[1:])
    for rows in row_blocks(X):
        result[rows] = total(X[:, rows] * weights[:, None])
    return result


def each(B: Tensor, X: Tensor) -> Tensor:
    """B X_i for every i, in one product: (b, n), (L, n, m) -> (L, b, m)."""
    L, _, m = X.shape
    return (B @ beside(X)).reshape(len(B), L, m).transpose(0, 1)


def beside(X: Tensor) -> Tensor:
    """All layers side by side: (L, n, m) -> (n, L m)."""
    L, n, m = X.shape
    return X.transpose(0, 1).reshape(n, L * m)


def row_blocks(X: Tensor) -> Iterator[slice]:
    """Rows of X (L, n, m) such that what is computed from one block stays in the cache; all of them off the CPU."""
    L, n, m = X.shape
    rows = n if X.device.type != "cpu" else max(1, _BLOCK // max(L * m, 1))
    return (slice(start, min(start + rows, n)) for start in range(0, n, rows))
