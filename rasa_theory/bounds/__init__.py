"""Values between which e_rasa(k) lies, each with a proof; none of them runs a solver."""

from rasa_theory.bounds.closed import Bound, allocate, allocation_bound, closed_floors, floor_slack
from rasa_theory.bounds.floor import CERTIFICATES, lower_bound
from rasa_theory.bounds.search import FloorOptions, SearchProgress

__all__ = [
    "CERTIFICATES",
    "Bound",
    "FloorOptions",
    "SearchProgress",
    "allocate",
    "allocation_bound",
    "closed_floors",
    "floor_slack",
    "lower_bound",
]
