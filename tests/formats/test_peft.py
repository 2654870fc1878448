"""PEFT's LoRA: what a consumer rebuilds from the written tensors alone is the update."""

import pytest
import torch

from rasa_theory import LayerStack, solve_lora
from rasa_theory.formats import (
    BaseModel,
    ModuleNames,
    adapter_format,
    lora_config,
    lora_factors,
    lora_key,
    lora_tensors,
)
from tests.helpers.problems import noise

NAMES = tuple(f"model.layers.{i}.self_attn.q_proj" for i in range(3))


def test_lora_tensors_multiply_back_and_may_differ_in_rank():
    M = noise(3, 7, 6)
    factors = solve_lora(LayerStack(M), 6).factors
    tensors = lora_tensors(ModuleNames(NAMES), factors)
    for i, name in enumerate(NAMES):
        B, A = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "BA")
        assert torch.allclose(B @ A, torch.as_tensor(M[i]), atol=1e-12)
    cut = lora_tensors(ModuleNames(NAMES), factors, [1, 2, 3])
    assert [cut[f"base_model.model.{name}.lora_A.weight"].shape[0] for name in NAMES] == [1, 2, 3]


@pytest.mark.parametrize("ranks", [None, [1, 2, 3], [0, 2, 0], [0, 0, 0]])
def test_factors_that_were_written_are_read_again(ranks):
    factors = solve_lora(LayerStack(noise(3, 7, 6)), 3).factors
    tensors = lora_tensors(ModuleNames(NAMES), factors, ranks)
    again = lora_factors(ModuleNames(NAMES), tensors, (7, 6))
    assert again.B.shape[2] == max(ranks or [3])
    for i, rank in enumerate(ranks or [3] * 3):
        expected = factors.B[i, :, :rank] @ factors.A[i, :rank]
        torch.testing.assert_close(again.update(i), expected, rtol=0, atol=1e-14)


def test_half_precision_is_read_in_double():
    factors = solve_lora(LayerStack(noise(3, 7, 6)), 2).factors
    halves = {key: tensor.bfloat16() for key, tensor in lora_tensors(ModuleNames(NAMES), factors).items()}
    again = lora_factors(ModuleNames(NAMES), halves, (7, 6))
    assert again.B.dtype == torch.float64
    B, A = (halves[lora_key(NAMES[1], side)].double() for side in "BA")
    assert torch.equal(again.update(1), B @ A)


def test_ranks_that_differ_go_into_patterns():
    config = lora_config({"a.q": 8, "a.k": 8, "a.v": 9}, True, BaseModel("base"))
    assert (config["r"], config["lora_alpha"]) == (8, 8)
    assert config["rank_pattern"] == config["alpha_pattern"] == {r"^a\.v": 9}
    assert config["fan_in_fan_out"]
    assert config["target_modules"] == ["a.q", "a.k", "a.v"]


def test_patterns_name_a_module_as_peft_looks_for_it():
    """A module that is targeted by its weight, beside fused experts, has this in its pattern too."""
    ranks = {"a.q": 8, "a.gate_proj": 4, "a.experts.gate_up_proj": 2}
    config = lora_config(ranks, False, BaseModel("base"), ["a.experts.gate_up_proj"], has_experts=True)
    assert config["target_parameters"] == ["a.experts.gate_up_proj", "a.gate_proj.weight"]
    assert config["rank_pattern"] == {r"^a\.gate_proj\.weight": 4, r"^a\.experts\.gate_up_proj": 2}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (lora_key("h.0.attn", "A"), True),
        ("layers.0.q.lora_B", True),
        ("embed.lora_embedding_A", True),
        ("layers.0.q.lora_magnitude_vector.weight", True),
        ("my.lora_Alpha", False),
        ("my_lora_A", True),
        ("my_flora_A", False),
        ("layers.0.q.weight", False),
    ],
)
def test_components_that_adapters_alone_use(name, expected):
    assert (adapter_format(name) is not None) == expected
