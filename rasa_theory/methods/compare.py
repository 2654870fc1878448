"""RaSA's neighbours: how well other ways of sharing parameters reconstruct a stack, at equal parameters.

One file each, a function (stack, settings) -> `Fit`, and its name in `METHODS`. A new method is one file and one line.

How parameters are counted, by one rule for all. Every trained number that has to be stored for the L layers counts:
factors, cores, mixings, scalings, the vectors of a bank, and an index as one number. What a seed makes again, such as
a frozen random basis, counts nothing, and neither do shapes: ranks, sizes, seeds. Numbers are counted as the method
stores them, also where a change of basis could save some; but a scale that can be absorbed by another number is not
stored a second time, so that alpha / r counts nothing, and of weights that add up to one the last is not stored.
"""

from __future__ import annotations

from collections.abc import Sequence

from rasa_theory.common import InputError, whole_number
from rasa_theory.methods.allocated import ALLOCATED
from rasa_theory.methods.fit import Fit, Method
from rasa_theory.methods.independent import LORA
from rasa_theory.methods.joint import JOINT_DIAGONAL, JOINT_FULL
from rasa_theory.methods.one_sided import ONE_SIDED
from rasa_theory.methods.pooled import RASA
from rasa_theory.methods.share_basis import SHARE_BASIS
from rasa_theory.methods.share_lora import SHARE_LORA
from rasa_theory.methods.tied_lora import TIED_LORA
from rasa_theory.methods.vb_lora import VB_LORA
from rasa_theory.methods.vera import VERA
from rasa_theory.problem import LayerStack, RankBudget, lora_parameters

METHODS: dict[str, Method] = {
    "lora": LORA,
    "allocated": ALLOCATED,
    "rasa": RASA,
    "share_lora": SHARE_LORA,
    "tied_lora": TIED_LORA,
    "vera": VERA,
    "vb_lora": VB_LORA,
    "joint_full": JOINT_FULL,
    "joint_diagonal": JOINT_DIAGONAL,
    "one_sided": ONE_SIDED,
    "share_basis": SHARE_BASIS,
}


def allowed(stack: LayerStack, parameters: int, slack: float | None = None) -> int:
    """`parameters` and so many more as `slack` says, a share of them; None: L / (a + b), enough for RaSA's mixing.

    RaSA stores L R = L^2 k numbers of mixing beside those of LoRA, L r (a + b), so L k / r (a + b) of them: at most
    0.8 % with six layers of 384 x 384. Without it RaSA would have to give up a whole rank to be compared. Raises
    InputError unless parameters >= 1 and 0 <= slack < 1.
    """
    if whole_number("parameters", parameters) < 1:
        raise InputError(f"parameters must be at least 1, got {parameters}")
    if slack is None:
        return parameters + parameters * stack.layers // sum(stack.shape)
    if not 0 <= slack < 1:
        raise InputError(f"slack must be at least 0 and below 1, got {slack}")
    return int(parameters * (1 + slack))


def at_parameters(
    stack: LayerStack, parameters: int, methods: Sequence[str] | None = None, slack: float | None = None
) -> dict[str, Fit]:
    """Every method (or those named) at its best within `allowed(stack, parameters, slack)` numbers.

    Each method says which of its configurations are the largest that fit; the one of least error counts. A method of
    which none fits is left out. Raises InputError as `allowed` does, and for an unknown method.
    """
    limit = allowed(stack, parameters, slack)
    chosen = list(METHODS) if methods is None else list(methods)
    for name in chosen:
        if name not in METHODS:
            raise InputError(f"unknown method {name!r}; known: {', '.join(METHODS)}")
    found: dict[str, Fit] = {}
    for name in chosen:
        method = METHODS[name]
        fits = [method.solve(stack, **s) for s in method.configurations(stack, limit)]
        if fits:
            found[name] = min(fits, key=lambda fit: fit.error)
    return found


def pareto(
    stack: LayerStack, ranks: Sequence[int] = (2, 4, 8, 16), methods: Sequence[str] | None = None
) -> dict[int, dict[str, Fit]]:
    """`at_parameters` at those of LoRA of each rank: rank -> method -> Fit.

    Raises InputError for a rank that LoRA cannot have.
    """
    for rank in ranks:
        RankBudget(rank, 0).check_fits(stack)
    return {r: at_parameters(stack, lora_parameters(stack.layers, stack.shape, r), methods) for r in ranks}
