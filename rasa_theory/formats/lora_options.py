"""Options of PEFT's LoRA: those that leave the update B A alone, and those that change it, which are refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rasa_theory.common import InputError

MERGE = "merge it into the model, and give the models before and after as --base and --tuned"
"""What to do with an adapter whose update can only be had from the models."""

_APPLIED = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "target_parameters"}
"""Options that `PeftConfig` reads."""

_HARMLESS = {
    # facts about the file
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    # which modules there are: the tensors say so
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying",
    "modules_to_tie", "target_modules_to_tie",
    # tensors of their own beside the factors, each left out with a reason
    "modules_to_save", "bias", "lora_bias", "trainable_token_indices",
    # training only
    "lora_dropout", "velora_config", "runtime_config", "ephemeral_gpu_offload", "lorap_lr_ratio", "lorap_emb_lr",
    "lora_dtype", "merge_weights",
    # details of another option, which is looked at by itself
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "megatron_core",
}  # fmt: skip
"""Options that do not change what B A times the scaling is, in any version of PEFT and in the forks that write them."""

_INITIAL = {"gaussian", "eva", "orthogonal", "mica", "true", "false"}
"""Values of init_lora_weights that leave the weights of the base as they are."""

_INITIAL_CHANGING_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")

_MEANING = {
    "use_dora": "scales every column of the sum of weight and update (DoRA)",
    "use_bdlora": "stores factors that are block-diagonal (BD-LoRA)",
    "kasa_config": "changes the base's weights and puts a diagonal between B and A (KaSA)",
    "monteclora_config": "perturbs the update at random (Monteclora)",
    "megatron_config": "may hold a part of every factor only (Megatron's tensor parallelism)",
    "enable_lora": "adapts parts of a merged matrix, each with factors of its own",
    "use_merged_linear": "adapts parts of a merged matrix, each with factors of its own",
}

_MEANING_UNMERGED = {
    "use_qalora": "pools the input before A (QALoRA)",
    "alora_invocation_tokens": "applies the update to some tokens only (aLoRA)",
    "arrow_config": "chooses among several adapters for every token (Arrow)",
    "layer_replication": "gives the model more layers than the base has",
}
"""Options of adapters that PEFT does not merge, or not into the layers of the base: merging is no way out."""


def check_options(file: Path, config: Mapping[str, Any]) -> None:
    """Raise InputError, naming the file and the option, if an option makes the update another than B A alpha / r.

    Options that are not known are refused too unless they are off: they may be of a later version of PEFT.
    """
    _check_initial(file, config.get("init_lora_weights"))
    for name, value in config.items():
        if name in _APPLIED or name in _HARMLESS or name == "init_lora_weights" or _is_off(value):
            continue
        if name in _MEANING:
            consequence = f"which {_MEANING[name]}: the update is not B A"
            raise InputError(f"{file}: {name} is {_short(value)}, {consequence}; {MERGE}")
        if name in _MEANING_UNMERGED:
            consequence = f"which {_MEANING_UNMERGED[name]}: the update is not B A"
            raise InputError(
                f"{file}: {name} is {_short(value)}, {consequence}, and merging does not make it an update of the "
                "base's weights; such adapters cannot be read"
            )
        raise InputError(
            f"{file}: {name} is {_short(value)}, an option that is not known and may change what the factors mean; if "
            f"it does not, remove it from the file; else {MERGE}"
        )


def _check_initial(file: Path, value: Any) -> None:
    """Refuse adapters that began at B0 A0, which PEFT took off the base's weights: their update is B A - B0 A0.

    PEFT sets the option to true when it converts such an adapter on saving.
    """
    if value is None or str(value).lower() in _INITIAL:
        return
    if str(value).lower().startswith(_INITIAL_CHANGING_BASE):
        raise InputError(
            f"{file}: init_lora_weights is {_short(value)}, which changes the base's weights before training, so that "
            "B A is no update of the base; save it with PEFT's save_pretrained(.., "
            f"path_initial_model_for_weight_conversion=..), or {MERGE}"
        )
    raise InputError(
        f"{file}: init_lora_weights is {_short(value)}, which is not known, and may change the base's weights; if it "
        f"does not, set it to true in the file; else {MERGE}"
    )


def _is_off(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def _short(value: Any) -> str:
    return repr(value)[:80]
