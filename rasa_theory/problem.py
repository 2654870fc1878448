"""What is to be reconstructed: the stack of updates M_i, read through thin products, and the budget of ranks."""

from __future__ import annotations

import copy
import math
import operator
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from rasa_theory import linalg
from rasa_theory.errors import InputError

_COMPUTE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
_COMPUTE |= {torch.float32: torch.float32, torch.float64: torch.float64}
_LARGEST_EXPONENT = {torch.float32: 100, torch.float64: 500}  # beyond 2^+-this, squares or products leave the range
_TILE_ELEMENTS = 1 << 22


class Shaped(Protocol):
    """Anything with a name and the shape (b, a) of its layers: a stack, or one that is not read yet."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, int]: ...


def whole_number(name: str, value: Any) -> int:
    """`value` as an int; raises InputError, naming `name`, if it is none (True and 2.0 are none)."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise InputError(f"{name} must be a whole number, got {value!r}") from None


@dataclass(frozen=True)
class RankBudget:
    """Ranks of one layer: r = `rank` in all, k = `shared_rank` of them given to the pool.

    Raises InputError (a ValueError) unless both are whole numbers, 1 <= r and 0 <= k <= r.
    """

    rank: int
    shared_rank: int

    def __post_init__(self) -> None:
        for name in ("rank", "shared_rank"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))
        if self.rank < 1:
            raise InputError(f"rank must be at least 1, got {self.rank}")
        if self.shared_rank < 0:
            raise InputError(f"shared_rank must be at least 0, got {self.shared_rank}")
        if self.shared_rank > self.rank:
            raise InputError(f"shared_rank {self.shared_rank} exceeds rank {self.rank}")

    @property
    def private_rank(self) -> int:
        """q = r - k, the ranks that a layer keeps."""
        return self.rank - self.shared_rank

    def pool_rank(self, layers: int) -> int:
        """R = L k, the ranks in the pool of `layers` layers."""
        return layers * self.shared_rank

    def check_fits(self, stack: Shaped) -> None:
        """Raise InputError if r exceeds min(b, a) of `stack`."""
        b, a = stack.shape
        if self.rank > min(b, a):
            raise InputError(
                f"rank {self.rank} exceeds min(b, a) = {min(b, a)} of stack {stack.name!r} ({b} x {a}); lower the rank"
            )


class Tile(NamedTuple):
    """Rows of one layer: `values` is M_layer[rows], (rows, a)."""

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
    grams: dict[bool, Tensor] = field(default_factory=dict)  # by whether the view is transposed
    layer_norms_squared: Tensor | None = field(default=None)


