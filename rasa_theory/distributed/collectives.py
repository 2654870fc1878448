"""The collectives of torch.distributed that the package uses, with a counter. They also work without a group.

Every process runs the same program on its own layers. The parts of one layer (M_i, B~_i, A~_i and row i of D) never
leave their process unless they are gathered. The pool is replicated.

torch calls the number of a process its rank. Here a rank is the rank of a matrix, and the number is `process`. The
number of processes is `world_size`, as in torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rasa_theory.common import ProcessLost
from rasa_theory.distributed.notices import Notice, NoticeBoard

ALLOCATION_ERRORS = (MemoryError, torch.OutOfMemoryError)


@dataclass
class CommunicationCounter:
    """Number of collective calls by this process, and bytes of its buffers in them, whatever the algorithm.

    A ring moves about 2 (P - 1) / P times the bytes of a reduction over every link. P is the world size.
    """

    reductions: int = 0
    reduced_bytes: int = 0
    gathers: int = 0
    gathered_bytes: int = 0

    def count_gather(self, buffer: Tensor) -> None:
        """Count one gather or broadcast of `buffer`."""
        self.gathers += 1
        self.gathered_bytes += buffer.numel() * buffer.itemsize


class Collectives:
    """Collectives over the processes of a group. Without a group there is one process, and each returns its argument.

    Tensors on CUDA go through the group's backend for CUDA, all others through its backend for the CPU. Raises
    ProcessLost if another process has died or has failed on its own, KeyboardInterrupt if it was interrupted.
    """

    def __init__(self, group: dist.ProcessGroup | None, store: Any) -> None:
        self.process = 0 if group is None else dist.get_rank(group)
        self.world_size = 1 if group is None else dist.get_world_size(group)
        self.communication = CommunicationCounter()
        self.board = NoticeBoard(store, self.process, self.world_size)
        self._group = group

    @property
    def alone(self) -> bool:
        """True if there is one process."""
        return self.world_size == 1

    @property
    def first(self) -> bool:
        """True in process 0, which prints and writes."""
        return self.process == 0

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
        """The parts (counts[p], ..) of all processes p, concatenated, in all processes."""
        if self.alone:
            return parts
        padded = _padded(parts, max(counts))
        gathered = [torch.empty_like(padded) for _ in counts]
        self.communication.count_gather(padded)
        with self._others_alive():
            dist.all_gather(gathered, padded, group=self._group)
        return _without_padding(gathered, counts)

    def gather_to_first(self, parts: Tensor, counts: Sequence[int]) -> Tensor:
        """`all_gather` to the CPU of process 0 alone. The others return their `parts`."""
        if self.alone:
            return parts
        padded = _padded(parts.cpu(), max(counts))
        gathered = [torch.empty_like(padded) for _ in counts] if self.first else None
        self.communication.count_gather(padded)
        with self._others_alive():
            dist.gather(padded, gathered, dst=self._global(0), group=self._group)
        return parts if gathered is None else _without_padding(gathered, counts)

    def broadcast(self, process: int, x: Tensor) -> Tensor:
        """The x of `process`, in all processes."""
        if self.alone:
            return x
        self.communication.count_gather(x)
        with self._others_alive():
            dist.broadcast(x, src=self._global(process), group=self._group)
        return x

    def all_gather_objects(self, value: Any) -> list[Any]:
        """The values of all processes in order. They are small plain data."""
        if self.alone:
            return [value]
        values: list[Any] = [None] * self.world_size
        with self._others_alive():
            dist.all_gather_object(values, value, group=self._group)
        return values

    def broadcast_object(self, value: Any) -> Any:
        """The value of process 0, plain data, in all processes."""
        if self.alone:
            return value
        values = [value]
        with self._others_alive():
            dist.broadcast_object_list(values, src=self._global(0), group=self._group)
        return values[0]

    def _global(self, process: int) -> int:
        """The number of a process of this group among all processes."""
        assert self._group is not None
        return dist.get_global_rank(self._group, process)

    @contextlib.contextmanager
    def _others_alive(self) -> Iterator[None]:
        """Translate the error of a collective that cannot finish because another process is gone."""
        try:
            yield
        except RuntimeError as error:
            if lacks_memory(error):
                raise
            if self.board.count(Notice.INTERRUPTED):
                raise KeyboardInterrupt from None
            raise ProcessLost(str(error).split("\n")[0]) from error


def lacks_memory(error: Exception) -> bool:
    """Return whether an exception reports too little memory. On the CPU torch has no exception type for it."""
    text = str(error).lower()
    phrases = ("can't allocate", "cannot allocate", "not enough memory", "out of memory", "size calculation overflowed")
    return isinstance(error, ALLOCATION_ERRORS) or any(phrase in text for phrase in phrases)


def _padded(parts: Tensor, count: int) -> Tensor:
    """Append rows of zeros to `parts`, up to `count` rows, since gathers need buffers of equal size."""
    parts = parts.detach()
    if len(parts) == count:
        return parts.contiguous()
    padded = parts.new_zeros(count, *parts.shape[1:])
    padded[: len(parts)] = parts
    return padded


def _without_padding(gathered: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """Concatenate the first counts[p] rows of the buffer of each process p."""
    return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])
