"""PEFT's LoRA: keys, tensors and configuration, written and read.

The update of a module is scaling B A, with A (r, in) and B (out, r) under the keys that `lora_key` spells.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rasa_theory.common import InputError
from rasa_theory.formats.checkpoint import Checkpoint
from rasa_theory.formats.names import PEFT_PREFIX, ModuleNames
from rasa_theory.formats.orientation import adapted_conv1d
from rasa_theory.formats.safetensors import read_json
from rasa_theory.formats.tensors import Entry, Exclusion, LeftOut, is_floating
from rasa_theory.problem import LoraFactors, balanced

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_FACTOR = re.compile(rf"{re.escape(PEFT_PREFIX)}(.+)\.lora_([AB])\.weight")
_BIAS = re.compile(r"\.lora_[AB]\.bias\Z")
_MAGNITUDE = ".lora_magnitude_vector"
_OF_AN_ADAPTER = re.compile(r"(?:\A|\.)lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)(?=\.|\Z)")
_MERGE = "merge it into the model, and give the models before and after as --base and --tuned"
_VARIANTS = ("use_dora", "use_qalora", "use_bdlora", "kasa_config", "monteclora_config", "arrow_config")


def lora_key(module: str, side: str) -> str:
    """The key of a module's factor; `side` is A or B."""
    return f"{PEFT_PREFIX}{module}.lora_{side}.weight"


def is_lora_tensor(name: str) -> bool:
    """True if a dotted name has a component that LoRA alone uses, with or without PEFT's prefix."""
    return _OF_AN_ADAPTER.search(name) is not None


# ---- tensors


def lora_tensors(modules: ModuleNames, factors: LoraFactors, ranks: Sequence[int] | None = None) -> dict[str, Tensor]:
    """The factors of every module by key, the leading `ranks[i]` terms (None: all); none for a module of rank 0."""
    tensors = {}
    for i, name in enumerate(modules.names):
        rank = factors.B.shape[2] if ranks is None else ranks[i]
        if rank == 0:
            continue
        B, A = balanced(factors.B[i, :, :rank], factors.A[i, :rank])
        tensors[lora_key(name, "A")] = A
        tensors[lora_key(name, "B")] = B
    return tensors


def lora_factors(modules: ModuleNames, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> LoraFactors:
    """The factors of an adapter in float64, B (L, b, r) and A (L, r, a), r the largest rank, at scaling 1.

    Modules of less rank, or without tensors, are filled up with zeros. `shape` is (b, a).
    """
    (b, a), L = shape, len(modules.names)
    sides = [
        (tensors[lora_key(name, "B")], tensors[lora_key(name, "A")]) if lora_key(name, "A") in tensors else None
        for name in modules.names
    ]
    r = max((len(side[1]) for side in sides if side is not None), default=0)
    B, A = torch.zeros(L, b, r, dtype=torch.float64), torch.zeros(L, r, a, dtype=torch.float64)
    for i, side in enumerate(sides):
        if side is not None:
            rank = len(side[1])
            B[i, :, :rank], A[i, :rank] = side
    return LoraFactors(B, A)


# ---- the configuration


def lora_config(ranks: Mapping[str, int], transposed: bool, base: str | None) -> dict[str, Any]:
    """The adapter_config.json for modules of these ranks; the scaling alpha / r is 1 everywhere.

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


@dataclass(frozen=True)
class PeftConfig:
    """The fields of an adapter_config.json that decide about the updates."""

    r: int
    lora_alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    use_rslora: bool
    fan_in_fan_out: bool
    variant: str | None
    target_parameters: list[str]

    @classmethod
    def read(cls, folder: Path) -> PeftConfig:
        """The configuration in a folder. Raises InputError, naming the file, if it is not sound or not LoRA's."""
        file, config = folder / CONFIG_FILE, _read_config(folder)
        if config.get("peft_type") != "LORA":
            raise InputError(
                f"{file}: peft_type is {config.get('peft_type')!r}, but only LORA has updates B A; {_MERGE}"
            )

        def value(name: str, default: Any, kind: str, is_sound: Callable[[Any], bool]) -> Any:
            chosen = default if config.get(name) is None else config[name]
            if not is_sound(chosen):
                raise InputError(f"{file}: {name} must be {kind}, found {str(chosen)[:80]!r}; mend it")
            return chosen

        ranks, alphas = (
            "regular expressions, each with a whole number above 0",
            "regular expressions, each with a number",
        )
        return cls(
            r=value("r", 8, "a whole number above 0", _is_rank),
            lora_alpha=value("lora_alpha", 8, "a finite number", _is_number),
            rank_pattern=value("rank_pattern", {}, ranks, lambda x: _are_patterns(x, _is_rank)),
            alpha_pattern=value("alpha_pattern", {}, alphas, lambda x: _are_patterns(x, _is_number)),
            use_rslora=value("use_rslora", False, "true or false", _is_flag),
            fan_in_fan_out=value("fan_in_fan_out", False, "true or false", _is_flag),
            variant=next((name for name in _VARIANTS if config.get(name)), None),
            target_parameters=value("target_parameters", [], "a list of names", _are_names),
        )

    def rank(self, module: str) -> int:
        """The rank r of a module."""
        return self.rank_pattern.get(_matching(self.rank_pattern, module), self.r)

    def scaling(self, module: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) with use_rslora."""
        alpha = self.alpha_pattern.get(_matching(self.alpha_pattern, module), self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def adapter_type(config: dict[str, Any]) -> Any:
    """The type of adapter that a configuration names, "LORA" or "RASA"; None if it names none."""
    return config.get("peft_type")


def base_of(folder: Path) -> str | None:
    """The base model that an adapter's configuration names, or None. Raises InputError if the file is not sound."""
    name = _read_config(folder).get("base_model_name_or_path")
    return name if isinstance(name, str) else None


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG_FILE).is_file():
        raise InputError(f"{folder}: not a folder with {CONFIG_FILE}; give the folder of a PEFT LoRA adapter")
    return read_json(folder / CONFIG_FILE)


