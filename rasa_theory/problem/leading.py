"""Leading directions of every layer and of all layers together, from products with M, with certificates.

Where layers are large, SVDs and Gram matrices cost min(b, a)^3 a layer. All that solvers and closed floors need follows
from a few leading directions, and from a `Majorant` of what they leave out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rasa_theory import linalg
from rasa_theory.linalg import Majorant, Operator, lanczos
from rasa_theory.problem.entries import Purpose, StackEntries

GOAL = 1e-6
"""The leading terms of a layer hold less energy than the best ones by at most this share of ||M_i||^2.

By more, as their majorants say, where the spectrum of a layer of more than 1024 rows and columns is too flat for it.
"""
_TARGET = 1e-6  # of ||M||^2: what common directions lose, about
LAYERS_FAILURE = 2e-11
"""The largest probability that any bound on the terms of single layers is wrong, over all passes of one orientation."""
COMMON_FAILURE = 2e-12
"""The largest probability that one majorant of the sum over the layers is wrong."""
_EPS = float(torch.finfo(torch.float64).eps)
_SMALLEST_EXPONENT = {torch.float32: -100, torch.float64: -1000}  # of a layer's largest entry, else it is scaled less


class LeadingLayer(NamedTuple):
    """The n leading singular terms of one layer, approximately: U (b, n), S (n,), Vh (n, a), in float64.

    `majorant` is that of M_i^T M_i / size^2, with V of at least n columns.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    majorant: Majorant
    size: float


class LeadingLayers:
    """The leading terms of M_i / power for the layers held, or of M_i^T; computed for as many terms as were asked.

    Pass n of them has a share 2^-n of `LAYERS_FAILURE`.
    """

    def __init__(self, entries: StackEntries, transposed: bool) -> None:
        self._entries, self._transposed = entries, transposed
        self._layers: list[LeadingLayer] = []
        self._count = self._passes = 0

    def first(self, count: int) -> list[LeadingLayer]:
        """At least `count` terms of every layer. A pass for more than before."""
        if count > self._count:
            entries = self._entries
            self._passes += 1
            first = entries.sharding.first
            streams = [
                linalg.stream("layers", self._transposed, count, first + n)
                for n in range(entries.sharding.local_layers)
            ]
            tiles = entries.tiles(Purpose.SPECTRA, 1 / entries.power, entries.shape[0])
            failure = LAYERS_FAILURE / 2**self._passes / entries.sharding.layers
            self._layers = [
                leading_layer(M.mT if self._transposed else M, count, failure, one)
                for (_, _, M), one in zip(tiles, streams, strict=True)
            ]
            self._count = count
        return self._layers


def leading_layer(M: Tensor, count: int, failure: float, generator: torch.Generator) -> LeadingLayer:
    """The `count` leading terms of M (b, a), within `GOAL` ||M||^2 of the best; from the SVD of a small M if need be.

    Its bounds are wrong with probability `failure` at most, over `generator`.
    """
    low, high = (float(x) for x in torch.aminmax(M))
    exponent = math.frexp(max(-low, high))[1]
    size = math.ldexp(1.0, max(exponent, _SMALLEST_EXPONENT[M.dtype]))
    M = M / size
    part = lanczos.leading_part(M, count, GOAL, failure, generator, tolerance=math.inf)
    if part is None:
        part = lanczos.leading_part_by_svd(M.double(), count)
    S = torch.linalg.vector_norm(part.B, dim=0)
    return LeadingLayer(part.B / torch.where(S > 0, S, 1), S * size, part.A, part.majorant, size)


# ---- all layers together


class CommonDirections:
    """Leading eigenvectors of S = sum_i M_i^T M_i, over all layers and processes: of M / power, or transposed."""

    def __init__(self, entries: StackEntries, transposed: bool) -> None:
        b, a = entries.shape
        self._entries, self._transposed = entries, transposed
        self._norm_squared = entries.unit_norm_squared
        n, m = (b, a) if transposed else (a, b)
        error = 1.1 * (n + m + entries.sharding.layers) * _EPS * self._norm_squared
        self.operator = Operator(self._apply, n, self._norm_squared, error, entries.dtype, entries.device)
        self._guess: Tensor | None = None

    def _apply(self, X: Tensor) -> Tensor:
        """sum_i M_i^T M_i X: one pass and one reduction."""
        entries, result = self._entries, torch.zeros_like(X)
        tiles = entries.transposed_tiles if self._transposed else entries.tiles
        rows = entries.cached_rows(self.operator.n) if X.dtype != entries.dtype else None
        for tile in tiles(Purpose.SPECTRA, 1.0, rows):
            M = tile.values.to(X.dtype)
            result += linalg.product(M.mT, linalg.product(M, X).div_(entries.power)).div_(entries.power)
        return entries.sharding.all_reduce(result)

    def first(self, count: int) -> Tensor:
        """About the `count` leading eigenvectors, with more behind them: (n, columns >= count) in float64."""
        if self._guess is None or self._guess.shape[1] < count:
            generator = linalg.stream("common guess", self._transposed, count)
            target = _TARGET * self._norm_squared
            self._guess = linalg.leading_guess(self.operator, count, target, generator).double()
        return self._guess

    def majorant(self, count: int, goal: float, excess: Callable[[Majorant], float] | None = None) -> Majorant:
        """The majorant of S for sums of `count` eigenvalues, see `linalg.majorant`."""
        generator = linalg.stream("common", self._transposed, count)
        return linalg.majorant(self.operator, count, goal, COMMON_FAILURE, generator, self.first(count), excess)


class LeadingParts:
    """Leading directions of each layer held, and of all layers together, for all views of a stack."""

    def __init__(self, entries: StackEntries) -> None:
        self._entries = entries
        self._layers: dict[bool, LeadingLayers] = {}
        self._common: dict[bool, CommonDirections] = {}

    @property
    def shape(self) -> tuple[int, int]:
        """The stored shape (b, a) of a layer."""
        return self._entries.shape

    @property
    def device(self) -> torch.device:
        """The device of the computation."""
        return self._entries.device

    @property
    def norm_squared(self) -> float:
        """||M / power||^2 over all layers."""
        return self._entries.unit_norm_squared

    def gathered(self, local: list[float]) -> list[float]:
        """A number for each layer held, for all L layers."""
        return self._entries.sharding.all_gather_floats(local)

    def empty(self, *shape: int) -> Tensor:
        """A float64 tensor for results."""
        return torch.empty(shape, dtype=torch.float64, device=self.device)

    def layers(self, transposed: bool) -> LeadingLayers:
        """Those of each layer, with the majorants of M_i^T M_i or, if `transposed`, of M_i M_i^T."""
        if transposed not in self._layers:
            self._layers[transposed] = LeadingLayers(self._entries, transposed)
        return self._layers[transposed]

    def common(self, transposed: bool) -> CommonDirections:
        """Those of sum_i M_i^T M_i or, if `transposed`, of sum_i M_i M_i^T."""
        if transposed not in self._common:
            self._common[transposed] = CommonDirections(self._entries, transposed)
        return self._common[transposed]
