"""What is to be reconstructed: the stack of updates M_i, read through thin products, and the budget of ranks."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rasa_theory import linalg
from rasa_theory.common import InputError, NotFinite, whole_number
from rasa_theory.distributed import LayerSharding
from rasa_theory.linalg import orthogonal
from rasa_theory.problem.budget import Shaped
from rasa_theory.problem.inputs import as_storage
from rasa_theory.problem.storage import Divided, Factored, InMemory, Spill, Storage

_LARGEST_EXPONENT = {torch.float32: 100, torch.float64: 500}  # beyond 2^+-this, squares or products leave the range
_TILE_ELEMENTS = 1 << 22
_CACHED_ELEMENTS = 1 << 19  # tiles of products: what was converted is still in the cache when it is multiplied
_SVD_COPIES = 8  # of a layer in float64: what its SVD takes with its workspace
_LAYER_COPIES = 4  # what any other work on a whole layer takes: itself, scaled, in float32, and a search's bases


def check_memory(stack: Shaped, memory: int, decomposed: bool = True) -> None:
    """Raise InputError if half of `memory` (bytes) is not enough for the work on one layer of `stack`.

    That is its exact SVD if `decomposed`, else all other work that needs a whole layer.
    """
    b, a = stack.shape
    needed = 2 * (_SVD_COPIES if decomposed else _LAYER_COPIES) * 8 * b * a
    if needed > memory:
        work = "the exact SVD of one" if decomposed else "the work on one"
        raise InputError(
            f"memory of {memory / 2**20:.4g} MiB is too little for stack {stack.name!r}: its layers of {b} x {a} need "
            f"{needed / 2**20:.4g} MiB, twice what {work} takes; allow so much",
            "memory",
        )


class Tile(NamedTuple):
    """Rows of one layer: `values` is M_layer[rows], (rows, a); `layer` counts those that this process holds."""

    layer: int
    rows: slice
    values: Tensor


class SVD(NamedTuple):
    """Exact thin SVDs of a stack in float64: U (L, b, m), S (L, m), Vh (L, m, a), m = min(b, a)."""

    U: Tensor
    S: Tensor
    Vh: Tensor


@dataclass
class _Store:
    """What all views of one stack share: the count of passes, and facts about M / scale computed once."""

    passes: int = 0
    svd: SVD | None = None
    spectra: Tensor | None = None
    grams: dict[bool, Tensor] = field(default_factory=dict)  # by whether the view is transposed
    layer_norms_squared: Tensor | None = field(default=None)


class LayerStack:
    """The updates M_i in R^(b x a), i = 1..L, of one kind of module in L layers.

    `values`: an (L, b, a) array or tensor, or a list of L matrices of equal shape; real floating point, finite, not
    empty. Or a `Storage`, which reads them from files, or holds them as products of thin factors (`Factored`). The
    memory is borrowed where dtype and device allow, and never written. `dtype`, of the computation (None: the input's;
    half precisions compute in float32), is float32 or float64. Narrower values stay as they are, and are converted a
    tile at a time; factors are converted at once. `device` None keeps the input's.

    Solvers read M through `right`, `left` and `tiles` alone, which count the passes over the data. They work on the
    view `unit()`, whose entries are divided by the power of two `scale`, so that the norm of M neither overflows nor
    underflows when it is squared.

    `memory` (bytes; None: no limit) bounds what is allocated for M on the CPU: a quarter for entries that are kept
    (sources leave larger stacks on disk), a quarter for the exact SVDs (larger ones lie in a temporary file of
    8 L min(b, a) (b + a) bytes, mapped, whose pages the system drops when it needs memory), half for the work on one
    layer: what needs more raises InputError. It does not bound torch itself, what is thin (factors, products with M,
    the bases of the default solver, up to half as wide as M), the few b x b and a x a matrices of bounds, and what the
    searches for floors keep.

    `tf32`, False unless set: products may round to TF32 on CUDA. Errors are the float64 residual all the same.

    `sharding`, with several processes: `values` are those of the layers that this one holds, (held, b, a), and all
    processes make the stack together. What is said of `right`, `left`, `tiles`, `svd` and `layer_norms` holds of these
    layers; the other facts are those of all L.

    Raises InputError, a sentence that names the layer and the entry or shape found.
    """

    tf32 = False

    def __init__(
        self,
        values: Any,
        name: str = "stack",
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        memory: int | None = None,
        sharding: LayerSharding | None = None,
    ) -> None:
        self.name = name
        held = None if sharding is None else sharding.local_layers
        self._storage, self._dtype, self._device = as_storage(values, name, dtype, device, held)
        self.sharding = LayerSharding((self._storage.shape[0],)) if sharding is None else sharding
        self._memory = None if memory is None else whole_number("memory", memory)
        self._gain = 1.0
        self._flipped = False
        self._store = _Store()
        self._power = self._find_power()

    def _find_power(self) -> float:
        """The power of two just above the largest entry; 1 for a zero stack. Checks that all is finite on the way."""
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
        return math.ldexp(1.0, exponent) if largest > 0 else 1.0

    def _largest_entry(self) -> float:
        largest = 0.0
        for i, rows, M in self._stored_tiles():
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
    def scale(self) -> float:
        """The power of two just above the largest entry of M (1 for a zero stack, and in the view `unit()`)."""
        return self._power * self._gain

    @property
    def values(self) -> Tensor:
        """M as one tensor (L, b, a) of `dtype`: borrowed where it can be, else a copy; solvers do not read it."""
        whole = self._whole
        if whole is None:
            _, b, _ = self._storage.shape
            whole = torch.empty(self._storage.shape, dtype=self.dtype, device=self.device)
            for i, rows, M in self._stored_tiles(rows=b):
                whole[i, rows] = M
        oriented = whole.mT if self._flipped else whole
        return oriented if self._gain == 1.0 else oriented * self._gain

    @property
    def _whole(self) -> Tensor | None:
        """M as it is stored, if that is one tensor in the dtype of the computation."""
        held = self._storage
        return held.values if isinstance(held, InMemory) and held.dtype == self.dtype else None

    @property
    def layers(self) -> int:
        """L, of all processes together."""
        return self.sharding.layers

    @property
    def shape(self) -> tuple[int, int]:
        """(b, a) of one layer."""
        _, b, a = self._storage.shape
        return (a, b) if self._flipped else (b, a)

    @property
    def dtype(self) -> torch.dtype:
        """Of the computation: float32 or float64."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Where the computation runs, and where M lies unless it is read from files."""
        return self._device

    @property
    def memory(self) -> int | None:
        """The limit in bytes, or None."""
        return self._memory

    @property
    def eps(self) -> float:
        """Machine epsilon of `dtype`."""
        return float(torch.finfo(self.dtype).eps)

    @property
    def layer_norms_squared(self) -> list[float]:
        """||M_i||_F^2 of each of the L layers."""
        factor = self.scale**2
        return [factor * x for x in self._unit_norms_squared().tolist()]

    def layer_norms(self, dtype: torch.dtype | None = None) -> Tensor:
        """||M_i||_F of each layer held, (L,), on the device of the stack, in its dtype unless another is given."""
        norms = torch.tensor(self.layer_norms_squared[self.sharding.local], dtype=torch.float64).sqrt()
        return norms.to(self.device, dtype or self.dtype)

    @property
    def norm_squared(self) -> float:
        """||M||^2 = sum_i ||M_i||_F^2."""
        return math.fsum(self.layer_norms_squared)

    @property
    def rounding(self) -> float:
        """Tolerance, in units of norm, of comparisons between errors on this stack: 10 max(b, a) eps ||M||."""
        unit_norm = math.sqrt(math.fsum(self._unit_norms_squared().tolist()))
        return linalg.rounding(unit_norm * self.scale, self.shape, self.eps)

    @property
    def data_passes(self) -> int:
        """How often all of M has been read so far, by all views of this stack."""
        return self._store.passes

    def _unit_norms_squared(self) -> Tensor:
        if self._store.layer_norms_squared is None:
            norms = torch.zeros(self.sharding.local_layers, dtype=torch.float64)
            for i, _, M in self._stored_tiles(1 / self._power):
                norms[i] += float((M.double() ** 2).sum())
            self._store.layer_norms_squared = self.sharding.all_gather(norms)
        return self._store.layer_norms_squared

    # ---- access to M

    def right(self, X: Tensor) -> Tensor:
        """M_i X: (a, n) or (L, a, n) -> (L, b, n). One pass."""
        return self._product(X, self._flipped)

    def left(self, Y: Tensor) -> Tensor:
        """M_i^T Y: (b, n) or (L, b, n) -> (L, a, n). One pass."""
        return self._product(Y, not self._flipped)

    def _product(self, X: Tensor, transposed: bool) -> Tensor:
        """M_i X, or M_i^T X, in the orientation stored: at once, or tile by tile."""
        self._store.passes += 1
        with linalg.tf32(self.tf32 and self.device.type == "cuda"):
            if (M := self._whole) is not None:
                product = linalg.product(M.mT if transposed else M, X)
            elif isinstance(self._storage, Factored):
                product = self._storage.product(X, transposed)
            else:
                product = self._product_by_tiles(X, transposed)
        return product if self._gain == 1.0 else product * self._gain

    def _product_by_tiles(self, X: Tensor, transposed: bool) -> Tensor:
        L, b, a = self._storage.shape
        product = X.new_zeros(L, X.shape[-1], a if transposed else b).mT  # laid out as `linalg.product` does
        X = X.expand(L, -1, -1)
        for i, rows, M in self._stored_tiles(rows=max(1, _CACHED_ELEMENTS // a) if self.device.type == "cpu" else b):
            if transposed:
                product[i] += linalg.product(M.mT, X[i, rows])
            else:
                product[i, rows] = linalg.product(M, X[i])
        return product

    def tiles(self, rows: int | None = None) -> Iterator[Tile]:
        """All of M in blocks of at most `rows` rows of one layer (None: some 4 million entries). One pass."""
        if rows is not None and rows >= self.shape[0]:
            self._check_memory(decomposed=False)
        self._store.passes += 1
        yield from self._tiles_of_columns(rows) if self._flipped else self._stored_tiles(self._gain, rows)

    def _stored_tiles(self, gain: float = 1.0, rows: int | None = None) -> Iterator[Tile]:
        """gain M in the orientation stored, in the dtype and on the device of the computation."""
        L, b, a = self._storage.shape
        step = self._rows_of(a) if rows is None else rows
        for i in range(L):
            for start in range(0, b, step):
                stop = min(start + step, b)
                yield Tile(i, slice(start, stop), self._computed(self._storage.rows(i, start, stop), gain))

    def _tiles_of_columns(self, rows: int | None) -> Iterator[Tile]:
        """The tiles of a transposed view, cut from one layer at a time."""
        L, b, a = self._storage.shape
        step = self._rows_of(b) if rows is None else rows
        for i in range(L):
            layer = self._storage.rows(i, 0, b).mT
            for start in range(0, a, step):
                stop = min(start + step, a)
                yield Tile(i, slice(start, stop), self._computed(layer[start:stop], self._gain))

    def _rows_of(self, width: int) -> int:
        """Rows of a tile by default."""
        return max(1, _TILE_ELEMENTS // width)

    def _computed(self, block: Tensor, gain: float) -> Tensor:
        block = block.to(self._device, self._dtype)
        return block if gain == 1.0 else block * gain

    def svd(self) -> SVD:
        """The exact SVD of every layer, in float64. Computed once (one pass) and kept for all views.

        Of a factored stack from the factors, B_i A_i in float64 unrounded, completed to m = min(b, a) terms: singular
        values 0, and singular vectors in any directions orthogonal to the others.
        """
        if self._store.svd is None:
            self._check_memory(decomposed=True)
            self._store.passes += 1
            L, b, a = self._storage.shape
            size = 8 * L * min(b, a) * (b + a)
            spilled = self._memory is not None and 4 * size > self._memory and self.device.type == "cpu"
            self._store.svd = self._spilled_svd() if spilled else self._svd_in_memory()
        U, S, Vh = self._store.svd
        S = S * self.scale
        return SVD(Vh.mT, S, U.mT) if self._flipped else SVD(U, S, Vh)

    def singular_values(self) -> Tensor:
        """Those of all L layers, falling, (L, min(b, a)) in float64; one pass, unless the SVDs are known."""
        if self._store.spectra is None:
            if self._store.svd is not None or isinstance(self._storage, Factored):
                S = self.unit().svd().S
            else:
                self._check_memory(decomposed=False)
                self._store.passes += 1
                S = torch.empty(self.sharding.local_layers, min(self.shape), dtype=torch.float64, device=self.device)
                for i, _, M in self._stored_tiles(1 / self._power, rows=self._storage.shape[1]):
                    S[i] = linalg.singular_values(M.double())
            self._store.spectra = self.sharding.all_gather(S)
        return self._store.spectra * self.scale

    def _check_memory(self, decomposed: bool) -> None:
        if self._memory is not None:
            check_memory(self, self._memory, decomposed)

    def _svd_in_memory(self) -> SVD:
        L, b, a = self._storage.shape
        m = min(b, a)
        shapes = ((L, b, m), (L, m), (L, m, a))
        U, S, Vh = (torch.empty(shape, dtype=torch.float64, device=self.device) for shape in shapes)
        for i, layer in enumerate(self._layer_svds()):
            U[i], S[i], Vh[i] = layer
        return SVD(U, S, Vh)

    def _spilled_svd(self) -> SVD:
        """In temporary files, singular vector by singular vector: the leading ones of a layer are few pages."""
        L, b, a = self._storage.shape
        m = min(b, a)
        left, S, right = Spill(L, m, b), torch.empty(L, m, dtype=torch.float64), Spill(L, m, a)
        for i, (U, sigma, Vh) in enumerate(self._layer_svds()):
            S[i] = sigma
            left.add(U.mT)
            right.add(Vh)
            del U, Vh  # before the next layer is read
        return SVD(left.tensor().mT, S, right.tensor())

    def _layer_svds(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """U (b, m), S (m,) and Vh (m, a) of M / scale in float64, m = min(b, a), one layer after the other."""
        L, b, a = self._storage.shape
        held, m = self._storage, min(b, a)
        if isinstance(held, Factored) and held.B.shape[2] <= m:
            for i in range(L):
                U, S, Vh = orthogonal.product_svd(held.B[i].double() / self._power, held.A[i].double())
                S = torch.nn.functional.pad(S, (0, m - len(S)))
                yield orthogonal.extended(U, m), S, orthogonal.extended(Vh.mT, m).mT
            return
        for _, _, M in self._stored_tiles(1 / self._power, rows=b):
            yield linalg.svd(M.double())
            del M

    def gram(self) -> Tensor:
        """sum_i M_i M_i^T of all L layers in float64, (b, b).

        Computed once per orientation (one pass) and kept for all views.
        """
        if self._flipped not in self._store.grams:
            self._store.passes += 1
            b = self.shape[0]
            gram = torch.zeros(b, b, dtype=torch.float64, device=self.device)
            for _, _, stored in self._stored_tiles(1 / self._power, rows=self._storage.shape[1]):
                M = (stored.mT if self._flipped else stored).double()
                gram += M @ M.mT
            self._store.grams[self._flipped] = self.sharding.all_reduce(gram)
        return self._store.grams[self._flipped] * self.scale**2

    def suitable_threads(self) -> AbstractContextManager[None]:
        """Within it, torch uses the number of threads that suits matrices of this size."""
        return linalg.suitable_threads(torch.empty((), device=self.device).expand(self.shape))

    # ---- views

    def unit(self) -> LayerStack:
        """The same stack in units of `scale`: products, tiles and singular values of M / scale; nothing is copied."""
        view = copy.copy(self)
        view._gain = 1 / self._power
        return view

    def transpose(self) -> LayerStack:
        """The same stack with every M_i transposed; nothing is copied."""
        view = copy.copy(self)
        view._flipped = not self._flipped
        return view

    def normalised_layers(self) -> tuple[LayerStack, list[float]]:
        """A stack with every nonzero M_i divided by its norm, and the norms (1 for zero layers).

        A copy if M is in memory, or if its factors are, else M divided as it is read. The norms are those of the layers
        held.
        """
        largest, squares = [0.0] * self.sharding.local_layers, [0.0] * self.sharding.local_layers
        for i, _, M in self._stored_tiles():
            largest[i] = max(largest[i], float(M.abs().amax()))
        divisors = [x or 1.0 for x in largest]  # squares of a layer that is 1e-160 of the others leave the range
        for i, _, M in self._stored_tiles():
            squares[i] += float(((M / divisors[i]).double() ** 2).sum())
        relative = [math.sqrt(x) or 1.0 for x in squares]
        units: Storage = Divided(self._storage, self.dtype, divisors, relative)
        if isinstance(self._storage, InMemory):
            L, b, a = units.shape
            values = torch.empty(L, b, a, dtype=self.dtype, device=self.device)
            for i in range(L):
                values[i] = units.rows(i, 0, b)
            units = InMemory(values)
        elif isinstance(self._storage, Factored):
            units = self._storage.divided(divisors, relative)
        stack = LayerStack(units, self.name, self.dtype, self.device, self._memory, self.sharding)
        stack.tf32 = self.tf32
        norms = [x * y * self._gain if x > 0 else 1.0 for x, y in zip(largest, relative, strict=True)]
        return stack.transpose() if self._flipped else stack, norms

    def __repr__(self) -> str:
        b, a = self.shape
        return f"LayerStack({self.name!r}, {self.layers} x {b} x {a}, {self.dtype}, {self.device})"
