"""Files that other tools load: what a consumer rebuilds from the written tensors alone is the update."""

import tracemalloc

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rasa_theory import InputError, LayerStack, solve_lora
from rasa_theory.formats import (
    ModuleNames,
    dense_tensor,
    join_safetensors,
    lora_config,
    lora_tensors,
    name_in_task,
    rasa_tensors,
    write_safetensors,
)
from rasa_theory.problem import balanced
from tests.helpers.problems import noise, random_factors

NAMES = tuple(f"model.layers.{i}.self_attn.q_proj" for i in range(3))


def test_factors_of_rasa_as_those_of_a_lora():
    """B = [B~_i, B_S D_i], A = [A~_i; A_S]: the same updates, of rank q + R."""
    f = random_factors(3, 7, 6, 3, 1)
    lora = f.as_lora()
    assert lora.B.shape == (3, 7, 2 + 3)
    for i in range(3):
        assert torch.allclose(lora.update(i), f.update(i), rtol=0, atol=1e-14)


def test_balanced_terms():
    B, A = (torch.as_tensor(x) for x in (noise(2, 7, 3) * np.array([1e6, 1.0, 0.0]), noise(2, 3, 5, 1)))
    b, a = balanced(B, A)
    assert torch.allclose(b @ a, B @ A, rtol=1e-12)
    sizes = torch.linalg.vector_norm(b, dim=1), torch.linalg.vector_norm(a, dim=2)
    assert torch.allclose(sizes[0][:, :2], sizes[1][:, :2], rtol=1e-12)
    assert not b[:, :, 2].any()


def test_lora_tensors_multiply_back_and_may_differ_in_rank():
    M = noise(3, 7, 6)
    factors = solve_lora(LayerStack(M), 6).factors
    tensors = lora_tensors(ModuleNames(NAMES), factors)
    for i, name in enumerate(NAMES):
        B, A = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "BA")
        assert torch.allclose(B @ A, torch.as_tensor(M[i]), atol=1e-12)
    cut = lora_tensors(ModuleNames(NAMES), factors, [1, 2, 3])
    assert [cut[f"base_model.model.{name}.lora_A.weight"].shape[0] for name in NAMES] == [1, 2, 3]


def test_the_authors_layout_rebuilds_the_forward_of_a_layer():
    """x -> [rasa_B | shared_B] (mixing * ([rasa_A; shared_A] x)), with the keys alone."""
    f = random_factors(3, 7, 6, 3, 1)
    tensors = rasa_tensors(ModuleNames(NAMES), f)
    x = torch.as_tensor(noise(1, 6, 4)[0])
    shared = [tensors[f"base_model.rasa_shared_{s}.self_attn__q_proj.weight"] for s in "AB"]
    for i, name in enumerate(NAMES):
        A, B, mixing = (tensors[f"base_model.model.{name}.rasa_{s}.weight"] for s in ("A", "B", "mixing"))
        assert mixing.shape == (2 + 3,)
        assert float(mixing.abs().max()) <= 1 + 1e-12
        assert torch.equal(mixing[:2], torch.ones(2, dtype=torch.float64))
        inner = mixing[:, None] * (torch.cat([A, shared[0]]) @ x)
        assert torch.allclose(torch.cat([B, shared[1]], 1) @ inner, f.update(i) @ x, rtol=0, atol=1e-13)


def test_dense_tensors_lie_as_the_weights_do():
    f = random_factors(3, 7, 6, 2, 1)
    for transposed in (False, True):
        key, update = dense_tensor(ModuleNames(NAMES, transposed), f, 1)
        assert key == f"{NAMES[1]}.weight"
        assert torch.equal(update.mT if transposed else update, f.update(1))


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


def test_ranks_that_differ_go_into_patterns():
    config = lora_config({"a.q": 8, "a.k": 8, "a.v": 9}, True, "base")
    assert (config["r"], config["lora_alpha"]) == (8, 8)
    assert config["rank_pattern"] == config["alpha_pattern"] == {r"^a\.v": 9}
    assert config["fan_in_fan_out"]
    assert config["target_modules"] == ["a.q", "a.k", "a.v"]


def test_joined_files_hold_the_same_tensors(tmp_path):
    parts = []
    for n, dtype in enumerate((torch.float16, torch.float32, torch.bfloat16)):
        parts.append(tmp_path / f"{n}.safetensors")
        save_file({f"t{n}.{m}": torch.randn(3, 5 + m).to(dtype) for m in range(3)}, parts[-1])
    with open(tmp_path / "all.safetensors", "wb") as out:
        join_safetensors(parts, out, {"format": "pt"})
    joined = load_file(tmp_path / "all.safetensors")
    expected = {key: tensor for part in parts for key, tensor in load_file(part).items()}
    assert joined.keys() == expected.keys()
    assert all(torch.equal(joined[key], expected[key]) for key in joined)
    with open(tmp_path / "twice.safetensors", "wb") as out, pytest.raises(InputError, match="two stacks would write"):
        join_safetensors([parts[0], parts[0]], out, {})


def test_the_names_of_one_task():
    assert name_in_task("base_model.model.1/h.0.q.lora_A.weight", 1) == "base_model.model.h.0.q.lora_A.weight"
    assert name_in_task("1/h.0.q", 1) == "h.0.q"
    assert name_in_task("h.0.q", None) == "h.0.q"
    for other in ("11/h.0.q", "base_model.model.11/h.0.q.lora_A.weight", "h.1/q"):
        assert name_in_task(other, 1) is None
    assert ModuleNames(("0/model.layers.3.q", "1/model.layers.3.q")).kind == "model.layers.3.q"


def test_tensors_are_written_one_by_one(tmp_path):
    """Any dtype that is written, turned ones and empty ones; no bytes of all of them beside the tensors."""
    tensors = {
        "turned": torch.randn(3, 5).mT, "half": torch.randn(4, 3).half(), "double": torch.randn(2, 2).double(),
        "none": torch.zeros(4, 0), "column": torch.randn(5, 5)[:1].mT, "one": torch.randn(7, 7).bfloat16()[:1, :1].mT,
        "row": torch.randn(3).bfloat16(),
    }  # fmt: skip
    tensors |= {f"large.{i}": torch.randn(256, 256) for i in range(8)}
    tracemalloc.start()
    try:
        with (tmp_path / "all.safetensors").open("wb") as out:
            write_safetensors(tensors, out, {"format": "pt"})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 256 * 256 * 4
    found = load_file(tmp_path / "all.safetensors")
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor)
