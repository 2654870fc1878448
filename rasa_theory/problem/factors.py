"""The factors of a reconstruction: a pair per layer for LoRA, private pairs beside a shared pool for RaSA."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rasa_theory.common import InputError
from rasa_theory.distributed import LayerSharding
from rasa_theory.linalg import batched
from rasa_theory.problem.budget import RankBudget
from rasa_theory.problem.terms import RankOneTerms

_ALL = slice(None)


def _check_shapes(expected: dict[str, tuple[Tensor, tuple[int, ...]]]) -> None:
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise InputError(f"{name} has shape {tuple(tensor.shape)}, the other factors need {shape}")


def balanced(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors of the same products, (.., b, n) and (.., n, a), with b_j and a_j of equal norm in every term.

    Equal norms make best use of half precision: neither factor leaves its range before the other.
    """
    nB, nA = torch.linalg.vector_norm(B, dim=-2), torch.linalg.vector_norm(A, dim=-1)
    ratio = torch.where((nB > 0) & (nA > 0), (nA / torch.where(nB > 0, nB, 1)).sqrt(), 1)
    return B * ratio[..., None, :], A / ratio[..., :, None]


def scale_into_mixing(X: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
    """Return X (n, R) with unit columns, and D (L, R) multiplied by their norms. Zero columns stay zero."""
    norms = torch.linalg.vector_norm(X, dim=0)
    return X / torch.where(norms > 0, norms, 1), D * norms


def _sharding_of(sharding: LayerSharding | None, layers: int) -> LayerSharding:
    """Return `sharding`, checked for `layers` local layers. None stands for one process that holds all layers."""
    if sharding is None:
        return LayerSharding((layers,))
    if sharding.local_layers != layers:
        raise InputError(
            f"factors of {layers} layers are given, this process holds {sharding.local_layers}; give those"
        )
    return sharding


@dataclass(frozen=True)
class LoraFactors:
    """LoRA factors of all layers: the updates B_i A_i of rank r.

    Arguments:
        B: the left factors B_i, (L, b, r).
        A: the right factors A_i, (L, r, a).
        sharding: with several processes, the layers that each holds. `B` and `A` hold the layers of this process.

    Raises:
        InputError: the shapes disagree; the message names both.
    """

    B: Tensor
    A: Tensor
    sharding: LayerSharding = field(default=None, kw_only=True)  # type: ignore[assignment]  # None: of one process

    def __post_init__(self) -> None:
        object.__setattr__(self, "sharding", _sharding_of(self.sharding, len(self.B)))
        if self.B.ndim != 3 or self.A.ndim != 3:
            raise InputError(f"B and A need three axes, found shapes {tuple(self.B.shape)} and {tuple(self.A.shape)}")
        _check_shapes({"A": (self.A, (self.B.shape[0], self.B.shape[2], self.A.shape[2]))})

    def update(self, i: int, rows: slice = _ALL) -> Tensor:
        """Return the update B_i A_i of layer i, (b, a), or some of its rows."""
        return self.B[i, rows] @ self.A[i]

    def to(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> LoraFactors:
        """Return the same factors in another dtype or on another device."""
        return LoraFactors(*(t.to(dtype=dtype, device=device) for t in (self.B, self.A)), sharding=self.sharding)

    @property
    def layers(self) -> int:
        """The number of layers L, summed over all processes."""
        return self.sharding.layers


@dataclass(frozen=True)
class RasaFactors:
    """Updates B~_i A~_i + B_S D_i A_S (He et al., ICLR 2025, eq. 4).

    Arguments:
        private_B: B~_i, (L, b, q).
        private_A: A~_i, (L, q, a).
        shared_B: B_S, (b, R).
        shared_A: A_S, (R, a).
        mixing: the diagonals of the D_i as rows, (L, R).
        sharding: with several processes, the layers that each holds. Private factors and mixing hold the layers of this
            process, and the pool is the same in all.

    Raises:
        InputError: the shapes disagree; the message names both.
    """

    private_B: Tensor
    private_A: Tensor
    shared_B: Tensor
    shared_A: Tensor
    mixing: Tensor
    sharding: LayerSharding = field(default=None, kw_only=True)  # type: ignore[assignment]  # None: of one process

    def __post_init__(self) -> None:
        object.__setattr__(self, "sharding", _sharding_of(self.sharding, len(self.private_B)))
        if self.private_B.ndim != 3 or self.shared_A.ndim != 2:
            raise InputError(
                "private_B needs axes (L, b, q) and shared_A axes (R, a), found shapes "
                f"{tuple(self.private_B.shape)} and {tuple(self.shared_A.shape)}"
            )
        L, b, q = self.private_B.shape
        R, a = self.shared_A.shape
        _check_shapes(
            {
                "private_A": (self.private_A, (L, q, a)),
                "shared_B": (self.shared_B, (b, R)),
                "mixing": (self.mixing, (L, R)),
            }
        )

    @classmethod
    def from_pool(cls, pool: RankOneTerms, private_rank: int, sharding: LayerSharding | None = None) -> RasaFactors:
        """Build factors with this pool and no private terms.

        Arguments:
            pool: R terms, with the weights of all L layers.
            private_rank: q; the private factors are zero.
            sharding: the layers that each process holds; None stands for one process that holds all.

        Returns:
            Factors of the layers of this process.
        """
        sharding = sharding or LayerSharding((len(pool.D),))
        B, A, D = pool
        no_B = B.new_zeros(sharding.local_layers, len(B), private_rank)
        no_A = A.new_zeros(sharding.local_layers, private_rank, A.shape[1])
        return cls(no_B, no_A, B, A, D[sharding.local], sharding=sharding)

    @classmethod
    def from_lora(cls, lora: LoraFactors, budget: RankBudget, pooled: str = "smallest") -> RasaFactors:
        """Embed LoRA in RaSA: factors of RaSA(r, k) with exactly the updates of `lora` (Theorem 3.1).

        Every layer moves k of its r terms to the pool. D_i is 1 on the block of layer i and 0 elsewhere.

        Arguments:
            lora: LoRA factors of rank r, with the terms of each layer in order of falling size.
            budget: the ranks r and k.
            pooled: the terms that go to the pool, "smallest" (the last k) or "largest" (the first k).

        Returns:
            Factors with private rank q = r - k and pool rank R = L k.

        Raises:
            InputError: `lora` and `budget` differ in rank, or `pooled` is neither of the two.
        """
        L, r, sharding = lora.layers, lora.B.shape[2], lora.sharding
        k, q = budget.shared_rank, budget.private_rank
        if r != budget.rank:
            raise InputError(f"the LoRA factors have rank {r}, the budget has rank {budget.rank}")
        if pooled not in ("smallest", "largest"):
            raise InputError(f"pooled must be 'smallest' or 'largest', got {pooled!r}")
        blocks = torch.kron(torch.eye(L, dtype=lora.B.dtype, device=lora.B.device), lora.B.new_ones(1, k))  # (L, L k)
        private, shared = (slice(0, q), slice(q, r)) if pooled == "smallest" else (slice(k, r), slice(0, k))
        return cls(
            private_B=lora.B[:, :, private],
            private_A=lora.A[:, private],
            shared_B=batched.beside(sharding.all_gather(lora.B[:, :, shared])),
            shared_A=sharding.all_gather(lora.A[:, shared]).reshape(L * k, lora.A.shape[2]),
            mixing=blocks[sharding.local],
            sharding=sharding,
        )

    def as_lora(self) -> LoraFactors:
        """Return the same updates as LoRA factors of rank q + R: B_i = [B~_i, B_S D_i], A_i = [A~_i; A_S]."""
        return LoraFactors(
            torch.cat([self.private_B, self.shared_B * self.mixing[:, None]], 2),
            torch.cat([self.private_A, self.shared_A.expand(self.sharding.local_layers, -1, -1)], 1),
            sharding=self.sharding,
        )

    @property
    def layers(self) -> int:
        """The number of layers L, summed over all processes."""
        return self.sharding.layers

    @property
    def update_rank(self) -> int:
        """The largest possible rank of an update: q + R = r - k + L k, at most min(b, a)."""
        b, a = self.shared_B.shape[0], self.shared_A.shape[1]
        return int(min(self.private_B.shape[2] + self.shared_B.shape[1], b, a))

    @property
    def parameters(self) -> int:
        """The number of parameters of all layers: L (q (b + a) + R) + R (b + a), with the mixing."""
        (R, a), (b, q) = self.shared_A.shape, self.private_B.shape[1:]
        return self.layers * (q * (b + a) + R) + R * (b + a)

    def update(self, i: int, rows: slice = _ALL) -> Tensor:
        """Return the update B~_i A~_i + B_S D_i A_S of layer i, (b, a), or some of its rows."""
        private = self.private_B[i, rows] @ self.private_A[i]
        return private + (self.shared_B[rows] * self.mixing[i]) @ self.shared_A

    def named(self) -> dict[str, Tensor]:
        """Return the five tensors by their public names."""
        return {
            "private_B": self.private_B,
            "private_A": self.private_A,
            "shared_B": self.shared_B,
            "shared_A": self.shared_A,
            "mixing": self.mixing,
        }

    def transpose(self) -> RasaFactors:
        """Return factors of the transposed updates, A~_i^T B~_i^T + A_S^T D_i B_S^T. Nothing is copied."""
        return RasaFactors(
            self.private_A.mT,
            self.private_B.mT,
            self.shared_A.mT,
            self.shared_B.mT,
            self.mixing,
            sharding=self.sharding,
        )

    def scaled(self, c: float | Tensor) -> RasaFactors:
        """Return factors of c times the updates; c is one number, or one per local layer, (L,).

        c multiplies private_B and mixing, so that the pool stays the same in all processes.
        """
        c = torch.as_tensor(c, dtype=self.mixing.dtype, device=self.mixing.device).expand(self.sharding.local_layers)
        return dataclasses.replace(
            self, private_B=self.private_B * c.reshape(-1, 1, 1), mixing=self.mixing * c[:, None]
        )

    def normalised(self) -> RasaFactors:
        """Return factors of the same updates with unit columns in B_S and unit rows in A_S.

        The mixing takes up their norms. Columns and rows of zeros stay zero.
        """
        B_S, D = scale_into_mixing(self.shared_B, self.mixing)
        A_S, D = scale_into_mixing(self.shared_A.mT, D)
        return dataclasses.replace(self, shared_B=B_S, shared_A=A_S.mT, mixing=D)

    def evened(self) -> RasaFactors:
        """Return factors of the same updates for an adapter in half precision.

        Private terms are `balanced`, and max_i |d_ij| is 1 for every pool term in use. The pool column and the pool
        row of term j are both multiplied by the square root of the former maximum.
        """
        private_B, private_A = balanced(self.private_B, self.private_A)
        largest = self.sharding.all_reduce_max_each(self.mixing.abs())
        scale = torch.where(largest > 0, largest, 1)
        return RasaFactors(
            private_B, private_A,
            self.shared_B * scale.sqrt(), self.shared_A * scale.sqrt()[:, None], self.mixing / scale,
            sharding=self.sharding,
        )  # fmt: skip

    def to(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> RasaFactors:
        """Return the same factors in another dtype or on another device."""
        tensors = {name: t.to(dtype=dtype, device=device) for name, t in self.named().items()}
        return RasaFactors(**tensors, sharding=self.sharding)

    def gathered(self) -> RasaFactors:
        """Return the factors of all layers, unsharded, in every process. Traffic: L (q (b + a) + R) numbers."""
        return self._whole(self.sharding.all_gather)

    def sent_to_first(self) -> RasaFactors:
        """Return the factors of all layers on the CPU in process 0, and the local shard in the others."""
        return self._whole(self.sharding.gather_to_first)

    def _whole(self, gather: Callable[[Tensor], Tensor]) -> RasaFactors:
        if self.sharding.alone:
            return self
        return RasaFactors(
            gather(self.private_B), gather(self.private_A), self.shared_B, self.shared_A, gather(self.mixing)
        )

    def sharded(self, sharding: LayerSharding) -> RasaFactors:
        """Return the local shard of these factors, which must be the factors of all layers."""
        local = sharding.local
        return RasaFactors(
            self.private_B[local], self.private_A[local], self.shared_B, self.shared_A, self.mixing[local],
            sharding=sharding,
        )  # fmt: skip


def lora_parameters(layers: int, shape: tuple[int, int], rank: int) -> int:
    """Return L r (a + b), the number of parameters of LoRA of rank r. RaSA has L R more, its mixing."""
    return layers * rank * sum(shape)
