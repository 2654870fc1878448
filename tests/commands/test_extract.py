"""From two checkpoints to an adapter: PEFT loads it, the report says what it misses, and nothing is lost on the way."""

import errno
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rasa_theory import InputError, LayerStack
from rasa_theory.bounds import RankTarget
from rasa_theory.commands import reconstruct
from rasa_theory.commands.extract import main
from rasa_theory.common import resume
from rasa_theory.extraction import ExtractSettings, duration, extraction_table, model_card
from rasa_theory.extraction import adapter_folder as workplace
from rasa_theory.extraction import conversion as extraction
from rasa_theory.extraction import extract_settings as extract_settings
from rasa_theory.extraction import job as preflight
from rasa_theory.extraction import run as extraction_run
from rasa_theory.formats import ModuleNames
from rasa_theory.problem import storage
from rasa_theory.sources import Catalogue, StackSource, synthetic_stack
from rasa_theory.sources import open as open_module

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

IDS = torch.arange(24).reshape(2, 12) % 50


def llama():
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4
    )
    return transformers.LlamaForCausalLM(config)


def bert():
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    return transformers.BertModel(config)


def saved_pair(folder, build, layers):
    """The model before and after a change of all matrices in its layers, in shards that differ; base and tuned."""
    torch.manual_seed(0)
    model = build().eval()
    model.save_pretrained(folder / "base", max_shard_size="20KB")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if layers in name and weight.ndim == 2:
                weight.add_(0.05 * torch.randn_like(weight))
    model.save_pretrained(folder / "tuned", max_shard_size="33KB")
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS)[0]


def base_model(kind, folder):
    return kind.from_pretrained(folder / "base").eval()


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    return folder, saved_pair(folder, llama, ".layers.")


def run(folder, out, *more):
    return main(["--base", str(folder / "base"), "--tuned", str(folder / "tuned"), "--out", str(out), "--quiet", *more])


def report_of(out):
    return json.loads((out / "report.json").read_text())


@pytest.mark.parametrize("more", [("--k", "0"), ("--format", "lora-exact-rasa", "--k", "1", "--sweeps", "4")])
def test_at_full_rank_peft_makes_the_tuned_model_of_the_base(llamas, tmp_path, more):
    folder, tuned = llamas
    assert run(folder, tmp_path, "--rank", "24", *more) == 0
    model = peft.PeftModel.from_pretrained(base_model(transformers.LlamaForCausalLM, folder), tmp_path)
    assert torch.allclose(logits(model), logits(tuned), atol=2e-5)
    merged = model.merge_and_unload()
    assert torch.allclose(logits(merged), logits(tuned), atol=2e-5)
    merged.save_pretrained(tmp_path / "merged")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits(again), logits(merged))


@pytest.mark.parametrize(
    ("more", "error"),
    [
        (("--k", "1"), "e_lora"),
        (("--format", "lora-exact-rasa", "--k", "2"), "e_rasa"),
        (("--format", "lora-exact-rasa", "--k", "3", "--dtype", "bfloat16"), "e_rasa"),
    ],
)
def test_the_report_says_how_far_the_merged_weights_are(llamas, tmp_path, more, error):
    folder, tuned = llamas
    few = ("--modules", "*self_attn.v*", "--modules", "*mlp.down*")
    assert run(folder, tmp_path, "--rank", "3", "--sweeps", "8", *few, *more) == 0
    model = peft.PeftModel.from_pretrained(base_model(transformers.LlamaForCausalLM, folder).double(), tmp_path)
    merged, after = model.merge_and_unload().state_dict(), tuned.state_dict()
    for row in report_of(tmp_path)["stacks"]:
        for module in row["modules"]:
            name = f"{module['module']}.weight"
            missed = float(((merged[name] - after[name].double()) ** 2).sum())
            assert missed == pytest.approx(module["e_stored"], rel=1e-3)
            assert missed == pytest.approx(module[error], rel=1e-5 if "bfloat16" not in more else 2e-2)


def test_a_model_whose_layers_are_called_otherwise(tmp_path):
    tuned = saved_pair(tmp_path, bert, "encoder.layer.")
    assert run(tmp_path, tmp_path / "out", "--rank", "24", "--k", "0") == 0
    model = peft.PeftModel.from_pretrained(base_model(transformers.BertModel, tmp_path), tmp_path / "out")
    assert torch.allclose(logits(model), logits(tuned), atol=1e-5)
    kinds = {row["kind"] for row in report_of(tmp_path / "out")["stacks"]}
    assert {"attention.self.query", "attention.output.dense", "output.dense"} <= kinds


def gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, n_embd=24, n_layer=2, n_head=4))


def test_weights_that_lie_the_other_way_round(tmp_path):
    """GPT-2's Conv1D weights are (in, out); as (out, in) they are 72 x 24, 24 x 24, 96 x 24 and 24 x 96."""
    tuned = saved_pair(tmp_path, gpt2, ".h.")
    assert run(tmp_path, tmp_path / "out", "--rank", "24", "--k", "0") == 0
    shapes = {row["kind"]: row["shape"] for row in report_of(tmp_path / "out")["stacks"]}
    assert shapes == {"attn.c_attn": [72, 24], "attn.c_proj": [24, 24], "mlp.c_fc": [96, 24], "mlp.c_proj": [24, 96]}
    model = peft.PeftModel.from_pretrained(base_model(transformers.GPT2LMHeadModel, tmp_path), tmp_path / "out")
    assert torch.allclose(logits(model), logits(tuned), atol=2e-5)
    merged = model.merge_and_unload()
    assert torch.allclose(logits(merged), logits(tuned), atol=2e-5)


