"""The formula of a layer against the paper's, written out densely; its start; PEFT's LoRA step by step."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from rasa_theory.peft import RasaConfig, initial_mixing
from tests.peft.toy import (
    BUDGETS,
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


def literal_losses(model: nn.Module, steps: int) -> list[float]:
    """Training of the paper's formula, written out: the weights of a plain model are W_i + B_i D_i A_i."""
    plain, leaves = toy(), {key: p for key, p in parameters(model).items()}
    copies = {key: p.detach().clone().requires_grad_(p.requires_grad) for key, p in leaves.items()}
    optimiser = torch.optim.AdamW([p for p in copies.values() if p.requires_grad], lr=0.03)
    q, losses = model.peft_config["default"].r - model.peft_config["default"].k, []
    for _ in range(steps):
        weights = {}
        for pool in tuner(model).pools("default"):
            for name in pool.modules:
                d = copies[f"base_model.model.{name}.rasa_mixing.default"]
                update: Tensor = torch.zeros(())
                if q:
                    Bt, At = (copies[f"base_model.model.{name}.rasa_private_{side}.default"] for side in "BA")
                    update = update + Bt @ torch.diag(d[:q]) @ At
                if pool.rank:
                    B_S, A_S = (copies[f"base_model.rasa_pool_{side}.default.{pool.key}"] for side in "BA")
                    update = update + B_S @ torch.diag(d[q:]) @ A_S
                weights[f"{name}.weight"] = plain.get_submodule(name).weight.detach() + update
        loss = (torch.func.functional_call(plain, weights, (data(),)) - data(seed=7)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("r", "k"), BUDGETS)
def test_twenty_steps_are_those_of_the_formula(r: int, k: int) -> None:
    model = adapted(r, k)
    expected = literal_losses(model, 20)
    assert trained(model, 20) == pytest.approx(expected, rel=1e-6)  # the loss is in float32
    assert expected[-1] < 0.9 * expected[0]


@pytest.mark.parametrize(("r", "k"), BUDGETS)
def test_forward_and_gradients_are_those_of_the_dense_formula(r: int, k: int) -> None:
    model, plain = perturbed(adapted(r, k)), toy()
    model(data()).square().sum().backward()
    result = {key: p.grad.clone() for key, p in parameters(model).items() if p.grad is not None}
    model.zero_grad()
    weights = {f"{name}.weight": plain.get_submodule(name).weight.detach() + literal_update(layer)
               for name, layer in layers(model).items()}  # fmt: skip
    literal = torch.func.functional_call(plain, weights, (data(),))
    literal.square().sum().backward()
    torch.testing.assert_close(model(data()), literal, rtol=1e-12, atol=1e-12)
    for key, gradient in result.items():
        torch.testing.assert_close(gradient, parameters(model)[key].grad, rtol=1e-10, atol=1e-12)
    assert result.keys() == {key for key, p in parameters(model).items() if p.requires_grad}
    assert any("mixing" in key for key in result) == (k > 0)


@pytest.mark.parametrize(("r", "k"), BUDGETS)
def test_gradcheck(r: int, k: int) -> None:
    model = perturbed(adapted(r, k, ["up"]))
    layer, x = layers(model)["layers.1.up"], data().requires_grad_()
    leaves = [p for p in (*layer.rasa_private_B.values(), *layer.rasa_private_A.values(), *layer.rasa_mixing.values(),
                          *(layer.shared_of("default") or ())) if p.requires_grad]  # fmt: skip
    assert torch.autograd.gradcheck(lambda x, *_: layer.update_of(x, "default"), (x, *leaves))


@pytest.mark.parametrize(
    ("q", "R", "expected"),
    [(4, 0, [2.0] * 4), (3, 3, [8 / 6] * 3 + [8 / 6] * 3), (2, 6, [2.0] * 2 + [8 / 12] * 6), (0, 12, [8 / 12] * 12)],
)
def test_the_mixing_begins_with_half_of_alpha_on_each_side(q: int, R: int, expected: list[float]) -> None:
    assert initial_mixing(q, R, 8.0).tolist() == pytest.approx(expected)


def test_the_mixing_begins_as_the_configuration_says() -> None:
    half, keep = adapted(4, 1, ["up"], alpha=8.0), adapted(4, 1, ["up"], alpha=8.0, d_init="keep_scale")
    assert layers(half)["layers.2.up"].rasa_mixing["default"].tolist() == pytest.approx([4 / 3] * 6)
    assert layers(keep)["layers.2.up"].rasa_mixing["default"].tolist() == pytest.approx([2.0] * 6)
    assert RasaConfig(r=4).alpha == 8.0  # twice the rank


@pytest.mark.parametrize(("r", "k"), BUDGETS)
def test_nothing_changes_until_it_is_trained(r: int, k: int) -> None:
    model = adapted(r, k)
    assert torch.equal(model(data()), toy()(data()))
    assert not any(layer.update("default").any() for layer in layers(model).values())


