"""Names of modules: their kind, the number of their layer, and the task that they belong to."""

import pytest
import torch

from rasa_theory.formats import ModuleNames, dense_tensor, layer_span, name_in_task
from tests.helpers.problems import random_factors

NAMES = tuple(f"model.layers.{i}.self_attn.q_proj" for i in range(3))


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (("model.layers.3.self_attn.q_proj",), "self_attn.q_proj"),
        (("transformer.h.0.attn.c_attn",), "attn.c_attn"),
        (("encoder.layer.1.attention.self.query",), "attention.self.query"),
        (("blocks.0.mlp.experts.7.w1",), "mlp.experts.7.w1"),
        (("towers.2.proj",), "towers.proj"),
    ],
)
def test_the_kind_of_a_module(names, kind):
    assert ModuleNames(names).kind == kind


def test_the_modules_of_weights():
    assert ModuleNames.of(["h.0.attn.c_attn.weight"], True, "transformer.").names == ("transformer.h.0.attn.c_attn",)


def test_the_names_of_one_task():
    assert name_in_task("base_model.model.1/h.0.q.lora_A.weight", 1) == "base_model.model.h.0.q.lora_A.weight"
    assert name_in_task("1/h.0.q", 1) == "h.0.q"
    assert name_in_task("h.0.q", None) == "h.0.q"
    for other in ("11/h.0.q", "base_model.model.11/h.0.q.lora_A.weight", "h.1/q"):
        assert name_in_task(other, 1) is None
    assert ModuleNames(("0/model.layers.3.q", "1/model.layers.3.q")).kind == "model.layers.3.q"


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("model.layers.17.self_attn.q_proj.weight", "17"),
        ("h.0", "0"),
        ("block.0.layer.1.q", "0"),
        ("layers.a.h.03.w", "03"),
        ("my_layers.3.w1", None),
        ("layers.3b.w", None),
        ("layers", None),
        ("w17", None),
    ],
)
def test_the_number_of_the_layer(name, number):
    span = layer_span(name)
    assert (None if span is None else name[slice(*span)]) == number


def test_dense_tensors_lie_as_the_weights_do():
    f = random_factors(3, 7, 6, 2, 1)
    for transposed in (False, True):
        key, update = dense_tensor(ModuleNames(NAMES, transposed), f, 1)
        assert key == f"{NAMES[1]}.weight"
        assert torch.equal(update.mT if transposed else update, f.update(1))
