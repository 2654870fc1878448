"""Folders of LoRA adapters beside PEFT itself, adapters over tasks, and what a bad folder is told."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import rasa_theory as rt
from rasa_theory.commands import reconstruct
from rasa_theory.problem import Factored
from rasa_theory.sources import open_source
from tests.helpers.problems import noise

ROOT = "base_model.model."


def write(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """A folder as PEFT writes it."""
    folder.mkdir(exist_ok=True)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    save_file({key: x.clone() for key, x in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def pairs(names: list[str], b: int = 6, a: int = 5, r: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Factors of modules, in float64."""
    tensors = {}
    for i, name in enumerate(names):
        tensors[f"{ROOT}{name}.lora_A.weight"] = torch.as_tensor(noise(1, r, a, seed + i)[0])
        tensors[f"{ROOT}{name}.lora_B.weight"] = torch.as_tensor(noise(1, b, r, seed + i + 100)[0])
    return tensors


def product(tensors: dict[str, Tensor], name: str) -> Tensor:
    return tensors[f"{ROOT}{name}.lora_B.weight"] @ tensors[f"{ROOT}{name}.lora_A.weight"]


LAYERS = [f"layers.{i}.q" for i in range(3)]


# ---- beside PEFT


@pytest.fixture(scope="module")
def model() -> Any:
    """The configuration of a Llama of two layers."""
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=20,
    )  # fmt: skip


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_are_those_of_peft(tmp_path: Path, model: Any, rslora: bool, dtype: torch.dtype) -> None:
    peft = pytest.importorskip("peft", minversion="0.15")  # before, one key decided about both patterns
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "k_proj", "down_proj", "up_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 3, "down_proj": 5, r"model\.layers\.[01]\.mlp\.down_proj": 1},
        alpha_pattern={"k_proj": 10, r".*\.0\.mlp\.(up|down)_proj": 7},
        use_rslora=rslora,
    )
    wrapped = peft.get_peft_model(LlamaForCausalLM(model), config).to(dtype)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    wrapped.save_pretrained(tmp_path)
    catalogue = open_source(str(tmp_path))
    assert catalogue.left_out == []
    kinds = ("mlp.down_proj", "mlp.up_proj", "self_attn.k_proj", "self_attn.q_proj")
    assert sorted(s.name for s in catalogue.stacks) == [f"model.layers.*.{kind}.weight" for kind in kinds]
    modules = dict(wrapped.base_model.model.named_modules())
    for source in catalogue.stacks:
        stack = source.load(None, None)
        assert isinstance(stack.entries.storage, Factored)
        assert (stack.dtype, stack.shape) == (torch.float32, source.shape)
        for i in range(2):
            layer = modules[source.name.removesuffix(".weight").replace("*", str(i))].float()
            torch.testing.assert_close(stack.values[i], layer.get_delta_weight("default"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [2, 2, 2]),
        ({"use_rslora": True}, [4 / math.sqrt(2)] * 3),
        ({"lora_alpha": 1, "alpha_pattern": {"layers.1.q": 3, "q": 5}}, [2.5, 1.5, 2.5]),
        ({"alpha_pattern": {"q": 5, "layers.1.q": 3}}, [2.5, 2.5, 2.5]),  # the first that matches
        ({"alpha_pattern": {"ayers.1.q": 5, "layers.1": 7, "1.q": 3}}, [2, 1.5, 2]),  # whole components, to the end
        ({"r": 9, "rank_pattern": {r"layers\.[0-2]\.q": 2}, "alpha_pattern": None}, [2, 2, 2]),
    ],
)
def test_scalings(tmp_path: Path, settings: dict[str, Any], expected: list[float]) -> None:
    tensors = pairs(LAYERS)
    (stack,), left_out = rt.load(str(write(tmp_path / "a", tensors, **settings)))
    assert (stack.name, stack.dtype, left_out) == ("layers.*.q.weight", torch.float64, [])
    for i, name in enumerate(LAYERS):
        torch.testing.assert_close(stack.values[i], expected[i] * product(tensors, name), rtol=1e-14, atol=1e-14)


