"""Several processes: collectives, layers sharded over them, and how torchrun starts them."""

from rasa_theory.distributed.launch import launched, meeting
from rasa_theory.distributed.processes import ALONE, Processes, lacks_memory
from rasa_theory.distributed.sharding import LayerSharding, balanced_shares

__all__ = [
    "ALONE",
    "LayerSharding",
    "Processes",
    "balanced_shares",
    "lacks_memory",
    "launched",
    "meeting",
]
