"""Three dyads that all layers share, hidden in bundled updates: does the search come as low as a descent from them?

The descent starts from a pool of the three dyads and the largest terms of the allocation start of the stack without
them. So its error is one that a perfect search would reach.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import torch

import rasa_theory as rt
from experiments.support.rows import Row, Table
from rasa_theory.problem import RankOneTerms
from rasa_theory.solvers import allocation_start

KEY = ("stack", "relative", "seed", "effort")
COLUMNS = (*KEY, "e_lora", "from_truth", "error", "seconds", "start")
BUDGET, DYADS = rt.RankBudget(8, 1), 3
RELATIVE = (0.4, 0.55, 0.8)  # sizes of the dyads in units of the mean sigma_9
SEEDS = (0, 1, 2)
FOUND = 1e-3  # of e_lora, above what the descent from the truth reaches


def truth(plain: rt.LayerStack, dyads: RankOneTerms) -> rt.RasaFactors:
    """Factors with the dyads in the pool, and all else from the allocation start of the stack without them."""
    start = allocation_start(plain, BUDGET)
    largest = start.mixing.abs().amax(0).argsort(descending=True)[: BUDGET.pool_rank(plain.layers) - DYADS]
    return rt.RasaFactors(
        start.private_B,
        start.private_A,
        torch.cat([dyads.B, start.shared_B[:, largest]], 1),
        torch.cat([dyads.A, start.shared_A[largest]]),
        torch.cat([dyads.D, start.mixing[:, largest]], 1),
    )


def rows(path: Path, effort: str) -> Iterator[Row]:
    """All rows, those that the file lacks first computed and added to it."""
    torch.set_num_threads(1)
    table = Table(path, COLUMNS, KEY)
    for relative in RELATIVE:
        for plain in rt.load("minilm-code")[0]:
            for seed in SEEDS:
                key: Row = {"stack": plain.name, "relative": relative, "seed": seed, "effort": effort}
                if key not in table:
                    table.add([key | solved(plain, relative, seed, effort)])
    yield from (row for row in table.rows if row["effort"] == effort)


def solved(plain: rt.LayerStack, relative: float, seed: int, effort: str) -> Row:
    """What the search finds, beside the descent from the truth."""
    dyads = rt.null_models.hidden_dyads(plain, BUDGET.rank, DYADS, relative, seed)
    stack = rt.null_models.with_hidden_dyads(plain, BUDGET.rank, DYADS, relative, seed)
    descent = rt.solve_rasa(stack, BUDGET, rt.SolverOptions(start=truth(plain, dyads)))
    began = time.process_time()
    solution = rt.solve_rasa(stack, BUDGET, rt.SolverOptions(effort=effort))
    seconds = time.process_time() - began
    return {
        "e_lora": rt.solve_lora(stack, BUDGET.rank).error,
        "from_truth": descent.error,
        "error": solution.error,
        "seconds": round(seconds, 2),
        "start": solution.start,
    }


def lines(chosen: list[Row]) -> Iterator[str]:
    """How many are found, of each size."""
    for relative in RELATIVE:
        own = [row for row in chosen if row["relative"] == relative]
        over = [(row["error"] - row["from_truth"]) / row["e_lora"] for row in own]
        gain = [1 - row["from_truth"] / row["e_lora"] for row in own]
        yield (
            f"{DYADS} dyads at {relative} sigma_9: found {sum(x <= FOUND for x in over)} of {len(own)}, at worst "
            f"{100 * max(over):+.3f} % of e_lora from the descent from the truth, at best {100 * min(over):+.3f} %; "
            f"that gains {100 * min(gain):.2f} to {100 * max(gain):.2f} %"
        )
