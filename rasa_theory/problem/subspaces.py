"""Subspaces that layers share: the spectrum of the mean projector on their leading singular subspaces."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rasa_theory import linalg
from rasa_theory.distributed import LayerSharding
from rasa_theory.linalg import batched
from rasa_theory.problem.budget import RankBudget
from rasa_theory.problem.spectra import SVD
from rasa_theory.problem.stack import LayerStack


@dataclass(frozen=True)
class SharedSubspaceSpectrum:
    """Eigenvalues of (1/L) sum_i P_i, where P_i projects on the leading `rank` singular directions of M_i.

    Eigenvalues lie in [0, 1]. A direction that all layers use has eigenvalue 1; if n layers use it, the largest
    eigenvalue is at least n / L.

    Attributes:
        columns: eigenvalues of the column spaces in falling order, (min(b, L rank),); all others are 0.
        rows: eigenvalues of the row spaces in falling order, (min(a, L rank),); all others are 0.
        unrelated: upper edge of the eigenvalues for L random subspaces, as a pair: columns, rows.
    """

    columns: Tensor
    rows: Tensor
    unrelated: tuple[float, float]


def shared_subspace_spectrum(stack: LayerStack, rank: int) -> SharedSubspaceSpectrum:
    """Measure how much column and row space the layers share, before anything is solved.

    A stack that is exactly B~_i A~_i + B_S D_i A_S has R eigenvalues 1 on either side at rank = q + R: the span of B_S
    lies in the column space of every layer. Singular directions at rounding level do not count.

    Arguments:
        stack: the updates M_i, (L, b, a).
        rank: the number of leading singular directions of each layer, 1 <= rank <= min(b, a).

    Returns:
        The eigenvalues of the mean projectors of both sides.

    Raises:
        InputError: `rank` is out of range.
    """
    RankBudget(rank, 0).check_fits(stack)
    U, V = (stack.sharding.all_gather(W) for W in leading_subspaces(stack, rank))
    spectra = [mean_projector(W)[0] for W in (U, V)]
    columns, rows = (unrelated_level(stack.layers, rank / n) for n in stack.shape)
    return SharedSubspaceSpectrum(spectra[0], spectra[1], (columns, rows))


def unrelated_level(layers: int, share: float) -> float:
    """Return the upper edge of the eigenvalues of the mean of L random projectors of rank c n in dimension n.

    `share` is c. The edge is (1 + (L - 2) c + 2 sqrt((L - 1) c (1 - c))) / L, and 1 from c = 1 - 1/L on, where L
    subspaces meet. Random projectors are free in the limit of large dimension: this is the right edge of the L-fold
    free convolution of (1 - c) delta_0 + c delta_1. For L = 2 it says that the largest cosine between two subspaces is
    2 sqrt(c (1 - c)). In finite dimension n the largest eigenvalue fluctuates about the edge by a few n^(-2/3).
    """
    L, c = layers, share
    if c >= 1 - 1 / L:
        return 1.0
    return (1 + (L - 2) * c + 2 * math.sqrt((L - 1) * c * (1 - c))) / L


def leading_subspaces(stack: LayerStack, rank: int) -> tuple[Tensor, Tensor]:
    """Return the leading singular vectors of every local layer, in float64: U (L, b, rank), V (L, a, rank).

    Columns are 0 if their singular value is rounding noise of the layer.
    """
    U, S, Vh = stack.unit().spectra.leading(rank)
    noise = linalg.rounding(1.0, stack.shape, stack.eps) * S[:, :1]
    real = (S[:, None] > noise[..., None]).to(U.dtype)
    return U * real, Vh.mT * real


def mean_projector(U: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues (n,) in falling order and eigenvectors (b, n) of (1/L) sum_i U_i U_i^T, n = min(b, L m).

    U is (L, b, m). The smaller of the two Gram matrices of [U_1 .. U_L] / sqrt(L) is decomposed. If that is the L m x
    L m one, vectors of eigenvalues near 0 are inexact.
    """
    L, b, m = U.shape
    joined = batched.beside(U) / math.sqrt(L)
    if b <= L * m:
        values, vectors = linalg.symmetric_eigenpairs(joined @ joined.mT)
        return values.flip(0), vectors.flip(1)
    values, coefficients = linalg.symmetric_eigenpairs(joined.mT @ joined)
    vectors = joined @ coefficients
    norms = torch.linalg.vector_norm(vectors, dim=0)
    return values.flip(0), (vectors / torch.where(norms > 0, norms, 1)).flip(1)


def mean_overlap(U: Tensor) -> float | None:
    """How much of their leading subspaces two layers have in common on average, beyond chance.

    U (L, n, m) has an orthonormal basis of each layer's subspace, with columns of 0 where a layer has fewer than m
    directions: m_i of them. For two layers i and j,

        o_ij = ||U_i^T U_j||_F^2 / min(m_i, m_j),    c_ij = max(m_i, m_j) / n.

    o_ij is the mean squared cosine of the principal angles, and c_ij its expectation for random subspaces. The result
    is the mean of (o_ij - c_ij) / (1 - c_ij) over all pairs with m_i, m_j > 0 and c_ij < 1: 1 if one subspace of each
    pair contains the other, about 0 for unrelated layers, and below 0 if they avoid each other. None without a pair.
    """
    L, n, m = U.shape
    sizes = torch.linalg.vector_norm(U, dim=1).square().sum(1).round().tolist()
    joined = batched.beside(U)
    squares = (joined.mT @ joined).square().reshape(L, m, L, m).sum((1, 3)).tolist()
    shares = []
    for i, j in itertools.combinations(range(L), 2):
        chance = max(sizes[i], sizes[j]) / n
        if min(sizes[i], sizes[j]) > 0 and chance < 1:
            shares.append((squares[i][j] / min(sizes[i], sizes[j]) - chance) / (1 - chance))
    return math.fsum(shares) / len(shares) if shares else None


def leading_of_all(svd: SVD, count: int, sharding: LayerSharding) -> tuple[Tensor, Tensor]:
    """Return the leading left singular vectors of [M_1 .. M_L], (b, count), and right ones of [M_1; ..; M_L].

    Sums run in the order of the layers, so that any number of processes computes the same bits. The eigenvectors of a
    pencil made with these vectors can amplify any difference in rounding.
    """
    spaces = []
    for U in (svd.U, svd.Vh.mT):
        grams = ((U_i * S_i**2) @ U_i.mT for U_i, S_i in zip(U, svd.S, strict=True))
        gram = sharding.sum_in_order(U.new_zeros(U.shape[1], U.shape[1]), grams)
        spaces.append(linalg.symmetric_eigenpairs(gram)[1][:, -count:].flip(1))
    return spaces[0], spaces[1]


def projected(svd: SVD, X: Tensor, Y: Tensor) -> Tensor:
    """Return X^T M_i Y or X_i^T M_i Y_i from the SVDs: (b, n) or (L, b, n), (a, p) or (L, a, p) -> (L, n, p).

    Products run layer by layer, so that any number of local layers gives the same bits.
    """
    result = svd.S.new_empty(len(svd.S), X.shape[-1], Y.shape[-1])
    X, Y = X.expand(len(result), -1, -1), Y.expand(len(result), -1, -1)
    for i, (U, S, Vh) in enumerate(zip(*svd, strict=True)):
        result[i] = (X[i].mT @ U * S) @ (Vh @ Y[i])
    return result
