"""RaSA as a method of the library peft: adapters of all layers, with their pools."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rasa_theory.common import InputError
from rasa_theory.formats import (
    COMPILED,
    MODULE_PARTS,
    in_first_layout,
    is_rasa_key,
    key_of_parameter,
    module_key,
    module_parameter,
    pool_key,
    pool_parameter,
)
from rasa_theory.peft.config import RasaConfig
from rasa_theory.peft.joining import join
from rasa_theory.peft.layer import RasaLayer, RasaLinear, Shared, move, of_adapter
from rasa_theory.peft.library import (
    RASA,
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    BaseTuner,
    get_quantization_kwargs,
    include_all_linear_layers,
    init_empty_weights,
    onload_layer,
)
from rasa_theory.peft.pools import Pool, check_name, is_conv1d, module_names, plan


class RasaModel(BaseTuner):  # type: ignore[misc]  # a class of the library without types
    """A model with RaSA adapters. `peft.get_peft_model(model, RasaConfig(..))` makes one.

    The parameters of a layer lie beside the layer. The pools lie here, once: `rasa_pool_A` and `rasa_pool_B`,
    adapter -> pool -> parameter.
    """

    uses_shared_state = True
    prefix = "rasa_"
    tuner_layer_cls = RasaLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    # ---- injection

    def _pre_injection_hook(self, model: nn.Module, config: RasaConfig, adapter_name: str) -> None:
        self.rasa_pool_B, self.rasa_pool_A = nn.ModuleDict(), nn.ModuleDict()
        self._pools: dict[str, list[Pool]] = {}

    @property
    def shared(self) -> Shared:
        """B_S and A_S of all adapters."""
        return self.rasa_pool_B, self.rasa_pool_A

    def pools(self, adapter: str) -> list[Pool]:
        """The pools of an adapter. Raises InputError if the model has no such adapter."""
        if adapter not in self._pools:
            raise InputError(f"the model has no RaSA adapter {adapter!r}; it has {', '.join(map(repr, self._pools))}")
        return self._pools[adapter]

    def layer(self, module: str) -> RasaLayer:
        """The layer of this name. Raises InputError if the module has been replaced since the adapter was added."""
        layer = self.model.get_submodule(module)
        if not isinstance(layer, RasaLayer):
            raise InputError(f"module {module!r} of the model has been replaced since the adapter was added")
        return layer

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Plan the pools of an adapter, and put it into the model. A refused adapter changes nothing."""
        if (config := self.peft_config[adapter_name]).peft_type != RASA:
            raise InputError(f"adapter {adapter_name!r} is of the type {config.peft_type}, the others are of RaSA")
        config = self._prepare_adapter_config(config, self.get_model_config(model))
        config = include_all_linear_layers(config, model)
        pools = plan(model, self._targets(model, config), config, get_quantization_kwargs(self))
        self._check_own(model, pools)
        check_name(adapter_name, module_names(model))
        config.fan_in_fan_out = any(is_conv1d(model.get_submodule(name)) for pool in pools for name in pool.modules)
        trained = {p: p.requires_grad for side in self.shared for p in side.parameters()}

        self._pools[adapter_name] = pools
        with init_empty_weights() if low_cpu_mem_usage else contextlib.nullcontext():
            for side in self.shared:
                side[adapter_name] = nn.ParameterDict()
        try:
            super().inject_adapter(
                model,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
                state_dict=state_dict,
            )
        except Exception:
            del self._pools[adapter_name], self.rasa_pool_B[adapter_name], self.rasa_pool_A[adapter_name]
            raise
        self._initialise(adapter_name, config)
        for parameter, requires_grad in trained.items():
            parameter.requires_grad_(requires_grad)

    def _targets(self, model: nn.Module, config: RasaConfig) -> list[str]:
        """The names of the modules that a configuration selects, in the order of the model."""
        return [name for name in module_names(model) if self._check_target_module_exists(config, name)]

    def _check_own(self, model: nn.Module, pools: Sequence[Pool]) -> None:
        """Raise InputError if a layer has RaSA adapters of another tuner, whose pools it would go on to use."""
        for name in (name for pool in pools for name in pool.modules):
            layer = model.get_submodule(name)
            if isinstance(layer, RasaLayer) and not layer.belongs_to(self.shared):
                raise InputError(
                    f"module {name!r} has RaSA adapters of another PeftModel; add this one there, or unload it"
                )

    def _create_and_replace(
        self,
        peft_config: RasaConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        pool = next(pool for pool in self._pools[adapter_name] if current_key in pool.modules)
        layer = target
        if not isinstance(layer, RasaLayer):
            layer = RasaLinear(target, self.shared, adapter_name, get_quantization_kwargs(self))
            layer.set_adapter(self.active_adapters)
        if pool.rank and pool.key not in of_adapter(self.rasa_pool_B, adapter_name):  # on the device of its first layer
            b, a = pool.shape
            of_adapter(self.rasa_pool_B, adapter_name)[pool.key] = nn.Parameter(layer.empty(b, pool.rank))
            of_adapter(self.rasa_pool_A, adapter_name)[pool.key] = nn.Parameter(layer.empty(pool.rank, a))
        layer.update_layer(adapter_name, pool, peft_config.dropout)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    @torch.no_grad()
    def _initialise(self, adapter: str, config: RasaConfig) -> None:
        """Both B at zero, both A by Kaiming's rule as in LoRA (uniform in +-1/sqrt(a)), the mixing as `config` says.

        Random numbers are drawn pool by pool, first for the layers and then for the pool.
        """
        generator = None if config.seed is None else torch.Generator().manual_seed(config.seed)

        def kaiming(A: Tensor) -> None:
            if not A.is_meta:
                A.copy_((2 * torch.rand(A.shape, generator=generator) - 1) / math.sqrt(A.shape[1]))

        for pool in self._pools[adapter]:
            for layer in map(self.layer, pool.modules):
                layer.rasa_mixing[adapter].copy_(config.mixing(pool.budget, pool.rank))
                if pool.budget.private_rank:
                    layer.rasa_private_B[adapter].zero_()
                    kaiming(layer.rasa_private_A[adapter])
            if pool.rank:
                of_adapter(self.rasa_pool_B, adapter)[pool.key].zero_()
                kaiming(of_adapter(self.rasa_pool_A, adapter)[pool.key])

    # ---- switching

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, with its pools."""
        super().delete_adapter(adapter_name)
        del self._pools[adapter_name]
        for side in self.shared:
            if adapter_name in side:
                del side[adapter_name]

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Cast an adapter to float32 at least, or to the dtype of the layers if the caller wants no autocast.

        In half precision the mixing would not train: its steps are smaller than the spacing of its values.
        """
        for pool in self._pools[adapter_name]:
            layers = [self.layer(name) for name in pool.modules]
            of_layers = [(getattr(layer, name), adapter_name, layer) for layer in layers
                         for name in layer.adapter_layer_names]  # fmt: skip
            of_pool = [(of_adapter(side, adapter_name), pool.key, layers[0]) for side in self.shared]
            for parameters, key, layer in of_layers + of_pool:
                if autocast_adapter_dtype:
                    move(parameters, key, None)
                elif key in parameters:
                    _, dtype = layer._get_base_layer_device_and_dtype(layer.get_base_layer())
                    if dtype is not None and dtype.is_floating_point:
                        parameters[key].data = parameters[key].data.to(dtype)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move the pools of an adapter to the device of their first layers."""
        for pool in self._pools.get(adapter_name, []):
            layer = self.layer(pool.modules[0])
            home, _ = layer._get_base_layer_device_and_dtype(layer.get_base_layer())
            for side in self.shared:
                move(of_adapter(side, adapter_name), pool.key, device or home)

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Refuse batches in which every row has another adapter; peft would drop the names without a word."""
        if kwargs.get("adapter_names") is not None:
            raise InputError("adapter_names: RaSA has no batches of mixed adapters; call set_adapter for each adapter")
        yield

    def _check_merge_allowed(self) -> None:
        """Raise InputError, before any weight changes, if the active adapters cannot be merged into a layer.

        Every merged weight is formed for that, one at a time, since a model that is merged in half is of no use.
        """
        super()._check_merge_allowed()
        for module in self.model.modules():
            if isinstance(module, RasaLayer):
                adapters = [name for name in module.active_adapters if name in module.pool_key and not module.merged]
                with onload_layer(module):
                    for adapter in adapters:
                        module.check_merge(adapter)
                    if adapters:
                        module.merged_weight(adapters)

    # ---- sums of adapters

    def add_weighted_adapter(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str = "cat"
    ) -> None:
        """Add an adapter whose update is the weighted sum of the updates of others, exactly. It is not active.

        Private terms stand side by side, and so do the pools, so that the ranks add up. Where the adapters change
        different modules, terms of zeros fill the gaps.

        Arguments:
            adapters: the names of the adapters.
            weights: one number for each, of either sign.
            adapter_name: the name of the sum.
            combination_type: "cat" is the only one.

        Raises:
            InputError: a name is not there or is taken, a weight is not finite, or an adapter has more than updates
                (`bias`, `modules_to_save`).
        """
        if combination_type != "cat":
            raise InputError(f"combination_type must be 'cat', which is exact, got {combination_type!r}")
        join(self, adapters, weights, adapter_name)

    # ---- files: the authors' first layout

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: RasaConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """The tensors of an adapter. Parts of size 0 are written as such, so that the layout is whole."""
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        selected = {key: _gathered(value) for key, value in selected.items()}
        written = {cls._remove_adapter_name_from_key(key, adapter_name) for key in selected}
        for pool in tuner_of(model).pools(adapter_name):
            (b, a), device = pool.shape, next(iter(selected.values())).device
            for name in pool.modules:
                for part, shape in (("A", (0, a)), ("B", (b, 0))):
                    if (key := module_key(name.replace(COMPILED, ""), part)) not in written:
                        selected[key] = torch.empty(shape, device=device)
            for side, shape in (("A", (0, a)), ("B", (b, 0))):
                if (key := pool_key(pool.name, side)) not in written:
                    selected[key] = torch.empty(shape, device=device)
        return selected

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """The key in a file, from the key of a parameter; keys of a file stay as they are."""
        if (found := key_of_parameter(key, adapter_name)) is not None:
            return found
        return key if is_rasa_key(key) else str(super()._remove_adapter_name_from_key(key, adapter_name))

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: RasaConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The tensors of a file, in either layout of the authors, by the names of the parameters.

        Raises InputError, and loads nothing, if a tensor is missing, superfluous, of another shape or not finite, or
        the adapter is merged: unmerging would then subtract the new updates.
        """
        tuner = tuner_of(model)
        if any(adapter_name in tuner.layer(name).merged_adapters for pool in tuner.pools(adapter_name)
               for name in pool.modules):  # fmt: skip
            raise InputError(f"adapter {adapter_name!r} is merged; call unmerge_adapter before it is loaded anew")
        tensors = {key.replace(COMPILED, ""): value for key, value in in_first_layout(state_dict).items()}
        parameters = tuner.parameters_of(adapter_name)
        ours = {cls._remove_adapter_name_from_key(key, adapter_name): key for key in parameters}
        for key, value in tensors.items():
            if is_rasa_key(key) and key not in ours and value.numel():
                raise InputError(f"the adapter has a tensor {key!r}, which belongs to none of the modules it adapts")
        for key, parameter in ours.items():
            _check(key, tensors.get(key), parameters[parameter])
        return {ours.get(key, key): value for key, value in tensors.items() if key in ours or not is_rasa_key(key)}

    def parameters_of(self, adapter: str) -> dict[str, nn.Parameter]:
        """The parameters of an adapter by their names in a `PeftModel`."""
        found = {}
        for pool in self.pools(adapter):
            for name in pool.modules:
                layer = self.layer(name)
                for part, attribute in MODULE_PARTS.items():
                    if adapter in getattr(layer, attribute):
                        found[module_parameter(name, part, adapter)] = getattr(layer, attribute)[adapter]
            for side in "AB":
                parameters = getattr(self, f"rasa_pool_{side}")[adapter]
                if pool.key in parameters:
                    found[pool_parameter(pool.name, side, adapter)] = parameters[pool.key]
        return found


def tuner_of(model: nn.Module) -> RasaModel:
    """The RasaModel inside a `PeftModel`. Raises InputError if its adapters are of another method."""
    tuner = model if isinstance(model, RasaModel) else getattr(model, "base_model", None)
    if not isinstance(tuner, RasaModel):
        raise InputError(f"a {type(model).__name__} has no RaSA adapters; make them with peft.get_peft_model")
    return tuner


def _gathered(value: Tensor) -> Tensor:
    """The whole tensor of a sharded one (FSDP2). Every process must take part."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _check(key: str, stored: Tensor | None, parameter: Tensor) -> None:
    if stored is None:
        raise InputError(
            f"the adapter has no tensor {key!r}: it is of other modules, or the file is not whole. A pool is named "
            "after its kind of module, and its tower and shape where there are several"
        )
    expected = tuple(getattr(parameter, "ds_shape", parameter.shape))
    if tuple(stored.shape) != expected:
        raise InputError(f"{key!r} has shape {tuple(stored.shape)}, the model and the configuration need {expected}")
    if not bool(stored.isfinite().all()):
        raise InputError(f"{key!r} has values that are not finite")
