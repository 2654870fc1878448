"""The class of a model, built by transformers from config.json on the meta device: no weights are read or allocated.

It says what every parameter is, and how the tensors of a checkpoint become parameters: since version 5 transformers
renames, fuses and splits tensors between the disk and the model. An adapter names modules of the model.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rasa_theory.formats.model_config import config_file
from rasa_theory.formats.roles import Place, Role


@dataclass(frozen=True)
class Parameter:
    """A parameter of the model: the tensors on the disk that it is made of, and `made_of`, which makes it.

    `made_of(read)` calls `read` with the keys in `sources` and returns the tensor; None where the parameter is the one
    source as it is.
    """

    sources: tuple[str, ...]
    made_of: Callable[[Callable[[str], Tensor]], Tensor] | None = None


class Architecture:
    """A model class of transformers with its configuration, but without weights; `name` is the name of the class.

    `is_named`: the configuration names the class. Else it is the bare model of its type, which may be a part of the
    model that was saved: a prefix in the names on the disk, such as `bert.`, is then kept.
    """

    def __init__(self, model: Any, is_named: bool = True) -> None:
        self.name = type(model).__name__
        self._model = model
        self._state = model.state_dict()
        self._optional_prefix = "" if is_named else f"{model.base_model_prefix}."
        self._places = dict(_places(model, f"by the model class {self.name}"))

    def place(self, name: str) -> Place | None:
        """The place of a parameter by its name in the model; None if the model has no such parameter."""
        return self._places.get(name) or self._places.get(name.removeprefix(self._optional_prefix))

    def parameters(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Parameter]:
        """The parameters that the tensors of a checkpoint, given with their shapes, become: by their name in the model.

        transformers' own loader is followed step by step. Tensors that the model has no parameter for keep their name.
        So do tensors that cannot be converted, because some of them are missing, say.
        """
        loader = _Loader(self._model, self._state)
        optional = self._optional_prefix
        prefix = optional if optional and any(key.startswith(optional) for key in shapes) else ""
        parameters: dict[str, Parameter] = {}
        conversions: dict[str, _Conversion] = {}
        for key in sorted(shapes, key=loader.order):
            name, pattern = loader.renamed(key)
            if name not in self._state:
                parameters[key] = Parameter((key,))
            elif pattern is None:
                parameters[prefix + name] = Parameter((key,))
            else:
                conversions.setdefault(name, loader.conversion(name, pattern)).sources.append((pattern, key))
        for conversion in conversions.values():
            parameters |= conversion.parameters(shapes, prefix)
        return parameters


def architecture(checkpoint: Path) -> Architecture | None:
    """The architecture that config.json beside a checkpoint names; None where transformers does not know it.

    None as well without a config.json, without transformers 5 or later, and for classes whose code is not a part of
    transformers: no code of a checkpoint is ever run.
    """
    file = config_file(checkpoint)
    return None if file is None else _built(str(file), os.stat(file).st_mtime_ns)


def why_unknown(checkpoint: Path) -> str:
    """Why `architecture` returns None for a checkpoint, as the end of a sentence."""
    file = config_file(checkpoint)
    if file is None:
        return f"{checkpoint} has no config.json"
    if not is_transformers_here():
        return "transformers 5 or later is not installed (pip install 'rasa-theory[hf]')"
    return f"transformers cannot build the model of {file}"


@functools.lru_cache(maxsize=4)
def _built(file: str, stamp: int) -> Architecture | None:
    """The architecture of a config.json; `stamp`, its time of change, makes a rewritten file another one."""
    if not is_transformers_here():
        return None
    with _quiet():
        return _architecture_of(Path(file).parent)


def _architecture_of(folder: Path) -> Architecture | None:
    """The architecture that the config.json of a folder describes; None if it cannot be built."""
    import transformers
    from transformers.initialization import meta_device_safe_creation_ops, no_init_weights

    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model_class = _class_of(config)
        if model_class is None:
            return None
        with torch.device("meta"), no_init_weights(), meta_device_safe_creation_ops():
            model = model_class(config)
    except Exception:  # whatever a strange configuration raises in the code of a model: its names decide then
        return None
    return Architecture(model, is_named=model_class.__name__ in (config.architectures or ()))


def is_transformers_here() -> bool:
    """Whether a transformers with tables of conversion, of version 5 or later, is installed."""
    try:
        from transformers import conversion_mapping, core_model_loading  # noqa: F401
    except ImportError:
        return False
    return True


def _class_of(config: Any) -> Any:
    """The first of `architectures` that transformers has, else the bare model of the type; None without either."""
    import transformers

    for name in config.architectures or ():
        model_class = getattr(transformers, name, None)
        if isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel):
            return model_class
    try:
        return transformers.AutoModel._model_mapping[type(config)]
    except KeyError:
        return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the warnings of transformers about configurations away from the user of another program."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


# ---- what the parameters are


def _places(model: nn.Module, decided_by: str) -> Iterator[tuple[str, Place]]:
    modules = dict(model.named_modules())
    routers = _router_classes(model)
    source_of = dict(getattr(model, "all_tied_weights_keys", None) or {})
    tied_to = {
        source: (source, *(name for name in source_of if source_of[name] == source)) for source in source_of.values()
    }
    for position, name in enumerate(model.state_dict()):
        module_name, _, parameter = name.rpartition(".")
        module = modules.get(module_name, model)
        parent = modules.get(module_name.rpartition(".")[0])
        tensor = getattr(module, parameter, None)
        role = _role(module, parent, parameter, tensor, routers)
        of_class = f", of a {type(module).__name__}" if role in (Role.PARAMETER, Role.ROUTER) else ""
        tied = tuple(one for one in tied_to.get(source_of.get(name, name), ()) if one != name)
        yield name, Place(role, f"{decided_by}{of_class}", position, tied)


def _role(module: nn.Module, parent: nn.Module | None, parameter: str, tensor: Any, routers: tuple[type, ...]) -> Role:
    from transformers.pytorch_utils import Conv1D

    axes = tensor.ndim if isinstance(tensor, Tensor) else 0
    if parameter == "bias":
        return Role.BIAS
    if isinstance(module, routers):
        return Role.ROUTER
    if isinstance(module, Conv1D):
        return Role.CONV1D
    if isinstance(module, nn.Linear):
        # nn.MultiheadAttention takes the weight of its out_proj without calling it: an adapter would be without effect
        is_called = _is_linear(module) and not isinstance(parent, nn.MultiheadAttention)
        return Role.LINEAR if is_called and parameter == "weight" else Role.PARAMETER
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return Role.EMBEDDING
    if isinstance(module, nn.modules.conv._ConvNd):
        return Role.CONVOLUTION
    if axes == 3 and isinstance(tensor, nn.Parameter) and tensor.shape[0] > 1:
        return Role.EXPERTS_TRANSPOSED if getattr(module, "is_transposed", False) else Role.EXPERTS
    return Role.NORM if axes == 1 and parameter == "weight" else Role.PARAMETER


def _is_linear(module: nn.Linear) -> bool:
    """Whether a Linear, or a subclass with a forward of its own, maps vectors of its inputs to vectors of its outputs.

    Falcon's does. A router that returns logits and choices does not, nor a matrix that stands for several: an adapter
    around such a module would be wrong.
    """
    if type(module).forward is nn.Linear.forward:
        return True
    try:
        output = module(torch.empty(2, module.in_features, device="meta", dtype=module.weight.dtype))
    except Exception:  # whatever the code of a model raises on an input that it is not made for
        return False
    return isinstance(output, Tensor) and output.shape == (2, module.out_features)


def _router_classes(model: nn.Module) -> tuple[type, ...]:
    """The classes whose outputs the parts of the model record as `router_logits`."""
    classes: list[type] = []
    for module in model.modules():
        recorded = getattr(module, "_can_record_outputs", None) or {}
        recorders = recorded.get("router_logits", ()) if isinstance(recorded, dict) else ()
        for recorder in recorders if isinstance(recorders, list | tuple) else (recorders,):
            router = getattr(recorder, "target_class", recorder)
            if isinstance(router, type) and router is not nn.Linear:
                classes.append(router)
    return tuple(classes)


# ---- from the disk to the model


class _Loader:
    """The renamings and conversions that transformers applies when it loads this model."""

    def __init__(self, model: Any, state: dict[str, Tensor]) -> None:
        from transformers import conversion_mapping, core_model_loading

        self._loading = core_model_loading
        mapping = conversion_mapping.get_model_conversion_mapping(model)
        self._renamings = [one for one in mapping if isinstance(one, core_model_loading.WeightRenaming)]
        self._converters = [one for one in mapping if isinstance(one, core_model_loading.WeightConverter)]
        self._converter_of = {pattern: one for one in self._converters for pattern in one.source_patterns}
        self._model, self._state = model, state
        self.order: Callable[[str], Any] = core_model_loading.dot_natural_key

    def renamed(self, key: str) -> tuple[str, str | None]:
        """The parameter that a tensor belongs to, and the pattern of its converter; None if it is only renamed."""
        prefix = self._model.base_model_prefix
        rename = self._loading.rename_source_key
        name, pattern = rename(key, self._renamings, self._converters, prefix, self._state)
        if name not in self._state and key in self._state:
            name, pattern = rename(key, [], [], base_model_prefix=prefix, meta_state_dict=self._state)
        return name, pattern

    def conversion(self, name: str, pattern: str) -> _Conversion:
        return _Conversion(name, self._converter_of[pattern], self._model, [])


@dataclass(frozen=True)
class _Conversion:
    """A conversion of transformers: `sources`, pairs of a pattern and a key on the disk, become one or more parameters.

    `name` is the first of these parameters.
    """

    name: str
    converter: Any
    model: Any
    sources: list[tuple[str, str]]

    def converted(self, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The parameters by name, from tensors that `read` reads by their key."""
        converter = copy.deepcopy(self.converter)
        for pattern, key in self.sources:
            converter.add_tensor(self.name, key, pattern, functools.partial(read, key))
        tensors = converter.convert(self.name, model=self.model, config=self.model.config)
        return {name: one[0] if isinstance(one, list) else one for name, one in tensors.items()}

    def parameters(self, shapes: Mapping[str, tuple[int, ...]], prefix: str) -> dict[str, Parameter]:
        """The parameters by `prefix` and name, after a trial on the meta device; the sources themselves if it fails."""
        try:
            trial = self.converted(lambda key: torch.empty(shapes[key], device="meta"))
        except Exception:  # whatever an operation raises on tensors that are missing or of another shape
            return self._unconverted()
        keys = tuple(key for _, key in self.sources)
        return {prefix + name: Parameter(keys, functools.partial(self._one, name)) for name in trial}

    def _unconverted(self) -> dict[str, Parameter]:
        return {key: Parameter((key,)) for _, key in self.sources}

    def _one(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        return self.converted(read)[name]


def converted_shape(parameter: Parameter, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of a parameter, from the shapes of the tensors on the disk."""
    if parameter.made_of is None:
        return shapes[parameter.sources[0]]
    return tuple(parameter.made_of(lambda key: torch.empty(shapes[key], device="meta")).shape)
