"""The stack of updates M_i to reconstruct, read through thin products and tiles."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from rasa_theory import linalg
from rasa_theory.common import whole_number
from rasa_theory.distributed import LayerSharding
from rasa_theory.problem.budget import RankBudget
from rasa_theory.problem.entries import PassCounts, Purpose, StackEntries, Tile
from rasa_theory.problem.inputs import as_storage
from rasa_theory.problem.leading import LeadingParts
from rasa_theory.problem.memory import check_memory
from rasa_theory.problem.spectra import ExactDecompositions, StackSpectra, takes_leading


class LayerStack:
    """The updates M_i in R^(b x a), i = 1..L, of one kind of module in L layers.

    Solvers read M through `right`, `left` and `tiles` alone. SVDs and all else that needs a whole layer at once come
    from `spectra`. Every read of M is counted in `passes`.

    A stack is a view of its entries: scaled by a power of two, and transposed or not. `unit()` and `transpose()` return
    other views, which copy nothing and share the pass counts, the norms and the cached spectra. Solvers work on
    `unit()`, whose entries are divided by `scale`, so that the norm of M neither overflows nor underflows when squared.

    Arguments:
        values: an (L, b, a) array or tensor, or a list of L matrices (b, a); real floating point, finite, not empty.
            Their memory is borrowed where dtype and device allow, and never written. A `Storage` reads entries from
            files, or holds them as products of thin factors (`Factored`).
        name: the name of the stack in messages and results.
        dtype: float32 or float64, the dtype of the computation. None: the dtype of `values`, or float32 for half
            precisions. Narrower values are stored as they are and converted a tile at a time; factors are converted at
            once.
        device: the device of the computation. None: the device of `values`.
        memory: limit in bytes on the memory for M on the CPU; None: no limit. A quarter is for entries that stay in
            memory (sources leave larger stacks in their files). A quarter is for exact SVDs. Larger ones are mapped
            from a temporary file of 8 L min(b, a) (b + a) bytes, whose pages the system drops when it needs memory.
            Half is for the work on one layer. The limit does not cover torch itself, nor thin matrices: factors,
            products with M, and the bases of the default solver, up to half as wide as M. Nor does it cover the few
            matrices of b x b and a x a of bounds, and the searches for floors.
        sharding: with several processes, the layers that each one holds. All processes construct the stack together,
            each from the `values` of its local layers. `right`, `left`, `tiles`, `spectra.svd` and `layer_norms` then
            refer to the local layers; all other facts are global.
        tf32: let products round to TF32 on CUDA. Errors are measured in float64 all the same.

    Raises:
        InputError: `values`, `dtype`, `device` or `memory` cannot be used; the message names the layer and the entry or
            shape.
    """

    def __init__(
        self,
        values: Any,
        name: str = "stack",
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        memory: int | None = None,
        sharding: LayerSharding | None = None,
        *,
        tf32: bool = False,
    ) -> None:
        local_layers = None if sharding is None else sharding.local_layers
        storage, computed, place = as_storage(values, name, dtype, device, local_layers)
        shards = LayerSharding((storage.shape[0],)) if sharding is None else sharding
        limit = None if memory is None else whole_number("memory", memory)
        self._entries = StackEntries(storage, name, computed, place, limit, shards, tf32)
        self._exact, self._leading = ExactDecompositions(self._entries), LeadingParts(self._entries)
        self._gain, self._transposed, self._by_products = 1.0, False, False

    # ---- views

    def unit(self) -> LayerStack:
        """Return the view in units of `scale`: products, tiles and spectra of M / scale. Nothing is copied."""
        return self._view(1 / self._entries.power, self._transposed)

    def transpose(self) -> LayerStack:
        """Return the view with every M_i transposed. Nothing is copied."""
        return self._view(self._gain, not self._transposed)

    def with_spectra(self, spectra: str, budget: RankBudget) -> LayerStack:
        """Return the view whose `spectra` suit work at this budget. Nothing is copied.

        Arguments:
            spectra: "exact" for SVDs, "leading" for leading directions from products with M, "auto" for these where
                they cost less: min(b, a) >= 768 and L r <= min(b, a) / 8.
            budget: the ranks that the work needs.
        """
        view = self._view(self._gain, self._transposed)
        view._by_products = takes_leading(spectra, self, budget.rank)
        return view

    def _view(self, gain: float, transposed: bool) -> LayerStack:
        """Another view of the same entries.

        A view is gain, orientation and kind of spectra beside objects that all views share: the entries, with the norms
        and the pass counts, and their decompositions, with the caches. `__init__` would read M again, so it is not
        called.
        """
        view = LayerStack.__new__(LayerStack)
        view._entries, view._exact, view._leading = self._entries, self._exact, self._leading
        view._gain, view._transposed, view._by_products = gain, transposed, self._by_products
        return view

    # ---- facts

    @property
    def name(self) -> str:
        """The name of the stack in messages and results."""
        return self._entries.name

    @property
    def layers(self) -> int:
        """The number of layers L, summed over all processes."""
        return self.sharding.layers

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (b, a) of one layer."""
        b, a = self._entries.shape
        return (a, b) if self._transposed else (b, a)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the computation: float32 or float64."""
        return self._entries.dtype

    @property
    def device(self) -> torch.device:
        """The device of the computation; M is stored there too, unless it is read from files."""
        return self._entries.device

    @property
    def memory(self) -> int | None:
        """The limit on memory in bytes, or None."""
        return self._entries.memory

    @property
    def sharding(self) -> LayerSharding:
        """The layers that each process holds."""
        return self._entries.sharding

    @property
    def tf32(self) -> bool:
        """True if products may round to TF32 on CUDA."""
        return self._entries.tf32

    @property
    def eps(self) -> float:
        """The machine epsilon of `dtype`."""
        return float(torch.finfo(self.dtype).eps)

    @property
    def scale(self) -> float:
        """The power of two just above the largest entry of M; 1 for a zero stack and for the view `unit()`."""
        return self._entries.power * self._gain

    @property
    def transposed(self) -> bool:
        """True if this view transposes the stored matrices."""
        return self._transposed

    @property
    def layer_norms_squared(self) -> list[float]:
        """||M_i||_F^2 of each of the L layers."""
        factor = self.scale**2
        return [factor * x for x in self._entries.unit_norms_squared.tolist()]

    def layer_norms(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return ||M_i||_F of each local layer, (L,), on the device of the stack; `dtype` None: in its dtype."""
        norms = torch.tensor(self.layer_norms_squared[self.sharding.local], dtype=torch.float64).sqrt()
        return norms.to(self.device, dtype or self.dtype)

    @property
    def norm_squared(self) -> float:
        """||M||^2 = sum_i ||M_i||_F^2."""
        return math.fsum(self.layer_norms_squared)

    @property
    def rounding(self) -> float:
        """The tolerance for comparisons of errors on this stack, not squared: 10 max(b, a) eps ||M||."""
        unit_norm = math.sqrt(self._entries.unit_norm_squared)
        return linalg.rounding(unit_norm * self.scale, self.shape, self.eps)

    @property
    def passes(self) -> PassCounts:
        """All passes over M so far, by purpose, summed over all views."""
        return self._entries.passes

    @property
    def data_passes(self) -> int:
        """The number of passes over M for solvers and bounds: `passes.products` + `passes.spectra`.

        It excludes the check of the entries at construction, the pass for the norms, weighting, and copies.
        """
        return self.passes.products + self.passes.spectra

    # ---- access to M

    def right(self, X: Tensor) -> Tensor:
        """Return M_i X: (a, n) or (L, a, n) -> (L, b, n). This is one pass."""
        return self._scaled(self._entries.product(X, self._transposed))

    def left(self, Y: Tensor) -> Tensor:
        """Return M_i^T Y: (b, n) or (L, b, n) -> (L, a, n). This is one pass."""
        return self._scaled(self._entries.product(Y, not self._transposed))

    def tiles(self, rows: int | None = None) -> Iterator[Tile]:
        """Yield M in blocks of at most `rows` rows of one layer (None: about 4 million entries). This is one pass."""
        if rows is not None and rows >= self.shape[0] and self.memory is not None:
            check_memory(self, self.memory, decomposed=False)
        tiles = self._entries.transposed_tiles if self._transposed else self._entries.tiles
        return tiles(Purpose.PRODUCTS, self._gain, rows)

    def cached_tiles(self) -> Iterator[Tile]:
        """Yield M in blocks of rows that stay in the cache of a CPU while they are worked on. This is one pass."""
        return self.tiles(self._entries.cached_rows(self.shape[1]))

    @property
    def values(self) -> Tensor:
        """M as one tensor (L, b, a) of `dtype`, borrowed if it is stored so, else copied. Solvers do not use it."""
        M = self._entries.copy()
        return self._scaled(M.mT if self._transposed else M)

    @property
    def entries(self) -> StackEntries:
        """The stored entries, which all views share."""
        return self._entries

    @property
    def spectra(self) -> StackSpectra:
        """SVDs, singular values, Gram matrices and leading directions of this view, computed once for all views."""
        return StackSpectra(self._exact, self._leading, self.scale, self._transposed, self._by_products)

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self._gain == 1.0 else x * self._gain

    def suitable_threads(self) -> AbstractContextManager[None]:
        """Within this context, torch uses the number of threads that suits matrices of this size."""
        return linalg.suitable_threads_for_stack(self.device, self.shape)

    def __repr__(self) -> str:
        b, a = self.shape
        return f"LayerStack({self.name!r}, {self.layers} x {b} x {a}, {self.dtype}, {self.device})"
