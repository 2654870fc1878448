"""PEFT's LoRA: its tensors and its configuration."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rasa_theory.common import InputError
from rasa_theory.formats.checkpoint import Checkpoint
from rasa_theory.formats.names import PEFT_PREFIX, Entry, LeftOut, ModuleNames, is_floating
from rasa_theory.formats.orientation import adapted_conv1d
from rasa_theory.formats.safetensors import read_json
from rasa_theory.problem import LoraFactors, balanced


def lora_tensors(modules: ModuleNames, factors: LoraFactors, ranks: Sequence[int] | None = None) -> dict[str, Tensor]:
    """PEFT's LoRA weights of every module, its leading `ranks[i]` terms (all of them if None); none for rank 0."""
    tensors = {}
    for i, name in enumerate(modules.names):
        rank = factors.B.shape[2] if ranks is None else ranks[i]
        if rank == 0:
            continue
        B, A = balanced(factors.B[i, :, :rank], factors.A[i, :rank])
        tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"] = A
        tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = B
    return tensors


def lora_config(ranks: dict[str, int], transposed: bool, base: str | None) -> dict[str, Any]:
    """PEFT's adapter_config.json for modules of these ranks; the scaling alpha / r is 1 everywhere.

    Keys of a pattern are regular expressions that PEFT lets match the end of a name: anchored, they match one module.
    """
    counts = list(ranks.values())
    common = max(set(counts), key=lambda rank: (counts.count(rank), rank))
    others = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != common}
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "task_type": None,
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": list(ranks),
        "fan_in_fan_out": transposed,
        "bias": "none",
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "use_rslora": False,
    }


CONFIG = "adapter_config.json"


WEIGHTS = "adapter_model.safetensors"


_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


_MAGNITUDE = ".lora_magnitude_vector"


_MERGE = "merge it into the model, and give the models before and after as --base and --tuned"


_VARIANTS = ("use_dora", "use_qalora", "use_bdlora", "kasa_config", "monteclora_config", "arrow_config")


class Pair(NamedTuple):
    """The factors of one module: keys of A (r, a) and B (b, r); its update is (b, a), B A times the scaling.

    `transposed`: the module's weight is (a, b).
    """

    A: str
    B: str
    shape: tuple[int, int]
    rank: int
    scaling: float
    dtype: torch.dtype
    transposed: bool


@dataclass(frozen=True)
class Settings:
    """What of `adapter_config.json` decides about the updates."""

    r: int
    lora_alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    use_rslora: bool
    fan_in_fan_out: bool
    variant: str | None
    target_parameters: list[str]

    def rank(self, module: str) -> int:
        """r of a module."""
        return self.rank_pattern.get(_matching(self.rank_pattern, module), self.r)

    def scaling(self, module: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) with use_rslora."""
        alpha = self.alpha_pattern.get(_matching(self.alpha_pattern, module), self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


class LoraFolder:
    """The factors in a folder of a PEFT LoRA adapter, by module, and what of it is not taken.

    Raises InputError, naming the file, if one is missing or damaged, the adapter is not LoRA, or factors contradict
    each other or the ranks of the configuration.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._settings = _settings(path)
        if not (path / WEIGHTS).is_file():
            hint = ", only a pickle, which is never opened" if (path / "adapter_model.bin").exists() else ""
            raise InputError(f"{path}: the folder has {CONFIG} but no {WEIGHTS}{hint}; save the adapter as safetensors")
        self._checkpoint = Checkpoint(path / WEIGHTS)
        self.pairs: dict[str, Pair] = {}
        self.left_out: list[LeftOut] = []
        found: dict[str, dict[str, Entry]] = {}
        for key, entry in self._checkpoint.entries.items():
            if match := _FACTOR.fullmatch(key):
                found.setdefault(match[1], {})[match[2]] = entry
            else:
                self.left_out.append(LeftOut(key, _why_no_factor(key)))
        turned = adapted_conv1d(found, self._settings.fan_in_fan_out)
        scaled = {key.split(_MAGNITUDE)[0] for key in self._checkpoint.entries if _MAGNITUDE in key}
        for module, parts in found.items():
            reason = _why_not_taken(module, parts, self._settings)
            if reason is None and parts["A"].name.removesuffix(".lora_A.weight") in scaled:
                reason = _variant("lora_magnitude_vector (DoRA)")
            if reason is not None:
                self.left_out += [LeftOut(entry.name, reason) for entry in parts.values()]
            else:
                self.pairs[module] = self._pair(module, parts["A"], parts["B"], module in turned)

    @property
    def files(self) -> tuple[Path, Path]:
        """The configuration and the factors."""
        return self.path / CONFIG, self.path / WEIGHTS

    @property
    def file(self) -> str:
        """The file of the factors."""
        return str(self.path / WEIGHTS)

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """B (b, r) times the scaling, in float64, and A (r, a) as it is stored."""
        pair = self.pairs[module]
        return self._checkpoint.read(pair.B).double() * pair.scaling, self._checkpoint.read(pair.A)

    def _pair(self, module: str, A: Entry, B: Entry, transposed: bool) -> Pair:
        rank = A.shape[0]
        if B.shape[1] != rank:
            raise InputError(
                f"{self.file}: {A.name!r} has shape {A.shape} and {B.name!r} {B.shape}, which do not multiply as B A; "
                "save the adapter again"
            )
        if (expected := self._settings.rank(module)) != rank:
            raise InputError(
                f"{self.path / CONFIG}: module {module!r} has rank {expected} there, but {A.name!r} has shape "
                f"{A.shape}, rank {rank}; take both files from one adapter, or mend r or rank_pattern"
            )
        wide = torch.float64 if "float64" in (A.dtype, B.dtype) else torch.float32
        scaling = self._settings.scaling(module, rank)
        return Pair(A.name, B.name, (B.shape[0], A.shape[1]), rank, scaling, wide, transposed)


