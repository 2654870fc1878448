"""Decompositions of every layer of a stack: SVDs, singular values and Gram matrices.

They cost min(b, a)^3 or b^2 a per layer, where a product with a thin factor costs b a n. So they are computed at most
once for all views of a stack, and everything that needs one asks `LayerStack.spectra` for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rasa_theory import linalg
from rasa_theory.linalg import orthogonal
from rasa_theory.problem.entries import Purpose, StackEntries
from rasa_theory.problem.memory import exceeds_share
from rasa_theory.problem.storage import Factored, Spill


class SVD(NamedTuple):
    """Exact thin SVDs of a stack in float64: U (L, b, m), S (L, m), Vh (L, m, a), m = min(b, a)."""

    U: Tensor
    S: Tensor
    Vh: Tensor


class Decompositions(Protocol):
    """Decompositions of M / power in the orientation stored, in float64; see `ExactDecompositions`."""

    def svd(self) -> SVD: ...

    def singular_values(self) -> Tensor: ...

    def gram(self, transposed: bool) -> Tensor: ...


class StackSpectra:
    """The decompositions of one view of a stack, in its scale and orientation; `stack.spectra` returns it.

    All views of a stack share the same `decompositions`, so each is computed once, whichever view asks first.
    """

    def __init__(self, decompositions: Decompositions, scale: float, transposed: bool) -> None:
        self._decompositions, self._scale, self._transposed = decompositions, scale, transposed

    def svd(self) -> SVD:
        """Exact SVDs of the layers held, in float64. One pass for all views.

        The layers of a factored stack are B_i A_i, not rounded. They are completed to m = min(b, a) terms by zero
        singular values, with singular vectors in arbitrary directions orthogonal to the others.
        """
        U, S, Vh = self._decompositions.svd()
        S = S * self._scale
        return SVD(Vh.mT, S, U.mT) if self._transposed else SVD(U, S, Vh)

    def singular_values(self) -> Tensor:
        """Singular values of all L layers, falling: (L, min(b, a)) in float64. One pass, none after `svd`."""
        return self._decompositions.singular_values() * self._scale

    def gram(self) -> Tensor:
        """sum_i M_i M_i^T over all L layers, (b, b) in float64. One pass for each orientation."""
        return self._decompositions.gram(self._transposed) * self._scale**2


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
