"""What the command computes: for every stack and k the bounds, the best found error, the attempts and the verdict.

Results are plain data, as in data/results.schema.json.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rasa_theory.bounds import Bound, SearchProgress, allocation_bound, lower_bound
from rasa_theory.common import InputError, environment
from rasa_theory.problem import LayerStack, RankBudget, lora_parameters, normalised_layers
from rasa_theory.reconstruction.study_settings import StudySettings
from rasa_theory.reconstruction.theorem import check_theorem, overall_verdict, verdict
from rasa_theory.solvers import (
    Attempt,
    LoraSolution,
    Progress,
    RasaSolution,
    SolverOptions,
    iterate_path,
    median_iterations,
    random_attempt,
    solve_lora,
)


@dataclass(frozen=True)
class StudyProgress:
    """What a watcher is told: stack and k, doing what, how far, and the error there in units of e_lora or None.

    While a floor is searched for, `sweep` counts the iterations and `ratio` is the floor.
    """

    stack: str
    k: int
    doing: str
    sweep: int
    max_sweeps: int
    ratio: float | None
    tasks_done: int


@dataclass
class StudyState:
    """Everything finished so far: `results` as plain data, `factors` as named tensors <stack>/<k>/<public name>.

    Of several processes, the first alone has the factors.
    """

    results: dict[str, Any]
    factors: dict[str, Tensor]


Watch = Callable[[StudyProgress], None]


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
    """What `python -m rasa_theory.reconstruct` computes, as plain data: its JSON.

    Per stack e_lora, and per k the best found e_rasa(k), bounds on both sides, `seeds` random attempts at the paper's
    iteration count, and the verdict on Theorem 3.1. All errors are squared. Raises InputError for bad settings.
    """
    settings = StudySettings(rank, tuple(ks), solver or SolverOptions(), certificate, seeds, weight)
    state = StudyState(new_results(settings), {})
    for _ in study_steps(stacks, settings, state, watch):
        pass  # `state` grows
    return state.results


def new_results(settings: StudySettings, source: str = "", command: Sequence[str] = ()) -> dict[str, Any]:
    """Results of which nothing is finished yet."""
    return {
        "schema": 1,
        "command": list(command),
        "rank": settings.rank,
        "source": source,
        "weight": settings.weight,
        "seed": settings.solver.seed,
        "environment": None,
        "stacks": [],
        "left_out": [],
        "theorem_3_1": "undecided",
    }


def study_steps(
    stacks: Iterable[LayerStack], settings: StudySettings, state: StudyState, watch: Watch | None = None
) -> Iterator[StudyState]:
    """Yield `state` after every (stack, k), grown by what was finished; an interruption leaves it whole."""
    tasks = 0
    for given in stacks:
        stack, norms = normalised_layers(given) if settings.weight == "layer" else (given, None)
        state.results["environment"] = state.results["environment"] or environment(
            stack.device, stack.dtype, stack.sharding.processes.world_size
        )
        lora = solve_lora(stack, settings.rank)
        row = _stack_row(stack, lora)
        told = _Teller(watch, stack.name, lora.error)
        following = iter([*settings.ks[1:], None])
        told.now(min(settings.ks), "solving", tasks)
        started, passes = time.perf_counter(), stack.data_passes
        for k, solution in iterate_path(stack, settings.rank, settings.ks, settings.solver, told.solver):
            solved = time.perf_counter() - started
            base = tasks
            told.now(k, "random attempts", tasks := tasks + 1)
            budget = RankBudget(settings.rank, k)
            attempts = []
            for seed in range(settings.solver.seed, settings.solver.seed + (settings.seeds if k else 0)):
                attempts.append(random_attempt(stack, budget, lora.error, seed, told.attempt))
                told.now(k, "random attempts", tasks := tasks + 1)
            floor = lower_bound(stack, budget, settings.certificate, None, told.floor)
            told.now(k, "floor", tasks := base + settings.tasks(k))
            row["runs"].append(_run_row(stack, budget, lora, solution, floor, attempts, solved, settings))
            factors = solution.factors if norms is None else solution.factors.scaled(torch.tensor(norms))
            factors = factors.sent_to_first()
            if stack.sharding.processes.first:
                state.factors |= {f"{stack.name}/{k}/{name}": tensor for name, tensor in factors.named().items()}
            if len(row["runs"]) == 1:
                state.results["stacks"].append(row)
            row["data_passes"] = stack.data_passes - passes
            state.results["theorem_3_1"] = overall_verdict(state.results)
            told.now(next(following) or k, "solving", tasks)
            started = time.perf_counter()
            yield state
    if not state.results["stacks"]:
        raise InputError("no stack was given")


class _Teller:
    """Turns the solver's progress into the study's."""

    def __init__(self, watch: Watch | None, stack: str, e_lora: float) -> None:
        self._watch, self._stack, self._e_lora = watch, stack, e_lora
        self._k, self._doing, self._tasks = 0, "solving", 0

    def now(self, k: int, doing: str, tasks: int) -> None:
        self._k, self._doing, self._tasks = k, doing, tasks

    def solver(self, progress: Progress) -> None:
        self._tell(f"solving from {progress.start}", progress)

    def attempt(self, progress: Progress) -> None:
        self._tell(self._doing, progress)

    def floor(self, progress: SearchProgress) -> None:
        self._say(f"{progress.search} floor", progress.iteration, progress.max_iterations, progress.value)

    def _tell(self, doing: str, progress: Progress) -> None:
        self._say(doing, progress.sweep, progress.max_sweeps, progress.error)

    def _say(self, doing: str, step: int, steps: int, value: float) -> None:
        if self._watch is not None:
            ratio = value / self._e_lora if self._e_lora > 0 else None
            self._watch(StudyProgress(self._stack, self._k, doing, step, steps, ratio, self._tasks))


def _stack_row(stack: LayerStack, lora: LoraSolution) -> dict[str, Any]:
    return {
        "name": stack.name,
        "layers": stack.layers,
        "shape": list(stack.shape),
        "norm_squared": stack.norm_squared,
        "layer_norms_squared": stack.layer_norms_squared,
        "e_lora": lora.error,
        "e_lora_interval": list(lora.interval),
        "runs": [],
    }


def _run_row(
    stack: LayerStack,
    budget: RankBudget,
    lora: LoraSolution,
    solution: RasaSolution,
    floor: Bound,
    attempts: list[Attempt],
    seconds: float,
    settings: StudySettings,
) -> dict[str, Any]:
    drop, checks = check_theorem(stack, budget, lora, solution, floor)
    spent = lora_parameters(stack.layers, stack.shape, budget.rank)
    return {
        "k": budget.shared_rank,
        "e_rasa": solution.error,
        "layer_errors": solution.layer_errors,
        "e_allocation": allocation_bound(stack, budget).value,
        "ratio": solution.error / lora.error if lora.error > 0 else None,
        "lower_bound": floor.value,
        "lower_bound_name": floor.name,
        "mixing_drop": drop,
        "start": solution.start,
        "sweep": solution.sweep,
        "sweeps": solution.sweeps,
        "stop_reason": solution.stop_reason.name,
        "seconds": seconds,
        "data_passes": solution.data_passes,
        "cancellation": solution.cancellation,
        "history": solution.history,
        "iterations_to_beat_lora": median_iterations([attempt.iterations for attempt in attempts]),
        "attempts": [
            {"start": "random", "seed": a.seed, "sweep": "paper", "iterations": a.iterations, "history": a.history}
            for a in attempts
        ],
        "parameters": {
            "lora": spent,
            "rasa": solution.factors.parameters,
            "extra_percent": 100 * (solution.factors.parameters - spent) / spent,
        },
        "update_rank": solution.factors.update_rank,
        "checks": checks,
        "theorem_3_1": verdict(checks, settings.solver.start),
    }
