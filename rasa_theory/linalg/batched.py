"""Sums and products over the local layers of a stack, batched.

`LayerSharding.all_reduce_together` adds the sums of the other processes. Starts and searches need the leading parts of
all layers at once, so these are gathered instead.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

_BLOCK = 2**16  # entries of all layers in one block of rows: half a MiB in float64, which stays in the cache


def total(x: Tensor) -> Tensor:
    """The sum sum_i x_i over layers: (L, ..) -> (..)."""
    return x.sum(0)


def outer(X: Tensor, Y: Tensor) -> Tensor:
    """The sum sum_i X_i Y_i^T over layers: (L, n, m), (L, p, m) -> (n, p)."""
    return beside(X) @ beside(Y).mT


def weighted(X: Tensor, weights: Tensor) -> Tensor:
    """The sum sum_i X_i diag(w_i) over layers: (L, n, m), (L, m) -> (n, m)."""
    result = X.new_empty(X.shape[1:])
    for rows in row_blocks(X):
        result[rows] = total(X[:, rows] * weights[:, None])
    return result


def each(B: Tensor, X: Tensor) -> Tensor:
    """The products B X_i of all layers, as one product: (b, n), (L, n, m) -> (L, b, m)."""
    L, _, m = X.shape
    return (B @ beside(X)).reshape(len(B), L, m).transpose(0, 1)


def beside(X: Tensor) -> Tensor:
    """The matrices of all layers side by side: (L, n, m) -> (n, L m)."""
    L, n, m = X.shape
    return X.transpose(0, 1).reshape(n, L * m)


def row_blocks(X: Tensor) -> Iterator[slice]:
    """Blocks of rows of X (L, n, m) whose products stay in the cache. On other devices than the CPU, one block."""
    L, n, m = X.shape
    rows = n if X.device.type != "cpu" else max(1, _BLOCK // max(L * m, 1))
    return (slice(start, min(start + rows, n)) for start in range(0, n, rows))
