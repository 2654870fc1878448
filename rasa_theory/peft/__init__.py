"""RaSA as a method of the library peft (He et al., ICLR 2025): importing this room registers it.

`peft.get_peft_model(model, RasaConfig(r=8, k=1, target_modules=[..]))` then makes a `PeftModel`, which trains, saves,
loads, merges and switches as every other.
"""

from rasa_theory.peft.config import RasaConfig, initial_mixing
from rasa_theory.peft.convert import convert_to_lora, save_as_lora
from rasa_theory.peft.from_factors import factors, from_factors
from rasa_theory.peft.layer import RasaLayer, RasaLinear
from rasa_theory.peft.library import PEFT_TYPE_TO_CONFIG_MAPPING, RASA, VERSION, register_peft_method
from rasa_theory.peft.model import RasaModel

__all__ = [
    "RasaConfig",
    "RasaLayer",
    "RasaLinear",
    "RasaModel",
    "convert_to_lora",
    "factors",
    "from_factors",
    "initial_mixing",
    "save_as_lora",
]

if RASA not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name="rasa", config_cls=RasaConfig, model_cls=RasaModel)
elif not PEFT_TYPE_TO_CONFIG_MAPPING[RASA].__module__.startswith("rasa_theory."):
    raise ImportError(f"peft {VERSION} has RaSA itself: use peft.RasaConfig in place of rasa_theory.peft")
