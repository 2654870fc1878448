"""The factors of a reconstruction: LoRA's, one pair per layer, and RaSA's, private pairs beside a shared pool."""

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

_ALL = slice(None)


def _check_shapes(expected: dict[str, tuple[Tensor, tuple[int, ...]]]) -> None:
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise InputError(f"{name} has shape {tuple(tensor.shape)}, the other factors need {shape}")


def balanced(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """The same products with b_j and a_j of equal norm in every term: (.., b, n), (.., n, a).

    So neither factor leaves the range of half precision before the other.
    """
    nB, nA = torch.linalg.vector_norm(B, dim=-2), torch.linalg.vector_norm(A, dim=-1)
    ratio = torch.where((nB > 0) & (nA > 0), (nA / torch.where(nB > 0, nB, 1)).sqrt(), 1)
    return B * ratio[..., None, :], A / ratio[..., :, None]


def scale_into_mixing(X: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
    """X (n, R) with unit columns, and D (L, R) with their norms; zero columns stay zero."""
    norms = torch.linalg.vector_norm(X, dim=0)
    return X / torch.where(norms > 0, norms, 1), D * norms


def _sharding_of(sharding: LayerSharding | None, held: int) -> LayerSharding:
    """`sharding`, checked for `held` local layers; None: one process that holds all of them."""
    if sharding is None:
        return LayerSharding((held,))
    if sharding.local_layers != held:
        raise InputError(f"factors of {held} layers are given, this process holds {sharding.local_layers}; give those")
    return sharding


@dataclass(frozen=True)
class LoraFactors:
    """LoRA factors of all layers: the updates B_i A_i of rank r.

    **Arguments:**

    - `B`: (L, b, r).
    - `A`: (L, r, a).
    - `sharding`: with several processes, the layers that each holds; `B` and `A` are then those of this process.

    **Raises:**

    - `InputError`: if the shapes disagree; the message names both.
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
        """The update B_i A_i of layer i, (b, a), or some of its rows."""
        return self.B[i, rows] @ self.A[i]

    def to(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> LoraFactors:
        """The same factors in another dtype or on another device."""
        return LoraFactors(*(t.to(dtype=dtype, device=device) for t in (self.B, self.A)), sharding=self.sharding)

    @property
    def layers(self) -> int:
        """L, of all processes together."""
        return self.sharding.layers


@dataclass(frozen=True)
class RasaFactors:
    """Updates B~_i A~_i + B_S D_i A_S (He et al., ICLR 2025, eq. 4).

    **Arguments:**

    - `private_B`: B~_i, (L, b, q).
    - `private_A`: A~_i, (L, q, a).
    - `shared_B`: B_S, (b, R).
    - `shared_A`: A_S, (R, a).
    - `mixing`: (L, R); row i is the diagonal of D_i.
    - `sharding`: with several processes, the layers that each holds. Private factors and mixing are then those of this
      process, and the pool is the same in all.

    **Raises:**

    - `InputError`: if the shapes disagree; the message names both.
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
    def from_lora(cls, lora: LoraFactors, budget: RankBudget, pooled: str = "smallest") -> RasaFactors:
        """Theorem 3.1: factors of RaSA(r, k) that have exactly the updates of `lora`.

        Of its r terms every layer hands k to the pool, the last ones (`pooled` "smallest", for factors in order of
        falling size) or the first ("largest"); D_i is 1 on the layer's own block and 0 elsewhere. Raises InputError
        if `lora` has another rank than `budget` or `pooled` is neither.
        """
        L, r, sharding = lora.layers, lora.B.shape[2], lora.sharding
        k, q = budget.shared_rank, budget.private_rank
        if r != budget.rank:
            raise InputError(f"the LoRA factors have rank {r}, the budget has rank {budget.rank}")
        if pooled not in ("smallest", "largest"):
            raise InputError(f"pooled must be 'smallest' or 'largest', got {pooled!r}")
        own = torch.kron(torch.eye(L, dtype=lora.B.dtype, device=lora.B.device), lora.B.new_ones(1, k))  # (L, L k)
        kept, given = (slice(0, q), slice(q, r)) if pooled == "smallest" else (slice(k, r), slice(0, k))
        return cls(
            private_B=lora.B[:, :, kept],
            private_A=lora.A[:, kept],
            shared_B=batched.beside(sharding.all_gather(lora.B[:, :, given])),
            shared_A=sharding.all_gather(lora.A[:, given]).reshape(L * k, lora.A.shape[2]),
            mixing=own[sharding.local],
            sharding=sharding,
        )

    def as_lora(self) -> LoraFactors:
        """The same updates as LoRA factors of rank q + R: B_i = [B~_i, B_S D_i], A_i = [A~_i; A_S]."""
        return LoraFactors(
            torch.cat([self.private_B, self.shared_B * self.mixing[:, None]], 2),
            torch.cat([self.private_A, self.shared_A.expand(self.sharding.local_layers, -1, -1)], 1),
            sharding=self.sharding,
        )

    @property
    def layers(self) -> int:
        """L, of all processes together."""
        return self.sharding.layers

    @property
    def update_rank(self) -> int:
        """The largest rank that a layer's update can have: q + R = r - k + L k, at most min(b, a)."""
        b, a = self.shared_B.shape[0], self.shared_A.shape[1]
        return int(min(self.private_B.shape[2] + self.shared_B.shape[1], b, a))

    @property
    def parameters(self) -> int:
        """The number of parameters of all layers, the mixing included."""
        (R, a), (b, q) = self.shared_A.shape, self.private_B.shape[1:]
        return self.layers * (q * (b + a) + R) + R * (b + a)

    def update(self, i: int, rows: slice = _ALL) -> Tensor:
        """The update B~_i A~_i + B_S D_i A_S of layer i, (b, a), or some of its rows."""
        private = self.private_B[i, rows] @ self.private_A[i]
        return private + (self.shared_B[rows] * self.mixing[i]) @ self.shared_A

    def named(self) -> dict[str, Tensor]:
        """The five tensors by their public names."""
        return {
            "private_B": self.private_B,
            "private_A": self.private_A,
            "shared_B": self.shared_B,
            "shared_A": self.shared_A,
            "mixing": self.mixing,
        }

    def transpose(self) -> RasaFactors:
        """Factors of the transposed updates: A~_i^T B~_i^T + A_S^T D_i B_S^T. Nothing is copied."""
        return RasaFactors(
            self.private_A.mT,
            self.private_B.mT,
            self.shared_A.mT,
            self.shared_B.mT,
            self.mixing,
            sharding=self.sharding,
        )

    def scaled(self, c: float | Tensor) -> RasaFactors:
        """Factors of c times the updates, c one number or one per layer, (L,): into private_B and mixing."""
        c = torch.as_tensor(c, dtype=self.mixing.dtype, device=self.mixing.device).expand(self.sharding.local_layers)
        return dataclasses.replace(
            self, private_B=self.private_B * c.reshape(-1, 1, 1), mixing=self.mixing * c[:, None]
        )

    def normalised(self) -> RasaFactors:
        """The same updates with unit columns in B_S and unit rows in A_S, their scale in D; zero columns stay zero."""
        B_S, D = scale_into_mixing(self.shared_B, self.mixing)
        A_S, D = scale_into_mixing(self.shared_A.mT, D)
        return dataclasses.replace(self, shared_B=B_S, shared_A=A_S.mT, mixing=D)

    def evened(self) -> RasaFactors:
        """The same updates for an adapter: `balanced` private terms, |d_ij| at most 1, the scale of a term in the pool.

        A pool column and its row are multiplied by the same number.
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
        """The same factors in another dtype or on another device."""
        tensors = {name: t.to(dtype=dtype, device=device) for name, t in self.named().items()}
        return RasaFactors(**tensors, sharding=self.sharding)

    def gathered(self) -> RasaFactors:
        """The factors of all layers, in every process as if it were alone: L (q (b + a) + R) numbers are sent."""
        return self._whole(self.sharding.all_gather)

    def sent_to_first(self) -> RasaFactors:
        """The factors of all layers on the CPU of process 0; the other processes keep their shard."""
        return self._whole(self.sharding.gather_to_first)

    def _whole(self, gather: Callable[[Tensor], Tensor]) -> RasaFactors:
        if self.sharding.alone:
            return self
        return RasaFactors(
            gather(self.private_B), gather(self.private_A), self.shared_B, self.shared_A, gather(self.mixing)
        )

    def sharded(self, sharding: LayerSharding) -> RasaFactors:
        """The local shard of these factors of all layers."""
        own = sharding.local
        return RasaFactors(
            self.private_B[own], self.private_A[own], self.shared_B, self.shared_A, self.mixing[own], sharding=sharding
        )


def lora_parameters(layers: int, shape: tuple[int, int], rank: int) -> int:
    """L r (a + b): the parameters of LoRA of rank r, and those of RaSA without its mixing, which has L R more."""
    return layers * rank * sum(shape)
