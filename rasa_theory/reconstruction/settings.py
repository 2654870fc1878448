"""What to compute on every stack."""

from __future__ import annotations

from dataclasses import dataclass, field

from rasa_theory.bounds import CERTIFICATES
from rasa_theory.common import InputError, whole_number
from rasa_theory.problem import RankBudget
from rasa_theory.solvers import SolverOptions

WEIGHTS = ("none", "layer")


@dataclass(frozen=True)
class StudySettings:
    """What to compute on every stack.

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
            raise InputError("no k was given; name at least one, such as 1")
        object.__setattr__(self, "ks", tuple(sorted({RankBudget(self.rank, k).shared_rank for k in self.ks})))
        object.__setattr__(self, "seeds", whole_number("seeds", self.seeds))
        if self.certificate not in CERTIFICATES:
            raise InputError(f"unknown certificate {self.certificate!r}; known: {', '.join(CERTIFICATES)}")
        if self.weight not in WEIGHTS:
            raise InputError(f"unknown weight {self.weight!r}; known: {', '.join(WEIGHTS)}")
        if self.seeds < 0:
            raise InputError(f"seeds must be at least 0, got {self.seeds}")

    def tasks(self, k: int) -> int:
        """What progress counts on one stack: the solve, the attempts, and the floor where it is searched for."""
        return 1 + (self.seeds + (self.certificate != "closed") if k else 0)