def base_of(path: Path) -> str | None:
    """The base model that an adapter's configuration names, if it does. Raises InputError if it is not sound."""
    name = _config(path).get("base_model_name_or_path")
    return name if isinstance(name, str) else None


def _config(path: Path) -> dict[str, Any]:
    file = path / CONFIG
    if not file.is_file():
        raise InputError(f"{path}: not a folder with {CONFIG}; give the folder of a PEFT LoRA adapter")
    return read_json(file)


def _settings(path: Path) -> Settings:
    file, config = path / CONFIG, _config(path)
    if config.get("peft_type") != "LORA":
        raise InputError(f"{file}: peft_type is {config.get('peft_type')!r}, but only LORA has updates B A; {_MERGE}")

    def value(name: str, default: Any, kind: str, sound: Callable[[Any], bool]) -> Any:
        found = default if config.get(name) is None else config[name]
        if not sound(found):
            raise InputError(f"{file}: {name} must be {kind}, found {str(found)[:80]!r}; mend it")
        return found

    def pattern(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
        return lambda x: isinstance(x, dict) and all(_is_pattern(key) and of(x[key]) for key in x)

    ranks, alphas = "regular expressions, each with a whole number above 0", "regular expressions, each with a number"
    return Settings(
        r=value("r", 8, "a whole number above 0", _is_rank),
        lora_alpha=value("lora_alpha", 8, "a finite number", _is_number),
        rank_pattern=value("rank_pattern", {}, ranks, pattern(_is_rank)),
        alpha_pattern=value("alpha_pattern", {}, alphas, pattern(_is_number)),
        use_rslora=value("use_rslora", False, "true or false", _is_flag),
        fan_in_fan_out=value("fan_in_fan_out", False, "true or false", _is_flag),
        variant=next((name for name in _VARIANTS if config.get(name)), None),
        target_parameters=value("target_parameters", [], "a list of names", _are_names),
    )


def _is_rank(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x > 0


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 1e300


def _is_flag(x: Any) -> bool:
    return isinstance(x, bool)


def _is_pattern(key: str) -> bool:
    try:
        re.compile(key)
    except re.error:
        return False
    return True


def _are_names(x: Any) -> bool:
    return isinstance(x, list) and all(isinstance(name, str) for name in x)


def _matching(patterns: dict[str, Any], module: str) -> str:
    """PEFT's rule since 0.15 (`get_pattern_key`): the first pattern that is the module's name, or its end after a dot.

    The name itself where none is. Ranks and alphas are looked up apart.
    """
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), module)


def _variant(name: str) -> str:
    return f"{name} makes this a variant of LoRA whose update is not B A; {_MERGE}"


def _why_no_factor(key: str) -> str:
    """Why a tensor that is neither lora_A nor lora_B of a module is left out."""
    if ".lora_embedding_" in key:
        return "a factor of an embedding's update; there is one embedding, and a stack needs two layers or more"
    if _MAGNITUDE in key:
        return "the magnitudes of DoRA, not a factor"
    if re.search(r"\.lora_[AB]\.bias\Z", key):
        return "the update of a bias (lora_bias), not a matrix"
    if ".lora_" in key:
        return "not called base_model.model.<module>.lora_A.weight or .lora_B.weight, as the factors of LoRA are"
    return f"a whole tensor beside the factors (modules_to_save, a bias or an embedding), not an update; {_MERGE}"


def _why_not_taken(module: str, parts: dict[str, Entry], settings: Settings) -> str | None:
    """Why the factors of a module are left out; None if they are taken."""
    if len(parts) < 2:
        there, missing = ("A", "B") if "A" in parts else ("B", "A")
        return f"lora_{there} without lora_{missing}"
    if settings.variant is not None:
        return _variant(settings.variant)
    parents = {name.rpartition(".")[0] for name in settings.target_parameters}
    if any(re.fullmatch(rf"(.*\.)?{re.escape(parent)}(\.base_layer)*", module) for parent in parents):
        return "factors of a parameter with several matrices (target_parameters), not of one"
    for entry in parts.values():
        if len(entry.shape) != 2:
            return f"lora_A or lora_B has {len(entry.shape)} axes (a convolution?); a factor has 2"
        if not is_floating(entry.dtype):
            return f"{entry.dtype} cannot be computed with; convert the adapter to bfloat16"
        if 0 in entry.shape:
            return f"shape {entry.shape} is empty"
    return None
