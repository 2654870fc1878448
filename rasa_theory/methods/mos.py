"""MoS: the factors of all layers are put together from shards of two pools (Mixture of Shards, arXiv 2410.00938)."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor

from rasa_theory.common import InputError, at_least
from rasa_theory.methods.alternate import Steps, alternate
from rasa_theory.methods.diagonals import increment
from rasa_theory.methods.fit import Evidence, Fit, Settings, UnitFit, measured, residual
from rasa_theory.methods.method import Method, at_most
from rasa_theory.methods.products import left, right, seeded
from rasa_theory.problem import LayerStack, balanced
from rasa_theory.solvers import solve_lora

MOST_SHARDS = 4  # of a vector, in the configurations that are tried


class Shards(NamedTuple):
    """A pool (N, s) of shards, and the places (L, r, l) where the vectors of L layers take theirs from.

    Vector j of layer i is made of the shards places[i, j, 0], .., places[i, j, l - 1], one after the other.
    """

    pool: Tensor
    places: Tensor

    def vectors(self) -> Tensor:
        """The r vectors of every layer, (L, r, l s)."""
        return self.pool[self.places].flatten(2)

    def refit(self, other: Tensor, MX: Tensor, size: Tensor) -> Shards:
        """The pool with the least sum_i ||M_i - X_i^T Y_i||^2, X_i = `vectors` and Y_i = `other` (L, r, n) held fixed.

        MX (L, l s, r) are the products M_i Y_i^T, and `size` () is a norm of the stack and all updates. Let S_iq (r, N)
        choose the shards of segment q, and M_iq be the rows of M_i there. Then the pool P solves
        sum_iq S_iq^T Y_i Y_i^T S_iq P = sum_iq S_iq^T Y_i M_iq^T.
        """
        N, s = self.pool.shape
        YY = other @ other.mT
        G, g = self.pool.new_zeros(N, N), self.pool.new_zeros(N, s)
        for segment, place in enumerate(self.places.unbind(2)):  # (L, r)
            G.index_put_((place[:, :, None], place[:, None, :]), YY, accumulate=True)
            g.index_put_((place,), MX[:, segment * s : (segment + 1) * s].mT, accumulate=True)
        step = increment(G, g - G @ self.pool, size.reshape(1), (MX.shape[1], other.shape[2]))
        return self._replace(pool=self.pool + step)


class _Pools(NamedTuple):
    """The pools of the columns of all B_i and of the rows of all A_i."""

    B: Tensor
    A: Tensor

    def evened(self, groups: Tensor) -> _Pools:
        """The same updates with equal norms of B and A in every group of shards; `groups` (N,) are their numbers.

        Without it extrapolation would let one side grow and the other shrink until they leave the range of the dtype.
        """
        sums = self.B.new_zeros(2, int(groups.max()) + 1)
        nB, nA = sums.index_add(1, groups, torch.stack([(pool * pool).sum(1) for pool in self])).sqrt()
        ratio = torch.where((nB > 0) & (nA > 0), (nA / torch.where(nB > 0, nB, 1)).sqrt(), 1)[groups, None]
        return _Pools(self.B * ratio, self.A / ratio)


class _Sizes(NamedTuple):
    """The rank r of an update, e and p vectors a layer in the pools and in its private part, l shards of a vector."""

    rank: int
    pool_rank: int
    private_rank: int
    shards: int

    def check(self, stack: LayerStack) -> None:
        """Raise InputError if these sizes do not fit each other and the stack."""
        r, e, p, shards = self
        for name, value, least in zip(self._fields, self, (1, 1, 0, 1), strict=True):
            at_least(name, value, least)
        at_most("rank", r, min(stack.shape), stack)
        b, a = stack.shape
        if b % shards or a % shards:
            raise InputError(
                f"shards {shards} does not divide the layers of {b} x {a}; give a divisor of {math.gcd(b, a)}", "shards"
            )
        if p > min(r, e):
            raise InputError(f"private_rank {p} exceeds {min(r, e)}, the smaller of rank and pool_rank", "private_rank")
        if r - p > stack.layers * (e - p):
            raise InputError(
                f"rank {r} needs {r - p} vectors a layer beside the private ones, and the shared part of the pool has "
                f"{stack.layers * (e - p)}; lower rank or private_rank, or raise pool_rank",
                "rank",
            )

    def places(self, layers: int, generator: torch.Generator) -> Tensor:
        """The places of one side, (L, r, l): p private vectors, then shared shards, none of them twice in a layer."""
        r, e, p, shards = self
        shared = layers * (e - p) * shards
        private = shared + torch.arange(layers * p * shards).reshape(layers, p, shards)
        drawn = [torch.randperm(shared, generator=generator)[: (r - p) * shards] for _ in range(layers)]
        return torch.cat([private, torch.stack(drawn).reshape(layers, r - p, shards)], 1)

    def groups(self, layers: int) -> Tensor:
        """The groups of shards that may be scaled on both sides: all shared ones, and those of each private vector."""
        _, e, p, shards = self
        private = torch.arange(1, layers * p + 1).repeat_interleave(shards)
        return torch.cat([private.new_zeros(layers * (e - p) * shards), private])


def fit_mos(
    stack: LayerStack,
    rank: int,
    pool_rank: int,
    private_rank: int = 0,
    shards: int = 4,
    seed: int = 0,
    max_sweeps: int = 100,
) -> Fit:
    """Minimise sum_i ||M_i - B_i A_i||_F^2 with the vectors of B_i and A_i from two pools of shards.

    MoS (Wang et al., ICLR 2025) cuts a vector into l shards. The pool for the rows of all A_i (r, a) has L e l shards
    of length a / l: p l of them belong to each layer alone, and of the others every layer takes (r - p) l. The pool for
    the columns of all B_i (b, r) is the same, with places of its own. As in the paper, the places are drawn at random
    and stay as they are. The seed makes them again, so the pools alone are stored: L e (a + b) parameters, as many as
    LoRA of rank e has.

    For fixed places the update is linear in each pool. Exact least squares for the two pools alternate; each sweep
    begins at an extrapolated point. The starts are LoRA's optimum of rank r, every shard the mean of what it stands
    for, and random pools. With p = r = e it is LoRA.

    Arguments:
        stack: the layers M_i, (L, b, a).
        rank: r, from 1 to min(b, a), and at most p + L (e - p).
        pool_rank: e, at least 1.
        private_rank: p, from 0 to min(r, e).
        shards: l, a divisor of b and a.
        seed: seed of the places and of the random start.
        max_sweeps: the largest number of sweeps, at least 1.

    Returns:
        A `Fit` with the best solution for these places.

    Raises:
        InputError: an argument is out of its range.
    """
    sizes = _Sizes(rank, pool_rank, private_rank, shards)
    sizes.check(stack)
    at_least("max_sweeps", max_sweeps, 1)
    unit, generator = stack.unit(), torch.Generator().manual_seed(seed)
    places_B, places_A = (sizes.places(stack.layers, generator).to(stack.device) for _ in range(2))
    groups = sizes.groups(stack.layers).to(stack.device)

    def factors(pools: _Pools) -> tuple[Shards, Shards]:
        return Shards(pools.B, places_B), Shards(pools.A, places_A)

    def sweep(pools: _Pools) -> _Pools:
        return _sweep(unit, *factors(pools)).evened(groups)

    def products(pools: _Pools) -> UnitFit:
        B, A = (side.vectors() for side in factors(pools))
        return UnitFit(lambda i: B[i].mT @ A[i], pools, rank)

    starts = [_leading(unit, sizes, places_B, places_A), _random(unit, sizes, seed)]
    steps = Steps(sweep, lambda pools: residual(unit, products(pools).update), _beyond)
    pools, history = alternate(unit, steps, starts, max_sweeps)
    settings: Settings = dict(zip(_Sizes._fields, sizes, strict=True))
    solution = dataclasses.replace(products(pools), history=history)
    return measured(stack, "mos", settings, Evidence.BEST_FOUND, solution)


def _sweep(unit: LayerStack, B: Shards, A: Shards) -> _Pools:
    """One sweep: the exact minimisers of the pool for B and of that for A in turn, in two passes."""
    size = math.sqrt(unit.norm_squared) + _norm(B.vectors(), A.vectors())
    rows = A.vectors()
    B = B.refit(rows, right(unit, rows.mT), size)
    columns = B.vectors()
    A = A.refit(columns, left(unit, columns.mT), size)
    return _Pools(B.pool, A.pool)


def _norm(B: Tensor, A: Tensor) -> Tensor:
    """The norm of all updates B_i^T A_i, B (L, r, b) and A (L, r, a)."""
    return ((B @ B.mT) * (A @ A.mT)).sum().clamp_min(0).sqrt()


def _beyond(pools: _Pools, before: _Pools, stride: float) -> _Pools:
    return _Pools(*(x + stride * (x - y) for x, y in zip(pools, before, strict=True)))


def _leading(unit: LayerStack, sizes: _Sizes, places_B: Tensor, places_A: Tensor) -> _Pools:
    """LoRA's optimum of rank r, with b_j and a_j of equal norm; a shard is the mean over all its places."""
    lora = solve_lora(unit, sizes.rank).factors.to(torch.float64)
    B, A = balanced(lora.B, lora.A)
    count = unit.layers * sizes.pool_rank * sizes.shards
    return _Pools(_means(B.mT, places_B, count), _means(A, places_A, count))


