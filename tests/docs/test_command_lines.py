"""Every command line of the README and the pages is taken by the parser of its command. Nothing is run."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from rasa_theory.commands.main import COMMANDS
from rasa_theory.common import InputError
from tests.docs.test_pages import PAGES, ROOT, text

BLOCK = re.compile(r"^```[^\n]*\n(.*?)^```|((?:^    \S[^\n]*\n)+)", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`((?:rasa (?:" + "|".join(COMMANDS) + r")|python -m rasa_theory\b)[^`]*)`")
CALL = re.compile(r"(?:^|/|-m (?:-- )?)(?:rasa_theory[. ]|rasa )(" + "|".join(COMMANDS) + r")\b(.*)")


def calls(markdown: str) -> list[tuple[str, str]]:
    """The calls in blocks of code and in backquotes, as pairs: the command, and its flags."""
    blocks = [fenced or indented for fenced, indented in BLOCK.findall(markdown)]
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    inline = [code for code in INLINE.findall(markdown) if " --" in code]
    steps = [step.strip() for line in [*lines, *inline] for step in line.split("&&")]
    return [match.groups() for step in steps if (match := CALL.search(step)) and not step.startswith("#")]


def refusal(command: str, words: str) -> str | None:
    """The sentence with which the command refuses the words; None if it takes them."""
    try:
        importlib.import_module(f"rasa_theory.commands.{command}").parse(shlex.split(words, comments=True))
    except InputError as error:
        return str(error)
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_command_line_of_a_page_is_taken(page: Path) -> None:
    refused = [(call, sentence) for call in calls(text(page)) if (sentence := refusal(*call)) is not None]
    assert refused == []


def test_command_lines_are_recognised_and_wrong_ones_are_noticed() -> None:
    markdown = """
`rasa verify --seed 0`, and `rasa extract` by its name alone, and
```
python3 -m venv .venv && .venv/bin/python -m rasa_theory.reconstruct --rank 8 --k 1   # two minutes
torchrun --nproc-per-node 8 -m -- rasa_theory.reconstruct --ranks 8
rasa = solve(1)
```

    rasa inspect --modules '*a b*' \\
        --error 0.1
"""
    found = calls(markdown)
    assert [command for command, _ in found] == ["reconstruct", "reconstruct", "inspect", "verify"]
    assert [refusal(*call) for call in found] == [None, "unrecognized arguments: --ranks 8 (see --help)", None, None]
    assert sum(len(calls(text(page))) for page in PAGES) > 20
