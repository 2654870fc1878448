"""Adapters of every known tool, recognised by their configuration or by their keys, and read where that is exact."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rasa_theory.common import InputError
from rasa_theory.formats.checkpoint import Checkpoint
from rasa_theory.formats.lora_options import MERGE
from rasa_theory.formats.mlx import MLX_WEIGHTS, mlx_adapter
from rasa_theory.formats.names import PEFT_PREFIX
from rasa_theory.formats.peft import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    PeftConfig,
    adapter_type,
    peft_adapter,
    read_config,
    weights_of,
)
from rasa_theory.formats.rasa import rasa_adapter
from rasa_theory.formats.spellings import (
    Foreign,
    Key,
    Side,
    Spelling,
    adapter_format,
    bare,
    foreign,
    is_rasa_key,
    kohya_module,
    spelt,
)
from rasa_theory.formats.stored_adapter import (
    FactorPair,
    StoredAdapter,
    beside_factors,
    check_gathered,
    factor_pair,
    unusable,
)
from rasa_theory.formats.tensors import Entry, Exclusion, LeftOut

_PIPELINE = frozenset(
    {"transformer", "unet", "text_encoder", "text_encoder_2", "text_encoder_3", "diffusion_model", "prior"}
)
_OF_DIFFUSERS = re.compile(r"\.(?:(?:single_)?transformer_blocks|attn[12]|to_[qkv]|to_out|add_q_proj)(?:\.|\Z)")
_RESULT = re.compile(r".+/[0-9]+/(?:(?:private|shared)_[AB]|mixing)")
_CALLED_A = re.compile(r"(?P<stem>.*[._])(?P<side>[Aa])(?P<end>(?:\.weight)?)")
_METADATA = "lora_adapter_metadata"  # what diffusers writes into the header since 0.34
_ROUNDING_OF_ALPHA = 2**-8  # an alpha in bfloat16 has 8 bits
_WITHOUT_SCALING = {
    Spelling.PEFT: f"give the folder of the adapter, with its {CONFIG_FILE}",
    Spelling.MLX: f"give the folder of the adapter, with its {CONFIG_FILE}",
    Spelling.TORCHTUNE: f"give the folder that torchtune writes in PEFT's layout, with its {CONFIG_FILE}",
    Spelling.NEMO: "export the adapter to PEFT's layout",
}
"""Spellings whose tools keep alpha or the scale in another file, and what to do without it."""


def adapter_folder(path: Path) -> Path | None:
    """The folder with an adapter's configuration, if `path` is it or the file of the factors in it; None otherwise."""
    folder = path.parent if path.name in (WEIGHTS_FILE, MLX_WEIGHTS) else path
    return folder if (folder / CONFIG_FILE).is_file() else None


def adapter_in_folder(folder: Path) -> StoredAdapter:
    """The adapter in a folder with an adapter_config.json: LoRA of PEFT or MLX, or RaSA in one of its layouts.

    Raises InputError if it is of another type, or as the readers of these formats do.
    """
    config, file = read_config(folder), folder / CONFIG_FILE
    kind = adapter_type(config)
    if kind == "LORA":
        return peft_adapter(folder)
    if kind == "RASA":
        flag = config.get("fan_in_fan_out") is True
        return rasa_adapter(folder, weights_of(folder), (file, folder / WEIGHTS_FILE), flag)
    if kind is None and "lora_parameters" in config:
        return mlx_adapter(folder, file, config)
    raise InputError(
        f"{file}: peft_type is {kind!r}, but only LORA and RASA have updates B A; if it can be merged, {MERGE}"
    )


