"""The one exception that means "the input is wrong", so that the commands can tell it from a bug."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input: one sentence that says what was found, what was expected and what to do.

    The library raises it where a value enters; the commands print it and exit with status 2.
    """


class NotFinite(InputError):
    """An entry of layer `layer` is infinite or NaN."""

    def __init__(self, message: str, layer: int) -> None:
        super().__init__(message)
        self.layer = layer


class DamagedFile(InputError):
    """A file that ends too early; the sentence names it."""


class UnsoundFile(InputError):
    """A file of which nothing can be read; `finding` is the sentence without its advice."""

    def __init__(self, finding: str, advice: str) -> None:
        super().__init__(f"{finding}; {advice}")
        self.finding = finding


class FailedElsewhere(InputError):
    """The same bad input as told by another process, `process`, whose name the sentence begins with."""

    def __init__(self, message: str, process: int) -> None:
        super().__init__(message)
        self.process = process


class ProcessLost(RuntimeError):
    """Another process has died, or has failed on its own: what all have begun together cannot be finished."""
