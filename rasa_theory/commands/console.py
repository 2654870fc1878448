"""The console that all commands share: exit statuses, sentences on standard error, the folder of --out."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from rasa_theory.commands.progress import print_line
from rasa_theory.common import (
    FailedElsewhere,
    InputError,
    ProcessLost,
    keeping_interrupts,
    writable_folder,
)
from rasa_theory.distributed import ALONE, Processes, first_launched, lacks_memory, meeting
from rasa_theory.formats import Exclusion, LeftOut, grouped

_SHOWN = 3

# ---- exit statuses


def exit_status(name: str, action: Callable[[Processes], int], on_no_memory: str, on_loss: str = "") -> int:
    """Run a command: return the status of `action`, 2 for bad input or too little memory, or 130 if interrupted.

    - action: gets the processes that torchrun has started, or this one alone.
    - on_no_memory: advice for the sentence about too little memory.
    - on_loss: appended to the sentence about a lost process; it says which results survive.
    """
    processes = ALONE
    try:
        with keeping_interrupts(), meeting() as processes:
            status = action(processes)
    except (InputError, ProcessLost, MemoryError, RuntimeError, KeyboardInterrupt) as error:
        status = _status_of(error, _Speaker(name, processes), on_no_memory, on_loss)
    if status in (2, 130):
        processes.board.leave(status)
    return status


class _Speaker:
    """Says, in one process for all of them, why a command stops."""

    def __init__(self, name: str, processes: Processes) -> None:
        self.name, self.processes = name, processes

    def say(self, sentence: str) -> int:
        """Print the sentence, unless another process has spoken, and return exit status 2."""
        processes = self.processes
        if not processes.alone:
            _ignore_termination()  # torchrun ends the others once one has ended, which must not cut this short
        if processes.alone:
            if first_launched():  # processes that have not met fail alike, and only the first speaks
                print_line(f"{self.name}: {sentence}", sys.stderr)
        elif processes.board.speaks():
            print_line(f"\n{self.name}: {sentence}", sys.stderr)  # process 0 may be drawing a bar on this line
        return 2


# Of several processes, every one ends up here when one fails: the one at fault with its own error, the others with
# FailedElsewhere, or with ProcessLost where the connection broke first. If each printed its error, a user of 8
# processes would read 8 sentences, most of them about broken connections. So the process that is first to ask speaks
# (`speaks`), and the order of the cases below matters. FailedElsewhere is an InputError that names its
# process already. For ProcessLost the cause is asked for last, and only if nobody has spoken: another process may know
# it better. torch has no exception of its own for too little memory on the CPU, so that a RuntimeError is read; any
# other is a bug and is raised again.
def _status_of(error: BaseException, speaker: _Speaker, on_no_memory: str, on_loss: str) -> int:
    """Return the exit status for the error that ended `action`, after one process has printed it. Raises bugs again."""
    processes = speaker.processes
    where = "" if processes.alone else f"{processes}: "
    if isinstance(error, FailedElsewhere):
        return speaker.say(str(error))
    if isinstance(error, InputError):
        return speaker.say(f"{where}{error}")
    if isinstance(error, ProcessLost):
        _ignore_termination()
        if processes.board.has_spoken:
            return 2
        missing = processes.board.missing()  # takes up to 10 s, in which another process may speak
        return 2 if processes.board.has_spoken else speaker.say(f"{missing}{on_loss}")
    if isinstance(error, KeyboardInterrupt):  # before anything was finished
        if processes.alone or processes.board.speaks():
            print_line("interrupted; nothing was finished", sys.stderr)
        processes.board.tell_interrupted()
        return 130
    if isinstance(error, Exception) and lacks_memory(error):
        return speaker.say(f"{where}there is not enough memory{_wanted(error)}; {on_no_memory}")
    raise error


def _ignore_termination() -> None:
    """Ignore SIGTERM, which torchrun sends to all processes as soon as one of them has ended."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _wanted(error: Exception) -> str:
    """The size of the array that could not be allocated, in parentheses, if the error names it."""
    match = re.search(r"allocate (\d+) bytes", str(error))
    return f" (one array asked for {int(match[1]) / 2**30:.3g} GiB)" if match else ""


@contextlib.contextmanager
def naming_flags(flags: Mapping[str, str]) -> Iterator[None]:
    """Add the flag of the parameter at fault to the sentences of the library.

    `flags` maps parameters to flags where their names differ.
    """
    try:
        yield
    except InputError as error:
        if error.parameter is None:
            raise
        flag = flags.get(error.parameter, error.parameter.replace("_", "-"))
        raise InputError(f"{error} (--{flag})", error.parameter) from None


def _is_same_folder(one: str, other: str) -> bool:
    paths = [os.path.expanduser(path) for path in (one, other)]
    return all(map(os.path.isdir, paths)) and os.path.samefile(*paths)


def say_notes(notes: Sequence[str]) -> None:
    """Print the notes of a catalogue."""
    for note in notes:
        print_line(f"note: {note}", sys.stderr)


def say_left_out(left_out: Sequence[LeftOut], file: str) -> None:
    """Print the first few groups of tensors that are in no stack, and the number of others, which `file` lists.

    It is for commands whose results do not come back to them.
    """
    axes_last = sorted(left_out, key=lambda one: one.kind is Exclusion.AXES)  # biases and norms
    groups = grouped(axes_last)
    for group in groups[:_SHOWN]:
        print_line(f"left out: {group.label}: {group.reason}", sys.stderr)
    if others := sum(len(group.names) for group in groups[_SHOWN:]):
        print_line(f"left out: {others} more, listed by --dry-run and in {file}", sys.stderr)


def say_interrupted(done: int, total: int, unit: str, out: Path | None, goes_on: bool = True) -> None:
    """Say at an interruption how much is finished, whether the folder `out` keeps it, and how to go on."""
    kept = "; --out none keeps nothing" if out is None else f" and kept in {out}/" if done else ""
    again = "goes on from there" if goes_on and done and out is not None else "begins anew"
    print_line(f"interrupted: {done} of {total} {unit} finished{kept}; the same command {again}", sys.stderr)


def memory_size(text: str) -> int:
    """Bytes of 500MB, 2GiB, 1.5 GiB or 4096; raises argparse.ArgumentTypeError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([KMGT]?)(i?)B)?", text, re.IGNORECASE | re.ASCII)
    if match is None or (match[3] and not match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 2GiB, 500MB or 4096B")
    power = " KMGT".index(match[2].upper()) if match[2] else 0
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


# ---- files


@contextlib.contextmanager
def leaving_no_empty_folder(name: str) -> Iterator[None]:
    """Remove the folder of --out if it is new, and the run ends in an error before anything was written there."""
    out = Path(name)
    is_new = not out.exists()
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # it holds something, or is no folder
            if is_new:
                out.rmdir()
        raise


def output_folder(name: str, sources: Iterable[str | None] = ()) -> Path | None:
    """The folder of --out, made if need be; None for `none`.

    A temporary file is opened there at once, so that a long run does not fail at its end. Raises InputError if that
    fails, or if the folder is one of `sources` (None: not given): what is written would be read as a part of it.
    """
    if name == "none":
        return None
    if not name:
        raise InputError("--out '' names no folder; name one, or none to write nothing")
    if (same := next((one for one in sources if one is not None and _is_same_folder(one, name)), None)) is not None:
        raise InputError(f"--out {name} is the source {same} itself; name another folder")
    try:
        return writable_folder(Path(name))
    except InputError as error:
        raise InputError(f"--out {error}") from None
