"""Files of adapters: both layouts of the authors, what is refused, reconstructions, and an older peft."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import (
    AutoPeftModel,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
)
from peft.tuners.lora.conversion import convert_to_lora as peft_convert_to_lora
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from transformers import AutoModelForCausalLM

import rasa_theory as rt
import rasa_theory.peft
from rasa_theory.peft import RasaConfig, convert_to_lora, factors, from_factors, library, save_as_lora
from rasa_theory.sources import load as load_stacks
from tests.helpers.tiny_models import TINY, tiny
from tests.peft.toy import (
    KINDS,
    Toy,
    adapted,
    config,
    data,
    layers,
    literal_update,
    parameters,
    perturbed,
    shaped,
    toy,
    trained,
    tuner,
)

QUICK = rt.SolverOptions(start="allocation", max_sweeps=3)
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def saved(folder: Path, **settings: object) -> PeftModel:
    model = perturbed(adapted(**settings))
    model.save_pretrained(str(folder))
    return model


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def reconfigured(folder: Path, **changed: object) -> None:
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


def reloaded(folder: Path, model: nn.Module | None = None, **more: object) -> PeftModel:
    return PeftModel.from_pretrained(model or toy(), str(folder), **more)


# ---- the layouts


def test_the_file_is_in_the_authors_first_layout(tmp_path: Path) -> None:
    model = saved(tmp_path, alpha=5.0, dropout=0.25, targets=["up"])
    stored = load_file(tmp_path / WEIGHTS)
    shapes = {"base_model.rasa_shared_A.up.weight": (6, 6), "base_model.rasa_shared_B.up.weight": (9, 6)}
    for i in range(3):
        shapes |= {f"base_model.model.layers.{i}.up.rasa_{part}.weight": shape
                   for part, shape in (("A", (2, 6)), ("B", (9, 2)), ("mixing", (8,)))}  # fmt: skip
    assert {key: tuple(t.shape) for key, t in stored.items()} == shapes
    for i, layer in enumerate(layers(model).values()):  # their forward, from the written tensors alone
        A, B, d = (stored[f"base_model.model.layers.{i}.up.rasa_{part}.weight"] for part in ("A", "B", "mixing"))
        A_S, B_S = (stored[f"base_model.rasa_shared_{side}.up.weight"] for side in "AB")
        theirs = torch.cat([B, B_S], 1) @ torch.diag(d) @ torch.cat([A, A_S])
        torch.testing.assert_close(theirs, literal_update(layer).detach(), rtol=1e-12, atol=1e-12)
    written = json.loads((tmp_path / CONFIG).read_text())
    expected = {"peft_type": "RASA", "r": 4, "rasa_k": 2, "rasa_alpha": 5.0, "rasa_dropout": 0.25, "bias": "none"}
    assert expected.items() <= written.items()
    known = {"auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "modules_to_save",
             "peft_type", "r", "rasa_alpha", "rasa_dropout", "rasa_k", "target_modules", "task_type"}  # fmt: skip
    assert set(written) <= known | {"seed"}  # the authors' fork of PEFT 0.13 refuses others


@pytest.mark.parametrize("k", [0, 1, 4])
def test_the_second_layout_is_read_too(k: int, tmp_path: Path) -> None:
    model = saved(tmp_path, k=k)
    names = {".rasa_A.": ".rasa_private_A.", ".rasa_B.": ".rasa_private_B.", ".rasa_mixing.": ".rasa_private_D."}

    def second(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            for first, other in names.items():
                if first in key:
                    tensors[key.replace(first, other)] = tensors.pop(key)

    rewritten(tmp_path, second)
    reconfigured(tmp_path, rasa_d_init="default")
    assert torch.equal(reloaded(tmp_path)(data()), model(data()))


def test_the_updates_are_a_source_of_stacks(tmp_path: Path) -> None:
    model = tiny("t5")
    peft = get_peft_model(model, RasaConfig(r=2, k=1, target_modules=TINY["t5"].targets))
    perturbed(peft).save_pretrained(str(tmp_path))
    stacks, _ = load_stacks(tmp_path)
    exact = {name: tuner(peft).layer(name).update("default") for pool in tuner(peft).pools("default")
             for name in pool.modules}  # fmt: skip
    assert sum(stack.layers for stack in stacks) == len(exact)
    total = sum(stack.norm_squared for stack in stacks)
    assert total == pytest.approx(sum(float(u.double().square().sum()) for u in exact.values()), rel=1e-5)


def test_every_setting_comes_back(tmp_path: Path) -> None:
    saved(tmp_path, alpha=7.0, d_init="keep_scale", dropout=0.1, rank_pattern={"down": 3}, seed=4,
          exclude_modules=["layers.1.up"])  # fmt: skip
    read = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(read, RasaConfig)
    assert (read.r, read.k, read.alpha, read.d_init, read.dropout) == (4, 2, 7.0, "keep_scale", 0.1)
    assert (read.rank_pattern, read.exclude_modules, read.inference_mode) == ({"down": 3}, {"layers.1.up"}, True)
    assert reloaded(tmp_path).peft_config["default"].rank_pattern == {"down": 3}


def test_heads_and_auto_classes(tmp_path: Path) -> None:
    base = tiny("bert")
    base.save_pretrained(str(tmp_path / "base"))
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "base"))
    model = get_peft_model(base, RasaConfig(target_modules=["query"], r=2, k=1, task_type="SEQ_CLS"))
    perturbed(model)
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight += 1
    model.save_pretrained(str(tmp_path / "adapter"))
    again = AutoPeftModelForSequenceClassification.from_pretrained(str(tmp_path / "adapter"))
    answer = TINY["bert"].answer
    assert torch.equal(answer(again), answer(model.eval()))
    lora, tensors = convert_to_lora(model)
    assert lora.modules_to_save == model.peft_config["default"].modules_to_save
    assert any("classifier" in key for key in tensors)


def test_a_trainable_adapter_trains_on(tmp_path: Path) -> None:
    model = saved(tmp_path)
    again = reloaded(tmp_path, is_trainable=True)
    assert all(p.requires_grad for p in parameters(again).values())
    assert not any(p.requires_grad for p in parameters(reloaded(tmp_path)).values())
    assert trained(again, 5) == trained(model, 5)


@pytest.mark.parametrize("low", [False, True])
def test_loading_keeps_float32_beside_half_precision(low: bool, tmp_path: Path) -> None:
    model = saved(tmp_path, dtype=torch.bfloat16)
    again = reloaded(tmp_path, toy(torch.bfloat16), low_cpu_mem_usage=low)
    for key, parameter in parameters(again).items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, parameters(model)[key])
    again.load_adapter(str(tmp_path), "second", low_cpu_mem_usage=low)
    assert all(torch.equal(p, parameters(model)[key.replace("second", "default")])
               for key, p in parameters(again, "second").items())  # fmt: skip


def test_a_copy_of_training_in_half_precision_is_loaded_in_float32(tmp_path: Path) -> None:
    model = perturbed(get_peft_model(toy(torch.bfloat16), config(), autocast_adapter_dtype=False))
    model.save_pretrained(str(tmp_path))
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS).values()} == {torch.bfloat16}
    for low in (False, True):
        again = reloaded(tmp_path, toy(torch.bfloat16), low_cpu_mem_usage=low, is_trainable=True)
        assert {p.dtype for p in parameters(again).values()} == {torch.float32}


def test_an_adapter_without_a_task_is_loaded_by_auto_classes(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(str(tmp_path / "base"))
    base = AutoModelForCausalLM.from_pretrained(str(tmp_path / "base"))
    model = perturbed(get_peft_model(base, RasaConfig(r=4, k=1, target_modules=TINY["llama"].targets)).eval())
    model.save_pretrained(str(tmp_path / "adapter"))
    save_as_lora(tmp_path / "lora", model)
    expected = TINY["llama"].answer(model)
    assert torch.equal(TINY["llama"].answer(AutoPeftModel.from_pretrained(str(tmp_path / "adapter"))), expected)
    as_lora = AutoPeftModel.from_pretrained(str(tmp_path / "lora"))
    torch.testing.assert_close(TINY["llama"].answer(as_lora), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="shared state"):  # and never a model whose adapted layers are random
        AutoModelForCausalLM.from_pretrained(str(tmp_path / "adapter"))


def test_an_output_layer_is_a_pool_of_its_own(tmp_path: Path) -> None:
    model = get_peft_model(tiny("llama"), RasaConfig(r=4, k=1, target_modules=["q_proj", "lm_head"], seed=0)).eval()
    perturbed(model)
    layers_of = {pool.name: len(pool.modules) for pool in tuner(model).pools("default")}
    assert layers_of["lm_head"] == 1 < layers_of["self_attn.q_proj"]
    model.save_pretrained(str(tmp_path))
    again = reloaded(tmp_path, tiny("llama"))
    assert torch.equal(TINY["llama"].answer(again), TINY["llama"].answer(model))


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["model", "blocks"])
def test_files_of_a_compiled_model_have_the_names_of_the_plain_one(compiled: str, tmp_path: Path) -> None:
    base = toy()
    if compiled == "model":
        base = torch.compile(base, backend="eager")
    else:
        for i, block in enumerate(base.layers):
            base.layers[i] = torch.compile(block, backend="eager")
    model = perturbed(adapted(targets="all-linear", model=base, rank_pattern={r".*\.down": 3}))
    expected = model(data())
    model.save_pretrained(str(tmp_path / "adapter"))
    save_as_lora(tmp_path / "lora", model)
    torch.testing.assert_close(reloaded(tmp_path / "adapter")(data()), expected)
    torch.testing.assert_close(reloaded(tmp_path / "lora")(data()), expected)
    tuner(model).add_weighted_adapter(["default"], [2.0], "sum")
    assert [(pool.name, pool.budget.rank) for pool in tuner(model).pools("sum")] == [("up", 4), ("down", 3)]
    model.set_adapter("sum")
    model.save_pretrained(str(tmp_path), selected_adapters=["sum"])
    torch.testing.assert_close(reloaded(tmp_path / "sum")(data()), model(data()))


def test_as_a_lora_all_modules_have_one_rank_and_one_scale(tmp_path: Path) -> None:
    """vLLM and llama.cpp know one alpha and one rank, whatever a pattern says."""
    model = perturbed(adapted(4, 1, rank_pattern={"down": 3}, k_pattern={"down": 2}))
    save_as_lora(tmp_path, model)
    written, tensors = json.loads((tmp_path / CONFIG).read_text()), load_file(tmp_path / WEIGHTS)
    assert not written["rank_pattern"]
    assert not written["alpha_pattern"]
    assert written["r"] == written["lora_alpha"] == 1 + 3 * 2
    for name, layer in layers(model).items():
        A, B = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        assert A.shape[0] == B.shape[1] == written["r"]
        scale = written["lora_alpha"] / A.shape[0]
        torch.testing.assert_close(scale * B @ A, literal_update(layer).detach(), rtol=1e-10, atol=1e-12)


def test_k_0_goes_to_lora_and_rasa_of_peft_alike(tmp_path: Path) -> None:
    model = saved(tmp_path, k=0)
    theirs, tensors = peft_convert_to_lora(model, rank=4)
    assert isinstance(theirs, LoraConfig)
    exact = convert_to_lora(model)[1]
    for name, layer in layers(model).items():
        A, B = (exact[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        torch.testing.assert_close(B @ A, layer.update("default"), rtol=1e-10, atol=1e-12)
        A, B = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        torch.testing.assert_close((B @ A).double(), layer.update("default"), rtol=1e-4, atol=1e-5)


# ---- what is refused


A0, NAN = "base_model.model.layers.0.up.rasa_A.weight", torch.full((2, 6), torch.nan, dtype=torch.float64)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.update({A0: NAN}), "layers.0.up.rasa_A.weight' has values that are not finite"),
        (lambda t: t.pop(A0.replace("rasa_A", "rasa_B")), "no tensor 'base_model.model.layers.0.up.rasa_B.weight'"),
        (lambda t: t.pop("base_model.rasa_shared_A.up.weight"), "no tensor 'base_model.rasa_shared_A.up.weight'"),
        (lambda t: t.update({A0: t[A0][:1]}), r"has shape \(1, 6\), the model and the configuration need \(2, 6\)"),
        (
            lambda t: t.update({A0.replace("up", "nowhere"): t[A0].clone()}),
            "'base_model.model.layers.0.nowhere.rasa_A.weight'",
        ),
        (lambda t: t.clear(), "the adapter has no tensor"),
    ],
)
def test_tensors_that_are_not_sound(change: Callable[[dict[str, Tensor]], object], sentence: str,
                                    tmp_path: Path) -> None:  # fmt: skip
    saved(tmp_path)
    rewritten(tmp_path, change)
    with pytest.raises(rt.InputError, match=sentence):
        reloaded(tmp_path)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"r": 4.0}, r"rank must be a whole number, got 4\.0"),
        ({"r": -1}, "rank must be at least 1, got -1"),
        ({"rasa_k": 5}, "shared_rank 5 exceeds rank 4"),
        ({"rasa_k": 1}, r"has shape"),
        ({"rasa_alpha": -3.0}, "alpha must be finite and above 0"),
        ({"rasa_alpha": 10**400}, "alpha must be finite and above 0"),
        ({"rasa_alpha": "4"}, "alpha must be a number, got '4'"),
        ({"rasa_dropout": 1.5}, "dropout must be at least 0 and below 1"),
        ({"rasa_d_init": "other"}, "unknown d_init 'other'; known: half, keep_scale"),
        ({"seed": 1.5}, r"seed must be a whole number, got 1\.5"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"seed": 2**63}, r"seed must be below 2\^63"),
        ({"bias": "lora_only"}, "unknown bias 'lora_only'"),
        ({"layers_pattern": "layers"}, "layers_pattern needs layers_to_transform"),
    ],
)
def test_a_configuration_that_is_not_sound(changed: dict[str, object], sentence: str, tmp_path: Path) -> None:
    saved(tmp_path)
    reconfigured(tmp_path, **changed)
    with pytest.raises(rt.InputError, match=sentence):
        reloaded(tmp_path)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(6, 5), nn.Linear(5, 6, bias=False)
        self.head.weight = self.embedding.weight
        self.first = self.second = nn.Linear(5, 5)
        self.attention = nn.MultiheadAttention(5, 1)


def flat() -> nn.Linear:
    layer = nn.Linear(6, 9)
    layer.weight = nn.Parameter(layer.weight.detach().flatten())
    return layer


def with_lora() -> nn.Module:
    return get_peft_model(toy(), LoraConfig(r=2, target_modules=["up"])).base_model.model


@pytest.mark.parametrize(
    ("make", "targets", "sentence"),
    [
        (toy, ["norm"], "module 'norm' cannot be adapted: it is a LayerNorm, neither Linear nor Conv1D"),
        (Tied, ["head"], "'head' and 'embedding' share one weight"),
        (Tied, ["first"], "'first' and 'second' share one weight"),
        (Tied, ["attention.out_proj"], "out_proj of a torch MultiheadAttention"),
        (lambda: shaped(up=weight_norm(nn.Linear(6, 9))), ["up"], "'layers.1.up' .* its weight is no parameter of its"),
        (lambda: shaped(up=flat()), ["up"], "its weight is no matrix of floating-point numbers"),
        (with_lora, ["up"], "'layers.0.up' cannot be adapted: it holds an adapter of another method"),
        (lambda: shaped(up=nn.Embedding(6, 9)), ["up"], "'layers.1.up' .* it is a Embedding, neither Linear nor"),
        (lambda: shaped(up=nn.Conv2d(6, 9, 1)), ["up"], "'layers.1.up' .* it is a Conv2d, neither Linear nor"),
        (lambda: tiny("qwen2"), ["lm_head"], "'lm_head' and 'model.embed_tokens' share one weight"),
        (
            lambda: shaped(a=nn.ModuleDict({"b": nn.Linear(4, 4)}), a__b=nn.Linear(4, 4)), ["b", "a__b"],
            "would both be called 'a__b'",
        ),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_modules_that_are_refused_leave_the_model_as_it_was(make: Callable[[], nn.Module], targets: list[str],
                                                            sentence: str) -> None:  # fmt: skip
    model = make()
    keys = list(model.state_dict())
    with pytest.raises(rt.InputError, match=sentence):
        adapted(1, 1, targets, model=model)
    assert list(model.state_dict()) == keys


def test_a_refused_second_adapter_leaves_the_first() -> None:
    model = perturbed(adapted())
    before, keys = model(data()), list(model.state_dict())
    for name, targets in (("other", ["norm"]), ("keys", ["up"]), ("", ["up"])):
        with pytest.raises(rt.InputError):
            model.add_adapter(name, config(2, 1, targets))
    with pytest.raises(ValueError, match="not found in the base model"):
        model.add_adapter("other", config(2, 1, ["nothing"]))
    assert list(model.state_dict()) == keys
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(data()), before)
    model.add_adapter("other", config(2, 1))


def test_kinds_with_names_of_torchs_own_and_of_other_letters(tmp_path: Path) -> None:
    def model() -> Toy:
        torch.manual_seed(1)
        made = toy()
        for block in made.layers:
            block.keys, block._modules["w[1]?"] = nn.Linear(6, 6).double(), nn.Linear(6, 6).double()
        return made

    peft = perturbed(adapted(2, 1, ["keys", "w[1]?"], model=model()))
    assert {pool.name: len(pool.modules) for pool in tuner(peft).pools("default")} == {"keys": 3, "w[1]?": 3}
    peft.save_pretrained(str(tmp_path))
    assert "base_model.rasa_shared_A.keys.weight" in load_file(tmp_path / WEIGHTS)
    again = reloaded(tmp_path, model())
    assert all(torch.equal(p, parameters(again)[key]) for key, p in parameters(peft).items())


def test_what_peft_has_for_other_methods_only_is_refused_in_a_sentence(tmp_path: Path) -> None:
    from peft import inject_adapter_in_model
    from peft.utils.hotswap import hotswap_adapter

    with pytest.raises(rt.InputError, match="adapter_names: RaSA has no batches of mixed adapters"):
        adapted()(data(), adapter_names=["default"] * 5)
    with pytest.raises(ValueError, match="uses shared state"):
        inject_adapter_in_model(config(), toy())
    with pytest.raises(ValueError, match="'RASA' is not compatible with the `PeftMixedModel`"):
        get_peft_model(toy(), config(), mixed=True)
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but RASA was passed"):
        hotswap_adapter(saved(tmp_path), str(tmp_path), "default")
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        adapted().add_adapter("other", LoraConfig(target_modules=["up"]))
    with pytest.raises(TypeError, match="target_parameters"):
        RasaConfig(target_parameters=["up.weight"])


def test_a_layer_of_another_tuner_is_refused() -> None:
    """Its layers would go on to use the pools of the first, which the second neither trains nor saves."""
    model = perturbed(adapted())
    expected = model(data())
    for inner in (tuner(model).model, model):
        with pytest.raises(rt.InputError, match="has RaSA adapters of another PeftModel"):
            get_peft_model(inner, config())
    assert torch.equal(model(data()), expected)
    assert get_peft_model(model.unload(), config())(data()).shape == expected.shape


@pytest.mark.parametrize("name", ["up", "0", "layers", "model", "rasa_pool_A", "rasa_mixing", "weight", "a.b"])
def test_names_of_adapters_for_which_peft_would_lose_parameters_of_others(name: str) -> None:
    model = adapted()
    with pytest.raises(rt.InputError, match=f"an adapter cannot be called '{name}'"):
        model.add_adapter(name, config())
    assert list(model.peft_config) == ["default"]


def test_a_merged_adapter_is_not_loaded_over(tmp_path: Path) -> None:
    """Unmerging would subtract the new updates from weights that hold the old ones."""
    perturbed(adapted(), seed=8).save_pretrained(str(tmp_path))
    model = perturbed(adapted())
    model.merge_adapter()
    with pytest.raises(rt.InputError, match="'default' is merged; call unmerge_adapter before"):
        model.load_adapter(str(tmp_path), "default")
    model.unmerge_adapter()
    model.load_adapter(str(tmp_path), "default")
    torch.testing.assert_close(model(data()), reloaded(tmp_path)(data()))


def test_an_older_peft_and_one_with_rasa_of_its_own_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library.metadata, "version", lambda _: "0.20.1")
    with pytest.raises(ImportError, match=r"needs peft >= 0\.21, found 0\.20\.1: only since then"):
        library.checked_version()
    monkeypatch.setitem(library.PEFT_TYPE_TO_CONFIG_MAPPING, library.RASA, LoraConfig)
    with pytest.raises(ImportError, match=rf"peft {library.VERSION} has RaSA itself: use peft\.RasaConfig"):
        importlib.reload(rasa_theory.peft)


# ---- from a reconstruction


def reconstruction(kind: str, r: int, k: int) -> tuple[Tensor, rt.RasaFactors]:
    shape = {"up": (3, 9, 6), "down": (3, 6, 9)}[kind]
    updates = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    return updates, rt.solve_rasa(rt.LayerStack(updates), rt.RankBudget(r, k), QUICK).factors


@pytest.mark.parametrize("k", [1, 3])
def test_a_reconstruction_goes_into_a_model(k: int) -> None:
    updates, made = reconstruction("up", 3, k)
    tuned = toy()
    with torch.no_grad():
        for i in range(3):
            tuned.layers[i].up.weight += made.update(i)
    model = from_factors(toy(), {"up": made})
    torch.testing.assert_close(model(data()), tuned(data()), rtol=1e-10, atol=1e-12)
    back = factors(model)["up"]
    assert rt.reconstruction_error(rt.LayerStack(updates), back) == pytest.approx(
        rt.reconstruction_error(rt.LayerStack(updates), made)
    )
    for tensor in back.named().values():
        assert not tensor.requires_grad
        tensor.zero_()  # copies
    torch.testing.assert_close(model(data()), tuned(data()), rtol=1e-10, atol=1e-12)
    losses = trained(model, 5)
    assert losses[-1] < losses[0]


def test_kinds_of_unequal_ranks_and_a_second_adapter(tmp_path: Path) -> None:
    made = {"layers.*.up": reconstruction("up", 2, 1)[1], "down": reconstruction("down", 3, 2)[1]}
    model = from_factors(toy(), made, dropout=0.1)
    expected = model.eval()(data())
    model.save_pretrained(str(tmp_path))
    assert torch.equal(reloaded(tmp_path)(data()), expected)
    other = from_factors(perturbed(adapted()), made, adapter_name="other")
    assert isinstance(other, PeftModel)
    other.set_adapter("other")
    torch.testing.assert_close(other(data()), expected)


def test_factors_of_unequal_scale_are_evened() -> None:
    _, made = reconstruction("up", 3, 1)
    uneven = rt.RasaFactors(
        made.private_B * 1e9, made.private_A / 1e9, made.shared_B * 1e9, made.shared_A * 1e9, made.mixing / 1e18
    )
    model = from_factors(toy(torch.float16), {"up": uneven})
    for i, layer in enumerate(layers(model).values()):
        torch.testing.assert_close(layer.update("default").double(), made.update(i), rtol=0, atol=1e-5)
        B, A = layer.rasa_private_B["default"], layer.rasa_private_A["default"]
        torch.testing.assert_close(B.norm(dim=0), A.norm(dim=1), rtol=1e-4, atol=0)
        assert torch.equal(layer.rasa_mixing["default"][:2], torch.ones(2))
    largest = torch.stack([layer.rasa_mixing["default"][2:].abs() for layer in layers(model).values()]).amax(0)
    torch.testing.assert_close(largest, torch.ones_like(largest))


def _part(one: rt.RasaFactors, rows: list[int]) -> rt.RasaFactors:
    return rt.RasaFactors(one.private_B[rows], one.private_A[rows], one.shared_B, one.shared_A, one.mixing[rows])


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (dict, "there are no factors"),
        (lambda: {"nothing": reconstruction("up", 2, 1)[1]}, "target 'nothing' names no module"),
        (lambda: {"up": _part(reconstruction("up", 2, 1)[1], [0, 1])}, "of 2 layers and 3 pool terms, the model has 3"),
        (lambda: {"up": reconstruction("down", 2, 1)[1]}, r"of shape \(6, 9\), the layers of \(9, 6\)"),
        (lambda: {"layers.*": reconstruction("up", 2, 1)[1]}, "cannot be adapted: it is a Block"),
        (lambda: {"layers.*.*": reconstruction("up", 2, 1)[1]}, "names modules of 2 pools"),
        (
            lambda: {"layers.0.up": rt.RasaFactors.from_lora(
                rt.LoraFactors(torch.ones(1, 9, 1), torch.ones(1, 1, 6)), rt.RankBudget(1, 1)),
                "layers.1.up": rt.RasaFactors.from_lora(
                rt.LoraFactors(torch.ones(1, 9, 1), torch.ones(1, 1, 6)), rt.RankBudget(1, 1))},
            "share a pool, since they select modules of one kind, tower and shape",
        ),
        (lambda: {"up": reconstruction("up", 2, 1)[1], "s.*.up": reconstruction("up", 2, 1)[1]}, "names no module"),
        (lambda: {"up": reconstruction("up", 2, 1)[1], "*.up": reconstruction("up", 2, 1)[1]}, "some modules twice"),
        (lambda: {"up": reconstruction("up", 2, 1)[1].scaled(torch.inf)}, "has values that are not finite"),
    ],
)  # fmt: skip
def test_factors_that_do_not_fit(make: Callable[[], dict[str, rt.RasaFactors]], sentence: str) -> None:
    model = toy()
    with pytest.raises(rt.InputError, match=sentence):
        from_factors(model, make())
    assert list(model.state_dict()) == list(toy().state_dict())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((["default"], [1.0, 2.0], "sum"), "one weight for each adapter"),
        ((["default"], [1.0], "default"), "has an adapter 'default' already"),
        ((["default", "nobody"], [1.0, 1.0], "sum"), "no RaSA adapter 'nobody'"),
        ((["default"], [float("nan")], "sum"), "weights must be finite"),
        ((["default"], [1.0], "sum", "svd"), "combination_type must be 'cat'"),
    ],
)
def test_sums_that_are_refused(arguments: tuple[object, ...], sentence: str) -> None:
    model = adapted()
    with pytest.raises(rt.InputError, match=sentence):
        model.base_model.add_weighted_adapter(*arguments)
    assert list(model.peft_config) == ["default"]


def test_a_rank_below_that_of_the_updates_is_refused() -> None:
    with pytest.raises(rt.InputError, match=r"rank 7 is below q \+ R = 8"):
        convert_to_lora(adapted(), rank=7)
    with pytest.raises(rt.InputError, match="no RaSA adapter 'other'; it has 'default'"):
        factors(adapted(), "other")
    with pytest.raises(rt.InputError, match="a Toy has no RaSA adapters"):
        factors(toy())


def test_targets_are_lists_of_kinds() -> None:
    assert set(layers(adapted(targets=["layers.1.up"]))) == {"layers.1.up"}
    assert set(layers(adapted())) == {f"layers.{i}.{kind}" for i in range(3) for kind in KINDS}
