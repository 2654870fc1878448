"""The settings of a study."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from rasa_theory.bounds import CERTIFICATES
from rasa_theory.common import InputError, at_least, one_of
from rasa_theory.problem import Layered, RankBudget, takes_leading
from rasa_theory.solvers import SolverOptions

WEIGHTS = ("none", "layer")


@dataclass(frozen=True)
class StudySettings:
    """The settings of a study, the same for every stack; `ks` are sorted, each once.

    Raises InputError for an impossible rank, k, certificate, weight or number of seeds.
    """

    rank: int = 8
    ks: tuple[int, ...] = (1,)
    solver: SolverOptions = field(default_factory=SolverOptions)
    certificate: str = "closed"
    seeds: int = 5
    weight: str = "none"

    def __post_init__(self) -> None:
        if not self.ks:
            raise InputError("no k was given; name at least one, such as 1", "ks")
        object.__setattr__(self, "ks", tuple(sorted({RankBudget(self.rank, k).shared_rank for k in self.ks})))
        object.__setattr__(self, "seeds", at_least("seeds", self.seeds, 0))
        one_of("certificate", self.certificate, CERTIFICATES)
        one_of("weight", self.weight, WEIGHTS)

    def exact(self, stack: Layered) -> bool:
        """True if the layers of the stack take exact SVDs, see `LayerStack.with_spectra`."""
        return not takes_leading(self.solver.spectra, stack, self.rank)

    def plain(self) -> dict[str, Any]:
        """The settings as plain data for JSON; the solver's start must be the name of one."""
        return dataclasses.asdict(self) | {"solver": self.solver.plain()}

    def tasks(self, k: int) -> int:
        """The number of tasks that progress counts for one k: the solve, the attempts, and a search for a floor."""
        return 1 + (self.seeds + (self.certificate != "closed") if k else 0)
