"""Families of random stacks, drawn from a seed, with the optimum where it is known in closed form."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rasa_theory.problem import RankBudget
from rasa_theory.sources import open_source, planted_stack, synthetic_stack

Array = np.ndarray[Any, np.dtype[np.float64]]
Random = np.random.Generator

MET_BY_ALL = frozenset({"solver", "floor", "allocation"})


@dataclass(frozen=True)
class Known:
    """The optimum e_rasa(k), squared, and the methods of "solver", "floor", "allocation" that must reach it.

    The solver must where a start in closed form is optimal, or where there are saddles but no other local minima.
    """

    e_rasa: float
    met_by: frozenset[str]


@dataclass(frozen=True)
class Draw:
    """Values (L, b, a), budget, and the optimum or None."""

    values: Tensor
    budget: RankBudget
    known: Known | None = None


@dataclass(frozen=True)
class Instance:
    """The draw `number` of a family. `seed` is the seed of everything random that is computed from it."""

    family: str
    number: int
    seed: int
    draw: Draw


@dataclass(frozen=True)
class Family:
    """A description in a few words, and the function that draws an instance."""

    what: str
    make: Callable[[Random], Draw]


def draw_instance(family: str, number: int, seed: int) -> Instance:
    """Draw an instance, which depends on the three arguments alone."""
    rng = np.random.default_rng((seed, zlib.crc32(family.encode()), number))
    draw = FAMILIES[family].make(rng)
    return Instance(family, number, int(rng.integers(2**31)), draw)


# ---- parts


def _sizes(rng: Random, low: int = 4, high: int = 14) -> tuple[int, int, int]:
    """L, b, a."""
    return int(rng.integers(2, 6)), int(rng.integers(low, high + 1)), int(rng.integers(low, high + 1))


def _budget(rng: Random, limit: int, k: int | None = None) -> RankBudget:
    """1 <= r <= min(4, limit), 1 <= k <= r unless `k` is given."""
    r = int(rng.integers(1, min(4, limit) + 1))
    return RankBudget(r, int(rng.integers(1, r + 1)) if k is None else k)


def _normal(rng: Random, *shape: int) -> Array:
    return rng.standard_normal(shape)


def _basis(rng: Random, n: int, m: int) -> Array:
    """(n, m), orthonormal columns."""
    Q: Array = np.linalg.qr(_normal(rng, n, m))[0]
    return Q


def _tail(M: Array, rank: int) -> float:
    """sum_i sum_{j>rank} sigma_ij^2."""
    return float((np.linalg.svd(M, compute_uv=False)[..., rank:] ** 2).sum())


def _seed(rng: Random) -> int:
    return int(rng.integers(2**31))


# ---- families


def _gaussian(rng: Random) -> Draw:
    L, b, a = _sizes(rng)
    return Draw(torch.from_numpy(_normal(rng, L, b, a)), _budget(rng, min(b, a)))


def _decaying(rng: Random) -> Draw:
    L, b, a = _sizes(rng)
    spectrum = rng.choice(["power:", "exp:"]) + f"{rng.uniform(0.3, 3.0):.3f}"
    return Draw(synthetic_stack(L, (b, a), spectrum, 0.0, _seed(rng)).values, _budget(rng, min(b, a)))


def _overlapping(rng: Random) -> Draw:
    L, b, a = _sizes(rng)
    overlap = float(rng.uniform(0.1, 0.999))
    stack = synthetic_stack(L, (b, a), f"power:{rng.uniform(0.0, 1.5):.3f}", overlap, _seed(rng))
    return Draw(stack.values, _budget(rng, min(b, a)))


def _equal(rng: Random) -> Draw:
    """M_i = c_i M: every layer can use rank q + R, and no more. The spectrum halves, so that sweeps converge fast."""
    L, b, a = _sizes(rng)
    budget, m = _budget(rng, min(b, a)), min(b, a)
    c = rng.choice([-1.0, 1.0], L) * rng.uniform(0.5, 2.0, L)
    M = (_basis(rng, b, m) * 2.0 ** -np.arange(m)) @ _basis(rng, a, m).T
    values = c[:, None, None] * M
    return Draw(
        torch.from_numpy(values),
        budget,
        Known(_tail(values, budget.private_rank + budget.pool_rank(L)), frozenset({"solver", "floor"})),
    )


def _near_duplicates(rng: Random) -> Draw:
    """M_i = M + N_i, N_i of 1e-12 to 0.1 of its norm: pools with nearly equal columns, and terms that cancel."""
    L, b, a = _sizes(rng)
    values = _normal(rng, 1, b, a) + 10.0 ** rng.uniform(-12, -1) * _normal(rng, L, b, a)
    return Draw(torch.from_numpy(values), _budget(rng, min(b, a)))


def _shared_bases(rng: Random) -> Draw:
    """M_i = U diag(s_i) V^T, k = r: the optimum leaves all but the R columns with the largest sum_i s_ij^2."""
    L, b, a = _sizes(rng, low=6)
    m = min(b, a)
    r = int(rng.integers(1, 3))
    s = _normal(rng, L, m)
    values = (_basis(rng, b, m) * s[:, None]) @ _basis(rng, a, m).T
    optimum = float(np.sort((s**2).sum(0))[: max(m - L * r, 0)].sum())
    return Draw(torch.from_numpy(values), RankBudget(r, r), Known(optimum, frozenset({"floor"})))


def _orthogonal_columns(rng: Random) -> Draw:
    """Mutually orthogonal column spaces, k = r: the R largest sigma_ij^2 of all layers are kept."""
    L, m, a = int(rng.integers(2, 5)), int(rng.integers(2, 5)), int(rng.integers(4, 11))
    r = int(rng.integers(1, m + 1))
    Q = _basis(rng, L * m + int(rng.integers(0, 3)), L * m)
    values = np.stack([Q[:, m * i : m * (i + 1)] @ X for i, X in enumerate(_normal(rng, L, m, a))])
    values *= rng.uniform(0.3, 3.0, (L, 1, 1))
    energy = np.sort(np.linalg.svd(values, compute_uv=False).ravel() ** 2)
    return Draw(torch.from_numpy(values), RankBudget(r, r), Known(float(energy[: -L * r].sum()), MET_BY_ALL))


def _orthogonal_rows(rng: Random) -> Draw:
    flipped = _orthogonal_columns(rng)
    return Draw(flipped.values.mT.contiguous(), flipped.budget, flipped.known)


def _planted(rng: Random) -> Draw:
    L, b, a = _sizes(rng)
    budget = _budget(rng, min(b, a))
    stack, _ = planted_stack(L, (b, a), budget, 0.0, _seed(rng))
    return Draw(stack.values, budget, Known(0.0, frozenset({"floor"})))


def _planted_in_noise(rng: Random) -> Draw:
    L, b, a = _sizes(rng)
    budget = _budget(rng, min(b, a))
    stack, _ = planted_stack(L, (b, a), budget, float(10.0 ** rng.uniform(-9, 0)), _seed(rng))
    return Draw(stack.values, budget)


def _rank_deficient(rng: Random) -> Draw:
    """Rank at most r in every layer, zero layers among them: LoRA already leaves nothing."""
    L, b, a = _sizes(rng)
    budget = _budget(rng, min(b, a))
    rank = int(rng.integers(1, budget.rank + 1))
    values = _normal(rng, L, b, rank) @ _normal(rng, L, rank, a)
    values[rng.random(L) < 0.3] = 0
    return Draw(torch.from_numpy(values), budget, Known(0.0, MET_BY_ALL))


def _extreme(rng: Random) -> Draw:
    """A scale from 1e-100 to 1e100; in half of the draws each layer also has its own factor from 1e-9 to 1."""
    L, b, a = _sizes(rng)
    values = _normal(rng, L, b, a) * 10.0 ** rng.uniform(-100, 100)
    if rng.random() < 0.5:
        values *= 10.0 ** rng.uniform(-9, 0, (L, 1, 1))
    return Draw(torch.from_numpy(values), _budget(rng, min(b, a)))


def _thin(rng: Random) -> Draw:
    """One or two rows or columns; r reaches min(b, a) in most, and nothing is left then."""
    L, b, a = int(rng.integers(1, 6)), int(rng.integers(1, 3)), int(rng.integers(1, 17))
    values = _normal(rng, L, b, a)
    values = values.transpose(0, 2, 1).copy() if rng.random() < 0.5 else values
    budget = _budget(rng, min(b, a))
    return Draw(torch.from_numpy(values), budget, Known(0.0, MET_BY_ALL) if budget.rank == min(b, a) else None)


def _no_sharing(rng: Random) -> Draw:
    """k = 0, or a single layer: RaSA is LoRA."""
    L, b, a = _sizes(rng)
    alone = rng.random() < 0.5
    values = _normal(rng, 1 if alone else L, b, a) * np.linspace(1, 0.1, a)
    budget = _budget(rng, min(b, a), None if alone else 0)
    return Draw(torch.from_numpy(values), budget, Known(_tail(values, budget.rank), MET_BY_ALL))


def _single_precision(rng: Random) -> Draw:
    L, b, a = _sizes(rng)
    values = _normal(rng, L, b, a) * np.arange(1, a + 1) ** -rng.uniform(0.0, 1.5) * 10.0 ** rng.uniform(-12, 12)
    return Draw(torch.from_numpy(values).float(), _budget(rng, min(b, a)))


def _fine_tuning(rng: Random) -> Draw:
    """Some layers, rows and columns of a bundled update."""
    name = rng.choice([source.name for source in open_source().stacks])
    M = _bundled(str(name))
    L, b, a = int(rng.integers(2, M.shape[0] + 1)), int(rng.integers(12, 33)), int(rng.integers(12, 33))
    for axis, count in enumerate((L, b, a)):
        chosen = np.sort(rng.choice(M.shape[axis], count, replace=False))
        M = M.index_select(axis, torch.from_numpy(chosen))
    return Draw(M.contiguous(), _budget(rng, min(b, a)))


@functools.cache
def _bundled(name: str) -> Tensor:
    return next(source for source in open_source().stacks if source.name == name).load(None, None).values


FAMILIES = {
    "gaussian": Family("independent normal entries", _gaussian),
    "decaying": Family("independent bases, sigma_j = j^-P or exp(-P j)", _decaying),
    "overlapping": Family("bases that the layers have in common in part", _overlapping),
    "equal": Family("layers equal up to scale; optimum known", _equal),
    "near-duplicates": Family("layers that differ by 1e-12 to 0.1 of their norm", _near_duplicates),
    "shared-bases": Family("common singular bases, k = r; optimum known", _shared_bases),
    "orthogonal-columns": Family("mutually orthogonal column spaces, k = r; optimum known", _orthogonal_columns),
    "orthogonal-rows": Family("mutually orthogonal row spaces, k = r; optimum known", _orthogonal_rows),
    "planted": Family("made of RaSA factors of the budget; optimum 0", _planted),
    "planted-in-noise": Family("the same with noise of 1e-9 to 1 of its norm", _planted_in_noise),
    "rank-deficient": Family("layers of rank at most r, some zero; optimum 0", _rank_deficient),
    "extreme-scale": Family("norms from 1e-100 to 1e100, layers of unequal norms", _extreme),
    "thin": Family("one or two rows or columns, also single layers; optimum 0 if r = min(b, a)", _thin),
    "no-sharing": Family("k = 0 or one layer; optimum known, e_lora", _no_sharing),
    "single-precision": Family("computed in float32", _single_precision),
    "fine-tuning": Family("layers, rows and columns of the bundled real updates", _fine_tuning),
}
"""Every family by name, in the order in which the command takes turns."""
