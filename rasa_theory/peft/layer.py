"""A linear layer with RaSA adapters beside it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rasa_theory.common import InputError
from rasa_theory.peft.library import BaseTunerLayer, check_adapters_to_merge, quantization_extra_repr
from rasa_theory.peft.pools import Pool, backend_of, is_conv1d

Shared = tuple[nn.ModuleDict, nn.ModuleDict]
"""B_S and A_S of every adapter: adapter -> key of the pool -> (b, R) or (R, a). They belong to the tuner."""


class RasaLayer(BaseTunerLayer):  # type: ignore[misc]  # a class of the library without types
    """The adapters of one layer. For layer i, the update is [B~_i, B_S] diag(d_i) [A~_i; A_S].

    `rasa_private_B` (b, q), `rasa_private_A` (q, a) and `rasa_mixing` (q + R,) are registered here, by adapter. The
    pools are registered once, at the tuner; the layer refers to them without registering them, so that an optimiser, a
    state dict or a sharded model sees each pool once. Parts of size 0, for k = r or k = 0, do not exist.
    """

    adapter_layer_names = ("rasa_private_A", "rasa_private_B", "rasa_mixing")
    other_param_names = ("rasa_dropout", "pool_key")

    def __init__(self, base_layer: nn.Module, shared: Shared, kwargs: Mapping[str, Any]) -> None:
        self.base_layer = base_layer
        self._shared = shared  # in a tuple, so that torch does not register it here too
        self.quantization_backend = backend_of(self.get_base_layer(), kwargs)
        self.rasa_private_A, self.rasa_private_B = nn.ParameterDict(), nn.ParameterDict()
        self.rasa_mixing = nn.ParameterDict()
        self.rasa_dropout = nn.ModuleDict()
        self.pool_key: dict[str, str] = {}
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    # ---- parameters

    def update_layer(self, adapter: str, pool: Pool, dropout: float) -> None:
        """Add the parameters of an adapter, not yet initialised."""
        (b, a), q = pool.shape, pool.budget.private_rank
        self.pool_key[adapter] = pool.key
        self.rasa_dropout[adapter] = (nn.Dropout(dropout) if dropout > 0 else nn.Identity()).train(self.training)
        if q > 0:
            self.rasa_private_A[adapter] = nn.Parameter(self.empty(q, a))
            self.rasa_private_B[adapter] = nn.Parameter(self.empty(b, q))
        self.rasa_mixing[adapter] = nn.Parameter(self.empty(q + pool.rank))
        if pool.rank == 0:  # LoRA, whose scaling is not trained
            self.frozen_peft_weight_names[adapter] = ("rasa_mixing",)
        self.set_adapter(self.active_adapters)

    def empty(self, *shape: int) -> Tensor:
        """A tensor without values, on the device of the layer, in the dtype of its adapters."""
        device, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        return torch.empty(*shape, device=device, dtype=wide(dtype))

    def belongs_to(self, shared: Shared) -> bool:
        """True if these are the pools that the layer uses."""
        return self._shared[0] is shared[0]

    def shared_of(self, adapter: str) -> tuple[Tensor, Tensor] | None:
        """B_S (b, R) and A_S (R, a) of an adapter; None if it has no pool (k = 0)."""
        shared_B, shared_A = self._shared
        key = self.pool_key[adapter]
        if adapter not in shared_B or key not in of_adapter(shared_B, adapter):
            return None
        return of_adapter(shared_B, adapter)[key], of_adapter(shared_A, adapter)[key]

    def terms_of(self, adapter: str) -> tuple[Tensor, Tensor, Tensor]:
        """[B~_i, B_S] (b, q + R), d_i (q + R,) and [A~_i; A_S] (q + R, a), on the device of the layer."""
        d, pool = self.rasa_mixing[adapter], self.shared_of(adapter)
        sides = [(self.rasa_private_B[adapter], self.rasa_private_A[adapter])] if adapter in self.rasa_private_A else []
        if pool is not None:
            sides.append((pool[0].to(d.device), pool[1].to(d.device)))
        # A copy also where there is one part only. Autocast keeps the bfloat16 form of a parameter, not of a copy, and
        # would add up the gradients of the pool over all layers in bfloat16.
        return torch.cat([B for B, _ in sides], 1), d, torch.cat([A for _, A in sides], 0)

    def update_of(self, x: Tensor, adapter: str) -> Tensor:
        """The update applied to x, (.., a) -> (.., b). Nothing of the size of a weight is formed."""
        B, d, A = self.terms_of(adapter)
        return F.linear(F.linear(self._cast_input_dtype(self.rasa_dropout[adapter](x), A.dtype), A) * d, B)

    @torch.no_grad()
    def update(self, adapter: str) -> Tensor:
        """The update of an adapter, (b, a), at least in float32."""
        B, d, A = (t.to(wide(t.dtype)) for t in self.terms_of(adapter))
        return (B * d) @ A

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update of an adapter in the orientation of the weight, at least in float32."""
        return self.update(adapter).mT if is_conv1d(self) else self.update(adapter)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True: the update is a LoRA of rank q + R. `rasa_theory.peft.convert_to_lora` needs no SVD."""
        return True

    # ---- what peft switches in a layer reaches the pool too

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters. They alone are trained, and none in inference mode."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        active = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for adapter in self.pool_key:
            self._train_pool(adapter, adapter in active and not inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters on or off."""
        super().enable_adapters(enabled)
        if not enabled:
            for adapter in self.pool_key:
                self._train_pool(adapter, False)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Set whether the parameters of some adapters are trained."""
        super().set_requires_grad(adapter_names, requires_grad)
        for adapter in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if adapter in self.pool_key:
                self._train_pool(adapter, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter from the layer, and its pools from the tuner."""
        super().delete_adapter(adapter_name)
        for side in self._shared:
            if adapter_name in side:
                del side[adapter_name]

    def _train_pool(self, adapter: str, trained: bool) -> None:
        for side in self.shared_of(adapter) or ():
            if side.is_leaf:
                side.requires_grad_(trained)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move the parameters of an adapter to the layer's device. They keep their precision, float32 or more."""
        if device is None:
            device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        for name in self.adapter_layer_names:
            move(getattr(self, name), adapter_name, device)

    # ---- merging

    def check_merge(self, adapter: str) -> None:
        """Raise InputError if the update of an adapter cannot be added to the weight of this layer."""
        backend = self.quantization_backend
        if backend is not None and not backend.supports_merge:
            raise InputError(
                f"weights quantised by {backend.backend_name} cannot be merged; load the model in bfloat16"
            )
        state = getattr(self.get_base_layer().weight, "quant_state", None) if backend is not None else None
        if getattr(state, "packing_format_for_cpu", False):  # bitsandbytes does so at the first answer in evaluation
            raise InputError(
                "bitsandbytes has packed the 4-bit weights for the CPU, and cannot read them back; merge before the "
                "first answer in evaluation mode, or on a GPU"
            )
        if backend is None and self.get_base_layer().weight.dtype.itemsize < 2:
            raise InputError(
                f"weights of {self.get_base_layer().weight.dtype} cannot be merged: they are too coarse, and their "
                "scales lie elsewhere; load the model in bfloat16"
            )
        for part, value in zip(("B", "mixing", "A"), self.terms_of(adapter), strict=True):
            if not bool(value.isfinite().all()):
                raise InputError(f"adapter {adapter!r}: {part} of a layer has values that are not finite")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates of the given adapters, or of the active ones, to the weight. Their sum is rounded once.

        `safe_merge` is accepted for peft's sake: every merge is safe. Raises InputError, and leaves the layer as it
        is, if the merged weight would not be finite.
        """
        adapters = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.pool_key]
        for adapter in adapters:
            self.check_merge(adapter)
        if adapters:
            self.set_base_weight(self.merged_weight(adapters))
            self.merged_adapters += adapters

    def unmerge(self) -> None:
        """Subtract all merged updates from the weight, up to rounding. The adapters must not have changed since."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.set_base_weight(self.merged_weight(self.merged_adapters, -1))
        self.merged_adapters.clear()

    @torch.no_grad()
    def merged_weight(self, adapters: Sequence[str], sign: int = 1) -> Tensor:
        """The weight plus (or minus) the updates of some adapters, rounded once. Raises InputError if not finite."""
        W: Tensor = self.get_base_weight()
        total = W.to(wide(W.dtype))
        for adapter in adapters:
            total = total + sign * self.get_delta_weight(adapter).to(W.device)
        if not bool((merged := total.to(W.dtype)).isfinite().all()):
            names = ", ".join(map(repr, adapters))
            raise InputError(f"with the updates of {names} a weight would not be finite in {W.dtype}")
        return merged


