"""Blocks about the gain over LoRA, its certified limit, and the bundled updates."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterable

import rasa_theory as rt
from experiments.pages.crossings import LIMITS, counted
from experiments.pages.words import (
    Line,
    allocation_share,
    first_model,
    has,
    kinds_of,
    model_table,
    one,
    percent,
    percents,
    record,
    rows,
    second_model,
    span,
    spelled,
    table,
)  # fmt: skip
from experiments.support.rows import Row


def summary() -> str:
    """Gain, its two-sided limit, the share of allocation and the crossings at r = 8, k = 1, for every kind."""
    attempts = [row for row in rows("iteration_count.csv") if has(row, {"part": "real", "rank": 8, "k": 1})]
    solved = [row for row in rows("floors.csv") if row["k"] == 1]

    def lines(own: list[Row]) -> Iterable[Line]:
        for kind in kinds_of(own):
            of_kind = [row for row in own if row["stack"] == kind]
            result = one([row for row in of_kind if "best_found" in row])
            gains = [percent(1 - result["best_found"]), percent(1 - result["two_sided"])]
            crossed = counted([row for row in of_kind if "iterations" in row])
            yield [spelled(kind), *gains, percent(allocation_share(result), 0), *crossed]

    columns = ["r = 8, k = 1", "gain over LoRA", "at most", "unequal ranks, of the gain", *LIMITS]
    return model_table(columns, [*solved, *attempts], lines)


def floors() -> str:
    """Every floor of every stack and k, in units of e_lora."""

    def lines(own: list[Row]) -> Iterable[Line]:
        for row in own:
            dual = "none (k = r)" if row["k"] == 8 else f"{row['dual']:.4f}"
            yield [
                spelled(row["stack"]), str(row["k"]), f"{row['closed']:.4f}", dual, f"{row['two_sided']:.4f}",
                f"{row['best_found']:.4f}", percent(row["gap"], 1),
            ]  # fmt: skip

    return model_table(["", "k", "closed", "dual", "two-sided", "best found", "gap"], rows("floors.csv"), lines)


def first_command() -> str:
    """The results of `reconstruct --rank 8 --k 1`, from its JSON."""
    lines = []
    for stack in record("figures/iterations.json")["stacks"]:
        (run,) = stack["runs"]
        e_lora, attempts = stack["e_lora"], [a["iterations"] for a in run["attempts"] if a["start"] == "random"]
        crossed = [n for n in attempts if n is not None]
        lines.append([
            spelled(stack["name"]), f"{e_lora / stack['norm_squared']:.4f}", f"{run['e_rasa'] / e_lora:.5f}",
            f"{run['e_allocation'] / e_lora:.5f}", f"{run['lower_bound'] / e_lora:.5f}",
            f"{len(crossed)} of {len(attempts)}", span(crossed, "d") if crossed else "",
        ])  # fmt: skip
    columns = ["", "e_lora / norm²", "best found", "allocation", "floor", "starts below LoRA", "after iterations"]
    return table(columns, lines)


def ratios(column: str, k: int) -> list[float]:
    """A column of the floors at one k, for the first model."""
    return [row[column] for row in first_model("floors.csv", k=k)]


def gain_k1() -> str:
    return percents(1 - ratio for ratio in ratios("best_found", 1))


def limit_k1() -> str:
    return percents((1 - ratio for ratio in ratios("two_sided", 1)), 1)


def gain_mpnet() -> str:
    """mpnet's gain at r = 8 and k = 1, over the kinds whose limit is certified by the two-sided floor."""
    return percents(1 - row["best_found"] for row in second_model("floors.csv", k=1))


def limit_k1_mpnet() -> str:
    return percents((1 - row["two_sided"] for row in second_model("floors.csv", k=1)), 1)


@functools.cache
def gains_of_rank_9() -> dict[str, float]:
    """How far the best LoRA of rank 9 lies below that of rank 8 on the bundled updates, in units of e_lora, by kind."""
    stacks, _ = rt.load("minilm-code")
    return {stack.name: 1 - stack.spectra.tail_energy(9) / stack.spectra.tail_energy(8) for stack in stacks}


def gain_rank_9() -> str:
    return percents(gains_of_rank_9().values(), 1)


def gain_in_ranks() -> str:
    """The gain of RaSA at k = 1 as a share of that of a ninth rank."""
    own = first_model("floors.csv", k=1)
    return percents(((1 - row["best_found"]) / gains_of_rank_9()[row["stack"]] for row in own), 0)


