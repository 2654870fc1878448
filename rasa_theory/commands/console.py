"""What the commands share: arguments, exit statuses, progress on standard error, files written whole or not at all."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rasa_theory.common import FailedElsewhere, InputError, ProcessLost, __version__, writable_folder
from rasa_theory.distributed import ALONE, Processes, lacks_memory, launched, meeting
from rasa_theory.formats import Exclusion, LeftOut

_REFRESH_SECONDS = 0.2 if sys.stderr.isatty() else 10.0  # a log file needs no more
_SHOWN = 3

# ---- arguments and exit statuses


class _Help(argparse.HelpFormatter):
    """Wraps text, but for lines that begin with a space: commands to copy."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        wrap = super()._fill_text
        return "\n".join(line if line.startswith(" ") else wrap(line, width, indent) for line in text.split("\n"))


class Parser(argparse.ArgumentParser):
    """Takes no abbreviated flags, and raises InputError where argparse would end the process.

    Lines of the description and the epilog that begin with a space stay as they are.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Help, **options)
        self.add_argument("--version", action="version", version=f"rasa_theory {__version__}")

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see --help)")


def exit_status(name: str, action: Callable[[Processes], int], on_no_memory: str, kept: str = "") -> int:
    """What `action` returns, or 2 with one sentence for bad input and too little memory, or 130 if interrupted.

    `action` gets the processes that torchrun has started, or this one alone. Of several, one alone says why all stop,
    and which process it is because of. `on_no_memory` says what the user may do where memory does not suffice, `kept`
    what a run leaves behind that a process is lost to.
    """
    met = [ALONE]
    status = _status(name, action, met, on_no_memory, kept)
    if status in (2, 130):
        met[0].board.leave(status)
    return status


def _status(name: str, action: Callable[[Processes], int], met: list[Processes], on_no_memory: str, kept: str) -> int:
    """The same; `met[0]` becomes the processes that it was with."""
    processes = ALONE

    def say(sentence: str) -> int:
        if not processes.alone:  # what torchrun sends when another process has ended is not to cut this short
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if processes.alone:
            if not launched() or os.environ.get("RANK") == "0":  # they have not met, and all say the same
                print(f"{name}: {sentence}", file=sys.stderr)
        elif processes.board.speaks():
            print(f"\n{name}: {sentence}", file=sys.stderr)  # process 0 may be drawing a bar on this line
        return 2

    try:
        with meeting() as processes:
            met[0] = processes
            status = action(processes)
            sys.stdout.flush()
        return status
    except FailedElsewhere as error:
        return say(str(error))
    except InputError as error:
        return say(str(error) if processes.alone else f"{processes}: {error}")
    except ProcessLost:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which comes when one has gone
        if processes.board.has_spoken:
            return 2
        missing = processes.board.missing()
        return 2 if processes.board.has_spoken else say(f"{missing}{kept}")
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        where = "" if processes.alone else f"{processes}: "
        return say(f"{where}there is not enough memory{_wanted(error)}; {on_no_memory}")
    except BrokenPipeError:  # nobody reads on, as in `.. | head`; what is to be written to files has been
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:  # before anything was finished
        if processes.alone or processes.board.speaks():
            print("interrupted", file=sys.stderr)
        processes.board.tell_interrupted()
        return 130


def _wanted(error: Exception) -> str:
    found = re.search(r"allocate (\d+) bytes", str(error))
    return f" (one array asked for {int(found[1]) / 2**30:.3g} GiB)" if found else ""


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


def say_left_out(left_out: Sequence[LeftOut], file: str) -> None:
    """What of the source is in no stack, on standard error: the first few, and how many in all; `file` lists them."""
    for name, why in sorted(left_out, key=lambda one: one.kind is Exclusion.AXES)[:_SHOWN]:  # biases and norms last
        print(f"left out: {name}: {why}", file=sys.stderr)
    if len(left_out) > _SHOWN:
        print(f"left out: {len(left_out) - _SHOWN} more, listed by --dry-run and in {file}", file=sys.stderr)


def memory_size(text: str) -> int:
    """Bytes of 500MB, 2GiB, 1.5 GiB or 4096; raises argparse.ArgumentTypeError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([KMGT]?)(i?)B)?", text, re.IGNORECASE | re.ASCII)
    if found is None or (found[3] and not found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 2GiB, 500MB or 4096B")
    power = " KMGT".index(found[2].upper()) if found[2] else 0
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


# ---- progress


@contextlib.contextmanager
def progress_bar(total: int, unit: str, quiet: bool) -> Iterator[Callable[[int, str], None]]:
    """Progress on standard error: yields show(done, what is being done); full when all went well."""
    from tqdm import tqdm  # the library, which writes files too, needs none

    form = "{percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} " + unit + " [{elapsed}<{remaining}] {desc}"
    with tqdm(
        total=total,
        disable=quiet,
        file=sys.stderr,
        bar_format=form,
        dynamic_ncols=True,
        leave=False,
        mininterval=_REFRESH_SECONDS,
    ) as bar:
        shown = 0.0

        def show(done: int, doing: str) -> None:
            nonlocal shown
            bar.set_description_str(doing, refresh=False)
            bar.update(done - bar.n)
            if time.monotonic() - shown > _REFRESH_SECONDS:
                bar.refresh()
                shown = time.monotonic()

        yield show
        bar.update(total - bar.n)


# ---- files


def output_folder(name: str) -> Path | None:
    """The folder of --out, None for `none`, made if need be. Raises InputError if it cannot be written.

    A file without a name is opened there, so that a long run does not fail at its end.
    """
    if name == "none":
        return None
    if not name:
        raise InputError("--out '' names no folder; name one, or none to write nothing")
    try:
        return writable_folder(Path(name))
    except InputError as error:
        raise InputError(f"--out {error}") from None
