"""Several processes: collectives, layers sharded over them, and how torchrun starts them; workers that end with
their parent."""

from rasa_theory.distributed.collectives import lacks_memory
from rasa_theory.distributed.launch import first_launched, launched, local_process, meeting
from rasa_theory.distributed.parents import end_with_parent
from rasa_theory.distributed.processes import ALONE, Processes
from rasa_theory.distributed.sharding import LayerSharding, balanced_shares

__all__ = [
    "ALONE",
    "LayerSharding",
    "Processes",
    "balanced_shares",
    "end_with_parent",
    "first_launched",
    "lacks_memory",
    "launched",
    "local_process",
    "meeting",
]
