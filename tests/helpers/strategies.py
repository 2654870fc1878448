"""Stacks on which careless numerics fail."""

from typing import NamedTuple

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from rasa_theory import LayerStack, RankBudget, SolverOptions, solve_rasa
from tests.helpers.problems import planted

KINDS = ("generic", "low rank", "repeated", "zero layers", "equal", "near duplicates", "uneven", "planted", "one entry")


def fewer_examples(divisor):
    """A share of the examples of the profile, for tests of which each takes long."""
    return settings(max_examples=settings.default.max_examples // divisor)


class Nasty(NamedTuple):
    """values (L, b, a) and ranks r, k."""

    values: np.ndarray
    r: int
    k: int

    @property
    def stack(self):
        """As the package takes it."""
        return LayerStack(self.values)

    @property
    def budget(self):
        """As the package takes it."""
        return RankBudget(self.r, self.k)


@st.composite
def nasty_stacks(draw, scales=(1.0, 1e-100, 1e100, 1e-9, 3e7)):
    """L 1..4, b and a 1..8, 1 <= r <= min(b, a), 0 <= k <= r: see KINDS; multiplied by one of `scales`."""
    L, b, a = draw(st.integers(1, 4)), draw(st.integers(1, 8)), draw(st.integers(1, 8))
    r = draw(st.integers(1, min(b, a)))
    k = draw(st.integers(0, r))
    kind, seed = draw(st.sampled_from(KINDS)), draw(st.integers(0, 2**16))
    rng = np.random.default_rng(seed)
    M = rng.standard_normal((L, b, a))
    if kind == "low rank":
        M = rng.standard_normal((L, b, 1)) @ rng.standard_normal((L, 1, a))
    elif kind == "repeated":
        M = np.stack([np.linalg.svd(m, full_matrices=False)[0] @ np.linalg.svd(m, full_matrices=False)[2] for m in M])
    elif kind == "zero layers":
        M[rng.random(L) < 0.5] = 0
    elif kind == "equal":
        M[:] = M[0]
    elif kind == "near duplicates":
        M = M[:1] + 1e-9 * M
    elif kind == "uneven":
        M *= 10.0 ** rng.integers(-9, 3, (L, 1, 1))
    elif kind == "planted":
        M = planted(seed, L, b, a, r, k).values
    elif kind == "one entry":
        M[:] = 0
        M[-1, -1, -1] = 1
    return Nasty(M * draw(st.sampled_from(scales)), r, k)


def best_error(problem):
    """The lowest error of two short solves."""
    found = (SolverOptions(start=start, max_sweeps=25, rtol=1e-5) for start in ("random", "allocation"))
    return min(solve_rasa(problem.stack, problem.budget, options).error for options in found)
