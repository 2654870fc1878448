"""Processes that end with the process that started them, so that none computes on for nobody."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable

_ORPHANED = 1  # exit status, which nobody is there to read
_GLANCE = 1.0  # seconds between two looks at the parent of a process of torchrun


# A parent that handles signals could end its workers, but not when it is killed (SIGKILL, or too little memory). So
# every worker watches its parent instead. Linux could send a signal on the parent's death (prctl PR_SET_PDEATHSIG), yet
# it does so when the *thread* ends that started the worker, and other systems have nothing like it.
def end_with_parent() -> None:
    """Let this process end, from now on, as soon as its parent has ended. It then exits at once, without cleaning up.

    For workers of `multiprocessing` and processes of torchrun. In any other process it does nothing, since a command
    may well outlive the shell that started it.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        _exit_after(parent.join)  # sleeps until the system closes the parent's end of a pipe
    elif "TORCHELASTIC_RUN_ID" in os.environ and hasattr(os, "getppid"):
        agent = os.getppid()
        _exit_after(lambda: _until_orphaned(agent))


def _exit_after(wait: Callable[[], object]) -> None:
    """Exit when `wait` returns, in a thread of its own."""

    def watch() -> None:
        wait()
        os._exit(_ORPHANED)

    threading.Thread(target=watch, name="rasa_theory-parent", daemon=True).start()


def _until_orphaned(parent: int) -> None:
    """Wait until another process has adopted this one, by its parent's process id."""
    while os.getppid() == parent:
        time.sleep(_GLANCE)
