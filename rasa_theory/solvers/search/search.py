"""The search for the best pool: many starts on a small core, late cuts, and moves out of the minima that they find."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rasa_theory.linalg import suitable_threads
from rasa_theory.problem import LayerStack, RankBudget, RasaFactors
from rasa_theory.solvers.accuracy import layer_sizes
from rasa_theory.solvers.search.batch import Batch, inside, update_private
from rasa_theory.solvers.search.core import SearchCore, core_side
from rasa_theory.solvers.search.effort import Effort
from rasa_theory.solvers.search.moves import moved
from rasa_theory.solvers.search.sweeps import BatchedSweeps
from rasa_theory.solvers.starts import STARTS, Start

_SAME = 1e-4  # two runs whose errors differ by less than this share are taken for one minimum
_NEAR = 1e-3  # of e_lora: a run this close to the best counts as having found it
_SETTLED = 1e-4  # the relative gain below which no further sweeps follow
_NOTHING = 1e-14  # of ||K||^2: an error that is rounding alone
_CHANGED = 1e-5  # of the error: what counts as a change
_NEXT_SEED = 1_000_003  # between the seeds of a start's entries; large, so that neighbouring seeds take others


@dataclass(frozen=True)
class Candidate:
    """Factors that a search ends with, and the name of the start that led to them."""

    start: str
    factors: RasaFactors


@dataclass(frozen=True)
class SearchSummary:
    """Counts by which a reader can judge a search.

    Attributes:
        starts: number of starts.
        near_best: number of starts with an error within 0.1 % of e_lora of the lowest, before any moves.
        moves: number of moves tried.
        moves_kept: number of rounds of moves that ended lower.
    """

    starts: int
    near_best: int
    moves: int
    moves_kept: int


Watch = Callable[[int, int, float], None]
"""Called after every step of a search with the number of steps done, the number planned, and the lowest error."""


class _Runs:
    """The runs of a search: swept together, each with the name and number of the starts that it stands for."""

    def __init__(self, sweeps: BatchedSweeps, names: list[str]) -> None:
        self.sweeps = sweeps
        self.names = names
        self.stands_for = [1] * len(names)

    def cut(self, count: int, after: int = 0) -> None:
        """Go on with the `count` lowest, one of each minimum. It stands for those of its minimum that are left out.

        The first `after` runs stay, and are not counted.
        """
        errors = self.sweeps.errors.clamp_min(0).tolist()  # rounding can make them negative
        kept = list(range(after))
        for n in sorted(range(after, len(errors)), key=lambda n: errors[n]):
            same = [m for m in kept if 0 <= errors[n] - errors[m] <= _SAME * errors[n]]
            if same:
                self.stands_for[same[0]] += self.stands_for[n]
            elif len(kept) < after + count:
                kept.append(n)
        self.sweeps.select(torch.tensor(kept, device=self.sweeps.errors.device))
        self.names = [self.names[n] for n in kept]
        self.stands_for = [self.stands_for[n] for n in kept]

    def run(self, heats: tuple[tuple[int, int], ...], after: int = 0) -> None:
        """Sweep and cut as `heats` say; the first `after` runs stay."""
        for sweeps, left in heats:
            self.sweeps.run(sweeps)
            self.cut(left, after)

    def join(self, other: _Runs) -> None:
        self.sweeps.join(other.sweeps)
        self.names, self.stands_for = self.names + other.names, self.stands_for + other.stands_for

    def near(self, distance: float) -> int:
        """The number of starts behind the runs whose error is within `distance` of the lowest."""
        errors = self.sweeps.errors.tolist()
        return sum(n for n, error in zip(self.stands_for, errors, strict=True) if error <= min(errors) + distance)


class PoolSearch:
    """A search on the core of a stack at `factors`, all in units of the stack's scale.

    Terms stay below `max_cancellation` times ||M_i||. `watch` is called after every heat and every round of moves, with
    the squared error on the stack.
    """

    def __init__(
        self,
        unit: LayerStack,
        budget: RankBudget,
        factors: RasaFactors,
        effort: Effort,
        seed: int,
        max_cancellation: float = math.inf,
        watch: Watch | None = None,
    ) -> None:
        self._unit, self._budget, self._seed, self._watch = unit, budget, seed, watch
        self.core = SearchCore.at(unit, factors)
        self._limits = max_cancellation * unit.sharding.all_gather(layer_sizes(unit)).to(self.core.K.device)
        self._near = _NEAR * unit.spectra.tail_energy(budget.rank)
        self._effort = effort.within(cost_of_sweep(tuple(self.core.K.shape), budget), _entries_of_starts())
        self._energy = float((self.core.K**2).sum())
        self._beside = unit.norm_squared - self._energy  # what the core leaves out
        self._generator = torch.Generator().manual_seed(seed)

    def run(self, given: Sequence[Candidate] = ()) -> tuple[list[Candidate], SearchSummary]:
        """The lowest distinct factors, lowest first, from all starts and from the factors given."""
        return self._searched([*self._starts(), *self._projected(given)], self._effort.heats)

    def around(self, given: Sequence[Candidate]) -> tuple[list[Candidate], SearchSummary]:
        """The same from the factors given alone, by moves."""
        return self._searched(self._projected(given), ())

    def _searched(
        self, candidates: list[Candidate], heats: tuple[tuple[int, int], ...]
    ) -> tuple[list[Candidate], SearchSummary]:
        """Sweeps and moves from candidates on the core; the lowest distinct ones, on the stack."""
        K = self.core.K
        with suitable_threads(K.flatten(0, 1)):  # products with all layers at once take most of the time
            batch = update_private(K, Batch.of([candidate.factors for candidate in candidates]))
            runs = _Runs(self._swept(batch), [candidate.start for candidate in candidates])
            runs.sweeps.run(1)  # for their errors
            self._tell(0, len(heats) + self._rounds(0), runs)
            for n, heat in enumerate(heats):
                runs.run((heat,))
                self._tell(n + 1, len(heats) + self._rounds(0), runs)
            near = runs.near(self._near)
            tried, kept = self._moves(runs, len(heats))
            batch, errors = self._settled(runs)
        factors, results, before = batch.factors(), list[Candidate](), -math.inf
        for n in errors.argsort().tolist():
            error = float(errors[n])
            if error - before > _SAME * error:
                results.append(Candidate(runs.names[n], self.core.lifted(factors[n], self._unit)))
                before = error
        return results, SearchSummary(len(candidates), near, tried, kept)

    def _settled(self, runs: _Runs) -> tuple[Batch, Tensor]:
        """The runs inside the bound, and their squared errors, after more sweeps.

        A core that is all of M leaves nothing for the stack to improve, so the sweeps go on as long as a run gains
        so much that it could end as the lowest.
        """
        batch, errors = self._final(runs)
        for remaining in reversed(range(self._effort.more if self.core.is_whole else 0)):
            other, after = self._final(runs)  # not always lower, since multipliers change
            gains = (errors - after).clamp_min(0)
            batch, errors = other.where(after < errors, batch), torch.minimum(after, errors)
            if not bool((errors - remaining * gains < (1 - _SETTLED) * errors.min()).any()):
                break
        return batch, errors

    def _final(self, runs: _Runs) -> tuple[Batch, Tensor]:
        """The runs inside the bound, and their squared errors, after `Effort.final` sweeps."""
        runs.sweeps.run(self._effort.final)
        return inside(self.core.K, runs.sweeps.batch, self._limits)

    def _projected(self, given: Sequence[Candidate]) -> list[Candidate]:
        return [Candidate(candidate.start, self.core.projected(candidate.factors)) for candidate in given]

    def _starts(self) -> Iterator[Candidate]:
        """All entries of all starts on the core, those of `Start.entries` in units of `Effort.starts`."""
        stack = LayerStack(self.core.K)
        for start in starts_of_search():
            for entry in range(self._effort.entries(start.entries)):
                factors = start.make(stack, self._budget, self._seed + entry * _NEXT_SEED)
                if factors is not None:
                    yield Candidate(start.name, factors)

    def _swept(self, batch: Batch) -> BatchedSweeps:
        return BatchedSweeps(self.core.K, batch, self._limits)

    def _moves(self, runs: _Runs, steps_before: int) -> tuple[int, int]:
        """Rounds of moves from the lowest runs, which stay; the number of moves, and of rounds that paid."""
        effort, K = self._effort, self.core.K
        if effort.moves == 0 or effort.rounds == 0:
            return 0, 0
        runs.cut(effort.parents)
        lowest = self._lowest(runs)
        done = kept = last_change = 0
        while lowest > _NOTHING * self._energy and done < self._rounds(last_change):
            batch, origin = moved(K, runs.sweeps.batch, effort.moves, self._generator)
            parents = len(runs.names)
            runs.join(_Runs(self._swept(batch), [runs.names[n] for n in origin.tolist()]))
            runs.run(effort.move_heats, after=parents)
            runs.cut(effort.parents)
            done += 1
            error = self._lowest(runs)
            if error < (1 - _CHANGED) * lowest:
                kept, last_change = kept + 1, done
            lowest = min(error, lowest)
            self._tell(steps_before + done, steps_before + self._rounds(last_change), runs)
        return done * effort.moves, kept

    def _lowest(self, runs: _Runs) -> float:
        """The lowest squared error of the runs inside the bound. At the bound errors of the sweeps rise and fall."""
        return float(inside(self.core.K, runs.sweeps.batch, self._limits)[1].min())

    def _rounds(self, last_change: int) -> int:
        """The number of rounds to do, if the last change was in round `last_change`."""
        return max(self._effort.rounds, 2 * last_change) if self._effort.until_idle else self._effort.rounds

    def _tell(self, done: int, planned: int, runs: _Runs) -> None:
        if self._watch is not None:
            self._watch(done, planned, max(0.0, self._beside + float(runs.sweeps.errors.min())))


def starts_of_search() -> Iterator[Start]:
    """All starts without conditions. The race tries those with conditions on the stack, before the search.

    By trial they found nothing that others miss on cores where their conditions do not hold.
    """
    return (start for start in STARTS.values() if start.is_worth_racing is None)


def search_operations(layers: int, shape: tuple[int, int], budget: RankBudget, effort: Effort) -> float:
    """The number of floating-point operations of the sweeps of a search for layers (b, a), about."""
    n, m = (core_side(side, layers * budget.rank) for side in shape)
    cost, entries = cost_of_sweep((layers, n, m), budget), _entries_of_starts()
    return cost * effort.within(cost, entries).sweeps(entries)


def _entries_of_starts() -> list[int]:
    return [start.entries for start in starts_of_search()]


def cost_of_sweep(shape: tuple[int, ...], budget: RankBudget) -> float:
    """The number of floating-point operations of one sweep of one run on a core (L, n, m), about."""
    L, n, m = shape
    R, q = budget.pool_rank(L), budget.private_rank
    return 4.0 * L * n * m * (q + R) + 4.0 * L * (n + m) * R * (R + q) + L * R**3
