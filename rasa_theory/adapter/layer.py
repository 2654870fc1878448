"""A linear layer with an adapter beside it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rasa_theory.adapter.terms import Terms


def is_conv1d(module: nn.Module) -> bool:
    """True for the Conv1D of transformers, y = x W + bias with W (in, out). Recognised by name, without an import."""
    return type(module).__name__ == "Conv1D" and isinstance(getattr(module, "weight", None), Tensor)


def why_not_linear(module: nn.Module) -> str | None:
    """The reason that no adapter can stand beside this module; None if one can."""
    if isinstance(module, AdaptedLinear):
        return None
    if not isinstance(module, nn.Linear) and not is_conv1d(module):
        return f"it is a {type(module).__name__}, neither Linear nor Conv1D"
    if type(module).__name__ == "NonDynamicallyQuantizableLinear":
        return "it is the out_proj of a torch MultiheadAttention, which reads its weight and never calls it"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is no parameter of its own (weight norm, another parametrization, or a quantised layer)"
    if not weight.is_floating_point() or weight.ndim != 2:
        return "its weight is quantised, or no matrix; load the model in bfloat16"
    return None


class AdaptedLinear(nn.Module):
    """`base` plus the active adapter's update of this layer: W x + [B~_i, B_S] (d_i * ([A~_i; A_S] x)).

    The layer only refers to the terms. They belong to the `Adapter`, which is registered once, at the root of the
    model.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.active: tuple[Terms, int] | None = None  # in a tuple, so that torch does not register it here too
        self.merged = False
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        if self.active is None or self.merged:
            return y
        terms, i = self.active
        delta: Tensor = terms(x, i)
        return y + delta.to(y.dtype)

    def shows(self, terms: Terms) -> bool:
        """True if these are the active terms."""
        return self.active is not None and self.active[0] is terms

    @property
    def weight(self) -> Tensor:
        """Weight of the base layer, since some models read it."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """Bias of the base layer."""
        return self.base.bias  # type: ignore[return-value]

    @property
    def in_features(self) -> int:
        """The length a of an input."""
        return self.weight.shape[0 if self.transposed else 1]

    @property
    def out_features(self) -> int:
        """The length b of an output."""
        return self.weight.shape[1 if self.transposed else 0]

    @property
    def transposed(self) -> bool:
        """True if the weight is (in, out)."""
        return is_conv1d(self.base)

    def delta_weight(self, terms: Terms, i: int) -> Tensor:
        """The update of layer i, in the orientation of the weight."""
        return terms.update(i).mT if self.transposed else terms.update(i)

    @torch.no_grad()
    def add(self, delta: Tensor, sign: int) -> None:
        """Add sign * delta to the weight. The sum is rounded once, to the dtype of the weight."""
        W = self.weight
        W.copy_(W.to(torch.promote_types(W.dtype, delta.dtype)) + sign * delta.to(W.device))