def limit_in_ranks() -> str:
    """The certified limit of that gain, as the same share."""
    own = first_model("floors.csv", k=1)
    return percents(((1 - row["two_sided"]) / gains_of_rank_9()[row["stack"]] for row in own), 0)


def gain_k8() -> str:
    return percents(1 - ratio for ratio in ratios("best_found", 8))


def limit_k8() -> str:
    return percents((1 - ratio for ratio in ratios("two_sided", 8)), 1)


def allocation_k1() -> str:
    return percents((allocation_share(row) for row in first_model("floors.csv", k=1)), 0)


def allocation_k8() -> str:
    return percents((allocation_share(row) for row in first_model("floors.csv", k=8)), 0)


def longest_searches(own: list[Row]) -> str:
    """The longest searches for the dual and the two-sided floor."""
    return f"{max(row['dual_seconds'] for row in own):.0f} and {max(row['two_sided_seconds'] for row in own):.0f} s"


def floor_seconds() -> str:
    return longest_searches(first_model("floors.csv"))


def floor_seconds_mpnet() -> str:
    return longest_searches(second_model("floors.csv"))


def updates() -> str:
    """Ranges over the layers of the bundled updates."""

    def lines(own: list[Row]) -> Iterable[Line]:
        for kind in kinds_of(own):
            layers = [row for row in own if row["stack"] == kind]
            column = {key: [row[key] for row in layers] for key in layers[0]}
            yield [
                spelled(kind), percents(column["relative_norm"], 1), span(column["stable_rank"]),
                span(column["entropy_rank"]), percents(column["energy_in_rank_8"], 0),
            ]  # fmt: skip

    columns = ["", "norm / norm of the weights", "stable rank", "entropy rank", "energy in rank 8"]
    return model_table(columns, rows("updates.csv"), lines)


def entropy_ranks_mpnet() -> str:
    """Entropy ranks over all layers and four kinds of mpnet."""
    return span(row["entropy_rank"] for row in second_model("updates.csv"))


TRAINED = {
    "rasa_theory/data/minilm_code.json": "code", "rasa_theory/data/mpnet_code.json": "code",
    "experiments/trained/minilm_prose.json": "prose", "experiments/trained/mpnet_prose.json": "prose",
}  # fmt: skip
"""Records of the runs of `experiments.finetune`, and their tasks."""


def fine_tuning() -> str:
    """Retrieval before and after the runs of full fine-tuning: both models, both tasks, all seeds."""
    lines = []
    for file, task in TRAINED.items():
        about = record(file)
        states = {"before": about["before"]} | {f"after, seed {run['seed']}": run["after"] for run in about["runs"]}
        lines += [
            [about["model"], task, state, f"{found['mrr']:.3f}", f"{found['recall_at_1']:.3f}"]
            for state, found in states.items()
        ]
    return table(["model", "task", "", "mean reciprocal rank", "recall at 1"], lines)


def mrr_again() -> str:
    """The retrieval after mpnet's seed 0, made again on another processor, and after the bundled run."""
    again, first = (
        record(file)["runs"][0]["after"]["mrr"]
        for file in ("experiments/trained/mpnet_code_again.json", "rasa_theory/data/mpnet_code.json")
    )
    return f"{again:.3f} where it was {first:.3f}"


def recovery() -> str:
    """The share of planted stacks that are recovered, by noise and start, and the errors of the default search."""
    own = rows("recovery.csv")
    lines = []
    for noise in sorted({row["noise"] for row in own}):
        runs = {start: [r for r in own if r["noise"] == noise and r["start"] == start] for start in ("best", "random")}
        counts = [f"{sum(row['recovered'] for row in group)} of {len(group)}" for group in runs.values()]
        error = statistics.median(row["error"] for row in runs["best"])
        lines.append([f"{noise:g}", *counts, f"{error:.0e}" if noise == 0 else f"{error:.3f}"])
    columns = ["noise / norm of the updates", "default search", "random pool", "median error, default search"]
    return table(columns, lines)


BLOCKS = (
    summary, floors, first_command, gain_k1, limit_k1, gain_mpnet, limit_k1_mpnet, gain_rank_9, gain_in_ranks,
    limit_in_ranks, gain_k8, limit_k8, allocation_k1, allocation_k8, floor_seconds, floor_seconds_mpnet, updates,
    entropy_ranks_mpnet, fine_tuning, mrr_again, recovery,
)  # fmt: skip
