"""Blocks about allocation and sharing, from the values of `why_sharing_pays`."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Iterable
from typing import Any

from experiments.models.update_sets import MODEL_NAMES
from experiments.pages.words import (
    KINDS,
    Line,
    allocation_share,
    first_model,
    has,
    kinds_of,
    model_table,
    of_model,
    one,
    percent,
    percents,
    rows,
    second_model,
    span,
    spelled,
    table,
)  # fmt: skip
from experiments.support.rows import Row
from experiments.why_sharing_pays.figure import EACH, FIRST_RUN, HOW, LAYER, LAYER_APART, LAYERS, RUNS

APART = HOW[2]
PAIRS = tuple(f"{one} and {other}" for one, other in itertools.combinations(KINDS, 2))
SHARED = 1.5
"""Terms are called shared if they serve more matrices, by loss."""
STREAM = {kind: "rows" for kind in KINDS} | {"attention_output": "columns"}
"""The side of every kind that faces the residual stream."""


def of_first_model(**where: Any) -> list[Row]:
    return first_model("why_sharing_pays.csv", **where)


def values(item: str, **where: Any) -> list[float]:
    return [float(row["value"]) for row in of_first_model(item=item, **where)]


def parts(**where: Any) -> tuple[float, float]:
    """What allocation and what sharing takes off, of the first model, in units of e_lora."""
    return parts_of(of_first_model(**where))


def parts_of(own: Iterable[Row], **where: Any) -> tuple[float, float]:
    """What allocation and what sharing takes off, of the rows with these values, in units of e_lora.

    Raises ValueError unless they are of one solution.
    """
    chosen = [row for row in own if has(row, where)]
    allocation, best = (float(one(chosen, item=item)["value"]) for item in ("allocation", "best_found"))
    return 1 - allocation, allocation - best


def gain_parts() -> str:
    """The gain of every kind and k in its parts, and the sharing that stays when layers are turned apart."""

    def lines(own: list[Row]) -> Iterable[Line]:
        cells = {(r["source"], r["stack"], r["k"], r["item"]): r["value"] for r in own if r["part"] == "pool"}
        points = dict.fromkeys((stack, k) for source, stack, k, _ in cells if source == "updates" and k)
        for stack, k in points:
            allocation, best, floor = (cells["updates", stack, k, i] for i in ("allocation", "best_found", "floor"))
            apart = [cells[APART, stack, k, i] for i in ("allocation", "best_found") if (APART, stack, k, i) in cells]
            yield [
                spelled(stack), str(k), percent(1 - allocation), percent(allocation - best),
                percent((1 - allocation) / (1 - best), 0), percent(apart[0] - apart[1]) if apart else "",
                percent(best - floor, 1) if cells["updates", stack, k, "floor_name"] == "two-sided" else "",
            ]  # fmt: skip

    columns = [
        "r = 8",
        "k",
        "unequal ranks",
        "sharing",
        "ranks, of the gain",
        "sharing, turned apart",
        "room to the floor",
    ]
    return model_table(columns, rows("why_sharing_pays.csv"), lines)


def owners() -> str:
    """How many layers a pool term serves at k = 1, by what layers lose without it and by its weights."""

    def lines(own: list[Row]) -> Iterable[Line]:
        for source, label in (
            ("updates", "updates"), ("second task", "updates of a second task"), (APART, "layers turned apart"),
            ("weights", "pretrained weights"), ("hidden dyads", "updates with three dyads hidden in each kind"),
            ("shared bases", "layers with common bases"),
        ):  # fmt: skip
            of_source = [row for row in own if has(row, {"part": "pool", "source": source, "k": 1})]
            loss, weight = ([r["value"] for r in of_source if r["item"] == item] for item in ("by_loss", "by_weight"))
            if loss:
                above = f"{sum(ratio > 2 for ratio in loss)} of {len(loss)}"
                yield [label, f"{statistics.median(loss):.2f}", above, f"{statistics.median(weight):.2f}"]

    columns = ["k = 1", "median by loss", "terms above 2", "median by weight"]
    return model_table(columns, rows("why_sharing_pays.csv"), lines)


def median_owners() -> str:
    return f"{statistics.median(values('by_loss', part='pool', source='updates', k=1)):.2f}"


def median_owners_mpnet() -> str:
    """The median over mpnet's pool terms at k = 1 of the number of layers that they serve."""
    own = second_model("why_sharing_pays.csv", part="pool", source="updates", k=1, item="by_loss")
    return f"{statistics.median(row['value'] for row in own):.2f}"


