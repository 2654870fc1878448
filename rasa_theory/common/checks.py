"""Validators of arguments. Each raises InputError with one sentence, and with the name of the parameter."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Collection
from typing import Any

from rasa_theory.common.errors import InputError


def whole_number(name: str, value: Any) -> int:
    """Return `value` as an int. Raises InputError for anything else; True and 2.0 are no whole numbers."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise InputError(f"{name} must be a whole number, got {value!r}", name) from None


def at_least(name: str, value: Any, least: int) -> int:
    """Return `value` as an int. Raises InputError if it is no whole number, or below `least`."""
    number = whole_number(name, value)
    if number < least:
        raise InputError(f"{name} must be at least {least}, got {number}", name)
    return number


def real_number(name: str, value: Any) -> float:
    """Return `value` as a float; it may be of any real type, NumPy's included. Raises InputError for anything else.

    Whole numbers that no float can hold are infinite.
    """
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number:
        raise InputError(f"{name} must be a number, got {value!r}", name)
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def positive(name: str, value: Any) -> float:
    """Return `value`. Raises InputError if it is no number above 0."""
    number = real_number(name, value)
    if not number > 0:
        raise InputError(f"{name} must be positive, got {value}", name)
    return number


def fraction(name: str, value: Any) -> float:
    """Return `value`. Raises InputError if it is no number with 0 <= value < 1."""
    number = real_number(name, value)
    if not 0 <= number < 1:
        raise InputError(f"{name} must be at least 0 and below 1, got {value}", name)
    return number


def one_of(name: str, value: Any, values: Collection[str]) -> None:
    """Raise InputError, with the list of valid values, if `value` is none of `values`."""
    if not isinstance(value, str) or value not in values:
        raise InputError(f"unknown {name} {value!r}; known: {', '.join(values)}", name)
