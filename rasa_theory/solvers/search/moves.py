"""Moves out of a minimum: other pools in the neighbourhood of one that a search has found.

A move only offers a batch. Sweeps from there decide whether it pays.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rasa_theory.linalg import orthogonal
from rasa_theory.problem import RankOneTerms
from rasa_theory.solvers.rank_one import leading_terms
from rasa_theory.solvers.search.batch import Batch, refitted

_FLOOR = 0.05  # of the mean loss, which is added to the loss of each term: how evenly terms are chosen
_SHAKE = 0.3  # the tangent of the angle by which a shaken term turns, and the relative change of its weights


def moved(K: Tensor, parents: Batch, count: int, generator: torch.Generator) -> tuple[Batch, Tensor]:
    """`count` batches near those of `parents`, by all moves in turn; and the index of their parents (count,)."""
    moves = [exchanged, shaken]
    if parents.Bt.shape[3]:
        moves.append(shared)
    if len(parents.D) > 1:
        moves.append(crossed)
    children, origins = [], []
    for n, move in enumerate(moves):
        origin = torch.arange(n, count, len(moves), device=K.device) // len(moves) % len(parents.D)
        if len(origin):
            children.append(move(K, parents, origin, generator))
            origins.append(origin)
    batch = children[0]
    for other in children[1:]:
        batch = batch.joined(other)
    return refitted(K, batch), torch.cat(origins)


def exchanged(K: Tensor, parents: Batch, origin: Tensor, generator: torch.Generator) -> Batch:
    """Up to half of the pool's terms, cheap ones more often, give place to large rank-one terms of the residual."""
    batch = parents.select(origin)
    count = 1 + int(torch.randint(max(1, batch.D.shape[2] // 2), (1,), generator=generator))
    out = _cheap_terms(batch, count, generator)
    batch = _without(batch, out)
    for n in range(count):
        batch = _with_term(batch, out[:, n], leading_terms(batch.residual(K), generator))
    return batch


def shared(K: Tensor, parents: Batch, origin: Tensor, generator: torch.Generator) -> Batch:
    """A private term of one layer replaces a pool term, with the weights that suit the residuals of all layers."""
    batch = parents.select(origin)
    out = _cheap_terms(batch, 1, generator)
    batch = _without(batch, out)
    U, _, Vh = orthogonal.product_svd(batch.Bt, batch.At)
    count, L = len(origin), len(K)
    row = torch.arange(count, device=K.device)
    layer = torch.randint(L, (count,), generator=generator).to(K.device)
    term = torch.randint(U.shape[3], (count,), generator=generator).to(K.device)
    b, a = U[row, layer, :, term], Vh[row, layer, term]
    E = batch.residual(K)
    E[row, layer] += batch.Bt[row, layer] @ batch.At[row, layer]  # that layer gives its private terms up
    d = (E @ a[:, None, :, None])[..., 0] @ b[..., None]
    return _with_term(batch, out[:, 0], RankOneTerms(b, a, d[..., 0]))


def shaken(K: Tensor, parents: Batch, origin: Tensor, generator: torch.Generator) -> Batch:
    """All terms of the pool turn at random, and their weights change."""

    def noise(X: Tensor) -> Tensor:
        return torch.randn(X.shape, generator=generator, dtype=torch.float64).to(X)

    batch = parents.select(origin)
    L, n, m = K.shape
    sizes = torch.linalg.vector_norm(batch.D, dim=1, keepdim=True) / L**0.5
    return batch._replace(
        B=batch.B + _SHAKE / n**0.5 * noise(batch.B),
        A=batch.A + _SHAKE / m**0.5 * noise(batch.A),
        D=batch.D + _SHAKE * sizes * noise(batch.D),
    ).normalised()


def crossed(K: Tensor, parents: Batch, origin: Tensor, generator: torch.Generator) -> Batch:
    """About half of the pool's terms come from another parent."""
    count = len(parents.D)
    shift = 1 + torch.randint(count - 1, (len(origin),), generator=generator).to(K.device)
    batch, other = parents.select(origin), parents.select((origin + shift) % count)
    take = (torch.rand(len(origin), batch.D.shape[2], generator=generator) < 0.5).to(K.device)
    return batch._replace(
        B=torch.where(take[:, None], other.B, batch.B),
        A=torch.where(take[..., None], other.A, batch.A),
        D=torch.where(take[:, None], other.D, batch.D),
    )


def _cheap_terms(batch: Batch, count: int, generator: torch.Generator) -> Tensor:
    """Random indices of pool terms (S, count), those whose loss costs little more often."""
    losses = pool_losses(batch).cpu()
    weights = 1 / (losses + _FLOOR * losses.mean(1, keepdim=True) + torch.finfo(losses.dtype).tiny)
    return torch.multinomial(weights, count, generator=generator).to(batch.D.device)


def pool_losses(batch: Batch) -> Tensor:
    """About what it costs to leave a pool term out, (S, R): sum_i d_ij^2 ||(I - P_i) b_j||^2 ||a_j (I - Q_i)||^2.

    P_i and Q_i project on the column and row spaces of B~_i A~_i, which take up the rest.
    """
    columns = torch.linalg.qr(batch.Bt)[0]
    outside_B = 1 - ((columns.mT @ batch.B[:, None]) ** 2).sum(2)  # (S, L, R)
    outside_A = 1 - ((batch.At @ batch.A.mT[:, None]) ** 2).sum(2)
    losses: Tensor = batch.D**2 * outside_B.clamp_min(0) * outside_A.clamp_min(0)
    return losses.sum(1)


def _without(batch: Batch, out: Tensor) -> Batch:
    """The batch with no weight on the pool terms at `out` (S, count)."""
    index = out[:, None].expand(-1, batch.D.shape[1], -1)
    return batch._replace(D=batch.D.scatter(2, index, 0.0))


def _with_term(batch: Batch, place: Tensor, term: RankOneTerms) -> Batch:
    """The batch with pool terms b (S, n), a (S, m), d (S, L) at `place` (S,)."""
    row = torch.arange(len(place), device=place.device)
    B, A, D = batch.B.clone(), batch.A.clone(), batch.D.clone()
    B[row, :, place], A[row, place], D[row, :, place] = term.B, term.A, term.D
    return batch._replace(B=B, A=A, D=D)