def results_at_1(model: str) -> dict[str, Row]:
    """For each kind of a model allocation, best error and floor at r = 8 and k = 1, in units of e_lora."""
    own = of_model(model, "why_sharing_pays.csv", part="pool", source="updates", k=1)
    items = ("allocation", "best_found", "floor")
    return {kind: {item: one(own, stack=kind, item=item)["value"] for item in items} for kind in kinds_of(own)}


def allocation_mpnet() -> str:
    """The share of mpnet's gain at k = 1 that unequal ranks explain, over its kinds."""
    return percents(map(allocation_share, results_at_1(MODEL_NAMES["mpnet"]).values()), 0)


def sides() -> str:
    """The largest eigenvalue of the mean projector on each side, of updates and weights."""

    def lines(own: list[Row]) -> Iterable[Line]:
        for kind in kinds_of(own):
            stream, other = STREAM[kind], "columns" if STREAM[kind] == "rows" else "rows"
            of_kind = {(r["source"], r["item"], r["index"]): r["value"] for r in own if r["stack"] == kind}
            cells = [
                of_kind.get((source, f"projector_{side}", 0))
                for source in ("updates", "weights")
                for side in (stream, other)
            ]
            unrelated = of_kind["updates", "unrelated_rows", None]
            yield [spelled(kind), *("" if cell is None else f"{cell:.2f}" for cell in (*cells, unrelated))]

    columns = ["", "updates, stream side", "other side", "weights, stream side", "other side", "unrelated, at most"]
    return model_table(columns, [row for row in rows("why_sharing_pays.csv") if row["part"] == "side"], lines)


def update_ranks() -> str:
    """Ranges of the effective ranks over all layers and kinds."""
    lines = []
    for source, label in (("updates", "updates"), ("second task", "second task"), ("weights", "pretrained weights")):
        ranks = [values(item, part="side", source=source) for item in ("entropy_rank", "rank_90", "stable_rank")]
        lines.append([label, *(span(own) for own in ranks)])
    return table(["of 384", "entropy rank", "rank of 90 % of the energy", "stable rank"], lines)


def entropy_ranks() -> str:
    return span(values("entropy_rank", part="side", source="updates"))


def ranks_of_90() -> str:
    return span(values("rank_90", part="side", source="updates"))


def depth() -> str:
    """Made layers with query's spectra: the parts of the gain, layers served, and the best one-sided pool."""
    lines = []
    for bases in dict.fromkeys(row["source"] for row in of_first_model(part="depth")):
        for stack in ("L = 6", "L = 32"):
            where = {"part": "depth", "source": bases, "stack": stack, "k": 1}
            allocation, sharing = parts(**where)
            served = statistics.median(values("by_loss", **where))
            one_sided = min(values("one_sided", part="one-sided", source=bases, stack=stack))
            lines.append([
                bases, stack.removeprefix("L = "), percent(allocation), percent(sharing), f"{served:.1f}",
                f"{1 - allocation - sharing:.3f}", f"{one_sided:.3f}",
            ])  # fmt: skip
    columns = ["bases", "layers", "unequal ranks", "sharing", "layers a term serves", "RaSA / LoRA", "one-sided / LoRA"]
    return table(columns, lines)


def width() -> str:
    """Six layers in independent bases, by their width."""
    lines = []
    for stack in dict.fromkeys(row["stack"] for row in of_first_model(part="width")):
        cells = [percent(parts(part="width", source="independent", stack=stack, k=k)[1], 3) for k in (1, 4)]
        lines.append([stack.removeprefix("width "), *cells])
    return table(["width", "sharing, k = 1", "sharing, k = 4"], lines)