def test_layers_of_unequal_rank_are_one_stack_and_of_unequal_shape_two(tmp_path: Path) -> None:
    tensors = pairs(LAYERS[:2]) | pairs(["layers.2.q"], r=1) | pairs(["layers.3.q", "layers.4.q"], b=7)
    write(tmp_path / "a", tensors, rank_pattern={"layers.2.q": 1}, use_rslora=True)
    stacks, _ = rt.load(str(tmp_path / "a"))
    assert [s.name for s in stacks] == ["layers.*.q.weight[6x5]", "layers.*.q.weight[7x5]"]
    torch.testing.assert_close(stacks[0].values[2], 4 * product(tensors, "layers.2.q"))


# ---- what is left out


def test_what_cannot_be_taken_is_left_out_with_the_reason(tmp_path: Path) -> None:
    x = torch.ones(2, 3)
    beside = {
        f"{ROOT}embed.lora_embedding_A": (x, "belongs to LoRA of an embedding; merge it"),
        f"{ROOT}embed.token_adapter.trainable_tokens_delta": (x, "belongs to trained rows of an embedding; merge it"),
        f"{ROOT}layers.0.q.lora_B.bias": (x[0], "the update of a bias (lora_bias)"),
        f"{ROOT}lm_head.weight": (x, "a whole tensor beside the factors (modules_to_save, a bias or an embedding)"),
        f"{ROOT}layers.0.conv.lora_A.weight": (torch.ones(2, 3, 1, 1), "factors with 4 axes (of a convolution?)"),
        f"{ROOT}layers.0.conv.lora_B.weight": (torch.ones(4, 2, 1, 1), "factors with 4 axes (of a convolution?)"),
        f"{ROOT}layers.0.k.lora_A.weight": (x, "the factor A of a module without its factor B"),
        f"{ROOT}layers.0.v.lora_B.weight": (x.mT.contiguous(), "the factor B of a module without its factor A"),
        f"{ROOT}layers.0.d.lora_A.weight": (x, "DoRA, which also scales the columns"),
        f"{ROOT}layers.0.d.lora_B.weight": (x.mT.contiguous(), "DoRA, which also scales the columns"),
        f"{ROOT}layers.0.d.lora_magnitude_vector": (
            x[0],
            "belongs to DoRA, which also scales the columns of the sum; merge it",
        ),
        f"{ROOT}layers.0.i.lora_A.weight": (x.int(), "i32 cannot be computed with"),
        f"{ROOT}layers.0.i.lora_B.weight": (x.mT.contiguous(), "i32 cannot be computed with"),
        "layers.0.q.lora_A.weight": (x, "not called base_model.model.<module>.lora_A.weight"),
        f"{ROOT}layers.0.experts.base_layer.lora_A.weight": (torch.ones(8, 3), "factors of a parameter with several"),
        f"{ROOT}layers.0.experts.base_layer.lora_B.weight": (torch.ones(4, 8), "factors of a parameter with several"),
    }
    write(
        tmp_path / "a",
        pairs(LAYERS) | {key: tensor for key, (tensor, _) in beside.items()},
        target_parameters=["experts.up_proj"],
    )
    catalogue = open_source(str(tmp_path / "a"))
    assert [s.name for s in catalogue.stacks] == ["layers.*.q.weight"]
    reasons = dict(catalogue.left_out)
    assert reasons.keys() == beside.keys()
    assert all(reasons[key].startswith(reason) for key, (_, reason) in beside.items())


@pytest.mark.parametrize(
    ("module", "parameter"), [("experts", "up_proj"), ("experts", "weight"), ("attn.c_attn", "weight")]
)
def test_factors_of_several_matrices_are_never_taken_for_those_of_one(
    tmp_path: Path, module: str, parameter: str
) -> None:
    """Two experts of rank 2 have 4 rows of A, as many as a module of rank 4 has; a Conv1D lies the other way round."""
    own = {f"{module}.{parameter}": 4 if module == "attn.c_attn" else 2}
    tensors = pairs(LAYERS, r=4) | pairs([f"layers.{i}.{module}" for i in range(2)], r=4)
    write(tmp_path / "a", tensors, r=4, rank_pattern=own, target_parameters=list(own))
    catalogue = open_source(str(tmp_path / "a"))
    assert [s.name for s in catalogue.stacks] == ["layers.*.q.weight"]
    assert len(catalogue.left_out) == 4
    assert all(one.reason.startswith("factors of a parameter with several matrices") for one in catalogue.left_out)


