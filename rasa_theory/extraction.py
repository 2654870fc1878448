"""From stacks to an adapter with an error report, one stack at a time, so that an interruption loses one at most."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from rasa_theory.bounds import CERTIFICATES, lower_bound
from rasa_theory.console import write_file
from rasa_theory.descent import Callback
from rasa_theory.errors import InputError
from rasa_theory.exports import (
    FORMATS,
    Modules,
    dense_tensors,
    join_safetensors,
    lora_config,
    lora_tensors,
    rasa_config,
    rasa_tensors,
)
from rasa_theory.factors import LoraFactors, RasaFactors, lora_parameters
from rasa_theory.lora import solve_lora
from rasa_theory.objective import layer_errors
from rasa_theory.problem import LayerStack, RankBudget
from rasa_theory.rasa import SolverOptions, solve_rasa

STORED = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_EXACT = 1024  # min(b, a) up to which a LoRA alone has its full spectra taken
_SHARES = (50, 90, 99)


@dataclass(frozen=True)
class ExtractSettings:
    """What to extract: RaSA(r, k) beside LoRA of rank r, `format` of `exports.FORMATS`, stored as `dtype`.

    k = 0 solves no RaSA. Raises InputError if a value is not one of those that there are.
    """

    rank: int
    k: int
    format: str = "lora"
    dtype: str = "float32"
    certificate: str = "closed"
    solver: SolverOptions = field(default_factory=SolverOptions)

    def __post_init__(self) -> None:
        RankBudget(self.rank, self.k)
        for name, known in (("format", FORMATS), ("dtype", STORED), ("certificate", CERTIFICATES)):
            if getattr(self, name) not in known:
                raise InputError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.format in ("lora-exact-rasa", "rasa") and self.k == 0:
            raise InputError(f"k must be at least 1 for format {self.format}, got 0; format lora has no pool")

    def plain(self) -> dict[str, Any]:
        """As data, to compare with those of an earlier run."""
        return {
            "rank": self.rank, "k": self.k, "format": self.format, "dtype": self.dtype,
            "certificate": self.certificate, "start": str(self.solver.start), "sweep": self.solver.sweep,
            "max_sweeps": self.solver.max_sweeps, "rtol": self.solver.rtol, "seed": self.solver.seed,
            "max_cancellation": self.solver.max_cancellation,
        }  # fmt: skip


@dataclass(frozen=True)
class Extracted:
    """What is written of one stack: the tensors in the dtype of the files, and its row of the report."""

    tensors: dict[str, Tensor]
    row: dict[str, Any]


def extract_stack(
    stack: LayerStack, modules: Modules, settings: ExtractSettings, callback: Callback | None = None
) -> Extracted:
    """LoRA of rank r and RaSA(r, k) of one stack, the tensors of the format, and how far they are from it.

    All errors are squared, in units of the input, per layer and summed. A LoRA without RaSA of layers larger than 1024
    is taken from the certified leading part, and full spectra are not reported. Raises InputError if r > min(b, a), or
    if the dtype of the files cannot hold the factors.
    """
    exact = settings.k > 0 or min(stack.shape) <= _EXACT
    lora = solve_lora(stack, settings.rank, "exact" if exact else "fast", settings.solver.seed)
    best: LoraFactors | RasaFactors = lora.factors
    rasa_error, rasa_errors, floor = lora.error, lora.layer_errors, None
    if settings.k > 0:
        budget = RankBudget(settings.rank, settings.k)
        found = solve_rasa(stack, budget, settings.solver, callback)
        bound = lower_bound(stack, budget, settings.certificate)
        rasa_error, rasa_errors, floor = found.error, found.layer_errors, [bound.value, bound.name]
        if settings.format != "lora":
            best = found.factors
    tensors, stored = _stored(stack, modules, best, settings)
    L, spent = stack.layers, lora_parameters(stack.layers, stack.shape, settings.rank)
    spectra = _spectral_facts(stack.svd().S) if exact else [_leading_facts(stack, lora.factors, i) for i in range(L)]
    norms = stack.layer_norms_squared
    row = {
        "name": stack.name, "kind": modules.kind, "layers": L, "shape": list(stack.shape),
        "transposed": modules.transposed, "rank": settings.rank, "k": settings.k,
        "norm_squared": stack.norm_squared, "e_lora": lora.error, "e_lora_interval": list(lora.interval),
        "e_rasa": rasa_error, "lower_bound": floor and floor[0], "lower_bound_name": floor and floor[1],
        "e_stored": math.fsum(stored),
        "parameters": {"lora": spent, "rasa": spent + L * L * settings.k, "stored": _count(tensors)},
        "ranks": dict.fromkeys(modules.names, _written_rank(best)),
        "modules": [
            {
                "module": name, "norm_squared": norms[i], "e_lora": lora.layer_errors[i], "e_rasa": rasa_errors[i],
                "e_stored": stored[i], **spectra[i],
            }
            for i, name in enumerate(modules.names)
        ],
    }  # fmt: skip
    return Extracted(tensors, row)


def _written_rank(factors: LoraFactors | RasaFactors) -> int:
    return int(factors.B.shape[2] if isinstance(factors, LoraFactors) else factors.as_lora().B.shape[2])


def _count(tensors: dict[str, Tensor]) -> int:
    return sum(t.numel() for t in tensors.values())


def _stored(
    stack: LayerStack, modules: Modules, factors: LoraFactors | RasaFactors, settings: ExtractSettings
) -> tuple[dict[str, Tensor], list[float]]:
    """The tensors of the format, rounded, and the squared error of every layer's update as rebuilt from them."""
    factors = factors.to(torch.float64)
    if settings.format == "diff":
        tensors = dense_tensors(modules, factors)
    elif settings.format == "rasa" and isinstance(factors, RasaFactors):
        tensors = rasa_tensors(modules, factors)
    else:
        tensors = lora_tensors(modules, factors if isinstance(factors, LoraFactors) else factors.as_lora())
    kept = {key: tensor.to(STORED[settings.dtype]).contiguous().cpu() for key, tensor in tensors.items()}
    for key, tensor in kept.items():
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(
                f"{settings.dtype} cannot hold the entries of {key!r}; write bfloat16 or float32 (--dtype)"
            )
    return kept, _errors_of(stack, modules, kept, settings.format)


