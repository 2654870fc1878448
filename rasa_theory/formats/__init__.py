"""Formats of files and names: each read and written in one place."""

from rasa_theory.formats.adapter_files import MLX_WEIGHTS, adapter_in_folder, adapter_in_tensors, refuse_unmerged
from rasa_theory.formats.architecture import Architecture, architecture
from rasa_theory.formats.checkpoint import Checkpoint
from rasa_theory.formats.model_checkpoint import ModelCheckpoint
from rasa_theory.formats.names import ModuleNames, dense_tensor, layer_span, name_in_task
from rasa_theory.formats.orientation import adapted_conv1d, called_conv1d, model_config, model_types, oriented
from rasa_theory.formats.peft import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    adapter_type,
    base_of,
    lora_config,
    lora_factors,
    lora_key,
    lora_tensors,
    peft_adapter,
)
from rasa_theory.formats.quantised import refuse_quantised
from rasa_theory.formats.rasa import (
    COMPILED,
    MODULE_PARTS,
    RESERVED,
    RasaConfig,
    in_first_layout,
    is_rasa_key,
    key_of_parameter,
    module_key,
    module_parameter,
    pool_attribute,
    pool_key,
    pool_parameter,
    pools_of,
    rasa_factors,
    rasa_layout,
    rasa_modules,
    rasa_tensors,
)
from rasa_theory.formats.roles import Place, Role, place_by_name
from rasa_theory.formats.safetensors import (
    join_safetensors,
    opened,
    read_header,
    read_json,
    read_tensors,
    safetensors_bytes,
    write_safetensors,
)
from rasa_theory.formats.shards import PICKLES
from rasa_theory.formats.spellings import adapter_format
from rasa_theory.formats.stored_adapter import StoredAdapter
from rasa_theory.formats.tensors import Entry, Exclusion, LeftOut, is_floating

__all__ = [
    "COMPILED",
    "CONFIG_FILE",
    "MLX_WEIGHTS",
    "MODULE_PARTS",
    "PICKLES",
    "RESERVED",
    "WEIGHTS_FILE",
    "Architecture",
    "Checkpoint",
    "Entry",
    "Exclusion",
    "LeftOut",
    "ModelCheckpoint",
    "ModuleNames",
    "Place",
    "RasaConfig",
    "Role",
    "StoredAdapter",
    "adapted_conv1d",
    "adapter_format",
    "adapter_in_folder",
    "adapter_in_tensors",
    "adapter_type",
    "architecture",
    "base_of",
    "called_conv1d",
    "dense_tensor",
    "in_first_layout",
    "is_floating",
    "is_rasa_key",
    "join_safetensors",
    "key_of_parameter",
    "layer_span",
    "lora_config",
    "lora_factors",
    "lora_key",
    "lora_tensors",
    "model_config",
    "model_types",
    "module_key",
    "module_parameter",
    "name_in_task",
    "opened",
    "oriented",
    "peft_adapter",
    "place_by_name",
    "pool_attribute",
    "pool_key",
    "pool_parameter",
    "pools_of",
    "rasa_factors",
    "rasa_layout",
    "rasa_modules",
    "rasa_tensors",
    "read_header",
    "read_json",
    "read_tensors",
    "refuse_quantised",
    "refuse_unmerged",
    "safetensors_bytes",
    "write_safetensors",
]
