"""The parser of the commands' flags. It imports nothing that takes long, so that a help is there at once."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from rasa_theory.common import InputError, __version__


class _Help(argparse.HelpFormatter):
    """A formatter that wraps text, except lines that begin with a space: they are commands to copy."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        wrap = super()._fill_text
        return "\n".join(line if line.startswith(" ") else wrap(line, width, indent) for line in text.split("\n"))


class Parser(argparse.ArgumentParser):
    """A parser without abbreviated flags, which raises InputError where argparse would end the process.

    Lines of the description and the epilog that begin with a space are not wrapped.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Help, **options)
        self.add_argument("--version", action="version", version=f"rasa_theory {__version__}")

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see --help)")
