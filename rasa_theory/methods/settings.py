"""The settings of a configuration: checked where they enter, and the largest ones that fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rasa_theory.common import InputError
from rasa_theory.problem import LayerStack

Settings = Mapping[str, int | str]


def at_most(name: str, value: int, most: int, stack: LayerStack) -> None:
    """Raises InputError, naming `name` and the stack, if `value` is above `most`."""
    if value > most:
        b, a = stack.shape
        raise InputError(
            f"{name} {value} exceeds {most}, all that can be of use to stack {stack.name!r} ({stack.layers} layers of "
            f"{b} x {a}); lower it"
        )


def largest(count: Callable[[int], int], limit: int, most: int) -> int:
    """The largest n <= most with count(n) <= limit, count rising; 0 if there is none from 1 on."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count(middle) <= limit else (low, middle - 1)
    return low
