"""Layers sharded over processes: which process holds which, and reductions over all of them.

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
    """For each process the indices of its tasks, ascending: the costliest first, each to who has least so far.

    No process then has more than 4/3 - 1/(3 P) times what the best deal leaves the busiest one (Graham 1969). The same
    in all processes, and they need not ask each other.
    """
    shares: list[list[int]] = [[] for _ in range(world_size)]
    spent = [0] * world_size
    for n in sorted(range(len(costs)), key=lambda n: (-costs[n], n)):
        process = spent.index(min(spent))
        shares[process].append(n)
        spent[process] += costs[n]
    return [sorted(share) for share in shares]


@dataclass(frozen=True)
class LayerSharding:
    """L layers sharded over processes in order: process p holds counts[p] of them, one after the other.

    This process holds `first` .. `first` + `local_layers` - 1. A sum over layers is taken over the local layers first
    and then over the processes, several tensors in one reduction.
    """

    counts: tuple[int, ...]
    processes: Processes = field(default=ALONE, compare=False)

    @classmethod
    def of(cls, layers: int, processes: Processes = ALONE) -> LayerSharding:
        """As evenly as can be, the larger shares first; with fewer layers than processes the last ones hold none."""
        each, more = divmod(layers, processes.world_size)
        return cls(tuple(each + (p < more) for p in range(processes.world_size)), processes)

    @property
    def alone(self) -> bool:
        """Whether one process holds all."""
        return self.processes.alone

    @property
    def layers(self) -> int:
        """L."""
        return sum(self.counts)

    @property
    def local_layers(self) -> int:
        """How many layers this process holds."""
        return self.counts[self.processes.process]

    @property
    def first(self) -> int:
        """The first layer that this process holds."""
        return sum(self.counts[: self.processes.process])

    @property
    def local(self) -> slice:
        """The layers that this process holds, of all."""
        return slice(self.first, self.first + self.local_layers)

    def all_reduce_together(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """The sums over all processes of tensors of one dtype, by one reduction."""
        if self.alone:
            return parts
        buffer = self.processes.all_reduce(torch.cat([part.reshape(-1) for part in parts]))
        pieces = torch.split(buffer, [part.numel() for part in parts])
        return tuple(piece.reshape(part.shape) for piece, part in zip(pieces, parts, strict=True))

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over all processes."""
        return self.processes.all_reduce(x)

    def sum_in_order(self, start: Tensor, terms: Iterable[Tensor]) -> Tensor:
        """`start` plus the terms of all layers, one by one in their order: the same bits in any number of processes.

        Every process makes its terms at once, and keeps them until those of the processes before are added; P
        broadcasts.
        """
        found = start.clone()
        mine = iter(terms) if self.alone else iter(list(terms))
        for process in range(len(self.counts)):
            if process == self.processes.process:
                for term in mine:
                    found += term
            found = self.processes.broadcast(process, found)
        return found

    def all_reduce_max(self, x: Tensor) -> float:
        """The largest of what every process has of x (held,); 0 if nobody has any."""
        if self.alone:
            return float(x.max()) if x.numel() else 0.0
        return float(self.processes.all_reduce_max(x.amax() if x.numel() else x.new_zeros(())))

    def all_reduce_max_each(self, x: Tensor) -> Tensor:
        """max_i x_i of all layers, x >= 0: (held, ..) -> (..)."""
        if self.alone:
            return x.amax(0)
        return self.processes.all_reduce_max(x.amax(0) if len(x) else x.new_zeros(x.shape[1:]))

    def all_gather(self, x: Tensor) -> Tensor:
        """What belongs to each layer, of all layers in every process: (held, ..) -> (L, ..)."""
        return self.processes.all_gather(x, self.counts)

    def gather_to_first(self, x: Tensor) -> Tensor:
        """The same in process 0 alone, on the CPU."""
        return self.processes.gather_to_first(x, self.counts)

    def all_gather_floats(self, own: Sequence[float]) -> list[float]:
        """One number for each layer, of all layers, in order: sums of them are the same whatever the processes."""
        if self.alone:
            return list(own)
        found: list[float] = self.all_gather(torch.tensor(own, dtype=torch.float64)).tolist()
        return found
