"""Checks of what enters, each with one sentence that names the value."""

from __future__ import annotations

import operator
from typing import Any

from rasa_theory.common.errors import InputError


def whole_number(name: str, value: Any) -> int:
    """`value` as an int; raises InputError, naming `name`, if it is none (True and 2.0 are none)."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise InputError(f"{name} must be a whole number, got {value!r}") from None


def at_least(name: str, value: Any, least: int) -> int:
    """`value` as an int; raises InputError, naming `name`, if it is no whole number or below `least`."""
    number = whole_number(name, value)
    if number < least:
        raise InputError(f"{name} must be at least {least}, got {number}")
    return number


def one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    """Raises InputError, naming `name` and what is known, if `value` is none of `known`."""
    if value not in known:
        raise InputError(f"unknown {name} {value!r}; known: {', '.join(known)}")
