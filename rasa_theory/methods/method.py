"""An entry of METHODS, and the checks and searches that choose the settings of a configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rasa_theory.common import InputError
from rasa_theory.methods.fit import Fit, Settings
from rasa_theory.problem import LayerStack

EFFORT = "quick"
"""The effort of `solve_rasa` within a method: a few starts and no moves, as all other methods have."""


@dataclass(frozen=True)
class Method:
    """A way to share parameters between layers: how it is solved, and what it costs.

    Attributes:
        name: the key in `METHODS`.
        title: the name in tables and figures.
        solve: (stack, **settings) -> Fit.
        parameters: (layers, shape, **settings) -> the number of parameters stored for all layers of shape (b, a).
        configurations: (stack, limit) -> the settings to try within `limit` parameters. Each is as large as fits along
            its own direction, such as more private or more shared ranks. The list is empty if not even the smallest
            fits.
    """

    name: str
    title: str
    solve: Callable[..., Fit]
    parameters: Callable[..., int]
    configurations: Callable[[LayerStack, int], list[Settings]]


def at_most(name: str, value: int, most: int, stack: LayerStack) -> int:
    """`value` itself; raises InputError, naming `name` and the stack, if it is above `most`."""
    if value > most:
        b, a = stack.shape
        raise InputError(
            f"{name} {value} exceeds {most}, all that can be of use to stack {stack.name!r} ({stack.layers} layers of "
            f"{b} x {a}); lower it"
        )
    return value


def largest(count: Callable[[int], int], limit: int, most: int) -> int:
    """The largest n in 1 .. most with count(n) <= limit, for a rising `count`; 0 if there is none. A bisection."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count(middle) <= limit else (low, middle - 1)
    return low
