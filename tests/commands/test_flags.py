"""The examples at the end of --help: whole on their lines, and commands that the commands take."""

from __future__ import annotations

import importlib
import shlex

import pytest

from rasa_theory.commands import flags
from rasa_theory.verification import FAMILIES

EVERY = [(command, line) for command, examples in flags.EXAMPLES.items() for line in examples.values()]


@pytest.mark.parametrize("command", flags.EXAMPLES)
@pytest.mark.parametrize("columns", ["50", "100"])
def test_help_ends_with_examples_to_copy(
    command: str, columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"rasa_theory.commands.{command}").main(["--help"])
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    shown = lines[lines.index("examples:") + 1 :]
    examples = flags.EXAMPLES[command]
    assert 3 <= len(examples) <= 4
    assert shown[::2] == [f"  # {what}" for what in examples]
    assert shown[1::2] == [f"  rasa {command} {line}" for line in examples.values()]
    before = lines[: lines.index("examples:") - 1]
    text = before[len(before) - before[::-1].index("") :]
    assert len(text) >= (2 if columns == "50" else 1)
    assert max(map(len, text)) <= int(columns), "it is wrapped still"


@pytest.mark.parametrize(("command", "line"), EVERY, ids=[f"{command} {line}" for command, line in EVERY])
def test_every_example_is_taken(command: str, line: str) -> None:
    args = importlib.import_module(f"rasa_theory.commands.{command}").parse(shlex.split(line))
    if command == "verify":
        assert set((args.families or "planted").split(",")) <= FAMILIES.keys()
    else:
        flags.check_sources(args)
        if command != "inspect":
            flags.solver_options(args)
