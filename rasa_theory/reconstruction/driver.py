"""The study: for every stack and k the best solution, random attempts, a floor, and the verdict on Theorem 3.1."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rasa_theory.bounds import lower_bound
from rasa_theory.common import InputError, environment
from rasa_theory.problem import LayerStack, RankBudget, RasaFactors, normalised_layers
from rasa_theory.reconstruction.rows import StudyPoint, new_results, stack_row
from rasa_theory.reconstruction.study_progress import StudyReporter, Watch
from rasa_theory.reconstruction.study_settings import StudySettings
from rasa_theory.reconstruction.theorem import overall_verdict
from rasa_theory.solvers import (
    Attempt,
    LoraSolution,
    RasaSolution,
    SolverOptions,
    iterate_path,
    random_attempt,
    solve_lora,
)


@dataclass
class StudyState:
    """The finished part of a study: `results` as plain data, `factors` as tensors named <stack>/<k>/<public name>.

    With several processes, only process 0 has the factors.
    """

    results: dict[str, Any]
    factors: dict[str, Tensor]


def study(
    stacks: Iterable[LayerStack],
    rank: int = 8,
    ks: Sequence[int] = (1,),
    *,
    solver: SolverOptions | None = None,
    certificate: str = "closed",
    seeds: int = 5,
    weight: str = "none",
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Study LoRA against RaSA on every stack: the computation behind `python -m rasa_theory.reconstruct`.

    For each stack it solves LoRA of rank r. For each k it solves RaSA(r, k), runs random attempts at the paper's
    iteration count, proves a floor, and checks Theorem 3.1, e_rasa(k) <= e_lora (He et al., ICLR 2025).

    Arguments:
        stacks: stacks of updates, read one at a time, so a generator keeps one in memory.
        rank: r, at least 1 and at most min(b, a) of every stack.
        ks: shared ranks, each from 0 to r. They are solved in rising order, each from the solution before it as well.
        solver: options of the solver (None: the defaults).
        certificate: floors up to this kind, "closed", "dual" or "two-sided", as for `lower_bound`.
        seeds: number of random attempts for each k > 0, with seeds counted on from `solver.seed`.
        weight: "layer" scales every layer to unit norm first; "none" does not.
        watch: called with progress while the study runs, or None.

    Returns:
        Plain data, the content of results.json (schema: rasa_theory/data/results.schema.json). Errors are squared
        Frobenius norms, summed over layers, in units of the input; with `weight` "layer", of the scaled layers.

    Raises:
        InputError: a setting is out of range, r exceeds min(b, a) of a stack, there is no stack, two stacks have one
            name, or several processes ask for a certificate that only one can search for.
    """
    settings = StudySettings(rank, tuple(ks), solver or SolverOptions(), certificate, seeds, weight)
    state = StudyState(new_results(settings), {})
    for _ in study_steps(stacks, settings, state, watch):
        pass  # each step adds to `state`
    return state.results


def study_steps(
    stacks: Iterable[LayerStack], settings: StudySettings, state: StudyState, watch: Watch | None = None
) -> Iterator[StudyState]:
    """Yield `state` after every (stack, k), with the new point added. An interruption leaves whole points only.

    Raises InputError if there is no stack, or two of them have one name.
    """
    reporter = StudyReporter(settings, watch)
    for original in stacks:
        if any(row["name"] == original.name for row in state.results["stacks"]):
            raise InputError(f"two stacks are named {original.name!r}, and results are filed by name; rename one")
        stack, norms = normalised_layers(original) if settings.weight == "layer" else (original, None)
        state.results["environment"] = state.results["environment"] or environment(
            stack.device, stack.dtype, stack.sharding.processes.world_size
        )
        stack = stack.with_spectra(settings.solver.spectra, RankBudget(settings.rank, 0))
        with stack.suitable_threads():
            lora = solve_lora(stack, settings.rank, "exact")
            next_rank = settings.rank + 1
            e_lora_next = solve_lora(stack, next_rank, "exact").error if next_rank <= min(stack.shape) else 0.0
            row = stack_row(stack, lora, e_lora_next)
        reporter.begin_stack(stack.name, lora.error)
        passes_before = stack.data_passes
        path = iterate_path(stack, settings.rank, settings.ks, settings.solver, reporter.solving)
        for k in settings.ks:
            with stack.suitable_threads():  # left before the yield, since it holds for the whole process
                point = _point(stack, k, path, lora, settings, reporter)
                run = point.row(settings)
            passes = stack.data_passes - passes_before
            factors = point.solution.factors
            factors = factors if norms is None else factors.scaled(torch.tensor(norms))
            _record(state, stack, row, run, passes, factors)
            yield state
    if not state.results["stacks"]:
        raise InputError("no stack was given")


def _point(
    stack: LayerStack,
    k: int,
    path: Iterator[tuple[int, RasaSolution]],
    lora: LoraSolution,
    settings: StudySettings,
    reporter: StudyReporter,
) -> StudyPoint:
    """The answers for the next k of `path`."""
    budget = RankBudget(settings.rank, k)
    reporter.begin_k(k)
    started = time.perf_counter()
    _, solution = next(path)
    seconds = time.perf_counter() - started
    reporter.task_done()
    attempts = _attempts(stack, budget, lora, settings, reporter)
    floor = lower_bound(stack, budget, settings.certificate, None, reporter.searching, settings.solver.spectra)
    reporter.end_k()
    return StudyPoint(stack, budget, lora, solution, attempts, floor, seconds)


def _attempts(
    stack: LayerStack, budget: RankBudget, lora: LoraSolution, settings: StudySettings, reporter: StudyReporter
) -> list[Attempt]:
    """The random attempts at the paper's iteration count; none without a pool, which is what they try to gain by."""
    attempts = []
    for seed in range(settings.solver.seed, settings.solver.seed + (settings.seeds if budget.shared_rank else 0)):
        attempts.append(random_attempt(stack, budget, lora.error, seed, reporter.attempting))
        reporter.task_done()
    return attempts


def _record(
    state: StudyState, stack: LayerStack, row: dict[str, Any], run: dict[str, Any], passes: int, factors: RasaFactors
) -> None:
    """Add a finished point to the state: its factors, then its run in the row of its stack, and the verdict so far.

    The run comes last, since a run without factors would be lost to whoever takes the results up.
    """
    gathered = factors.sent_to_first()
    if stack.sharding.processes.first:
        state.factors |= {f"{stack.name}/{run['k']}/{name}": tensor for name, tensor in gathered.named().items()}
    row["data_passes"] = passes
    row["runs"].append(run)
    if len(row["runs"]) == 1:
        state.results["stacks"].append(row)
    state.results["theorem_3_1"] = overall_verdict(state.results)
