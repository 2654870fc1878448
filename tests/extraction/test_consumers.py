"""Files of an extraction in the programs that load them: PEFT, llama.cpp's formula, diffusers, the authors' forks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rasa_theory.commands.extract import main
from rasa_theory.extraction.consumers import consumer_notes
from tests.helpers.families import FAMILIES, changed_pair
from tests.helpers.models import base_model, logits, report_of, run

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def config_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "adapter_config.json").read_text())


def error(folder: Path, out: Path, tuned: Any) -> dict[str, float]:
    """What PEFT's merged weights miss, by parameter, in float64."""
    model = peft.PeftModel.from_pretrained(base_model(type(tuned), folder).double(), out)
    weights, after = model.merge_and_unload().state_dict(), tuned.state_dict()
    return {name: float(((weights[name] - after[name].double()) ** 2).sum()) for name in weights}


@pytest.mark.parametrize("more", [(), ("--ranks", "own")])
def test_ranks_that_differ_over_layers_are_right_in_peft(llamas: Any, tmp_path: Path, more: tuple[str, ...]) -> None:
    folder, tuned = llamas
    few = ("--modules", "*self_attn.v*", "--modules", "*mlp.down*", *more)
    assert run(folder, tmp_path, "--rank", "auto", "--energy", "0.6", *few) == 0
    report, config, missed = report_of(tmp_path), config_of(tmp_path), error(folder, tmp_path, tuned)
    ranks = {name: rank for row in report["stacks"] for name, rank in row["ranks"].items()}
    assert len(set(ranks.values())) > 1
    assert (config["rank_pattern"] == config["alpha_pattern"] == {}) == (not more)
    assert report["rank"] == (None if more else max(ranks.values()))
    for row in report["stacks"]:
        for module in row["modules"]:
            assert missed[f"{module['module']}.weight"] == pytest.approx(module["e_stored"], rel=1e-5)


def test_one_rank_is_right_in_llama_cpp(llamas: Any, tmp_path: Path) -> None:
    """It takes one alpha for all, and the rank of each tensor: scale = alpha / rank, as its converter has written."""
    gguf = pytest.importorskip("gguf")
    folder, tuned = llamas
    assert run(folder, tmp_path, "--rank", "auto", "--energy", "0.6", "--modules", "*self_attn.[vk]*") == 0
    config, tensors = config_of(tmp_path), load_file(tmp_path / "adapter_model.safetensors")
    writer = gguf.GGUFWriter(tmp_path / "adapter.gguf", "llama")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, config["lora_alpha"])
    for key, tensor in tensors.items():
        name = key.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight.lora_a")
        writer.add_tensor(name.replace(".lora_B.weight", ".weight.lora_b"), tensor.numpy())
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
    alpha = float(reader.get_field(gguf.Keys.Adapter.LORA_ALPHA).contents())
    stored = {t.name: np.array(t.data, dtype=np.float64).reshape(t.shape[::-1]) for t in reader.tensors}
    before, after = base_model(type(tuned), folder).state_dict(), tuned.state_dict()
    modules = [module for row in report_of(tmp_path)["stacks"] for module in row["modules"] if module["rank"] > 0]
    assert len({module["rank"] for module in modules}) > 1
    for module in modules:
        key = f"{module['module']}.weight"
        A, B = stored[f"{key}.lora_a"], stored[f"{key}.lora_b"]
        M = (after[key].double() - before[key].double()).numpy()
        missed = float(((M - alpha / B.shape[1] * B @ A) ** 2).sum())
        assert missed == pytest.approx(module["e_stored"], rel=1e-5)


def notes(rank: int | None, ranks: dict[str, int], **more: Any) -> str:
    settings = {"format": "lora", "k": 0, "rank": 8, "layout": "mixing", "base": {"architecture": None}}
    settings |= more.pop("settings", {})
    row = {"ranks": ranks, "kind": "q_proj", "shape": [9, 9], "parameter": None} | more.pop("row", {})
    report = {"plan": {"settings": settings}, "stacks": [row], "rank": rank, "saved_modules": []} | more
    return " ".join(consumer_notes(report))


