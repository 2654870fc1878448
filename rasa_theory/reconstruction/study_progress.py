"""Progress of a study: the state that a watcher receives, and its bookkeeping, apart from the computation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rasa_theory.bounds import SearchProgress
from rasa_theory.reconstruction.study_settings import StudySettings
from rasa_theory.solvers import Progress

SEARCHING = "searching"
"""`StudyProgress.doing` while many starts and moves are tried on a small core."""


@dataclass(frozen=True)
class StudyProgress:
    """One message to a watcher: the stack and k, the task in hand, its step, and the error there.

    Attributes:
        ratio: the error in units of e_lora, None if e_lora is 0. While a floor is searched for, it is the floor.
        sweep: the sweep of the solver, the step of its search, or the iteration of the search for a floor.
        max_sweeps: the number of those that are planned.
        tasks_done: tasks finished so far, on all stacks; `StudySettings.tasks` says how many there are for each k.
    """

    stack: str
    k: int
    doing: str
    sweep: int
    max_sweeps: int
    ratio: float | None
    tasks_done: int


Watch = Callable[[StudyProgress], None]


class StudyReporter:
    """Passes the progress of solvers and searches on to a watcher, with the stack, k and number of tasks done.

    The solver, the attempts and the searches know nothing of a study: they report sweeps and errors to a callback. The
    study says here where it is, and hands them `solving`, `attempting` and `searching` as callbacks.
    """

    def __init__(self, settings: StudySettings, watch: Watch | None) -> None:
        self._settings, self._watch = settings, watch
        self._stack, self._e_lora, self._k = "", 0.0, 0
        self._tasks_before, self._tasks_done = 0, 0

    def begin_stack(self, name: str, e_lora: float) -> None:
        self._stack, self._e_lora = name, e_lora

    def begin_k(self, k: int) -> None:
        self._k, self._tasks_before = k, self._tasks_done

    def task_done(self) -> None:
        self._tasks_done += 1

    def end_k(self) -> None:
        """All tasks of this k are done, a search for a floor included if there was one."""
        self._tasks_done = self._tasks_before + self._settings.tasks(self._k)

    def solving(self, progress: Progress) -> None:
        doing = SEARCHING if progress.start == "search" else f"solving from {progress.start}"
        self._tell(doing, progress.sweep, progress.max_sweeps, progress.error)

    def attempting(self, progress: Progress) -> None:
        self._tell("random attempts", progress.sweep, progress.max_sweeps, progress.error)

    def searching(self, progress: SearchProgress) -> None:
        self._tell(f"{progress.search} floor", progress.iteration, progress.max_iterations, progress.value)

    def _tell(self, doing: str, step: int, steps: int, value: float) -> None:
        if self._watch is not None:
            ratio = value / self._e_lora if self._e_lora > 0 else None
            self._watch(StudyProgress(self._stack, self._k, doing, step, steps, ratio, self._tasks_done))
