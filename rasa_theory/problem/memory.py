"""The limit on memory: its check before work on a layer begins, and the share that exact SVDs may take."""

from __future__ import annotations

from rasa_theory.common import InputError
from rasa_theory.problem.budget import Shaped

_SVD_COPIES = 8  # float64 copies of a layer that its exact SVD needs, LAPACK's workspace included
_LAYER_COPIES = 4  # all other work on a whole layer: as read, scaled, in float32, and the bases of a search


def check_memory(stack: Shaped, memory: int, decomposed: bool = True) -> None:
    """Raise InputError if half of `memory` (bytes) is not enough for the work on one layer of `stack`.

    The work is the exact SVD of the layer if `decomposed`, else any other work that needs the whole layer.
    """
    b, a = stack.shape
    needed = least_memory(stack, decomposed)
    if needed > memory:
        work = "the exact SVD of one" if decomposed else "the work on one"
        raise InputError(
            f"memory of {memory / 2**20:.4g} MiB is too little for stack {stack.name!r}: its layers of {b} x {a} need "
            f"{needed / 2**20:.4g} MiB, twice what {work} takes; allow at least that",
            "memory",
        )


def least_memory(stack: Shaped, decomposed: bool = True) -> int:
    """Return the bytes that `check_memory` asks for."""
    b, a = stack.shape
    return 2 * (_SVD_COPIES if decomposed else _LAYER_COPIES) * 8 * b * a


def exceeds_share(size: int, memory: int | None) -> bool:
    """Return whether `size` bytes are more than a quarter of `memory`; never without a limit."""
    return memory is not None and 4 * size > memory
