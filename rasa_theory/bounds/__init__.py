"""Values between which e_rasa(k) lies, each with a proof; none of them runs a solver."""

from rasa_theory.bounds.closed import (
    CERTIFICATES,
    Bound,
    allocate,
    allocation_bound,
    closed_floors,
    floor_slack,
    lower_bound,
)

__all__ = ["CERTIFICATES", "Bound", "allocate", "allocation_bound", "closed_floors", "floor_slack", "lower_bound"]
