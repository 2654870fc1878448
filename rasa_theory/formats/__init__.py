"""Formats of files and names: each read and written in one place."""

from rasa_theory.formats.adapter_files import (
    adapter_folder,
    adapter_in_folder,
    adapter_in_tensors,
    holds_adapter,
    refuse_unmerged,
)
from rasa_theory.formats.architecture import Architecture, architecture, why_unknown
from rasa_theory.formats.base_model import OUTPUT_LAYERS, BaseModel, task_heads
from rasa_theory.formats.checkpoint import Checkpoint
from rasa_theory.formats.halves import write_halves
from rasa_theory.formats.kohya import (
    KOHYA_FILE,
    KohyaFile,
    kohya_factors,
    kohya_metadata,
    kohya_prefix,
    kohya_tensors,
)
from rasa_theory.formats.mlx import MLX_WEIGHTS
from rasa_theory.formats.model_checkpoint import ModelCheckpoint
from rasa_theory.formats.model_config import config_file, model_config, model_types
from rasa_theory.formats.names import ModuleNames, dense_tensor, layer_span, name_in_task
from rasa_theory.formats.orientation import called_conv1d
from rasa_theory.formats.peft import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    LoraFile,
    adapter_type,
    base_of,
    lora_config,
    lora_factors,
    lora_key,
    lora_tensors,
    peft_adapter,
    refused_by_peft,
    whole_key,
)
from rasa_theory.formats.quantised import refuse_quantised
from rasa_theory.formats.rasa import (
    LAYOUTS,
    MODULE_PARTS,
    RESERVED,
    RasaConfig,
    in_first_layout,
    key_of_parameter,
    module_key,
    module_parameter,
    not_loadable,
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
from rasa_theory.formats.spellings import adapter_format, is_rasa_key
from rasa_theory.formats.stored_adapter import FactorPair, StoredAdapter
from rasa_theory.formats.tensors import Entry, Exclusion, LeftOut, LeftOutGroup, grouped, is_floating
from rasa_theory.formats.wrappers import COMPILED

__all__ = [
    "COMPILED",
    "CONFIG_FILE",
    "KOHYA_FILE",
    "LAYOUTS",
    "MLX_WEIGHTS",
    "MODULE_PARTS",
    "OUTPUT_LAYERS",
    "PICKLES",
    "RESERVED",
    "WEIGHTS_FILE",
    "Architecture",
    "BaseModel",
    "Checkpoint",
    "Entry",
    "Exclusion",
    "FactorPair",
    "KohyaFile",
    "LeftOut",
    "LeftOutGroup",
    "LoraFile",
    "ModelCheckpoint",
    "ModuleNames",
    "Place",
    "RasaConfig",
    "Role",
    "StoredAdapter",
    "adapter_folder",
    "adapter_format",
    "adapter_in_folder",
    "adapter_in_tensors",
    "adapter_type",
    "architecture",
    "base_of",
    "called_conv1d",
    "config_file",
    "dense_tensor",
    "grouped",
    "holds_adapter",
    "in_first_layout",
    "is_floating",
    "is_rasa_key",
    "join_safetensors",
    "key_of_parameter",
    "kohya_factors",
    "kohya_metadata",
    "kohya_prefix",
    "kohya_tensors",
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
    "not_loadable",
    "opened",
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
    "refused_by_peft",
    "safetensors_bytes",
    "task_heads",
    "whole_key",
    "why_unknown",
    "write_halves",
    "write_safetensors",
]
