"""The solves of a sweep whose rounding must be checked: each at once, or all at the end of the sweep.

A check makes the host wait for a GPU. A sweep without checks can be queued as a whole, or recorded and replayed.
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
    """The solver and the orthonormalisation that the updates of a sweep use."""

    def solve_increment(self, gram: Tensor, rhs: Tensor, size: Tensor, noise: Tensor) -> Tensor:
        """Do as `linalg.solve_increment` does."""
        ...

    def solve_layers(
        self, gram: Tensor, rhs: Tensor, size: Tensor, noise: Tensor, sharding: LayerSharding, measure: Measure
    ) -> tuple[Tensor, Tensor]:
        """Do as `linalg.solve_layers` does."""
        ...

    def orthonormal(self, X: Tensor) -> Tensor:
        """Return orthonormal columns whose span contains the columns of X (..., n, m), n >= m."""
        ...


class Checked:
    """An algebra whose every step checks the fast way, and takes the safe way if the fast one is not sound."""

    def solve_increment(self, gram: Tensor, rhs: Tensor, size: Tensor, noise: Tensor) -> Tensor:
        return solve.solve_increment(gram, rhs, size, noise)

    def solve_layers(
        self, gram: Tensor, rhs: Tensor, size: Tensor, noise: Tensor, sharding: LayerSharding, measure: Measure
    ) -> tuple[Tensor, Tensor]:
        return solve.solve_layers(gram, rhs, size, noise, sharding, measure)

    def orthonormal(self, X: Tensor) -> Tensor:
        return orthogonal.thin_qr(X)[0]


class Unchecked:
    """An algebra whose every step takes the fast way. At the end, `sound` tells whether all steps were sound.

    It works in one process only, since it does not ask other processes about their steps.
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
        """A boolean tensor: True if all steps so far were sound."""
        return torch.stack(self._sound).all()


class Recorded:
    """A function of tensors on one GPU, recorded as a CUDA graph at its first call and replayed at every call.

    Every call copies its arguments to the buffers that the recording reads, and returns copies of the results. Hence:

    - The function must not wait for the GPU.
    - All arguments keep their shapes, and other tensors that the function reads stay at their addresses.
    - Every operation of the function has run on the device before, so that its libraries are set up.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]]) -> None:
        self._function = function
        self._graph: torch.cuda.CUDAGraph | None = None
        self._buffers: list[Tensor] = []
        self._results: tuple[Tensor, ...] = ()

    def __call__(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        device = arguments[0].device
        with torch.cuda.device(device):
            if self._graph is None:
                self._buffers = [x.clone() for x in arguments]
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=torch.cuda.Stream(device)):
                    self._results = self._function(*self._buffers)
                self._graph = graph
            for buffer, x in zip(self._buffers, arguments, strict=True):
                buffer.copy_(x)
            self._graph.replay()
            return tuple(x.clone() for x in self._results)
