"""An inspection as a function of the library."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rasa_theory.common import InputError
from rasa_theory.inspection.inspect_settings import RANKS, InspectSettings, RankGoal
from rasa_theory.inspection.inspection_report import inspection_report
from rasa_theory.inspection.measurement import LayerNames, measure
from rasa_theory.problem import LayerStack


def inspect(
    stacks: Iterable[LayerStack],
    ranks: Sequence[int] = RANKS,
    *,
    error: float | None = None,
    energy: float | None = None,
    size: int | None = None,
    itemsize: int = 4,
    base_norms_squared: Mapping[str, Sequence[float]] | None = None,
    watch: Callable[[int, str], None] | None = None,
) -> dict[str, Any]:
    """Measure updates before a rank is chosen: the computation behind `python -m rasa_theory.inspect`.

    For every layer it bounds the energy sum_{j<=r} sigma_j^2 that rank r holds, for all r up to the largest of `ranks`
    at once. Small layers are decomposed. For large ones a block Lanczos search finds leading directions, and random
    probes bound what they leave out; all bounds together are wrong with a probability of 1e-10 at most. Flat spectra
    have wider bounds, since no large layer is decomposed.

    Arguments:
        stacks: stacks of updates, read one at a time, so a generator keeps one in memory.
        ranks: ranks to report, from 1 to 4096.
        error: recommend ranks that miss at most this share of the squared norm, 0 <= error < 1.
        energy: recommend ranks that hold at least this share, 0 < energy <= 1.
        size: recommend the ranks that miss least in this number of bytes. Set at most one of the three.
        itemsize: bytes of a parameter of the adapter.
        base_norms_squared: ||W_i||_F^2 of the base weights, L numbers by the name of the stack, for relative norms.
        watch: called with the number of finished stacks and the name of the one in hand, or None.

    Returns:
        Plain data, as in inspect.json (schema: rasa_theory/data/inspect.schema.json). Energies and errors are pairs of
        bounds, shares of squared Frobenius norms.

    Raises:
        InputError: ranks or goal are out of range, there is no stack, or base norms do not fit a stack.
    """
    settings = InspectSettings(tuple(ranks))
    named = [goal for goal in (error, energy, size) if goal is not None]
    goal = RankGoal(error, energy, size) if named else None
    rows = []
    for n, stack in enumerate(stacks):
        if watch is not None:
            watch(n, stack.name)
        bases = (base_norms_squared or {}).get(stack.name)
        if bases is not None and len(bases) != stack.layers:
            raise InputError(
                f"stack {stack.name!r} has {stack.layers} layers, and {len(bases)} base norms are given; give one each",
                "base_norms_squared",
            )
        with stack.suitable_threads():
            row = measure(stack, LayerNames.numbered(stack.name, stack.layers), settings.rank, n)
        rows.append(row | {"base_norms_squared": None if bases is None else list(bases)})
    if not rows:
        raise InputError("no stack was given")
    return inspection_report(rows, settings, goal, itemsize)
