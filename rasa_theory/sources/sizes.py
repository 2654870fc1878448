"""Sentences on the size of a source, the same in the dry runs of all commands."""

from __future__ import annotations

import math

import torch

from rasa_theory.formats import grouped
from rasa_theory.sources.catalogue import Catalogue, StackSource


def size_line(source: StackSource, dtype: torch.dtype, note: str = "") -> str:
    """The name, shape and size of a stack in memory, in `dtype`."""
    L, (b, a) = source.layers, source.shape
    size = L * math.prod(source.shape) * dtype.itemsize
    return f"  {source.name}: {L} x {b} x {a}{note} ({size / 2**20:.1f} MiB)"


def left_out_lines(catalogue: Catalogue) -> list[str]:
    """The tensors that are in no stack, grouped, with the reason of each group."""
    return [f"  left out: {group.label}: {group.reason}" for group in grouped(catalogue.left_out)]


def memory_line(most: int, world_size: int, sharing: str, on_disk: int = 0) -> str:
    """The memory that the largest stack takes, `most` bytes, and the number of stacks that stay on disk.

    `sharing` says how several processes share the work.
    """
    disk = f"; --memory leaves {on_disk} stack{'s' * (on_disk > 1)} on disk" if on_disk else ""
    each = "" if world_size == 1 else " in each"
    return (
        f"One stack is in memory at a time{'' if world_size == 1 else sharing}: about {most / 2**20:.0f} MiB at "
        f"most{each}, beside the libraries{disk}."
    )
