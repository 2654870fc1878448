"""Options of PEFT's LoRA: what is read is what PEFT merges, and what changes the meaning of B A is refused by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rasa_theory as rt
from rasa_theory.formats.lora_options import check_options
from rasa_theory.sources import open_source

CONFIG = Path("adapter_config.json")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "OLoRA"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "of-peft-0.30"),
        ("use_dora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("kasa_config", {"beta": 1.0}),
        ("monteclora_config", {"num_samples": 8}),
        ("megatron_config", {"tensor_model_parallel_size": 2}),
        ("enable_lora", [True, False, True]),
        ("invocation_string", "<|start|>"),
        ("twisted_config", {"turns": 3}),
        ("use_twist", True),
        ("twists", 0),
    ],
)
def test_what_changes_the_meaning_of_the_factors_is_refused_by_name(option: str, value: Any) -> None:
    with pytest.raises(rt.InputError) as refusal:
        check_options(CONFIG, {"peft_type": "LORA", "r": 8, option: value})
    sentence = str(refusal.value)
    assert sentence.startswith(f"adapter_config.json: {option} is {value!r}")
    assert "merge it into the model" in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("use_qalora", True),
        ("arrow_config", {"top_k": 3}),
        ("alora_invocation_tokens", [128006, 78191]),
        ("layer_replication", [[0, 4], [2, 5]]),
    ],
)
def test_merging_is_not_advised_where_it_is_no_way_out(option: str, value: Any) -> None:
    with pytest.raises(rt.InputError) as refusal:
        check_options(CONFIG, {"peft_type": "LORA", "r": 8, option: value})
    sentence = str(refusal.value)
    assert sentence.startswith(f"adapter_config.json: {option} is {value!r}, which ")
    assert "the update is not B A, and merging does not" in sentence
    assert "merge it" not in sentence


def test_an_option_that_is_not_known_is_not_said_to_change_the_update() -> None:
    with pytest.raises(rt.InputError) as refusal:
        check_options(CONFIG, {"twisted_config": {"turns": 3}})
    assert "may change what the factors mean" in str(refusal.value)
    assert "the update is not B A" not in str(refusal.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("init_lora_weights", True),
        ("init_lora_weights", False),
        ("init_lora_weights", None),
        ("init_lora_weights", "gaussian"),
        ("init_lora_weights", "eva"),
        ("init_lora_weights", "orthogonal"),
        ("init_lora_weights", "mica"),
        ("eva_config", {"rho": 2.0}),
        ("corda_config", {"corda_method": "ipm"}),
        ("loftq_config", {}),
        ("velora_config", {"num_groups": 64}),
        ("lora_dropout", 0.1),
        ("layers_to_transform", [1, 2]),
        ("alora_invocation_tokens", None),
        ("use_dora", False),
        ("twisted_config", None),
        ("twisted_config", {}),
    ],
)
def test_what_leaves_the_update_alone_is_passed_over(option: str, value: Any) -> None:
    check_options(CONFIG, {"peft_type": "LORA", "r": 8, option: value})


def test_the_options_of_the_installed_peft_are_all_known() -> None:
    """A value that is no default passes because of its name, or the refusal says what the option does."""
    peft = pytest.importorskip("peft")
    unknown = []
    for field in dataclasses.fields(peft.LoraConfig):
        try:
            check_options(CONFIG, {field.name: {"some": "value"}})
        except rt.InputError as refusal:
            unknown += [field.name] * ("not known" in str(refusal))
    assert unknown == ["init_lora_weights"]  # whose values are known, not the option


# ---- beside PEFT


class Towers(nn.Module):
    """Two layers with an embedding, a bias, and names that a checkpoint of a language model would have."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(12, 8)
        self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(8, 6), "o": nn.Linear(6, 8)}) for _ in range(2))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = x + layer["o"](torch.tanh(layer["q"](x)))  # type: ignore[index]
        return x


def trained(config: Any) -> Any:
    """A PEFT model of a fixed base after three steps of training."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(Towers(), config)
    torch.manual_seed(1)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimiser.zero_grad()
        model(torch.randint(12, (4, 5))).square().mean().backward()
        optimiser.step()
    return model


def base_weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: tensor.clone() for name, tensor in Towers().state_dict().items()}


def read_updates(folder: Path) -> dict[str, torch.Tensor]:
    """The updates of all modules as the package reads them, in float64."""
    updates = {}
    for source in open_source(str(folder)).stacks:
        values = source.load(torch.float64, None).values
        updates |= dict(zip(source.keys, values, strict=True))
    return updates


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "mica"},
        {"init_lora_weights": False, "use_rslora": True},
        {"lora_bias": True},
        {"bias": "all", "lora_dropout": 0.1},
        {"trainable_token_indices": {"embed_tokens": [1, 2]}},
        {"modules_to_save": ["embed_tokens"]},
        {"rank_pattern": {"q": 4}, "alpha_pattern": {"layers.1.q": 3}},
        {"layers_to_transform": [0, 1], "layers_pattern": "layers"},
        {"target_modules": ["o"], "target_parameters": ["q.weight"]},
        {
            "target_modules": ["o"],
            "target_parameters": ["q.weight"],
            "rank_pattern": {"q": 4, "q.weight": 3},
            "alpha_pattern": {"q": 3, "q.weight": 7},
        },
    ],
    ids=str,
)
def test_updates_are_what_peft_merges(tmp_path: Path, options: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft", minversion="0.18")
    model = trained(peft.LoraConfig(**{"r": 2, "lora_alpha": 5, "target_modules": ["q", "o"]} | options))
    model.save_pretrained(tmp_path)
    updates = read_updates(tmp_path)
    before, merged = base_weights(), model.merge_and_unload().state_dict()
    assert len(updates) == 4
    for name, update in updates.items():
        truth = merged[name].double() - before[name].double()
        assert float(truth.norm()) > 1e-3
        torch.testing.assert_close(update, truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_that_began_on_the_base_is_refused_unless_peft_has_converted_it(tmp_path: Path, kind: str) -> None:
    """As such, B A is far from the update; converted, with twice the rank, it is the update."""
    peft = pytest.importorskip("peft", minversion="0.18")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q", "o"], init_lora_weights=kind)
    torch.manual_seed(0)
    peft.get_peft_model(Towers(), config).save_pretrained(tmp_path / "before")
    model = trained(config)
    model.save_pretrained(tmp_path / "as it is")
    with pytest.raises(rt.InputError, match=f"init_lora_weights is {kind!r}, which changes the base's weights"):
        open_source(str(tmp_path / "as it is"))
    if kind == "pissa_niter_4":
        return  # its start is random, so that a second model does not repeat it
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "before"))
    before, merged = base_weights(), model.merge_and_unload().state_dict()
    updates = read_updates(tmp_path / "converted")
    assert len(updates) == 4
    for name, update in updates.items():
        truth = merged[name].double() - before[name].double()
        torch.testing.assert_close(update, truth, rtol=1e-4, atol=1e-5)
