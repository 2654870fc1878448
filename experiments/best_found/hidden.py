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


def truth(plain: rt.LayerStack, hidden: torch.Tensor) -> rt.RasaFactors:
    """The factors with the dyads of `hidden` (L, b, a) in the pool, in units of the input."""
    start = allocation_start(plain, BUDGET)
    keep = start.mixing.abs().amax(0).argsort(descending=True)[: BUDGET.pool_rank(plain.layers) - DYADS]
    right_basis = torch.linalg.svd(hidden.reshape(-1, hidden.shape[2]), full_matrices=False)[2][:DYADS]
    columns = torch.linalg.svd(hidden.transpose(0, 1).reshape(hidden.shape[1], -1), full_matrices=False)[0][:, :DYADS]
    core = columns.T @ hidden @ right_basis.T  # (L, 3, 3), diagonal in the basis of the dyads
    mixed = torch.einsum("l,lij->ij", torch.arange(1.0, len(core) + 1).to(core), core)
    left, _, right = torch.linalg.svd(mixed)
    B, A = columns @ left, right @ right_basis
    D = torch.diagonal(B.T @ hidden @ A.T, dim1=1, dim2=2)
    pool = RankOneTerms(
        torch.cat([B, start.shared_B[:, keep]], 1),
        torch.cat([A, start.shared_A[keep]]),
        torch.cat([D, start.mixing[:, keep]], 1),
    )
    factors = rt.RasaFactors.from_pool(pool, BUDGET.private_rank)
    return rt.RasaFactors(start.private_B, start.private_A, factors.shared_B, factors.shared_A, factors.mixing)


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
    stack = rt.null_models.with_hidden_dyads(plain, BUDGET.rank, DYADS, relative, seed)
    start = truth(plain, (stack.values - plain.values).double())
    known = rt.solve_rasa(stack, BUDGET, rt.SolverOptions(start=start))
    began = time.process_time()
    found = rt.solve_rasa(stack, BUDGET, rt.SolverOptions(effort=effort))
    return {
        "e_lora": rt.solve_lora(stack, BUDGET.rank).error,
        "from_truth": known.error,
        "error": found.error,
        "seconds": round(time.process_time() - began, 2),
        "start": found.start,
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
