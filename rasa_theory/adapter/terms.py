"""The terms of an adapter for all layers of one kind: private factors, one pool, and the mixing of every layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rasa_theory.common import InputError, fraction, real_number
from rasa_theory.formats import ModuleNames
from rasa_theory.problem import RankBudget, RasaFactors

_LARGEST = torch.finfo(torch.float32).max


class ModuleKind(NamedTuple):
    """The layers of one kind and shape: its name, the modules, and their weights, (out, in) or transposed."""

    name: str
    modules: ModuleNames
    weights: list[Tensor]

    @property
    def shape(self) -> tuple[int, int]:
        """(b, a) = (out, in) of an update."""
        rows, columns = self.weights[0].shape
        return (columns, rows) if self.modules.transposed else (rows, columns)

    def check_fits(self, budget: RankBudget) -> None:
        """Raise InputError if r exceeds min(b, a)."""
        if budget.rank > min(self.shape):
            raise InputError(f"rank {budget.rank} exceeds the smaller side of {self.name}, {self.shape}")


@dataclass(frozen=True)
class AdapterSettings:
    """Settings of new terms: ranks, alpha (the scale of the updates, as in LoRA), and dropout on their input.

    Raises InputError unless alpha is a finite number above 0 and 0 <= dropout < 1.
    """

    budget: RankBudget
    alpha: float
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < real_number("alpha", self.alpha) <= _LARGEST:
            raise InputError(f"alpha must be finite and above 0, got {self.alpha}", "alpha")
        fraction("dropout", self.dropout)


def initial_mixing(q: int, R: int, alpha: float) -> Tensor:
    """The initial mixing (q + R,): alpha / (2 q) for private terms, alpha / (2 R) for the pool.

    He et al., ICLR 2025, section 3.2. Private terms and pool carry half of alpha each. If one of them is empty, the
    other carries all of it, so that k = 0 is LoRA with its scaling alpha / r.

    **Arguments:**

    - q: number of private terms of a layer.
    - R: number of terms of the pool.
    - alpha: the scale of the updates.

    **Returns:** the mixing in float64, private terms first.
    """
    half = alpha / 2 if q and R else alpha
    return torch.cat([torch.full((n,), half / max(n, 1), dtype=torch.float64) for n in (q, R)])


class Terms(nn.Module):
    """The updates of L weights of one shape (b, a): update i is [B~_i, B_S] diag(d_i) [A~_i; A_S].

    - private_B[i] (b, q) and shared_B (b, R) start at zero.
    - private_A[i] (q, a) and shared_A (R, a) start by Kaiming's rule as in PEFT, uniform in +-1/sqrt(a).
    - mixing[i] (q + R,) starts at `initial_mixing`. It is trained if there is a pool.

    The terms of a layer have the dtype and device of its weight. The pool has dtype and device of the first weight.
    """

    def __init__(self, kind: ModuleKind, settings: AdapterSettings, generator: torch.Generator) -> None:
        super().__init__()
        weights, budget, (b, a) = kind.weights, settings.budget, kind.shape
        q, R = budget.private_rank, budget.pool_rank(len(weights))
        self.kind, self.targets, self.budget, self.shape = kind.name, kind.modules, budget, kind.shape

        def kaiming(rank: int) -> Tensor:
            return (2 * torch.rand(rank, a, generator=generator) - 1) / math.sqrt(a)

        d = initial_mixing(q, R, settings.alpha)
        self.private_B = nn.ParameterList(nn.Parameter(W.new_zeros(b, q)) for W in weights)
        self.private_A = nn.ParameterList(nn.Parameter(kaiming(q).to(W)) for W in weights)
        self.mixing = nn.ParameterList(nn.Parameter(d.to(W, copy=True)) for W in weights)
        self.shared_B = nn.Parameter(weights[0].new_zeros(b, R))
        self.shared_A = nn.Parameter(kaiming(R).to(weights[0]))
        self.dropout = nn.Dropout(settings.dropout)

    def set_trained(self, trained: bool) -> None:
        """Set whether the parameters require gradients. The mixing never does if there is no pool."""
        self.requires_grad_(trained)
        self.mixing.requires_grad_(trained and self.budget.shared_rank > 0)

    def factors_of(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """[B~_i, B_S] (b, q + R), d_i (q + R,) and [A~_i; A_S] (q + R, a), on the device of layer i."""
        Bt, At = self.private_B[i], self.private_A[i]
        return (
            torch.cat([Bt, self.shared_B.to(Bt.device)], 1),
            self.mixing[i],
            torch.cat([At, self.shared_A.to(At.device)], 0),
        )

    def forward(self, x: Tensor, i: int) -> Tensor:
        """The update of layer i applied to x: (.., a) -> (.., b). Nothing of size (b, a) is formed."""
        B, d, A = self.factors_of(i)
        return F.linear(F.linear(self.dropout(x).to(A.dtype), A) * d, B)

    def update(self, i: int) -> Tensor:
        """The update of layer i, (b, a), at least in float32."""
        B, d, A = (t.detach().to(torch.promote_types(t.dtype, torch.float32)) for t in self.factors_of(i))
        return (B * d) @ A

    @torch.no_grad()
    def assign(self, factors: RasaFactors) -> None:
        """Set the parameters to reconstructed updates. Private terms get the mixing 1, pool terms at most 1."""
        even = factors.evened()
        for i in range(even.layers):
            self.private_B[i].copy_(even.private_B[i])
            self.private_A[i].copy_(even.private_A[i])
            self.mixing[i].copy_(torch.cat([even.mixing.new_ones(self.budget.private_rank), even.mixing[i]]))
        self.shared_B.copy_(even.shared_B)
        self.shared_A.copy_(even.shared_A)

    @torch.no_grad()
    def factors(self) -> RasaFactors:
        """The same updates as factors of a reconstruction: copies, at least in float32, on the device of the pool.

        The mixing of the private terms goes into B~_i.
        """
        q, pool = self.budget.private_rank, self.shared_A
        wide = torch.promote_types(pool.dtype, torch.float32)

        def stacked(parts: nn.ParameterList) -> Tensor:
            return torch.stack([part.to(pool.device, wide) for part in parts])

        mixing = stacked(self.mixing)
        return RasaFactors(
            private_B=stacked(self.private_B) * mixing[:, None, :q],
            private_A=stacked(self.private_A),
            shared_B=self.shared_B.to(wide, copy=True),
            shared_A=self.shared_A.to(wide, copy=True),
            mixing=mixing[:, q:].clone(),
        )
