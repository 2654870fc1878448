"""RaSA's neighbours: the errors of other ways to share parameters, at the same number of parameters.

Every method is one file: a function (stack, settings) -> `Fit`, and its `Method`. A new one is such a file, and its
`Method` in the list below.

Parameters are counted by one rule for all methods:

- Every trained number that has to be stored for the L layers counts: factors, cores, mixings, scalings, the vectors of
  a bank. An index counts as one number.
- Numbers that a seed reproduces, such as a frozen random basis, are not counted. Neither are ranks, sizes and seeds.
- Numbers are counted as the method stores them, even if a change of basis could save some.
- A scale that another number can absorb is not stored a second time, so alpha / r is not counted. Of weights that add
  up to one, the last is not stored.

All methods get about the same effort: they begin from a few starts each, and the lowest runs go on to their end. RaSA,
and joint CP where `solve_rasa` solves it, take `method.EFFORT` of the solver, which has no moves, since no other method
has a search of that kind.
"""

from __future__ import annotations

from collections.abc import Sequence

from rasa_theory.common import at_least, fraction, one_of
from rasa_theory.methods.allocated import ALLOCATED
from rasa_theory.methods.block_lora import ALLOCATED_BLOCKS, BLOCK_LORA
from rasa_theory.methods.fit import Fit
from rasa_theory.methods.independent import LORA
from rasa_theory.methods.joint import JOINT_DIAGONAL, JOINT_FULL
from rasa_theory.methods.method import Method
from rasa_theory.methods.mos import MOS
from rasa_theory.methods.one_sided import ONE_SIDED
from rasa_theory.methods.pooled import RASA
from rasa_theory.methods.share_basis import SHARE_BASIS
from rasa_theory.methods.share_lora import SHARE_LORA
from rasa_theory.methods.tied_lora import TIED_LORA
from rasa_theory.methods.vb_lora import VB_LORA
from rasa_theory.methods.vera import VERA
from rasa_theory.problem import LayerStack, RankBudget, lora_parameters

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        LORA,
        ALLOCATED,
        BLOCK_LORA,
        ALLOCATED_BLOCKS,
        RASA,
        SHARE_LORA,
        TIED_LORA,
        VERA,
        VB_LORA,
        MOS,
        JOINT_FULL,
        JOINT_DIAGONAL,
        ONE_SIDED,
        SHARE_BASIS,
    )
}
"""Every method by its name, in the order of the tables."""


def allowed(stack: LayerStack, parameters: int, slack: float | None = None) -> int:
    """The limit on parameters in a comparison at `parameters`: a few more, so that RaSA's mixing has room.

    RaSA stores L R = L^2 k entries of mixing beside the L r (a + b) parameters of LoRA, a share L k / (r (a + b)) of
    them: at most 0.8 % for six layers of 384 x 384. Without slack RaSA would have to give up a whole rank.

    Arguments:
        stack: the layers M_i, (L, b, a).
        parameters: the parameters to compare at, at least 1.
        slack: the share by which they may be exceeded, 0 <= slack < 1. None: L / (a + b), enough for k = r.

    Returns:
        The largest number of parameters that a method may have.

    Raises:
        InputError: an argument is out of its range.
    """
    at_least("parameters", parameters, 1)
    if slack is None:
        return parameters + parameters * stack.layers // sum(stack.shape)
    return int(parameters * (1 + fraction("slack", slack)))


def at_parameters(
    stack: LayerStack, parameters: int, methods: Sequence[str] | None = None, slack: float | None = None
) -> dict[str, Fit]:
    """Every method at its best within the same number of parameters.

    Each method names the largest of its configurations that fit; the one of least error counts.

    Arguments:
        stack: the layers M_i, (L, b, a).
        parameters: the parameters to compare at; the limit is `allowed(stack, parameters, slack)`.
        methods: names of methods in `METHODS`. None: all of them.
        slack: as for `allowed`.

    Returns:
        The best `Fit` of each method by its name. Methods without a configuration that fits are left out.

    Raises:
        InputError: `parameters` or `slack` is out of its range, or a method is unknown.
    """
    limit = allowed(stack, parameters, slack)
    names = list(METHODS) if methods is None else list(methods)
    for name in names:
        one_of("method", name, METHODS)
    best: dict[str, Fit] = {}
    for name in names:
        method = METHODS[name]
        with stack.suitable_threads():
            fits = [method.solve(stack, **settings) for settings in method.configurations(stack, limit)]
        if fits:
            best[name] = min(fits, key=lambda fit: fit.error)
    return best


def pareto(
    stack: LayerStack, ranks: Sequence[int] = (2, 4, 8, 16), methods: Sequence[str] | None = None
) -> dict[int, dict[str, Fit]]:
    """`at_parameters` at the parameters of LoRA of several ranks.

    Arguments:
        stack: the layers M_i, (L, b, a).
        ranks: the ranks of LoRA, each from 1 to min(b, a).
        methods: names of methods in `METHODS`. None: all of them.

    Returns:
        The best `Fit` of each method by rank and name.

    Raises:
        InputError: a rank is not in 1 .. min(b, a), or a method is unknown.
    """
    for rank in ranks:
        RankBudget(rank, 0).check_fits(stack)
    return {r: at_parameters(stack, lora_parameters(stack.layers, stack.shape, r), methods) for r in ranks}
