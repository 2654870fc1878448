"""The ten stacks, each from a seed, and what branch and bound can prove about each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from experiments.tiny_instances.branching import Elimination, three_terms, two_terms

Array = NDArray[np.float64]


def normal(L: int, b: int, a: int, rng: np.random.Generator) -> Array:
    """Independent normal entries."""
    return rng.standard_normal((L, b, a))


def steep(L: int, b: int, a: int, rng: np.random.Generator) -> Array:
    """Random singular vectors of each layer, with the singular values 1, 1/2, 1/4 and so on."""
    U, V = (np.linalg.qr(rng.standard_normal((L, n, n)))[0] for n in (b, a))
    m = min(b, a)
    values: Array = U[:, :, :m] * 0.5 ** np.arange(m) @ V[:, :, :m].transpose(0, 2, 1)
    return values


def planted(L: int, b: int, a: int, rng: np.random.Generator) -> Array:
    """L dyads with normal mixing, the optimum for r = k = 1 without noise, and 50 % of noise."""
    B, D, A = (rng.standard_normal(s) for s in ((b, L), (L, L), (L, a)))
    return noisy((B * D[:, None]) @ A, 0.5, rng)


def noisy(values: Array, share: float, rng: np.random.Generator) -> Array:
    """Add normal noise with this share of the norm of `values`."""
    noise = rng.standard_normal(values.shape)
    return values + share * float(np.linalg.norm(values) / np.linalg.norm(noise)) * noise


@dataclass(frozen=True)
class Instance:
    """A stack of shape (L, b, a) and a budget (r, k).

    `eliminate` returns the problem in a few angles for branch and bound. Its minimum is e_rasa(k) if `exact`, and a
    lower bound on it otherwise. None: no such problem is known. `axes` turn the tensor into two square slices whose
    size is its CP rank; empty where that cannot be.
    """

    kind: Callable[[int, int, int, np.random.Generator], Array]
    shape: tuple[int, int, int]
    rank: int
    k: int
    seed: int
    eliminate: Callable[[Array], Elimination] | None = None
    exact: bool = True
    axes: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return f"{'x'.join(map(str, self.shape))} ({self.rank},{self.k}) {self.kind.__name__}"

    def updates(self) -> Array:
        return self.kind(*self.shape, np.random.default_rng(self.seed))


INSTANCES = (
    Instance(normal, (2, 2, 2), 1, 1, 5, two_terms, axes=(0, 1, 2)),
    Instance(planted, (2, 2, 3), 1, 1, 0, two_terms),
    Instance(steep, (2, 3, 3), 1, 1, 0, two_terms),
    Instance(normal, (2, 3, 4), 1, 1, 2, two_terms),
    Instance(normal, (3, 2, 3), 1, 1, 27, lambda M: three_terms(M.transpose(1, 0, 2)), axes=(1, 0, 2)),
    Instance(normal, (2, 4, 4), 2, 1, 1),
    Instance(normal, (2, 4, 4), 2, 2, 1, axes=(0, 1, 2)),
    Instance(planted, (3, 3, 3), 1, 1, 0, three_terms, exact=False),
    Instance(steep, (3, 4, 4), 1, 1, 2),
    Instance(normal, (3, 4, 4), 2, 1, 2),
)
"""Seeds were chosen among some tens, so that the floor does not meet the solver's error, but for the second stack."""