def test_the_start_is_kaimings_of_a_seed_and_other_in_every_layer() -> None:
    def rows(seed: int | None) -> list[Tensor]:
        wide = toy()
        for block in wide.layers:
            block.up = nn.Linear(400, 25).double()
        model = adapted(20, 10, ["up"], model=wide, seed=seed)
        return [*(layer.rasa_private_A["default"].detach() for layer in layers(model).values()),
                layers(model)["layers.0.up"].shared_of("default")[1].detach()]  # fmt: skip

    state = torch.get_rng_state()
    first, second = rows(0), rows(1)
    torch.manual_seed(5)
    third = rows(None)
    assert not torch.equal(torch.get_rng_state(), state)
    for A in [*first, *third]:
        assert 0.999 / 20 < float(A.abs().max()) <= 1 / 20
        assert float(A.std()) == pytest.approx(1 / 20 / 3**0.5, rel=0.03)
    assert all(torch.equal(A, B) for A, B in zip(first, rows(0), strict=True))
    torch.manual_seed(5)
    assert all(torch.equal(A, B) for A, B in zip(third, rows(None), strict=True))
    assert not any(torch.equal(A[:10], B[:10]) for A, B in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])


def test_k_0_is_the_lora_of_peft_over_twenty_steps() -> None:
    ours = adapted(4, 0, alpha=6.0)
    theirs = get_peft_model(toy(), LoraConfig(r=4, lora_alpha=6, target_modules=KINDS, lora_dropout=0.0))
    with torch.no_grad():
        for name, layer in layers(ours).items():
            theirs.base_model.model.get_submodule(name).lora_A["default"].weight.copy_(layer.rasa_private_A["default"])
    expected = trained(theirs, 20)
    assert trained(ours, 20) == pytest.approx(expected, rel=1e-6)
    assert expected[-1] < 0.9 * expected[0]
    for name, layer in layers(ours).items():
        lora = theirs.base_model.model.get_submodule(name)
        torch.testing.assert_close(layer.rasa_private_B["default"], lora.lora_B["default"].weight, rtol=1e-6, atol=1e-9)
    assert ours.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize(("r", "k"), [(1, 1), (2, 1), (4, 1)])
def test_training_reaches_the_full_rank_of_an_update(r: int, k: int) -> None:
    model = adapted(r, k, ["up"])
    trained(model, 10)
    for layer in layers(model).values():
        assert int(torch.linalg.matrix_rank(layer.update("default"))) == min(r - k + 3 * k, 6)


@pytest.mark.parametrize("k", [0, 1, 6])
def test_one_layer_and_all_of_its_rank(k: int) -> None:
    model = adapted(6, k, ["layers.1.up"])
    losses = trained(model, 20)
    assert losses[-1] < losses[0]
    layer = layers(model)["layers.1.up"]
    torch.testing.assert_close(layer.get_delta_weight("default"), literal_update(layer).detach())


def test_every_layer_trains_the_one_pool() -> None:
    model = perturbed(adapted(4, 2, ["up"]))
    key = "base_model.rasa_pool_A.default.up"
    assert [name for name in model.state_dict() if "pool_A" in name] == [key]
    assert sum(p is parameters(model)[key] for p in model.parameters()) == 1
    model(data()).sum().backward()
    whole, parts = parameters(model)[key].grad.clone(), 0
    for i in range(3):  # through one layer only: the others see a pool of their own
        model.zero_grad()
        other = copy.deepcopy(model)
        for j in set(range(3)) - {i}:
            tuner(model).model.layers[j].up._shared = other.base_model.shared
        model(data()).sum().backward()
        parts = parts + parameters(model)[key].grad
        for j in range(3):
            tuner(model).model.layers[j].up._shared = tuner(model).shared
    torch.testing.assert_close(whole, parts)


def test_nothing_of_the_size_of_a_weight_is_formed() -> None:
    holder = nn.Module()
    holder.only = nn.Linear(300, 200)
    layer = layers(perturbed(adapted(2, 1, ["only"], model=holder)))["only"]
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            theirs = [x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)]
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in theirs:
                largest = max(largest, out.numel())
            return out

    with Watch():
        layer(torch.randn(2, 300))
    assert largest <= 3 * 300


def test_the_gradient_of_a_pool_is_added_up_in_float32_under_autocast() -> None:
    """As a leaf the pool would be cast once, and its gradients be added up over the layers in bfloat16."""
    model = perturbed(adapted(4, 4, ["up"], dtype=torch.float32))
    pool = layers(model)["layers.0.up"].shared_of("default")[1]
    with torch.autocast("cpu", torch.bfloat16):
        model(data(torch.float32)).float().square().sum().backward()
    assert not torch.equal(pool.grad, pool.grad.bfloat16().float())


def test_dropout_acts_on_the_adapter_in_training_only() -> None:
    model, plain = perturbed(adapted(dropout=0.5)), perturbed(adapted())
    torch.testing.assert_close(model.eval()(data()), plain.eval()(data()))
    assert torch.equal(adapted(dropout=0.5).train()(data()), toy()(data()))  # the layer itself sees no dropout
    model.train()
    torch.manual_seed(0)
    one = model(data())
    assert not torch.allclose(one, model(data()))
    torch.manual_seed(0)
    torch.testing.assert_close(model(data()), one)
    layer, same = layers(model)["layers.0.up"], layers(plain)["layers.0.up"].update_of(data(), "default").detach()
    many = torch.stack([layer.update_of(data(), "default") for _ in range(4000)])
    torch.testing.assert_close(many.mean(0), same, rtol=0, atol=0.12 * float(same.abs().max()))


def test_dropout_of_an_adapter_that_comes_later_follows_the_mode_of_its_layer() -> None:
    model = adapted(dropout=0.5).eval()
    model.add_adapter("other", config(dropout=0.5))
    model.set_adapter("other")
    perturbed(model, "other")
    assert torch.equal(model(data()), model(data()))
    model.train()
    assert not torch.equal(model(data()), model(data()))
