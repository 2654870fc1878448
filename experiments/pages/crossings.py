"""Blocks about the number of iterations until a random start is below LoRA."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from experiments.pages.words import Line, first_model, kinds_of, model_table, rows, second_model, span, spelled, table
from experiments.support.rows import Row

ITERATIONS = (10, 30, 60, 200)
LIMITS = ["below LoRA by iteration 10", *map(str, ITERATIONS[1:])]
"""Columns of the counts of attempts that are below LoRA within each of `ITERATIONS`."""


def crossed_by(attempts: Sequence[Row], iterations: int) -> int:
    return sum(row["iterations"] is not None and row["iterations"] <= iterations for row in attempts)


def counted(attempts: Sequence[Row]) -> list[str]:
    """How many attempts are below LoRA within each of `ITERATIONS`."""
    counts = [f"{crossed_by(attempts, n)} of {len(attempts)}" for n in ITERATIONS]
    return counts if attempts else [""] * len(counts)


def median(attempts: Sequence[Row]) -> str:
    """The lower median of the first iteration below LoRA."""
    counts = sorted(row["iterations"] or float("inf") for row in attempts)
    middle = statistics.median_low(counts)
    return "never" if middle == float("inf") else f"{middle:.0f}"


def crossings() -> str:
    """Ten seeds of every kind and k at r = 8."""

    def lines(own: list[Row]) -> Iterable[Line]:
        for kind in kinds_of(own):
            of_kind = [row for row in own if row["stack"] == kind]
            for k in sorted({row["k"] for row in of_kind}):
                yield [spelled(kind), str(k), *counted([row for row in of_kind if row["k"] == k])]

    real = [row for row in rows("iteration_count.csv") if row["part"] == "real" and row["rank"] == 8]
    return model_table(["r = 8", "k", *LIMITS], real, lines)


def crossings_by_rank() -> str:
    """All attempts on the bundled updates, by rank."""

    def lines(own: list[Row]) -> Iterable[Line]:
        ranks = sorted({row["rank"] for row in own})
        for rank in ranks:
            of_rank = [row for row in own if row["rank"] == rank]
            ks = ", ".join(map(str, sorted({row["k"] for row in of_rank})))
            yield [str(rank), ks, *counted(of_rank)]
        if len(ranks) > 1:
            yield ["all", "", *counted(own)]

    real = [row for row in rows("iteration_count.csv") if row["part"] == "real"]
    return model_table(["r", "k", *LIMITS], real, lines)


def crossings_synthetic() -> str:
    """Made stacks at k = 1 by spectrum and share of common bases: the median, and the count within ten."""
    own = first_model("iteration_count.csv", part="synthetic", k=1)
    overlaps = sorted({row["overlap"] for row in own})
    lines = []
    for stack in dict.fromkeys(row["stack"] for row in own):
        groups = [[row for row in own if row["stack"] == stack and row["overlap"] == overlap] for overlap in overlaps]
        cells = [f"{median(group)} ({crossed_by(group, 10)} of {len(group)})" for group in groups]
        lines.append([f"j^-{stack.removeprefix('power:')}", *cells])
    return table(["singular values", *(f"{100 * overlap:.0f} % common" for overlap in overlaps)], lines)


def crossings_layers() -> str:
    """The first layers of the bundled stacks, and made ones, by their number."""

    def lines(own: list[Row]) -> Iterable[Line]:
        for stack in dict.fromkeys(row["stack"] for row in own):
            for layers in sorted({row["layers"] for row in own if row["stack"] == stack}):
                group = [row for row in own if row["stack"] == stack and row["layers"] == layers]
                name = "half of the bases common" if stack.startswith("power:") else spelled(stack)
                yield [name, str(layers), median(group), *counted(group)]

    own = [row for row in rows("iteration_count.csv") if row["part"] == "layers"]
    own = [row | {"model": "synthetic"} if row["stack"].startswith("power:") else row for row in own]
    return model_table(["", "layers", "median", *LIMITS], own, lines)


def pool_size() -> str:
    """The median, and the count of attempts, by the size of the random pool at the start."""
    own = rows("pool_start.csv")
    lines = []
    for size in sorted({row["size"] for row in own}):
        cells = []
        for stack in dict.fromkeys(row["stack"] for row in own):
            group = [row for row in own if row["stack"] == stack and row["size"] == size]
            cells.append(f"{median(group)} ({crossed_by(group, 10**9)} of {len(group)})")
        lines.append([f"{size:g}", *cells])
    return table(["size of the pool / norm", *(spelled(s) for s in dict.fromkeys(row["stack"] for row in own))], lines)


def real_attempts(**where: Any) -> list[Row]:
    return first_model("iteration_count.csv", part="real", **where)


def attempts() -> str:
    return str(len(real_attempts()))


def attempts_by_10() -> str:
    return str(crossed_by(real_attempts(), 10))


def attempts_never() -> str:
    return str(len(real_attempts()) - crossed_by(real_attempts(), 200))


def small_pool_attempts() -> list[Row]:
    """The attempts on the bundled updates at r = 8 and k = 1."""
    return real_attempts(rank=8, k=1)


def by_10(own: list[Row]) -> str:
    return f"{crossed_by(own, 10)} of {len(own)}"


def never(own: list[Row]) -> str:
    return f"{len(own) - crossed_by(own, 200)} of {len(own)}"


def small_pool_by_10() -> str:
    """Attempts on MiniLM at r = 8 and k = 1 that are below LoRA by iteration 10."""
    return by_10(small_pool_attempts())


def small_pool_never() -> str:
    """Attempts on MiniLM at r = 8 and k = 1 that are still above LoRA after 200 iterations."""
    return never(small_pool_attempts())


def mpnet_by_10() -> str:
    """Attempts on mpnet at r = 8 and k = 1 that are below LoRA by iteration 10."""
    return by_10(mpnet_attempts())


def mpnet_never() -> str:
    """Attempts on mpnet at r = 8 and k = 1 that are still above LoRA after 200 iterations."""
    return never(mpnet_attempts())


def mpnet_attempts() -> list[Row]:
    return second_model("iteration_count.csv", part="real", rank=8, k=1)


def medians_half_common() -> str:
    """Range of the medians at k = 1 where half of the bases are common."""
    own = first_model("iteration_count.csv", part="synthetic", k=1, overlap=0.5)
    stacks = dict.fromkeys(row["stack"] for row in own)
    return span((int(median([row for row in own if row["stack"] == stack])) for stack in stacks), "d")


BLOCKS = (
    crossings, crossings_by_rank, crossings_synthetic, crossings_layers, pool_size, attempts, attempts_by_10,
    attempts_never, small_pool_by_10, small_pool_never, mpnet_by_10, mpnet_never, medians_half_common,
)  # fmt: skip
