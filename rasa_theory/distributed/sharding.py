"""Layers sharded over processes: the local layers of each process, and reductions over all of them.

Stacks and factors carry their `LayerSharding`, as a DTensor carries its mesh. It is explicit so that small work that
all processes repeat on gathered values runs on a stack of one process and is not summed twice. A context variable
would leave that to every caller. DTensor itself is not used: batched QR, Cholesky factors and eigenvalues have no
sharding rules there, and it would gather all layers for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rasa_theory.distributed.processes import ALONE, Processes


def balanced_shares(costs: Sequence[int], world_size: int) -> list[list[int]]:
    """Deal tasks to processes, and return the indices of the tasks of each process, ascending.

    The costliest task comes first, and each goes to the process with the least load so far. The greatest load is then
    at most 4/3 - 1/(3 P) times the optimum (Graham 1969). All processes compute the same shares, without communication.
    """
    shares: list[list[int]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for n in sorted(range(len(costs)), key=lambda n: (-costs[n], n)):
        process = loads.index(min(loads))
        shares[process].append(n)
        loads[process] += costs[n]
    return [sorted(share) for share in shares]


@dataclass(frozen=True)
class LayerSharding:
    """L layers sharded over processes in order: process p holds counts[p] consecutive layers.

    This process holds `first` .. `first` + `local_layers` - 1. A sum over layers is taken over the local layers first
    and then over the processes, several tensors in one reduction.
    """

    counts: tuple[int, ...]
    processes: Processes = field(default=ALONE, compare=False)

    @classmethod
    def of(cls, layers: int, processes: Processes = ALONE) -> LayerSharding:
        """The most even sharding, larger shares first. With fewer layers than processes the last ones hold none."""
        each, more = divmod(layers, processes.world_size)
        return cls(tuple(each + (p < more) for p in range(processes.world_size)), processes)

    @property
    def alone(self) -> bool:
        """True if one process holds all layers."""
        return self.processes.alone

    @property
    def layers(self) -> int:
        """The number L of layers in all processes."""
        return sum(self.counts)

    @property
    def local_layers(self) -> int:
        """The number of local layers."""
        return self.counts[self.processes.process]

    @property
    def first(self) -> int:
        """The index of the first local layer."""
        return sum(self.counts[: self.processes.process])

    @property
    def local(self) -> slice:
        """The slice of the local layers among all layers."""
        return slice(self.first, self.first + self.local_layers)

    def all_reduce_together(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """The sums of several tensors of one dtype over all processes, by one reduction."""
        if self.alone:
            return parts
        buffer = self.processes.all_reduce(torch.cat([part.reshape(-1) for part in parts]))
        pieces = torch.split(buffer, [part.numel() for part in parts])
        return tuple(piece.reshape(part.shape) for piece, part in zip(pieces, parts, strict=True))

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of x over all processes."""
        return self.processes.all_reduce(x)

    def sum_in_order(self, start: Tensor, terms: Iterable[Tensor]) -> Tensor:
        """The sum of `start` and the terms of all layers in their order: the same bits for any number of processes.

        Every process computes its terms at once. It adds them when all earlier processes have added theirs. This takes
        P broadcasts.
        """
        result = start.clone()
        mine = iter(terms) if self.alone else iter(list(terms))
        for process in range(len(self.counts)):
            if process == self.processes.process:
                for term in mine:
                    result += term
            result = self.processes.broadcast(process, result)
        return result

    def all_reduce_max(self, x: Tensor) -> float:
        """The largest entry of x (local_layers,) over all processes, or 0 if there is no entry at all."""
        if self.alone:
            return float(x.max()) if x.numel() else 0.0
        return float(self.processes.all_reduce_max(x.amax() if x.numel() else x.new_zeros(())))

    def all_reduce_max_each(self, x: Tensor) -> Tensor:
        """The elementwise maximum of x >= 0 over all layers: (local_layers, ..) -> (..)."""
        if self.alone:
            return x.amax(0)
        return self.processes.all_reduce_max(x.amax(0) if len(x) else x.new_zeros(x.shape[1:]))

    def all_gather(self, x: Tensor) -> Tensor:
        """The rows of x for all layers, in every process: (local_layers, ..) -> (L, ..)."""
        return self.processes.all_gather(x, self.counts)

    def gather_to_first(self, x: Tensor) -> Tensor:
        """`all_gather` to the CPU of process 0 alone. The others return x."""
        return self.processes.gather_to_first(x, self.counts)

    def all_gather_floats(self, local: Sequence[float]) -> list[float]:
        """One number for each layer of all processes, in order. Their sums do not depend on the number of processes."""
        if self.alone:
            return list(local)
        numbers: list[float] = self.all_gather(torch.tensor(local, dtype=torch.float64)).tolist()
        return numbers
