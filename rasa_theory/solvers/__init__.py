"""LoRA in closed form, and RaSA by alternating exact minimisation from several starts.

`solve_rasa` (rasa) builds a `Race`, which runs a `RasaDescent` from each of `STARTS`. That is the loop, `Descent`, over
one of `SWEEPS`, wrapped by `Guarded` and `BestSoFar`. Everything below `solve_rasa`, `solve_path`, `random_attempt` and
`resolve_mixing` is in units of the stack's scale.
"""

from rasa_theory.solvers import updates
from rasa_theory.solvers.accuracy import cancellation, largest_excess, measurable, term_norms, term_size, unresolved
from rasa_theory.solvers.attempts import ITERATIONS, Attempt, median_iterations, random_attempt
from rasa_theory.solvers.descent import (
    BestSoFar,
    Descent,
    Extrapolated,
    Guarded,
    Memoryless,
    StopReason,
    Sweep,
    SweepFailed,
    decreases_less,
)
from rasa_theory.solvers.duration import (
    EFFORT_TIMES,
    attempt_seconds,
    exact_lora_seconds,
    exact_solver_seconds,
    lora_seconds,
    sample_seconds,
    solver_seconds,
    svd_cost,
)
from rasa_theory.solvers.lora import LoraSolution, solve_lora
from rasa_theory.solvers.mixing_drop import drop_allowance, mixing_drop, resolve_mixing
from rasa_theory.solvers.options import SolverOptions, is_at_most_lora
from rasa_theory.solvers.rank_one import leading_terms
from rasa_theory.solvers.rasa import RasaSolution, iterate_path, move_to_pool, solve_path, solve_rasa
from rasa_theory.solvers.rasa_descent import DIVERGED, Callback, Progress, RasaDescent
from rasa_theory.solvers.search import (
    EFFORTS,
    Batch,
    BatchedSweeps,
    Candidate,
    Effort,
    Multipliers,
    PoolSearch,
    SearchCore,
    SearchSummary,
    inside,
    moved,
    refitted,
)
from rasa_theory.solvers.starts import STARTS
from rasa_theory.solvers.starts.allocation import allocation_start
from rasa_theory.solvers.starts.common_subspace import common_start
from rasa_theory.solvers.starts.greedy import few_layers_start, greedy_start
from rasa_theory.solvers.starts.lora import lora_start
from rasa_theory.solvers.starts.near_allocation import near_allocation_start
from rasa_theory.solvers.starts.pencil import pencil_start
from rasa_theory.solvers.starts.random import random_start
from rasa_theory.solvers.starts.scattered import scattered_start
from rasa_theory.solvers.starts.start import Start
from rasa_theory.solvers.starts.subspace import subspace_start
from rasa_theory.solvers.sweeps import SWEEPS
from rasa_theory.solvers.sweeps.accelerated import ReplayedSweep, SweepOnCore, core_sweeps, sweeps_on
from rasa_theory.solvers.sweeps.bases import Side
from rasa_theory.solvers.sweeps.bounded import bounded_sweeps
from rasa_theory.solvers.sweeps.core import CoreSweep, gradient
from rasa_theory.solvers.sweeps.joint import JointSweep
from rasa_theory.solvers.sweeps.paper import PaperSweep
from rasa_theory.solvers.sweeps.protocol import RasaSweep
from rasa_theory.solvers.updates import joint_sweep, update_private

__all__ = [
    "DIVERGED",
    "EFFORTS",
    "EFFORT_TIMES",
    "ITERATIONS",
    "STARTS",
    "SWEEPS",
    "Attempt",
    "Batch",
    "BatchedSweeps",
    "BestSoFar",
    "Callback",
    "Candidate",
    "CoreSweep",
    "Descent",
    "Effort",
    "Extrapolated",
    "Guarded",
    "JointSweep",
    "LoraSolution",
    "Memoryless",
    "Multipliers",
    "PaperSweep",
    "PoolSearch",
    "Progress",
    "RasaDescent",
    "RasaSolution",
    "RasaSweep",
    "ReplayedSweep",
    "SearchCore",
    "SearchSummary",
    "Side",
    "SolverOptions",
    "Start",
    "StopReason",
    "Sweep",
    "SweepFailed",
    "SweepOnCore",
    "allocation_start",
    "attempt_seconds",
    "bounded_sweeps",
    "cancellation",
    "common_start",
    "core_sweeps",
    "decreases_less",
    "drop_allowance",
    "exact_lora_seconds",
    "exact_solver_seconds",
    "few_layers_start",
    "gradient",
    "greedy_start",
    "inside",
    "is_at_most_lora",
    "iterate_path",
    "joint_sweep",
    "largest_excess",
    "leading_terms",
    "lora_seconds",
    "lora_start",
    "measurable",
    "median_iterations",
    "mixing_drop",
    "move_to_pool",
    "moved",
    "near_allocation_start",
    "pencil_start",
    "random_attempt",
    "random_start",
    "refitted",
    "resolve_mixing",
    "sample_seconds",
    "scattered_start",
    "solve_lora",
    "solve_path",
    "solve_rasa",
    "solver_seconds",
    "subspace_start",
    "svd_cost",
    "sweeps_on",
    "term_norms",
    "term_size",
    "unresolved",
    "update_private",
    "updates",
]
