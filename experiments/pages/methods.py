"""Blocks about other ways to spend as many parameters, and about trained LoRAs compressed together."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from experiments.pages.words import KINDS, Line, first_model, has, model_table, one, percent, rows, span, spelled, table
from experiments.support.rows import Row
from rasa_theory.methods import METHODS

NAMES = {
    "lora": "LoRA",
    "allocated": "LoRA, ranks allocated over layers",
    "block_lora": "block LoRA (Localized LoRA)",
    "allocated_blocks": "block LoRA, ranks allocated",
    "rasa": "RaSA",
    "joint_diagonal": "joint bases, diagonal core (CP)",
    "joint_full": "joint bases, full core (Tucker-2)",
    "tied_lora": "Tied-LoRA",
    "vb_lora": "VB-LoRA",
    "mos": "MoS",
    "one_sided": "one-sided pool",
    "share_basis": "shared bases of LoRA's factors (SHARE)",
    "share_lora": "ShareLoRA",
    "vera": "VeRA",
}
"""The methods of `rt.methods` as the page calls them."""


def localized() -> str:
    """Block LoRA's error over LoRA's at equal parameters, r = 8, by source, grid and kind of ranks."""

    def lines(own: list[Row]) -> Iterable[Line]:
        for source, label in (("updates", "bundled updates"), ("turned apart", "same spectra, random bases"),
                              ("local", "made: 4 x 4 unrelated blocks")):  # fmt: skip
            cells = [
                span((r["ratio"] for r in own if has(r, {"source": source, "side": side, "ranks": ranks})), ".2f")
                for ranks in ("equal", "allocated")
                for side in (2, 4)
            ]
            yield [label, *cells]

    columns = ["", "2 x 2 blocks", "4 x 4 blocks", "2 x 2, ranks allocated", "4 x 4, ranks allocated"]
    return model_table(columns, [row for row in rows("localized.csv") if row["r"] == 8], lines)


def neighbours() -> str:
    """Every method at the parameters of LoRA of rank 8: settings, error less LoRA's for each kind, and evidence."""

    def lines(own: list[Row]) -> Iterable[Line]:
        own = [row for row in own if row["r"] == 8]
        lora = {row["stack"]: row["error"] for row in own if row["method"] == "lora"}
        excess = {
            name: {kind: 100 * (one(own, method=name, stack=kind)["error"] / lora[kind] - 1) for kind in lora}
            for name in dict.fromkeys(row["method"] for row in own)
        }
        for name in sorted(excess, key=lambda name: statistics.fmean(excess[name].values())):
            first = one(own, method=name, stack=KINDS[0])
            evidence = {"closed form": "minimum", "of factors": "as computed"}.get(first["evidence"], "best found")
            settings = first["settings"].replace("_", " ").replace("=", " ")
            cells = [f"{excess[name][kind]:+.1f}" if kind in lora else "" for kind in KINDS]
            yield [NAMES[name], settings, *cells, evidence]

    columns = ["error less LoRA's, %", "settings, query", *map(spelled, KINDS), "the number is"]
    return model_table(columns, rows("neighbours.csv"), lines)


def number_of_methods() -> str:
    return str(len(METHODS))


SIZES = (0.03, 0.0776, 0.125, 0.5)
"""Shares of the LoRAs' own parameters that are claimed to be enough."""


def lost(method: str, source: str = "trained", adapters: str = "lora-2") -> list[float | None]:
    """The energy that five seeds lose at each size, mean over kinds; None where a kind has no room."""
    own = [row for row in rows("compression.csv") if has(row, {"set": adapters, "layer": "all"})]
    means = []
    for size in SIZES:
        group = [row for row in own if has(row, {"method": method, "source": source, "share": size})]
        complete = {row["kind"] for row in group} == {row["kind"] for row in own}
        means.append(statistics.fmean(row["error"] for row in group) if complete else None)
    return means


def percent_or_no_room(share: float | None) -> str:
    return "no room" if share is None else percent(share, 1)


def compression() -> str:
    """Five seeds of LoRA(2) together: the energy that is lost at four sizes, over adapters and layers."""
    lines = [
        [label, *map(percent_or_no_room, lost(method, source))]
        for label, method, source in (
            ("largest singular terms, nothing shared", "allocated", "trained"),
            ("joint bases, diagonal core (CP)", "joint_diagonal", "trained"),
            ("the same, random LoRAs", "joint_diagonal", "random"),
            ("joint bases, full core", "joint_full", "trained"),
            ("VB-LoRA", "vb_lora", "trained"),
            ("VB-LoRA, random LoRAs", "vb_lora", "random"),
            ("SHARE, as lorashare computes it", "share_columns", "trained"),
            ("ShareLoRA", "share_lora", "trained"),
        )
    ]
    return table(["energy lost at", *(f"{100 * size:g} %" for size in SIZES)], lines)


def compression_sets() -> str:
    """The energy lost at two sizes by sets of five seeds, of two tasks and of two ranks."""
    compared = (
        ("allocated", "trained"), ("joint_diagonal", "trained"), ("joint_diagonal", "random"),
        ("joint_full", "trained"), ("joint_full", "random"), ("vb_lora", "trained"), ("vb_lora", "random"),
    )  # fmt: skip
    lines = []
    for adapters, label in (("lora-2", "code, r = 2"), ("lora-2-prose", "prose, r = 2"), ("lora-8", "code, r = 8")):
        shares = [lost(method, source, adapters) for method, source in compared]
        for size in (0.0776, 0.125):
            cells = [
                "not run" if set(of_sizes) == {None} else percent_or_no_room(of_sizes[SIZES.index(size)])
                for of_sizes in shares
            ]
            lines.append([label, f"{100 * size:g} %", *cells])
    columns = [
        "energy lost", "at", "largest singular terms, nothing shared", "joint bases, diagonal core",
        "the same, random LoRAs", "joint bases, full core", "the same, random LoRAs", "VB-LoRA",
        "the same, random LoRAs",
    ]  # fmt: skip
    return table(columns, lines)


def sizes_used() -> str:
    """The share of the parameters that the largest terms, which are whole, have at each size."""
    own = first_model("compression.csv", set="lora-2", layer="all", method="allocated")
    used = (100 * one(own, source="trained", share=size, kind="query")["used"] for size in SIZES)
    return ", ".join(f"{share:.3g}" for share in used) + " %"


def lost_at() -> str:
    """The energy that the largest terms alone lose at the four sizes."""
    *most, last = (f"{100 * share:.0f}" for share in lost("allocated") if share is not None)
    return f"{', '.join(most)} and {last} %"


def kept_by_one_side() -> str:
    """The energy that one common column space of r dimensions keeps, trained and by chance."""
    return kept("lora-2", "side_columns")


def kept_by_rows() -> str:
    """The same of a common row space."""
    return kept("lora-2", "side_rows")


def kept_on_prose() -> str:
    """The same of a common column space on the second task."""
    return kept("lora-2-prose", "side_columns")


def kept(adapters: str, side: str) -> str:
    own = [row for row in rows("compression.csv") if has(row, {"set": adapters, "method": side})]
    shares = {
        source: statistics.fmean(1 - row["error"] for row in own if row["source"] == source and row["layer"] != "all")
        for source in ("trained", "random")
    }
    return f"{shares['trained']:.2f}, and {shares['random']:.2f} by chance"


BLOCKS = (
    neighbours,
    number_of_methods,
    localized,
    compression,
    compression_sets,
    sizes_used,
    lost_at,
    kept_by_one_side,
    kept_by_rows,
    kept_on_prose,
)
