"""The factors of a reconstruction: LoRA's, one pair per layer, and RaSA's, private pairs beside a shared pool."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rasa_theory import layers
from rasa_theory.errors import InputError
from rasa_theory.problem import RankBudget

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


@dataclass(frozen=True)
class LoraFactors:
    """Updates B_i A_i of rank r: B (L, b, r), A (L, r, a). Raises InputError if the shapes disagree."""

    B: Tensor
    A: Tensor

    def __post_init__(self) -> None:
        if self.B.ndim != 3 or self.A.ndim != 3:
            raise InputError(f"B and A need three axes, found shapes {tuple(self.B.shape)} and {tuple(self.A.shape)}")
        _check_shapes({"A": (self.A, (self.B.shape[0], self.B.shape[2], self.A.shape[2]))})

    def update(self, i: int, rows: slice = _ALL) -> Tensor:
        """The update B_i A_i of layer i, (b, a), or some of its rows."""
        return self.B[i, rows] @ self.A[i]

    def to(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> LoraFactors:
        """The same factors in another dtype or on another device."""
        return LoraFactors(*(t.to(dtype=dtype, device=device) for t in (self.B, self.A)))


@dataclass(frozen=True)
class RasaFactors:
    """Updates B~_i A~_i + B_S D_i A_S (He et al., ICLR 2025, eq. 4).

    private_B (L, b, q), private_A (L, q, a), shared_B (b, R), shared_A (R, a), mixing (L, R): row i is the diagonal
    of D_i. Raises InputError if the shapes disagree, naming both.
    """

    private_B: Tensor
    private_A: Tensor
    shared_B: Tensor
    shared_A: Tensor
    mixing: Tensor

    def __post_init__(self) -> None:
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
        L, _, r = lora.B.shape
        k, q = budget.shared_rank, budget.private_rank
        if r != budget.rank:
            raise InputError(f"the LoRA factors have rank {r}, the budget has rank {budget.rank}")
        if pooled not in ("smallest", "largest"):
            raise InputError(f"pooled must be 'smallest' or 'largest', got {pooled!r}")
        kept, given = (slice(0, q), slice(q, r)) if pooled == "smallest" else (slice(k, r), slice(0, k))
        return cls(
            private_B=lora.B[:, :, kept],
            private_A=lora.A[:, kept],
            shared_B=layers.beside(lora.B[:, :, given]),
            shared_A=lora.A[:, given].reshape(L * k, lora.A.shape[2]),
            mixing=torch.kron(torch.eye(L, dtype=lora.B.dtype, device=lora.B.device), lora.B.new_ones(1, k)),
        )

    def as_lora(self) -> LoraFactors:
        """The same updates as LoRA factors of rank q + R: B_i = [B~_i, B_S D_i], A_i = [A~_i; A_S]."""
        return LoraFactors(
            torch.cat([self.private_B, self.shared_B * self.mixing[:, None]], 2),
            torch.cat([self.private_A, self.shared_A.expand(self.layers, -1, -1)], 1),
        )

    @property
    def layers(self) -> int:
        """L."""
        return int(self.private_B.shape[0])

    @property
    def update_rank(self) -> int:
        """The largest rank that a layer's update can have: q + R = r - k + L k, at most min(b, a)."""
        b, a = self.shared_B.shape[0], self.shared_A.shape[1]
        return int(min(self.private_B.shape[2] + self.shared_B.shape[1], b, a))

    @property
    def parameters(self) -> int:
        """How many numbers the factors hold, the mixing included."""
        return sum(t.numel() for t in self.named().values())

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
        return RasaFactors(self.private_A.mT, self.private_B.mT, self.shared_A.mT, self.shared_B.mT, self.mixing)

    def scaled(self, c: float | Tensor) -> RasaFactors:
        """Factors of c times the updates, c one number or one per layer, (L,): into private_B and mixing."""
        c = torch.as_tensor(c, dtype=self.mixing.dtype, device=self.mixing.device).expand(self.layers)
        return RasaFactors(
            self.private_B * c.reshape(-1, 1, 1), self.private_A, self.shared_B, self.shared_A, self.mixing * c[:, None]
        )

    def evened(self) -> RasaFactors:
        """The same updates for an adapter: `balanced` private terms, |d_ij| at most 1, the scale of a term in the pool.

        A pool column and its row are multiplied by the same number.
        """
        private_B, private_A = balanced(self.private_B, self.private_A)
        largest = self.mixing.abs().amax(0)
        scale = torch.where(largest > 0, largest, 1)
        return RasaFactors(
            private_B, private_A,
            self.shared_B * scale.sqrt(), self.shared_A * scale.sqrt()[:, None], self.mixing / scale,
        )  # fmt: skip

    def to(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> RasaFactors:
        """The same factors in another dtype or on another device."""
        return RasaFactors(**{name: t.to(dtype=dtype, device=device) for name, t in self.named().items()})


def lora_parameters(layers: int, shape: tuple[int, int], rank: int) -> int:
    """L r (a + b): what LoRA of rank r spends, and RaSA but for its mixing of L R numbers."""
    return layers * rank * sum(shape)
