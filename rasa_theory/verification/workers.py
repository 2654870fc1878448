"""Trials of many instances, in order, over several processes if asked."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from typing import NamedTuple

from rasa_theory.distributed import Processes
from rasa_theory.verification.evidence import Subject, VerificationSettings
from rasa_theory.verification.instances import draw_instance
from rasa_theory.verification.trial import Outcome, Trial, run_trial

_Findings = tuple[dict[str, Outcome], bool, bool]
_WORTH_A_PROCESS = 25  # instances: a process needs some seconds to import torch


class Drawn(NamedTuple):
    """What `draw_instance` draws an instance from."""

    family: str
    number: int
    seed: int


def suitable_jobs(instances: int) -> int:
    """A process for each processor at hand, but none for fewer than 25 instances."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(processors, instances // _WORTH_A_PROCESS))


def trials(
    drawn: Iterator[Drawn], settings: VerificationSettings, jobs: int, subject: Subject | None = None
) -> Iterator[Trial]:
    """All laws on every instance, in order, by `jobs` processes; a `subject` in place of the package by this one alone.

    Raises BrokenProcessPool if a process dies.
    """
    if jobs == 1 or subject is not None:
        for one in drawn:
            yield run_trial(draw_instance(*one), subject or Subject(), settings)
        return
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _leave_interrupts_to_the_parent)
    try:
        waiting: deque[tuple[Drawn, Future[_Findings]]] = deque()
        for one in islice(drawn, 2 * jobs):
            waiting.append((one, pool.submit(_findings, one, settings)))
        while waiting:
            one, future = waiting.popleft()
            outcomes, strict, crossed = future.result()
            waiting.extend((more, pool.submit(_findings, more, settings)) for more in islice(drawn, 1))
            yield Trial(draw_instance(*one), outcomes, strict, crossed)
    finally:
        pool.shutdown(cancel_futures=True)


def shared_trials(drawn: Iterator[Drawn], settings: VerificationSettings, processes: Processes) -> Iterator[Trial]:
    """All laws on every instance, in order, in all processes alike; each tries one of every round."""
    while turn := list(islice(drawn, processes.world_size)):
        mine = turn[processes.process : processes.process + 1]
        for one, found in zip(
            turn, processes.all_gather_objects([_findings(own, settings) for own in mine]), strict=False
        ):
            ((outcomes, strict, crossed),) = found
            yield Trial(draw_instance(*one), outcomes, strict, crossed)


def _findings(one: Drawn, settings: VerificationSettings) -> _Findings:
    """A trial without its instance, whose tensors would have to be sent."""
    trial = run_trial(draw_instance(*one), Subject(), settings)
    return trial.outcomes, trial.strict, trial.crossed


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
