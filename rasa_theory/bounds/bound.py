"""The type of all bounds on e_rasa(k), and the names of the arguments that prove them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class BoundName(StrEnum):
    """The argument that proves a bound. Members are strings, and are written to files as such."""

    ALLOCATION = "allocation"
    """An upper bound: the pool without sharing. See `allocation_bound`."""
    ZERO = "zero"
    """A floor: errors are not negative."""
    RANK = "rank"
    """A floor: one update has rank q + R at most. See `rank_floor`."""
    STACK = "stack"
    """A floor: all updates side by side have rank L r at most. See `stack_floor`."""
    CLIPPED = "clipped"
    """A floor: private and shared columns counted apart. See `clipped_floor`."""
    SPLIT = "split"
    """A floor: the columns of one part of M_i and the rows of the rest. See `split_floor`."""
    DUAL = "dual"
    """A floor: the clipped one with any Y_i >= 0 for the clipped part. See `dual_value`."""
    TWO_SIDED = "two-sided"
    """A floor: the split one with any division of the part that counts on both sides. See `two_sided_value`."""


PROBABLE = "probable: the floor is from products with random vectors, and holds but for a probability of 1e-10."
"""What a reader of a table with such a floor has to know."""


@dataclass(frozen=True)
class Bound:
    """A bound on e_rasa(k).

    Arguments:
        value: the bound, squared, summed over layers, in the units of the input.
        name: a `BoundName`, the argument that proves it, for example "rank". A floor from products with M alone is
            "rank, probable", and so on.
        failure: the probability that it does not hold, over the random vectors of the computation; 0 for most.
    """

    value: float
    name: str
    failure: float = 0.0