def _means(vectors: Tensor, places: Tensor, count: int) -> Tensor:
    """The mean of the shards of `vectors` (L, r, n) at each of `count` places, (count, n / l), or 0 without any."""
    shards, at = vectors.reshape(places.numel(), -1), places.flatten()
    sums = vectors.new_zeros(count, shards.shape[1]).index_add(0, at, shards)
    return sums / torch.bincount(at, minlength=count).clamp_min(1)[:, None]


def _random(unit: LayerStack, sizes: _Sizes, seed: int) -> _Pools:
    """A random pool for A, which no layer uses yet: the pool for B is 0."""
    (b, a), count = unit.shape, unit.layers * sizes.pool_rank * sizes.shards
    A = seeded(unit, seed, count, a // sizes.shards)
    return _Pools(A.new_zeros(count, b // sizes.shards), A)


def _parameters(layers: int, shape: tuple[int, int], rank: int, pool_rank: int, private_rank: int, shards: int) -> int:
    return layers * pool_rank * sum(shape)


def _configurations(stack: LayerStack, limit: int) -> list[Settings]:
    """Pools of the rank e that LoRA has within `limit`: updates of rank e + 1, nearly all private, and of 2 e, half."""
    L, (b, a) = stack.layers, stack.shape
    e = min(limit // (L * (a + b)), b, a)
    shards = max(n for n in range(1, MOST_SHARDS + 1) if b % n == 0 and a % n == 0)
    configurations: list[Settings] = []
    for rank, p in ((e + 1, max(e - 1, 0)), (2 * e, e // 2)):
        settings: Settings = {"rank": rank, "pool_rank": e, "private_rank": p, "shards": shards}
        if 0 < rank <= min(b, a, p + L * (e - p)) and settings not in configurations:
            configurations.append(settings)
    return configurations


MOS = Method("mos", "MoS", fit_mos, _parameters, _configurations)