def _errors_of(stack: LayerStack, modules: Modules, kept: dict[str, Tensor], format_: str) -> list[float]:
    """||M_i - update_i||^2 with the updates that the written tensors alone give, in float64."""
    on = {key: tensor.to(stack.device, torch.float64) for key, tensor in kept.items()}
    if format_ == "diff":
        errors = [0.0] * stack.layers
        for i, rows, M in stack.tiles():
            update = on[f"{modules.names[i]}.weight"]
            oriented = update.mT if modules.transposed else update
            errors[i] += float(((M.double() - oriented[rows]) ** 2).sum())
        return errors
    if format_ == "rasa":
        kind = modules.kind.replace(".", "__")
        A, B, mixing = (
            [on[f"base_model.model.{n}.rasa_{x}.weight"] for n in modules.names] for x in ("A", "B", "mixing")
        )
        q = A[0].shape[0]
        private_B = torch.stack([b * d[:q] for b, d in zip(B, mixing, strict=True)])
        B_S, A_S = (on[f"base_model.rasa_shared_{x}.{kind}.weight"] for x in ("B", "A"))
        D = torch.stack([d[q:] for d in mixing])
        return layer_errors(stack, RasaFactors(private_B, torch.stack(A), B_S, A_S, D))
    A, B = ([on[f"base_model.model.{n}.lora_{x}.weight"] for n in modules.names] for x in ("A", "B"))
    return layer_errors(stack, LoraFactors(torch.stack(B), torch.stack(A)))


def _spectral_facts(sigma: Tensor) -> list[dict[str, Any]]:
    """Stable rank, entropy rank, and ranks for shares of the energy, of every layer: singular values (L, m)."""
    facts: list[dict[str, Any]] = []
    for energy in (sigma**2).cpu():
        total = float(energy.sum())
        if total == 0:
            facts.append(dict.fromkeys(("stable_rank", "entropy_rank", *(f"rank_{s}" for s in _SHARES)), 0))
            continue
        p, cumulative = energy / total, torch.cumsum(energy, 0) / total
        entropy = -float(torch.special.xlogy(p, p).sum())
        needed = {f"rank_{s}": int((cumulative < s / 100 * (1 - 1e-12)).sum()) + 1 for s in _SHARES}
        facts.append({"stable_rank": total / float(energy[0]), "entropy_rank": math.exp(entropy)} | needed)
    return facts


