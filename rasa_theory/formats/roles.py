"""The roles of tensors in a model: which are weights of Linear layers, and what the others are.

The class of the model decides where transformers knows it (`architecture.py`). Here are the roles, and the rule for the
other models, which goes by the shape of a tensor and by whole components of its name.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

_LARGEST_KERNEL = 64  # of convolutions in one dimension; the last axis of a fused expert is hundreds at least
_EMBEDDINGS = frozenset(
    {
        "embed", "embed_tokens", "embed_in", "embed_positions", "tok_embeddings", "word_embeddings",
        "position_embeddings",
        "token_type_embeddings", "embeddings", "embedding", "wte", "wpe", "tokens_embed", "positions_embed", "shared",
        "relative_attention_bias", "token_embedding", "position_embedding", "class_embedding", "lang_embeddings",
        "rel_embeddings", "entity_embeddings", "patch_position_embeddings", "codebook", "text_embedding",
    }
)  # fmt: skip
_ROUTERS = frozenset({"router"})
_EXPERTS = "experts"


class Role(Enum):
    """What a tensor is in its model; the value is a noun phrase for reports."""

    LINEAR = "the weight of a Linear layer"
    CONV1D = "the weight of a Conv1D, a Linear layer stored as (in, out)"
    EXPERTS = "the matrices of all experts of a layer in one tensor"
    EXPERTS_TRANSPOSED = "the matrices of all experts of a layer in one tensor, stored as (in, out)"
    EMBEDDING = "an embedding"
    CONVOLUTION = "a convolution"
    KERNELS = "a convolution, as the matrix (out, in k k) of its kernels"
    ROUTER = "the router of a mixture of experts"
    NORM = "the weight of a norm"
    BIAS = "a bias"
    PARAMETER = "a parameter of a module that is no Linear layer"
    UNKNOWN = "a tensor of a model that is not known"

    @property
    def is_matrix(self) -> bool:
        """Whether the tensor is the matrix of a linear map, or may be: updates of these form stacks."""
        return self in (Role.LINEAR, Role.CONV1D, Role.KERNELS, Role.UNKNOWN) or self.is_experts

    @property
    def is_experts(self) -> bool:
        """Whether the tensor has three axes, of which the first counts experts."""
        return self in (Role.EXPERTS, Role.EXPERTS_TRANSPOSED)


class Place(NamedTuple):
    """The place of a tensor in its model.

    `decided_by` ends the sentence of a report: "by the model class T5ForConditionalGeneration", "by its name".
    `position`: the position of the tensor among all of the model's, by the class; None where only names are known.
    `tied`: other names of the same tensor in the model, such as that of an output layer tied to an embedding.
    `kernel`: the last two axes of a convolution that is read as a matrix.
    """

    role: Role
    decided_by: str
    position: int | None = None
    tied: tuple[str, ...] = ()
    kernel: tuple[int, ...] = ()

    @property
    def reason(self) -> str:
        """Why a tensor of this role forms no stack: "an embedding, by the model class BertModel"."""
        return f"{self.role.value}, {self.decided_by}"


def place_by_name(name: str, shape: tuple[int, ...]) -> Place:
    """The place of a tensor of a model whose class is not known, from its shape and whole components of its name.

    With fewer than two axes, a `weight` is a norm's. A matrix is a Linear layer's unless the module has the name of an
    embedding, or is called `router`. Of three axes, a `weight` whose last axis is short is a convolution; with a first
    axis of 1, the tensor is a table of positions or a token; with a component `experts` it holds experts. Everything
    else of three axes is UNKNOWN.
    """
    parts = name.split(".")
    module, parameter = (parts[-2] if len(parts) > 1 else ""), parts[-1]
    if len(shape) < 2:
        role = {"bias": Role.BIAS, "weight": Role.NORM}.get(parameter, Role.PARAMETER)
        return Place(role, "by its name and its number of axes")
    if len(shape) > 3:
        return Place(Role.CONVOLUTION, f"by its {len(shape)} axes")
    if len(shape) == 3:
        return _of_three_axes(parts, shape)
    if module in _EMBEDDINGS or parameter in _EMBEDDINGS:
        return Place(Role.EMBEDDING, "by its name")
    if module in _ROUTERS:
        return Place(Role.ROUTER, "by its name")
    if parameter == "weight":
        return Place(Role.LINEAR, "by its name")
    return Place(Role.UNKNOWN, "by its name")


def _of_three_axes(parts: list[str], shape: tuple[int, ...]) -> Place:
    by_shape = f"by its shape {shape}"
    channels = shape[1] if shape[0] == 1 else shape[0]  # a convolution to one channel, as vocoders end with
    if parts[-1] == "weight" and shape[2] <= _LARGEST_KERNEL and shape[2] < channels:
        return Place(Role.CONVOLUTION, by_shape)
    if shape[0] == 1 and parts[-1] != "weight":
        return Place(Role.PARAMETER, by_shape)
    if _EXPERTS in parts:
        return Place(Role.EXPERTS, "by its name")
    return Place(Role.UNKNOWN, by_shape)
