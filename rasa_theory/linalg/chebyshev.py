"""Solve lambda^p T_k(2 lambda / beta - 1) = value for lambda, T_k the Chebyshev polynomial."""

from __future__ import annotations

import math

# Bisection for log(lambda / beta) returns the upper end, which is never too small.
_BISECTIONS = 60  # 2^-60 of an interval is below the spacing of floating-point numbers
_LARGEST = 700.0  # of log(lambda / beta): exp(700) is near the end of the range
_ROUNDED_UP = (
    1e-12  # relative: far above the rounding of the logarithms and exponentials, far below the accuracy that tau needs
)


def largest_argument(k: int, beta: float, value: float, power: float) -> float:
    """The largest lambda with lambda^power T_k(2 lambda / beta - 1) <= `value`, or beta if that is larger."""
    if math.isnan(value):
        return math.inf
    low, high = 0.0, math.log(value) / power - math.log(beta) if value > 0 else 0.0  # of log(lambda / beta): T_k >= 1
    if not low < high <= _LARGEST:
        return beta if high <= low else math.inf
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        lengthened = middle + math.log(beta)
        if power * lengthened + _log_chebyshev(k, 2 * math.exp(middle) - 1) > math.log(value):
            high = middle
        else:
            low = middle
    return beta * math.exp(high) * (1 + _ROUNDED_UP)


def _log_chebyshev(k: int, x: float) -> float:
    """log T_k(x), x >= 1."""
    y = k * math.acosh(max(x, 1.0))
    return y + math.log1p(math.exp(-2 * y)) - math.log(2)
