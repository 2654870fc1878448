"""How the command of an experiment ends on bad input."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

from rasa_theory.common import InputError

Main = Callable[..., None]


def refuses_bad_input(main: Main) -> Main:
    """Decorate the `main` of a command: an InputError becomes its sentence on standard error and exit status 2."""

    @functools.wraps(main)
    def command(arguments: list[str] | None = None) -> None:
        try:
            main(arguments)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None

    return command
