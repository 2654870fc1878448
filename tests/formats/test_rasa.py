"""The layout of RaSA's authors: the forward of a layer from the written tensors alone, and what is read again."""

from pathlib import Path

import pytest
import torch

from rasa_theory import InputError
from rasa_theory.formats import ModuleNames, RasaConfig, rasa_factors, rasa_modules, rasa_tensors
from tests.helpers.problems import noise, random_factors

NAMES = tuple(f"model.layers.{i}.self_attn.q_proj" for i in range(3))


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_factors_that_were_written_are_read_again(dtype):
    f = random_factors(3, 7, 6, 3, 1)
    tensors = {key: tensor.to(dtype) for key, tensor in rasa_tensors(ModuleNames(NAMES), f).items()}
    again = rasa_factors(ModuleNames(NAMES), tensors)
    assert {tensor.dtype for tensor in again.named().values()} == {torch.float64}
    tolerance = 1e-13 if dtype == torch.float64 else 0.2
    for i in range(3):
        torch.testing.assert_close(again.update(i), f.update(i), rtol=0, atol=tolerance)


def test_the_mixing_of_private_terms_is_read_too():
    """Adapters of the authors, and trained ones, have other values there than 1."""
    f = random_factors(3, 7, 6, 3, 1)
    tensors = rasa_tensors(ModuleNames(NAMES), f)
    doubled = {key: 2 * tensor if "mixing" in key else tensor for key, tensor in tensors.items()}
    again = rasa_factors(ModuleNames(NAMES), doubled)
    for i in range(3):
        torch.testing.assert_close(again.update(i), 2 * f.update(i), rtol=0, atol=1e-13)


def test_the_modules_of_an_adapter():
    tensors = rasa_tensors(ModuleNames(NAMES), random_factors(3, 7, 6, 3, 1))
    assert rasa_modules(tensors, Path("file")) == list(NAMES)
    with pytest.raises(InputError, match=r"file: no tensor is called base_model.model.<module>.rasa_A.weight"):
        rasa_modules(["base_model.model.q.lora_A.weight"], Path("file"))


def test_a_configuration_that_was_written_is_read_again():
    config = RasaConfig(rank=8, shared_rank=2, alpha=16.0, dropout=0.1)
    plain = config.plain(["a.q", "b.q"], True, "org/base")
    assert RasaConfig.of(plain) == config
    assert (plain["peft_type"], plain["target_modules"]) == ("RASA", ["a.q", "b.q"])
    assert (plain["fan_in_fan_out"], plain["base_model_name_or_path"]) == (True, "org/base")