def _matching(patterns: dict[str, Any], module: str) -> str:
    """PEFT's rule since 0.15 (`get_pattern_key`): the first pattern that is the module's name, or its end after a dot.

    Without such a pattern, the name itself. Ranks and alphas are looked up apart.
    """
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), module)


def _is_rank(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x > 0


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 1e300


def _is_flag(x: Any) -> bool:
    return isinstance(x, bool)


def _are_names(x: Any) -> bool:
    return isinstance(x, list) and all(isinstance(name, str) for name in x)


def _are_patterns(x: Any, is_sound: Callable[[Any], bool]) -> bool:
    return isinstance(x, dict) and all(_is_pattern(key) and is_sound(x[key]) for key in x)


def _is_pattern(key: str) -> bool:
    try:
        re.compile(key)
    except re.error:
        return False
    return True


# ---- a folder


class FactorPair(NamedTuple):
    """The factors of one module: keys of A (r, a) and B (b, r). The update (b, a) is B A times `scaling`.

    `transposed`: the module's weight is (a, b).
    """

    A: str
    B: str
    shape: tuple[int, int]
    rank: int
    scaling: float
    dtype: torch.dtype
    transposed: bool


class LoraFolder:
    """The folder of a PEFT LoRA adapter: the factors in it by module (`pairs`), and the other tensors (`left_out`).

    Raises InputError, naming the file, if one is missing or damaged, the adapter is not LoRA, or factors contradict
    each other or the ranks of the configuration.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._config = PeftConfig.read(path)
        if not (path / WEIGHTS_FILE).is_file():
            hint = ", only a pickle, which is never opened" if (path / "adapter_model.bin").exists() else ""
            raise InputError(
                f"{path}: the folder has {CONFIG_FILE} but no {WEIGHTS_FILE}{hint}; save the adapter as safetensors"
            )
        self._checkpoint = Checkpoint(path / WEIGHTS_FILE)
        self.pairs: dict[str, FactorPair] = {}
        self.left_out: list[LeftOut] = []
        sides_of: dict[str, dict[str, Entry]] = {}
        for key, entry in self._checkpoint.entries.items():
            if match := _FACTOR.fullmatch(key):
                sides_of.setdefault(match[1], {})[match[2]] = entry
            else:
                self.left_out.append(_no_factor(key))
        transposed = adapted_conv1d(sides_of, self._config.fan_in_fan_out)
        with_magnitudes = {key.split(_MAGNITUDE)[0] for key in self._checkpoint.entries if _MAGNITUDE in key}
        for module, sides in sides_of.items():
            refusal = _refusal(module, sides, self._config, PEFT_PREFIX + module in with_magnitudes)
            if refusal is None:
                self.pairs[module] = self._pair(module, sides["A"], sides["B"], module in transposed)
            else:
                self.left_out += [LeftOut(entry.name, *refusal) for entry in sides.values()]

    @property
    def files(self) -> tuple[Path, Path]:
        """The configuration and the factors."""
        return self.path / CONFIG_FILE, self.path / WEIGHTS_FILE

    @property
    def file(self) -> str:
        """The file of the factors."""
        return str(self.path / WEIGHTS_FILE)

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """B (b, r) times the scaling, in float64, and A (r, a) in the dtype of the file."""
        pair = self.pairs[module]
        return self._checkpoint.read(pair.B).double() * pair.scaling, self._checkpoint.read(pair.A)

    def _pair(self, module: str, A: Entry, B: Entry, transposed: bool) -> FactorPair:
        rank = A.shape[0]
        if B.shape[1] != rank:
            raise InputError(
                f"{self.file}: {A.name!r} has shape {A.shape} and {B.name!r} {B.shape}, which do not multiply as B A; "
                "save the adapter again"
            )
        if (expected := self._config.rank(module)) != rank:
            raise InputError(
                f"{self.path / CONFIG_FILE}: module {module!r} has rank {expected} there, but {A.name!r} has shape "
                f"{A.shape}, rank {rank}; take both files from one adapter, or mend r or rank_pattern"
            )
        wide = torch.float64 if "float64" in (A.dtype, B.dtype) else torch.float32
        scaling = self._config.scaling(module, rank)
        return FactorPair(A.name, B.name, (B.shape[0], A.shape[1]), rank, scaling, wide, transposed)


def _no_factor(key: str) -> LeftOut:
    """A tensor that is neither lora_A nor lora_B of a module, with the reason why it is left out."""
    reason = f"a whole tensor beside the factors (modules_to_save, a bias or an embedding), not an update; {_MERGE}"
    if ".lora_embedding_" in key:
        reason = "a factor of an embedding's update; there is one embedding, and a stack needs two layers or more"
    elif _MAGNITUDE in key:
        reason = "the magnitudes of DoRA, not a factor"
    elif _BIAS.search(key):
        reason = "the update of a bias (lora_bias), not a matrix"
    elif ".lora_" in key:
        reason = f"not called {lora_key('<module>', 'A')} or .lora_B.weight, as the factors of LoRA are"
    return LeftOut(key, reason, Exclusion.NO_FACTOR)


def _refusal(
    module: str, sides: dict[str, Entry], config: PeftConfig, has_magnitudes: bool
) -> tuple[str, Exclusion] | None:
    """The reason why the factors of a module are left out, with its kind; None if they are taken."""
    if len(sides) < 2:
        there, missing = ("A", "B") if "A" in sides else ("B", "A")
        return f"lora_{there} without lora_{missing}", Exclusion.NO_PARTNER
    if config.variant is not None:
        return _of_variant(config.variant)
    parents = {name.rpartition(".")[0] for name in config.target_parameters}
    if any(re.fullmatch(rf"(.*\.)?{re.escape(parent)}(\.base_layer)*", module) for parent in parents):
        reason = "factors of a parameter with several matrices (target_parameters), not of one"
        return reason, Exclusion.VARIANT
    for entry in sides.values():
        if len(entry.shape) != 2:
            reason = f"lora_A or lora_B has {len(entry.shape)} axes (a convolution?); a factor has 2"
            return reason, Exclusion.NO_FACTOR
        if not is_floating(entry.dtype):
            return f"{entry.dtype} cannot be computed with; convert the adapter to bfloat16", Exclusion.DTYPE
        if 0 in entry.shape:
            return f"shape {entry.shape} is empty", Exclusion.EMPTY
    return _of_variant("lora_magnitude_vector (DoRA)") if has_magnitudes else None


def _of_variant(name: str) -> tuple[str, Exclusion]:
    return f"{name} makes this a variant of LoRA whose update is not B A; {_MERGE}", Exclusion.VARIANT
