"""How the processes that torchrun has started meet."""

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
from rasa_theory.distributed.processes import ALONE, PATIENCE, Processes


def launched() -> bool:
    """Whether this process was started by torchrun, or as it would, with others: WORLD_SIZE says so."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def first_launched() -> bool:
    """Whether this process is the first of those that torchrun has started, or the only one: RANK says so.

    This is known before the processes have met.
    """
    return not launched() or os.environ.get("RANK") == "0"


def local_process() -> int:
    """The number of this process among those on the same machine, which is the number of its GPU: LOCAL_RANK."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextlib.contextmanager
def meeting() -> Iterator[Processes]:
    """The processes that torchrun has started, or this one alone.

    They speak gloo between CPUs and nccl between GPUs, each process with the GPU of its LOCAL_RANK. A group that is
    there already is used, and left as it is.
    """
    if dist.is_available() and dist.is_initialized():
        yield Processes(dist.group.WORLD)
        return
    if not launched():
        yield ALONE
        return
    backend = "gloo"
    if torch.cuda.is_available():
        local, there = local_process(), torch.cuda.device_count()
        if local < there:
            torch.cuda.set_device(local)
            backend = "cpu:gloo,cuda:nccl"
    signal.signal(signal.SIGTERM, _ended)
    store, process, world_size = next(rendezvous("env://", timeout=PATIENCE))
    dist.init_process_group(backend, store=store, rank=process, world_size=world_size, timeout=PATIENCE)
    yield Processes(dist.group.WORLD, store)
    dist.destroy_process_group()  # not where it failed: others may still wait in it


def _ended(number: int, frame: Any) -> None:
    """torchrun ends the processes that are left when one has failed: they come to their end in order."""
    signal.signal(number, signal.SIG_IGN)
    raise ProcessLost("ended by torchrun")
