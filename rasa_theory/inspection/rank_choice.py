"""Error against rank for all modules together, and the ranks that reach an error, an energy or a size."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rasa_theory.bounds import RankTarget, allocate_ranks
from rasa_theory.inspection.inspect_settings import RankGoal
from rasa_theory.inspection.measurement import Row

Interval = tuple[float, float]

_SUMS = 1e-12  # sums of squares over layers round by less


@dataclass(frozen=True)
class StackEnergies:
    """Bounds on the energy that ranks 0, .., n of the layers of one stack hold: `low`, `high` (L, n + 1).

    A rank above n holds as much as n: n is min(b, a), or the largest rank that was inspected.
    """

    shape: tuple[int, int]
    modules: tuple[str, ...]
    norms_squared: tuple[float, ...]
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, row: Row) -> StackEnergies:
        """The energies in the row of a stack."""
        b, a = row["shape"]
        low, high = (torch.nn.functional.pad(torch.tensor(row[key], dtype=torch.float64), (1, 0)) for key in _BOUNDS)
        return cls((b, a), tuple(row["modules"]), tuple(row["norms_squared"]), low, high)

    def captured(self, ranks: Sequence[int]) -> Interval:
        """Bounds on the energy that rank ranks[i] of layer i holds, summed over the layers."""
        index = torch.tensor(ranks).clamp(max=self.low.shape[1] - 1)[:, None]
        low, high = (math.fsum(bound.gather(1, index)[:, 0].tolist()) for bound in (self.low, self.high))
        return low, high

    def parameters(self, ranks: Sequence[int]) -> int:
        """The number of parameters of a LoRA of these ranks, at most min(b, a) each."""
        return sum(ranks) * sum(self.shape)

    @property
    def worth(self) -> Tensor:
        """Lower bounds on sigma_ij, falling along each layer: (L, n). Sums of their squares are not above `low`."""
        return self.low.diff(dim=1).clamp_min(0).cummin(1).values.sqrt()


_BOUNDS = ("low", "high")


@dataclass(frozen=True)
class FileEnergies:
    """All stacks of a file together. Errors are shares of the squared norm of all updates, between bounds."""

    stacks: tuple[StackEnergies, ...]

    @property
    def norm_squared(self) -> float:
        return math.fsum(norm for stack in self.stacks for norm in stack.norms_squared)

    def error(self, ranks: Sequence[Sequence[int]]) -> Interval:
        """Bounds on the error of LoRAs of these ranks, one for each layer of each stack."""
        total = self.norm_squared
        captured = [stack.captured(own) for stack, own in zip(self.stacks, ranks, strict=True)]
        low, high = (math.fsum(bound) for bound in zip(*captured, strict=True))
        return max(0.0, 1 - high / total), max(0.0, 1 - low / total)

    def parameters(self, ranks: Sequence[Sequence[int]]) -> int:
        """The number of parameters of LoRAs of these ranks."""
        return sum(stack.parameters(own) for stack, own in zip(self.stacks, ranks, strict=True))

    def same(self, rank: int) -> list[list[int]]:
        """One rank for all layers; a narrow matrix has a lower one, which takes it whole."""
        return [[min(rank, *stack.shape)] * len(stack.modules) for stack in self.stacks]


def curve(file: FileEnergies, ranks: Sequence[int], itemsize: int) -> list[dict[str, Any]]:
    """For each rank, if all modules have it: bounds on the error, the number of parameters and their bytes."""
    return [{"rank": rank} | _described(file, file.same(rank), itemsize) for rank in ranks]


def recommend(file: FileEnergies, goal: RankGoal, most: int, itemsize: int) -> dict[str, Any]:
    """One rank for all modules, and ranks of their own, that reach the goal with the fewest parameters.

    Each is None if ranks up to `most` do not reach an error, or the size is too small for any. `not_below`: no smaller
    rank for all modules reaches the error, whatever the true energies are within their bounds.
    """
    one = _one_rank(file, goal, most, itemsize)
    own = _own_ranks(file, goal, itemsize)
    named = None
    if own is not None:
        ranks = {
            name: rank
            for stack, row in zip(file.stacks, own, strict=True)
            for name, rank in zip(stack.modules, row, strict=True)
        }
        named = _described(file, own, itemsize) | {"ranks": ranks}
    return {"goal": goal.plain(), "itemsize": itemsize, "one_rank": one, "own_ranks": named}


def _described(file: FileEnergies, ranks: Sequence[Sequence[int]], itemsize: int) -> dict[str, Any]:
    parameters = file.parameters(ranks)
    return {"error": list(file.error(ranks)), "parameters": parameters, "bytes": parameters * itemsize}


def _one_rank(file: FileEnergies, goal: RankGoal, most: int, itemsize: int) -> dict[str, Any] | None:
    """The least rank that surely reaches the error, or the greatest of the size, by bisection."""
    error = goal.most_error

    def reaches(rank: int, bound: int) -> bool:
        """Whether the rank reaches the error: in the best case (0), or surely (1)."""
        return error is not None and file.error(file.same(rank))[bound] <= error

    if error is None:
        limit = goal.size or 0
        rank = _last(lambda r: file.parameters(file.same(r)) * itemsize <= limit, most)
        return {"rank": rank} | _described(file, file.same(rank), itemsize) if rank > 0 else None
    not_below = 1 + _last(lambda r: not reaches(r, 0), most)
    rank = 1 + _last(lambda r: not reaches(r, 1), most)
    if rank > most:
        return None
    return {"rank": rank, "not_below": not_below} | _described(file, file.same(rank), itemsize)


def _last(holds: Callable[[int], bool], most: int) -> int:
    """The largest rank in 1 .. most for which a condition holds that fails for all larger ranks; 0 if it never does."""
    return bisect.bisect_left(range(1, most + 1), True, key=lambda rank: not holds(rank))


def _own_ranks(file: FileEnergies, goal: RankGoal, itemsize: int) -> list[list[int]] | None:
    """The rank of every layer by `allocate_ranks`, with the energies that the terms hold at least."""
    worth = [stack.worth for stack in file.stacks]
    if goal.most_error is None:
        target = RankTarget(parameters=max(1, (goal.size or 0) // itemsize))
    else:
        held = math.fsum(float((w**2).sum()) for w in worth)
        share = (1 - goal.most_error) * file.norm_squared / held
        if share > 1 + _SUMS:
            return None
        target = RankTarget(energy=min(share, 1.0))
    ranks = allocate_ranks(worth, [sum(stack.shape) for stack in file.stacks], target)
    return ranks if any(map(any, ranks)) else None
