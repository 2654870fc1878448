"""Layers weighted by the inverse of their norms, so that every layer counts equally in a sum of squared errors."""

from __future__ import annotations

import math

import torch

from rasa_theory.problem.entries import Purpose
from rasa_theory.problem.stack import LayerStack
from rasa_theory.problem.storage import Divided, Factored, InMemory, Storage


def normalised_layers(stack: LayerStack) -> tuple[LayerStack, list[float]]:
    """Return a stack with every nonzero M_i divided by its norm, and the norms of the layers held (1 for zero layers).

    Entries in memory are copied, factors are scaled, and entries in files are divided as they are read.
    """
    entries, storage = stack.entries, stack.entries.storage
    largest, squares = [0.0] * storage.shape[0], [0.0] * storage.shape[0]
    for i, _, M in entries.tiles(Purpose.CHECKS):
        largest[i] = max(largest[i], float(M.abs().amax()))
    divisors = [x or 1.0 for x in largest]  # squares of a layer that is 1e-160 of the others leave the range
    for i, _, M in entries.tiles(Purpose.CHECKS):
        squares[i] += float(((M / divisors[i]).double() ** 2).sum())
    relative = [math.sqrt(x) or 1.0 for x in squares]
    units: Storage = Divided(storage, entries.dtype, divisors, relative)
    if isinstance(storage, InMemory):
        L, b, a = units.shape
        values = torch.empty(L, b, a, dtype=entries.dtype, device=entries.device)
        for i in range(L):
            values[i] = units.rows(i, 0, b)
        entries.passes.add(Purpose.COPIES)
        units = InMemory(values)
    elif isinstance(storage, Factored):
        units = storage.divided(divisors, relative)
    normalised = LayerStack(
        units, entries.name, entries.dtype, entries.device, entries.memory, entries.sharding, tf32=entries.tf32
    )
    gain = stack.scale / entries.power
    norms = [x * y * gain if x > 0 else 1.0 for x, y in zip(largest, relative, strict=True)]
    return normalised.transpose() if stack.transposed else normalised, norms
