"""PEFT's LoRA: keys, tensors and configuration, written and read.

The update of a module is scaling B A, with A (r, in) and B (out, r) under the keys that `lora_key` spells.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rasa_theory.common import InputError
from rasa_theory.formats.base_model import BaseModel
from rasa_theory.formats.checkpoint import Checkpoint
from rasa_theory.formats.lora_options import MERGE, check_options
from rasa_theory.formats.names import PEFT_PREFIX, ModuleNames
from rasa_theory.formats.orientation import adapted_conv1d, called_conv1d
from rasa_theory.formats.safetensors import read_json
from rasa_theory.formats.spellings import Spelling, adapter_format, foreign, spelt
from rasa_theory.formats.stored_adapter import FactorPair, StoredAdapter, check_gathered, factor_pair, unusable
from rasa_theory.formats.tensors import Entry, Exclusion, LeftOut, padded_with_zeros
from rasa_theory.problem import LoraFactors, balanced

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_BIAS = re.compile(r"\.lora_[AB](?:\.[^.]+)?\.bias\Z")
_WITHIN = r"\.base_layer"
_OF_AN_EXPERT = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
_MAMBAS = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})


def lora_key(module: str, side: str) -> str:
    """The key of a module's factor; `side` is A or B."""
    return f"{PEFT_PREFIX}{module}.lora_{side}.weight"


def refused_by_peft(module: str, model_type: str | None) -> str | None:
    """The reason why PEFT refuses to adapt a Linear layer of this name in a model of this type; None if it does not."""
    if model_type in _MAMBAS and module.rpartition(".")[2] == "out_proj":
        return f"PEFT refuses out_proj of {model_type} models, whose fast path does not call it"
    return None


def whole_key(module: str, part: str) -> str:
    """The key of a tensor of a module that the adapter replaces; `part` is weight or bias."""
    return f"{PEFT_PREFIX}{module}.{part}"


# ---- tensors


def lora_tensors(modules: ModuleNames, factors: LoraFactors, ranks: Sequence[int] | None = None) -> dict[str, Tensor]:
    """The factors of every module by key, the leading `ranks[i]` terms (None: all); none for a module of rank 0."""
    each = [factors.B.shape[2]] * len(modules.names) if ranks is None else ranks
    pairs = {
        name: balanced(factors.B[i, :, :rank], factors.A[i, :rank])
        for i, (name, rank) in enumerate(zip(modules.names, each, strict=True))
        if rank > 0
    }
    if modules.parameter is not None and pairs:
        return _of_experts(modules, pairs, max(each))
    return {lora_key(name, side): t for name, (B, A) in pairs.items() for side, t in (("A", A), ("B", B))}


def _of_experts(modules: ModuleNames, pairs: Mapping[str, tuple[Tensor, Tensor]], rank: int) -> dict[str, Tensor]:
    """The factors of all experts of a parameter, A (experts, r, in) and B (out, r, experts), padded to one rank.

    PEFT's ParamWrapper has them as matrices, (experts r, in) and (out, r experts); `LoraFile` flattens them.
    """
    some_B, some_A = next(iter(pairs.values()))
    A = some_A.new_zeros(len(modules.names), rank, some_A.shape[1])
    B = some_B.new_zeros(some_B.shape[0], rank, len(modules.names))
    for i, name in enumerate(modules.names):
        if name in pairs:
            own_B, own_A = pairs[name]
            A[i, : len(own_A)], B[:, : len(own_A), i] = own_A, own_B
    parameter = str(modules.parameter)
    return {lora_key(parameter, "A"): A, lora_key(parameter, "B"): B}


