"""The problems: kinds of small stacks that occur in practice, at four sizes, and real updates and weights."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import rasa_theory as rt
from experiments.why_sharing_pays import stacks

Array = np.ndarray[Any, np.dtype[np.float64]]
Random = np.random.Generator


@dataclass(frozen=True)
class Size:
    """L layers of shape (b, a), and a budget of r ranks per layer, k of them shared."""

    layers: int
    b: int
    a: int
    rank: int
    k: int

    @property
    def pool(self) -> int:
        """R = L k."""
        return self.layers * self.k

    @property
    def private(self) -> int:
        """q = r - k."""
        return self.rank - self.k


Kind = Callable[[Random, Size], Array]
"""A function that draws one stack (L, b, a)."""

SIZES = (Size(4, 20, 18, 3, 1), Size(5, 24, 24, 3, 2), Size(3, 30, 24, 4, 1), Size(6, 24, 16, 2, 2))
SEEDS = range(5)


# ---- parts


def normal(rng: Random, *shape: int) -> Array:
    """Normal entries of variance 1 / (last two numbers' product), so that one matrix has a norm of about 1."""
    return rng.standard_normal(shape) / math.sqrt(shape[-1] * shape[-2])


def basis(rng: Random, *shape: int) -> Array:
    """(.., n, m) with orthonormal columns."""
    Q: Array = np.linalg.qr(rng.standard_normal(shape))[0]
    return Q


def low_rank(rng: Random, rank: int, *shape: int) -> Array:
    """(.., b, a) of a rank, with normal factors; one matrix has a norm of about 1."""
    *many, b, a = shape
    product: Array = rng.standard_normal((*many, b, rank)) @ rng.standard_normal((*many, rank, a))
    return product / math.sqrt(b * a * rank)


def own_parts(rng: Random, size: Size, decay: float = 0.7) -> Array:
    """Layers of independent singular bases and singular values j^-decay, of norm 1 each."""
    m = min(size.b, size.a)
    s = np.arange(1, m + 1) ** -decay
    U, V = basis(rng, size.layers, size.b, m), basis(rng, size.layers, size.a, m)
    M: Array = (U * s) @ V.swapaxes(1, 2) / np.linalg.norm(s)
    return M


def one_part(rng: Random, size: Size, decay: float = 0.7) -> Array:
    """One matrix (b, a) for all layers, as each of `own_parts` is."""
    M: Array = own_parts(rng, size, decay)[0]
    return M


def noise(rng: Random, size: Size, level: float) -> Array:
    return level * normal(rng, size.layers, size.b, size.a)


def scales(rng: Random, *shape: int) -> Array:
    """Random signs times numbers between 0.5 and 2."""
    signs: Array = rng.choice([-1.0, 1.0], shape)
    return signs * 2 ** rng.uniform(-1, 1, shape)


# ---- something common to all layers


def common_part(rng: Random, size: Size) -> Array:
    """A matrix of rank r common to all layers, and a part of each layer's own."""
    return low_rank(rng, size.rank, size.b, size.a) + own_parts(rng, size)


def common_columns(rng: Random, size: Size) -> Array:
    """Columns of all layers in one space of 2 r dimensions, and a little noise."""
    U = basis(rng, size.b, 2 * size.rank)
    return U @ normal(rng, size.layers, 2 * size.rank, size.a) + noise(rng, size, 0.2)


def common_rows(rng: Random, size: Size) -> Array:
    """Rows of all layers in one space of 2 r dimensions, and a little noise."""
    V = basis(rng, size.a, 2 * size.rank)
    return normal(rng, size.layers, size.b, 2 * size.rank) @ V.T + noise(rng, size, 0.2)


def common_columns_and_rows(rng: Random, size: Size) -> Array:
    """Columns and rows of all layers in one space each, with a full core of each layer's own: a Tucker model."""
    m = min(2 * size.rank + size.pool, size.a)
    U, V = basis(rng, size.b, m), basis(rng, size.a, m)
    return U @ normal(rng, size.layers, m, m) @ V.T + noise(rng, size, 0.1)


def common_factor_A(rng: Random, size: Size) -> Array:
    """LoRAs that were trained with one frozen A, of rank 2 r, and own B."""
    return rng.standard_normal((size.layers, size.b, 2 * size.rank)) @ rng.standard_normal((2 * size.rank, size.a))


def input_dictionary(rng: Random, size: Size) -> Array:
    """Every layer reads 2 r of 4 r common input directions, each with an output direction of its own."""
    atoms = rng.standard_normal((4 * size.rank, size.a))
    M = np.stack(
        [
            rng.standard_normal((size.b, 2 * size.rank)) @ atoms[rng.permutation(len(atoms))[: 2 * size.rank]]
            for _ in range(size.layers)
        ]
    )
    return M + noise(rng, size, 0.1 * math.sqrt(2 * size.rank * size.b * size.a))


def half_common_bases(rng: Random, size: Size) -> Array:
    """Singular bases that are half common and half the layer's own, with singular values j^-0.7."""
    m = min(size.b, size.a)
    U, V = (
        np.linalg.qr(rng.standard_normal((n, m)) + rng.standard_normal((size.layers, n, m)))[0]
        for n in (size.b, size.a)
    )
    M: Array = (U * np.arange(1, m + 1) ** -0.7) @ V.swapaxes(1, 2)
    return M


def shared_bases(rng: Random, size: Size) -> Array:
    """The same singular bases in all layers, whose singular values are j^-0.7 in an order of the layer's own."""
    m = min(size.b, size.a)
    s = np.stack([rng.permutation(np.arange(1, m + 1) ** -0.7) for _ in range(size.layers)])
    M: Array = (basis(rng, size.b, m) * s[:, None]) @ basis(rng, size.a, m).T
    return M


def orthogonal_terms(rng: Random, size: Size) -> Array:
    """An orthogonally decomposable tensor, L terms with orthonormal vectors on all three axes, under noise."""
    L = size.layers
    U, V, W = basis(rng, size.b, L), basis(rng, size.a, L), basis(rng, L, L)
    return (U * (W / np.arange(1, L + 1) ** 0.5)[:, None]) @ V.T + noise(rng, size, 0.5)


def common_tail(rng: Random, size: Size) -> Array:
    """Layers of nearly rank r, whose small remainder is common to all."""
    tail = one_part(rng, size, 0.5)
    return low_rank(rng, size.rank, size.layers, size.b, size.a) + 0.3 * scales(rng, size.layers, 1, 1) * tail


def massive_direction(rng: Random, size: Size) -> Array:
    """One dyad that all layers share, thirty times as large as the rest."""
    dyad = low_rank(rng, 1, size.b, size.a)
    return 30 * scales(rng, size.layers, 1, 1) * dyad + own_parts(rng, size)


def gradients(rng: Random, size: Size) -> Array:
    """Sums of outer products g x^T over samples: activations x of one distribution, gradients g of each layer's own."""
    samples = 3 * max(size.b, size.a)
    x = (rng.standard_normal((size.layers, samples, size.a)) * np.arange(1, size.a + 1) ** -0.7) @ basis(
        rng, size.a, size.a
    ).T
    g = rng.standard_normal((size.layers, samples, size.b)) * np.arange(1, size.b + 1) ** -0.5
    x, g = x + 0.5 * x.mean(1, keepdims=True), g @ basis(rng, size.layers, size.b, size.b)
    M: Array = g.swapaxes(1, 2) @ x
    return M


# ---- copies


def scaled_copies(rng: Random, size: Size) -> Array:
    """One matrix times a number for each layer."""
    return scales(rng, size.layers, 1, 1) * one_part(rng, size)


def noisy_copies(rng: Random, size: Size) -> Array:
    """One matrix times a number for each layer, and own noise."""
    return scaled_copies(rng, size) + noise(rng, size, 0.5)


def two_copies(rng: Random, size: Size) -> Array:
    """The same with two layers at every size, see `problems`."""
    return scaled_copies(rng, size)


def sign_flipped_copies(rng: Random, size: Size) -> Array:
    """One matrix with signs of each layer, and parts of each layer's own."""
    signs: Array = rng.choice([-1.0, 1.0], (size.layers, 1, 1))
    return signs * one_part(rng, size) + own_parts(rng, size)


def scaled_columns(rng: Random, size: Size) -> Array:
    """One matrix with columns scaled in each layer, as DoRA changes magnitudes."""
    return one_part(rng, size, 0.3) * (1 + 0.5 * rng.standard_normal((size.layers, 1, size.a)))


def dora(rng: Random, size: Size) -> Array:
    """The change from common weights W to DoRA's: columns of W + B_i A_i brought to norms near those of W."""
    W = normal(rng, size.b, size.a)
    V = W + 0.5 * low_rank(rng, size.rank, size.layers, size.b, size.a)
    lengths = np.linalg.norm(W, axis=0) * (1 + 0.1 * rng.standard_normal((size.layers, 1, size.a)))
    change: Array = V / np.linalg.norm(V, axis=1, keepdims=True) * lengths - W
    return change


def permuted_neurons(rng: Random, size: Size) -> Array:
    """One matrix with its rows in another order in each layer, and a little noise."""
    M = one_part(rng, size)
    return np.stack([M[rng.permutation(size.b)] for _ in range(size.layers)]) + noise(rng, size, 0.1)


def drift(rng: Random, size: Size) -> Array:
    """Layers that change slowly with depth: each is the one before and a small step of low rank."""
    steps = 0.4 * low_rank(rng, size.rank + 1, size.layers, size.b, size.a)
    return one_part(rng, size) + np.cumsum(steps, axis=0)


def two_clusters(rng: Random, size: Size) -> Array:
    """Two groups of layers; those of a group have a part in common."""
    parts: Array = own_parts(rng, size)[rng.permutation(np.arange(size.layers) % 2)]
    return scales(rng, size.layers, 1, 1) * parts + 0.5 * own_parts(rng, size)


def neighbours(rng: Random, size: Size) -> Array:
    """Neighbours share: each layer has half of its own part and half of the next one's."""
    parts = low_rank(rng, size.rank, size.layers + 1, size.b, size.a)
    return parts[:-1] + parts[1:] + 0.3 * own_parts(rng, size)


# ---- structured matrices


def sparse(rng: Random, size: Size) -> Array:
    """One entry of ten is not zero."""
    M = normal(rng, size.layers, size.b, size.a)
    return M * (rng.random(M.shape) < 0.1)


def sparse_rows(rng: Random, size: Size) -> Array:
    """Two rows of five are not zero, others in each layer."""
    return normal(rng, size.layers, size.b, size.a) * (rng.random((size.layers, size.b, 1)) < 0.4)


def sparse_columns(rng: Random, size: Size) -> Array:
    """Two columns of five are not zero, others in each layer."""
    return normal(rng, size.layers, size.b, size.a) * (rng.random((size.layers, 1, size.a)) < 0.4)


def heads(rng: Random, size: Size) -> Array:
    """Blocks of rows, one per attention head, each of rank two and of its own size."""
    count = max(n for n in range(1, 5) if size.b % n == 0)
    blocks = low_rank(rng, 2, size.layers, count, size.b // count, size.a) * scales(rng, size.layers, count, 1, 1)
    return blocks.reshape(size.layers, size.b, size.a) + noise(rng, size, 0.2)


def toeplitz(rng: Random, size: Size) -> Array:
    """Entries that depend on the distance from the diagonal alone, and fall with it."""
    lag = np.arange(size.b)[:, None] - np.arange(size.a)
    values = rng.standard_normal((size.layers, size.a + size.b)) / (1 + 0.3 * np.abs(np.arange(-size.a, size.b)))
    return values[:, lag + size.a]


def circulant(rng: Random, size: Size) -> Array:
    """Rows that are the first one, turned by a step each; cut to b x a."""
    n = max(size.b, size.a)
    lag = (np.arange(n)[:, None] - np.arange(n)) % n
    return rng.standard_normal((size.layers, n))[:, lag][:, : size.b, : size.a] / math.sqrt(n)


def nonnegative(rng: Random, size: Size) -> Array:
    """Entries that are not negative, with a common mean."""
    return np.abs(normal(rng, size.layers, size.b, size.a)) + 0.5 * np.abs(low_rank(rng, 2, size.b, size.a))


def heavy_tailed(rng: Random, size: Size) -> Array:
    """Entries of Student's t distribution with two degrees of freedom."""
    return rng.standard_t(2, (size.layers, size.b, size.a)) / math.sqrt(size.b * size.a)


def rounding(rng: Random, size: Size) -> Array:
    """What rounding common weights to four bits loses, with a step of each layer's own."""
    W = rng.standard_normal((size.b, size.a))
    step = rng.uniform(0.3, 0.6, (size.layers, 1, 1))
    rounded: Array = np.round(W / step) * step
    return W - rounded


# ---- layers that have nothing in common


def power_law(rng: Random, size: Size) -> Array:
    """Independent layers with singular values j^-0.7."""
    return own_parts(rng, size)


def steep(rng: Random, size: Size) -> Array:
    """Independent layers with singular values that halve at every second step."""
    m = min(size.b, size.a)
    U, V = basis(rng, size.layers, size.b, m), basis(rng, size.layers, size.a, m)
    M: Array = (U * 2.0 ** (-np.arange(m) / 2)) @ V.swapaxes(1, 2)
    return M


def gaussian(rng: Random, size: Size) -> Array:
    """Independent normal entries."""
    return normal(rng, size.layers, size.b, size.a)


def unequal_norms(rng: Random, size: Size) -> Array:
    """Half common layers whose norms fall from 1 to 0.01."""
    norms: Array = np.geomspace(1, 0.01, size.layers)[rng.permutation(size.layers)][:, None, None]
    return norms * (half_common_bases(rng, size) + noise(rng, size, 0.3))


def unequal_ranks(rng: Random, size: Size) -> Array:
    """Independent layers of ranks from 1 to 2 r, so that the pool pays by its allocation."""
    ranks = np.linspace(1, 2 * size.rank, size.layers).round().astype(int)
    return np.stack([low_rank(rng, int(m), size.b, size.a) * math.sqrt(m) for m in ranks]) + noise(rng, size, 0.2)


def rank_below(rng: Random, size: Size) -> Array:
    """Layers of rank r - 1: LoRA has no error, and the pool nothing to do."""
    return low_rank(rng, max(size.rank - 1, 1), size.layers, size.b, size.a)


# ---- planted factors


def planted(rng: Random, size: Size, level: float = 0.0) -> Array:
    """Normal factors of the budget; the error is 0."""
    pool = rng.standard_normal((size.b, size.pool)) * rng.standard_normal((size.layers, 1, size.pool))
    M = pool @ rng.standard_normal((size.pool, size.a))
    if size.private:
        M = M + low_rank(rng, size.private, *M.shape) * math.sqrt(size.b * size.a * size.private)
    N = rng.standard_normal(M.shape)
    return M + level * np.linalg.norm(M) / np.linalg.norm(N) * N


def planted_noise_10(rng: Random, size: Size) -> Array:
    """Normal factors of the budget, and noise of a tenth of their norm."""
    return planted(rng, size, 0.1)


def planted_noise_50(rng: Random, size: Size) -> Array:
    """Normal factors of the budget, and noise of half their norm."""
    return planted(rng, size, 0.5)


def collinear_terms(rng: Random, size: Size) -> Array:
    """Pool terms with nearly the same vectors on all three axes, where alternating sweeps crawl: a swamp."""
    m, near = size.pool, 0.3
    B, A, D = (rng.standard_normal((n, 1)) + near * rng.standard_normal((n, m)) for n in (size.b, size.a, size.layers))
    pool = (B * D[:, None]) @ A.T / (math.sqrt(size.b * size.a) * m)
    return pool + own_parts(rng, size) * (0.3 if size.private else 0.05)


def border_rank(rng: Random, size: Size) -> Array:
    """Triples of terms x v d + y u d + x u e, which two terms that grow and cancel approach: no minimum is attained."""
    M = np.zeros((size.layers, size.b, size.a))
    for _ in range(max(size.pool // 2, 1)):
        x, y = rng.standard_normal((2, size.b))
        u, v = rng.standard_normal((2, size.a))
        d, e = rng.standard_normal((2, size.layers, 1, 1))
        M += d * np.outer(x, v) + d * np.outer(y, u) + e * np.outer(x, u)
    M = M / np.linalg.norm(M)
    return M + noise(rng, size, 0.02) + (own_parts(rng, size, 2.0) * 0.3 if size.private else 0)


def hidden_dyads(rng: Random, size: Size, relative: float) -> Array:
    """Independent layers and three dyads that all share, of this mean size in units of sigma_(r+1)."""
    stack = rt.LayerStack(torch.from_numpy(own_parts(rng, size)))
    seed = int(rng.integers(2**31))
    hidden = rt.null_models.with_hidden_dyads(stack, size.rank, 3, relative, seed)
    values: Array = hidden.values.numpy()
    return values


SYNTHETIC: dict[str, Kind] = {
    kind.__name__: kind
    for kind in (
        common_part, common_columns, common_rows, common_columns_and_rows, common_factor_A, input_dictionary,
        half_common_bases, shared_bases, orthogonal_terms, common_tail, massive_direction, gradients, scaled_copies,
        noisy_copies, two_copies, sign_flipped_copies, scaled_columns, dora, permuted_neurons, drift, two_clusters,
        neighbours, sparse, sparse_rows, sparse_columns, heads, toeplitz, circulant, nonnegative, heavy_tailed,
        rounding, power_law, steep, gaussian, unequal_norms, unequal_ranks, rank_below, planted, planted_noise_10,
        planted_noise_50, collinear_terms, border_rank,
    )
}  # fmt: skip
HIDDEN = (0.4, 0.55, 0.8)
SYNTHETIC |= {f"hidden_dyads_{100 * x:.0f}": functools.partial(hidden_dyads, relative=x) for x in HIDDEN}
"""All kinds that are drawn at random, by name."""


# ---- real updates and weights

CROPS = (Size(6, 40, 40, 3, 1), Size(6, 64, 64, 4, 2))
WHOLE = Size(6, 384, 384, 8, 1)


@functools.cache
def _real(source: str) -> dict[str, Array]:
    """Kind of module -> (6, 384, 384): the "updates" bundled with the package, or the "weights" before them."""
    by_module = {"updates": stacks.updates, "weights": stacks.weights}[source](stacks.Plan())
    return {name: stack.values.numpy() for name, stack in by_module.items()}


# ---- all problems


@dataclass(frozen=True)
class Problem:
    """A kind of stack at a size, with the seed of everything random in it.

    The kind is a name of `SYNTHETIC`, or "updates query", "weights query", "updates query hidden 0.8", and so on.
    """

    kind: str
    size: Size
    seed: int

    def values(self) -> Array:
        """The stack (L, b, a), of norm 1. `two_copies` has two layers at every size."""
        M = self._drawn()
        return M / np.linalg.norm(M)

    def _drawn(self) -> Array:
        size = self.size
        if self.kind in SYNTHETIC:
            shape = (size.layers, size.b, size.a, size.rank, size.k)
            return SYNTHETIC[self.kind](
                np.random.default_rng((self.seed, zlib.crc32(self.kind.encode()), *shape)), size
            )
        source, module, *hidden = self.kind.split()
        M = _real(source)[module][:, : size.b, : size.a]
        if hidden:
            stack = rt.LayerStack(torch.from_numpy(M))
            M = rt.null_models.with_hidden_dyads(stack, size.rank, 3, float(hidden[1]), self.seed).values.numpy()
        return np.ascontiguousarray(M)


def problems() -> Iterator[Problem]:
    """All problems: seed by seed, all kinds at all sizes; then the crops of real stacks; then whole ones."""
    two = {size: Size(2, size.b, size.a, size.rank, size.k) for size in SIZES}
    crops = [
        Problem(f"{source} {module}", size, 0)
        for size in CROPS
        for source in ("updates", "weights")
        for module in stacks.KINDS
        if module in _real(source)
    ]
    for seed in SEEDS:
        for size in SIZES:
            for kind in SYNTHETIC:
                yield Problem(kind, two[size] if kind == "two_copies" else size, seed)
        if seed == 0:
            yield from crops
    for relative in reversed(HIDDEN):
        for module in stacks.KINDS:
            yield Problem(f"updates {module} hidden {relative}", WHOLE, 0)
