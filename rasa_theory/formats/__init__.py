"""What a file or a name looks like: each format read and written in one place."""

from rasa_theory.formats.checkpoint import Checkpoint
from rasa_theory.formats.names import LAYER_WORDS, Entry, LeftOut, ModuleNames, dense_tensor, is_floating, of_task
from rasa_theory.formats.orientation import adapted_conv1d, called_conv1d, model_types, oriented
from rasa_theory.formats.peft import CONFIG, WEIGHTS, LoraFolder, base_of, lora_config, lora_tensors
from rasa_theory.formats.rasa import rasa_config, rasa_layout, rasa_tensors
from rasa_theory.formats.safetensors import join_safetensors, opened, read_header, read_json, write_safetensors
from rasa_theory.formats.shards import PICKLES

__all__ = [
    "CONFIG",
    "LAYER_WORDS",
    "PICKLES",
    "WEIGHTS",
    "Checkpoint",
    "Entry",
    "LeftOut",
    "LoraFolder",
    "ModuleNames",
    "adapted_conv1d",
    "base_of",
    "called_conv1d",
    "dense_tensor",
    "is_floating",
    "join_safetensors",
    "lora_config",
    "lora_tensors",
    "model_types",
    "of_task",
    "opened",
    "oriented",
    "rasa_config",
    "rasa_layout",
    "rasa_tensors",
    "read_header",
    "read_json",
    "write_safetensors",
]
