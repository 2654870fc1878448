"""The options of the solver, validated where they are built."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from rasa_theory.common import InputError, at_least, fraction, one_of, real_number
from rasa_theory.problem import SPECTRA, RasaFactors
from rasa_theory.solvers.search import EFFORTS
from rasa_theory.solvers.starts import STARTS
from rasa_theory.solvers.sweeps import SWEEPS

_SEEDS = 2**62  # torch takes less than 2^63, and the race and the attempts count on from the seed


@dataclass(frozen=True)
class SolverOptions:
    """Options of `solve_rasa` and `solve_path`.

    Arguments:
        start: "best" for a search with many starts of all kinds. Or the name of one start, or RasaFactors in units of
            the input. "common" and "pencil" need conditions on the stack. Where they do not hold, "allocation" takes
            their place, and the solution says so.
        effort: length of the search, "quick", "default" or "thorough". A thorough search goes on until nothing has
            changed for as long as it took to get there.
        sweep: "core" (two passes over M, each with many sweeps on a small core), "joint" or "paper".
        max_sweeps: the largest number of sweeps for the answer, counted from the result of the search.
        rtol: the solver stops when one sweep lowers the squared error by less than this share of it. 0: it never does.
        seed: seed of the random starts, pencils and moves, from 0 to 2^62 - 1.
        max_cancellation: the bound on terms. No pool term and no B~_i A~_i exceeds this times the norm of its layer (or
            the rounding level of the stack, where that is larger). So the problem has a minimum. Without a bound, terms
            often grow and cancel for ever, and gain ever less. Terms of a named start, or of factors as the start, may
            be larger, and then they are the bound. `math.inf` is for the infimum. "core" sweeps go on inside the bound,
            the others stop there. Rounding the factors to half precision adds an error of about u^2 times the squared
            norms of all terms, u = 2^-11 for float16 and 2^-9 for bfloat16.
        spectra: "exact", from SVDs of the layers, "leading", from leading directions by products with M, or "auto": as
            `LayerStack.with_spectra` chooses.

    Raises:
        InputError: an option is of the wrong type, unknown or out of range; the message names it.
    """

    start: str | RasaFactors = "best"
    effort: str = "default"
    sweep: str = "core"
    max_sweeps: int = 100
    rtol: float = 1e-6
    seed: int = 0
    max_cancellation: float = 8.0
    spectra: str = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.start, RasaFactors) and self.start not in ("best", *STARTS):
            name = repr(self.start) if isinstance(self.start, str) else f"of type {type(self.start).__name__}"
            raise InputError(f"unknown start {name}; known: {', '.join(('best', *STARTS))}, or RasaFactors", "start")
        one_of("effort", self.effort, EFFORTS)
        one_of("sweep", self.sweep, SWEEPS)
        one_of("spectra", self.spectra, SPECTRA)
        object.__setattr__(self, "max_sweeps", at_least("max_sweeps", self.max_sweeps, 1))
        object.__setattr__(self, "seed", at_least("seed", self.seed, 0))
        object.__setattr__(self, "rtol", fraction("rtol", self.rtol))
        object.__setattr__(self, "max_cancellation", real_number("max_cancellation", self.max_cancellation))
        if not self.max_cancellation >= 1:
            raise InputError(f"max_cancellation must be at least 1, got {self.max_cancellation}", "max_cancellation")
        if self.seed >= _SEEDS:
            raise InputError(f"seed must be below 2^62, got {self.seed}", "seed")

    def plain(self) -> dict[str, Any]:
        """The options as plain data for JSON, which has no infinity; `start` must be the name of one."""
        options = dataclasses.asdict(self)
        if math.isinf(self.max_cancellation):
            options["max_cancellation"] = "inf"
        return options


def is_at_most_lora(start: str | RasaFactors) -> bool:
    """True if solutions from this start are promised an error of at most e_lora, up to rounding."""
    if isinstance(start, RasaFactors):
        return False
    return start == "best" or STARTS[start].is_at_most_lora
