"""What is measured on one stack: the energy in its leading terms, and the subspaces that its layers share."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rasa_theory.inspection.inspect_settings import DIRECTIONS, share_of_failure
from rasa_theory.problem import LayerStack, is_decomposed, layer_energies, mean_overlap, mean_projector, unrelated_level

Row = dict[str, Any]


class LayerNames(NamedTuple):
    """The kind of module that a stack holds, and the name of the module of each layer."""

    kind: str
    modules: tuple[str, ...]

    @classmethod
    def numbered(cls, name: str, layers: int) -> LayerNames:
        """Names for the layers of a stack that are no modules of their own."""
        return cls(name, tuple(f"{name}[{i}]" for i in range(layers)))


def measure(stack: LayerStack, names: LayerNames, rank: int, number: int) -> Row:
    """The measurements of a stack as plain data, for ranks 1, .., n, n = min(rank, b, a).

    `number` counts the stacks of an inspection, from 0 on, which share the probability of failure. Base norms are
    None, and no rounding is known; whoever reads the base adds both.
    """
    directions = max(1, min(DIRECTIONS, min(stack.shape) // 2, rank))
    layers = list(layer_energies(stack, rank, directions, share_of_failure(number, stack.layers)))
    return {
        "name": stack.name,
        "kind": names.kind,
        "modules": list(names.modules),
        "shape": list(stack.shape),
        "decomposed": is_decomposed(stack.shape, rank),
        "norms_squared": [layer.norm_squared for layer in layers],
        "base_norms_squared": None,
        "rounding": [],
        "low": [layer.low.tolist() for layer in layers],
        "high": [layer.high.tolist() for layer in layers],
        "shared": {
            "rank": directions,
            "columns": _shared(torch.stack([layer.U for layer in layers])),
            "rows": _shared(torch.stack([layer.V for layer in layers])),
        },
    }


def _shared(U: Tensor) -> dict[str, float] | None:
    """What the layers have in common of the subspaces spanned by U (L, n, d); None where that cannot be said.

    `overlap` is `mean_overlap`. `largest` is the largest eigenvalue of the mean projector, and `unrelated` its upper
    edge for random subspaces.
    """
    overlap = mean_overlap(U)
    if overlap is None:
        return None
    L, n, d = U.shape
    return {
        "overlap": overlap,
        "largest": float(mean_projector(U)[0][0]),
        "unrelated": unrelated_level(L, d / n),
    }