@pytest.mark.parametrize("variant", [{"use_dora": True}, {"use_qalora": True}, {"kasa_config": {"beta": 1.0}}])
def test_variants_whose_update_is_no_product_are_refused(tmp_path: Path, variant: dict[str, Any]) -> None:
    write(tmp_path / "a", pairs(LAYERS), **variant)
    (name,) = variant
    with pytest.raises(rt.InputError, match=rf"adapter_config.json: {name} is .*: the update is not B A"):
        open_source(str(tmp_path / "a"))


# ---- Conv1D


GPT = [f"h.{i}.attn.c_attn" for i in range(2)]
HEADS = [f"heads.{i}.q" for i in range(2)]


@pytest.mark.parametrize(
    ("names", "flag", "transposed"),
    [
        (GPT, True, GPT),
        (GPT + HEADS, True, GPT),  # PEFT sets the flag to what the last module is that it wraps
        (HEADS, True, HEADS),
        (GPT + HEADS, False, []),
        (HEADS, None, []),
    ],
)
def test_the_flag_says_which_weights_lie_the_other_way_round(
    tmp_path: Path, names: list[str], flag: bool | None, transposed: list[str]
) -> None:
    tensors = pairs(names)
    folder = write(tmp_path / "a", tensors, fan_in_fan_out=flag)
    for source in open_source(str(folder)).stacks:
        modules = [key.removesuffix(".weight") for key in source.keys]
        assert source.transposed == (modules[0] in transposed)
        stack = source.load(None, None)
        assert isinstance(stack.entries.storage, Factored)
        assert stack.shape == source.shape == (6, 5)
        torch.testing.assert_close(stack.values, torch.stack([2 * product(tensors, name) for name in modules]))


def test_of_several_adapters_one_that_says_so_suffices(tmp_path: Path) -> None:
    tensors = pairs(GPT + HEADS)
    dirs = [str(write(tmp_path / str(flag), tensors, fan_in_fan_out=flag)) for flag in (False, True)]
    for order in (dirs, dirs[::-1]):
        stacks = open_source(adapters=order).stacks
        assert {s.name for s in stacks if s.transposed} == set(GPT)
        for source in stacks:
            torch.testing.assert_close(source.load(None, None).values[1], 2 * product(tensors, source.name))


# ---- over tasks


def test_adapters_are_stacked_over_tasks_in_the_order_given(tmp_path: Path) -> None:
    first, second = pairs(["q", "k", "v"]), pairs(["q", "o"], seed=7) | pairs(["v"], b=4)
    dirs = [str(write(tmp_path / "one", first)), str(write(tmp_path / "two", second, lora_alpha=2))]
    for order in (dirs, dirs[::-1]):
        catalogue = open_source(adapters=order)
        (source,) = catalogue.stacks
        assert (source.name, source.layers, source.shape) == ("q", 2, (6, 5))
        expected = {dirs[0]: 2 * product(first, "q"), dirs[1]: product(second, "q")}
        torch.testing.assert_close(source.load(None, None).values, torch.stack([expected[d] for d in order]))
        assert dict(catalogue.left_out) == {
            "k": f"in {dirs[0]} but not in {dirs[1]}",
            "o": f"in {dirs[1]} but not in {dirs[0]}",
            "v": f"shape {(6, 5) if order == dirs else (4, 5)} in {order[0]}, "
            f"{(4, 5) if order == dirs else (6, 5)} in {order[1]}",
        }


def test_the_file_of_the_factors_stands_for_its_folder(tmp_path: Path) -> None:
    """Its configuration lies beside it, and is read for one adapter as for several."""
    folders = [write(tmp_path / name, pairs(["q"], seed=seed)) for name, seed in (("one", 0), ("two", 7))]
    files = [str(folder / "adapter_model.safetensors") for folder in folders]
    (source,), (expected,) = (
        open_source(adapters=paths).stacks for paths in (files, [str(folder) for folder in folders])
    )
    assert torch.equal(source.load(None, None).values, expected.load(None, None).values)
    assert open_source(files[0], alone=True).files == open_source(str(folders[0]), alone=True).files


