"""Progress: a bar that fits a terminal, a line now and then in a log file, and lines of output beside both."""

from __future__ import annotations

import io
import re
import sys

import pytest

from rasa_theory.commands import progress as module
from rasa_theory.commands.progress import ProgressBar, print_line

DOING = "model.layers.*.self_attn.q_proj.weight[red], k = 1: searching, step 2 of 5, lowest error 0.9951 e_lora"


class Terminal(io.StringIO):
    """What is printed on a terminal, control codes included."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that progress sees, in its last entry."""
    times = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: times[-1])
    return times


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_a_bar_fits_the_terminal_and_vanishes(
    columns: int, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    with ProgressBar(44, "tasks", quiet=False) as show:
        clock.append(1.0)
        show(12, DOING)
        drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()).split("\r")[-1]
        assert "12 of 44 tasks" in drawn
        assert "model.layers.*.self_attn"[: max(columns - 70, 3)] in drawn
        assert ("[red]" in drawn) == (columns == 200), "names are no markup"
        assert max(map(len, drawn.splitlines())) <= columns
    assert screen.getvalue().endswith("\x1b[1A\x1b[2K"), "the line is erased"


def test_the_time_left_follows_from_all_steps_however_long_they_are(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    with ProgressBar(44, "tasks", quiet=False) as show:
        for done, second in enumerate((0.0, 50.0, 100.0, 170.0)):
            clock.append(second)
            show(done, "")
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert "3 of 44 tasks 0:02:50 left 0:41:00" in drawn, "41 steps of a minute"


def test_lines_for_a_file_are_not_on_the_terminal(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    screen, file = Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with ProgressBar(2, "tasks", quiet=False) as show:
        show.print("query  1  64.12 %", file)
        clock.append(1.0)
        show(1, "key")
    assert file.getvalue() == "query  1  64.12 %\n"
    assert "query" not in screen.getvalue()
    assert "key" in screen.getvalue()


@pytest.mark.parametrize("force", [False, True])
def test_a_log_file_has_plain_lines_with_half_a_minute_between_them(
    clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    if force:
        monkeypatch.setenv("FORCE_COLOR", "1")
    with ProgressBar(44, "tasks", quiet=False) as show:
        for second in range(100):
            clock.append(float(second))
            show(second // 10, f"stack {second}")
    assert capsys.readouterr().err.splitlines() == [
        "30 s, 3 of 44 tasks: stack 30",
        "60 s, 6 of 44 tasks: stack 60",
        "90 s, 9 of 44 tasks: stack 90",
    ]


def test_quiet_says_nothing_but_prints_what_it_is_told_to(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with ProgressBar(2, "tasks", quiet=True) as show:
        clock.append(1000.0)
        show(1, "key")
        show.print("a row", sys.stdout)
    assert capsys.readouterr() == ("a row\n", "")


def test_what_nobody_reads_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        print_line("one", pipe)
        print_line("two", pipe)