class LayerStack:
    """The updates M_i in R^(b x a), i = 1..L, of one kind of module in L layers.

    `values`: an (L, b, a) array or tensor, or a list of L matrices of equal shape; real floating point, finite, not
    empty. The memory is borrowed where dtype and device allow, and never written. `dtype` (None: what the input has;
    half precisions compute in float32) is float32 or float64; `device` None keeps the input's.

    Solvers read M through `right`, `left` and `tiles` alone, which count the passes over the data. They work on the
    view `unit()`, whose entries are divided by the power of two `scale`, so that the norm of M neither overflows nor
    underflows when it is squared.

    Raises InputError, a sentence that names the layer and the entry or shape found.
    """

    def __init__(
        self,
        values: Any,
        name: str = "stack",
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        self.name = name
        self._M = _as_stack(values, name, dtype, device)
        self._gain = 1.0
        self._flipped = False
        self._store = _Store()
        self._power = self._find_power()

    def _find_power(self) -> float:
        """The power of two just above the largest entry; 1 for a zero stack. Checks that all is finite on the way."""
        largest = 0.0
        for i, M in enumerate(self._M):
            low, high = (float(x) for x in torch.aminmax(M))
            if not (math.isfinite(low) and math.isfinite(high)):
                row, column = torch.nonzero(~torch.isfinite(M))[0].tolist()
                raise InputError(
                    f"stack {self.name!r}: layer {i}, entry ({row}, {column}) is {float(M[row, column])}; "
                    "all entries must be finite"
                )
            largest = max(largest, -low, high)
        exponent = math.frexp(largest)[1]
        limit = _LARGEST_EXPONENT[self.dtype]
        if largest > 0 and abs(exponent) > limit:
            raise InputError(
                f"stack {self.name!r}: the largest entry is {largest:.3g}, outside 2^-{limit} .. 2^{limit}, where "
                f"squared errors can be computed in {self.dtype}; multiply the stack by a constant"
            )
        return math.ldexp(1.0, exponent) if largest > 0 else 1.0

    # ---- facts

    @property
    def scale(self) -> float:
        """The power of two just above the largest entry of M (1 for a zero stack, and in the view `unit()`)."""
        return self._power * self._gain

    @property
    def values(self) -> Tensor:
        """The (L, b, a) tensor itself (a scaled copy in the view `unit()`); solvers do not read it."""
        return self._M if self._gain == 1.0 else self._M * self._gain

    @property
    def layers(self) -> int:
        """L."""
        return int(self._M.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """(b, a) of one layer."""
        return int(self._M.shape[1]), int(self._M.shape[2])

    @property
    def dtype(self) -> torch.dtype:
        """Of the computation: float32 or float64."""
        return self._M.dtype

    @property
    def device(self) -> torch.device:
        """Where M lies and the computation runs."""
        return self._M.device

    @property
    def eps(self) -> float:
        """Machine epsilon of `dtype`."""
        return float(torch.finfo(self.dtype).eps)

    @property
    def layer_norms_squared(self) -> list[float]:
        """||M_i||_F^2 of each layer."""
        factor = self.scale**2
        return [factor * x for x in self._unit_norms_squared().tolist()]

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
            norms = torch.zeros(self.layers, dtype=torch.float64)
            for tile in self._tiles(1 / self._power):
                norms[tile.layer] += float((tile.values.double() ** 2).sum())
            self._store.layer_norms_squared = norms
        return self._store.layer_norms_squared

    # ---- access to M

    def right(self, X: Tensor) -> Tensor:
        """M_i X: (a, n) or (L, a, n) -> (L, b, n). One pass."""
        self._store.passes += 1
        product = linalg.product(self._M, X)
        return product if self._gain == 1.0 else product * self._gain

    def left(self, Y: Tensor) -> Tensor:
        """M_i^T Y: (b, n) or (L, b, n) -> (L, a, n). One pass."""
        self._store.passes += 1
        product = linalg.product(self._M.mT, Y)
        return product if self._gain == 1.0 else product * self._gain

    def tiles(self, rows: int | None = None) -> Iterator[Tile]:
        """All of M in blocks of at most `rows` rows of one layer (None: some 4 million entries). One pass."""
        self._store.passes += 1
        yield from self._tiles(self._gain, rows)

    def _tiles(self, gain: float, rows: int | None = None) -> Iterator[Tile]:
        b, a = self.shape
        step = max(1, _TILE_ELEMENTS // a) if rows is None else rows
        for i in range(self.layers):
            for start in range(0, b, step):
                block = self._M[i, start : start + step]
                yield Tile(i, slice(start, min(start + step, b)), block if gain == 1.0 else block * gain)

    def svd(self) -> SVD:
        """The exact SVD of every layer, in float64. Computed once (one pass) and kept for all views."""
        if self._store.svd is None:
            self._store.passes += 1
            L, (b, a) = self.layers, self.shape
            m = min(b, a)
            shapes = ((L, b, m), (L, m), (L, m, a))
            U, S, Vh = (torch.empty(shape, dtype=torch.float64, device=self.device) for shape in shapes)
            for tile in self._tiles(1 / self._power, rows=b):
                U[tile.layer], S[tile.layer], Vh[tile.layer] = linalg.svd(tile.values.double())
            self._store.svd = SVD(Vh.mT, S, U.mT) if self._flipped else SVD(U, S, Vh)
        U, S, Vh = self._store.svd
        S = S * self.scale
        return SVD(Vh.mT, S, U.mT) if self._flipped else SVD(U, S, Vh)

    def gram(self) -> Tensor:
        """sum_i M_i M_i^T in float64, (b, b). Computed once per orientation (one pass) and kept for all views."""
        if self._flipped not in self._store.grams:
            self._store.passes += 1
            b = self.shape[0]
            gram = torch.zeros(b, b, dtype=torch.float64, device=self.device)
            for tile in self._tiles(1 / self._power, rows=b):
                M = tile.values.double()
                gram += M @ M.mT
            self._store.grams[self._flipped] = gram
        return self._store.grams[self._flipped] * self.scale**2

    def suitable_threads(self) -> AbstractContextManager[None]:
        """Within it, torch uses the number of threads that suits matrices of this size."""
        return linalg.suitable_threads(self._M)

    # ---- views

    def unit(self) -> LayerStack:
        """The same stack in units of `scale`: products, tiles and singular values of M / scale; nothing is copied."""
        view = copy.copy(self)
        view._gain = 1 / self._power
        return view

    def transpose(self) -> LayerStack:
        """The same stack with every M_i transposed; nothing is copied."""
        view = copy.copy(self)
        view._M = self._M.mT
        view._flipped = not self._flipped
        return view

    def normalised_layers(self) -> tuple[LayerStack, list[float]]:
        """A copy with every nonzero M_i divided by its norm, and the norms (1 for zero layers)."""
        M = self.values
        largest = M.abs().amax((1, 2)).double()  # squares of a layer that is 1e-160 of the others leave the range
        units = M / torch.where(largest > 0, largest, 1).to(M.dtype)[:, None, None]
        relative = torch.linalg.matrix_norm(units.double())
        divisors = torch.where(largest > 0, relative, 1).to(M.dtype)[:, None, None]
        norms = torch.where(largest > 0, largest * relative, 1)
        return LayerStack(units / divisors, self.name), norms.tolist()

    def __repr__(self) -> str:
        b, a = self.shape
        return f"LayerStack({self.name!r}, {self.layers} x {b} x {a}, {self.dtype}, {self.device})"


def compute_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """float32 or float64 from a name or a dtype; raises InputError for anything else."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.float64):
        raise InputError(f"dtype must be float32 or float64, got {dtype}")
    return found


def compute_device(device: str | torch.device) -> torch.device:
    """The device of a name such as cpu, cuda, cuda:1, or auto (cuda if there is one, else cpu).

    Raises InputError if the name is unknown or the device is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise InputError(f"device {str(device)!r} is not available on this machine; use cpu or auto") from None
    if found.type == "meta":
        raise InputError("device 'meta' holds no numbers; use cpu or auto")
    return found


def _as_stack(values: Any, name: str, dtype: str | torch.dtype | None, device: str | torch.device | None) -> Tensor:
    """Check axes and dtype; the (L, b, a) tensor to compute with, borrowed where possible."""
    if isinstance(values, Sequence) and not isinstance(values, str | bytes):
        M = _join([_as_tensor(m, f"stack {name!r}, layer {i}") for i, m in enumerate(values)], name)
    else:
        M = _as_tensor(values, f"stack {name!r}")
    if M.ndim != 3:
        raise InputError(f"stack {name!r}: expected three axes (layers, b, a), found shape {tuple(M.shape)}")
    if 0 in M.shape:
        raise InputError(f"stack {name!r}: shape {tuple(M.shape)} is empty; every axis needs at least one entry")
    target = _COMPUTE[M.dtype] if dtype is None else compute_dtype(dtype)
    return M.to(device=None if device is None else compute_device(device), dtype=target)


def _join(matrices: list[Tensor], name: str) -> Tensor:
    if not matrices:
        raise InputError(f"stack {name!r}: the list is empty; at least one matrix is needed")
    for i, m in enumerate(matrices):
        if m.ndim != 2:
            raise InputError(f"stack {name!r}: layer {i} has shape {tuple(m.shape)}; a layer is a (b, a) matrix")
        if m.shape != matrices[0].shape:
            raise InputError(
                f"stack {name!r}: layer {i} is {m.shape[0]} x {m.shape[1]}, "
                f"layer 0 is {matrices[0].shape[0]} x {matrices[0].shape[1]}; the layers of a stack have equal shapes"
            )
        if m.dtype != matrices[0].dtype or m.device != matrices[0].device:
            raise InputError(
                f"stack {name!r}: layer {i} is {m.dtype} on {m.device}, layer 0 {matrices[0].dtype} on "
                f"{matrices[0].device}; give all layers the same"
            )
    return torch.stack(matrices)


def _as_tensor(values: Any, what: str) -> Tensor:
    """A detached tensor of a real floating dtype that shares memory with `values` if it can."""
    if isinstance(values, Tensor):
        M = values.detach()
    else:
        try:
            array = np.asarray(values)
        except ValueError as error:
            raise InputError(f"{what}: not an array ({error})") from None
        if array.dtype.kind not in "fiubc":
            raise InputError(f"{what}: dtype {array.dtype} is not numeric; real floating point is needed")
        if array.dtype.kind == "f":
            native = array.dtype.newbyteorder("=")
            array = array.astype(np.float64 if native.itemsize > 8 else native, copy=False)
        if any(stride < 0 for stride in array.strides):
            array = array.copy()
        with warnings.catch_warnings():  # torch warns that a read-only array could be written; it never is
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            M = torch.from_numpy(array) if array.dtype.kind in "fc" else torch.as_tensor(array)
    if M.dtype not in _COMPUTE:
        raise InputError(f"{what}: dtype {str(M.dtype).removeprefix('torch.')} is not real floating point; convert it")
    if M.layout != torch.strided:
        raise InputError(f"{what}: a {M.layout} tensor; a dense one is needed")
    return M