def test_a_value_that_is_not_finite_names_file_and_task(tmp_path: Path) -> None:
    bad = pairs(["q"])
    bad[f"{ROOT}q.lora_B.weight"][3, 0] = math.nan
    dirs = [str(write(tmp_path / "one", pairs(["q"]))), str(write(tmp_path / "two", bad))]
    with pytest.raises(
        rt.InputError, match=r"two/adapter_model.safetensors: stack 'q': layer 1, entry \(3, 0\) is nan"
    ):
        open_source(adapters=dirs).stacks[0].load(None, None)


# ---- memory and precision


def test_a_limit_on_memory_spills_the_svds_of_factors(tmp_path: Path) -> None:
    tensors = pairs([f"layers.{i}.q" for i in range(64)], 12, 10)
    write(tmp_path / "a", tensors)
    (spilled,), _ = rt.load(str(tmp_path / "a"), memory=128 * 12 * 10)
    (stack,), _ = rt.load(str(tmp_path / "a"))
    U, S, Vh = spilled.spectra.svd()
    torch.testing.assert_close(S, stack.spectra.svd().S)
    torch.testing.assert_close((U * S[:, None]) @ Vh, stack.values)


def test_half_precision_is_computed_in_single_and_float64_is_exact(tmp_path: Path) -> None:
    tensors = {key: tensor.bfloat16() for key, tensor in pairs(LAYERS).items()}
    write(tmp_path / "a", tensors, lora_alpha=1, r=2)
    (stack,), _ = rt.load(str(tmp_path / "a"))
    assert stack.dtype == torch.float32
    (exact,), _ = rt.load(str(tmp_path / "a"), dtype="float64")
    wide = {key: tensor.double() for key, tensor in tensors.items()}
    torch.testing.assert_close(exact.values, torch.stack([product(wide, n) / 2 for n in LAYERS]), rtol=1e-14, atol=0)


# ---- the command


@pytest.mark.slow
def test_the_command_on_one_adapter_and_on_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dirs = [str(write(tmp_path / name, pairs(LAYERS, 9, 8, seed=i))) for i, name in enumerate(("one", "two"))]
    few = ["--rank", "1", "--sweeps", "3", "--seeds", "0", "--quiet", "--json", "--weight", "layer"]
    for i, source in enumerate((["--source", dirs[0]], ["--adapters", *dirs])):
        out = tmp_path / f"out{i}"
        assert reconstruct.main([*source, *few, "--out", str(out)]) == 0
        results = json.loads(capsys.readouterr().out)
        assert results["source"] == ", ".join(dirs[: i + 1])
        assert results["theorem_3_1"] == "holds"
        assert [row["name"] for row in results["stacks"]] == (LAYERS if i else ["layers.*.q.weight"])
        for row in results["stacks"]:
            assert row["layers"] == (2 if i else 3)
            assert 0 < row["runs"][0]["e_rasa"] <= row["e_lora"]
        assert load_file(out / "factors.safetensors")[f"{results['stacks'][0]['name']}/1/shared_A"].shape[1] == 8


