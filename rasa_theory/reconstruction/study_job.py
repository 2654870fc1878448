"""A study of the stacks of a source: its plan, its dry run, and its run, which takes up finished stacks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rasa_theory.common import Plan, keeping_interrupts, plan_of
from rasa_theory.distributed import Processes
from rasa_theory.problem import RankBudget
from rasa_theory.reconstruction.driver import StudyState, study_steps
from rasa_theory.reconstruction.results_folder import ResultsFolder
from rasa_theory.reconstruction.rows import new_results
from rasa_theory.reconstruction.study_progress import Watch
from rasa_theory.reconstruction.study_settings import StudySettings
from rasa_theory.reconstruction.theorem import overall_verdict
from rasa_theory.solvers import (
    EFFORT_TIMES,
    attempt_seconds,
    exact_lora_seconds,
    exact_solver_seconds,
    lora_seconds,
    solver_seconds,
)
from rasa_theory.sources import Catalogue, Norms, StackSource, left_out_lines, memory_line, pair_warning, size_line


@dataclass(frozen=True)
class StudyJob:
    """A study of the stacks of `catalogue`.

    `synthetic`: the arguments of a synthetic source, which has no files that tell it from another; None for files.
    `memory`: the limit in bytes, None for no limit.
    """

    catalogue: Catalogue
    settings: StudySettings
    dtype: torch.dtype
    device: torch.device
    tf32: bool = False
    synthetic: dict[str, Any] | None = None
    memory: int | None = None

    def plan(self) -> Plan:
        """All that the results depend on."""
        numerics = {"dtype": str(self.dtype).removeprefix("torch."), "tf32": self.tf32}
        return plan_of(
            self.catalogue.files,
            source=self.catalogue.source,
            synthetic=self.synthetic,
            settings=self.settings.plain() | numerics,
            stacks=[[source.name, source.layers, *source.shape] for source in self.catalogue.stacks],
        )

    def forecast(self, world_size: int = 1) -> str:
        """The stacks to solve, with sizes and memory, as text for --dry-run."""
        catalogue, settings = self.catalogue, self.settings
        dtype = str(self.dtype).removeprefix("torch.")
        lines = [f"Source {catalogue.source}, on {self.device} in {dtype}. Would solve:"]
        ks = ", ".join(str(k) for k in settings.ks)
        lines += [
            size_line(source, self.dtype, f", RaSA's updates of rank up to {self._update_rank(source)}")
            for source in catalogue.stacks
        ]
        lines.append(f"r = {settings.rank}, k = {ks}; {settings.seeds} random attempts for each stack and k.")
        local = [self._local(source, world_size) for source in catalogue.stacks]
        most = max(source.memory(self.dtype, settings.exact(source), self.memory) for source in local)
        on_disk = sum(source.stays_on_disk(self.memory) for source in local)
        lines.append(memory_line(most, world_size, f", its layers over {world_size} processes", on_disk))
        lines += self._duration()
        return "\n".join(lines + left_out_lines(catalogue))

    def _duration(self) -> list[str]:
        """Sentences with the seconds of LoRA, of the solver with closed floors, and of the random attempts.

        Those of another start or effort than the default are not known before.
        """
        settings, solver, stacks = self.settings, self.settings.solver, self.catalogue.stacks
        ks = sum(k > 0 for k in settings.ks)
        lora, solving, least, most = 0.0, 0.0, 0.0, 0.0
        for exact in (False, True):
            if not (sources := [source for source in stacks if settings.exact(source) == exact]):
                continue
            seconds, solver_part = self._exact_seconds(sources) if exact else self._leading_seconds(sources)
            shortest, longest = attempt_seconds(seconds, exact)
            lora += seconds
            solving += solver_part
            least += ks * settings.seeds * shortest
            most += ks * settings.seeds * longest
        text = f"LoRA takes about {lora:.3g} s here, by a layer timed now, reading aside"
        if ks and solver.start == "best":
            text += f"; solver and closed floors {EFFORT_TIMES[solver.effort]} {solving:.3g} s more"
        elif ks:
            text += f"; the solver from --start {solver.start} comes on top"
        if ks and settings.seeds:
            text += f"; the random attempts {least:.3g} to {most:.3g} s, which --seeds 0 leaves out"
        if ks and settings.certificate != "closed":
            text += f"; floors of --certificate {settings.certificate} up to minutes for each stack and k"
        return [f"{text}."]

    def _exact_seconds(self, sources: Sequence[StackSource]) -> tuple[float, float]:
        """The seconds of LoRA, and of the solver with closed floors for all k, of stacks that are decomposed."""
        lora = exact_lora_seconds(sources, self.settings.rank, self.dtype, self.device)
        return lora, sum(k > 0 for k in self.settings.ks) * exact_solver_seconds(lora, sources, self.settings.rank)

    def _leading_seconds(self, sources: Sequence[StackSource]) -> tuple[float, float]:
        """The same of stacks that are only applied."""
        entries = sum(source.layers * math.prod(source.shape) for source in sources)
        lora = lora_seconds(entries, self.settings.rank, self.dtype, self.device)
        budgets = [RankBudget(self.settings.rank, k) for k in self.settings.ks if k > 0]
        return lora, sum(solver_seconds(lora, sources, budget) for budget in budgets)

    def _update_rank(self, source: StackSource) -> int:
        """The largest r - k + L k of all k, at most min(b, a)."""
        budgets = [RankBudget(self.settings.rank, k) for k in self.settings.ks]
        return min(*source.shape, max(b.private_rank + b.pool_rank(source.layers) for b in budgets))

    @staticmethod
    def _local(source: StackSource, world_size: int) -> StackSource:
        """The largest share of the stack that one process holds."""
        return dataclasses.replace(source, layers=-(-source.layers // world_size))


def take_up(
    job: StudyJob, command: Sequence[str], folder: ResultsFolder | None, anew: bool, processes: Processes
) -> StudyState:
    """The state to go on from: the finished stacks of an earlier run of the same plan, or nothing.

    With `anew`, a study that is finished is not taken up, so that it is computed once more.

    Its results carry the plan, as `unfinished` until every stack is done. Process 0 reads the folder for all.
    """
    factors: dict[str, Tensor] = {}  # only process 0 has them

    def finished() -> dict[str, Any] | None:
        earlier = None if folder is None else folder.finished_stacks(job.settings.ks)
        if earlier is None or (anew and "plan" in earlier.results):
            return None
        factors.update(earlier.factors)
        return earlier.results

    state = StudyState(processes.from_first(finished) or new_results(job.settings, job.catalogue.source), factors)
    plan = job.plan() if folder is None else folder.plan
    state.results |= {"command": list(command), "unfinished": plan, "theorem_3_1": "undecided"}
    state.results.pop("plan", None)
    state.results["left_out"] = [{"name": one.name, "reason": one.reason} for one in job.catalogue.left_out]
    return state


def stacks_left(job: StudyJob, state: StudyState) -> list[StackSource]:
    """The stacks that are not finished."""
    finished = {row["name"] for row in state.results["stacks"]}
    return [source for source in job.catalogue.stacks if source.name not in finished]


def add_norms(job: StudyJob, results: dict[str, Any]) -> None:
    """Add to results what the updates are beside their weights: ||update|| / ||weights|| of every stack and of all.

    Tensors that are left out get the squared norm of their update. Of a pair that may be none, or that differs by
    rounding alone, `warning` says so. Sources without single tensors stay as they are.
    """
    left_out = job.catalogue.norms_left_out()
    for one in results["left_out"]:
        if one["name"] in left_out:
            one["norm_squared"] = left_out[one["name"]].update
    measured = {source.name: job.catalogue.norms(source) for source in job.catalogue.stacks}
    norms = {name: Norms.together(several) for name, several in measured.items() if several is not None}
    for row in results["stacks"]:
        if row["name"] in norms:
            row["relative_norm"] = norms[row["name"]].relative
    whole = Norms.together([*norms.values(), *left_out.values()])
    if whole.base is not None:
        results["relative_norm"] = whole.relative
        results["warning"] = pair_warning(whole, job.catalogue.source)


def run_study(
    job: StudyJob,
    state: StudyState,
    folder: ResultsFolder | None,
    processes: Processes,
    watch: Watch | None = None,
    finished: Callable[[dict[str, Any], dict[str, Any]], None] = lambda row, run: None,
) -> None:
    """Study the stacks that are left, and write all results after every (stack, k). Only process 0 writes.

    `finished` is called then, with the row of the stack and that of its k.

    An interruption is raised again, after all finished results are written. Their verdict is then "undecided" at best,
    since a stack that was not studied could violate the theorem. An interruption of the last writing stops nothing.
    """
    output = folder if processes.first else None
    stacks = (source.load(job.dtype, job.device, processes, job.tf32) for source in stacks_left(job, state))
    try:
        with keeping_interrupts():
            for _ in study_steps(stacks, job.settings, state, watch):
                if output is not None:
                    output.write(state)
                row = state.results["stacks"][-1]
                finished(row, row["runs"][-1])
            if processes.first:
                add_norms(job, state.results)
            state.results["plan"] = state.results["unfinished"]
            del state.results["unfinished"]
            state.results["theorem_3_1"] = overall_verdict(state.results)
            if output is not None:
                output.write(state)
    except KeyboardInterrupt:
        is_complete = "plan" in state.results
        if is_complete:  # only the last writing was interrupted, and is done here
            state.results.pop("unfinished", None)
            state.results["theorem_3_1"] = overall_verdict(state.results)
        else:
            processes.board.tell_interrupted()
        if output is not None and state.results["stacks"]:
            output.write(state)
        if not is_complete:
            raise
