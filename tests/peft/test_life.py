"""Several adapters in a model: switched, merged, deleted, unloaded, copied; what peft's users take for granted."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import rasa_theory as rt
from rasa_theory.peft import RasaConfig, factors
from tests.peft.toy import (
    KINDS,
    adapted,
    config,
    data,
    layers,
    literal_update,
    parameters,
    perturbed,
    toy,
    trained,
    tuner,
)


def two() -> nn.Module:
    """The toy with the adapter `default`, which is active, and the adapter `other` on `up` alone."""
    model = perturbed(adapted())
    model.add_adapter("other", config(2, 1, ["up"], seed=3))
    return perturbed(model, "other", seed=9)


def is_trained(model: nn.Module, adapter: str) -> set[bool]:
    return {p.requires_grad for p in parameters(model, adapter).values()}


# ---- switching


def test_switched_off_it_is_the_model_without_it() -> None:
    model = perturbed(adapted())
    before, after = toy()(data()), model(data())
    assert not torch.allclose(before, after)
    with model.disable_adapter():
        assert torch.equal(model(data()), before)
        assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(model(data()), after)
    assert is_trained(model, "default") == {True}
    model.base_model.disable_adapter_layers()
    assert torch.equal(model(data()), before)
    model.base_model.enable_adapter_layers()
    assert torch.equal(model(data()), after)


def test_answers_of_the_base_between_forward_and_backward_change_no_gradient() -> None:
    """As in DPO, whose reference model is this one with the adapter switched off."""
    model = perturbed(adapted())
    model(data()).square().sum().backward()
    expected = {key: p.grad.clone() for key, p in parameters(model).items()}
    model.zero_grad()
    loss = model(data()).square().sum()
    with model.disable_adapter(), torch.no_grad():
        assert not model(data()).requires_grad
    loss.backward()
    for key, p in parameters(model).items():
        assert torch.equal(p.grad, expected[key])


def test_only_the_active_adapter_acts_and_is_trained() -> None:
    model = two()
    one = model(data())
    assert torch.equal(one, perturbed(adapted())(data()))
    assert (is_trained(model, "default"), is_trained(model, "other")) == ({True}, {False})
    model.set_adapter("other")
    assert (is_trained(model, "default"), is_trained(model, "other")) == ({False}, {True})
    assert not torch.allclose(model(data()), one)
    model.set_adapter("default", inference_mode=True)
    assert (is_trained(model, "default"), is_trained(model, "other")) == ({False}, {False})
    model.set_requires_grad("default")
    assert (is_trained(model, "default"), is_trained(model, "other")) == ({True}, {False})
    assert torch.equal(model(data()), one)


def test_both_adapters_may_be_active() -> None:
    model = two()
    model.base_model.set_adapter(["default", "other"])
    weights = {}
    for name, layer in layers(model).items():
        updates = [literal_update(layer, adapter) for adapter in ("default", "other") if adapter in layer.pool_key]
        weights[f"{name}.weight"] = toy().get_submodule(name).weight.detach() + sum(updates)
    literal = torch.func.functional_call(toy(), weights, (data(),))
    torch.testing.assert_close(model(data()), literal, rtol=1e-12, atol=1e-12)
    assert is_trained(model, "default") | is_trained(model, "other") == {True}
    model.merge_adapter()
    torch.testing.assert_close(model(data()), literal, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loaded", [False, True])
def test_a_second_adapter_leaves_the_training_of_the_first_alone(loaded: bool, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = perturbed(adapted())
    before = copy.deepcopy(model.state_dict())
    if loaded:
        perturbed(adapted(2, 1)).save_pretrained(str(tmp_path))
        model.load_adapter(str(tmp_path), "other")
    else:
        model.add_adapter("other", config(2, 1))
    assert (is_trained(model, "default"), is_trained(model, "other")) == ({True}, {False})
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    model.train()
    assert len(trained(model, 2)) == 2
    assert not any(torch.equal(model.state_dict()[key], before[key]) for key in parameters(model))


def test_a_deleted_adapter_takes_its_pools_along() -> None:
    model = two()
    model.delete_adapter("other")
    assert list(model.state_dict()) == list(adapted().state_dict())
    assert torch.equal(model(data()), perturbed(adapted())(data()))
    with pytest.raises(ValueError, match="other"):
        model.set_adapter("other")
    with pytest.warns(UserWarning, match="which is now deleted"):
        (again := two()).delete_adapter("default")
    assert again.active_adapters == ["other"]
    assert is_trained(again, "other") == {True}
    assert not any("default" in key for key in again.state_dict())
    again.delete_adapter("other")
    assert torch.equal(tuner(again).model(data()), toy()(data()))
    again.add_adapter("other", config(2, 1))  # the name is free again


def test_only_the_adapter_is_trained() -> None:
    model = adapted()
    before = copy.deepcopy(model.state_dict())
    losses = trained(model, 20)
    assert losses[-1] < 0.9 * losses[0]
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == set(parameters(model)) == {key for key, p in model.named_parameters() if p.requires_grad}


# ---- merging


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merged_weights_are_rounded_once(dtype: torch.dtype) -> None:
    model = perturbed(adapted(dtype=dtype))
    expected = model(data(dtype)).detach()
    plain = {name: layer.base_layer.weight.clone() for name, layer in layers(model).items()}
    exact = {name: plain[name].double() + layer.update("default").double() for name, layer in layers(model).items()}
    model.merge_adapter()
    for name, layer in layers(model).items():
        merged, spacing = layer.base_layer.weight.double(), torch.finfo(dtype).eps * exact[name].abs()
        assert bool(((merged - exact[name]).abs() <= (spacing / 2 if dtype.itemsize < 4 else spacing) * 1.001).all())
    torch.testing.assert_close(model(data(dtype)).detach(), expected, rtol=0, atol=40 * torch.finfo(dtype).eps)
    model.unmerge_adapter()
    for name, W in plain.items():
        error = (layers(model)[name].base_layer.weight.double() - W.double()).abs().max()
        assert float(error) <= 4 * torch.finfo(dtype).eps * float(exact[name].abs().max() + W.abs().max())


def test_several_adapters_are_merged_with_one_rounding() -> None:
    model = perturbed(adapted(dtype=torch.bfloat16))
    model.add_adapter("other", config(2, 1, ["up"], seed=3))
    perturbed(model, "other", seed=9)
    layer = layers(model)["layers.0.up"]
    W = layer.base_layer.weight.clone()
    exact = W.double() + literal_update(layer).detach() + literal_update(layer, "other").detach()
    model.base_model.set_adapter(["default", "other"])
    model.merge_adapter()
    merged = layer.base_layer.weight.double()
    assert bool(((merged - exact).abs() <= torch.finfo(torch.bfloat16).eps / 2 * 1.001 * exact.abs()).all())
    model.unmerge_adapter()
    torch.testing.assert_close(layer.base_layer.weight, W, rtol=0, atol=0.05)


def test_in_half_precision_updates_are_formed_in_float32() -> None:
    model = perturbed(adapted(dtype=torch.bfloat16))
    for pool, one in factors(model).items():
        for i, name in enumerate(next(p for p in tuner(model).pools("default") if p.name == pool).modules):
            layer = layers(model)[name]
            exact = literal_update(layer)
            for result in (one.update(i), layer.get_delta_weight("default")):
                assert result.dtype == torch.float32
                torch.testing.assert_close(result.double(), exact.detach(), rtol=0, atol=1e-6)


def test_merged_and_unloaded_it_leaves_the_chosen_adapters_in_the_weights() -> None:
    model = two()
    model.set_adapter("other")
    expected = model(data())
    model.set_adapter("default")
    plain = model.merge_and_unload(adapter_names=["other"])
    assert list(plain.state_dict()) == list(toy().state_dict())
    torch.testing.assert_close(plain(data()), expected)
    assert list(two().unload().state_dict()) == list(toy().state_dict())
    assert torch.equal(two().unload()(data()), toy()(data()))


def test_what_cannot_be_merged() -> None:
    model = two()
    with torch.no_grad():
        layers(model)["layers.2.down"].rasa_private_A["default"][0, 0] = torch.nan
    for action in (model.merge_adapter, model.merge_and_unload, lambda: model.merge_adapter(adapter_names=["default"])):
        with pytest.raises(rt.InputError, match="A of a layer has values that are not finite"):
            action()
    assert torch.equal(layers(model)["layers.0.up"].base_layer.weight, toy().layers[0].up.weight)
    half = perturbed(adapted(dtype=torch.float16))
    plain = half.state_dict()["base_model.model.layers.0.up.base_layer.weight"].clone()
    with torch.no_grad():
        layers(half)["layers.2.down"].rasa_private_B["default"] *= 1e6
    for action in (half.merge_adapter, half.merge_and_unload):
        with pytest.raises(rt.InputError, match=r"updates of 'default' a weight would not be finite in torch\.float16"):
            action()
        assert torch.equal(layers(half)["layers.0.up"].base_layer.weight, plain)  # also in layers before that one
        assert not layers(half)["layers.0.up"].merged
    coarse = toy(torch.float32)
    coarse.layers[1].up.weight.data = coarse.layers[1].up.weight.data.to(torch.float8_e4m3fn)
    refused = adapted(model=coarse)
    assert {p.dtype for p in parameters(refused).values()} == {torch.float32}
    with pytest.raises(rt.InputError, match=r"weights of torch\.float8_e4m3fn cannot be merged"):
        refused.merge_adapter()
    assert torch.equal(coarse.layers[0].up.weight, toy(torch.float32).layers[0].up.weight)


# ---- what people do with a model


@pytest.mark.parametrize("merged", [False, True])
def test_a_copied_or_pickled_model_is_whole_and_independent(merged: bool) -> None:
    model = perturbed(adapted())
    if merged:
        model.merge_adapter()
    after = model(data())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(other(data()), after)
        perturbed(other, seed=5)
        if not merged:
            assert not torch.allclose(other(data()), after)
        with other.disable_adapter():
            torch.testing.assert_close(other(data()).shape, after.shape)
        assert torch.equal(model(data()), after)


def test_a_state_dict_of_the_whole_model_is_strict() -> None:
    model, other = perturbed(adapted()), adapted(seed=3)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(data()), model(data()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    model = perturbed(adapted())
    model(data()).square().sum().backward()
    expected = {key: p.grad.clone() for key, p in parameters(model).items()}
    model.zero_grad()
    x = data().requires_grad_()
    for block in tuner(model).model.layers:
        x = checkpoint(block, x, use_reentrant=reentrant)
    tuner(model).model.norm(x).square().sum().backward()
    for key, p in parameters(model).items():
        torch.testing.assert_close(p.grad, expected[key])


@pytest.mark.slow
def test_compiled_before_or_after_it_computes_the_same(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = perturbed(adapted())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(data()), model(data()))
    with model.disable_adapter():
        torch.testing.assert_close(compiled(data()), toy()(data()))
    before = perturbed(adapted(model=torch.compile(toy(), backend="aot_eager")))
    torch.testing.assert_close(before(data()), model(data()))
    before.save_pretrained(str(tmp_path))
    from peft import PeftModel

    again = PeftModel.from_pretrained(toy(), str(tmp_path))
    torch.testing.assert_close(again(data()), model(data()))
    once_more = PeftModel.from_pretrained(torch.compile(toy(), backend="aot_eager"), str(tmp_path))
    torch.testing.assert_close(once_more(data()), model(data()))


def test_layers_on_two_devices() -> None:
    model = toy()
    model.layers[1].to("meta")
    result = adapted(4, 2, ["up"], model=model)
    assert [layer.rasa_mixing["default"].device.type for layer in layers(result).values()] == ["cpu", "meta", "cpu"]
    for name, device in (("layers.0.up", "cpu"), ("layers.1.up", "meta")):
        assert layers(result)[name](data().to(device)).device.type == device


def test_a_model_without_storage_is_counted() -> None:
    with torch.device("meta"):
        model = toy(torch.bfloat16)
    assert adapted(4, 1, model=model).get_nb_trainable_parameters() == adapted(4, 1).get_nb_trainable_parameters()


@pytest.mark.parametrize(("r", "k", "extra"), [(8, 1, 0.0417), (32, 1, 0.0168), (32, 8, 0.0748)])
def test_the_overhead_at_the_shapes_of_an_8b_model(r: int, k: int, extra: float) -> None:
    hidden, narrow, wide = 4096, 1024, 14336
    shapes = {"q_proj": (hidden, hidden), "k_proj": (hidden, narrow), "v_proj": (hidden, narrow),
              "o_proj": (hidden, hidden), "gate_proj": (hidden, wide), "up_proj": (hidden, wide),
              "down_proj": (wide, hidden)}  # fmt: skip
    model = nn.Module()
    with torch.device("meta"):
        model.layers = nn.ModuleList(nn.ModuleDict({name: nn.Linear(*shape) for name, shape in shapes.items()})
                                     for _ in range(32))  # fmt: skip
    trainable, _ = adapted(r, k, list(shapes), model=model).get_nb_trainable_parameters()
    assert 100 * (trainable / (r * 2_621_440) - 1) == pytest.approx(extra, abs=5e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_beside_half_precision_every_entry_of_the_mixing_moves(dtype: torch.dtype) -> None:
    model = adapted(4, 1, dtype=dtype)
    assert {p.dtype for p in parameters(model).values()} == {torch.float32}
    before = {key: p.detach().clone() for key, p in parameters(model).items()}
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(30):
        model(data(dtype)).float().square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    for key, p in parameters(model).items():
        assert bool((p != before[key]).all()), key
    updates = [layer.shared_of("default")[0] * layer.rasa_mixing["default"][3:] for layer in layers(model).values()]
    assert not torch.allclose(updates[0], updates[2], rtol=1e-4)  # the pool's update differs between layers


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_gradient_scaler_trains_the_mixing(dtype: torch.dtype) -> None:
    model = adapted(4, 1, dtype=dtype)
    before = {key: p.detach().clone() for key, p in parameters(model).items()}
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for _ in range(30):
        with torch.autocast("cpu", torch.float16, enabled=dtype == torch.float32):
            loss = model(data(dtype)).float().square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimiser)
        scaler.step(optimiser)
        scaler.update()
        optimiser.zero_grad()
    assert all(bool((p != before[key]).all()) for key, p in parameters(model).items())


def test_a_caller_who_wants_no_autocast_gets_none() -> None:
    from peft import get_peft_model

    model = get_peft_model(toy(torch.bfloat16), config(), autocast_adapter_dtype=False)
    assert {p.dtype for p in parameters(model).values()} == {torch.bfloat16}
    assert model(data(torch.bfloat16)).dtype == torch.bfloat16


def test_optimisers_that_dislike_empty_parameters() -> None:
    for k in (0, 4):
        model = adapted(4, k)
        assert all(p.numel() for p in parameters(model).values())
        optimiser = torch.optim.Adafactor([p for p in model.parameters() if p.requires_grad])
        model(data()).square().sum().backward()
        optimiser.step()


def test_modules_to_save_biases_and_selections() -> None:
    model = adapted(modules_to_save=["norm"], bias="rasa_only", exclude_modules=["layers.1.up"])
    names = {key for key, p in model.named_parameters() if p.requires_grad}
    assert "base_model.model.norm.modules_to_save.default.weight" in names
    assert "base_model.model.layers.0.up.base_layer.bias" in names
    assert set(layers(model)) == {"layers.0.up", "layers.2.up", *(f"layers.{i}.down" for i in range(3))}
    assert tuner(model).pools("default")[0].rank == 2 * 2
    assert set(layers(adapted(targets=r".*\.(up|down)"))) == set(layers(adapted(targets="all-linear")))
    assert set(layers(adapted(layers_to_transform=[0, 2], layers_pattern="layers"))) == {
        f"layers.{i}.{kind}" for i in (0, 2) for kind in KINDS
    }


def test_rank_patterns_are_by_pool() -> None:
    model = adapted(4, 1, rank_pattern={"down": 3}, k_pattern={"down": 2})
    assert {pool.name: (pool.budget.rank, pool.budget.shared_rank) for pool in tuner(model).pools("default")} == {
        "up": (4, 1), "down": (3, 2)
    }  # fmt: skip
    with pytest.raises(rt.InputError, match="share the pool 'up' but have r, k = 3, 1 and 4, 1"):
        adapted(4, 1, rank_pattern={"layers.0.up": 3})


def test_status_of_layers_and_model() -> None:
    model = two()
    status = model.get_model_status()
    assert (status.base_model_type, status.adapter_model_type, status.peft_types) == (
        "Toy", "RasaModel", {"default": "RASA", "other": "RASA"}
    )  # fmt: skip
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
    assert status.num_adapter_layers == 6


def test_a_new_adapter_of_a_bare_model_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted(4, 1)
        RasaConfig(r=4, k=1, target_modules=["up"], fan_in_fan_out=False)
