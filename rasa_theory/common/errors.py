"""Exceptions. `InputError` and its subclasses mean that the input is wrong, so that commands can tell it from a bug."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input: one sentence that says what the input is, what was expected and what to do.

    The library raises it where a value enters. The commands print the sentence and exit with status 2; they name the
    flag of `parameter`, the name of the argument at fault where there is one.
    """

    def __init__(self, message: str, parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter


class NotFinite(InputError):
    """An entry of layer `layer` is infinite or NaN."""

    def __init__(self, message: str, layer: int) -> None:
        super().__init__(message)
        self.layer = layer


class DamagedFile(InputError):
    """A file that ends too early. The sentence names the file."""


class UnsoundFile(InputError):
    """A file that cannot be read at all. `finding` is the sentence without its advice."""

    def __init__(self, finding: str, advice: str) -> None:
        super().__init__(f"{finding}; {advice}")
        self.finding = finding


class FailedElsewhere(InputError):
    """Bad input that another process has met. The sentence begins with the number of that process, `process`."""

    def __init__(self, message: str, process: int) -> None:
        super().__init__(message)
        self.process = process


class ProcessLost(RuntimeError):
    """Another process has died or has failed on its own, so that the collective work cannot be finished."""
