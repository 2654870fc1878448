"""The settings of an inspection, and the goal for which it recommends ranks."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from rasa_theory.common import InputError, at_least, fraction

RANKS = (4, 8, 16, 32, 64, 128)
"""The ranks at which the energy of every layer is reported, unless others are named."""
MOST_RANK = 4096
DIRECTIONS = 16
"""The number of leading singular directions of each layer whose subspaces are compared."""
FAILURE = 1e-10
"""The largest probability that any interval of one inspection is wrong."""


@dataclass(frozen=True)
class InspectSettings:
    """The settings that measurements depend on: `ranks`, sorted, each once. The largest is as far as spectra go.

    Raises InputError if there is no rank, or one is below 1 or above 4096.
    """

    ranks: tuple[int, ...] = RANKS

    def __post_init__(self) -> None:
        ranks = sorted({at_least("ranks", rank, 1) for rank in self.ranks})
        if not ranks or ranks[-1] > MOST_RANK:
            what = f"got {ranks[-1]}" if ranks else "none was given"
            raise InputError(f"ranks must be one or more numbers from 1 to {MOST_RANK}, {what}", "ranks")
        object.__setattr__(self, "ranks", tuple(ranks))

    @property
    def rank(self) -> int:
        """The largest of the ranks."""
        return self.ranks[-1]

    def plain(self) -> dict[str, Any]:
        """The settings as plain data."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class RankGoal:
    """What the ranks have to reach: exactly one of an error, an energy or a size.

    - error: the share of the squared norm of all modules that the adapter may miss, 0 <= error < 1.
    - energy: the share that it must hold, 0 < energy <= 1.
    - size: the number of bytes that its parameters may take, at least 1.

    Raises InputError unless exactly one of the three is set, and in its range.
    """

    error: float | None = None
    energy: float | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        named = [one.name for one in dataclasses.fields(self) if getattr(self, one.name) is not None]
        if len(named) != 1:
            found = " and ".join(named) if named else "none"
            raise InputError(f"name exactly one of error, energy and size, got {found}")
        if self.error is not None:
            fraction("error", self.error)
        if self.energy is not None and not 0 < self.energy <= 1:
            raise InputError(f"energy must be above 0 and at most 1, got {self.energy}", "energy")
        if self.size is not None:
            at_least("size", self.size, 1)

    @property
    def most_error(self) -> float | None:
        """The share of the squared norm that may be missed; None for a size."""
        return self.error if self.energy is None else 1 - self.energy

    def plain(self) -> dict[str, Any]:
        """The one goal as plain data."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}


def share_of_failure(stack: int, layers: int) -> float:
    """The probability of failure for each layer of stack number `stack`, from 0 on; all of them sum up to `FAILURE`.

    The shares 6 / (pi (stack + 1))^2 sum up to 1 over any number of stacks.
    """
    return FAILURE * 6 / (math.pi * (stack + 1)) ** 2 / layers
