"""The parser of the commands' flags. It imports nothing that takes long, so that a help is there at once."""

from __future__ import annotations

import argparse
import textwrap
from typing import Any, NoReturn

from rasa_theory.common import InputError, __version__


class _Help(argparse.HelpFormatter):
    """A formatter that wraps text, but no names with hyphens, and no lines that begin with a space: commands."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        wrap = super()._fill_text
        return "\n".join(line if line.startswith(" ") else wrap(line, width, indent) for line in text.split("\n"))


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


class Parser(argparse.ArgumentParser):
    """A parser without abbreviated flags, which raises InputError where argparse would end the process.

    Lines of the description and the epilog that begin with a space are not wrapped.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Help, **options)
        self.register("type", int, _whole_number)
        self.register("type", float, _number)
        self.add_argument("--version", action="version", version=f"rasa_theory {__version__}")

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see --help)")
