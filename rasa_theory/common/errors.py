"""Exceptions. `InputError` and its subclasses say that the input is wrong, which tells it from a bug."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input, raised where a value enters the library.

    The message is one sentence. It names the input and the expected value, and says how to mend the input. It is a
    ValueError, so that callers can catch either. The commands print the sentence and exit with status 2.

    Attributes:
        parameter: the name of the argument at fault, or None. The commands name the flag of this argument.
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
    """A file that ends too early or cannot be read. The sentence names the file."""


class UnsoundFile(InputError):
    """A file that cannot be read at all. `finding` is the sentence without its advice."""

    def __init__(self, finding: str, advice: str) -> None:
        super().__init__(f"{finding}; {advice}")
        self.finding = finding


class FailedElsewhere(InputError):
    """Bad input in another process. The sentence begins with the number of that process, `process`."""

    def __init__(self, message: str, process: int) -> None:
        super().__init__(message)
        self.process = process


class ProcessLost(RuntimeError):
    """Another process has died or failed, so that the collective work cannot be finished."""