def _leading_facts(stack: LayerStack, factors: LoraFactors, i: int) -> dict[str, Any]:
    """What the leading part alone says: the stable rank, and ranks for shares of the energy that it reaches."""
    energy = (factors.B[i].double() ** 2).sum(0).cpu()
    total = stack.layer_norms_squared[i]
    facts: dict[str, Any] = {"stable_rank": total / float(energy[0]) if total > 0 else 0, "entropy_rank": None}
    for s in _SHARES:
        reached = (torch.cumsum(energy, 0) >= s / 100 * total).nonzero()
        facts[f"rank_{s}"] = int(reached[0]) + 1 if len(reached) else None
    return facts


# ---- files


class Workplace:
    """The folder of an extraction: what is finished of it, and whether it may go on.

    `plan` is what must not change between two runs that share the folder: settings, inputs, the stacks. Parts lie in
    `parts` until all are there. Raises InputError if the folder belongs to another plan.
    """

    def __init__(self, out: Path, plan: dict[str, Any]) -> None:
        self.out, self.plan, self.parts = out, plan, out / "parts"
        self.finished = False
        for name in ("report.json", "parts/manifest.json"):
            if not (out / name).exists():
                continue
            known = _read_json(out / name)
            if known.get("plan") != plan:
                changed = next((key for key in plan if known.get("plan", {}).get(key) != plan[key]), "plan")
                raise InputError(
                    f"{out} holds an extraction with other {changed}; name another folder with --out, or delete it"
                )
            self.finished |= name == "report.json"
        if not self.finished:
            self.parts.mkdir(parents=True, exist_ok=True)
            if not (self.parts / "manifest.json").exists():
                write_file(
                    self.parts / "manifest.json", lambda f: f.write(json.dumps({"plan": plan}, indent=1).encode())
                )

    def row(self, n: int) -> dict[str, Any] | None:
        """The row of the n-th stack, if it is finished."""
        path = self.parts / f"{n:05d}.json"
        return _read_json(path) if path.exists() else None

    def add(self, n: int, extracted: Extracted) -> None:
        """Write the tensors of the n-th stack and then its row, which says that they are there."""
        write_file(self.tensors(n), lambda f: f.write(save(extracted.tensors)))
        text = json.dumps(extracted.row, allow_nan=False)
        write_file(self.parts / f"{n:05d}.json", lambda f: f.write(text.encode()))

    def tensors(self, n: int) -> Path:
        """Where the tensors of the n-th stack lie: dense ones in their final place."""
        if self.plan["settings"]["format"] == "diff":
            return self.out / f"diff-{n + 1:05d}.safetensors"
        return self.parts / f"{n:05d}.safetensors"

    def finish(self, rows: Sequence[dict[str, Any]], base: str | None) -> None:
        """The adapter as one file with its configuration; for dense differences the index of their files."""
        settings, parts = self.plan["settings"], [self.tensors(n) for n in range(len(rows))]
        if settings["format"] == "diff":
            files = {key: part.name for part in parts for key in _keys(part)}
            index = {"metadata": {"rasa_theory": "tuned - base, reconstructed"}, "weight_map": files}
            write_file(
                self.out / "diff.safetensors.index.json", lambda f: f.write(json.dumps(index, indent=1).encode())
            )
            return
        ranks = {name: rank for row in rows for name, rank in row["ranks"].items()}
        transposed = any(row["transposed"] for row in rows)
        if settings["format"] == "rasa":
            config = rasa_config(list(ranks), settings["rank"], settings["k"], transposed, base)
        else:
            config = lora_config(ranks, transposed, base)
        write_file(self.out / "adapter_model.safetensors", lambda f: join_safetensors(parts, f, {"format": "pt"}))
        write_file(self.out / "adapter_config.json", lambda f: f.write(json.dumps(config, indent=1).encode()))

    def clear(self) -> None:
        """Remove the parts, which the finished files have made superfluous."""
        shutil.rmtree(self.parts, ignore_errors=True)


def identity(path: Path) -> dict[str, Any]:
    """What tells whether a safetensors file has changed: size, time, and the digest of its header."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        digest = hashlib.sha256(file.read(size)).hexdigest()
    facts = path.stat()
    return {"file": str(path), "bytes": facts.st_size, "modified_ns": facts.st_mtime_ns, "header_sha256": digest}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); delete it to begin anew") from None
    return found if isinstance(found, dict) else {}


def _keys(path: Path) -> Iterator[str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as tensors:
        yield from tensors.keys()