def test_the_report_names_the_flag_of_vllm() -> None:
    for rank, flag in ((1, 1), (2, 8), (8, 8), (9, 16), (257, 320), (512, 512)):
        assert f"serves it with --max-lora-rank {flag}." in notes(rank, {"q": rank})
    assert "vLLM takes no rank above 512" in notes(513, {"q": 513})
    assert "1 of 2 modules have a lower rank and are padded with zeros" in notes(4, {"q": 4, "k": 2})
    assert "would scale updates wrongly" in notes(None, {"q": 4, "k": 2})
    head = notes(4, {"lm_head": 4}, row={"kind": "lm_head", "shape": [300_000, 9]})
    assert "a vocabulary of at most 258,048 entries, and this one has 300,000." in head
    whole = notes(4, {"q": 4}, saved_modules=["norm"])
    assert "vLLM, TGI and llama.cpp refuse such an adapter" in whole
    assert "serves it" not in whole
    assert "--k 0 writes the same file" in notes(4, {"q": 4}, settings={"k": 1})


def test_auto_classes_load_the_folder(llamas: Any, tmp_path: Path) -> None:
    folder, tuned = llamas
    assert run(folder, tmp_path, "--rank", "24") == 0
    assert config_of(tmp_path)["base_model_name_or_path"] == str(folder / "base")
    for auto in (peft.AutoPeftModel, peft.AutoPeftModelForCausalLM):
        model = auto.from_pretrained(tmp_path).eval()
        assert isinstance(model.get_base_model(), transformers.LlamaForCausalLM)
        assert torch.allclose(logits(model), logits(tuned), atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "task"),
    [
        ("BertForSequenceClassification", "SequenceClassification"),
        ("BertForTokenClassification", "TokenClassification"),
        ("LlamaForSequenceClassification", "SequenceClassification"),
        ("BertForQuestionAnswering", "QuestionAnswering"),
    ],
)
def test_the_auto_class_of_a_task_wants_the_head_whole(kind: str, task: str, tmp_path: Path, capsys: Any) -> None:
    """PEFT then looks for the head in the file. Without --save-modules it is not there, which is said."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        kind.partition("For")[0].lower(), vocab_size=50, hidden_size=24, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, num_labels=2, pad_token_id=0,
    )  # fmt: skip
    model = getattr(transformers, kind)(config)
    _, after = changed_pair(model, tmp_path)
    auto = getattr(peft, f"AutoPeftModelFor{task}")
    assert run(tmp_path, tmp_path / "adapted", "--rank", "24") == 0
    assert f"AutoPeftModelFor{task} cannot load it" in capsys.readouterr().out
    with pytest.raises((KeyError, TypeError)):
        auto.from_pretrained(tmp_path / "adapted")
    head = next(name for name in ("classifier", "score", "qa_outputs") if f"{name}.weight" in after)
    assert error(tmp_path, tmp_path / "adapted", model)[f"{head}.weight"] < 1e-10
    assert run(tmp_path, tmp_path / "whole", "--rank", "24", "--save-modules") == 0
    assert "cannot load it" not in capsys.readouterr().out
    weights = auto.from_pretrained(tmp_path / "whole").merge_and_unload().state_dict()
    for name in (name for name in after if name.startswith(head)):
        assert torch.allclose(weights[name].double(), after[name], rtol=0, atol=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "gemma3-text"])
def test_modules_saved_whole_make_the_tuned_model(family: str, tmp_path: Path) -> None:
    """Embeddings, also those that the output layer is tied to, the output layer and norms, beside LoRA of full rank."""
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    _, after = changed_pair(model, tmp_path)
    assert run(tmp_path, tmp_path / "out", "--rank", "64", "--save-modules") == 0
    report, config = report_of(tmp_path / "out"), config_of(tmp_path / "out")
    assert sorted(config["modules_to_save"]) == sorted(report["saved_modules"])
    base = type(model).from_pretrained(tmp_path / "base").double().eval()
    tuned = peft.PeftModel.from_pretrained(base, tmp_path / "out", autocast_adapter_dtype=False).merge_and_unload()
    weights = tuned.state_dict()
    biases = {one["name"] for one in report["left_out"] if one["name"].endswith(".bias")}
    wrong = [name for name in after if not torch.allclose(weights[name], after[name], rtol=0, atol=1e-6)]
    assert set(wrong) <= biases
    if not biases:
        ids = torch.arange(12)[None]
        more = {"decoder_input_ids": ids} if family == "t5" else {}
        with torch.no_grad():
            assert torch.allclose(tuned(ids, **more)[0], model.double()(ids, **more)[0], atol=1e-5)


def test_modules_are_saved_whole_from_a_pair_alone(llamas: Any, tmp_path: Path, capsys: Any) -> None:
    save_file({f"h.{i}.q.weight": torch.ones(4, 4) for i in range(2)}, tmp_path / "updates.safetensors")
    source = ["--source", str(tmp_path / "updates.safetensors"), "--rank", "2", "--out", str(tmp_path / "out")]
    assert main([*source, "--save-modules"]) == 2
    assert "--save-modules needs the weights after fine-tuning: give --base and --tuned" in capsys.readouterr().err


def test_the_difference_is_exact_and_the_approximation_is_called_dense(tmp_path: Path) -> None:
    """Every tensor that changed, also norms, biases and embeddings, and fused experts as one tensor."""
    torch.manual_seed(0)
    before, after = changed_pair(FAMILIES["gpt-oss"](), tmp_path)
    assert run(tmp_path, tmp_path / "diff", "--format", "diff") == 0
    files = [load_file(file) for file in (tmp_path / "diff").glob("*.safetensors")]
    difference = {key: tensor for file in files for key, tensor in file.items()}
    assert difference.keys() == before.keys()
    for name, tensor in difference.items():
        assert torch.allclose(tensor.double(), after[name] - before[name], rtol=0, atol=1e-8)
    index = json.loads((tmp_path / "diff" / "diff.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == difference.keys()
    assert report_of(tmp_path / "diff")["left_out"] == []
    assert run(tmp_path, tmp_path / "dense", "--format", "dense", "--rank", "4") == 0
    files = [load_file(file) for file in (tmp_path / "dense").glob("*.safetensors")]
    rows = report_of(tmp_path / "dense")["stacks"]
    errors = {row["parameter"] or f"{row['modules'][0]['module']}.weight": row for row in rows}
    for name, tensor in ((name, tensor) for file in files for name, tensor in file.items()):
        missed = float(((after[name] - before[name] - tensor.double()) ** 2).sum())
        if name in errors and (errors[name]["parameter"] or len(errors[name]["modules"]) == 1):
            assert 0 < missed == pytest.approx(errors[name]["e_stored"], rel=1e-4)


def test_a_tensor_of_three_axes_is_no_layer_and_keeps_its_axes(tmp_path: Path, capsys: Any) -> None:
    """Also where its first axis has length 1, and it is called a weight."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"h.0.q.weight": (24, 24), "h.1.q.weight": (24, 24), "one.weight": (1, 30, 40), "two.weight": (2, 30, 40)}
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
        tensors = {key: torch.randn(*shape, generator=generator) for key, shape in shapes.items()}
        save_file(tensors, tmp_path / name / "model.safetensors")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "tuned"))
    assert run(tmp_path, tmp_path / "diff", "--format", "diff") == 0
    files = [load_file(file) for file in (tmp_path / "diff").glob("*.safetensors")]
    found = {key: torch.equal(tensor, after[key] - before[key]) for file in files for key, tensor in file.items()}
    assert found == dict.fromkeys(shapes, True)
    assert run(tmp_path, tmp_path / "lora", "--rank", "2") == 0
    left_out = {one["name"]: one["reason"] for one in report_of(tmp_path / "lora")["left_out"]}
    assert left_out == dict.fromkeys(
        ("one.weight", "two.weight"), "one tensor with three axes, whose layers are no modules"
    )


