"""How much more rank-sharing adapters (RaSA) express than LoRA, and why: reconstruction of fine-tuning updates."""

import os

# Threads of OpenMP wait for each other by spinning. On a machine with other users a thread then spins on the very core
# that the awaited one needs, and small steps take many times longer. Passive threads sleep instead. OpenMP reads this
# once, when torch is loaded, so it stands here, before any import of torch. A value that the user has set stays, and
# a program that has imported torch before this package keeps torch's waiting.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("KMP_BLOCKTIME", "0")  # ms: LLVM's and Intel's OpenMP spin that long before they sleep

from rasa_theory import methods
from rasa_theory.bounds import Bound, FloorOptions, SearchProgress, allocation_bound, lower_bound
from rasa_theory.common import InputError, __version__
from rasa_theory.inspection import inspect
from rasa_theory.plotting import plot_iterations
from rasa_theory.problem import (
    LayerStack,
    LoraFactors,
    PoolParticipation,
    RankBudget,
    RasaFactors,
    SharedSubspaceSpectrum,
    SpectralRanks,
    layer_errors,
    pool_participation,
    reconstruction_error,
    shared_subspace_spectrum,
    spectral_ranks,
)
from rasa_theory.reconstruction import Gain, gain, study
from rasa_theory.solvers import (
    Attempt,
    LoraSolution,
    Progress,
    RasaSolution,
    SolverOptions,
    StopReason,
    mixing_drop,
    random_attempt,
    solve_lora,
    solve_path,
    solve_rasa,
)
from rasa_theory.sources import load, null_models

__all__ = [
    "Attempt",
    "Bound",
    "FloorOptions",
    "Gain",
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
    "SpectralRanks",
    "StopReason",
    "__version__",
    "allocation_bound",
    "gain",
    "inspect",
    "layer_errors",
    "load",
    "lower_bound",
    "methods",
    "mixing_drop",
    "null_models",
    "plot_iterations",
    "pool_participation",
    "random_attempt",
    "reconstruction_error",
    "shared_subspace_spectrum",
    "solve_lora",
    "solve_path",
    "solve_rasa",
    "spectral_ranks",
    "study",
]
