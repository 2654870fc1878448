"""How much a search for the best pool does."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Effort:
    """The plan of a search.

    - starts: how many starts take part, in units of the entries of each `Start`.
    - heats: pairs (sweeps, the number of runs that go on after them), from all starts on.
    - rounds: how often moves are tried from the lowest runs. With `until_idle` they go on until as many rounds in a row
      changed nothing as there were before the last change, and at least this many.
    - moves: the number of moves in a round.
    - move_heats: pairs (sweeps, runs that go on) for the moves.
    - parents: the number of distinct runs that a round begins and ends with.
    - between, final: sweeps of these in every round, and at the end.
    - returns: how often moves are tried again on the core at the lowest run on the stack, at most.
    - cost: the largest number of floating-point operations, about. A search on a large core does less of everything.
    """

    starts: float
    heats: tuple[tuple[int, int], ...]
    rounds: int
    moves: int
    move_heats: tuple[tuple[int, int], ...]
    parents: int
    between: int
    final: int
    returns: int
    cost: float
    until_idle: bool = False

    def returning(self) -> Effort:
        """The plan for moves from one run on the stack: a single round, and few sweeps of what has descended before."""
        return replace(self, rounds=1, between=self.between // 2, final=self.final // 4)

    def within(self, cost_of_sweep: float, entries: int) -> Effort:
        """The same plan with fewer starts and moves, if `cost` does not allow more; at least a tenth of them.

        `cost_of_sweep` is that of one run, and `entries` is the number of starts for `starts` = 1.
        """
        runs, total = self.starts * entries, 0.0
        for sweeps, left in self.heats:
            total += runs * sweeps
            runs = left
        moves = self.moves
        per_round = 0.0
        for sweeps, left in self.move_heats:
            per_round += moves * sweeps
            moves = left
        total += self.rounds * (per_round + self.parents * self.between) + self.parents * self.final
        share = min(1.0, self.cost / (total * cost_of_sweep))
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
    "quick": Effort(0.5, ((40, 4), (40, 2)), 0, 0, (), 2, 0, 60, 0, 3e9),
    "default": Effort(2.0, ((50, 24), (80, 8)), 3, 16, ((60, 6), (80, 3)), 2, 80, 150, 3, 6e9),
    "thorough": Effort(6.0, ((80, 48), (120, 16)), 4, 32, ((80, 12), (120, 6)), 4, 100, 400, 20, 1e12, until_idle=True),
}
"""The efforts by name. All numbers were chosen by trial on the stacks of `experiments.best_found`."""
