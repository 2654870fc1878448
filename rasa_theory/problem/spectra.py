"""Decompositions of every layer of a stack: SVDs, singular values and Gram matrices.

They cost min(b, a)^3 or b^2 a per layer, where a product with a thin factor costs b a n. So they are computed at most
once for all views of a stack, and everything that needs one asks `LayerStack.spectra` for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rasa_theory import linalg
from rasa_theory.linalg import Majorant, Operator, orthogonal
from rasa_theory.problem.entries import Purpose, StackEntries
from rasa_theory.problem.leading import LeadingParts
from rasa_theory.problem.memory import exceeds_share
from rasa_theory.problem.storage import Factored, Spill

SPECTRA = ("auto", "exact", "leading")
"""Where solvers and floors take their directions from: SVDs, or products with M."""
_SMALL = 768  # layers with fewer rows or columns are decomposed, which is as fast, and exact
_WIDE = 8  # leading directions pay if they are at most an eighth of all


class Layered(Protocol):
    """A stack, or one that is not read yet."""

    @property
    def layers(self) -> int: ...

    @property
    def shape(self) -> tuple[int, int]: ...


def takes_leading(spectra: str, stack: Layered, rank: int) -> bool:
    """True if work on the stack at rank r takes its directions from products rather than from decompositions."""
    if spectra == "auto":
        return min(stack.shape) >= _SMALL and _WIDE * stack.layers * rank <= min(stack.shape)
    return spectra == "leading"


class SVD(NamedTuple):
    """Exact thin SVDs of a stack in float64: U (L, b, m), S (L, m), Vh (L, m, a), m = min(b, a)."""

    U: Tensor
    S: Tensor
    Vh: Tensor

    def first(self, count: int) -> SVD:
        """The `count` leading terms."""
        return SVD(self.U[:, :, :count], self.S[:, :count], self.Vh[:, :count])


class Decompositions(Protocol):
    """Decompositions of M / power in the orientation stored, in float64; see `ExactDecompositions`."""

    def svd(self) -> SVD: ...

    def singular_values(self) -> Tensor: ...

    def gram(self, transposed: bool) -> Tensor: ...


class StackSpectra:
    """The decompositions of one view of a stack, in its scale and orientation; `stack.spectra` returns it.

    All views of a stack share the same decompositions, so each is computed once, whichever view asks first. Where
    `is_leading`, nothing is asked for but leading directions, from products with M.
    """

    def __init__(
        self, exact: Decompositions, leading: LeadingParts, scale: float, transposed: bool, is_leading: bool
    ) -> None:
        self._exact, self._leading, self._scale, self._transposed = exact, leading, scale, transposed
        self.is_leading = is_leading

    # ---- leading directions

    def leading(self, count: int) -> SVD:
        """The `count` leading singular terms of the layers held: U (L, b, n), S (L, n), Vh (L, n, a), n <= count.

        Exact, or within `leading.GOAL` of the energy of a layer, if `is_leading`.
        """
        if not self.is_leading:
            return self.svd().first(count)
        layers = self._leading.layers(False).first(count)
        L, (b, a) = len(layers), self._leading.shape
        U, S, Vh = (self._leading.empty(*shape) for shape in ((L, b, count), (L, count), (L, count, a)))
        for i, layer in enumerate(layers):
            U[i], S[i], Vh[i] = layer.U[:, :count], layer.S[:count] * self._scale, layer.Vh[:count]
        return self._oriented(SVD(U, S, Vh))

    def following(self, count: int) -> Tensor:
        """Upper bounds on sigma_{i,count+1} of the layers held, (L,); the numbers themselves, if they are exact."""
        if not self.is_leading:
            S = self.svd().S
            return S[:, count] if count < S.shape[1] else torch.zeros_like(S[:, 0])
        layers = self._leading.layers(False).first(count)
        energies = [max(layer.majorant.eigenvalue(count + 1), 0.0) * layer.size**2 for layer in layers]
        return torch.tensor(energies, dtype=torch.float64, device=self._leading.device).sqrt() * self._scale

    def tail_energy(self, rank: int) -> float:
        """sum_i sum_{j>rank} sigma_ij^2 over all L layers."""
        if not self.is_leading:
            return float((self.singular_values()[:, rank:] ** 2).sum())
        captured = (self.leading(rank).S ** 2).sum(1).tolist()
        return max(0.0, self._leading.norm_squared * self._scale**2 - math.fsum(self._leading.gathered(captured)))

    def most_captured(self, count: int) -> list[float]:
        """Upper bounds on sum_{j<=count} sigma_ij^2 of all L layers, allowing for rounding, where `is_leading`."""
        layers = self._leading.layers(False).first(count)
        energies = [layer.majorant.ky_fan(count) * (layer.size * self._scale) ** 2 for layer in layers]
        return self._leading.gathered(energies)

    def common(self, count: int) -> Tensor:
        """The `count` leading eigenvectors of sum_i M_i M_i^T over all L layers, largest first: (b, count)."""
        if not self.is_leading:
            return linalg.leading_eigenpairs(self.gram(), count)[1].flip(1)
        return self._leading.common(not self._transposed).first(count)[:, :count]

    def layer_majorants(self, count: int) -> list[Majorant]:
        """The majorants of M_i^T M_i of the layers held, for sums of `count` eigenvalues, in units of this view."""
        layers = self._leading.layers(self._transposed).first(count)
        return [layer.majorant.scaled((layer.size * self._scale) ** 2) for layer in layers]

    def common_pairs(self, count: int) -> tuple[Tensor, Tensor]:
        """About the leading eigenpairs of sum_i M_i^T M_i, largest first: (w,), (a, w), w >= count if there are."""
        common = self._leading.common(self._transposed)
        V = common.first(count)
        single = V.to(common.operator.dtype)
        values = (V * common.operator.apply(single).double()).sum(0)
        order = values.argsort(descending=True)
        return values[order] * self._scale**2, V[:, order]

    def common_majorant(self, count: int, goal: float, excess: Callable[[Majorant], float] | None = None) -> Majorant:
        """The majorant of sum_i M_i^T M_i over all L layers for sums of `count` eigenvalues, see `linalg.majorant`.

        For the view with scale 1.
        """
        return self._leading.common(self._transposed).majorant(count, goal, excess)

    def common_operator(self) -> Operator:
        """sum_i M_i^T M_i, which is applied by one pass and one reduction; of the view `unit()` of a stack."""
        return self._leading.common(self._transposed).operator

    # ---- whole decompositions

    def svd(self) -> SVD:
        """Exact SVDs of the layers held, in float64. One pass for all views.

        The layers of a factored stack are B_i A_i, not rounded. They are completed to m = min(b, a) terms by zero
        singular values, with singular vectors in arbitrary directions orthogonal to the others.
        """
        U, S, Vh = self._exact.svd()
        return self._oriented(SVD(U, S * self._scale, Vh))

    def _oriented(self, svd: SVD) -> SVD:
        U, S, Vh = svd
        return SVD(Vh.mT, S, U.mT) if self._transposed else svd

    def singular_values(self) -> Tensor:
        """Singular values of all L layers, falling: (L, min(b, a)) in float64. One pass, none after `svd`."""
        return self._exact.singular_values() * self._scale

    def gram(self) -> Tensor:
        """sum_i M_i M_i^T over all L layers, (b, b) in float64. One pass for each orientation."""
        return self._exact.gram(self._transposed) * self._scale**2


class ExactDecompositions:
    """Exact decompositions of M / power, each computed at its first use and cached.

    `power` is the power of two just above the largest entry of M.

    SVDs larger than a quarter of the stack's `memory` are written to a temporary file of 8 L min(b, a) (b + a) bytes.
    """

    def __init__(self, entries: StackEntries) -> None:
        self._entries = entries
        self._svd: SVD | None = None
        self._singular_values: Tensor | None = None
        self._grams: dict[bool, Tensor] = {}  # by `transposed`

    def svd(self) -> SVD:
        """SVDs of the layers held."""
        if self._svd is None:
            entries, (L, b, a) = self._entries, self._entries.storage.shape
            entries.check_memory(decomposed=True)
            spills = exceeds_share(8 * L * min(b, a) * (b + a), entries.memory) and entries.device.type == "cpu"
            self._svd = self._spilled_svd() if spills else self._svd_in_memory()
        return self._svd

    def singular_values(self) -> Tensor:
        """Singular values of all L layers."""
        if self._singular_values is None:
            entries = self._entries
            if self._svd is not None or isinstance(entries.storage, Factored):
                S = self.svd().S
            else:
                entries.check_memory(decomposed=False)
                shape = entries.sharding.local_layers, min(entries.shape)
                S = torch.empty(shape, dtype=torch.float64, device=entries.device)
                for i, _, M in self._layers():
                    S[i] = linalg.singular_values(M.double())
            self._singular_values = entries.sharding.all_gather(S)
        return self._singular_values

    def gram(self, transposed: bool) -> Tensor:
        """sum_i M_i M_i^T / power^2 or, if `transposed`, sum_i M_i^T M_i / power^2, over all L layers."""
        if transposed not in self._grams:
            n = self._entries.shape[1 if transposed else 0]
            gram = torch.zeros(n, n, dtype=torch.float64, device=self._entries.device)
            for _, _, stored in self._layers():
                M = (stored.mT if transposed else stored).double()
                gram += M @ M.mT
            self._grams[transposed] = self._entries.sharding.all_reduce(gram)
        return self._grams[transposed]

    def _layers(self) -> Iterator[tuple[int, slice, Tensor]]:
        """M / power, a whole layer at a time. One pass."""
        return self._entries.tiles(Purpose.SPECTRA, 1 / self._entries.power, self._entries.shape[0])

    def _svd_in_memory(self) -> SVD:
        L, b, a = self._entries.storage.shape
        m = min(b, a)
        shapes = ((L, b, m), (L, m), (L, m, a))
        U, S, Vh = (torch.empty(shape, dtype=torch.float64, device=self._entries.device) for shape in shapes)
        for i, layer in enumerate(self._layer_svds()):
            U[i], S[i], Vh[i] = layer
        return SVD(U, S, Vh)

    def _spilled_svd(self) -> SVD:
        """SVDs in temporary files, one singular vector after the other, so the leading ones are on few pages."""
        L, b, a = self._entries.storage.shape
        m = min(b, a)
        left, S, right = Spill(L, m, b), torch.empty(L, m, dtype=torch.float64), Spill(L, m, a)
        for i, (U, sigma, Vh) in enumerate(self._layer_svds()):
            S[i] = sigma
            left.add(U.mT)
            right.add(Vh)
            del U, Vh  # before the next layer is read
        return SVD(left.tensor().mT, S, right.tensor())

    def _layer_svds(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """U (b, m), S (m,) and Vh (m, a) of M / power in float64, one layer after the other. One pass."""
        storage, m = self._entries.storage, min(self._entries.shape)
        if not (isinstance(storage, Factored) and storage.B.shape[2] <= m):
            for _, _, M in self._layers():
                yield linalg.svd(M.double())
                del M
            return
        self._entries.passes.add(Purpose.SPECTRA)
        for B, A in zip(storage.B, storage.A, strict=True):
            U, S, Vh = orthogonal.product_svd(B.double() / self._entries.power, A.double())
            S = torch.nn.functional.pad(S, (0, m - len(S)))
            yield orthogonal.extended(U, m), S, orthogonal.extended(Vh.mT, m).mT