def lora_factors(modules: ModuleNames, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> LoraFactors:
    """The factors of an adapter in float64, B (L, b, r) and A (L, r, a), r the largest rank, at scaling 1.

    Modules of less rank, or without tensors, are filled up with zeros. `shape` is (b, a).
    """
    (b, a), L = shape, len(modules.names)
    if modules.parameter is not None and lora_key(modules.parameter, "A") in tensors:
        B, A = (tensors[lora_key(modules.parameter, side)].double() for side in ("B", "A"))
        return LoraFactors(B.permute(2, 0, 1).contiguous(), A)
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


def lora_config(
    ranks: Mapping[str, int],
    transposed: bool,
    base: BaseModel,
    parameters: Sequence[str] = (),
    whole: Sequence[str] = (),
    has_experts: bool = False,
) -> dict[str, Any]:
    """The adapter_config.json for modules of these ranks; the scaling alpha / r is 1 everywhere.

    `parameters` are the names in `ranks` of parameters, with several matrices each. `whole` are modules that the
    adapter replaces. `has_experts`: the model has fused experts. PEFT then takes every target called like a projection
    of an expert before fusion for that expert, also where it is a module of its own; so such modules are targeted by
    their weight. Keys of a pattern are regular expressions that PEFT lets match the end of a name: anchored, they
    match one module.
    """
    counts = list(ranks.values())
    common = max(set(counts), key=lambda rank: (counts.count(rank), rank))
    taken_for_experts = [
        name for name in ranks if has_experts and name not in parameters and name.rpartition(".")[2] in _OF_AN_EXPERT
    ]
    target_of = {name: f"{name}.weight" if name in taken_for_experts else name for name in ranks}
    others = {f"^{re.escape(target_of[name])}": rank for name, rank in ranks.items() if rank != common}
    targets = [*parameters, *(target_of[name] for name in taken_for_experts)]
    more: dict[str, Any] = {"target_parameters": targets} if targets else {}
    if whole:
        more["modules_to_save"] = list(whole)
    return {
        "peft_type": "LORA",
        **base.fields(),
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": [name for name in ranks if name not in (*parameters, *taken_for_experts)],
        "fan_in_fan_out": transposed,
        "bias": "none",
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "use_rslora": False,
        **more,
    }


@dataclass(frozen=True)
class LoraFile:
    """The `Finish` of a LoRA: factors padded with zeros to `rank` (None: as they are), and those of experts flattened.

    `parameters` are the parameters with several matrices. PEFT wraps the parameters of one module one in another, in
    the order in which the module has them, and the name of each but the last says that it is within.
    """

    rank: int | None
    parameters: tuple[str, ...] = ()

    def key(self, key: str) -> str:
        for parameter in self.parameters:
            for side in ("A", "B"):
                if key == lora_key(parameter, side):
                    return lora_key(self._wrapper(parameter), side)
        return key

    def _wrapper(self, parameter: str) -> str:
        module = parameter.rpartition(".")[0]
        of_module = [name for name in self.parameters if name.rpartition(".")[0] == module]
        return module + ".base_layer" * (len(of_module) - 1 - of_module.index(parameter))

    def tensor(self, key: str, tensor: Tensor) -> Tensor:
        side = next((side for side in "AB" if key.endswith(f".lora_{side}.weight")), None)
        if side is None:
            return tensor
        if side == "A":  # (r, in) or (experts, r, in)
            padded = padded_with_zeros(tensor, -2, self.rank)
            return padded if padded.ndim == 2 else padded.flatten(0, 1)
        padded = padded_with_zeros(tensor, 1, self.rank)  # (out, r) or (out, r, experts)
        return padded if padded.ndim == 2 else padded.flatten(1, 2)


@dataclass(frozen=True)
class PeftConfig:
    """The fields of an adapter_config.json that decide about the updates."""

    r: int
    lora_alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    use_rslora: bool
    fan_in_fan_out: bool
    target_parameters: list[str]

    @classmethod
    def of(cls, file: Path, config: Mapping[str, Any]) -> PeftConfig:
        """The fields of a configuration read from `file`.

        Raises InputError, naming the file, if a field is not sound, or the update is not B A times the scaling.
        """
        check_options(file, config)

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
            target_parameters=value("target_parameters", [], "a list of names", _are_names),
        )

    def rank(self, module: str) -> int:
        """The rank r of a module, or of a parameter by its whole name."""
        return self.rank_pattern.get(_matching(self.rank_pattern, module), self.r)

    def parameters_of(self, module: str) -> set[str]:
        """The names within a module of its parameters that the adapter targets; mostly none."""
        names = [name.rpartition(".") for name in self.target_parameters]
        wrapped = rf"(?:.*\.)?{{}}(?:{_WITHIN})*"
        return {own for parent, _, own in names if re.fullmatch(wrapped.format(re.escape(parent)), module)}

    def scaling(self, module: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) with use_rslora."""
        alpha = self.alpha_pattern.get(_matching(self.alpha_pattern, module), self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def adapter_type(config: dict[str, Any]) -> Any:
    """The type of adapter that a configuration names, "LORA" or "RASA"; None if it names none."""
    return config.get("peft_type")


def base_of(folder: Path) -> str | None:
    """The base model that an adapter's configuration names, or None, also where there is no configuration.

    Raises InputError if the file is not sound.
    """
    if not (folder / CONFIG_FILE).is_file():
        return None
    name = read_config(folder).get("base_model_name_or_path")
    return name if isinstance(name, str) else None


def read_config(folder: Path) -> dict[str, Any]:
    """The adapter_config.json of a folder. Raises InputError if there is none, or it is not sound."""
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


def weights_of(folder: Path) -> Checkpoint:
    """The tensors of an adapter's folder. Raises InputError, with the reason, if they are not there or not sound."""
    if not (folder / WEIGHTS_FILE).is_file():
        hint = ", only a pickle, which is never opened" if (folder / "adapter_model.bin").exists() else ""
        raise InputError(
            f"{folder}: the folder has {CONFIG_FILE} but no {WEIGHTS_FILE}{hint}; save the adapter as safetensors"
        )
    return Checkpoint(folder / WEIGHTS_FILE)


