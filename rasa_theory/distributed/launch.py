"""The start of a process group by torchrun."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from rasa_theory.common import ProcessLost
from rasa_theory.distributed.parents import end_with_parent
from rasa_theory.distributed.processes import ALONE, PATIENCE, Processes


def launched() -> bool:
    """True if torchrun, or a launcher like it, has started several processes. WORLD_SIZE tells."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def first_launched() -> bool:
    """True if this is process 0 of torchrun, or the only process. RANK tells.

    The answer is available before the process group exists.
    """
    return not launched() or os.environ.get("RANK") == "0"


def local_process() -> int:
    """The number of this process on its machine, which is also the number of its GPU: LOCAL_RANK."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextlib.contextmanager
def meeting() -> Iterator[Processes]:
    """Context with the processes that torchrun has started, or with this one alone.

    The backend is gloo between CPUs and nccl between GPUs. Each process uses the GPU of its LOCAL_RANK. A group that
    exists already is used, and it is not ended here.
    """
    if dist.is_available() and dist.is_initialized():
        yield Processes(dist.group.WORLD)
        return
    if not launched():
        yield ALONE
        return
    backend = "gloo"
    if torch.cuda.is_available():
        local = local_process()
        if local < torch.cuda.device_count():
            torch.cuda.set_device(local)
            backend = "cpu:gloo,cuda:nccl"
    signal.signal(signal.SIGTERM, _ended)
    end_with_parent()  # torchrun ends its processes, unless it is killed itself
    store, process, world_size = next(rendezvous("env://", timeout=PATIENCE))
    dist.init_process_group(backend, store=store, rank=process, world_size=world_size, timeout=PATIENCE)
    yield Processes(dist.group.WORLD, store)
    dist.destroy_process_group()  # not after an error: other processes may still wait in the group


def _ended(number: int, frame: Any) -> None:
    """Handle the SIGTERM that torchrun sends to the other processes after one has failed, so that they end in order."""
    signal.signal(number, signal.SIG_IGN)
    raise ProcessLost("ended by torchrun")
