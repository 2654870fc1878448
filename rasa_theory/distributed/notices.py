"""The notice board of a group, by which processes end in order when one fails, is interrupted, or dies.

It lies in the key-value store of the rendezvous, apart from the collectives, so it still works when these fail. A
process that loses another one in a collective reads there why, and whether the user has already been told.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
import time
from enum import Enum
from typing import Any

_GRACE = 2.0  # seconds that an interrupted process stays, so that the others are interrupted before it is missing
_FAREWELL = 5.0  # seconds that process 0, which holds the store, waits for the others to end
_ROLL_CALL = datetime.timedelta(seconds=10)  # time that live processes have to answer


class Notice(Enum):
    """The notices that processes count on the board; the values are keys in the store."""

    FAILED = "failed"
    INTERRUPTED = "interrupted"
    SAID = "said"
    LEFT = "left"


class NoticeBoard:
    """Notices in the store of a group. Without a store nobody posts, and every count is 0."""

    def __init__(self, store: Any = None, process: int = 0, world_size: int = 1) -> None:
        self._store, self._process, self._world_size = store, process, world_size

    def count(self, notice: Notice) -> int:
        """The number of times that processes have posted this notice."""
        return self._add(notice, 0)

    def post(self, notice: Notice) -> int:
        """Post a notice. Return the number of its posts, this one included."""
        return self._add(notice, 1)

    def _add(self, notice: Notice, amount: int) -> int:
        if self._store is None:
            return 0
        with contextlib.suppress(RuntimeError):  # the store may be gone with process 0
            return int(self._store.add(f"rasa_theory/{notice.value}", amount))
        return 0

    @property
    def ending(self) -> bool:
        """True if a process has failed in `raise_together` or was interrupted, so that the others may stop."""
        return self.count(Notice.FAILED) + self.count(Notice.INTERRUPTED) > 0

    @property
    def has_spoken(self) -> bool:
        """True if a process has already told the user why all of them stop."""
        return self.count(Notice.SAID) > 0

    def speaks(self) -> bool:
        """Return True in the first process that asks: it alone tells the user why all of them stop."""
        return self._process == 0 if self._store is None else self.post(Notice.SAID) <= 1

    def tell_interrupted(self) -> None:
        """Tell the others that this process was interrupted. They would otherwise take it for dead.

        Process 0 goes on at once, since it alone has files to write. The others stay for a while.
        """
        self.post(Notice.INTERRUPTED)
        if self._process > 0:
            time.sleep(_GRACE)

    def leave(self, status: int) -> None:
        """End this process at once with an exit status. Without a store, return.

        While Python ends in order, threads of torch that wait for a dead process may abort this one (SIGABRT).
        """
        if self._store is None:
            return
        sys.stdout.flush()
        sys.stderr.flush()
        self.post(Notice.LEFT)
        deadline = time.monotonic() + _FAREWELL
        while self._process == 0 and self.count(Notice.LEFT) < self._world_size and time.monotonic() < deadline:
            time.sleep(0.02)  # the store ends with process 0, and the others may still read it
        os._exit(status)

    def missing(self) -> str:
        """Return a sentence on the processes that do not answer within 10 s: the living sign in the store.

        torch's monitored barrier names only late processes. It does not name dead ones, whose connection is closed.
        """
        lost, deadline = [], time.monotonic() + _ROLL_CALL.total_seconds()
        with contextlib.suppress(RuntimeError):
            self._store.set(self._signature(self._process), "here")
        for process in range(self._world_size):
            remaining = max(deadline - time.monotonic(), 0.01)
            try:
                self._store.wait([self._signature(process)], datetime.timedelta(seconds=remaining))
            except RuntimeError:
                lost.append(str(process))
        nouns, verbs = ("processes", "answer") if len(lost) > 1 else ("process", "answers")
        who = f"{nouns} {', '.join(lost)} of {self._world_size} no longer {verbs}"
        return who if lost else "another process has given up"

    @staticmethod
    def _signature(process: int) -> str:
        """The key by which a process answers the roll call."""
        return f"rasa_theory/here/{process}"
