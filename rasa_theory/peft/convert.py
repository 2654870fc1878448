"""A RaSA adapter as a LoRA: exact, of rank q + R, without an SVD."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from torch.nn import functional as F

from rasa_theory.common import InputError, at_least, writable_folder, write_file
from rasa_theory.formats import (
    WEIGHTS_FILE,
    BaseModel,
    ModuleNames,
    is_rasa_key,
    lora_config,
    lora_tensors,
    safetensors_bytes,
)
from rasa_theory.peft.from_factors import factors
from rasa_theory.peft.library import LoraConfig, PeftModel, get_peft_model_state_dict
from rasa_theory.peft.model import tuner_of
from rasa_theory.problem import LoraFactors


def convert_to_lora(
    model: PeftModel, adapter_name: str = "default", rank: int | None = None
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Convert a RaSA adapter to a LoRA with the same updates, of rank q + R = r - k + L k in a pool of L layers.

    B = [B~_i, B_S] diag(d_i) and A = [A~_i; A_S], with the scale of each term spread evenly over B and A. peft's own
    `convert_to_lora` makes the best LoRA of a smaller rank, by an SVD of every update.

    **Arguments:**

    - `model`: the model with the adapter.
    - `adapter_name`: the adapter to convert.
    - `rank`: one rank for all modules, at least the largest q + R; zeros fill the factors. None: the rank of each
      module, which needs `rank_pattern` where pools differ in size. Some servers read no pattern.

    **Returns:** the configuration, and the tensors by their keys in a file, `modules_to_save` included.

    **Raises:**

    - `InputError`: if the model has no such adapter, it trains biases, or `rank` is too small.
    """
    pools = {pool.name: pool for pool in tuner_of(model).pools(adapter_name)}
    config = model.peft_config[adapter_name]
    if config.bias != "none":
        raise InputError(f"adapter {adapter_name!r} trains biases, which this LoRA cannot hold; merge it instead")
    ranks = {name: pool.budget.private_rank + pool.rank for pool in pools.values() for name in pool.modules}
    if rank is not None and at_least("rank", rank, 1) < max(ranks.values()):
        raise InputError(f"rank {rank} is below q + R = {max(ranks.values())}, the rank of the updates", "rank")
    tensors: dict[str, Tensor] = {}
    for name, one in factors(model, adapter_name).items():
        tensors |= lora_tensors(ModuleNames(pools[name].modules), _padded(one.as_lora(), rank))
    ranks = ranks if rank is None else dict.fromkeys(ranks, rank)
    whole = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    tensors |= {key: value for key, value in whole.items() if not is_rasa_key(key)}
    fields = lora_config(ranks, config.fan_in_fan_out, BaseModel(config.base_model_name_or_path))
    fields |= {"task_type": config.task_type, "modules_to_save": config.modules_to_save}
    return LoraConfig(**fields), {key: value.contiguous() for key, value in tensors.items()}


def save_as_lora(path: str | Path, model: PeftModel, adapter_name: str = "default", rank: int | None = None) -> Path:
    """Write the LoRA of `convert_to_lora` into a folder, for peft and for servers. Returns the folder.

    Raises InputError as `convert_to_lora` does, and if the folder cannot be written.
    """
    config, tensors = convert_to_lora(model, adapter_name, rank)
    out = writable_folder(Path(path))
    content = safetensors_bytes(tensors, {"format": "pt"})
    write_file(out / WEIGHTS_FILE, lambda file: file.write(content))
    base = type(model.get_base_model())
    mapping = {"base_model_class": base.__name__, "parent_library": base.__module__}
    config.save_pretrained(str(out), auto_mapping_dict=None if config.task_type else mapping)
    return out


def _padded(lora: LoraFactors, rank: int | None) -> LoraFactors:
    """The same updates with factors of a rank, filled up with terms of zeros; None: as they are."""
    missing = 0 if rank is None else rank - lora.B.shape[2]
    return LoraFactors(F.pad(lora.B, (0, missing)), F.pad(lora.A, (0, 0, 0, missing)))
