"""The names that this room takes from the library peft, all in one place, and the version that they need."""

from __future__ import annotations

from importlib import metadata

OLDEST = (0, 21)  # since then a tuner owns its state dict: BaseTuner._get_adapter_state_dict and its siblings


def checked_version() -> str:
    """Return the version of peft that is installed. Raises ImportError, in one sentence, if it is missing or older."""
    wanted = ".".join(map(str, OLDEST))
    try:
        version = metadata.version("peft")
    except metadata.PackageNotFoundError:
        raise ImportError(f"rasa_theory.peft needs peft >= {wanted}: pip install 'rasa-theory[peft]'") from None
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        raise ImportError(
            f"rasa_theory.peft needs peft >= {wanted}, found {version}: only since then can a method from outside the "
            "library save and load its own layout; pip install -U peft"
        )
    return version


VERSION = checked_version()

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict  # noqa: E402
from peft.config import PeftConfig  # noqa: E402
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING  # noqa: E402
from peft.tuners.tuners_utils import (  # noqa: E402
    BaseTuner,
    BaseTunerLayer,
    _get_in_out_features,
    _maybe_include_all_linear_layers,
    check_adapters_to_merge,
    onload_layer,
)
from peft.utils import (  # noqa: E402
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    PeftType,
    get_quantization_kwargs,
    quantization_extra_repr,
    register_peft_method,
    resolve_quantization_backend,
)
from peft.utils.integrations import init_empty_weights  # noqa: E402
from peft.utils.other import ModulesToSaveWrapper, get_pattern_key  # noqa: E402


def _peft_type(name: str) -> PeftType:
    """Return the member of PeftType with this name. It is added if peft does not know the method itself."""
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_ = member._value_ = name
        setattr(PeftType, name, member)
        PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
        PeftType._member_names_.append(name)
    return PeftType(name)


RASA = _peft_type("RASA")

in_out_features = _get_in_out_features
include_all_linear_layers = _maybe_include_all_linear_layers

__all__ = [
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "RASA",
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
    "VERSION",
    "BaseTuner",
    "BaseTunerLayer",
    "LoraConfig",
    "ModulesToSaveWrapper",
    "PeftConfig",
    "PeftModel",
    "PeftType",
    "check_adapters_to_merge",
    "checked_version",
    "get_pattern_key",
    "get_peft_model",
    "get_peft_model_state_dict",
    "get_quantization_kwargs",
    "in_out_features",
    "include_all_linear_layers",
    "init_empty_weights",
    "onload_layer",
    "quantization_extra_repr",
    "register_peft_method",
    "resolve_quantization_backend",
]
