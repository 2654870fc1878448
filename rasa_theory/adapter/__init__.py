"""RaSA and LoRA as adapters in a torch model: inject, train, merge, save (He et al., ICLR 2025, section 3)."""

from rasa_theory.adapter.layer import AdaptedLinear
from rasa_theory.adapter.model import Adapter, adapters, from_factors, inject
from rasa_theory.adapter.saving import load, save
from rasa_theory.adapter.terms import Terms, initial_mixing

__all__ = [
    "AdaptedLinear",
    "Adapter",
    "Terms",
    "adapters",
    "from_factors",
    "initial_mixing",
    "inject",
    "load",
    "save",
]
