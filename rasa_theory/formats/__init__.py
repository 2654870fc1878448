"""Formats of files and names: each read and written in one place."""

from rasa_theory.formats.architecture import Architecture, architecture
from rasa_theory.formats.checkpoint import Checkpoint
from rasa_theory.formats.model_checkpoint import ModelCheckpoint
from rasa_theory.formats.names import ModuleNames, dense_tensor, layer_span, name_in_task
from rasa_theory.formats.orientation import adapted_conv1d, called_conv1d, model_types, oriented
from rasa_theory.formats.peft import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    LoraFolder,
    adapter_type,
    base_of,
    is_lora_tensor,
    lora_config,
    lora_factors,
    lora_key,
    lora_tensors,
)
from rasa_theory.formats.rasa import RasaConfig, rasa_factors, rasa_layout, rasa_modules, rasa_tensors
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
from rasa_theory.formats.tensors import Entry, Exclusion, LeftOut, is_floating

__all__ = [
    "CONFIG_FILE",
    "PICKLES",
    "WEIGHTS_FILE",
    "Architecture",
    "Checkpoint",
    "Entry",
    "Exclusion",
    "LeftOut",
    "LoraFolder",
    "ModelCheckpoint",
    "ModuleNames",
    "Place",
    "RasaConfig",
    "Role",
    "adapted_conv1d",
    "adapter_type",
    "architecture",
    "base_of",
    "called_conv1d",
    "dense_tensor",
    "is_floating",
    "is_lora_tensor",
    "join_safetensors",
    "layer_span",
    "lora_config",
    "lora_factors",
    "lora_key",
    "lora_tensors",
    "model_types",
    "name_in_task",
    "opened",
    "oriented",
    "place_by_name",
    "rasa_factors",
    "rasa_layout",
    "rasa_modules",
    "rasa_tensors",
    "read_header",
    "read_json",
    "read_tensors",
    "safetensors_bytes",
    "write_safetensors",
]