class RasaLinear(nn.Module, RasaLayer):
    """A Linear, Conv1D or quantised layer with adapters: W x plus the update of each active adapter."""

    def __init__(self, base_layer: nn.Module, shared: Shared, adapter: str, kwargs: Mapping[str, Any]) -> None:
        super().__init__()
        RasaLayer.__init__(self, base_layer, shared, kwargs)
        self._active_adapter = adapter

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return y
        if self.quantization_backend is not None:
            y = self.quantization_backend.maybe_clone_base_result(y)
        dtype, active = y.dtype, cast(list[str], self.active_adapters)
        for adapter in active:
            if adapter in self.pool_key:
                y = y + self.update_of(x, adapter)
        return y.to(dtype)

    def extra_repr(self) -> str:
        return str(quantization_extra_repr(self))


def of_adapter(side: nn.ModuleDict, adapter: str) -> nn.ParameterDict:
    """One side of the pools of an adapter, by their keys."""
    return cast(nn.ParameterDict, side[adapter])


def wide(dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of an adapter beside a weight: float32, or float64 beside float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def move(parameters: nn.ParameterDict, key: str, device: torch.device | None) -> None:
    """Move a parameter to a device (None: leave it), and to float32 at least. One without storage stays as it is."""
    old: Tensor | None = parameters.get(key)
    if old is None or old.is_meta:
        return
    moved = old.detach().to(device or old.device, wide(old.dtype))
    if moved.device != old.device or moved.dtype != old.dtype:
        parameters[key] = nn.Parameter(moved, old.requires_grad)
