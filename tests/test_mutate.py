"""The table of mutations fits the code, and the command tells what is killed from what is not."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import mutate
from tests.mutate import Mutation, Outcome, Run

MODULE = "def double(x):\n    return 2 * x\n\n\ndef half(x):\n    return x / 2\n"
TESTS = """import time

from rasa_theory.numbers import double, half


def test_double():
    assert double(3) == 6


def test_half():
    if half(4) != 2:
        time.sleep(60)


def test_nothing():
    pass


def test_red():
    assert double(3) == 7
"""


def entry(what: str, old: str, new: str, test: str, more: str = "") -> str:
    file, node = "rasa_theory/numbers.py", f"tests/test_numbers.py::{test}"
    return f"[[mutation]]\nwhat = '{what}'\nfile = '{file}'\nold = '{old}'\nnew = '{new}'\ntest = '{node}'\n{more}\n"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project of one module, with the tool in it."""
    for folder in ("rasa_theory", "tests"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").touch()
    shutil.copy(mutate.__file__, tmp_path / "tests")
    (tmp_path / "rasa_theory" / "numbers.py").write_text(MODULE)
    (tmp_path / "tests" / "test_numbers.py").write_text(TESTS)
    (tmp_path / "pyproject.toml").touch()
    return tmp_path


def run(project: Path, table: str, *arguments: str) -> tuple[int, str, str]:
    (project / "tests" / "mutations.toml").write_text(table)
    command = [sys.executable, "-m", "tests.mutate", *arguments]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, done.stdout, done.stderr


def test_every_mutation_fits_the_code_and_names_a_test() -> None:
    mutations = mutate.read_table()
    assert len(mutations) > 200
    assert {m.what: found for m in mutations if (found := mutate.faults(mutate.ROOT, m))} == {}


@pytest.mark.slow
def test_killed_and_not_are_told_apart_in_a_copy(project: Path) -> None:
    table = (
        entry("killed", "2 * x", "3 * x", "test_double")
        + entry("survived", "2 * x", "4 * x", "test_nothing")
        + entry("red", "2 * x", "5 * x", "test_red")
        + entry("no name", "2 * x", "2 * y", "test_double")
        + entry("stale", "7 * x", "2", "test_double")
        + entry("hangs", "x / 2", "x", "test_half")
    )
    status, out, _ = run(project, table, "--patience", "8")
    for outcome, what in (
        ("KILLED", "killed"), ("SURVIVED", "survived"), ("NO BASELINE", "red"), ("INVALID", "no name"),
        ("STALE", "stale"), ("TIMEOUT", "hangs"),
    ):  # fmt: skip
        assert any(line.startswith(outcome) and f": {what}" in line for line in out.splitlines()), (outcome, out)
    assert status == 1
    assert "6 mutations, 1 killed" in out
    assert (project / "rasa_theory" / "numbers.py").read_text() == MODULE


def test_the_project_itself_stays_as_it_is(project: Path) -> None:
    status, out, _ = run(project, entry("killed", "2 * x", "3 * x", "test_double"))
    assert (status, "1 mutations, 1 killed" in out) == (0, True)
    assert (project / "rasa_theory" / "numbers.py").read_text() == MODULE
    assert not list(project.rglob("__pycache__/numbers*"))


def test_the_check_runs_nothing(project: Path) -> None:
    table = entry("good", "2 * x", "3 * x", "test_double") + entry("gone", "x / 2", "x", "test_gone")
    status, out, _ = run(project, table, "--check")
    assert status == 1
    assert "no test test_gone in tests/test_numbers.py" in out
    assert out.endswith("2 mutations, 1 faults\n")
    assert run(project, table, "--check", "--only", "good")[0] == 0


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ("[[mutation]]\nwhat = 'x'\n", "lacks ['file', 'new', 'old', 'test']"),
        (entry("x", "a", "b", "t", "colour = 1"), "unknown ['colour']"),
        (2 * entry("x", "a", "b", "t"), "entries of the same name"),
        ("nonsense", "mutations.toml"),
        ("", "no entry matches"),
    ],
)
def test_a_table_that_is_wrong_is_exit_status_2(project: Path, table: str, sentence: str) -> None:
    status, _, err = run(project, table)
    assert status == 2
    assert sentence in err


def test_a_hang_counts_only_where_the_table_says_so() -> None:
    hung = Run(None, (), "", 1.0)
    patient, other = (Mutation("", "", "", "", "", timeout) for timeout in (True, False))
    assert mutate.judged(patient, hung)[0] is Outcome.KILLED
    assert mutate.judged(other, hung)[0] is Outcome.TIMEOUT
    assert mutate.judged(other, Run(4, (), "", 1.0))[0] is Outcome.BROKEN
