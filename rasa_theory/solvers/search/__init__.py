"""The search for the pool that best fits a stack, on a small core of it.

`PoolSearch` (search) takes `SearchCore` (core) of the stack, begins `BatchedSweeps` (sweeps) from all starts as one
`Batch` (batch), cuts to the lowest in heats, and tries `moved` (moves) batches, as its `Effort` (effort) says.
"""

from rasa_theory.solvers.search.batch import Batch, inside, refitted, update_private
from rasa_theory.solvers.search.core import SearchCore
from rasa_theory.solvers.search.effort import EFFORTS, Effort
from rasa_theory.solvers.search.moves import moved
from rasa_theory.solvers.search.search import (
    Candidate,
    PoolSearch,
    SearchSummary,
    Watch,
    search_operations,
    starts_of_search,
)
from rasa_theory.solvers.search.sweeps import BatchedSweeps, Multipliers

__all__ = [
    "EFFORTS", "Batch", "BatchedSweeps", "Candidate", "Effort", "Multipliers", "PoolSearch", "SearchCore",
    "SearchSummary", "Watch", "inside", "moved", "refitted", "search_operations", "starts_of_search", "update_private",
]  # fmt: skip