def adapter_in_tensors(checkpoint: Checkpoint, convolutions: bool = False) -> StoredAdapter | None:
    """The adapter that a file, or a folder without configuration, holds by its keys; None if it holds none.

    It does if at least half of its tensors are an adapter's. With `convolutions`, the updates of those in two
    dimensions are read as matrices (out, in k k); else they are left out. Raises InputError, naming the format, if its
    updates cannot be had from the file alone, or if it is a model with adapters that are not merged.
    """
    refuse_unmerged(checkpoint)
    _refuse_results(checkpoint)
    _refuse_bare_factors(checkpoint)
    keys, path = _AdapterKeys.of(checkpoint), checkpoint.path
    if not keys.prevail_in(checkpoint):
        return None
    if keys.are_rasa:
        return rasa_adapter(path, checkpoint, checkpoint.files)
    if not keys.sides_of:
        formats = "; ".join(sorted({other.what for other in keys.foreign.values()}))
        raise InputError(f"{path}: holds an adapter ({formats}), whose update cannot be read as B A; {MERGE}")
    scalings = _Scalings(checkpoint, keys.sides_of)
    left_out = [LeftOut(name, beside_factors(other.what), Exclusion.NO_FACTOR) for name, other in keys.foreign.items()]
    left_out += [LeftOut(name, beside_factors(None), Exclusion.NO_FACTOR) for name in keys.others]
    changed = {other.module: other.what for other in keys.foreign.values()} | keys.strangers()
    pairs: dict[str, FactorPair] = {}
    for module, sides in keys.sides_of.items():
        for entry in sides.values():
            check_gathered(path, entry)
        sides, kernel = _flattened(sides) if convolutions else (sides, ())
        refusal = unusable(sides)
        if refusal is None and module in changed:
            refusal = f"{changed[module]}: the update is not B A; {MERGE}", Exclusion.VARIANT
        if refusal is not None:
            left_out += [LeftOut(entry.name, *refusal) for entry in sides.values()]
            continue
        spelling = keys.spelling_of[module]
        scaling = scalings.of(module, spelling, sides["A"], keys.alpha_of.get(module))
        pair = factor_pair(path, sides["A"], sides["B"], scaling, False)._replace(kernel=kernel)
        pairs[kohya_module(module) if spelling is Spelling.KOHYA else module] = pair
    return StoredAdapter(path, checkpoint, pairs, left_out, checkpoint.files)


def holds_adapter(checkpoint: Checkpoint) -> bool:
    """True if a file, by its keys, is an adapter, whether or not it can be read. Raises InputError for two in one."""
    return _AdapterKeys.of(checkpoint).prevail_in(checkpoint)


def refuse_unmerged(checkpoint: Checkpoint) -> None:
    """Raise InputError if a checkpoint is a model with adapters beside its weights.

    What they add is not in the file: neither alpha, nor whether they were merged at the moment when it was saved.
    """
    names = checkpoint.entries
    wrapped = next((name for name in names if name.endswith((".base_layer.weight", ".base.weight"))), None)
    for name in names:
        key = spelt(name)
        place = foreign(name) if key is None or key.side is Side.ALPHA else key
        if place is None:
            continue
        candidates = [
            f"{prefix}{place.module}.{own}" for prefix in ("", PEFT_PREFIX) for own in ("weight", "linear.weight")
        ]
        base = wrapped or next((candidate for candidate in candidates if candidate in names), None)
        if base is not None and checkpoint.file_of(name) != checkpoint.file_of(base):
            raise InputError(
                f"{checkpoint.path}: {checkpoint.file_of(name)} holds an adapter ({name!r}) and "
                f"{checkpoint.file_of(base)} the weights beside it; name the one file that is meant, for whether the "
                "adapter is in the weights already is not said"
            )
        if base is not None:
            raise InputError(
                f"{checkpoint.path}: a model with adapters that are not merged ({name!r} beside {base!r}), whose "
                "update is not in its weights; merge them (merge_and_unload) and save the model, or give the adapter's "
                "own folder as --source"
            )


def _refuse_results(checkpoint: Checkpoint) -> None:
    """Raise InputError if the tensors are the factors of stacks that `reconstruct` has written."""
    name = next((name for name in checkpoint.entries if _RESULT.fullmatch(name)), None)
    if name is not None:
        raise InputError(
            f"{checkpoint.path}: {name!r} is a factor that reconstruct has written, not an update; give the source "
            "from which it was made"
        )