def mixtral():
    config = transformers.MixtralConfig(
        vocab_size=50, hidden_size=24, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def test_a_mixture_of_experts_with_grouped_queries(tmp_path):
    """Attention goes into the adapter, narrow keys and values too; every expert is a stack of its own in the report."""
    tuned = saved_pair(tmp_path, mixtral, ".layers.")
    assert run(tmp_path, tmp_path / "all", "--rank", "3", "--k", "0") == 0
    names = {row["name"] for row in report_of(tmp_path / "all")["stacks"]}
    assert sum("experts.2." in name for name in names) == 3
    assert run(tmp_path, tmp_path / "out", "--rank", "12", "--k", "0", "--modules", "*self_attn*") == 0
    model = peft.PeftModel.from_pretrained(base_model(transformers.MixtralForCausalLM, tmp_path), tmp_path / "out")
    merged, after = model.merge_and_unload().state_dict(), tuned.state_dict()
    for row in report_of(tmp_path / "out")["stacks"]:
        for module in row["modules"]:
            key = f"{module['module']}.weight"
            missed = float(((merged[key].double() - after[key].double()) ** 2).sum())
            assert missed == pytest.approx(module["e_stored"], rel=1e-3, abs=1e-9)


def test_dense_differences_give_the_tuned_weights_at_full_rank(llamas, tmp_path):
    folder, tuned = llamas
    assert run(folder, tmp_path, "--rank", "24", "--k", "0", "--format", "diff") == 0
    index = json.loads((tmp_path / "diff.safetensors.index.json").read_text())["weight_map"]
    before, after = base_model(transformers.LlamaForCausalLM, folder).state_dict(), tuned.state_dict()
    assert len(index) == 3 * 7
    for key, file in index.items():
        assert torch.allclose(before[key] + load_file(tmp_path / file)[key], after[key], atol=1e-6)


def test_the_authors_layout_alone_gives_the_error_in_the_report(llamas, tmp_path):
    folder, tuned = llamas
    assert run(folder, tmp_path, "--rank", "3", "--k", "1", "--format", "rasa", "--sweeps", "4") == 0
    tensors, config = (
        load_file(tmp_path / "adapter_model.safetensors"),
        json.loads((tmp_path / "adapter_config.json").read_text()),
    )
    assert (config["peft_type"], config["r"], config["rasa_k"]) == ("RASA", 3, 1)
    before, after = base_model(transformers.LlamaForCausalLM, folder).state_dict(), tuned.state_dict()
    for row in (row for row in report_of(tmp_path)["stacks"] if row["kind"] != "lm_head"):  # which is the same
        kind = row["kind"].replace(".", "__")
        shared_A, shared_B = (tensors[f"base_model.rasa_shared_{s}.{kind}.weight"].double() for s in "AB")
        for module in row["modules"]:
            name = module["module"]
            A, B, d = (tensors[f"base_model.model.{name}.rasa_{s}.weight"].double() for s in ("A", "B", "mixing"))
            update = torch.cat([B, shared_B], 1) * d @ torch.cat([A, shared_A])
            M = after[f"{name}.weight"].double() - before[f"{name}.weight"].double()
            assert float(((M - update) ** 2).sum()) == pytest.approx(module["e_stored"], rel=1e-4)
        assert row["e_rasa"] < row["e_lora"]


def test_the_report_is_a_table_a_figure_and_files_that_agree(llamas, tmp_path, capsys):
    folder, _ = llamas
    assert run(folder, tmp_path, "--rank", "3", "--sweeps", "4", "--modules", "*self_attn*") == 0
    printed = capsys.readouterr().out.splitlines()
    assert max(map(len, printed[1:-1])) <= 100
    report = report_of(tmp_path)
    assert [row["kind"] for row in report["stacks"]] == [f"self_attn.{x}_proj" for x in "koqv"]
    for row in report["stacks"]:
        assert row["e_rasa"] <= row["e_lora"] <= row["norm_squared"]
        assert row["lower_bound"] <= row["e_rasa"]
        for key in ("norm_squared", "e_lora", "e_rasa", "e_stored"):
            assert sum(m[key] for m in row["modules"]) == pytest.approx(row[key], rel=1e-12)
    lines = (tmp_path / "report.csv").read_text().splitlines()
    assert len(lines) == 1 + 4 * 3
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\nbase_model: ")
    assert all(line in card for line in printed[1:-1])
    assert (tmp_path / "report.png").stat().st_size > 5000
    assert not (tmp_path / ".extract").exists()


@pytest.mark.parametrize("target", [("--energy", "0.6"), ("--error", "0.4"), ("--parameters", "4000")])
def test_ranks_are_chosen_layer_by_layer_and_peft_takes_them(llamas, tmp_path, target):
    folder, tuned = llamas
    few = ("--modules", "*self_attn.v*", "--modules", "*mlp.down*")
    assert run(folder, tmp_path, "--rank", "auto", *target, *few) == 0
    rows, config = report_of(tmp_path)["stacks"], json.loads((tmp_path / "adapter_config.json").read_text())
    ranks = {name: rank for row in rows for name, rank in row["ranks"].items()}
    assert len(set(ranks.values())) > 1
    others = {"^" + name.replace(".", r"\."): rank for name, rank in ranks.items() if rank != config["r"]}
    assert config["rank_pattern"] == others
    spent = sum(rank * sum(row["shape"]) for row in rows for rank in row["ranks"].values())
    missed, norm = (sum(row[key] for row in rows) for key in ("e_stored", "norm_squared"))
    if target[0] == "--parameters":
        assert 4000 - 56 < spent <= 4000
    else:
        assert 0.38 <= missed / norm <= 0.4
    model = peft.PeftModel.from_pretrained(base_model(transformers.LlamaForCausalLM, folder).double(), tmp_path)
    merged, after = model.merge_and_unload().state_dict(), tuned.state_dict()
    for row in rows:
        for module in row["modules"]:
            key = f"{module['module']}.weight"
            error = float(((merged[key] - after[key].double()) ** 2).sum())
            assert error == pytest.approx(module["e_stored"], rel=1e-5)
            assert error == pytest.approx(module["e_lora"], rel=1e-5)
        assert row["parameters"]["stored"] == sum(rank * sum(row["shape"]) for rank in row["ranks"].values())


def test_names_that_end_alike_do_not_share_a_rank(tmp_path):
    """`layers.0.q` is the end of `mtp.layers.0.q`: a pattern of PEFT that is not anchored would hit both."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"layers": (2, 5), "mtp.layers": (5, 5)}
    updates = {}
    for name, ranks in sizes.items():
        for i, r in enumerate(ranks):
            product = torch.randn(8, r, generator=generator) @ torch.randn(r, 8, generator=generator)
            updates[f"{name}.{i}.q.weight"] = product
    save_file(updates, tmp_path / "updates.safetensors")
    arguments = ["--source", str(tmp_path / "updates.safetensors"), "--rank", "auto", "--energy", "0.999999", "--quiet"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.mtp = self.made(), torch.nn.Module()
            self.mtp.layers = self.made()

        def made(self):
            layers = [torch.nn.Module() for _ in range(2)]
            for layer in layers:
                layer.q = torch.nn.Linear(8, 8, bias=False)
            return torch.nn.ModuleList(layers)

    model = Model()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    merged = peft.PeftModel.from_pretrained(model, tmp_path / "out").merge_and_unload().state_dict()
    for key, M in updates.items():
        assert torch.allclose(merged[key] - before[key], M, atol=2e-2)


def test_large_layers_without_a_pool_go_without_full_spectra(llamas, tmp_path, monkeypatch):
    folder, _ = llamas
    few = ("--rank", "9", "--k", "0", "--modules", "*self_attn.v*")
    assert run(folder, tmp_path / "exact", *few) == 0
    monkeypatch.setattr(extract_settings, "_EXACT", 1)
    assert run(folder, tmp_path / "fast", *few) == 0
    (exact,), (fast,) = (report_of(tmp_path / name)["stacks"] for name in ("exact", "fast"))
    assert fast["e_stored"] == pytest.approx(exact["e_stored"], rel=1e-5)
    for x, y in zip(exact["modules"], fast["modules"], strict=True):
        assert y["stable_rank"] == pytest.approx(x["stable_rank"], rel=1e-5)
        assert y["rank_50"] == x["rank_50"] <= 9
        assert (y["entropy_rank"], y["rank_90"], y["rank_99"]) == (None, None, None)


def test_memory_for_svds_is_demanded_only_where_they_are_taken(tmp_path, monkeypatch, capsys):
    """Layers of 120 x 100, r = 2: half the memory of an SVD is enough for their leading parts."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.arange(1, 101) ** -1.5
    updates = {f"h.{i}.q.weight": torch.randn(120, 100, generator=generator) * sizes for i in range(2)}
    save_file(updates, tmp_path / "updates.safetensors")
    arguments = ["--source", str(tmp_path / "updates.safetensors"), "--rank", "2", "--k", "0", "--quiet"]
    arguments += ["--memory", str(64 * 120 * 100), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "twice what the exact SVD of one takes" in capsys.readouterr().err
    monkeypatch.setattr(extract_settings, "_EXACT", 1)
    assert main(arguments) == 0
    assert main([*arguments[:-3], "760000", "--out", str(tmp_path / "less")]) == 2
    assert "twice what the work on one takes" in capsys.readouterr().err


def test_dense_differences_of_conv1d_lie_as_the_checkpoint_has_them(tmp_path):
    tuned = saved_pair(tmp_path, gpt2, ".h.")
    few = ("--modules", "*c_proj*", "--rank", "24", "--k", "0", "--format", "diff")
    assert run(tmp_path, tmp_path / "out", *few) == 0
    index = json.loads((tmp_path / "out" / "diff.safetensors.index.json").read_text())["weight_map"]
    before, after = base_model(transformers.GPT2LMHeadModel, tmp_path).state_dict(), tuned.state_dict()
    for key, file in index.items():
        assert torch.allclose(before[key] + load_file(tmp_path / "out" / file)[key], after[key], atol=1e-6)
    assert all(row["e_stored"] <= 1e-9 for row in report_of(tmp_path / "out")["stacks"])


def test_the_best_k_is_found(llamas, tmp_path):
    folder, _ = llamas
    more = ("--rank", "4", "--sweeps", "4", "--modules", "*self_attn.v*", "--format", "lora-exact-rasa")
    assert run(folder, tmp_path / "auto", "--k", "auto", *more) == 0
    (auto,) = report_of(tmp_path / "auto")["stacks"]
    assert run(folder, tmp_path / "one", "--k", "1", *more) == 0
    (one,) = report_of(tmp_path / "one")["stacks"]
    assert auto["e_rasa"] <= one["e_rasa"]
    assert auto["k"] in (1, 2, 4)


def test_spectral_facts():
    sigma = torch.tensor([[3.0, 1.0, 0.0], [2.0, 2.0, 2.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    first, equal, zero = extraction._spectral_facts(sigma)
    assert first["stable_rank"] == pytest.approx(10 / 9)
    assert first["entropy_rank"] == pytest.approx(np.exp(-0.9 * np.log(0.9) - 0.1 * np.log(0.1)))
    assert (first["rank_50"], first["rank_90"], first["rank_99"]) == (1, 1, 2)
    assert [equal["stable_rank"], equal["entropy_rank"]] == pytest.approx([3, 3])
    assert (equal["rank_50"], equal["rank_90"]) == (2, 3)
    assert set(zero.values()) == {0}


def test_an_adapter_is_extracted_at_a_lower_rank(llamas, tmp_path):
    """From PEFT's folder to PEFT's folder: of an adapter of rank 6, the best one of rank 2."""
    folder, _ = llamas
    few = ("--modules", "*self_attn.v*", "--modules", "*self_attn.q*", "--k", "0")
    assert run(folder, tmp_path / "six", "--rank", "6", *few) == 0
    assert (
        main(["--source", str(tmp_path / "six"), "--rank", "2", "--k", "0", "--out", str(tmp_path / "two"), "--quiet"])
        == 0
    )
    assert run(folder, tmp_path / "direct", "--rank", "2", *few) == 0
    found, expected = ({row["kind"]: row for row in report_of(tmp_path / n)["stacks"]} for n in ("two", "direct"))
    assert found.keys() == expected.keys()
    tensors, other = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("two", "direct"))
    for key in tensors:
        if ".lora_A." in key:
            B = key.replace(".lora_A.", ".lora_B.")
            assert torch.allclose(tensors[B] @ tensors[key], other[B] @ other[key], atol=1e-6)


@pytest.mark.filterwarnings("error:fan_in_fan_out")
def test_an_adapter_of_conv1d_modules_keeps_their_orientation(tmp_path):
    """A GPT-2 with PEFT's adapter, with that extracted from it, and with dense updates: the same weights."""
    torch.manual_seed(0)
    gpt2().save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    model = peft.get_peft_model(base_model(transformers.GPT2LMHeadModel, tmp_path), config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_()
    model.save_pretrained(tmp_path / "adapter")
    after = model.merge_and_unload().state_dict()
    few = ["--source", str(tmp_path / "adapter"), "--rank", "3", "--k", "0", "--quiet"]
    assert main([*few, "--out", str(tmp_path / "lora")]) == 0
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    base = base_model(transformers.GPT2LMHeadModel, tmp_path)
    merged = peft.PeftModel.from_pretrained(base, tmp_path / "lora").merge_and_unload().state_dict()
    assert all(torch.allclose(merged[key], after[key], atol=1e-5) for key in after)
    assert main([*few, "--format", "diff", "--out", str(tmp_path / "diff")]) == 0
    before = base_model(transformers.GPT2LMHeadModel, tmp_path).state_dict()
    updates = {key: x for file in (tmp_path / "diff").glob("*.safetensors") for key, x in load_file(file).items()}
    assert updates.keys() == {
        f"transformer.h.{i}.{kind}.weight" for i in range(2) for kind in ("attn.c_attn", "mlp.c_fc")
    }
    assert all(torch.allclose(before[key] + x, after[key], atol=1e-5) for key, x in updates.items())


def test_dense_updates_of_what_may_be_a_conv1d_are_refused(tmp_path, capsys):
    """Linear modules of GPT-2's names, or Conv1D ones wrapped before a Linear one: the flag is false for both."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["c_attn", "score"], init_lora_weights=False)
    model = transformers.GPT2ForSequenceClassification(gpt2().config)
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["fan_in_fan_out"] is False
    few = ["--source", str(tmp_path / "adapter"), "--rank", "2", "--k", "0", "--quiet"]
    assert main([*few, "--format", "diff", "--out", str(tmp_path / "diff")]) == 2
    assert "c_attn.weight' may be stored transposed: it is called like a Conv1D, but the" in capsys.readouterr().err
    assert main([*few, "--out", str(tmp_path / "lora")]) == 0
    assert "score" in json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["target_modules"]


def test_where_only_an_embedding_has_changed_it_is_named(tmp_path, capsys):
    weights = {f"h.{i}.q.weight": torch.ones(4, 4) for i in range(2)} | {"wte.weight": torch.ones(9, 4)}
    save_file(weights, tmp_path / "base.safetensors")
    save_file(weights | {"wte.weight": torch.zeros(9, 4)}, tmp_path / "tuned.safetensors")
    pair = ["--base", str(tmp_path / "base.safetensors"), "--tuned", str(tmp_path / "tuned.safetensors"), "--rank", "2"]
    assert main([*pair, "--k", "0", "--quiet", "--out", str(tmp_path / "out")]) == 2
    assert "every update is zero, there is nothing to extract; only 'wte.weight' has changed" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_adapters_of_one_base_are_compressed_together(llamas, tmp_path):
    """Two of rank 6 become two of rank 2 - 1 + 2 that share a pool per module; PEFT loads each by itself."""
    folder, _ = llamas
    few = ("--modules", "*self_attn.v*", "--rank", "6", "--k", "0")
    for name, scale in (("one", 1.0), ("two", 2.0)):
        assert run(folder, tmp_path / name, *few) == 0
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        generator = torch.Generator().manual_seed(int(scale))
        changed = {key: t + 0.05 * scale * torch.randn(t.shape, generator=generator) for key, t in tensors.items()}
        save_file(changed, tmp_path / name / "adapter_model.safetensors")
    arguments = ["--adapters", str(tmp_path / "one"), str(tmp_path / "two"), "--rank", "2", "--k", "1", "--sweeps", "6"]
    arguments += ["--format", "lora-exact-rasa", "--quiet", "--out", str(tmp_path / "both")]
    assert main(arguments) == 0
    rows = report_of(tmp_path / "both")["stacks"]
    assert [row["kind"] for row in rows] == [f"model.layers.{i}.self_attn.v_proj" for i in range(3)]
    for task, name in enumerate(("one", "two")):
        given, found = (
            peft.PeftModel.from_pretrained(base_model(transformers.LlamaForCausalLM, folder).double(), path)
            .merge_and_unload()
            .state_dict()
            for path in (tmp_path / name, tmp_path / "both" / f"{task}-{name}")
        )
        for row in rows:
            key = f"{row['kind']}.weight"
            missed = float(((given[key] - found[key]) ** 2).sum())
            assert missed == pytest.approx(row["modules"][task]["e_stored"], rel=1e-4)
            assert 0 < missed < row["modules"][task]["norm_squared"]
    assert main(arguments) == 0  # finished already
    assert main([*arguments[:-1], str(tmp_path / "dense"), "--format", "diff"]) == 2


# ---- interruptions


def files_of(out):
    return {p.name: p.read_bytes() for p in sorted(out.iterdir()) if p.suffix in (".safetensors", ".csv")}


def options(fmt="lora"):
    return ("--rank", "2", "--sweeps", "2", "--modules", "*self_attn*", "--format", fmt)


def test_interrupted_it_goes_on_where_it_was(llamas, tmp_path, monkeypatch, capsys):
    folder, _ = llamas
    assert run(folder, tmp_path / "whole", *options()) == 0
    done, real = [], extraction_run.extract_stack

    def stops(stack, *rest):
        if len(done) == 2 and "stopped" not in done:
            done.append("stopped")
            raise KeyboardInterrupt
        done.append(stack.name)
        return real(stack, *rest)

    monkeypatch.setattr(extraction_run, "extract_stack", stops)
    assert run(folder, tmp_path / "out", *options()) == 130
    assert "2 of 4 stacks are done" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").iterdir()] == [".extract"]
    assert run(folder, tmp_path / "out", *options()) == 0
    assert len(done) == len(set(done)) == 5
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_killed_at_three_writes_the_next_run_gives_the_same_files(llamas, tmp_path, monkeypatch):
    """Before the row of the second stack, the adapter and the report are in their places."""
    folder, _ = llamas
    few = ("--rank", "2", "--k", "0", "--modules", "*self_attn.v*", "--modules", "*self_attn.q*")
    assert run(folder, tmp_path / "whole", *few) == 0
    real = os.replace
    for name in ("00001.json", "adapter_model.safetensors", "report.json"):

        def dies(source, target, name=name):
            if target.name == name:
                raise SystemExit(9)
            real(source, target)

        monkeypatch.setattr(os, "replace", dies)
        with pytest.raises(SystemExit):
            run(folder, tmp_path / name, *few)
        assert not (tmp_path / name / "report.json").exists()
        monkeypatch.setattr(os, "replace", real)
        assert run(folder, tmp_path / name, *few) == 0
        assert files_of(tmp_path / name) == files_of(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ["lora", "diff"])
def test_killed_before_any_file_is_in_its_place_nothing_is_lost(llamas, tmp_path, monkeypatch, fmt):
    """Every write in turn is the last that happens; the next run ends with the files of an undisturbed one."""
    folder, _ = llamas
    assert run(folder, tmp_path / "whole", *options(fmt)) == 0
    real, n = os.replace, 0
    while True:
        left, out = n, tmp_path / f"out{n}"

        def dies(source, target):
            nonlocal left
            if left == 0:
                raise SystemExit(9)
            left -= 1
            real(source, target)

        monkeypatch.setattr(os, "replace", dies)
        try:
            assert run(folder, out, *options(fmt)) == 0
            break
        except SystemExit:
            assert not (out / "report.json").exists()
        monkeypatch.setattr(os, "replace", real)
        assert run(folder, out, *options(fmt)) == 0
        assert files_of(out) == files_of(tmp_path / "whole")
        n += 1
    assert n >= 1 + 2 * 4 + 5


HOLDER = """
import os, sys, time
from pathlib import Path
from rasa_theory.extraction import ExtractionFolder

with ExtractionFolder(Path(sys.argv[1]), {"settings": {}}):
    print("in", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no advisory locks")
def test_two_processes_do_not_share_a_folder_and_a_killed_one_keeps_none_out(llamas, tmp_path, capsys):
    folder, _ = llamas
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "in\n"
            (tmp_path / ".extract" / "manifest.json").unlink()  # whose plan would be refused anyway
            assert run(folder, tmp_path, *options()) == 2
            assert f"another process is extracting into {tmp_path}" in capsys.readouterr().err.splitlines()[-1]
        finally:
            holder.kill()
    assert run(folder, tmp_path, *options()) == 0
    assert not (tmp_path / ".extract").exists()


def test_a_lock_that_was_removed_with_its_folder_is_none(tmp_path, monkeypatch):
    plan = {"settings": {}}
    real = resume.fcntl.flock

    def removed(*rest):
        real(*rest)
        shutil.rmtree(tmp_path / ".extract")

    monkeypatch.setattr(resume.fcntl, "flock", removed)
    with pytest.raises(InputError, match="another process"), workplace.ExtractionFolder(tmp_path, plan):
        pass
    monkeypatch.setattr(resume.fcntl, "flock", lambda *rest: (_ for _ in ()).throw(OSError("no locks available")))
    with workplace.ExtractionFolder(tmp_path, plan) as place:
        assert place.compute_once("x", lambda: 1) == 1


def test_parts_of_no_known_plan_are_not_gone_on_with(tmp_path):
    (tmp_path / ".extract").mkdir()
    (tmp_path / ".extract" / "00000.json").write_text("{}")
    with workplace.ExtractionFolder(tmp_path, {"settings": {}}) as place:
        assert place.row(0) is None


@pytest.mark.skipif(sys.platform == "win32", reason="no advisory locks")
def test_a_folder_that_was_left_lets_the_next_in(tmp_path):
    first = workplace.ExtractionFolder(tmp_path, {"settings": {}})
    with first, pytest.raises(InputError, match="another process"), workplace.ExtractionFolder(tmp_path, first.plan):
        pass
    with workplace.ExtractionFolder(tmp_path, first.plan):
        pass


def test_what_a_killed_process_left_unfinished_goes(tmp_path):
    """Whichever of our files it was writing; hidden files of others stay."""
    names = ["report.csv", "report.png", "README.md", "diff-00002.safetensors", "diff.safetensors.index.json"]
    unfinished = [f".{name}.{'0a' * 8}" for name in names]
    unfinished.append(f"0-task/.adapter_model.safetensors.{'1b' * 8}")
    (tmp_path / "0-task").mkdir()
    (tmp_path / ".extract").mkdir()
    (tmp_path / ".extract" / "manifest.json").write_text('{"plan": {"settings": {}}}')
    for name in [*unfinished, ".hidden"]:
        (tmp_path / name).write_text("half")
    with workplace.ExtractionFolder(tmp_path, {"settings": {}}):
        assert sorted(p.name for p in tmp_path.iterdir()) == [".extract", ".hidden", "0-task"]
        assert not list((tmp_path / "0-task").iterdir())


def test_a_disk_that_becomes_full_is_said_with_what_to_do(llamas, tmp_path, monkeypatch, capsys):
    folder, _ = llamas
    real = workplace.plot_extraction

    def full(report):
        figure = real(report)
        figure.savefig = lambda *rest, **more: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))
        return figure

    monkeypatch.setattr(workplace, "plot_extraction", full)
    assert run(folder, tmp_path / "out", *options()) == 2
    assert "report.png: No space left on device; make room and give the same command again" in capsys.readouterr().err
    monkeypatch.setattr(workplace, "plot_extraction", real)
    monkeypatch.setattr(extraction_run, "extract_stack", None)  # all of them are done
    assert run(folder, tmp_path / "out", *options()) == 0


def test_inputs_or_settings_that_changed_are_refused(llamas, tmp_path, monkeypatch, capsys):
    folder, _ = llamas
    shutil.copytree(folder, tmp_path / "pair")
    monkeypatch.setattr(extraction_run, "extract_stack", lambda *rest: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(tmp_path / "pair", tmp_path / "out", *options()) == 130
    capsys.readouterr()
    assert run(tmp_path / "pair", tmp_path / "out", *options(), "--seed", "1") == 2
    assert "holds an extraction with other settings (solver)" in capsys.readouterr().err
    assert run(tmp_path / "pair", tmp_path / "out", *options(), "--compute", "float32") == 2
    assert "holds an extraction with other settings (compute)" in capsys.readouterr().err
    shard = sorted((tmp_path / "pair" / "tuned").glob("*.safetensors"))[0]
    shard.touch()
    assert run(tmp_path / "pair", tmp_path / "out", *options()) == 2
    assert f"holds an extraction with other inputs ({shard.name})" in capsys.readouterr().err


# ---- bad input


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--rank", "99"], "rank 99 exceeds min(b, a) = 24"),
        (["--format", "rasa", "--k", "0"], "k must be at least 1 for format rasa"),
        (["--k", "-1"], "shared_rank must be at least 0, got -1 (--k)"),
        (["--k", "40"], "shared_rank 40 exceeds rank 16 (--k)"),
        (["--rank", "auto"], "--rank auto needs exactly one of --energy, --error and --parameters"),
        (["--energy", "0.9"], "--energy goes with --rank auto"),
        (["--rank", "auto", "--energy", "2"], "energy must be above 0 and at most 1, got 2.0"),
        (["--rank", "auto", "--energy", "0.9", "--k", "1"], "k must be 0"),
        (["--rank", "auto", "--parameters", "9"], "the target leaves every layer rank 0"),
        (["--format", "rasa", "--k", "auto"], "k cannot be auto for format rasa"),
        (["--dtype", "float8"], "invalid choice: 'float8'"),
        (["--source", "x.safetensors"], "--source and --base with --tuned exclude each other; give one of them"),
        (["--modules", "nothing*"], "no stack matches --modules"),
        (["--start", "nowhere"], "invalid choice: 'nowhere'"),
        (["--out", "none"], "--out none writes no adapter"),
    ],
)
def test_bad_input_is_one_sentence(llamas, tmp_path, capsys, more, sentence):
    folder, _ = llamas
    assert run(folder, tmp_path / "out", *more) == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert [line.startswith("left out: ") for line in err.splitlines()[:-1]] == [True] * (len(err.splitlines()) - 1)


def test_two_different_models_are_one_sentence(llamas, tmp_path, capsys):
    bert().save_pretrained(tmp_path / "bert")
    out, pair = tmp_path / "out", ["--base", str(tmp_path / "bert"), "--tuned", str(llamas[0] / "tuned")]
    capsys.readouterr()
    for command in (main, reconstruct.main):
        assert command([*pair, "--out", str(out)]) == 2
        (sentence,) = capsys.readouterr().err.splitlines()
        assert f": no matrix of {pair[3]}, such as 'lm_head.weight', is in {pair[1]}, which has others, " in sentence
    assert not out.exists()


def test_an_adapter_is_no_half_of_a_pair_and_all_missing_paths_are_named(llamas, tmp_path, capsys):
    folder, _ = llamas
    few = ("--rank", "2", "--k", "0", "--modules", "*self_attn.v*")
    assert run(folder, tmp_path / "adapter", *few) == 0
    adapter, base = str(tmp_path / "adapter"), str(folder / "base")
    capsys.readouterr()
    for pair in ((base, adapter), (adapter, base), (adapter, adapter)):
        assert main(["--base", pair[0], "--tuned", pair[1], "--out", str(tmp_path / "out")]) == 2
        assert (
            f"{adapter} is the folder of an adapter, not a model; give it alone as --source" in capsys.readouterr().err
        )
    shutil.copy(tmp_path / "adapter" / "adapter_config.json", tmp_path)
    shutil.copy(next((folder / "base").glob("*.safetensors")), tmp_path / "model.safetensors")
    open_module._refuse_adapters([tmp_path])  # a model beside the configuration of an adapter
    assert main(["--base", "nowhere", "--tuned", "neither", "--out", str(tmp_path / "out")]) == 2
    assert "'nowhere' and 'neither' do not exist; give a .safetensors file or a dir" in capsys.readouterr().err


def test_kinds_that_are_too_long_are_told_apart(llamas, tmp_path):
    """As those of adapters are, whose names are whole: in 100 columns, and not by their ends alone."""
    folder, _ = llamas
    assert run(folder, tmp_path, *options()) == 0
    report = report_of(tmp_path)
    names = [f"model.layers.{i}.self_attn.{x}_proj" for i in (3, 10) for x in "qv"]
    for row, name in zip(report["stacks"], names, strict=True):
        row["kind"] = name
    lines = extraction_table(report).splitlines()
    assert [line.split()[0] for line in lines[2:6]] == [name.removeprefix("model.layers.") for name in names]
    assert "All kinds begin with 'model.layers.', which is not shown." in lines
    assert max(map(len, lines)) <= 100
    assert extraction_table({**report, "stacks": report["stacks"][:1]}).splitlines()[2].startswith("q_proj ")


def test_the_card_says_what_is_chosen_and_every_rank_that_is_written(llamas, tmp_path):
    folder, _ = llamas
    few = ("--modules", "*self_attn.v*", "--modules", "lm_head*", "--rank", "3", "--sweeps", "2")
    few += ("--format", "lora-exact-rasa")
    assert run(folder, tmp_path / "one", *few, "--k", "1") == 0
    report = report_of(tmp_path / "one")
    report["stacks"] += [{**report["stacks"][0], "ranks": {"lm_head": 3}}]
    assert "RaSA of rank 3 with k = 1, written exactly as a LoRA of rank 3 or 5, stored" in model_card(report)
    assert run(folder, tmp_path / "auto", *few, "--k", "auto") == 0
    assert "with k = chosen for each kind of module, written" in (tmp_path / "auto" / "README.md").read_text()


def test_there_is_no_default_source(tmp_path, capsys):
    assert main(["--rank", "2", "--out", str(tmp_path / "out")]) == 2
    assert "give --base and --tuned, two checkpoints, or --source" in capsys.readouterr().err


def test_files_of_others_are_left_alone(llamas, tmp_path, capsys):
    folder, _ = llamas
    (tmp_path / "README.md").write_text("mine")
    assert run(folder, tmp_path, *options()) == 2
    assert "README.md is there already, and not ours" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]


def test_a_single_matrix_goes_along_and_what_has_not_changed_does_not(tmp_path, capsys):
    """The classifier of a BERT, and one kind of matrix in its layers; its embeddings are named as left out."""
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_labels=9
    )
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name == "classifier.weight" or "self.query.weight" in name:
                weight.add_(0.1 * torch.randn_like(weight))
    model.save_pretrained(tmp_path / "tuned")
    assert (
        run(tmp_path, tmp_path / "out", "--rank", "9", "--k", "1", "--format", "lora-exact-rasa", "--sweeps", "3") == 0
    )
    said = capsys.readouterr()
    assert "left out: bert.embeddings.word_embeddings.weight: an embedding" in said.err
    assert "Unchanged, and not written: " in said.out
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    queries = [f"bert.encoder.layer.{i}.attention.self.query" for i in range(2)]
    assert sorted(config["target_modules"]) == [*queries, "classifier"]
    base = base_model(transformers.BertForSequenceClassification, tmp_path)
    merged = peft.PeftModel.from_pretrained(base, tmp_path / "out").merge_and_unload().state_dict()
    assert torch.allclose(merged["classifier.weight"], model.state_dict()["classifier.weight"], atol=1e-5)
    rows = {row["kind"]: row for row in report_of(tmp_path / "out")["stacks"]}
    assert rows["attention.self.query"]["e_rasa"] > 0
    assert rows["bert.pooler.dense"]["norm_squared"] == 0


@pytest.mark.parametrize("headless", ["base", "tuned"])
def test_a_headless_model_and_one_with_a_head_are_a_pair(tmp_path, headless):
    """The layers of the one are called bert.encoder.., of the other encoder..; the adapter is loaded onto the base."""
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    with_head = transformers.BertForSequenceClassification(config).eval()
    saved = {"base": with_head, "tuned": with_head} | {headless: with_head.bert}
    saved["base"].save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for name, weight in with_head.named_parameters():
            if "self.query.weight" in name:
                weight.add_(0.1 * torch.randn_like(weight))
    saved["tuned"].save_pretrained(tmp_path / "tuned")
    assert run(tmp_path, tmp_path / "out", "--rank", "24", "--k", "0") == 0
    report = report_of(tmp_path / "out")
    how = {"base": "'bert.' taken off", "tuned": "'bert.' put before"}[headless]
    assert f"({how} the names of {tmp_path / 'tuned'})" in report["source"]
    assert report["source"] in (tmp_path / "out" / "README.md").read_text()
    head, other = tmp_path / {"base": "tuned", "tuned": "base"}[headless], tmp_path / headless
    assert {"name": "classifier.weight", "reason": f"in {head} but not in {other}"} in report["left_out"]
    base = base_model(type(saved["base"]), tmp_path)
    merged = peft.PeftModel.from_pretrained(base, tmp_path / "out").merge_and_unload()
    found = merged if headless == "base" else merged.bert
    for key, weight in with_head.bert.state_dict().items():
        assert torch.allclose(found.state_dict()[key], weight, atol=1e-5)


def test_the_share_of_what_is_left_out_is_said(tmp_path, monkeypatch, capsys):
    """Of an embedding that lies on disk, of what is no weight of a module; not of what is 0 or cannot be read."""
    generator = torch.Generator().manual_seed(0)
    updates = {f"h.{i}.q.weight": torch.randn(8, 6, generator=generator) for i in range(2)}
    updates |= {"wte.weight": torch.randn(300, 6, generator=generator), "gate": torch.ones(2, 2)}
    updates |= {"wpe.weight": torch.zeros(9, 6), "embed.weight": torch.full((9, 6), float("nan"))}
    save_file(updates, tmp_path / "updates.safetensors")
    arguments = ["--source", str(tmp_path / "updates.safetensors"), "--rank", "2", "--k", "0", "--quiet"]
    arguments += ["--memory", str(128 * 8 * 6), "--out", str(tmp_path / "out")]
    real, asked = extraction_run.norm_squared, []

    def stops(source):
        asked.append(source.name)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real(source)

    monkeypatch.setattr(extraction_run, "norm_squared", stops)
    assert main(arguments) == 130
    assert "1 of 1 stacks are done" in capsys.readouterr().err
    assert main(arguments) == 0
    assert sorted(asked) == sorted([*(key for key in updates if key[:2] != "h."), asked[2]])
    left_out = {one["name"]: one for one in report_of(tmp_path / "out")["left_out"]}
    assert [key for key in left_out if "norm_squared" not in left_out[key]] == ["embed.weight"]
    energy = {key: float((M.double() ** 2).sum()) for key, M in updates.items() if key != "embed.weight"}
    for key in ("wte.weight", "gate", "wpe.weight"):
        assert left_out[key]["norm_squared"] == pytest.approx(energy[key], rel=1e-12)
    share, gate = (100 * energy[key] / sum(energy.values()) for key in ("wte.weight", "gate"))
    line = f"Left out, by share of the squared norm: wte {share:.3g} %, gate {gate:.3g} %."
    assert line in capsys.readouterr().out.splitlines()
    assert line in (tmp_path / "out" / "README.md").read_text().splitlines()


def test_a_stack_that_has_not_changed_is_not_decomposed():
    stack = LayerStack(torch.zeros(2, 6, 5))
    extracted = extraction.extract_stack(stack, ModuleNames(("h.0.q", "h.1.q")), extraction.ExtractSettings(3, 1))
    assert extracted.tensors == {}
    assert extracted.row["ranks"] == {}
    assert extracted.row["e_rasa"] == extracted.row["e_stored"] == 0
    assert stack.data_passes == 0


def test_a_run_that_fails_before_anything_is_finished_leaves_nothing(llamas, tmp_path):
    folder, _ = llamas
    few = ("--modules", "*self_attn.v*", "--rank", "auto", "--parameters")
    assert run(folder, tmp_path, *few, "9") == 2
    assert list(tmp_path.iterdir()) == []
    assert run(folder, tmp_path, *few, "900") == 0


def test_a_model_that_has_not_changed_gives_no_adapter(llamas, tmp_path, capsys):
    base = str(llamas[0] / "base")
    assert main(["--base", base, "--tuned", base, "--rank", "2", "--k", "0", "--quiet", "--out", str(tmp_path)]) == 2
    assert "every update is zero" in capsys.readouterr().err


def test_factors_that_half_precision_cannot_hold_are_refused(tmp_path, capsys):
    M = {f"layers.{i}.q.weight": torch.randn(6, 5) * 1e12 for i in range(2)}
    save_file(M, tmp_path / "updates.safetensors")
    arguments = ["--source", str(tmp_path / "updates.safetensors"), "--rank", "2", "--quiet", "--dtype", "float16"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert "float16 cannot hold the entries of" in capsys.readouterr().err


def test_a_stack_without_names_of_modules_is_refused(tmp_path, capsys):
    save_file({"all": torch.randn(3, 6, 5)}, tmp_path / "updates.safetensors")
    assert main(["--source", str(tmp_path / "updates.safetensors"), "--rank", "2", "--out", str(tmp_path / "out")]) == 2
    assert "one tensor with three axes, whose layers are no modules" in capsys.readouterr().err


def test_a_dry_run_says_what_and_how_large(llamas, tmp_path, monkeypatch, capsys):
    folder, _ = llamas
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: SimpleNamespace(free=7 * 2**30))
    assert run(folder, tmp_path / "out", "--dry-run", "--rank", "4") == 0
    text = capsys.readouterr().out
    assert "model.layers.*.self_attn.q_proj.weight: 3 x 24 x 24" in text
    assert "LoRA takes less than 1 s here, reading aside, by a layer timed now; the solver comes on top." in text
    assert "  left out: model.norm.weight: 1 axes" in text
    assert (
        f"the adapter takes at most about 0.0 MiB, twice that while it is made; 7 GiB are free in {tmp_path / 'out'}."
        in text
    )
    assert text.splitlines()[-1].startswith("One stack is in memory at a time: about 0 MiB")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("fmt", "copies", "there"), [("lora", 2, 0), ("diff", 1, 0), ("diff", 1, 1000)])
