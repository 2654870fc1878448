"""Interruptions that arrive as another error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def keeping_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt in place of an error that one has caused.

    Code that is interrupted may answer with an error of its own: a compiled module that is being imported raises
    ImportError, and the interruption is only that error's cause.
    """
    try:
        yield
    except Exception as error:
        if _interrupted(error):
            raise KeyboardInterrupt from error
        raise


def _interrupted(error: BaseException) -> bool:
    """Return whether a KeyboardInterrupt is the cause of an error, of its cause, and so on."""
    cause = error.__cause__
    return cause is not None and (isinstance(cause, KeyboardInterrupt) or _interrupted(cause))
