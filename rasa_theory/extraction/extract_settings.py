"""The settings of an extraction."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch

from rasa_theory.bounds import CERTIFICATES, RankTarget
from rasa_theory.common import InputError, one_of
from rasa_theory.formats import LAYOUTS
from rasa_theory.problem import Layered, RankBudget, takes_leading
from rasa_theory.solvers import SolverOptions

FORMATS = ("lora", "lora-exact-rasa", "rasa", "kohya", "dense", "diff")
POOLED = ("lora-exact-rasa", "rasa")  # the formats that hold RaSA's pool
DENSE = ("dense", "diff")  # the formats without factors
RANKS = ("one", "own")
STORED = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

LARGEST_EXACT = 1024  # largest min(b, a) at which a LoRA without a pool still takes exact SVDs, with their full spectra


@dataclass(frozen=True)
class ExtractSettings:
    """Settings of an extraction: LoRA of rank r and RaSA(r, k), written in a format.

    Arguments:
        rank: r. None with a `target`, which chooses the ranks layer by layer. Format "diff" has no ranks.
        k: shared ranks of a layer, 0 with a `target`. 0 solves no RaSA. None takes the best of 1, 2, 4, .., r for each
            stack.
        format: the format of the files, one of `FORMATS`.
        dtype: the dtype of the files, "float32", "float16" or "bfloat16".
        certificate: floors up to this kind, "closed", "dual" or "two-sided", as for `lower_bound`.
        solver: options of the solver.
        target: the error, energy or number of parameters that the ranks of all layers have to reach.
        ranks: "one" pads all factors of a LoRA with zeros to the largest rank, "own" keeps the rank of each module.
        layout: the authors' layout of format "rasa", one of `LAYOUTS`.
        prefix: the beginning of the keys of format "kohya".
        save_modules: save embeddings, output layers and norms whole.

    Raises:
        InputError: a setting is unknown, or two of them contradict each other.
    """

    rank: int | None
    k: int | None
    format: str = "lora"
    dtype: str = "float32"
    certificate: str = "closed"
    solver: SolverOptions = field(default_factory=SolverOptions)
    target: RankTarget | None = None
    ranks: str = "one"
    layout: str = LAYOUTS[0]
    prefix: str = ""
    save_modules: bool = False

    def __post_init__(self) -> None:
        one_of("format", self.format, FORMATS)
        one_of("dtype", self.dtype, STORED)
        one_of("certificate", self.certificate, CERTIFICATES)
        one_of("ranks", self.ranks, RANKS)
        one_of("layout", self.layout, LAYOUTS)
        if self.target is not None:
            if self.rank is not None or self.k != 0:
                raise InputError(
                    "rank auto gives layers different ranks, and a pool needs equal ones: give a number, or k = 0",
                    "rank",
                )
        elif self.rank is None:
            raise InputError("rank auto needs a target: an energy, an error or a number of parameters", "rank")
        else:
            RankBudget(self.rank, self.k or 0)
        if self.is_pooled and self.k == 0:
            raise InputError(f"k must be at least 1 for format {self.format}, got 0; format lora has no pool", "k")
        if self.format == "diff" and self.k != 0:
            raise InputError("k must be 0 for format diff, which has no ranks", "k")
        if self.save_modules and self.format not in ("lora", "lora-exact-rasa"):
            raise InputError(
                f"format {self.format} has no modules_to_save; write lora or lora-exact-rasa", "save_modules"
            )
        if self.format == "rasa" and self.k is None:
            raise InputError("k cannot be auto for format rasa, whose configuration has one k for all modules", "k")

    @property
    def is_pooled(self) -> bool:
        """True if the file holds RaSA's pool; of other formats, k concerns the report alone."""
        return self.format in POOLED

    @property
    def is_padded(self) -> bool:
        """True if all factors in the file are padded with zeros to one rank."""
        return self.ranks == "one" and self.format in ("lora", "lora-exact-rasa", "kohya")

    def budget(self, shape: tuple[int, int]) -> RankBudget:
        """The ranks of a stack of matrices (b, a), without a target: r, at most min(b, a), which holds them whole.

        The private rank q = r - k is the same for all stacks as far as it fits, so that one configuration describes
        them. With k None the shared rank is 0 here.
        """
        r = self.rank or 1
        narrow = min(r, *shape)
        return RankBudget(narrow, max((self.k or 0) - (r - narrow), 0))

    def written_rank(self, shape: tuple[int, int], layers: int) -> int:
        """The rank of the factors in the file at most: q + L k of a LoRA that is RaSA's, r of others."""
        if self.rank is None:
            return min(shape)
        budget = self.budget(shape)
        if self.format != "lora-exact-rasa":
            return budget.rank
        if self.k is None:
            return budget.rank * layers
        return budget.private_rank + budget.pool_rank(layers)

    def exact(self, stack: Layered) -> bool:
        """True if the layers of the stack take exact SVDs.

        Without a pool they do up to min(b, a) = 1024. With one, see `LayerStack.with_spectra`.
        """
        if self.k == 0:
            return min(stack.shape) <= LARGEST_EXACT
        return not takes_leading(self.solver.spectra, stack, self.budget(stack.shape).rank)

    def plain(self) -> dict[str, Any]:
        """Return the settings as plain data, for the comparison with an earlier run."""
        return dataclasses.asdict(self) | {"solver": self.solver.plain()}
