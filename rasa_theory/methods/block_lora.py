"""Block LoRA: every block of a layer has a low-rank update of its own (Localized LoRA, arXiv 2506.00236)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rasa_theory.common import InputError, at_least
from rasa_theory.methods.allocated import largest_term_factors
from rasa_theory.methods.fit import Evidence, Fit, Settings, UnitFit, measured
from rasa_theory.methods.method import Method, at_most, largest
from rasa_theory.problem import LayerStack, OnDisk, RankBudget, StackEntries, takes_leading
from rasa_theory.solvers import solve_lora

SQUARES = (2, 4)  # the grids of a comparison: 2 x 2 and 4 x 4 blocks


def fit_block_lora(stack: LayerStack, rank: int, rows: int = 2, columns: int = 2) -> Fit:
    """Minimise sum_i sum_pq ||M_i,pq - B_i,pq A_i,pq||_F^2 over the blocks (p, q) of every layer.

    Localized LoRA (Barazandeh et al., 2025) cuts a layer into a grid of m x n equal blocks, each with an update of rank
    r. The blocks have no parameter in common, so the minimum is the truncated SVD of every block (Eckart-Young). With
    one block it is LoRA.

    Stored: B_i,pq (b / m, r) and A_i,pq (r, a / n), so L r (n b + m a) parameters. A grid of m x m blocks of rank r
    has as many as LoRA of rank m r.

    Arguments:
        stack: the layers M_i, (L, b, a).
        rank: r, the rank of every block, from 1 to min(b / m, a / n).
        rows: m, the number of rows of blocks, a divisor of b.
        columns: n, the number of columns of blocks, a divisor of a.

    Returns:
        A `Fit` with the minimum, in closed form.

    Raises:
        InputError: an argument is out of its range.
    """
    grid = _Grid(rows, columns).checked(stack)
    at_least("rank", rank, 1)
    blocks = grid.blocks(stack, rank)
    at_most("rank", rank, min(blocks.shape), blocks)
    factors = solve_lora(blocks.unit(), rank).factors.to(torch.float64)
    solution = UnitFit(grid.joined(factors.update), (factors.B, factors.A), rank * rows * columns)
    settings: Settings = {"rank": rank, "rows": rows, "columns": columns}
    return measured(stack, "block_lora", settings, Evidence.CLOSED_FORM, solution)


def fit_allocated_blocks(stack: LayerStack, terms: int, rows: int = 2, columns: int = 2) -> Fit:
    """Minimise the error of `fit_block_lora` over the ranks r_i,pq of all blocks, too, with sum r_i,pq <= `terms`.

    The largest singular terms of all blocks lose least, as in `fit_allocated`. Stored: B_i,pq (b / m, r_i,pq) and
    A_i,pq (r_i,pq, a / n), so `terms` (b / m + a / n) parameters. Terms of size 0 are not stored.

    Arguments:
        stack: the layers M_i, (L, b, a).
        terms: the largest sum of the ranks, from 1 to L m n min(b / m, a / n).
        rows: m, the number of rows of blocks, a divisor of b.
        columns: n, the number of columns of blocks, a divisor of a.

    Returns:
        A `Fit` with the minimum, in closed form.

    Raises:
        InputError: an argument is out of its range.
    """
    grid = _Grid(rows, columns).checked(stack)
    at_least("terms", terms, 1)
    blocks = grid.blocks(stack, math.ceil(terms / (stack.layers * rows * columns)))
    at_most("terms", terms, blocks.layers * min(blocks.shape), blocks)
    pairs = largest_term_factors(blocks.unit(), terms)
    ranks = torch.tensor([len(A) for _, A in pairs]).reshape(stack.layers, -1)
    stored = [factor for pair in pairs for factor in pair]
    update = grid.joined(lambda block: torch.mm(*pairs[block]))
    solution = UnitFit(update, tuple(stored), int(ranks.sum(1).max()))
    settings: Settings = {"terms": terms, "rows": rows, "columns": columns}
    return measured(stack, "allocated_blocks", settings, Evidence.CLOSED_FORM, solution)


class _Grid(NamedTuple):
    """The numbers of rows and columns of blocks of one layer. Block (p, q) of layer i has number (i m + p) n + q."""

    rows: int
    columns: int

    def checked(self, stack: LayerStack) -> _Grid:
        """The grid itself; raises InputError if the layers cannot be cut so."""
        for name, count, size in zip(self._fields, self, stack.shape, strict=True):
            at_least(name, count, 1)
            if size % count:
                raise InputError(
                    f"{name} {count} does not divide the {size} {name} of a layer of {stack.name!r}; give a divisor",
                    name,
                )
        return self

    def blocks(self, stack: LayerStack, rank: int) -> LayerStack:
        """The blocks of all layers as one stack (L m n, b / m, a / n), which reads its entries from `stack`.

        Their largest entry is the largest of `stack`, so the views `unit()` of both have the same unit. Directions come
        from products as for a single block of this rank: blocks have nothing in common whose size could matter.
        """
        entries = stack.entries
        b, a = entries.shape
        cells = [(p, q) for p in range(self.rows) for q in range(self.columns)]
        stored = [(q, p) if stack.transposed else (p, q) for p, q in cells]
        m, n = self[::-1] if stack.transposed else self
        height, width = b // m, a // n
        parts = [_Block(entries, i, p * height, q * width, width) for i in range(stack.layers) for p, q in stored]
        values = OnDisk(parts, (len(parts), height, width), entries.storage.dtype, alone=True)
        name = f"{stack.name}, {self.rows} x {self.columns} blocks"
        blocks = LayerStack(values, name, stack.dtype, stack.device, stack.memory, tf32=stack.tf32)
        kind = "leading" if takes_leading("auto", _OneLayer(blocks.shape), rank) else "exact"
        view = blocks.with_spectra(kind, RankBudget(rank, 0))
        return view.transpose() if stack.transposed else view

    def joined(self, block: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
        """The function layer i -> its update (b, a), from the function number -> update of that block."""

        def update(i: int) -> Tensor:
            strips = range(i * self.rows, (i + 1) * self.rows)
            numbers = [range(strip * self.columns, (strip + 1) * self.columns) for strip in strips]
            return torch.cat([torch.cat([block(number) for number in row], 1) for row in numbers])

        return update


@dataclass(frozen=True)
class _Block:
    """A block of a stored layer, whose rows are read when they are needed: a `Part`."""

    entries: StackEntries
    layer: int
    top: int
    left: int
    width: int

    def read(self, start: int, stop: int) -> Tensor:
        """Rows start .. stop - 1 of the block, (stop - start, width)."""
        rows = self.entries.storage.rows(self.layer, self.top + start, self.top + stop)
        return rows[:, self.left : self.left + self.width]


class _OneLayer(NamedTuple):
    """The size of a stack of a single layer."""

    shape: tuple[int, int]
    layers: int = 1


def _parameters(layers: int, shape: tuple[int, int], rank: int, rows: int, columns: int) -> int:
    b, a = shape
    return layers * rank * (columns * b + rows * a)


def _parameters_of_terms(layers: int, shape: tuple[int, int], terms: int, rows: int, columns: int) -> int:
    b, a = shape
    return terms * (b // rows + a // columns)


def _squares(stack: LayerStack) -> list[int]:
    """The sides of the square grids that the layers can be cut into."""
    return [side for side in SQUARES if not any(size % side for size in stack.shape)]


def _configurations(stack: LayerStack, limit: int) -> list[Settings]:
    """Grids of 2 x 2 and 4 x 4 blocks, with the largest rank that fits."""
    configurations: list[Settings] = []
    for side in _squares(stack):
        count = functools.partial(_parameters, stack.layers, stack.shape, rows=side, columns=side)
        rank = largest(count, limit, min(stack.shape) // side)
        if rank:
            configurations.append({"rank": rank, "rows": side, "columns": side})
    return configurations


def _configurations_of_terms(stack: LayerStack, limit: int) -> list[Settings]:
    """The same grids, with the largest number of terms that fits."""
    configurations: list[Settings] = []
    for side in _squares(stack):
        count = functools.partial(_parameters_of_terms, stack.layers, stack.shape, rows=side, columns=side)
        terms = largest(count, limit, stack.layers * side * min(stack.shape))
        if terms:
            configurations.append({"terms": terms, "rows": side, "columns": side})
    return configurations


BLOCK_LORA = Method("block_lora", "block LoRA", fit_block_lora, _parameters, _configurations)
ALLOCATED_BLOCKS = Method(
    "allocated_blocks", "blocks, allocated", fit_allocated_blocks, _parameters_of_terms, _configurations_of_terms
)
