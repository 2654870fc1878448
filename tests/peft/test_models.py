"""The tuner in real models: reload equal to the bit, merging, the layout of a file, exact LoRAs, several adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from rasa_theory.peft import RasaConfig, convert_to_lora, factors, from_factors, save_as_lora
from tests.helpers.families import FAMILIES
from tests.helpers.tiny_models import TINY, tiny

BUDGETS = [(4, 0), (4, 1), (4, 4)]


def adapted(name: str, r: int = 4, k: int = 1, dtype: torch.dtype = torch.float32, **settings: object) -> PeftModel:
    config = RasaConfig(r=r, k=k, target_modules=TINY[name].targets, seed=0, **settings)
    return perturbed(get_peft_model(tiny(name, dtype), config).eval())


def perturbed(model: PeftModel, adapter: str = "default", seed: int = 1) -> PeftModel:
    """Every parameter of an adapter moved away from its start, so that nothing is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.base_model.parameters_of(adapter).values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def answer(name: str, model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return TINY[name].answer(model)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize(("r", "k"), BUDGETS)
def test_a_saved_adapter_comes_back_to_the_bit(name: str, r: int, k: int, tmp_path: Path) -> None:
    model = adapted(name, r, k)
    expected = answer(name, model)
    assert not torch.allclose(expected, answer(name, tiny(name)))
    model.save_pretrained(str(tmp_path))
    for low in (False, True):
        again = PeftModel.from_pretrained(tiny(name), str(tmp_path), low_cpu_mem_usage=low)
        assert torch.equal(answer(name, again), expected)
        for key, parameter in model.base_model.parameters_of("default").items():
            assert torch.equal(again.base_model.parameters_of("default")[key], parameter)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for t in stored.values()) == sum(
        p.numel() for p in model.base_model.parameters_of("default").values()
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == model.get_nb_trainable_parameters()[0]
    mixing = sum(t.numel() for key, t in stored.items() if "mixing" in key)
    assert trained == sum(t.numel() for t in stored.values()) - mixing * (k == 0)


@pytest.mark.parametrize("name", TINY)
def test_each_kind_tower_and_shape_has_a_pool(name: str) -> None:
    model = adapted(name)
    pools = model.base_model.pools("default")
    assert sorted(pool.name for pool in pools) == sorted(TINY[name].pools)
    for pool in pools:
        for module in pool.modules:
            layer = model.base_model.layer(module)
            B, d, A = layer.terms_of("default")
            assert (B.shape[0], A.shape[1]) == pool.shape
            assert len(d) == 3 + len(pool.modules)
    assert sum("rasa_pool_A" in key for key in model.state_dict()) == len(pools)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("safe", [False, True])
def test_merged_it_is_a_plain_model_with_the_same_answers(name: str, safe: bool) -> None:
    model = adapted(name)
    expected, base = answer(name, model), answer(name, tiny(name))
    model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(answer(name, model), expected, rtol=1e-5, atol=1e-6)
    model.unmerge_adapter()
    torch.testing.assert_close(answer(name, model), expected, rtol=1e-5, atol=1e-6)
    with model.disable_adapter():
        torch.testing.assert_close(answer(name, model), base, rtol=1e-5, atol=1e-6)
    plain = model.merge_and_unload(safe_merge=safe)
    assert list(plain.state_dict()) == list(tiny(name).state_dict())
    torch.testing.assert_close(answer(name, plain), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize(("r", "k"), BUDGETS)
def test_as_a_lora_it_is_the_same_without_an_svd(name: str, r: int, k: int, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    model = adapted(name, r, k, torch.float64)
    expected = answer(name, model)
    monkeypatch.setattr(torch.linalg, "svd", lambda *_, **__: pytest.fail("an SVD"))
    save_as_lora(tmp_path / "lora", model)
    largest = max(r - k + pool.rank for pool in model.base_model.pools("default"))
    save_as_lora(tmp_path / "padded", model, rank=largest + 2)
    for folder in ("lora", "padded"):
        lora = PeftModel.from_pretrained(tiny(name, torch.float64), str(tmp_path / folder))
        assert lora.peft_config["default"].peft_type == "LORA"
        assert lora.peft_config["default"].rank_pattern == {}
        torch.testing.assert_close(answer(name, lora.eval()), expected, rtol=1e-10, atol=1e-12)
    assert {len(t) for key, t in convert_to_lora(model, rank=largest + 2)[1].items() if "lora_A" in key} == {
        largest + 2
    }


@pytest.mark.parametrize("name", TINY)
def test_factors_go_out_and_in_again(name: str) -> None:
    model = adapted(name, dtype=torch.float64)
    out = factors(model)
    assert sorted(out) == sorted(TINY[name].pools)
    patterns = {pool.name: pool.modules[0] for pool in model.base_model.pools("default")}
    again = from_factors(
        tiny(name, torch.float64), {_pattern(patterns[pool]): one for pool, one in out.items()}, seed=3
    )
    torch.testing.assert_close(answer(name, again.eval()), answer(name, model), rtol=1e-10, atol=1e-12)
    for pool, one in factors(again).items():
        for i in range(one.layers):
            torch.testing.assert_close(one.update(i), out[pool].update(i), rtol=1e-10, atol=1e-12)


def _pattern(module: str) -> str:
    """The name of a module with `*` for the number of its layer."""
    return ".".join("*" if part.isdecimal() and i in _layer_positions(module) else part
                    for i, part in enumerate(module.split(".")))  # fmt: skip


def _layer_positions(module: str) -> list[int]:
    parts = module.split(".")
    return [i for i in range(1, len(parts)) if parts[i - 1] in ("layers", "layer", "h", "block")][:1]


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_two_adapters_and_their_weighted_sum(name: str, tmp_path: Path) -> None:
    model = adapted(name, 4, 1, torch.float64)
    model.add_adapter("other", RasaConfig(r=3, k=3, target_modules=TINY[name].targets[:1], seed=5))
    perturbed(model, "other", 7)
    one = answer(name, model)
    model.base_model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "sum")
    assert torch.equal(answer(name, model), one)
    model.set_adapter("sum")
    expected = tiny(name, torch.float64)
    with torch.no_grad():
        for weight, adapter in ((0.5, "default"), (-2.0, "other")):
            for pool in model.base_model.pools(adapter):
                for module in pool.modules:
                    update = model.base_model.layer(module).get_delta_weight(adapter)
                    expected.get_submodule(module).weight += weight * update
    torch.testing.assert_close(answer(name, model), answer(name, expected), rtol=1e-10, atol=1e-12)
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(tiny(name, torch.float64), str(tmp_path / "sum"))
    assert torch.equal(answer(name, again), answer(name, model))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("family", ["deepseek-v3", "llama4"])
def test_the_lora_of_a_shared_expert_beside_fused_ones_is_loaded_by_peft(family: str, tmp_path: Path) -> None:
    """PEFT takes `gate_proj` and the like for projections of fused experts, also where they are modules."""
    torch.manual_seed(0)
    base = FAMILIES[family]()
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    targets = r".*\.(shared_experts?\.(gate|up|down)_proj|self_attn\.o_proj)"
    model = perturbed(get_peft_model(base, RasaConfig(r=2, k=1, target_modules=targets, seed=0)))
    save_as_lora(tmp_path, model)
    plain = FAMILIES[family]()
    plain.load_state_dict(weights)
    loaded = PeftModel.from_pretrained(plain, tmp_path).merge_and_unload().state_dict()
    merged = model.merge_and_unload().state_dict()
    changed = {name for name, tensor in merged.items() if not torch.equal(tensor, weights[name])}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in changed} == {
        "gate_proj", "up_proj", "down_proj", "o_proj",
    }  # fmt: skip
    assert all(torch.allclose(loaded[name], tensor, atol=1e-6) for name, tensor in merged.items())
