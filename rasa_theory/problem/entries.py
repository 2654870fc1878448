"""The stored entries of a stack: read in tiles, multiplied by thin factors, and every read of them counted."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from rasa_theory import linalg
from rasa_theory.common import InputError, NotFinite
from rasa_theory.distributed import LayerSharding
from rasa_theory.problem.memory import check_memory
from rasa_theory.problem.storage import Factored, InMemory, Storage

# The largest entry must lie within 2^+-this: beyond, squared errors (float64) or products with M (float32) leave the
# range. A factor of 2^24 is left for the sum of float64 squares, 2^28 for products in float32.
_LARGEST_EXPONENT = {torch.float32: 100, torch.float64: 500}


class Purpose(Enum):
    """The purpose of one pass over M; its value is the field of `PassCounts` that counts it."""

    PRODUCTS = "products"
    SPECTRA = "spectra"
    CHECKS = "checks"
    COPIES = "copies"


@dataclass
class PassCounts:
    """Passes over M so far, by purpose. A pass reads every local entry once.

    Attributes:
        products: passes of `right`, `left` and `tiles`.
        spectra: passes for SVDs, singular values and Gram matrices.
        checks: passes for the largest entry (one at construction), the norms (one at first use) and the weighting of
            layers.
        copies: passes for copies of M: `values`, where they are not borrowed, and weighted entries in memory.
    """

    products: int = 0
    spectra: int = 0
    checks: int = 0
    copies: int = 0

    def add(self, purpose: Purpose) -> None:
        """Count one pass."""
        setattr(self, purpose.value, getattr(self, purpose.value) + 1)

    @property
    def total(self) -> int:
        """The number of passes for any purpose."""
        return sum(getattr(self, f.name) for f in fields(self))


class Tile(NamedTuple):
    """Rows of one layer: `values` is M_layer[rows], (rows, a); `layer` is the index among the local layers."""

    layer: int
    rows: slice
    values: Tensor


@dataclass(eq=False)
class StackEntries:
    """The stored entries of a stack, neither scaled nor transposed, which all its views share.

    Reads convert a block at a time to the dtype and device of the computation. `power` is the power of two just above
    the largest entry, or 1 for a zero stack. Raises InputError if an entry is not finite, or if squared errors would
    leave the range of the dtype.
    """

    storage: Storage
    name: str
    dtype: torch.dtype
    device: torch.device
    memory: int | None
    sharding: LayerSharding
    tf32: bool
    passes: PassCounts = field(default_factory=PassCounts)
    power: float = field(init=False)

    # Entries of a tile, unless the caller names its number of rows: 32 MiB in float64.
    tile_elements = 1 << 22
    # Entries of a tile in a product on the CPU, 4 MiB in float64: converted entries are multiplied while in the cache.
    cached_elements = 1 << 19

    def __post_init__(self) -> None:
        with self.sharding.processes.raise_together():
            largest = self._largest_entry()
        largest = self.sharding.all_reduce_max(torch.tensor([largest], dtype=torch.float64))
        exponent = math.frexp(largest)[1]
        limit = _LARGEST_EXPONENT[self.dtype]
        if largest > 0 and abs(exponent) > limit:
            raise InputError(
                f"stack {self.name!r}: the largest entry is {largest:.3g}, outside 2^-{limit} .. 2^{limit}, where "
                f"squared errors can be computed in {self.dtype}; multiply the stack by a constant"
            )
        self.power = math.ldexp(1.0, exponent) if largest > 0 else 1.0

    def _largest_entry(self) -> float:
        """Return the largest absolute value of the local layers; raise NotFinite, which names the entry."""
        largest = 0.0
        for i, rows, M in self.tiles(Purpose.CHECKS):
            low, high = (float(x) for x in torch.aminmax(M))
            if not (math.isfinite(low) and math.isfinite(high)):
                row, column = torch.nonzero(~torch.isfinite(M))[0].tolist()
                raise NotFinite(
                    f"stack {self.name!r}: layer {self.sharding.first + i}, entry ({rows.start + row}, {column}) is "
                    f"{float(M[row, column])}; all entries must be finite",
                    i,
                )
            largest = max(largest, -low, high)
        return largest

    # ---- facts

    @property
    def shape(self) -> tuple[int, int]:
        """The stored shape (b, a) of one layer."""
        _, b, a = self.storage.shape
        return b, a

    @property
    def whole(self) -> Tensor | None:
        """M as one tensor (L, b, a) if it is stored so, in the dtype of the computation; else None."""
        storage = self.storage
        return storage.values if isinstance(storage, InMemory) and storage.dtype == self.dtype else None

    @functools.cached_property
    def unit_norms_squared(self) -> Tensor:
        """||M_i / power||_F^2 of all L layers, in float64 on the CPU: (L,)."""
        norms = torch.zeros(self.sharding.local_layers, dtype=torch.float64)
        for i, _, M in self.tiles(Purpose.CHECKS, 1.0, self.cached_rows(self.shape[1])):
            norms[i] += float((M.double() / self.power).square_().sum())
        return self.sharding.all_gather(norms)

    @property
    def unit_norm_squared(self) -> float:
        """||M / power||_F^2 over all layers."""
        return math.fsum(self.unit_norms_squared.tolist())

    def check_memory(self, decomposed: bool) -> None:
        """Raise InputError if the limit on memory is too low for the work on one layer, see `memory.check_memory`."""
        if self.memory is not None:
            check_memory(self, self.memory, decomposed)

    # ---- reads, each of them one pass

    def copy(self) -> Tensor:
        """Return M as one tensor (L, b, a), borrowed if it is stored so, else copied."""
        if (borrowed := self.whole) is not None:
            return borrowed
        M = torch.empty(self.storage.shape, dtype=self.dtype, device=self.device)
        for i, rows, values in self.tiles(Purpose.COPIES, rows=self.shape[0]):
            M[i, rows] = values
        return M

    def product(self, X: Tensor, transposed: bool) -> Tensor:
        """Return M_i X or, if `transposed`, M_i^T X: in one product for a tensor or factors, else tile by tile."""
        self.passes.add(Purpose.PRODUCTS)
        with linalg.tf32(self.tf32 and self.device.type == "cuda"):
            if (M := self.whole) is not None:
                return linalg.product(M.mT if transposed else M, X)
            if isinstance(self.storage, Factored):
                return self.storage.product(X, transposed)
            return self._product_by_tiles(X, transposed)

    def _product_by_tiles(self, X: Tensor, transposed: bool) -> Tensor:
        """Return the product while holding one converted tile; off the CPU a tile is a whole layer."""
        L, b, a = self.storage.shape
        product = X.new_zeros(L, X.shape[-1], a if transposed else b).mT  # laid out as `linalg.product` does
        X_i = X.expand(L, -1, -1)
        for i, rows, M in self._tiles(1.0, self.cached_rows(a) or b):
            if transposed:
                product[i] += linalg.product(M.mT, X_i[i, rows])
            else:
                product[i, rows] = linalg.product(M, X_i[i])
        return product

    def cached_rows(self, columns: int) -> int | None:
        """The number of rows of this length that stay in the cache of a CPU; None on other devices."""
        return max(1, self.cached_elements // columns) if self.device.type == "cpu" else None

    def tiles(self, purpose: Purpose, gain: float = 1.0, rows: int | None = None) -> Iterator[Tile]:
        """Yield gain M in blocks of at most `rows` rows of one layer; None: of `tile_elements` entries."""
        self.passes.add(purpose)
        yield from self._tiles(gain, max(1, self.tile_elements // self.shape[1]) if rows is None else rows)

    def _tiles(self, gain: float, step: int) -> Iterator[Tile]:
        L, b, _ = self.storage.shape
        for i in range(L):
            for start in range(0, b, step):
                stop = min(start + step, b)
                yield Tile(i, slice(start, stop), self._computed(self.storage.rows(i, start, stop), gain))

    def transposed_tiles(self, purpose: Purpose, gain: float = 1.0, rows: int | None = None) -> Iterator[Tile]:
        """Yield gain M_i^T in blocks of rows, like `tiles`. Every layer is read as a whole."""
        self.passes.add(purpose)
        L, b, a = self.storage.shape
        step = max(1, self.tile_elements // b) if rows is None else rows
        for i in range(L):
            layer = self.storage.rows(i, 0, b).mT
            for start in range(0, a, step):
                stop = min(start + step, a)
                yield Tile(i, slice(start, stop), self._computed(layer[start:stop], gain))

    def _computed(self, block: Tensor, gain: float) -> Tensor:
        converted = block.to(self.device, self.dtype)
        return converted if gain == 1.0 else converted * gain
