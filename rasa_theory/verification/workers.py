"""Trials of many instances, in order, in one process or several."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from typing import NamedTuple

from rasa_theory import linalg
from rasa_theory.distributed import Processes, end_with_parent
from rasa_theory.verification.evidence import Subject, VerificationSettings
from rasa_theory.verification.instances import Instance, draw_instance
from rasa_theory.verification.trial import Outcome, Trial, run_trial

_Findings = tuple[dict[str, Outcome], bool, bool]
_WORTH_A_PROCESS = 25  # instances: a process needs some seconds to import torch


class InstanceKey(NamedTuple):
    """The arguments of `draw_instance`, on which an instance depends."""

    family: str
    number: int
    seed: int


def instances_in_turn(families: Sequence[str], count: int, seed: int) -> Iterator[InstanceKey]:
    """`count` instances, one of each family in turn."""
    return (InstanceKey(families[n % len(families)], n // len(families), seed) for n in range(count))


def suitable_jobs(instances: int) -> int:
    """The smaller of the number of available processors and instances // 25, but at least 1."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(processors, instances // _WORTH_A_PROCESS))


def trials(
    keys: Iterator[InstanceKey], settings: VerificationSettings, jobs: int, subject: Subject | None = None
) -> Iterator[Trial]:
    """All laws on every instance, in order, in `jobs` processes.

    A `subject` is tested in place of the package, in this process, since it cannot be sent to others. Raises
    BrokenProcessPool if a process dies. The processes end with this one, even if it is killed.
    """
    if jobs == 1 or subject is not None:
        for key in keys:
            yield run_trial(_drawn(key), subject or Subject(), settings)
        return
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _begin_worker)
    try:
        waiting: deque[tuple[InstanceKey, Future[_Findings]]] = deque()
        for key in islice(keys, 2 * jobs):
            waiting.append((key, pool.submit(_findings, key, settings)))
        while waiting:
            key, future = waiting.popleft()
            outcomes, strict, crossed = future.result()
            for next_key in islice(keys, 1):
                waiting.append((next_key, pool.submit(_findings, next_key, settings)))
            yield Trial(_drawn(key), outcomes, strict, crossed)
    finally:
        pool.shutdown(cancel_futures=True)


def shared_trials(keys: Iterator[InstanceKey], settings: VerificationSettings, processes: Processes) -> Iterator[Trial]:
    """All laws on every instance, in order, the same in every process. Each one tries one instance a round."""
    while turn := list(islice(keys, processes.world_size)):
        own = [_findings(key, settings) for key in turn[processes.process : processes.process + 1]]
        for key, gathered in zip(turn, processes.all_gather_objects(own), strict=False):
            ((outcomes, strict, crossed),) = gathered
            yield Trial(_drawn(key), outcomes, strict, crossed)


def _findings(key: InstanceKey, settings: VerificationSettings) -> _Findings:
    """A trial without its instance, whose tensors would have to be sent."""
    trial = run_trial(_drawn(key), Subject(), settings)
    return trial.outcomes, trial.strict, trial.crossed


def _drawn(key: InstanceKey) -> Instance:
    """The instance of a key, which is small."""
    with linalg.one_thread():
        return draw_instance(*key)


def _begin_worker() -> None:
    """Prepare a process of the pool: the parent alone handles interrupts, and its end is the worker's end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