@pytest.mark.slow
def test_a_narrow_matrix_is_taken_whole_beside_others(tmp_path: Path, capsys: Any) -> None:
    """A classifier with 2 labels at the default rank, in every format with factors."""
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_labels=2
    )
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).eval()
    changed_pair(model, tmp_path)
    for n, more in enumerate([(), ("--format", "lora-exact-rasa", "--k", "3", "--sweeps", "2")]):
        few = ("--modules", "classifier*", "--modules", "*query*", *more)
        assert run(tmp_path, tmp_path / str(n), *few) == 0
        rows = {row["kind"]: row for row in report_of(tmp_path / str(n))["stacks"]}
        assert (rows["classifier"]["rank"], rows["attention.self.query"]["rank"]) == (2, 16)
        assert error(tmp_path, tmp_path / str(n), model)["classifier.weight"] < 1e-10
    assert run(tmp_path, tmp_path / "dry", "--dry-run") == 0
    assert "fewer than 16 rows or columns: classifier.weight.\n" in capsys.readouterr().out


def test_stacks_are_excluded(llamas: Any, tmp_path: Path) -> None:
    folder, _ = llamas
    assert run(folder, tmp_path, "--rank", "2", "--exclude", "*mlp*", "--exclude", "lm_head*") == 0
    assert {row["kind"] for row in report_of(tmp_path)["stacks"]} == {f"self_attn.{x}_proj" for x in "qkvo"}
    reasons = {one["name"]: one["reason"] for one in report_of(tmp_path)["left_out"]}
    assert reasons["lm_head.weight"] == "matches --exclude '*mlp*', 'lm_head*'"


