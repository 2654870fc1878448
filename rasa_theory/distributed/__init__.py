"""Several processes: collectives, layers sharded over them, and how torchrun starts them."""

from rasa_theory.distributed.launch import launched, meeting
from rasa_theory.distributed.processes import ALONE, Processes, lacks_memory
from rasa_theory.distributed.sharding import Spread, dealt

__all__ = [
    "ALONE",
    "Processes",
    "Spread",
    "dealt",
    "lacks_memory",
    "launched",
    "meeting",
]