def _refuse_bare_factors(checkpoint: Checkpoint) -> None:
    """Raise InputError if half of the tensors come in pairs called A and B with a small common rank.

    mlx-vlm writes `X.A` (a, r) and `X.B` (r, b); others write `X.A.weight` (r, a) and `X.B.weight` (b, r), or `w_a`
    and `w_b`. Their names alone do not tell, for A and B may be two kinds of module; a small common r does.
    """
    entries = checkpoint.entries
    pairs = []
    for name, A in entries.items():
        match = _CALLED_A.fullmatch(name)
        if match is None or adapter_format(name) is not None:
            continue
        B = entries.get(f"{match['stem']}{'b' if match['side'] == 'a' else 'B'}{match['end']}")
        if B is not None and _multiply_at_low_rank(A.shape, B.shape):
            pairs.append((A, B))
    if pairs and 4 * len(pairs) >= len(entries):
        A, B = pairs[0]
        raise InputError(
            f"{checkpoint.path}: {A.name!r} {A.shape} and {B.name!r} {B.shape} look like the factors of an adapter, "
            f"whose scaling is not in this file; {MERGE}"
        )


def _multiply_at_low_rank(A: tuple[int, ...], B: tuple[int, ...]) -> bool:
    """Whether B A, or A B, is a product of two matrices with fewer terms than it has rows and columns."""
    if not len(A) == len(B) == 2:
        return False
    return A[0] == B[1] < min(A[1], B[0]) or A[1] == B[0] < min(A[0], B[1])


# ---- a file without configuration


@dataclass(frozen=True)
class _AdapterKeys:
    """The tensors of a file by what they are.

    Factors A and B by module, with their spelling; the alphas of these modules; tensors of other formats; the rest.
    """

    sides_of: dict[str, dict[str, Entry]]
    spelling_of: dict[str, Spelling]
    alpha_of: dict[str, str]
    foreign: dict[str, Foreign]
    others: list[str]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> _AdapterKeys:
        keys = cls({}, {}, {}, {}, [])
        alphas: dict[str, str] = {}
        for name, entry in checkpoint.entries.items():
            key = spelt(name)
            if key is None:
                keys._add_other(name)
            elif key.side is Side.ALPHA:
                alphas[name] = key.module
            else:
                keys._add_factor(checkpoint.path, key, entry)
        modules = keys.sides_of.keys() | {other.module for other in keys.foreign.values()}
        for name, module in alphas.items():
            if module in modules:
                keys.alpha_of[module] = name
            elif adapter_format(module) is not None or spelt(module) is not None:
                raise InputError(f"{checkpoint.path}: it is not known to which factors {name!r} belongs; {MERGE}")
            else:
                keys.others.append(name)
        return keys

    def strangers(self) -> dict[str, str]:
        """Modules with a tensor of their own beside the factors that is no bias: it may be a scaling, say."""
        found = {}
        for name in self.others:
            module, _, part = name.rpartition(".")
            while module and bare(module) not in self.sides_of:
                module, _, _ = module.rpartition(".")
            if module and "bias" not in part and part != "diff_b":
                found[bare(module)] = f"{name!r} stands beside its factors, and may change what they mean"
        return found

    def prevail_in(self, checkpoint: Checkpoint) -> bool:
        """True if at least half of the tensors, and one of them, are an adapter's."""
        count = sum(map(len, self.sides_of.values())) + len(self.alpha_of) + len(self.foreign)
        return count > 0 and len(checkpoint.entries) <= 2 * count

    @property
    def are_rasa(self) -> bool:
        """True if there are adapters of RaSA, and no others."""
        return bool(self.foreign) and not self.sides_of and all(map(is_rasa_key, self.foreign))

    def _add_factor(self, path: Path, key: Key, entry: Entry) -> None:
        sides = self.sides_of.setdefault(key.module, {})
        if key.side.value in sides:
            raise InputError(
                f"{path}: module {key.module!r} has two factors {key.side.value}, {sides[key.side.value].name!r} and "
                f"{entry.name!r}; save each adapter by itself"
            )
        sides[key.side.value] = entry
        self.spelling_of[key.module] = key.spelling

    def _add_other(self, name: str) -> None:
        if not name.endswith(".bias") and (other := foreign(name)) is not None:
            self.foreign[name] = other
        else:
            self.others.append(name)