def pooled_kinds() -> str:
    """One pool over all kinds beside a pool for each, of every model that was solved so."""

    def lines(own: list[Row]) -> Iterable[Line]:
        own = [row for row in own if has(row, {"part": "kinds", "stack": FIRST_RUN})]
        for k in sorted({row["k"] for row in own if row["k"]}):
            for source, label in (
                (EACH, EACH),
                (HOW[0], "one pool over all kinds"),
                (HOW[1], "one pool, attention output transposed"),
                (HOW[2], "one pool, layers turned apart"),
                (LAYER, "a pool for each layer, transposed too"),
                (LAYERS, "the same, matrices of different layers"),
                (LAYER_APART, "the same, matrices turned apart"),
            ):
                of_pool = [row for row in own if has(row, {"source": source, "k": k})]
                served = [
                    [row["value"] for row in of_pool if row["item"] == item] for item in ("by_loss", "by_loss_of_kinds")
                ]
                medians = [f"{statistics.median(counts):.2f}" if counts else "" for counts in served]
                yield [str(k), label, *map(percent, parts_of(of_pool)), *medians]

    columns = ["k", "", "unequal ranks", "sharing", "matrices that a term serves", "kinds"]
    return model_table(columns, rows("why_sharing_pays.csv"), lines)


def layer_pools() -> str:
    """What several pools share at k = 1, in every run that has all four kinds."""

    def lines(own: list[Row]) -> Iterable[Line]:
        at_1 = [row for row in own if has(row, {"part": "kinds", "k": 1})]
        for run, (task, seed) in RUNS.items():
            of_run = [row for row in at_1 if row["stack"] == run]
            if of_run:
                shared = [percent(parts_of(of_run, source=way)[1], 3) for way in (EACH, LAYER, LAYERS, LAYER_APART)]
                terms = [row["value"] for row in of_run if has(row, {"source": LAYER, "item": "by_loss"})]
                yield [f"{task}, seed {seed}", *shared, f"{statistics.median(terms):.2f}", f"{max(terms):.2f}"]

    columns = ["run", EACH, LAYER, LAYERS, "each layer, turned apart", "matrices a term serves", "at most"]
    return model_table(columns, rows("why_sharing_pays.csv"), lines)


def two_kinds() -> str:
    """The pairs of kinds that share a term of a pool for each layer, most frequent first; all runs of a model."""

    def lines(own: list[Row]) -> Iterable[Line]:
        of_layer = [row for row in own if has(row, {"part": "kinds", "source": LAYER, "k": 1})]
        served = {(row["stack"], row["index"]): row["value"] for row in of_layer if row["item"] == "by_loss"}
        pairs = Counter(
            row["value"]
            for row in of_layer
            if row["item"] == "two_kinds" and served[row["stack"], row["index"]] > SHARED
        )
        if pairs:
            yield [f"{sum(pairs.values())} of {len(served)}", *(str(pairs[pair]) for pair in PAIRS)]

    return model_table(["shared terms", *map(spelled, PAIRS)], rows("why_sharing_pays.csv"), lines)


def layer_sharing() -> str:
    """What a pool for each kind, for each layer, and over different layers shares on MiniLM, at k = 1."""
    return in_units_of_e_lora(MODEL_NAMES["minilm"])


def layer_sharing_mpnet() -> str:
    """The same on mpnet."""
    return in_units_of_e_lora(MODEL_NAMES["mpnet"])


def in_units_of_e_lora(model: str) -> str:
    own = of_model(model, "why_sharing_pays.csv", part="kinds", stack=FIRST_RUN, k=1)
    each, layer, layers = (percent(parts_of(own, source=way)[1]) for way in (EACH, LAYER, LAYERS))
    return f"{each}, {layer} and {layers}"


BLOCKS = (
    gain_parts, owners, median_owners, median_owners_mpnet, allocation_mpnet, sides,
    update_ranks, entropy_ranks, ranks_of_90, depth, width, pooled_kinds, layer_pools, two_kinds, layer_sharing,
    layer_sharing_mpnet,
)  # fmt: skip
