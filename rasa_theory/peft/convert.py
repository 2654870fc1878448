"""A RaSA adapter as a LoRA: exact, of rank q + R, without an SVD."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from rasa_theory.common import InputError, at_least, writable_folder, write_file
from rasa_theory.formats import (
    COMPILED,
    WEIGHTS_FILE,
    BaseModel,
    LoraFile,
    ModuleNames,
    is_rasa_key,
    lora_config,
    lora_tensors,
    safetensors_bytes,
)
from rasa_theory.peft.from_factors import factors
from rasa_theory.peft.library import LoraConfig, PeftModel, get_peft_model_state_dict
from rasa_theory.peft.model import tuner_of


def convert_to_lora(
    model: PeftModel, adapter_name: str = "default", rank: int | None = None
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Convert a RaSA adapter to a LoRA with the same updates, of rank q + R = r - k + L k in a pool of L layers.

    B = [B~_i, B_S] diag(d_i) and A = [A~_i; A_S], with the scale of each term spread evenly over B and A. All modules
    have one rank, with factors filled up with zeros, since servers do not read `rank_pattern` and `alpha_pattern`.
    peft's own `convert_to_lora` makes the best LoRA of a smaller rank, by an SVD of every update.

    Arguments:
        model: the model with the adapter.
        adapter_name: the adapter to convert.
        rank: the rank of all modules, at least the largest q + R. None: the largest q + R.

    Returns:
        The configuration, and the tensors by their keys in a file, `modules_to_save` included.

    Raises:
        InputError: the model has no such adapter, it trains biases, or `rank` is too small.
    """
    pools = {pool.name: pool for pool in tuner_of(model).pools(adapter_name)}
    config = model.peft_config[adapter_name]
    if config.bias != "none":
        raise InputError(f"adapter {adapter_name!r} trains biases, which this LoRA cannot hold; merge it instead")
    needed = max(pool.budget.private_rank + pool.rank for pool in pools.values())
    chosen = needed if rank is None else at_least("rank", rank, 1)
    if chosen < needed:
        raise InputError(f"rank {rank} is below q + R = {needed}, the rank of the updates", "rank")
    finish, tensors, modules = LoraFile(chosen), dict[str, Tensor](), list[str]()
    for name, one in factors(model, adapter_name).items():
        names = tuple(module.replace(COMPILED, "") for module in pools[name].modules)
        modules += names
        tensors |= {key: finish.tensor(key, t) for key, t in lora_tensors(ModuleNames(names), one.as_lora()).items()}
    whole = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    tensors |= {key: value for key, value in whole.items() if not is_rasa_key(key)}
    fields = lora_config(
        dict.fromkeys(modules, chosen),
        config.fan_in_fan_out,
        BaseModel(config.base_model_name_or_path),
        has_experts=_has_experts(model),
    )
    fields |= {"task_type": config.task_type, "modules_to_save": config.modules_to_save}
    return LoraConfig(**fields), {key: value.contiguous() for key, value in tensors.items()}


def _has_experts(model: PeftModel) -> bool:
    """Whether the model has fused experts, (experts, b, a) in one parameter, adapted or not."""
    parameters = model.get_base_model().named_parameters()
    return any(parameter.ndim == 3 and "experts" in name.split(".") for name, parameter in parameters)


def save_as_lora(path: str | Path, model: PeftModel, adapter_name: str = "default", rank: int | None = None) -> Path:
    """Write the LoRA of `convert_to_lora` into a folder, for peft and for servers.

    Arguments:
        path: the folder, which is made if it does not exist.
        model: the model with the adapter.
        adapter_name: the adapter to convert.
        rank: the rank of all modules, at least the largest q + R. None: the largest q + R.

    Returns:
        The folder.

    Raises:
        InputError: the model has no such adapter, it trains biases, `rank` is too small, or the folder cannot be
            written.
    """
    config, tensors = convert_to_lora(model, adapter_name, rank)
    out = writable_folder(Path(path))
    content = safetensors_bytes(tensors, {"format": "pt"})
    write_file(out / WEIGHTS_FILE, lambda file: file.write(content))
    base = type(model.get_base_model())
    mapping = {"base_model_class": base.__name__, "parent_library": base.__module__}
    config.save_pretrained(str(out), auto_mapping_dict=None if config.task_type else mapping)
    return out
