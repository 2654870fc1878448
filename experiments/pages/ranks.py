"""Blocks about the gain over ranks r and shared ranks k, from `ranks_and_pools`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable

from experiments.pages.words import Line, model_table, percent, percents, rows, span
from experiments.ranks_and_pools import gain, mean_over_stacks, of_every_rank, rounded_gain
from experiments.support.rows import Row

FILE = "ranks_and_pools.csv"


def grid(value: Callable[[Row], float]) -> str:
    """The mean of a value over kinds: a line for each model and r, a column for each k."""
    columns = sorted({row["k"] for row in rows(FILE)})

    def lines(own: list[Row]) -> Iterable[Line]:
        means = mean_over_stacks(own, value)
        for rank in sorted({r for r, _ in means}):
            yield [str(rank), *(percent(means[rank, k]) if (rank, k) in means else "" for k in columns)]

    return model_table(["r", *(f"k = {k}" for k in columns)], rows(FILE), lines)


def gains_by_rank() -> str:
    """The gain over LoRA."""
    return grid(gain)


def rounded_gains_by_rank() -> str:
    """The gain that is left when the factors of both are rounded to bfloat16."""
    return grid(rounded_gain)


def at_eighth() -> str:
    """What k = r/8 has of the gain at k = r, how much of it is unequal ranks, and what it is without cancellation."""

    def lines(own: list[Row]) -> Iterable[Line]:
        for rank in sorted({row["r"] for row in own if row["r"] >= 8}):
            of_rank = [row for row in of_every_rank(own) if row["r"] == rank]
            whole = {row["stack"]: row for row in of_rank if row["k"] == rank}
            eighth = [row for row in of_rank if 8 * row["k"] == rank]
            yield [
                str(rank), str(rank // 8), percents((gain(row) / gain(whole[row["stack"]]) for row in eighth), 0),
                *(percents(map(allocation_share, point), 0) for point in (eighth, whole.values())),
                percents(((1 - row["uncancelled"]) / gain(row) for row in eighth), 0),
                span((row["by_loss"] for row in eighth), ".2f"), percents((1 - row["floor"] for row in eighth), 1),
            ]  # fmt: skip

    columns = [
        "r", "k = r/8", "of the gain at k = r", "unequal ranks, of the gain", "the same, k = r",
        "gain without cancellation", "layers a term serves", "certified: at most",
    ]  # fmt: skip
    return model_table(columns, rows(FILE), lines)


def allocation_share(row: Row) -> float:
    """The share of the gain that unequal ranks explain."""
    return float((1 - row["allocation"]) / gain(row))


def best_in_bfloat16() -> str:
    """For each model and r the k of the largest mean gain after rounding, and the largest before it."""

    def lines(own: list[Row]) -> Iterable[Line]:
        exact, rounded = (mean_over_stacks(own, value) for value in (gain, rounded_gain))
        for rank in sorted({r for r, _ in exact}):
            best = [max((k for r, k in means if r == rank), key=lambda k: means[rank, k]) for means in (exact, rounded)]
            median = statistics.median(
                row["cancellation"] for row in of_every_rank(own) if row["r"] == rank and row["k"] == rank
            )
            yield [str(rank), *map(str, best), f"{median:.1f}"]

    return model_table(["r", "best k", "best k in bfloat16", "cancellation at k = r"], rows(FILE), lines)


BLOCKS = (gains_by_rank, rounded_gains_by_rank, at_eighth, best_in_bfloat16)