def peft_adapter(folder: Path) -> StoredAdapter:
    """The LoRA adapter in a folder that PEFT has written.

    Raises InputError, naming the file, if one is missing or damaged, the update is not B A times the scaling, or
    factors contradict each other or the ranks of the configuration.
    """
    config = PeftConfig.of(folder / CONFIG_FILE, read_config(folder))
    checkpoint = weights_of(folder)
    files = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    sides_of: dict[str, dict[str, Entry]] = {}
    left_out: list[LeftOut] = []
    names: dict[str | None, str] = {}
    for key, entry in checkpoint.entries.items():
        place = spelt(key)
        if place is None or place.spelling is not Spelling.PEFT or not key.startswith(PEFT_PREFIX):
            left_out.append(_no_factor(key))
            continue
        check_gathered(files[1], entry)
        names.setdefault(place.adapter, key)
        sides_of.setdefault(place.module, {})[place.side.value] = entry
    if len(names) > 1:
        shown = ", ".join(map(repr, names.values()))
        raise InputError(f"{files[1]}: holds factors of several adapters, {shown}; save each by itself")
    transposed = adapted_conv1d(sides_of, config.fan_in_fan_out)
    beside = [one.name for one in left_out if one.name.startswith(PEFT_PREFIX) and not _BIAS.search(one.name)]
    changed = {other.module: other.what for other in map(foreign, beside) if other is not None}
    pairs: dict[str, FactorPair] = {}
    for module, sides in sides_of.items():
        refusal = _refusal(module, sides, config, changed.get(module))
        if refusal is None:
            pairs[module] = _pair(files, config, module, sides, module in transposed)
        else:
            left_out += [LeftOut(entry.name, *refusal) for entry in sides.values()]
    return StoredAdapter(folder, checkpoint, pairs, left_out, files)


def _pair(
    files: tuple[Path, Path], config: PeftConfig, module: str, sides: Mapping[str, Entry], transposed: bool
) -> FactorPair:
    A, B = sides["A"], sides["B"]
    rank, target = A.shape[0], _target(config, module)
    pair = factor_pair(files[1], A, B, config.scaling(target, rank), transposed)
    if (expected := config.rank(target)) != rank:
        raise InputError(
            f"{files[0]}: module {module!r} has rank {expected} there, but {A.name!r} has shape "
            f"{A.shape}, rank {rank}; take both files from one adapter, or mend r or rank_pattern"
        )
    return pair


def _target(config: PeftConfig, module: str) -> str:
    """The name by which PEFT looks for the rank and alpha of a module, which may be targeted by its weight."""
    return f"{module}.weight" if config.parameters_of(module) else module


def _is_weight_alone(module: str, own: set[str], sides: Mapping[str, Entry], config: PeftConfig) -> bool:
    """True if factors are of the weight of a Linear layer that is targeted by this parameter.

    A fused parameter has r rows of A for each expert. The weight of a Conv1D, (in, out), is adapted as it lies.
    """
    has_one_matrix = "A" in sides and sides["A"].shape[:1] == (config.rank(_target(config, module)),)
    return own == {"weight"} and has_one_matrix and not called_conv1d(module)


def _no_factor(key: str) -> LeftOut:
    """A tensor that is neither lora_A nor lora_B of a module, with the reason why it is left out."""
    kind = adapter_format(key)
    if kind is None:
        reason = f"a whole tensor beside the factors (modules_to_save, a bias or an embedding), not an update; {MERGE}"
    elif _BIAS.search(key):
        reason = "the update of a bias (lora_bias), not a matrix"
    elif spelt(key) is None:
        reason = f"belongs to {kind}; {MERGE}"
    else:
        reason = f"not called {lora_key('<module>', 'A')} or .lora_B.weight, as the factors of LoRA are"
    return LeftOut(key, reason, Exclusion.NO_FACTOR)


def _refusal(
    module: str, sides: dict[str, Entry], config: PeftConfig, variant: str | None
) -> tuple[str, Exclusion] | None:
    """The reason why the factors of a module are left out, with its kind; None if they are taken."""
    if (own := config.parameters_of(module)) and not _is_weight_alone(module, own, sides, config):
        reason = "factors of a parameter with several matrices, or of unknown orientation (target_parameters)"
        return reason, Exclusion.VARIANT
    if (reason_and_kind := unusable(sides)) is not None:
        return reason_and_kind
    if variant is not None:
        return f"{variant}: the update is not B A; {MERGE}", Exclusion.VARIANT
    return None
