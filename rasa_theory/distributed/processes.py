"""The processes that share the layers: collectives, and errors that all of them raise together."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist

from rasa_theory.common import FailedElsewhere, InputError, ProcessLost
from rasa_theory.distributed.collectives import ALLOCATION_ERRORS, Collectives, lacks_memory
from rasa_theory.distributed.notices import Notice

PATIENCE = datetime.timedelta(minutes=30)
"""Time after which a process gives up waiting for another one that neither answers nor has died."""
_LONG = datetime.timedelta(days=7)  # for shares of work that end at different times


class Processes(Collectives):
    """The processes that share the layers. This one is number `process` of `world_size`.

    `group` is a group of torch.distributed, or None if this process is alone. `store` is the key-value store of the
    rendezvous, for the notice board. It is None for a group that existed before, which its creator ends.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, store: Any = None) -> None:
        super().__init__(group, store)
        self._store = store

    def __str__(self) -> str:
        return f"process {self.process} of {self.world_size}"

    def with_long_timeout(self) -> Processes:
        """Return the same processes for work that ends at different times: they wait up to a week for each other.

        All processes call it together. A group that existed before keeps its own limit.
        """
        if self._store is None:
            return self
        return Processes(dist.new_group(timeout=_LONG, backend="gloo"), self._store)

    def from_first(self, make: Callable[[], Any]) -> Any:
        """Call `make` in process 0 and return its result, plain data, in all. If it raises InputError, all raise."""
        with self.raise_together():
            value = make() if self.first else None
        return self.broadcast_object(value)

    # Why errors are raised together: a process that raises on its own leaves the others waiting in their next
    # collective until their patience ends. So work that can fail for the data of one process runs within
    # `raise_together`, and calls no collective there. At its end every process sends one sentence, None for success,
    # and the first failing process in order decides for all.
    #
    # Contexts nest, since an inner one ends in all processes together. In the outer one, FailedElsewhere is no failure
    # of this process: it sends None, so that a sentence is never prefixed twice. The process where the error arose
    # sends its sentence again. If the error was too little memory, this process holds FailedElsewhere, too. Then nobody
    # sends a sentence, and each raises its exception again.
    #
    # Only bad input and too little memory count. Any other exception is a bug and ends its process alone; the others
    # then raise ProcessLost in their next collective.

    @contextlib.contextmanager
    def raise_together(self) -> Iterator[None]:
        """Context for work that may fail in one process, for its own data.

        If any process raises InputError or lacks memory, all processes raise InputError with one sentence that names
        the first failing process. That process itself raises its own InputError.
        """
        if self.alone:
            yield
            return
        problem: Exception | None = None
        try:
            yield
        except (InputError, *ALLOCATION_ERRORS) as error:
            problem = error
        except RuntimeError as error:
            if isinstance(error, ProcessLost) or not lacks_memory(error):
                raise
            problem = error
        if problem is not None:
            self.board.post(Notice.FAILED)
        is_new = problem is not None and not isinstance(problem, FailedElsewhere)
        sentences = self.all_gather_objects(_sentence(problem) if is_new else None)
        failing = [(process, sentence) for process, sentence in enumerate(sentences) if sentence is not None]
        if failing:
            process, sentence = failing[0]
            if process == self.process and isinstance(problem, InputError):
                raise problem
            raise FailedElsewhere(f"process {process} of {self.world_size}: {sentence}", process)
        if problem is not None:  # an inner context has told all processes
            raise problem


ALONE = Processes()
"""A single process, which holds all layers."""


def _sentence(problem: Exception | None) -> str:
    """The message of bad input, or else a sentence about memory."""
    return str(problem) if isinstance(problem, InputError) else "there is not enough memory"
