"""How much more rank-sharing adapters (RaSA) express than LoRA, and why: reconstruction of fine-tuning updates."""

from rasa_theory.bounds import Bound, allocation_bound, lower_bound
from rasa_theory.descent import Progress, StopReason
from rasa_theory.errors import InputError
from rasa_theory.factors import LoraFactors, RasaFactors
from rasa_theory.lora import LoraSolution, solve_lora
from rasa_theory.objective import layer_errors, reconstruction_error
from rasa_theory.problem import LayerStack, RankBudget
from rasa_theory.rasa import RasaSolution, SolverOptions, solve_path, solve_rasa
from rasa_theory.updates import mixing_drop

__version__ = "0.1.0"
