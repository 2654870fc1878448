"""LoRA in closed form, and RaSA by alternating exact minimisation from several starts.

`solve_rasa` (rasa) builds a `Race`, which runs a `RasaDescent` from each of `STARTS`. That is the loop, `Descent`, over
one of `SWEEPS`, wrapped by `Guarded` and `BestSoFar`. Everything below `solve_rasa`, `solve_path`, `random_attempt` and
`resolve_mixing` is in units of the stack's scale.
"""

from rasa_theory.solvers import updates
from rasa_theory.solvers.accuracy import cancellation, measurable, term_norms, term_size
from rasa_theory.solvers.attempts import Attempt, median_iterations, random_attempt
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
from rasa_theory.solvers.exchange import Exchanges, leading_terms, pool_losses, sign_patterns
from rasa_theory.solvers.lora import LoraSolution, solve_lora
from rasa_theory.solvers.mixing_drop import drop_allowance, mixing_drop, resolve_mixing
from rasa_theory.solvers.options import SolverOptions, is_at_most_lora
from rasa_theory.solvers.race import ahead, with_exchanges
from rasa_theory.solvers.rasa import RasaSolution, iterate_path, move_to_pool, solve_path, solve_rasa
from rasa_theory.solvers.rasa_descent import DIVERGED, Callback, Progress, RasaDescent
from rasa_theory.solvers.starts import STARTS
from rasa_theory.solvers.starts.allocation import allocation_start
from rasa_theory.solvers.starts.common_subspace import common_start
from rasa_theory.solvers.starts.lora import lora_start
from rasa_theory.solvers.starts.pencil import pencil_start
from rasa_theory.solvers.starts.random import random_start
from rasa_theory.solvers.starts.start import Start
from rasa_theory.solvers.sweeps import SWEEPS
from rasa_theory.solvers.sweeps.accelerated import ReplayedSweep, SweepOnCore, core_sweeps, sweeps_on
from rasa_theory.solvers.sweeps.bases import Side
from rasa_theory.solvers.sweeps.core import CoreSweep, gradient
from rasa_theory.solvers.sweeps.joint import JointSweep
from rasa_theory.solvers.sweeps.paper import PaperSweep
from rasa_theory.solvers.sweeps.protocol import RasaSweep
from rasa_theory.solvers.updates import joint_sweep, update_private

__all__ = [
    "DIVERGED",
    "STARTS",
    "SWEEPS",
    "Attempt",
    "BestSoFar",
    "Callback",
    "CoreSweep",
    "Descent",
    "Exchanges",
    "Extrapolated",
    "Guarded",
    "JointSweep",
    "LoraSolution",
    "Memoryless",
    "PaperSweep",
    "Progress",
    "RasaDescent",
    "RasaSolution",
    "RasaSweep",
    "ReplayedSweep",
    "Side",
    "SolverOptions",
    "Start",
    "StopReason",
    "Sweep",
    "SweepFailed",
    "SweepOnCore",
    "ahead",
    "allocation_start",
    "cancellation",
    "common_start",
    "core_sweeps",
    "decreases_less",
    "drop_allowance",
    "gradient",
    "is_at_most_lora",
    "iterate_path",
    "joint_sweep",
    "leading_terms",
    "lora_start",
    "measurable",
    "median_iterations",
    "mixing_drop",
    "move_to_pool",
    "pencil_start",
    "pool_losses",
    "random_attempt",
    "random_start",
    "resolve_mixing",
    "sign_patterns",
    "solve_lora",
    "solve_path",
    "solve_rasa",
    "sweeps_on",
    "term_norms",
    "term_size",
    "update_private",
    "updates",
    "with_exchanges",
]
