"""The steps of a sweep that need a look at their own rounding: with the look at once, or at the end of the sweep.

A look makes the host wait for a GPU. A sweep without one can be queued as a whole, or recorded and replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from rasa_theory.distributed import LayerSharding
from rasa_theory.linalg import orthogonal, solve

Measure = Callable[[Tensor], Tensor]


class Algebra(Protocol):
    """What the updates of a sweep solve and orthonormalise with."""

    def solve_increment(self, gram: Tensor, rhs: Tensor, size: Tensor, noise: Tensor) -> Tensor:
        """As `linalg.solve_increment`."""
        ...

    def solve_layers(
        self, gram: Tensor, rhs: Tensor, size: Tensor, noise: Tensor, sharding: LayerSharding, measure: Measure
    ) -> tuple[Tensor, Tensor]:
        """As `linalg.solve_layers`."""
        ...

    def orthonormal(self, X: Tensor) -> Tensor:
        """Orthonormal columns whose span contains that of X (..., n, m), n >= m."""
        ...


class Checked:
    """Every step looks, and takes the safe way where the fast one is not sound."""

    def solve_increment(self, gram: Tensor, rhs: Tensor, size: Tensor, noise: Tensor) -> Tensor:
        return solve.solve_increment(gram, rhs, size, noise)

    def solve_layers(
        self, gram: Tensor, rhs: Tensor, size: Tensor, noise: Tensor, sharding: LayerSharding, measure: Measure
    ) -> tuple[Tensor, Tensor]:
        return solve.solve_layers(gram, rhs, size, noise, sharding, measure)

    def orthonormal(self, X: Tensor) -> Tensor:
        return orthogonal.thin_qr(X)[0]


class Unchecked:
    """Every step goes the fast way; `sound`, a boolean tensor, says in the end whether all steps were sound.

    In one process only: what is sound is not asked of others.
    """

    def __init__(self) -> None:
        self._sound: list[Tensor] = []

    def solve_increment(self, gram: Tensor, rhs: Tensor, size: Tensor, noise: Tensor) -> Tensor:
        x, sound = solve.increment_by_cholesky(gram, rhs, size, noise)
        self._sound.append(sound)
        return x

    def solve_layers(
        self, gram: Tensor, rhs: Tensor, size: Tensor, noise: Tensor, sharding: LayerSharding, measure: Measure
    ) -> tuple[Tensor, Tensor]:
        x = self.solve_increment(gram, rhs, size, noise)
        return x, measure(x)

    def orthonormal(self, X: Tensor) -> Tensor:
        Q, _, sound = orthogonal.cholesky_qr(X)
        self._sound.append(sound)
        return Q

    @property
    def sound(self) -> Tensor:
        return torch.stack(self._sound).all()


class Recorded:
    """A function of tensors on one GPU that waits for nothing: recorded as a CUDA graph when it is called first.

    Every call copies its arguments to where the recording reads them, replays it and returns copies of the results. All
    arguments keep their shapes; what else the function reads must stay where it is. What it calls must have run on the
    device before, so that its libraries are set up.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]]) -> None:
        self._function = function
        self._graph: torch.cuda.CUDAGraph | None = None
        self._read: list[Tensor] = []
        self._results: tuple[Tensor, ...] = ()

    def __call__(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        device = arguments[0].device
        with torch.cuda.device(device):
            if self._graph is None:
                self._read = [x.clone() for x in arguments]
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=torch.cuda.Stream(device)):
                    self._results = self._function(*self._read)
                self._graph = graph
            for kept, x in zip(self._read, arguments, strict=True):
                kept.copy_(x)
            self._graph.replay()
            return tuple(x.clone() for x in self._results)
