"""The budget of ranks of one layer: private ranks and shared ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from rasa_theory.common import InputError, at_least


class Shaped(Protocol):
    """Anything with a name and the shape (b, a) of its layers: a stack, or one that is not read yet."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, int]: ...


@dataclass(frozen=True)
class RankBudget:
    """The ranks of one layer: r in all, k of them in the shared pool.

    Arguments:
        rank: r, at least 1.
        shared_rank: k, from 0 to r.

    Raises:
        InputError: one of them is not a whole number in its range; the message names both.
    """

    rank: int
    shared_rank: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", at_least("rank", self.rank, 1))
        object.__setattr__(self, "shared_rank", at_least("shared_rank", self.shared_rank, 0))
        if self.shared_rank > self.rank:
            raise InputError(f"shared_rank {self.shared_rank} exceeds rank {self.rank}", "shared_rank")

    @property
    def private_rank(self) -> int:
        """q = r - k, the private rank of a layer."""
        return self.rank - self.shared_rank

    def pool_rank(self, layers: int) -> int:
        """R = L k, the rank of the pool of `layers` layers."""
        return layers * self.shared_rank

    def check_fits(self, stack: Shaped) -> None:
        """Raise InputError if r exceeds min(b, a) of `stack`."""
        b, a = stack.shape
        if self.rank > min(b, a):
            raise InputError(
                f"rank {self.rank} exceeds min(b, a) = {min(b, a)} of stack {stack.name!r} ({b} x {a}); lower the rank",
                "rank",
            )