def _flattened(sides: dict[str, Entry]) -> tuple[dict[str, Entry], tuple[int, ...]]:
    """The factors of a convolution, A (r, in, k, k) and B (out, r, 1, 1), as matrices, and (k, k).

    Others are returned as they are, with ().
    """
    if len(sides) == 2 and all(len(entry.shape) == 4 for entry in sides.values()) and sides["B"].shape[2:] == (1, 1):
        flat = {
            side: entry._replace(shape=(entry.shape[0], math.prod(entry.shape[1:]))) for side, entry in sides.items()
        }
        return flat, sides["A"].shape[2:]
    return sides, ()


class _Scalings:
    """The scalings of the modules in a file: by its alphas, by its metadata, or 1 where all loaders take it so."""

    def __init__(self, checkpoint: Checkpoint, modules: Collection[str]) -> None:
        self._checkpoint, self._file = checkpoint, checkpoint.path
        self._config_of = _configs_in_metadata(checkpoint.path, checkpoint.metadata)
        # `transformer` is a part of a pipeline, and the body of GPT-2 and its relatives: attention tells them apart
        with_names = {module.partition(".")[0] for module in modules if _OF_DIFFUSERS.search(module)}
        self._components = _PIPELINE - ({"transformer"} - with_names)

    def of(self, module: str, spelling: Spelling, A: Entry, alpha: str | None) -> float:
        """The scaling of one module. Raises InputError if the file does not say it, or says two."""
        rank = A.shape[0]
        component, _, within = module.partition(".")
        config = self._config_of.get(component)
        by_metadata = None if config is None else self._by_metadata(config, module, within, A)
        if alpha is not None:
            by_alpha = self._alpha(alpha) / rank
            if by_metadata is not None and not math.isclose(by_alpha, by_metadata, rel_tol=_ROUNDING_OF_ALPHA):
                raise InputError(
                    f"{self._file}: {alpha!r} says the scaling {by_alpha:g}, and {_METADATA} {by_metadata:g}; remove "
                    "the one that is wrong"
                )
            return by_alpha
        if by_metadata is not None:
            return by_metadata
        is_of_pipeline = component in self._components and not _is_wrapped_by_peft(A.name)
        if spelling in _WITHOUT_SCALING and not (spelling is Spelling.PEFT and is_of_pipeline):
            raise InputError(
                f"{self._file}: factors of LoRA as {spelling.value} spells them ({A.name!r}), whose scaling is not in "
                f"this file; {_WITHOUT_SCALING[spelling]}"
            )
        return 1.0  # without alpha, sd-scripts, ComfyUI and diffusers take alpha = rank

    def _by_metadata(self, config: PeftConfig, module: str, within: str, A: Entry) -> float:
        """The scaling of a module, called `within` in its component. Raises InputError if its rank is another."""
        rank = A.shape[0]
        if (expected := config.rank(within)) != rank:
            raise InputError(
                f"{self._file}: module {module!r} has rank {expected} in {_METADATA}, but {A.name!r} has shape "
                f"{A.shape}, rank {rank}; save the adapter again"
            )
        return config.scaling(within, rank)

    def _alpha(self, name: str) -> float:
        entry = self._checkpoint.entries[name]
        tensor = self._checkpoint.read(name)
        value = float(tensor) if tensor.numel() == 1 else float("nan")
        if not abs(value) < 1e300 or value == 0:
            raise InputError(
                f"{self._file}: {name!r}, of shape {entry.shape}, must be one finite number other than 0, for tools "
                "differ about 0; set it to the alpha of the training"
            )
        return value


def _is_wrapped_by_peft(name: str) -> bool:
    """Whether a key has PEFT's own prefix, so that PEFT has written it, and alpha into its configuration."""
    return f".{PEFT_PREFIX}" in f".{name}"


def _configs_in_metadata(file: Path, metadata: Mapping[str, str]) -> dict[str, PeftConfig]:
    """The LoRA configuration of every component of a pipeline, which diffusers keeps in the header of the file."""
    if _METADATA not in metadata:
        return {}
    try:
        fields = json.loads(metadata[_METADATA])
        by_component: dict[str, dict[str, Any]] = {}
        for name, value in fields.items():
            component, _, option = name.partition(".")
            by_component.setdefault(component, {})[option] = value
    except (ValueError, AttributeError, RecursionError):
        raise InputError(f"{file}: its {_METADATA} is no JSON object; save the adapter again") from None
    return {component: PeftConfig.of(file, config) for component, config in by_component.items()}