def remove(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def config(text: str) -> Any:
    return lambda folder: (folder / "adapter_config.json").write_text(text, encoding="utf-8")


def settings(**changed: Any) -> Any:
    return lambda folder: write(folder, pairs(LAYERS), **changed)


NO_OBJECT = "adapter_config.json: not a sound file with one JSON object ("
BAD = {
    "no weights": (remove("adapter_model.safetensors"), "a: the folder has adapter_config.json but no adapter_model."),
    "empty": (config(""), NO_OBJECT),
    "cut": (config('{"peft_type": "LO'), NO_OBJECT),
    "deep": (config("[" * 100000), f"{NO_OBJECT}it is nested too deep)"),
    "a list": (config("[1]"), f"{NO_OBJECT}it holds a list); download or write it again"),
    "twice": (config('{"peft_type": "LORA", "r": 2, "r": 4}'), f"{NO_OBJECT}'r' is there twice)"),
    "no type": (config("{}"), "adapter_config.json: peft_type is None, but only LORA"),
    "another type": (settings(peft_type="LOHA"), "adapter_config.json: peft_type is 'LOHA', but only LORA"),
    "r": (settings(r=0), "adapter_config.json: r must be a whole number above 0, found '0'"),
    "r true": (settings(r=True), "r must be a whole number above 0, found 'True'"),
    "alpha": (settings(lora_alpha="4"), "lora_alpha must be a finite number, found '4'"),
    "alpha NaN": (settings(lora_alpha=math.nan), "lora_alpha must be a finite number, found 'nan'"),
    "orientation": (settings(fan_in_fan_out="no"), "fan_in_fan_out must be true or false, found 'no'"),
    "rslora": (settings(use_rslora=1), "use_rslora must be true or false, found '1'"),
    "pattern": (settings(rank_pattern={"(": 2}), "rank_pattern must be regular expressions, each with a whole number"),
    "alphas": (settings(alpha_pattern=[3]), "alpha_pattern must be regular expressions, each with a number"),
    "parameters": (settings(target_parameters="x"), "target_parameters must be a list of names, found 'x'"),
    "another rank": (settings(r=3), "module 'layers.0.q' has rank 3 there, but 'base_model.model.layers.0.q.lora_A."),
    "A and B": (
        lambda folder: write(folder, pairs(LAYERS) | {f"{ROOT}layers.1.q.lora_B.weight": torch.ones(6, 3)}),
        "lora_B.weight' (6, 3), which do not multiply as B A; save the adapter again",
    ),
    "weights": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\x10"),
        "adapter_model.safetensors: not a sound safetensors file",
    ),
    "one layer": (lambda folder: write(folder, pairs(LAYERS[:1])), "no stack remains ('layers.0.q.weight': the only"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_folders_are_one_sentence_and_exit_status_2(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, (spoil, sentence) = write(tmp_path / "a", pairs(LAYERS)), BAD[case]
    spoil(folder)
    assert reconstruct.main(["--source", str(folder), "--rank", "1", "--out", "none"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert str(folder) in err
    assert sentence in err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--adapters", "{a}"], "--adapters needs two folders or more, found 1; one adapter alone is a --source"),
        (["--adapters"], "argument --adapters: expected at least one argument"),
        (["--adapters", "{a}", "{a}", "--source", "{a}"], "--adapters and --source exclude each other"),
        (
            ["--adapters", "{a}", "{a}", "--base", "x", "--tuned", "y"],
            "--adapters and --base with --tuned exclude each",
        ),
        (["--adapters", "{a}", "{a}/nowhere"], "nowhere' does not exist"),
        (["--adapters", "{a}", "{a}/.."], "..: not a folder with adapter_config.json; give the folder of a PEFT LoRA"),
        (["--adapters", "{a}", "{b}"], "no stack remains ('layers.0.q': in {a} but not in {b}; "),
        (["--adapters", "{a}", "{a}", "--rank", "6"], "rank 6 exceeds min(b, a) = 5 of stack 'layers.0.q'"),
    ],
)
def test_bad_usage_is_one_sentence_and_exit_status_2(
    arguments: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"a": write(tmp_path / "a", pairs(LAYERS)), "b": write(tmp_path / "b", pairs(["k"]))}
    given = [argument.format(**names) for argument in arguments]
    assert reconstruct.main(["--rank", "1", "--out", "none", *given]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert sentence.format(**names) in err


def test_the_library_refuses_two_kinds_of_source(tmp_path: Path) -> None:
    folder = str(write(tmp_path / "a", pairs(LAYERS)))
    with pytest.raises(rt.InputError, match="--adapters and --base with --tuned exclude each other"):
        open_source(adapters=[folder, folder], base=folder, tuned=folder)
    (stack,) = [s for s in open_source(adapters=[folder, folder]).stacks if s.name == LAYERS[0]]
    values = stack.load(torch.float32, None).values
    assert torch.equal(values[0], values[1])
    assert bool(torch.isfinite(values).all())