@pytest.mark.slow
def test_the_best_lora_of_equal_size(llamas: Any, tmp_path: Path, capsys: Any) -> None:
    """RaSA(4, 1) of 3 layers is a LoRA of rank 6, and the best of rank 6 misses less: numpy says how much."""
    folder, tuned = llamas
    few = ("--rank", "4", "--modules", "*self_attn.v*", "--format", "lora-exact-rasa", "--sweeps", "3")
    assert run(folder, tmp_path, *few) == 0
    (row,) = report_of(tmp_path)["stacks"]
    before, after = base_model(type(tuned), folder).state_dict(), tuned.state_dict()
    M = [(after[k].double() - before[k].double()).numpy() for k in before if "self_attn.v_proj" in k]
    tail = sum(float((np.linalg.svd(one, compute_uv=False)[6:] ** 2).sum()) for one in M)
    assert row["equal_size"] == {"rank": 6, "e_lora": pytest.approx(tail, rel=1e-6)}
    text = f"the best LoRA, of rank 6, would miss {tail / row['norm_squared']:.2%} of the squared norm"
    assert text in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["mixing", "private"])
def test_both_layouts_of_the_authors(llamas: Any, tmp_path: Path, layout: str) -> None:
    """Their forward: [B | B_S] diag(D) [A; A_S], with the keys of each fork."""
    folder, tuned = llamas
    few = ("--rank", "3", "--k", "1", "--format", "rasa", "--sweeps", "3", "--modules", "*v_proj*", "--layout", layout)
    assert run(folder, tmp_path, *few) == 0
    A_key, B_key, D_key = {
        "mixing": ("rasa_A", "rasa_B", "rasa_mixing"),
        "private": ("rasa_private_A", "rasa_private_B", "rasa_private_D"),
    }[layout]
    tensors = {key: tensor.double() for key, tensor in load_file(tmp_path / "adapter_model.safetensors").items()}
    A_S, B_S = (tensors.pop(f"base_model.rasa_shared_{side}.self_attn__v_proj.weight") for side in "AB")
    before, after = base_model(type(tuned), folder).state_dict(), tuned.state_dict()
    for module in report_of(tmp_path)["stacks"][0]["modules"]:
        A, B, D = (tensors.pop(f"base_model.model.{module['module']}.{key}.weight") for key in (A_key, B_key, D_key))
        M = after[f"{module['module']}.weight"].double() - before[f"{module['module']}.weight"].double()
        update = (torch.cat([B, B_S], 1) * D) @ torch.cat([A, A_S])
        assert float(((M - update) ** 2).sum()) == pytest.approx(module["e_stored"], rel=1e-4)
    assert not tensors


