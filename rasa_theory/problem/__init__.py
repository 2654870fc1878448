"""The problem to solve: stacks of updates, budgets, factors, residuals, and facts about them."""

from rasa_theory.problem import subspaces
from rasa_theory.problem.budget import RankBudget
from rasa_theory.problem.energies import LayerEnergies, is_decomposed, layer_energies
from rasa_theory.problem.entries import PassCounts, StackEntries
from rasa_theory.problem.factors import LoraFactors, RasaFactors, balanced, lora_parameters, scale_into_mixing
from rasa_theory.problem.inputs import compute_device, compute_dtype
from rasa_theory.problem.memory import check_memory, exceeds_share, least_memory
from rasa_theory.problem.participation import PoolParticipation, layer_losses, participation_ratio, pool_participation
from rasa_theory.problem.residual import layer_errors, layer_residuals, reconstruction_error
from rasa_theory.problem.spectra import SPECTRA, SVD, Layered, StackSpectra, takes_leading
from rasa_theory.problem.spectrum import SpectralRanks, spectral_ranks
from rasa_theory.problem.squared_error import check_same_layers, squared_error, squared_errors
from rasa_theory.problem.stack import LayerStack
from rasa_theory.problem.storage import Difference, Divided, Factored, FileRows, InMemory, OnDisk, Part, native
from rasa_theory.problem.subspaces import (
    SharedSubspaceSpectrum,
    leading_of_all,
    mean_overlap,
    mean_projector,
    projected,
    shared_subspace_spectrum,
    unrelated_level,
)
from rasa_theory.problem.terms import RankOneTerms
from rasa_theory.problem.weighting import normalised_layers

__all__ = [
    "SPECTRA",
    "SVD",
    "Difference",
    "Divided",
    "Factored",
    "FileRows",
    "InMemory",
    "LayerEnergies",
    "LayerStack",
    "Layered",
    "LoraFactors",
    "OnDisk",
    "Part",
    "PassCounts",
    "PoolParticipation",
    "RankBudget",
    "RankOneTerms",
    "RasaFactors",
    "SharedSubspaceSpectrum",
    "SpectralRanks",
    "StackEntries",
    "StackSpectra",
    "balanced",
    "check_memory",
    "check_same_layers",
    "compute_device",
    "compute_dtype",
    "exceeds_share",
    "is_decomposed",
    "layer_energies",
    "layer_errors",
    "layer_losses",
    "layer_residuals",
    "leading_of_all",
    "least_memory",
    "lora_parameters",
    "mean_overlap",
    "mean_projector",
    "native",
    "normalised_layers",
    "participation_ratio",
    "pool_participation",
    "projected",
    "reconstruction_error",
    "scale_into_mixing",
    "shared_subspace_spectrum",
    "spectral_ranks",
    "squared_error",
    "squared_errors",
    "subspaces",
    "takes_leading",
    "unrelated_level",
]
