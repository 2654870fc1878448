"""LoRA in closed form, and RaSA by alternating exact minimisation from several starts."""

from rasa_theory.solvers import updates
from rasa_theory.solvers.accuracy import cancellation, measurable, term_norms, term_size
from rasa_theory.solvers.attempts import Attempt, median_iterations, random_attempt
from rasa_theory.solvers.descent import DEGENERATE, Callback, Descent, Progress, StopReason
from rasa_theory.solvers.exchange import Exchanges, leading_terms, losses, sign_patterns
from rasa_theory.solvers.lora import LoraSolution, solve_lora
from rasa_theory.solvers.mixing_drop import drop_allowance, mixing_drop, resolve_mixing
from rasa_theory.solvers.rasa import RasaSolution, SolverOptions, iterate_path, solve_path, solve_rasa
from rasa_theory.solvers.starts import PROMISES, STARTS
from rasa_theory.solvers.starts.allocation import allocation_start
from rasa_theory.solvers.starts.common import common_start
from rasa_theory.solvers.starts.lora import lora_start
from rasa_theory.solvers.starts.pencil import pencil_start
from rasa_theory.solvers.starts.previous import move_to_pool
from rasa_theory.solvers.starts.random import random_start
from rasa_theory.solvers.sweeps.accelerated import core_sweeps, sweeps_on
from rasa_theory.solvers.sweeps.core import CoreSweep
from rasa_theory.solvers.updates import joint_sweep, update_private

__all__ = [
    "DEGENERATE",
    "PROMISES",
    "STARTS",
    "Attempt",
    "Callback",
    "CoreSweep",
    "Descent",
    "Exchanges",
    "LoraSolution",
    "Progress",
    "RasaSolution",
    "SolverOptions",
    "StopReason",
    "allocation_start",
    "cancellation",
    "common_start",
    "core_sweeps",
    "drop_allowance",
    "iterate_path",
    "joint_sweep",
    "leading_terms",
    "lora_start",
    "losses",
    "measurable",
    "median_iterations",
    "mixing_drop",
    "move_to_pool",
    "pencil_start",
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
]
