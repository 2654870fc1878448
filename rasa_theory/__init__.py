"""How much more rank-sharing adapters (RaSA) express than LoRA, and why: reconstruction of fine-tuning updates."""

from rasa_theory import adapter, methods
from rasa_theory.bounds import Bound, FloorOptions, SearchProgress, allocation_bound, lower_bound
from rasa_theory.common.errors import InputError
from rasa_theory.common.version import __version__
from rasa_theory.plotting.results import plot_iterations
from rasa_theory.problem.factors import LoraFactors, RasaFactors
from rasa_theory.problem.participation import PoolParticipation, pool_participation
from rasa_theory.problem.residual import layer_errors, reconstruction_error
from rasa_theory.problem.stack import LayerStack, RankBudget
from rasa_theory.problem.subspaces import SharedSubspaceSpectrum, shared_subspace_spectrum
from rasa_theory.reconstruction.driver import study
from rasa_theory.solvers.attempts import Attempt, random_attempt
from rasa_theory.solvers.descent import Progress, StopReason
from rasa_theory.solvers.lora import LoraSolution, solve_lora
from rasa_theory.solvers.rasa import RasaSolution, SolverOptions, solve_path, solve_rasa
from rasa_theory.solvers.updates import mixing_drop
from rasa_theory.sources import load

__all__ = [
    "Attempt",
    "Bound",
    "FloorOptions",
    "InputError",
    "LayerStack",
    "LoraFactors",
    "LoraSolution",
    "PoolParticipation",
    "Progress",
    "RankBudget",
    "RasaFactors",
    "RasaSolution",
    "SearchProgress",
    "SharedSubspaceSpectrum",
    "SolverOptions",
    "StopReason",
    "__version__",
    "adapter",
    "allocation_bound",
    "layer_errors",
    "load",
    "lower_bound",
    "methods",
    "mixing_drop",
    "plot_iterations",
    "pool_participation",
    "random_attempt",
    "reconstruction_error",
    "shared_subspace_spectrum",
    "solve_lora",
    "solve_path",
    "solve_rasa",
    "study",
]
