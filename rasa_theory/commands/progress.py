"""Progress on standard error, and lines of output beside it."""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from typing import IO, Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

_REFRESH_SECONDS = 0.2  # of a bar
_LINE_SECONDS = 30.0  # between lines in a log file


class ProgressBar:
    """Progress of a run: a bar on a terminal, a line now and then in a log file, nothing with `quiet`.

    It is a context manager, and is called with the number of finished steps and the name of the one in hand.

    - total: the number of steps.
    - unit: a word for steps.
    """

    def __init__(self, total: int, unit: str, quiet: bool = False) -> None:
        self._total, self._unit, self._quiet = total, unit, quiet
        console = Console(stderr=True, highlight=False)
        is_terminal = sys.stderr.isatty() and not console.is_dumb_terminal
        self._bar = _bar(console, unit) if is_terminal and not quiet else None
        self._task = None if self._bar is None else self._bar.add_task("", total=total)
        self._started = time.monotonic()
        self._said = self._started if self._bar is None else -math.inf

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *raised: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, doing: str) -> None:
        """Say that `done` steps are finished and that `doing` is in hand, unless something was said just before."""
        now = time.monotonic()
        if self._quiet or now - self._said < (_LINE_SECONDS if self._bar is None else _REFRESH_SECONDS):
            return
        self._said = now
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, description=doing, refresh=True)
        else:
            told = f": {doing}" if doing else ""
            print_line(f"{now - self._started:.0f} s, {done} of {self._total} {self._unit}{told}", sys.stderr)

    def print(self, text: str, file: IO[str]) -> None:
        """Print lines to `file`, which may be the terminal that the bar is on."""
        if self._bar is not None:
            self._bar.stop()
        print_line(text, file)
        if self._bar is not None:
            self._bar.start()


def _bar(console: Console, unit: str) -> Progress:
    """A bar that vanishes at its end. It is drawn when it is told to, without a thread of its own."""
    return Progress(
        BarColumn(bar_width=10),
        TextColumn("{task.completed:.0f} of {task.total:.0f} " + unit, markup=False),
        TimeElapsedColumn(),
        TextColumn("left", markup=False),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
        console=console,
        auto_refresh=False,
        speed_estimate_period=math.inf,  # one step may take minutes
        get_time=time.monotonic,
        transient=True,
        redirect_stdout=False,  # lines for a file must not end on the terminal
        expand=True,
    )


class RowPrinter:
    """Prints the rows of a table as they are finished; `head` comes with the first, since input may be refused before.

    Rows go to standard output, with `as_json` to standard error.
    """

    def __init__(self, head: list[str], as_json: bool) -> None:
        self._head = head
        self._file = sys.stderr if as_json else sys.stdout

    def print(self, lines: list[str], progress: ProgressBar) -> None:
        """Print the lines of a row, if there are any, beside the bar."""
        if lines:
            progress.print("\n".join([*self._head, *lines]), self._file)
            self._head = []


def terminal_width() -> int:
    """The number of columns of the terminal, 80 without one."""
    return shutil.get_terminal_size().columns


def print_line(text: str, file: IO[Any]) -> None:
    """Print lines at once. Where nobody reads on, as in `.. | head`, they and all later ones are dropped.

    They are dropped too where the file cannot be written, since that must not end the run; standard error says so.
    """
    try:
        print(text, file=file, flush=True)
    except OSError as error:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, file.fileno())
        os.close(nowhere)
        if not isinstance(error, BrokenPipeError) and file is not sys.stderr:
            print_line(f"what is printed is lost ({error.strerror}); the run goes on", sys.stderr)