def test_what_the_authors_fork_cannot_load_is_said(tmp_path: Path, capsys: Any) -> None:
    torch.manual_seed(0)
    changed_pair(FAMILIES["gpt2"](), tmp_path)
    few = ("--rank", "3", "--k", "1", "--format", "rasa", "--sweeps", "2", "--modules", "*c_proj*")
    assert run(tmp_path, tmp_path / "out", *few) == 0
    assert "cannot load 4 of 4 modules (transformer.h.0.attn.c_proj, " in capsys.readouterr().out.replace("\n", " ")


def test_from_source_to_source_nothing_changes(llamas: Any, tmp_path: Path) -> None:
    """Extract, and extract that again in kohya's format, and that again for PEFT: the same updates to rounding."""
    folder, _ = llamas
    few = ("--modules", "*self_attn.v*", "--modules", "*mlp.down*", "--rank", "3")
    assert run(folder, tmp_path / "first", *few) == 0
    for source, out, more in (
        (tmp_path / "first", "second", []),
        (tmp_path / "first", "kohya", ["--format", "kohya"]),
        (tmp_path / "kohya" / "lora.safetensors", "third", []),
    ):
        arguments = ["--source", str(source), "--rank", "3", "--quiet", "--out", str(tmp_path / out), *more]
        assert main(arguments) == 0
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "second"))
    third = load_file(tmp_path / "third" / "adapter_model.safetensors")
    assert first.keys() == second.keys()
    assert len(third) == len(first)
    for key in first:
        if ".lora_A." in key:
            B = key.replace(".lora_A.", ".lora_B.")
            update = first[B] @ first[key]
            assert torch.allclose(second[B] @ second[key], update, atol=1e-6)
            flat = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight").replace(".", "_")
            (same,) = [k for k in third if k.endswith("lora_A.weight") and flat in k.replace(".", "_")]
            assert torch.allclose(third[same.replace("_A", "_B")] @ third[same], update, atol=1e-6)


@pytest.mark.slow
def test_diffusers_loads_kohyas_file_into_a_unet(tmp_path: Path) -> None:
    """Every Linear layer and convolution of the tuned UNet, by diffusers' own loader; all else stays as it was."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), block_out_channels=(8, 16), layers_per_block=1,
        cross_attention_dim=12, attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip
    before, after = changed_pair(model, tmp_path)
    assert run(tmp_path, tmp_path / "out", "--rank", "144", "--format", "kohya") == 0
    rank = report_of(tmp_path / "out")["rank"]
    with safe_open(tmp_path / "out" / "lora.safetensors", "pt") as file:
        assert file.metadata()["ss_network_dim"] == file.metadata()["ss_network_alpha"] == str(rank)
    loader = diffusers.loaders.StableDiffusionLoraLoaderMixin
    found = loader.lora_state_dict(tmp_path / "out", weight_name="lora.safetensors", unet_config=model.config)
    fresh = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "base").double()
    loader.load_lora_into_unet(found[0], network_alphas=found[1], unet=fresh)
    fresh.fuse_lora()
    fresh.unload_lora()
    for name, weight in fresh.state_dict().items():
        expected = after if weight.ndim in (2, 4) else before
        assert torch.allclose(weight, expected[name], rtol=0, atol=1e-6), name
