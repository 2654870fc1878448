"""Blocks about the gain over ranks r and shared ranks k, from `ranks_and_pools`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from experiments.models.update_sets import MODEL_NAMES
from experiments.pages.words import (
    Line,
    allocation_share,
    model_table,
    of_model,
    percent,
    percents,
    rows,
    span,
    spelled,
    table,
)
from experiments.ranks_and_pools import SHOWN_KINDS, gain, mean_over_kinds, rounded_gain, shown
from experiments.support.rows import Row

FILE = "ranks_and_pools.csv"


def points() -> list[Row]:
    """The rows of both kinds that the page is of. Raises ValueError if there are none."""
    if not (own := shown(rows(FILE))):
        raise ValueError(f"figures/{FILE} has no r and k with rows of {' and '.join(SHOWN_KINDS)}")
    return own


def grid(value: Callable[[Row], float]) -> str:
    """The mean of a value over two kinds: a line for each model and r, a column for each k."""
    ks = sorted({row["k"] for row in points()})

    def lines(own: list[Row]) -> Iterable[Line]:
        means = mean_over_kinds(own, value)
        for rank in sorted({r for r, _ in means}):
            yield [str(rank), *(percent(means[rank, k]) if (rank, k) in means else "" for k in ks)]

    return model_table(["r", *(f"k = {k}" for k in ks)], points(), lines)


def gains_by_rank() -> str:
    """The gain over LoRA, mean of two kinds."""
    return grid(gain)


def rounded_gains_by_rank() -> str:
    """The gain that is left when the factors of both are rounded to bfloat16, mean of two kinds."""
    return grid(rounded_gain)


def at_eighth() -> str:
    """What k = r/8 has of the gain at k = r, how much of it is unequal ranks, and what it is without cancellation."""

    def lines(own: list[Row]) -> Iterable[Line]:
        for rank in sorted({row["r"] for row in own if row["r"] % 8 == 0}):
            whole = {row["stack"]: row for row in own if row["r"] == row["k"] == rank}
            eighth = [row for row in own if row["r"] == 8 * row["k"] == rank]
            yield [
                str(rank), str(rank // 8), percents((gain(row) / gain(whole[row["stack"]]) for row in eighth), 0),
                *(percents(map(allocation_share, group), 0) for group in (eighth, whole.values())),
                percents(((1 - row["uncancelled"]) / gain(row) for row in eighth), 0),
                span((row["by_loss"] for row in eighth), ".2f"), percents((1 - row["floor"] for row in eighth), 1),
            ]  # fmt: skip

    columns = [
        "r", "k = r/8", "of the gain at k = r", "unequal ranks, of the gain", "the same, k = r",
        "gain without cancellation", "layers a term serves", "certified: at most",
    ]  # fmt: skip
    return model_table(columns, points(), lines)


def best_in_bfloat16() -> str:
    """For each model and r the k of the largest mean gain, before and after rounding, and the cancellation at k = r."""

    def lines(own: list[Row]) -> Iterable[Line]:
        exact, rounded = (mean_over_kinds(own, value) for value in (gain, rounded_gain))
        cancellation = mean_over_kinds(own, lambda row: float(row["cancellation"]))
        for rank in sorted({r for r, _ in exact}):
            best = [max((k for r, k in means if r == rank), key=lambda k: means[rank, k]) for means in (exact, rounded)]
            yield [str(rank), *map(str, best), f"{cancellation[rank, rank]:.1f}"]

    return model_table(["r", "best k", "best k in bfloat16", "cancellation at k = r"], points(), lines)


def at_8(word: str) -> list[Row]:
    """The rows of a model at r = k = 8."""
    return [row for row in points() if row["model"] == MODEL_NAMES[word] and row["r"] == row["k"] == 8]


def sharing(own: list[Row]) -> str:
    """What sharing takes off, in per cent of e_lora."""
    return percents(row["allocation"] - row["best_found"] for row in own)


def sharing_k8() -> str:
    """Sharing at r = k = 8 on query and attention output of MiniLM."""
    return sharing(at_8("minilm"))


def sharing_k8_mpnet() -> str:
    """Sharing at r = k = 8 on query and attention output of mpnet."""
    return sharing(at_8("mpnet"))


def allocation_k8_mpnet() -> str:
    """The share of mpnet's gain at r = k = 8 that unequal ranks explain, over its two kinds."""
    return percents(map(allocation_share, at_8("mpnet")), 0)


def synthetic_layers() -> str:
    """The gain on synthetic stacks at r = 8, its parts, and the layers that a pool term serves."""
    own = of_model(MODEL_NAMES["synthetic"], FILE, r=8)
    lines = [
        [spelled(row["stack"]), str(row["k"]), percent(gain(row)), percent(allocation_share(row), 0),
         sharing([row]), f"{row['by_loss']:.2f}", percent(1 - row["floor"])]
        for row in own
    ]  # fmt: skip
    columns = [
        "bases",
        "k",
        "gain over LoRA",
        "unequal ranks, of the gain",
        "sharing",
        "layers a term serves",
        "certified: at most",
    ]
    return table(columns, lines)


BLOCKS = (
    gains_by_rank, rounded_gains_by_rank, at_eighth, best_in_bfloat16, sharing_k8, sharing_k8_mpnet,
    allocation_k8_mpnet, synthetic_layers,
)  # fmt: skip
