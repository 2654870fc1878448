"""The processes of torch.distributed: collectives, and errors that are raised in all processes together.

Every process runs the same program on its own layers. What a process has of a layer (M_i, B~_i, A~_i and row i of D)
never leaves it unless it is gathered; the pool is replicated.

torch calls the number of a process its rank. Here a rank is the rank of a matrix, and the number is `process`. The
number of processes is `world_size`, as in torch.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rasa_theory.common import FailedElsewhere, InputError, ProcessLost

PATIENCE = datetime.timedelta(minutes=30)
"""How long a process waits for another that neither answers nor has died before it gives up."""
_LONG = datetime.timedelta(days=7)  # for shares of work that end at different times
_GRACE = 2.0  # seconds that a process which was interrupted stays for the others to be
_FAREWELL = 5.0  # seconds that process 0 waits for the others to end as well
_ROLL_CALL = datetime.timedelta(seconds=10)  # within which those who are alive say so
_ALLOCATION = (MemoryError, torch.OutOfMemoryError)


@dataclass
class CommunicationCounter:
    """What a process has put into collectives so far: calls, and bytes of its own buffers, whatever the algorithm.

    A ring moves about 2 (P - 1) / P times the bytes of a reduction over every link, P the world size.
    """

    reductions: int = 0
    reduced_bytes: int = 0
    gathers: int = 0
    gathered_bytes: int = 0


class Processes:
    """The processes that share the layers: this one's number, how many there are, and what they say to each other.

    Without a group of torch.distributed it is one process, and everything returns its argument. Tensors on CUDA go
    through the group's backend for CUDA, all else through that for the CPU. Raises ProcessLost where another process
    has died or has failed on its own.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, store: Any = None) -> None:
        self.process = 0 if group is None else dist.get_rank(group)
        self.world_size = 1 if group is None else dist.get_world_size(group)
        self.communication = CommunicationCounter()
        self._group, self._store = group, store

    @property
    def alone(self) -> bool:
        """Whether there is one process."""
        return self.world_size == 1

    @property
    def first(self) -> bool:
        """Whether this is process 0, which prints and writes."""
        return self.process == 0

    def __str__(self) -> str:
        return f"process {self.process} of {self.world_size}"

    def with_long_timeout(self) -> Processes:
        """The same processes, for work that ends at different times: they wait for each other as long as all live.

        Up to a week, that is. All have to ask for it together. In a group that was there before, its own limit holds.
        """
        if self._store is None:
            return self
        return Processes(dist.new_group(timeout=_LONG, backend="gloo"), self._store)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of x over all processes, the same bits in all."""
        return self._all_reduce(x, dist.ReduceOp.SUM)

    def all_reduce_max(self, x: Tensor) -> Tensor:
        """The elementwise maximum of x over all processes."""
        return self._all_reduce(x, dist.ReduceOp.MAX)

    def _all_reduce(self, x: Tensor, operation: Any) -> Tensor:
        if self.alone:
            return x
        result = x.detach().clone(memory_format=torch.contiguous_format)
        self.communication.reductions += 1
        self.communication.reduced_bytes += result.numel() * result.itemsize
        with self._others_alive():
            dist.all_reduce(result, operation, group=self._group)
        return result

    def all_gather(self, parts: Tensor, counts: Sequence[int]) -> Tensor:
        """The parts (counts[p], ..) of all processes p, one after the other, in all of them."""
        if self.alone:
            return parts
        padded = _padded(parts, max(counts))
        gathered = [torch.empty_like(padded) for _ in counts]
        self.communication.gathers += 1
        self.communication.gathered_bytes += padded.numel() * padded.itemsize
        with self._others_alive():
            dist.all_gather(gathered, padded, group=self._group)
        return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])

    def gather_to_first(self, parts: Tensor, counts: Sequence[int]) -> Tensor:
        """The same on the CPU, in process 0 alone; the others keep what they have."""
        if self.alone:
            return parts
        padded = _padded(parts.cpu(), max(counts))
        gathered = [torch.empty_like(padded) for _ in counts] if self.first else None
        self.communication.gathers += 1
        self.communication.gathered_bytes += padded.numel() * padded.itemsize
        with self._others_alive():
            dist.gather(padded, gathered, dst=self._global(0), group=self._group)
        if gathered is None:
            return parts
        return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])

    def broadcast(self, process: int, x: Tensor) -> Tensor:
        """x as `process` has it, in all."""
        if self.alone:
            return x
        self.communication.gathers += 1
        self.communication.gathered_bytes += x.numel() * x.itemsize
        with self._others_alive():
            dist.broadcast(x, src=self._global(process), group=self._group)
        return x

    def _global(self, process: int) -> int:
        """The number of a process of this group among all."""
        assert self._group is not None
        return dist.get_global_rank(self._group, process)

    def all_gather_objects(self, what: Any) -> list[Any]:
        """What every process says, small plain data, in their order."""
        if self.alone:
            return [what]
        heard: list[Any] = [None] * self.world_size
        with self._others_alive():
            dist.all_gather_object(heard, what, group=self._group)
        return heard

    def from_first(self, make: Callable[[], Any]) -> Any:
        """What `make` returns in process 0, plain data, in all; where it raises InputError there, all raise it."""
        if self.alone:
            return make()
        made: list[Any] = [None]
        with self.raise_together():
            made = [make() if self.first else None]
        with self._others_alive():
            dist.broadcast_object_list(made, src=self._global(0), group=self._group)
        return made[0]

    @contextlib.contextmanager
    def raise_together(self) -> Iterator[None]:
        """What may fail in one process, for its own data: then all raise InputError, with one sentence that names it.

        Within it the processes do not speak to each other, but for what agrees in its turn. Too little memory counts
        as bad input.
        """
        if self.alone:
            yield
            return
        problem: Exception | None = None
        try:
            yield
        except (InputError, *_ALLOCATION) as error:
            problem = error
        except RuntimeError as error:
            if isinstance(error, ProcessLost) or not lacks_memory(error):
                raise
            problem = error
        if problem is not None:
            self._counted("failed", 1)
        own = None if problem is None or isinstance(problem, FailedElsewhere) else _sentence(problem)
        heard = self.all_gather_objects(own)
        failing = [(process, sentence) for process, sentence in enumerate(heard) if sentence is not None]
        if failing:
            process, sentence = failing[0]
            if process == self.process and isinstance(problem, InputError):
                raise problem
            raise FailedElsewhere(f"process {process} of {self.world_size}: {sentence}", process)
        if problem is not None:  # all have been told before
            raise problem

    @contextlib.contextmanager
    def _others_alive(self) -> Iterator[None]:
        """A collective that cannot be finished, since another process is gone: ProcessLost, or KeyboardInterrupt."""
        try:
            yield
        except RuntimeError as error:
            if lacks_memory(error):
                raise
            if self._counted("interrupted"):
                raise KeyboardInterrupt from None
            raise ProcessLost(str(error).split("\n")[0]) from error

    # ---- the end

    def tell_interrupted(self) -> None:
        """Tell the others, who would otherwise take this one for lost. Only process 0 has something to write then."""
        self._counted("interrupted", 1)
        if not self.first:
            time.sleep(_GRACE)

    def leave(self, status: int) -> None:
        """End this process at once with an exit status, where `meeting` has brought it together with others.

        While Python ends in order, threads of torch that wait for one who is gone may abort the process (SIGABRT).
        """
        if self._store is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            self._counted("left", 1)
            deadline = time.monotonic() + _FAREWELL
            while self.first and self._counted("left") < self.world_size and time.monotonic() < deadline:
                time.sleep(0.02)  # the store may go with process 0, and tells the others who has spoken
            os._exit(status)

    @property
    def ending(self) -> bool:
        """Whether a process has failed in `raise_together`, or was interrupted: the others need not go on."""
        return self._counted("failed") + self._counted("interrupted") > 0

    @property
    def has_spoken(self) -> bool:
        """Whether a process has said already why all of them stop."""
        return self._counted("said") > 0

    def _counted(self, what: str, more: int = 0) -> int:
        """How often processes have reported this."""
        if self._store is None:
            return 0
        with contextlib.suppress(RuntimeError):  # the store may be gone with the process that held it
            return int(self._store.add(f"rasa_theory/{what}", more))
        return 0

    def speaks(self) -> bool:
        """Whether this process is the first to say why all of them stop; what it says then is the one sentence."""
        return self.first if self._store is None else self._counted("said", 1) <= 1

    def missing(self) -> str:
        """Who does not answer within 10 s, as a sentence: those who are left sign the list in the group's store.

        torch's monitored barrier names only who is late, not whose connection is closed, as that of the dead is.
        """
        lost, deadline = [], time.monotonic() + _ROLL_CALL.total_seconds()
        with contextlib.suppress(RuntimeError):
            self._store.set(self._signature(self.process), "here")
        for process in range(self.world_size):
            left = max(deadline - time.monotonic(), 0.01)
            try:
                self._store.wait([self._signature(process)], datetime.timedelta(seconds=left))
            except RuntimeError:
                lost.append(str(process))
        nouns, verbs = ("processes", "answer") if len(lost) > 1 else ("process", "answers")
        who = f"{nouns} {', '.join(lost)} of {self.world_size} no longer {verbs}"
        return who if lost else "another process has given up"

    @staticmethod
    def _signature(process: int) -> str:
        return f"rasa_theory/here/{process}"


ALONE = Processes()
"""One process, which holds all layers."""


def lacks_memory(error: Exception) -> bool:
    """Whether an exception says that there is too little memory; torch has no type of its own for this on the CPU."""
    text = str(error).lower()
    said = ("can't allocate", "cannot allocate", "not enough memory", "out of memory", "size calculation overflowed")
    return isinstance(error, _ALLOCATION) or any(one in text for one in said)


def _sentence(problem: Exception) -> str:
    return str(problem) if isinstance(problem, InputError) else "there is not enough memory"


# ---- how the processes meet


def _padded(parts: Tensor, count: int) -> Tensor:
    parts = parts.detach()
    if len(parts) == count:
        return parts.contiguous()
    padded = parts.new_zeros(count, *parts.shape[1:])
    padded[: len(parts)] = parts
    return padded
