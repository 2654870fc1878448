"""The settings of an extraction."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch

from rasa_theory.bounds import CERTIFICATES, RankTarget
from rasa_theory.common import InputError, one_of
from rasa_theory.problem import Layered, RankBudget, takes_leading
from rasa_theory.solvers import SolverOptions

FORMATS = ("lora", "lora-exact-rasa", "rasa", "diff")
STORED = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

LARGEST_EXACT = 1024  # largest min(b, a) at which a LoRA without a pool still takes exact SVDs, with their full spectra


@dataclass(frozen=True)
class ExtractSettings:
    """Settings of an extraction: LoRA of rank r and RaSA(r, k), written in a `format` of `FORMATS` as `dtype`.

    k = 0 solves no RaSA. k = None takes the best of 1, 2, 4, .., r for each stack. With a `target`,
    `bounds.allocate_ranks` chooses the ranks layer by layer; rank must then be None and k 0. Raises InputError for
    any other combination.
    """

    rank: int | None
    k: int | None
    format: str = "lora"
    dtype: str = "float32"
    certificate: str = "closed"
    solver: SolverOptions = field(default_factory=SolverOptions)
    target: RankTarget | None = None

    def __post_init__(self) -> None:
        one_of("format", self.format, FORMATS)
        one_of("dtype", self.dtype, STORED)
        one_of("certificate", self.certificate, CERTIFICATES)
        if self.target is not None:
            if self.rank is not None or self.k != 0:
                raise InputError(
                    "rank is auto, so that layers differ in rank, and a pool needs equal ones: k must be 0",
                    "rank",
                )
        elif self.rank is None:
            raise InputError("rank auto needs a target: an energy, an error or a number of parameters", "rank")
        else:
            RankBudget(self.rank, self.k or 0)
        if self.format in ("lora-exact-rasa", "rasa") and self.k == 0:
            raise InputError(f"k must be at least 1 for format {self.format}, got 0; format lora has no pool", "k")
        if self.format == "rasa" and self.k is None:
            raise InputError("k cannot be auto for format rasa, whose configuration has one k for all modules", "k")

    def exact(self, stack: Layered) -> bool:
        """True if the layers of the stack take exact SVDs.

        Without a pool they do up to min(b, a) = 1024. With one, see `LayerStack.with_spectra`.
        """
        if self.k == 0:
            return min(stack.shape) <= LARGEST_EXACT
        return not takes_leading(self.solver.spectra, stack, self.rank or 1)

    def plain(self) -> dict[str, Any]:
        """Return the settings as plain data, for the comparison with an earlier run."""
        return dataclasses.asdict(self) | {"solver": self.solver.plain()}
