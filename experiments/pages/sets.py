"""Blocks about what two seeds, two tasks, and layers of one run share, from `seeds_and_tasks`."""

from __future__ import annotations

from collections.abc import Iterable

from experiments.pages.words import Line, has, kinds_of, model_table, one, percent, rows, spelled
from experiments.seeds_and_tasks import AS_THEY_ARE, TURNED_APART, TURNED_SET
from experiments.support.rows import Row

FILE = "seeds_and_tasks.csv"
RELATIONS = {"seed": "two seeds", "task": "two tasks", "halves": "two halves of one set"}


def pooled_sets() -> str:
    """One pool over two sets: its sharing, what is left of that after one set was turned, and a pool for each."""

    def lines(own: list[Row]) -> Iterable[Line]:
        for relation, kind in relations_and_kinds(own, "pool"):
            cells = [
                sharing(own, part="pool", relation=relation, how=how, stack=kind)
                for how in (AS_THEY_ARE, TURNED_SET, "a pool each", TURNED_APART)
            ]
            shared = {
                "part": "pool",
                "relation": relation,
                "how": AS_THEY_ARE,
                "stack": kind,
                "item": "by_loss_of_sets",
            }
            terms = [row["value"] for row in own if has(row, shared)]
            both = f"{sum(served > 1.5 for served in terms)} of {len(terms)}"
            yield [RELATIONS[relation], spelled(kind), *cells, both]

    columns = [
        "one pool over", "kind", "sharing", "one set turned", "a pool each", "layers turned apart",
        "terms that serve both",
    ]  # fmt: skip
    return model_table(columns, rows(FILE), lines)


def pooled_pairs() -> str:
    """A pool for each pair of layers: of the same layer in both sets, and of two layers half the depth apart."""

    def lines(own: list[Row]) -> Iterable[Line]:
        for relation, kind in relations_and_kinds(own, "pair"):
            where = {"part": "pair", "relation": relation, "stack": kind}
            cells = [sharing(own, how=how, **where) for how in ("same layer", "other layer")]
            yield [RELATIONS[relation], spelled(kind), *cells]

    return model_table(["a pool for each pair", "kind", "same layer", "another layer"], rows(FILE), lines)


def pooled_groups() -> str:
    """Pools over groups of layers, over neighbours and over distant ones, beside one over all layers."""

    def lines(own: list[Row]) -> Iterable[Line]:
        for relation, kind in relations_and_kinds(own, "depth"):
            where = {"part": "depth", "relation": relation, "stack": kind}
            cells = [sharing(own, how=how, **where) for how in ("neighbours", "distant")]
            all_layers = sharing(own, part="pool", relation="none", how="a pool each", stack=kind)
            yield [spelled(kind), relation.removeprefix("groups of "), *cells, all_layers]

    return model_table(["", "layers in a pool", "neighbours", "distant", "all layers in one pool"], rows(FILE), lines)


def overlaps_of_sets() -> str:
    """Cosines of two updates, and overlaps of their leading singular vectors, of one layer and of different ones."""

    def lines(own: list[Row]) -> Iterable[Line]:
        for relation, kind in relations_and_kinds(own, "overlap"):
            if relation not in RELATIONS:
                continue
            where = {"part": "overlap", "relation": relation, "stack": kind}
            cells = [
                percent(one(own, item=item, index=index, **where)["value"], 0)
                for item in ("cosine", "columns", "rows")
                for index in ("same layer", "other layer")
            ]
            yield [RELATIONS[relation], spelled(kind), *cells]

    columns = ["", "kind", "cosine", "of two layers", "left", "of two layers", "right", "of two layers"]
    return model_table(columns, rows(FILE), lines)


def relations_and_kinds(own: list[Row], part: str) -> list[tuple[str, str]]:
    """The relations of a part, in the order of the file, and the kinds of each; what one set has alone is left out."""
    of_part = [row for row in own if row["part"] == part and row["relation"] != "none"]
    return [
        (relation, kind)
        for relation in dict.fromkeys(row["relation"] for row in of_part)
        for kind in kinds_of(row for row in of_part if row["relation"] == relation)
    ]


def sharing(own: list[Row], **where: str) -> str:
    """What sharing takes off, in per cent of e_lora; empty where it was not measured."""
    unit = [row for row in own if has(row, where)]
    if not unit:
        return ""
    return percent(one(unit, item="allocation")["value"] - one(unit, item="best_found")["value"])


BLOCKS = (pooled_sets, pooled_pairs, pooled_groups, overlaps_of_sets)
