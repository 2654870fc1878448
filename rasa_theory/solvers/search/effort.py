"""How much a search for the best pool does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Effort:
    """The plan of a search.

    - starts: how many starts take part, in units of the entries of each `Start`.
    - heats: pairs (sweeps, the number of runs that go on after them), from all starts on.
    - rounds: how often moves are tried from the lowest runs. With `until_idle` they go on until as many rounds in a row
      changed nothing as there were before the last change, and at least this many.
    - moves: the number of moves in a round.
    - move_heats: pairs (sweeps, the number of moves that go on), while the runs that they come from go on as well.
    - parents: the number of distinct runs that a round begins and ends with.
    - final: the number of sweeps of each remaining run at the end.
    - more: at most this many further rounds of `final` sweeps, where the core is all of M.
    - returns: how often moves are tried again on the core at the lowest run on the stack, at most.
    - cost: the largest number of floating-point operations, about, without `more` and rounds beyond `rounds`. A search
      on a large core does less of everything.
    """

    starts: float
    heats: tuple[tuple[int, int], ...]
    rounds: int
    moves: int
    move_heats: tuple[tuple[int, int], ...]
    parents: int
    final: int
    more: int
    returns: int
    cost: float
    until_idle: bool = False

    def returning(self) -> Effort:
        """The plan for moves from one run on the stack: a single round."""
        return replace(self, rounds=1, until_idle=False)

    def entries(self, of_start: int) -> int:
        """The number of entries of a start that has `of_start` of them for `starts` = 1; a single one stays single."""
        return of_start if of_start == 1 else math.ceil(self.starts * of_start)

    def sweeps(self, entries: Sequence[int]) -> float:
        """The number of sweeps of all runs together, without `more` and rounds beyond `rounds`.

        `entries` are those of all starts for `starts` = 1.
        """
        runs, total = sum(map(self.entries, entries)), 0.0
        for sweeps, left in self.heats:
            total += runs * sweeps
            runs = left
        moves = self.moves
        per_round = 0.0
        for sweeps, left in self.move_heats:
            per_round += moves * sweeps
            moves = left
            per_round += self.parents * sweeps
        return total + self.rounds * per_round + self.parents * self.final

    def within(self, cost_of_sweep: float, entries: Sequence[int]) -> Effort:
        """The same plan with fewer starts and moves, if `cost` does not allow more; at least a tenth of them.

        `cost_of_sweep` is that of one run, and `entries` are as in `sweeps`.
        """
        share = min(1.0, self.cost / (self.sweeps(entries) * cost_of_sweep))
        if share == 1.0:
            return self
        share = max(share, 0.1)

        def fewer(count: int) -> int:
            return max(1, math.ceil(share * count))

        return replace(
            self,
            starts=share * self.starts,
            heats=tuple((sweeps, fewer(left)) for sweeps, left in self.heats),
            moves=fewer(self.moves),
            move_heats=tuple((sweeps, fewer(left)) for sweeps, left in self.move_heats),
            parents=fewer(self.parents),
        )


EFFORTS = {
    "quick": Effort(
        starts=0.5, heats=((40, 4), (40, 2)), rounds=0, moves=0, move_heats=(), parents=2, final=60, more=0, returns=0,
        cost=3e9,
    ),
    "default": Effort(
        starts=2.5, heats=((50, 40), (80, 10)), rounds=2, moves=32, move_heats=((50, 10), (50, 6)), parents=8,
        final=40, more=6, returns=3, cost=1e10,
    ),
    "thorough": Effort(
        starts=8.0, heats=((80, 96), (150, 32)), rounds=4, moves=64, move_heats=((80, 24), (120, 12)), parents=16,
        final=60, more=20, returns=20, cost=1e12, until_idle=True,
    ),
}  # fmt: skip
"""The efforts by name. All numbers were chosen by trial on the stacks of `experiments.best_found`."""
