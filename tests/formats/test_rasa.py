"""The layout of RaSA's authors: the forward of a layer from the written tensors alone, and what is read again."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file

import rasa_theory as rt
import rasa_theory.peft  # registers the method
from rasa_theory import InputError
from rasa_theory.formats import (
    BaseModel,
    ModuleNames,
    RasaConfig,
    rasa_factors,
    rasa_modules,
    rasa_tensors,
)
from rasa_theory.sources import open_source
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
    plain = config.plain(["a.q", "b.q"], True, BaseModel("org/base"))
    read = rasa_theory.peft.RasaConfig(**plain)
    assert (read.r, read.k, read.alpha, read.dropout, read.d_init) == (8, 2, 16.0, 0.1, "half")
    assert (plain["peft_type"], plain["target_modules"]) == ("RASA", ["a.q", "b.q"])
    assert (plain["fan_in_fan_out"], plain["base_model_name_or_path"]) == (True, "org/base")


# ---- the two layouts in files


def second_layout(f, adapter="", copies=False):
    """The tensors of the authors' second fork; with `copies`, the pool once more within every layer, as it saves it."""
    first = rasa_tensors(ModuleNames(NAMES), f)
    part = {"A": "private_A", "B": "private_B", "mixing": "private_D"}
    tensors = {}
    for key, x in first.items():
        stem, _, end = key.rpartition(".rasa_")
        if end.startswith("shared"):
            side, module = end.removeprefix("shared_").split(".")[:2]
            places = ["base_model.", *(f"base_model.model.{name}." for name in NAMES if copies)]
            tensors |= {f"{place}rasa_shared_{side}{adapter}.{module}.weight": x.clone() for place in places}
        else:
            tensors[f"{stem}.rasa_{part[end.removesuffix('.weight')]}{adapter}.weight"] = x
    return tensors


def rasa_folder(folder, tensors, **changed):
    folder.mkdir(exist_ok=True)
    config = RasaConfig(rank=3, shared_rank=1, alpha=4.0).plain(["q_proj"], False, BaseModel(None))
    (folder / "adapter_config.json").write_text(json.dumps(config | {"rasa_d_init": "keep_scale"} | changed))
    save_file({key: x.clone() for key, x in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def layouts():
    f = random_factors(3, 7, 6, 3, 1)
    return f, {
        "first": rasa_tensors(ModuleNames(NAMES), f),
        "second": second_layout(f),
        "second, in memory": second_layout(f, ".default", copies=True),
        "second, with copies": second_layout(f, copies=True),
    }


@pytest.mark.parametrize("layout", ["first", "second", "second, in memory", "second, with copies"])
def test_both_layouts_of_the_authors_are_sources_of_updates(layout, tmp_path):
    """[rasa_B | shared_B] diag(mixing) [rasa_A; shared_A], with every number of the mixing changed by training."""
    f, tensors = layouts()
    tensors = {key: x + 0.25 * (x.ndim == 1) for key, x in tensors[layout].items()}
    folder = rasa_folder(tmp_path / "a", tensors)
    (tmp_path / "alone").mkdir()
    save_file({key: x.clone() for key, x in tensors.items()}, tmp_path / "alone" / "x.safetensors")
    shared_B, shared_A = f.evened().shared_B, f.evened().shared_A
    for source in (folder, tmp_path / "alone" / "x.safetensors"):
        (stack,), left_out = rt.load(str(source))
        assert left_out == []
        assert (stack.name, stack.shape) == ("model.layers.*.self_attn.q_proj.weight", (7, 6))
        for i in range(3):
            B = torch.cat([f.evened().private_B[i], shared_B], 1)
            A = torch.cat([f.evened().private_A[i], shared_A], 0)
            mixing = torch.cat([torch.ones(2, dtype=torch.float64), f.evened().mixing[i]]) + 0.25
            torch.testing.assert_close(stack.values[i], B @ torch.diag(mixing) @ A, rtol=1e-12, atol=1e-12)


def test_the_second_layout_loads_into_a_model(tmp_path):
    f, tensors = layouts()
    net = torch.nn.Module()
    net.model = torch.nn.Module()
    net.model.layers = torch.nn.ModuleList(
        torch.nn.ModuleDict({"self_attn": torch.nn.ModuleDict({"q_proj": torch.nn.Linear(6, 7).double()})})
        for _ in range(3)
    )
    folder = rasa_folder(tmp_path / "a", tensors["second, with copies"])
    adapter = PeftModel.from_pretrained(net, str(folder)).base_model
    for i, name in enumerate(NAMES):
        torch.testing.assert_close(adapter.layer(name).get_delta_weight("default"), f.update(i), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (
            lambda t: t.pop("base_model.rasa_shared_A.self_attn__q_proj.weight"),
            "has no tensor 'base_model.rasa_shared_A",
        ),
        (lambda t: t.pop(f"base_model.model.{NAMES[1]}.rasa_mixing.weight"), "rasa_mixing.weight' beside the others"),
        (
            lambda t: t.update({f"base_model.model.{NAMES[1]}.rasa_mixing.weight": torch.ones(4)}),
            "do not fit each other",
        ),
        (lambda t: t.update({f"base_model.model.{NAMES[1]}.rasa_A.other.weight": torch.ones(2, 6)}), "of two adapters"),
        (lambda t: t.update({f"base_model.model.{NAMES[1]}.rasa_A.weight": torch.ones(2, 6).int()}), "is i32, which"),
        (lambda t: t.clear() or t.update({"x": torch.ones(2, 2)}), "no tensor is called"),
    ],
)
def test_adapters_that_are_not_whole_are_refused(spoil, sentence, tmp_path):
    tensors = dict(layouts()[1]["first"])
    spoil(tensors)
    with pytest.raises(InputError, match=sentence):
        open_source(str(rasa_folder(tmp_path / "a", tensors)))
