"""What to compute on every stack."""

from __future__ import annotations

from dataclasses import dataclass, field

from rasa_theory.bounds import CERTIFICATES
from rasa_theory.common import InputError, at_least, one_of
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
            raise InputError("no k was given; name at least one, such as 1", "ks")
        object.__setattr__(self, "ks", tuple(sorted({RankBudget(self.rank, k).shared_rank for k in self.ks})))
        object.__setattr__(self, "seeds", at_least("seeds", self.seeds, 0))
        one_of("certificate", self.certificate, CERTIFICATES)
        one_of("weight", self.weight, WEIGHTS)

    def tasks(self, k: int) -> int:
        """What progress counts on one stack: the solve, the attempts, and the floor where it is searched for."""
        return 1 + (self.seeds + (self.certificate != "closed") if k else 0)
