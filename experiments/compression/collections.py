"""The stacks of the experiment: LoRAs of one kind of module, over adapters and layers or over adapters alone."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import rasa_theory as rt
from rasa_theory.common import InputError
from rasa_theory.formats import StoredAdapter, peft_adapter
from rasa_theory.problem import Factored

EVERY = "all"
"""The layer of a collection over all layers."""


@dataclass(frozen=True)
class Collection:
    """LoRAs of one kind of module: over adapters and layers, or over the adapters of one layer."""

    set: str
    adapters: int
    kind: str
    layer: str
    factors: rt.LoraFactors  # B (L, b, r) times the scaling, A (L, r, a), as trained

    @property
    def parameters(self) -> int:
        """L r (a + b)."""
        return self.factors.B.numel() + self.factors.A.numel()

    @functools.cached_property
    def stack(self) -> rt.LayerStack:
        return rt.LayerStack(Factored(self.factors.B, self.factors.A), f"{self.set} {self.kind} {self.layer}")

    @functools.cached_property
    def sides(self) -> tuple[Tensor, Tensor]:
        """Orthonormal bases of all columns of the updates, (b, m), and of all rows, (a, m): at most L r of each."""
        columns = self.factors.B.transpose(0, 1).flatten(1), self.factors.A.mT.transpose(0, 1).flatten(1)
        U, V = (torch.linalg.qr(X).Q if X.shape[1] < X.shape[0] else torch.eye(len(X), dtype=X.dtype) for X in columns)
        return U, V

    @functools.cached_property
    def turned(self) -> rt.LayerStack:
        """U^T M_i V with these: the same layers in other bases, and smaller where L r < b or a."""
        (U, V), f = self.sides, self.factors
        return rt.LayerStack(Factored(U.mT @ f.B, f.A @ V), self.stack.name)

    @property
    def rank(self) -> int:
        return self.factors.B.shape[2]

    def random(self, draw: int) -> Collection:
        """LoRAs of the same singular values with nothing in common but by chance."""
        return replace(self, factors=rt.null_models.random_loras(self.factors, 1000 * draw + 17))


def sets_of(folders: Sequence[Path]) -> dict[str, list[StoredAdapter]]:
    """Group folders that differ in a number at the end; sets of one rank, where there are several, make one more.

    Raises InputError for a folder that is no adapter, and for adapters of different modules.
    """
    sets: dict[str, list[StoredAdapter]] = {}
    adapters = [peft_adapter(folder) for folder in folders]
    for folder, adapter in zip(folders, adapters, strict=True):
        sets.setdefault(re.sub(r"(-seed)?-\d+$", "", folder.name), []).append(adapter)
        if adapter.pairs.keys() != adapters[0].pairs.keys():
            raise InputError(f"{folders[0]} and {folder} are adapters of different modules; compare them apart")
    sets = dict(sorted(sets.items()))
    ranks = {name: frozenset(pair.rank for x in own for pair in x.pairs.values()) for name, own in sets.items()}
    for rank in sorted(set(ranks.values()), key=sorted):
        same = [name for name in ranks if ranks[name] == rank]
        if len(same) > 1:
            sets[" + ".join(same)] = [adapter for name in same for adapter in sets[name]]
    return sets


def collections_of(name: str, adapters: Sequence[StoredAdapter], kinds: Sequence[str] | None) -> Iterator[Collection]:
    """Yield the collection of each kind over adapters and layers, then the collection of each layer over adapters."""
    groups: dict[str, list[str]] = {}
    for module in adapters[0].pairs:
        groups.setdefault(kind_of(module), []).append(module)
    for kind, modules in groups.items():
        if kinds and kind not in kinds:
            continue
        each = [_factors(adapters, module) for module in modules]
        whole = rt.LoraFactors(*(torch.cat([getattr(f, side) for f in each]) for side in "BA"))
        yield Collection(name, len(adapters), kind, EVERY, whole)
        if len(adapters) > 1 and len(modules) > 1:
            for layer, factors in enumerate(each):
                yield Collection(name, len(adapters), kind, str(layer), factors)


def kind_of(module: str) -> str:
    """`encoder.layer.3.attention.self.query` -> `query`: the name after the number of the layer, shortened."""
    last = re.split(r"\.\d+\.", module)[-1]
    return last.removesuffix(".dense").removeprefix("attention.self.")


def _factors(adapters: Sequence[StoredAdapter], module: str) -> rt.LoraFactors:
    pairs = [adapter.factors(module) for adapter in adapters]
    return rt.LoraFactors(torch.stack([B.double() for B, _ in pairs]), torch.stack([A.double() for _, A in pairs]))