def test_a_disk_that_is_too_small_is_said_before_any_work(llamas, tmp_path, monkeypatch, capsys, fmt, copies, there):
    """To the byte; less what an interrupted run has left there."""
    folder, _ = llamas
    numbers = 3 * 24 * 24 if fmt == "diff" else 3 * 2 * (24 + 24)
    wanted = copies * 4 * numbers - there
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".kept.safetensors").write_bytes(bytes(there))
    more = ("--rank", "2", "--k", "0", "--modules", "*self_attn.v*", "--format", fmt)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: SimpleNamespace(free=wanted - 1))
    assert run(folder, tmp_path / "out", *more) == 2
    assert f"--out {tmp_path / 'out'} needs {wanted / 2**30:.3g} GiB, of which" in capsys.readouterr().err
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: SimpleNamespace(free=wanted))
    assert run(folder, tmp_path / "out", *more) == 0


def test_the_dry_run_counts_dense_updates_and_the_norm_of_an_embedding_as_memory(tmp_path, capsys):
    n, b, a = 60, 96, 64
    updates = {f"h.{i}.q.weight": torch.randn(b, a) for i in range(n)}
    save_file(updates, tmp_path / "updates.safetensors")
    arguments = ["--source", str(tmp_path / "updates.safetensors"), "--rank", "2", "--k", "0", "--out", str(tmp_path)]
    arguments += ["--format", "diff", "--dry-run"]
    work = 8 * (n * b * a + n * min(b, a) * (b + a) + 4 * b * a) + 4 * n * b * a

    def said():
        assert main(arguments) == 0
        return capsys.readouterr().out

    assert f"about {work / 2**20:.0f} MiB at most" in said()
    save_file(updates | {"wte.weight": torch.zeros(40_000, a)}, tmp_path / "updates.safetensors")
    assert f"about {4 * 40_000 * a / 2**20:.0f} MiB at most" in said()


