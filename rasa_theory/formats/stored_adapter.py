"""An adapter in files: for every module the keys of its factors, with the scaling of their product."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rasa_theory.common import InputError
from rasa_theory.formats.checkpoint import Checkpoint
from rasa_theory.formats.lora_options import MERGE
from rasa_theory.formats.tensors import Entry, Exclusion, LeftOut, is_floating


class Term(NamedTuple):
    """The keys of a product B diag(d) A. `mixing` holds d from its entry `first` on; None: d = 1."""

    B: str
    A: str
    mixing: str | None = None
    first: int = 0


class FactorPair(NamedTuple):
    """The factors of one module. The update (b, a) is the sum of the terms, times `scaling`; `rank` is theirs together.

    `transposed`: the module's weight is (a, b). `swapped`: the file has the factors as A^T (a, r) and B^T (r, b).
    `kernel`: the last axes (k, k) of a convolution, whose update is the matrix (out, in k k).
    """

    terms: tuple[Term, ...]
    shape: tuple[int, int]
    rank: int
    scaling: float
    dtype: torch.dtype
    transposed: bool = False
    swapped: bool = False
    kernel: tuple[int, ...] = ()


@dataclass(frozen=True)
class StoredAdapter:
    """The updates of an adapter by module (`pairs`), and the other tensors of its file, each with the reason.

    `files`: what was read to know them, the file of the factors last.
    """

    path: Path
    checkpoint: Checkpoint
    pairs: Mapping[str, FactorPair]
    left_out: list[LeftOut]
    files: tuple[Path, ...]

    @property
    def file(self) -> str:
        """The file of the factors."""
        return str(self.files[-1])

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """B (b, r) times scaling and mixing, in float64, and A (r, a) in the dtype of the file."""
        pair = self.pairs[module]
        sides = [self._term(term, pair) for term in pair.terms]
        return torch.cat([B for B, _ in sides], 1) * pair.scaling, torch.cat([A for _, A in sides], 0)

    def _term(self, term: Term, pair: FactorPair) -> tuple[Tensor, Tensor]:
        B, A = self.checkpoint.read(term.B).double(), self.checkpoint.read(term.A)
        if pair.kernel:
            B, A = B.flatten(1), A.flatten(1)
        if pair.swapped:
            B, A = B.mT, A.mT
        if term.mixing is not None:
            B = B * self.checkpoint.read(term.mixing).double()[term.first : term.first + B.shape[1]]
        return B, A


def factor_pair(file: Path, A: Entry, B: Entry, scaling: float, transposed: bool, swapped: bool = False) -> FactorPair:
    """One product B A. Raises InputError, naming the file, if the two do not multiply."""
    (r, a), (b, rank) = (A.shape[::-1], B.shape[::-1]) if swapped else (A.shape, B.shape)
    if rank != r:
        raise InputError(
            f"{file}: {A.name!r} has shape {A.shape} and {B.name!r} {B.shape}, which do not multiply as B A; "
            "save the adapter again"
        )
    return FactorPair((Term(B.name, A.name),), (b, a), r, scaling, wide(A, B), transposed, swapped)


def wide(*entries: Entry) -> torch.dtype:
    """The dtype to compute in: float64 if a factor has it, else float32."""
    return torch.float64 if "float64" in (entry.dtype for entry in entries) else torch.float32


def unusable(entries: Mapping[str, Entry]) -> tuple[str, Exclusion] | None:
    """The reason why the factors A and B of a module, by side, are left out, with its kind; None if they are sound."""
    if len(entries) < 2:
        there, missing = ("A", "B") if "A" in entries else ("B", "A")
        return f"the factor {there} of a module without its factor {missing}", Exclusion.NO_PARTNER
    for entry in entries.values():
        if len(entry.shape) != 2:
            reason = f"factors with {len(entry.shape)} axes (of a convolution?); those of a Linear layer have 2"
            return reason, Exclusion.NO_FACTOR
        if not is_floating(entry.dtype):
            return f"{entry.dtype} cannot be computed with; convert the adapter to bfloat16", Exclusion.DTYPE
    return None


def beside_factors(what: str | None) -> str:
    """The reason why a tensor of an adapter's file that is no factor is left out; `what`: its format, None for none."""
    if what is None:
        return "a whole tensor beside the factors, not an update"
    return f"belongs to {what}, whose update cannot be read as B A; {MERGE}"


def check_gathered(file: Path, entry: Entry) -> None:
    """Raise InputError if a factor is empty, or has no axes: what a process without the shards of others saves."""
    if len(entry.shape) < 2 or 0 in entry.shape:
        raise InputError(
            f"{file}: {entry.name!r} has shape {entry.shape}, as if DeepSpeed ZeRO-3 or FSDP had saved it without "
            "gathering its shards; gather the parameters (stage3_gather_16bit_weights_on_model_save, zero_to_fp32.py, "
            "or a full state dict) and save the adapter again"
        )
