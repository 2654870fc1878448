"""The adapter as a module: the paper's formula written out densely, PEFT's LoRA step by step, an adapter's life."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, T5Config, T5Model

import rasa_theory as rt
from rasa_theory import adapter as ad

KINDS = ("up", "down")
BUDGETS = [(4, 0), (4, 1), (4, 2), (4, 4)]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    """Three blocks of two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block(x)
        return self.norm(x)


def small(dtype: torch.dtype = torch.float64) -> Model:
    torch.manual_seed(0)
    return Model().to(dtype)


def data(dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(5, 6, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def perturbed(adapter: ad.Adapter, seed: int = 2) -> ad.Adapter:
    """Every parameter moved away from its start, so that nothing is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
    return adapter


def trained(model: nn.Module, adapter: ad.Adapter, steps: int) -> list[float]:
    optimiser = torch.optim.AdamW([p for p in adapter.parameters() if p.requires_grad], lr=0.03)
    target, losses = data(seed=7).to(next(model.parameters()).dtype), []
    for _ in range(steps):
        loss = (model(data(target.dtype)) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def literal_update(terms: ad.Terms, i: int) -> Tensor:
    """[B~_i, B_S] diag(d_i) [A~_i; A_S] as the paper writes it, dense."""
    Bt, At, d = terms.private_B[i], terms.private_A[i], terms.mixing[i]
    q = Bt.shape[1]
    return Bt @ torch.diag(d[:q]) @ At + terms.shared_B @ torch.diag(d[q:]) @ terms.shared_A


# ---- the formula


@pytest.mark.parametrize(("rank", "k"), BUDGETS)
def test_forward_and_gradients_are_those_of_the_dense_formula(rank: int, k: int) -> None:
    model, plain = small(), small()
    adapter = perturbed(ad.inject(model, KINDS, rt.RankBudget(rank, k)))
    y = model(data())
    y.square().sum().backward()
    found = {key: p.grad.clone() for key, p in adapter.named_parameters() if p.grad is not None}

    adapter.zero_grad()
    weights = dict(plain.named_parameters())
    for name, (terms, i) in adapter.targets.items():
        weights[f"{name}.weight"] = weights[f"{name}.weight"].detach() + literal_update(terms, i)
    literal = torch.func.functional_call(plain, weights, (data(),))
    literal.square().sum().backward()
    torch.testing.assert_close(y, literal, rtol=1e-12, atol=1e-12)
    for key, p in adapter.named_parameters():
        if key in found:
            torch.testing.assert_close(found[key], p.grad, rtol=1e-10, atol=1e-12)
    trained_ones = {key for key, p in adapter.named_parameters() if p.requires_grad}
    assert found.keys() == trained_ones
    assert any("mixing" in key for key in found) == (k > 0)


@pytest.mark.parametrize(("rank", "k"), BUDGETS)
def test_gradcheck(rank: int, k: int) -> None:
    adapter = perturbed(ad.inject(small(), ["up"], rt.RankBudget(rank, k)))
    (terms,) = adapter.terms.values()
    parameters = [p for p in (terms.private_B[1], terms.private_A[1], terms.mixing[1], terms.shared_B, terms.shared_A)
                  if p.numel() and p.requires_grad]  # fmt: skip
    x = data().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: terms(x, 1), (x, *parameters))


@pytest.mark.parametrize(
    ("q", "R", "expected"),
    [(4, 0, [2.0] * 4), (3, 3, [8 / 6] * 3 + [8 / 6] * 3), (2, 6, [2.0] * 2 + [8 / 12] * 6), (0, 12, [8 / 12] * 12)],
)
def test_the_mixing_begins_with_half_of_alpha_on_each_side(q: int, R: int, expected: list[float]) -> None:
    assert ad.initial_mixing(q, R, 8.0).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("rank", "k"), BUDGETS)
def test_nothing_changes_until_it_is_trained(rank: int, k: int) -> None:
    model = small()
    before = model(data())
    adapter = ad.inject(model, KINDS, rt.RankBudget(rank, k))
    assert torch.equal(model(data()), before)
    for terms in adapter.terms.values():
        assert not any(B.any() for B in (*terms.private_B, terms.shared_B))


def test_the_start_is_kaimings_of_a_seed_and_other_in_every_layer() -> None:
    def rows(seed: int) -> list[Tensor]:
        model = small()
        for block in model.layers:
            block.up = nn.Linear(400, 25).double()
        state = torch.get_rng_state()
        (terms,) = ad.inject(model, ["up"], rt.RankBudget(20, 10), seed=seed).terms.values()
        assert torch.equal(torch.get_rng_state(), state)
        return [A.detach() for A in (*terms.private_A, terms.shared_A)]

    first, second = rows(0), rows(1)
    for A in first:
        assert 0.999 / 20 < float(A.abs().max()) <= 1 / 20
        assert float(A.std()) == pytest.approx(1 / 20 / 3**0.5, rel=0.03)
    assert all(torch.equal(A, B) for A, B in zip(first, rows(0), strict=True))
    assert not any(torch.equal(A[:10], B[:10]) for A, B in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])


def test_alpha_is_twice_the_rank_if_it_is_not_given() -> None:
    adapter = ad.inject(small(), ["up"], rt.RankBudget(4, 1))
    assert adapter.alpha == 8.0
    assert adapter.terms["up"].mixing[2].tolist() == pytest.approx([4 / 3] * 6)


@pytest.mark.parametrize("k", [0, 1, 6])
def test_one_layer_and_all_of_its_rank(k: int) -> None:
    model = small()
    adapter = ad.inject(model, ["layers.1.up"], rt.RankBudget(6, k))
    losses = trained(model, adapter, 20)
    assert losses[-1] < losses[0]
    (terms,) = adapter.terms.values()
    torch.testing.assert_close(adapter.delta_weight("layers.1.up"), literal_update(terms, 0).detach())


def test_layers_on_two_devices() -> None:
    model = small()
    model.layers[1].to("meta")
    terms = ad.inject(model, ["up"], rt.RankBudget(4, 2)).terms["up"]
    assert [p.device.type for p in terms.mixing] == ["cpu", "meta", "cpu"]
    assert [terms(data().to(device), i).device.type for i, device in enumerate(["cpu", "meta"])] == ["cpu", "meta"]


def test_k_0_is_the_lora_of_peft_over_twenty_steps() -> None:
    ours, theirs = small(), small()
    adapter = ad.inject(ours, KINDS, rt.RankBudget(4, 0), alpha=6.0)
    peft = get_peft_model(theirs, LoraConfig(r=4, lora_alpha=6, target_modules=list(KINDS), lora_dropout=0.0))
    lora = dict(peft.named_modules())
    with torch.no_grad():
        for name, (terms, i) in adapter.targets.items():
            lora[f"base_model.model.{name}"].lora_A["default"].weight.copy_(terms.private_A[i])
    optimiser = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=0.03)
    expected = []
    for _ in range(20):
        loss = (peft(data()) - data(seed=7)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        expected.append(loss.item())
    assert trained(ours, adapter, 20) == pytest.approx(expected, rel=1e-9)
    assert expected[-1] < 0.9 * expected[0]
    for name, (terms, i) in adapter.targets.items():
        layer = lora[f"base_model.model.{name}"]
        torch.testing.assert_close(terms.private_B[i], layer.lora_B["default"].weight.double(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("rank", "k"), [(1, 1), (2, 1), (4, 1)])
def test_training_reaches_the_full_rank_of_an_update(rank: int, k: int) -> None:
    model = small()
    adapter = ad.inject(model, ["up"], rt.RankBudget(rank, k))
    trained(model, adapter, 10)
    for i in range(3):
        update = adapter.delta_weight(f"layers.{i}.up")
        assert int(torch.linalg.matrix_rank(update)) == min(rank - k + 3 * k, 6)


# ---- what an optimiser and a state dict see


def test_the_pool_is_there_once_and_every_layer_trains_it() -> None:
    model = small()
    adapter = ad.inject(model, KINDS, rt.RankBudget(4, 2))
    pools = [key for key in model.state_dict() if "shared_A" in key]
    assert pools == [f"rasa_adapters.default.kinds.{kind}.shared_A" for kind in KINDS]
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in adapter.parameters()}
    terms = adapter.terms["up"]
    perturbed(adapter)
    model(data()).sum().backward()
    whole = terms.shared_A.grad.clone()
    parts = torch.zeros_like(whole)
    for i in range(3):  # through one layer only: the others see a pool of their own
        adapter.zero_grad()
        others = copy.deepcopy(terms)
        for j in range(3):
            model.layers[j].up.active = (terms if i == j else others, j)
        model(data()).sum().backward()
        parts += terms.shared_A.grad
    torch.testing.assert_close(whole, parts)
    assert terms.mixing[0].data_ptr() != terms.mixing[1].data_ptr()


def test_only_the_adapter_is_trained() -> None:
    model = small()
    before = copy.deepcopy(model.state_dict())
    adapter = ad.inject(model, KINDS, rt.RankBudget(4, 2))
    losses = trained(model, adapter, 20)
    assert losses[-1] < 0.9 * losses[0]
    for key, value in before.items():
        part, _, last = key.rpartition(".")
        now = model.get_submodule(part)
        assert torch.equal(getattr(now.base if isinstance(now, ad.AdaptedLinear) else now, last), value)


def test_parameters_are_counted() -> None:
    adapter = ad.inject(small(), KINDS, rt.RankBudget(4, 1))
    L, q, R, sides = 3, 3, 3, 15
    counts = adapter.parameter_counts()
    assert counts == {
        "private": 2 * L * q * sides, "shared": 2 * R * sides, "mixing": 2 * L * (q + R),
        "rasa": 2 * (L * 4 * sides + L * (q + R)), "lora": 2 * L * 4 * sides,
        "extra_percent": pytest.approx(100 * (q + R) / (4 * sides)),
    }  # fmt: skip
    assert sum(p.numel() for p in adapter.parameters() if p.requires_grad) == counts["rasa"]
    lora = ad.inject(small(), KINDS, rt.RankBudget(4, 0))
    assert lora.parameter_counts()["rasa"] == lora.parameter_counts()["lora"] == counts["lora"]
    assert sum(p.numel() for p in lora.parameters() if p.requires_grad) == counts["lora"]


@pytest.mark.parametrize(("rank", "k", "extra"), [(8, 1, 0.0417), (32, 1, 0.0168), (32, 8, 0.0748)])
def test_the_overhead_at_the_shapes_of_an_8b_model(rank: int, k: int, extra: float) -> None:
    hidden, narrow, wide = 4096, 1024, 14336
    shapes = {"q_proj": (hidden, hidden), "k_proj": (hidden, narrow), "v_proj": (hidden, narrow),
              "o_proj": (hidden, hidden), "gate_proj": (hidden, wide), "up_proj": (hidden, wide),
              "down_proj": (wide, hidden)}  # fmt: skip
    model = nn.Module()
    with torch.device("meta"):
        model.layers = nn.ModuleList(nn.ModuleDict({name: nn.Linear(*shape) for name, shape in shapes.items()})
                                     for _ in range(32))  # fmt: skip
    counts = ad.inject(model, list(shapes), rt.RankBudget(rank, k)).parameter_counts()
    assert counts["lora"] == rank * 2_621_440
    assert counts["extra_percent"] == pytest.approx(extra, abs=5e-5)


def test_a_model_without_storage_is_counted() -> None:
    with torch.device("meta"):
        model = small(torch.bfloat16)
    counts = ad.inject(model, KINDS, rt.RankBudget(4, 1)).parameter_counts()
    assert counts == ad.inject(small(), KINDS, rt.RankBudget(4, 1)).parameter_counts()


# ---- merged, switched off, several, taken out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merged_weights_are_rounded_once(dtype: torch.dtype) -> None:
    model = small(dtype)
    adapter = perturbed(ad.inject(model, KINDS, rt.RankBudget(4, 2)))
    with torch.no_grad():
        expected = model(data(dtype))
    plain = {name: model.get_submodule(name).weight.clone() for name in adapter.targets}
    exact = {name: (plain[name].double() + adapter.delta_weight(name).double()) for name in adapter.targets}
    adapter.merge()
    assert adapter.merged
    for name in adapter.targets:
        merged, spacing = model.get_submodule(name).weight.double(), torch.finfo(dtype).eps * exact[name].abs()
        assert bool(((merged - exact[name]).abs() <= (spacing / 2 if dtype.itemsize < 4 else spacing) * 1.001).all())
    with torch.no_grad():
        torch.testing.assert_close(model(data(dtype)), expected, rtol=0, atol=40 * torch.finfo(dtype).eps)
    adapter.unmerge()
    for name, W in plain.items():
        error = (model.get_submodule(name).weight.double() - W.double()).abs().max()
        assert float(error) <= 4 * torch.finfo(dtype).eps * float(exact[name].abs().max() + W.abs().max())


def test_in_half_precision_updates_are_formed_in_float32(tmp_path: Path) -> None:
    model = small(torch.bfloat16)
    adapter = perturbed(ad.inject(model, KINDS, rt.RankBudget(4, 2)))
    ad.save(adapter, tmp_path, format="lora-exact-rasa")
    again = ad.load(small(torch.float32), tmp_path)
    factors = adapter.factors()
    for name, (terms, i) in adapter.targets.items():
        update = adapter.delta_weight(name)
        assert update.dtype == torch.float32
        exact = literal_update(copy.deepcopy(terms).double(), i).detach()
        for found in (update, factors[terms.kind].update(i), again.delta_weight(name)):
            torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-6)


def test_factors_are_copies() -> None:
    adapter = perturbed(ad.inject(small(), KINDS, rt.RankBudget(4, 2)))
    before, factors = copy.deepcopy(adapter.state_dict()), adapter.factors()["up"]
    for tensor in factors.named().values():
        assert not tensor.requires_grad
        tensor.zero_()
    assert all(torch.equal(value, before[key]) for key, value in adapter.state_dict().items())


def test_switched_off_it_is_the_model_without_it() -> None:
    model = small()
    before = model(data())
    adapter = perturbed(ad.inject(model, KINDS, rt.RankBudget(4, 2)))
    after = model(data())
    assert not torch.allclose(before, after)
    for merged in (False, True):
        if merged:
            adapter.merge()
        with adapter.disabled():
            torch.testing.assert_close(model(data()), before)
            assert not any(p.requires_grad for p in model.parameters())
        torch.testing.assert_close(model(data()), after)
        assert adapter.merged == merged
    adapter.disable()
    torch.testing.assert_close(model(data()), before)
    adapter.enable()
    torch.testing.assert_close(model(data()), after)


def test_answers_of_the_base_between_forward_and_backward_change_no_gradient() -> None:
    model = small()
    adapter = perturbed(ad.inject(model, KINDS, rt.RankBudget(4, 2)))
    model(data()).square().sum().backward()
    expected = [p.grad.clone() for p in adapter.parameters()]
    adapter.zero_grad()
    loss = model(data()).square().sum()
    with adapter.disabled():
        assert not model(data()).requires_grad
    loss.backward()
    for p, gradient in zip(adapter.parameters(), expected, strict=True):
        assert torch.equal(p.grad, gradient)


def test_one_that_is_not_active_is_not_after_disabled_either() -> None:
    model = small()
    first = perturbed(ad.inject(model, KINDS, rt.RankBudget(4, 2), name="first"))
    second = perturbed(ad.inject(model, KINDS, rt.RankBudget(2, 1), name="second"))
    after = model(data())
    with first.disabled():
        assert torch.equal(model(data()), after)
    assert (first.active, second.active) == (False, True)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in second.parameters()}


def test_of_several_adapters_one_is_active() -> None:
    model = small()
    before = model(data())
    first = perturbed(ad.inject(model, KINDS, rt.RankBudget(4, 2), name="first"))
    one = model(data())
    second = perturbed(ad.inject(model, ["down"], rt.RankBudget(2, 0), name="second"), seed=9)
    two = model(data())
    assert ad.adapters(model) == {"first": first, "second": second}
    assert (first.active, second.active) == (False, True)
    assert {id(p) for p in model.parameters() if p.requires_grad} <= {id(p) for p in second.parameters()}
    first.enable()
    torch.testing.assert_close(model(data()), one)
    first.merge()
    for refused in (second.enable, lambda: ad.inject(model, KINDS, rt.RankBudget(1, 0), name="third")):
        with pytest.raises(rt.InputError, match="'first' is merged into the weights; unmerge it first"):
            refused()
    assert set(ad.adapters(model)) == {"first", "second"}
    first.unmerge()
    second.enable()
    torch.testing.assert_close(model(data()), two)
    first.unload()
    torch.testing.assert_close(model(data()), two)
    assert isinstance(model.layers[0].up, nn.Linear)
    for gone in (first.enable, first.unload):
        with pytest.raises(rt.InputError, match="adapter 'first' has been unloaded"):
            gone()
    torch.testing.assert_close(model(data()), two)
    second.unload()
    torch.testing.assert_close(model(data()), before)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in small().named_modules()]
    assert list(model.state_dict()) == list(small().state_dict())


def test_merged_and_taken_out_it_is_a_plain_model() -> None:
    model = small()
    adapter = perturbed(ad.inject(model, KINDS, rt.RankBudget(4, 2)))
    after = model(data())
    adapter.merge()
    adapter.unload()
    assert list(model.state_dict()) == list(small().state_dict())
    torch.testing.assert_close(model(data()), after)


def test_merged_and_taken_out_it_leaves_the_layers_to_the_others() -> None:
    model = small()
    first = perturbed(ad.inject(model, KINDS, rt.RankBudget(4, 2), name="first"))
    second = perturbed(ad.inject(model, ["up"], rt.RankBudget(2, 1), name="second"), seed=9)
    first.enable()
    after = model(data())
    first.merge()
    first.unload()
    torch.testing.assert_close(model(data()), after)
    weights = {
        f"layers.{i}.up.weight": model.layers[i].up.weight + second.delta_weight(f"layers.{i}.up") for i in range(3)
    }
    weights |= {f"layers.{i}.down.weight": model.layers[i].down.weight for i in range(3)}
    second.enable()
    torch.testing.assert_close(model(data()), torch.func.functional_call(small(), weights, (data(),)))


def test_what_cannot_be_merged() -> None:
    model = small()
    adapter = ad.inject(model, KINDS, rt.RankBudget(4, 2))
    with pytest.raises(rt.InputError, match="'default' is not merged"):
        adapter.unmerge()
    adapter.merge()
    with pytest.raises(rt.InputError, match="is merged already"):
        adapter.merge()
    adapter.disable()
    with pytest.raises(rt.InputError, match="not active; enable it first"):
        adapter.merge()
    adapter.enable()
    with torch.no_grad():
        adapter.terms["up"].private_A[1][0, 0] = torch.nan
    with pytest.raises(rt.InputError, match=r"kinds.up.private_A.1 has values that are not finite"):
        adapter.merge()
    assert not model.layers[0].up.weight.isnan().any()


# ---- what people do with a model


def test_a_copy_is_independent() -> None:
    model = small()
    adapter = perturbed(ad.inject(model, KINDS, rt.RankBudget(4, 2)))
    after, other = model(data()), copy.deepcopy(model)
    theirs = ad.adapters(other)["default"]
    perturbed(adapter, seed=5)
    torch.testing.assert_close(other(data()), after)
    theirs.disable()
    torch.testing.assert_close(other(data()), small()(data()))
    assert adapter.active


@pytest.mark.parametrize("merged", [False, True])
def test_a_pickled_model_comes_back_whole(merged: bool) -> None:
    model = small()
    adapter = perturbed(ad.inject(model, KINDS, rt.RankBudget(4, 2)))
    if merged:
        adapter.merge()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    assert torch.equal(other(data()), model(data()))
    theirs = ad.adapters(other)["default"]
    assert theirs.merged == merged
    theirs.disable()
    torch.testing.assert_close(other(data()), small()(data()))
    assert adapter.active


def test_a_state_dict_of_the_whole_model_is_strict() -> None:
    model, other = small(), small()
    perturbed(ad.inject(model, KINDS, rt.RankBudget(4, 2)))
    ad.inject(other, KINDS, rt.RankBudget(4, 2), seed=3)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(data()), model(data()))


def test_gradients_off_and_evaluation_modes() -> None:
    model = small().eval()
    with torch.no_grad():
        adapter = ad.inject(model, KINDS, rt.RankBudget(4, 2), dropout=0.5)
    assert not any(module.training for module in model.modules())
    trained(model, perturbed(adapter), 2)
    after = model(data())
    with torch.inference_mode():
        assert torch.equal(model(data()), after)
        adapter.merge()
        torch.testing.assert_close(model(data()), after)
    adapter.unmerge()
    model.train()
    assert all(module.training for module in model.modules())
    assert len(trained(model, adapter, 2)) == 2


def test_training_goes_on_from_a_state_dict() -> None:
    model = small()
    adapter = perturbed(ad.inject(model, KINDS, rt.RankBudget(4, 2)))
    other = small()
    ad.inject(other, KINDS, rt.RankBudget(4, 2), seed=3).load_state_dict(adapter.state_dict())
    assert torch.equal(other(data()), model(data()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    model = small()
    adapter = perturbed(ad.inject(model, KINDS, rt.RankBudget(4, 2)))
    model(data()).square().sum().backward()
    expected = [p.grad.clone() for p in adapter.parameters()]
    adapter.zero_grad()
    x = data().requires_grad_()
    for block in model.layers:
        x = checkpoint(block, x, use_reentrant=reentrant)
    model.norm(x).square().sum().backward()
    for p, gradient in zip(adapter.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)


def test_compiled_it_computes_the_same() -> None:
    model = small()
    adapter = perturbed(ad.inject(model, KINDS, rt.RankBudget(4, 2)))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(data()), model(data()))
    adapter.disable()
    torch.testing.assert_close(compiled(data()), small()(data()))


def test_autocast_and_mixed_dtypes() -> None:
    model = small(torch.float32)
    adapter = perturbed(ad.inject(model, KINDS, rt.RankBudget(4, 2)))
    expected = model(data(torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        half = model(data(torch.float32))
        half.float().square().sum().backward()
    torch.testing.assert_close(half.float(), expected, rtol=0, atol=0.1)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapter.parameters())
    model = small(torch.bfloat16)
    adapter = perturbed(ad.inject(model, KINDS, rt.RankBudget(4, 2)))
    assert {p.dtype for p in adapter.parameters()} == {torch.bfloat16}
    adapter.float()  # trained in float32 beside weights in half precision
    y = model(data(torch.bfloat16))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()


def test_dropout_acts_on_the_adapter_in_training_only() -> None:
    model = small()
    adapter = perturbed(ad.inject(model, KINDS, rt.RankBudget(4, 2), dropout=0.5))
    plain = perturbed(ad.inject(other := small(), KINDS, rt.RankBudget(4, 2)))
    model.eval()
    torch.testing.assert_close(model(data()), other(data()))
    model.train()
    ad.inject(fresh := small(), KINDS, rt.RankBudget(4, 2), dropout=0.5)
    assert torch.equal(fresh(data()), small()(data()))  # the layer itself sees no dropout
    torch.manual_seed(0)
    one = model(data())
    assert not torch.allclose(one, model(data()))
    torch.manual_seed(0)
    torch.testing.assert_close(model(data()), one)
    terms, ours = adapter.terms["up"], plain.terms["up"]
    many = torch.stack([terms(data(), 0) for _ in range(4000)])
    torch.testing.assert_close(
        many.mean(0), ours(data(), 0), rtol=0, atol=0.12 * float(ours(data(), 0).detach().abs().max())
    )


def test_nothing_of_the_size_of_a_weight_is_formed() -> None:
    layer = nn.Module()
    layer.only = nn.Linear(300, 200)
    perturbed(ad.inject(layer, ["only"], rt.RankBudget(2, 1)))
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
        layer.only(torch.randn(2, 300))
    assert largest <= 3 * 300


# ---- files


@pytest.mark.parametrize(("rank", "k"), BUDGETS)
def test_the_authors_layout_keeps_every_parameter(rank: int, k: int, tmp_path: Path) -> None:
    model, other = small(), small()
    adapter = perturbed(ad.inject(model, KINDS, rt.RankBudget(rank, k), alpha=5.0, dropout=0.25))
    ad.save(adapter, tmp_path / "adapter", base="some/base")
    again = ad.load(other, tmp_path / "adapter", name="again")
    for (key, p), (_, q) in zip(adapter.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(p, q), key
        assert p.requires_grad == q.requires_grad
    assert (again.alpha, again.terms["up"].dropout.p) == (5.0, 0.25)
    assert ad.adapters(other) == {"again": again}
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    expected = {"peft_type": "RASA", "r": rank, "rasa_k": k, "rasa_alpha": 5.0, "base_model_name_or_path": "some/base"}
    assert expected.items() <= config.items()


@pytest.mark.parametrize(("rank", "k"), BUDGETS)
def test_peft_loads_the_exact_lora(rank: int, k: int, tmp_path: Path) -> None:
    model = small()
    adapter = perturbed(ad.inject(model, KINDS, rt.RankBudget(rank, k)))
    ad.save(adapter, tmp_path, format="lora-exact-rasa")
    peft = PeftModel.from_pretrained(small(), str(tmp_path), autocast_adapter_dtype=False)
    torch.testing.assert_close(peft.double()(data()), model(data()), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(peft.merge_and_unload()(data()), model(data()), rtol=1e-10, atol=1e-12)
    again = ad.load(other := small(), tmp_path)
    torch.testing.assert_close(other(data()), model(data()), rtol=1e-10, atol=1e-12)
    assert again.terms["up"].budget == rt.RankBudget(rank - k + 3 * k, 0)


def test_a_lora_that_peft_trained_is_loaded(tmp_path: Path) -> None:
    torch.manual_seed(3)
    config = LoraConfig(r=3, lora_alpha=7, use_rslora=True, target_modules=list(KINDS), init_lora_weights=False)
    peft = get_peft_model(small(torch.float32), config)
    peft.save_pretrained(str(tmp_path))
    ad.load(model := small(torch.float32), tmp_path)
    torch.testing.assert_close(model(data(torch.float32)), peft(data(torch.float32)))


def test_encoder_and_decoder_have_one_pool_of_a_kind(tmp_path: Path) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"d_model": 12, "d_kv": 6, "d_ff": 20, "num_layers": 2, "num_heads": 2}
        return T5Model(T5Config(vocab_size=32, decoder_start_token_id=0, **sizes)).double().eval()

    t5, ids = model(), {key: torch.arange(6).reshape(1, 6) for key in ("input_ids", "decoder_input_ids")}
    adapter = perturbed(ad.inject(t5, ["SelfAttention.q", "wo"], rt.RankBudget(2, 1)))
    assert {kind: len(terms.targets.names) for kind, terms in adapter.terms.items()} == {
        "layer.0.SelfAttention.q": 4,
        "layer.1.DenseReluDense.wo": 2,
        "layer.2.DenseReluDense.wo": 2,
    }
    ad.save(adapter, tmp_path)
    ad.load(other := model(), tmp_path)
    assert torch.equal(other(**ids)[0], t5(**ids)[0])


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_models_of_transformers(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base: nn.Module
    if name == "bert":
        config = BertConfig(
            vocab_size=32, hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20
        )
        base, targets = BertModel(config).double().eval(), ["query", "attention.output.dense", "intermediate.dense"]
    else:
        base = GPT2Model(GPT2Config(vocab_size=32, n_embd=12, n_layer=2, n_head=2, n_positions=16)).double().eval()
        targets = ["c_attn", "mlp.c_proj"]
    model, ids = copy.deepcopy(base), torch.arange(10).reshape(2, 5)
    adapter = perturbed(ad.inject(model, targets, rt.RankBudget(4, 2)))
    after = model(ids).last_hidden_state
    assert not torch.allclose(after, base(ids).last_hidden_state)
    for target in adapter.targets:
        layer = model.get_submodule(target)
        terms, _ = adapter.targets[target]
        assert terms.shape == (layer.out_features, layer.in_features)
        assert layer.weight is layer.base.weight
        assert layer.bias is layer.base.bias
        assert adapter.delta_weight(target).shape == base.get_submodule(target).weight.shape
    ad.save(adapter, tmp_path / "rasa")
    ad.save(adapter, tmp_path / "lora", format="lora-exact-rasa")
    for folder in ("rasa", "lora"):
        written = json.loads((tmp_path / folder / "adapter_config.json").read_text())
        assert written["fan_in_fan_out"] == (name == "gpt2")
    ad.load(other := copy.deepcopy(base), tmp_path / "rasa")
    torch.testing.assert_close(other(ids).last_hidden_state, after)
    peft = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "lora"), autocast_adapter_dtype=False)
    torch.testing.assert_close(peft.double()(ids).last_hidden_state, after)
    second = perturbed(ad.inject(model, targets, rt.RankBudget(2, 1), name="second"))
    other = model(ids).last_hidden_state
    second.merge()
    torch.testing.assert_close(model(ids).last_hidden_state, other)
    second.unload()
    ad.load(model := copy.deepcopy(base), tmp_path / "rasa").merge()
    torch.testing.assert_close(model(ids).last_hidden_state, after)
    ad.adapters(model)["default"].unload()
    torch.testing.assert_close(model(ids).last_hidden_state, after)


# ---- from a reconstruction


@pytest.mark.parametrize("k", [1, 3])
def test_a_reconstruction_goes_into_a_model(k: int) -> None:
    model, tuned = small(), small()
    updates = torch.randn(3, 9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    factors = rt.solve_rasa(rt.LayerStack(updates), rt.RankBudget(3, k)).factors
    with torch.no_grad():
        for i in range(3):
            tuned.layers[i].up.weight += factors.update(i)
    adapter = ad.from_factors(model, {"up": factors})
    torch.testing.assert_close(model(data()), tuned(data()), rtol=1e-10, atol=1e-12)
    assert adapter.terms["up"].budget == rt.RankBudget(3, k)
    back = adapter.factors()["up"]
    assert rt.reconstruction_error(rt.LayerStack(updates), back) == pytest.approx(
        rt.reconstruction_error(rt.LayerStack(updates), factors)
    )
    for i in range(3):
        torch.testing.assert_close(back.update(i), adapter.delta_weight(f"layers.{i}.up"))
    losses = trained(model, adapter, 5)
    assert losses[-1] < losses[0]


def test_kinds_of_unequal_ranks_are_saved_as_lora_only(tmp_path: Path) -> None:
    factors = {}
    for kind, shape, rank in (("up", (3, 9, 6), 2), ("down", (3, 6, 9), 3)):
        updates = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
        factors[kind] = rt.solve_rasa(rt.LayerStack(updates), rt.RankBudget(rank, 1)).factors
    adapter = ad.from_factors(model := small(), factors)
    with pytest.raises(rt.InputError, match="different ranks, which the authors' layout cannot say"):
        ad.save(adapter, tmp_path)
    ad.save(adapter, tmp_path, format="lora-exact-rasa")
    peft = PeftModel.from_pretrained(small(), str(tmp_path), autocast_adapter_dtype=False)
    torch.testing.assert_close(peft.double()(data()), model(data()), rtol=1e-10, atol=1e-12)


def test_factors_of_unequal_scale_fit_into_half_precision() -> None:
    updates = torch.randn(3, 9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    made = rt.solve_rasa(rt.LayerStack(updates), rt.RankBudget(3, 1)).factors
    uneven = rt.RasaFactors(
        made.private_B * 1e9, made.private_A / 1e9, made.shared_B * 1e9, made.shared_A * 1e9, made.mixing / 1e18
    )
    (terms,) = ad.from_factors(small(torch.float16), {"up": uneven}).terms.values()
    for i in range(3):
        torch.testing.assert_close(terms.update(i).double(), made.update(i), rtol=0, atol=0.02)
        torch.testing.assert_close(terms.private_B[i].norm(dim=0), terms.private_A[i].norm(dim=1), rtol=0.01, atol=0)
        assert torch.equal(terms.mixing[i][:2], torch.ones(2, dtype=torch.float16))
    largest = torch.stack([d[2:].abs() for d in terms.mixing]).amax(0)
    torch.testing.assert_close(largest, torch.ones_like(largest))


# ---- what is refused


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(6, 5), nn.Linear(5, 6, bias=False)
        self.head.weight = self.embedding.weight
        one = nn.Linear(5, 5)
        self.first, self.second = one, one
        self.attention = nn.MultiheadAttention(5, 1)


def tied_later() -> Model:
    """A layer that has an adapter, and later shares its weight."""
    model = small()
    ad.inject(model, ["up"], rt.RankBudget(2, 1))
    model.other = nn.Linear(6, 9)
    model.other.weight = model.layers[0].up.weight
    return model


def flat() -> nn.Linear:
    """As where weights are spread over devices, each a part of a row of numbers."""
    layer = nn.Linear(6, 9)
    layer.weight = nn.Parameter(layer.weight.detach().flatten())
    return layer


def shaped(**layers: nn.Module) -> Model:
    """The model with other modules in its second block."""
    model = small()
    for name, layer in layers.items():
        setattr(model.layers[1], name, layer)
    return model


BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: ad.inject(small(), ["nothing"], rt.RankBudget(2, 1)), "target 'nothing' names no Linear .* 'up', 'down'"),
    (lambda: ad.inject(small(), ["p"], rt.RankBudget(2, 1)), "target 'p' names no Linear"),
    (
        lambda: ad.inject(tied_later(), ["up"], rt.RankBudget(2, 1), name="second"),
        "'layers.0.up' and 'other' share one",
    ),
    (lambda: ad.inject(small(), ["*.nothing"], rt.RankBudget(2, 1)), "names no Linear or Conv1D of the model"),
    (lambda: ad.inject(small(), ["norm"], rt.RankBudget(2, 1)), "'norm' cannot be adapted: it is a LayerNorm, neither"),
    (lambda: ad.inject(small(), "up", rt.RankBudget(2, 1)), "targets must be a list of names"),
    (lambda: ad.inject(small(), [], rt.RankBudget(2, 1)), "targets must be a list of names"),
    (lambda: ad.inject(small(), ["up"], rt.RankBudget(7, 1)), r"rank 7 exceeds the smaller side of up, \(9, 6\)"),
    (lambda: ad.inject(small(), ["up"], rt.RankBudget(2, 1), alpha=0.0), "alpha must be finite and above 0, got 0.0"),
    (lambda: ad.inject(small(), ["up"], rt.RankBudget(2, 1), dropout=1.0), "dropout must be at least 0 and below 1"),
    (lambda: ad.inject(small(), ["up"], rt.RankBudget(2, 1), name="a.b"), "the name of an adapter has no dot"),
    (lambda: ad.inject(Tied(), ["head"], rt.RankBudget(2, 1)), "'head' and 'embedding' share one weight"),
    (lambda: ad.inject(Tied(), ["first"], rt.RankBudget(2, 1)), "'first' and 'second' share one weight"),
    (lambda: ad.inject(Tied(), ["out_proj"], rt.RankBudget(2, 1)), "out_proj of a torch MultiheadAttention"),
    (lambda: ad.inject(nn.Sequential(nn.Linear(4, 4)), ["0"], rt.RankBudget(2, 1)), "inject into a module that has it"),
    (lambda: ad.load(small(), "nowhere"), "nowhere/adapter_config.json"),
    (lambda: ad.inject(small(), ["up"], rt.RankBudget(2, 1), name="keys"), "torch keeps the name 'keys' to itself"),
    (lambda: ad.inject(small(), ["up"], rt.RankBudget(2, 1), alpha="4"), "alpha must be a number, got '4'"),
    (lambda: ad.inject(small(), ["up"], rt.RankBudget(2, 1), dropout=float("nan")), "dropout must be at least 0"),
    (
        lambda: ad.inject(small(torch.float16), ["up"], rt.RankBudget(2, 1), alpha=1e9),
        r"adapter 'default': kinds.up.mixing.0 has values that are not finite",
    ),
    (
        lambda: ad.inject(shaped(up=weight_norm(nn.Linear(6, 9))), ["up"], rt.RankBudget(2, 1)),
        r"'layers.1.up' cannot be adapted: its weight is no parameter of its own",
    ),
    (
        lambda: ad.inject(
            shaped(a=nn.ModuleDict({"b": nn.Linear(4, 4)}), a__b=nn.Linear(4, 4)), ["b", "a__b"], rt.RankBudget(1, 1)
        ),
        "two kinds of module are called 'a__b'",
    ),
    (lambda: ad.inject(shaped(up=flat()), ["up"], rt.RankBudget(2, 1)), "its weight is quantised, or no matrix"),
    (lambda: ad.from_factors(small(), {}), "there are no factors"),
]


@pytest.mark.parametrize(("action", "sentence"), BAD)
def test_what_is_refused(action: Callable[[], object], sentence: str) -> None:
    with pytest.raises(rt.InputError, match=sentence):
        action()


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"r": 4.0}, r"adapter_config.json: rank must be a whole number, got 4\.0"),
        ({"r": True}, "rank must be a whole number, got True"),
        ({"r": -1}, "rank must be at least 1, got -1"),
        ({"r": 10**12}, "rank 1000000000000 exceeds the smaller side of up"),
        ({"rasa_k": None}, "shared_rank must be a whole number, got None"),
        ({"rasa_k": 5}, "shared_rank 5 exceeds rank 4"),
        ({"rasa_k": 1}, "'base_model.rasa_shared_A.up.weight' has shape"),
        ({"rasa_alpha": -3.0}, "alpha must be finite and above 0"),
        ({"rasa_alpha": 10**400}, "alpha must be finite and above 0"),
        ({"rasa_alpha": "4"}, "alpha must be a number, got '4'"),
        ({"rasa_dropout": 1.5}, "dropout must be at least 0 and below 1"),
        ({"rasa_dropout": True}, "dropout must be a number, got True"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3', expected RASA or LORA"),
    ],
)
def test_a_configuration_that_is_not_sound(changed: dict[str, object], sentence: str, tmp_path: Path) -> None:
    ad.save(ad.inject(small(), KINDS, rt.RankBudget(4, 2)), tmp_path)
    file, model = tmp_path / "adapter_config.json", small()
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(rt.InputError, match=sentence):
        ad.load(model, tmp_path)
    assert list(model.state_dict()) == list(small().state_dict())
    assert all(p.requires_grad for p in model.parameters())


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


A0, NAN = "base_model.model.layers.0.up.rasa_A.weight", torch.full((2, 6), torch.nan, dtype=torch.float64)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.update({A0: NAN}), "kinds.up.private_A.0 has values that are not finite"),
        (lambda t: t.pop(A0.replace("rasa_A", "rasa_B")), "no tensor 'base_model.model.layers.0.up.rasa_B.weight'"),
        (
            lambda t: t.pop(A0),
            r"'base_model.rasa_shared_A.up.weight' has shape \(6, 6\), the model and adapter_config.json need \(4, 6\)",
        ),
        (lambda t: t.update({"other": torch.zeros(1)}), "'other' belongs to none of its modules"),
        (lambda t: t.update({A0.replace("up", "nowhere"): NAN}), "the model has no module 'layers.0.nowhere'"),
        (lambda t: t.update({A0.replace("layers.0.up", "norm"): NAN}), "'norm' cannot be adapted"),
        (lambda t: t.clear(), "no tensor is called base_model.model.<module>.rasa_A.weight"),
    ],
)
def test_tensors_that_are_not_sound(
    change: Callable[[dict[str, Tensor]], object], sentence: str, tmp_path: Path
) -> None:
    ad.save(ad.inject(small(), KINDS, rt.RankBudget(4, 2)), tmp_path)
    rewritten(tmp_path, change)
    with pytest.raises(rt.InputError, match=sentence):
        ad.load(model := small(), tmp_path)
    assert list(model.state_dict()) == list(small().state_dict())


def test_a_lora_that_would_not_be_loaded_whole_is_refused(tmp_path: Path) -> None:
    config = LoraConfig(r=3, target_modules=["up"], modules_to_save=["norm"])
    get_peft_model(small(), config).save_pretrained(str(tmp_path / "norm"))
    with pytest.raises(rt.InputError, match=r"norm.* would be lost: a whole tensor beside the factors"):
        ad.load(small(), tmp_path / "norm")
    config = LoraConfig(r=3, target_modules=list(KINDS), rank_pattern={"up": 2})
    get_peft_model(small(), config).save_pretrained(str(tmp_path / "ranks"))
    with pytest.raises(rt.InputError, match="ranks differ over modules"):
        ad.load(small(), tmp_path / "ranks")


def test_a_folder_may_have_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert ad.save(ad.inject(small(), KINDS, rt.RankBudget(4, 2)), "none") == Path("none")
    ad.load(small(), "none")
    Path("file").touch()
    with pytest.raises(rt.InputError, match=r"^file is not a folder that can be made"):
        ad.save(ad.inject(small(), KINDS, rt.RankBudget(4, 2)), "file")


def test_kinds_with_names_of_torchs_own_and_of_other_letters(tmp_path: Path) -> None:
    def model() -> Model:
        model = small()
        torch.manual_seed(1)
        for block in model.layers:
            block.keys, block._modules["w[1]?"] = nn.Linear(6, 6).double(), nn.Linear(6, 6).double()
        return model

    adapter = perturbed(ad.inject(model(), ["keys", "w[1]?", "layers.*.keys"], rt.RankBudget(2, 1)))
    assert {kind: len(terms.targets.names) for kind, terms in adapter.terms.items()} == {"keys": 3, "w[1]?": 3}
    ad.save(adapter, tmp_path)
    again = ad.load(model(), tmp_path)
    for name in adapter.targets:
        assert torch.equal(again.delta_weight(name), adapter.delta_weight(name))


def test_what_is_refused_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = small()
    adapter = ad.inject(model, KINDS, rt.RankBudget(4, 2))
    keys = list(model.state_dict())
    with pytest.raises(rt.InputError, match="has an adapter 'default' already"):
        ad.inject(model, KINDS, rt.RankBudget(4, 2))
    with pytest.raises(rt.InputError, match=r"changes no module 'norm'; it has 'layers\.0\.up'"):
        adapter.delta_weight("norm")
    ad.save(adapter, tmp_path)
    (tmp_path / "adapter_config.json").write_text(
        (tmp_path / "adapter_config.json").read_text().replace('"r": 4', '"r": 3')
    )
    with pytest.raises(rt.InputError, match=r"has shape \(2, 6\), the model and adapter_config.json need \(1, 6\)"):
        ad.load(model, tmp_path, name="other")
    with pytest.raises(rt.InputError, match="format must be one of rasa, lora-exact-rasa, got 'diff'"):
        ad.save(adapter, tmp_path, format="diff")
    assert list(model.state_dict()) == keys
    assert adapter.active


def test_factors_of_other_sizes_are_refused() -> None:
    made = rt.solve_rasa(rt.LayerStack(torch.randn(2, 9, 6, dtype=torch.float64)), rt.RankBudget(2, 1)).factors
    with pytest.raises(rt.InputError, match="of 2 layers and 2 pool terms, the model has 3"):
        ad.from_factors(small(), {"up": made})
    made = rt.solve_rasa(rt.LayerStack(torch.randn(3, 6, 6, dtype=torch.float64)), rt.RankBudget(2, 1)).factors
    with pytest.raises(rt.InputError, match=r"of shape \(6, 6\), the layers of \(9, 6\)"):
        ad.from_factors(small(), {"up": made})
    with pytest.raises(rt.InputError, match="names modules of 2 kinds"):
        ad.from_factors(small(), {"layers.*": made})
    made = rt.solve_rasa(rt.LayerStack(torch.randn(2, 9, 6, dtype=torch.float64)), rt.RankBudget(2, 1)).factors
    one = rt.RasaFactors(made.private_B[:1], made.private_A[:1], made.shared_B, made.shared_A, made.mixing[:1])
    with pytest.raises(rt.InputError, match="of the kind 'up', and so does another target"):
        ad.from_factors(small(), {"layers.0.up": one, "layers.1.up": one})
    whole = rt.RasaFactors(
        made.private_B[[0, 1, 0]], made.private_A[[0, 1, 0]], made.shared_B, made.shared_A, made.mixing[[0, 1, 0]]
    )
    with pytest.raises(rt.InputError, match="of 3 layers and 2 pool terms, the model has 3 layers"):
        ad.from_factors(small(), {"up": whole})
    made.shared_A[0, 0] = torch.inf
    with pytest.raises(rt.InputError, match="has values that are not finite"):
        ad.from_factors(small(), {"layers.[01].u*": made})


def test_shapes_of_one_kind_have_a_pool_each(tmp_path: Path) -> None:
    model = small()
    model.layers[1].up, model.layers[1].down = nn.Linear(6, 7).double(), nn.Linear(7, 6, bias=False).double()
    adapter = perturbed(ad.inject(model, ["up"], rt.RankBudget(2, 1)))
    assert {kind: terms.targets.names for kind, terms in adapter.terms.items()} == {
        "up.9x6": ("layers.0.up", "layers.2.up"),
        "up.7x6": ("layers.1.up",),
    }
    with pytest.raises(rt.InputError, match="several shapes, for which the authors' layout has one pool only"):
        ad.save(adapter, tmp_path)
    ad.save(adapter, tmp_path, format="lora-exact-rasa")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], list(config["rank_pattern"].values())) == (3, [2])