@pytest.mark.parametrize(
    ("more", "exact", "said", "least", "most"),
    [
        (("--rank", "2", "--k", "0"), 1024, "4 times;", 4, 4),
        (("--rank", "2", "--k", "0", "--format", "diff"), 1024, "4 times;", 4, 4),
        (("--rank", "2", "--k", "0"), 1, "4 times;", 4, 4),
        (("--rank", "auto", "--energy", "0.9"), 1024, "8 times;", 8, 8),
        (("--rank", "auto", "--energy", "0.9"), 1, "8 times;", 8, 8),
        (("--rank", "4", "--k", "1"), 1024, "some 50 to 350 times, by the solver for the most part;", 50, 350),
        (
            ("--rank", "4", "--k", "2", "--start", "lora", "--sweeps", "10"),
            1024,
            "some 20 times, and by the solver twice or three times a sweep;",
            20,
            20 + 3 * 10,
        ),
    ],
)
def test_a_stack_is_read_as_often_as_the_dry_run_says(tmp_path, monkeypatch, capsys, more, exact, said, least, most):
    """Of 422 KiB, more than a quarter of the memory."""
    values = synthetic_stack(9, (120, 100), "power:1.5", 0.5, 0).values.float()
    save_file({f"h.{i}.q.weight": M.clone() for i, M in enumerate(values)}, tmp_path / "updates.safetensors")
    monkeypatch.setattr(extract_settings, "_EXACT", exact)
    rows, read = [], storage.FileRows.read

    def counted(part, start, stop):
        rows.append(stop - start)
        return read(part, start, stop)

    monkeypatch.setattr(storage.FileRows, "read", counted)
    arguments = ["--source", str(tmp_path / "updates.safetensors"), "--memory", str(128 * 120 * 100), "--quiet", *more]
    arguments += ["--out", str(tmp_path / "out")]
    assert main([*arguments, "--dry-run"]) == 0
    assert f"Every stack is read {said}" in capsys.readouterr().out
    assert not rows
    assert main(arguments) == 0
    assert least <= sum(rows) / (9 * 120) <= most


def test_how_long_a_lora_takes_is_extrapolated_to_all_layers():
    """Half a second for the layer that is timed, whatever it is: as many times that as there are such layers."""

    def said(shape, rank, k, target=None):
        stacks = [StackSource("q", 8, shape, None, ("h.0.q.weight",))]
        settings = ExtractSettings(rank, k, target=target)
        job = preflight.Job(Catalogue("s", stacks, []), [], settings, torch.float32, "cpu")
        return duration(job, sample_seconds=lambda job, shape: 0.5)

    assert said((512, 512), 4, 0) == "LoRA takes up to about 4 s here, reading aside, by a layer timed now."
    assert said((512, 512), None, 0, RankTarget(0.9)).startswith("LoRA takes up to about 8 s here")  # and the spectra
    assert said((1024, 1024), 4, 1).startswith("LoRA takes up to about 32 s here")
    assert said((2560, 1280), 4, 0).startswith("LoRA takes about 8 s here, and up to 125 s where singular values")
    assert said((2560, 1280), 400, 0).startswith("LoRA takes up to about 125 s here, reading")
