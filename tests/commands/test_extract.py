"""From two checkpoints to an adapter: PEFT loads it, the report says what it misses, and nothing is lost on the way."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from rasa_theory.commands import reconstruct
from rasa_theory.commands.extract import main
from rasa_theory.sources import open_source
from tests.helpers.models import base_model, bert, gpt2, logits, mixtral, report_of, run, saved_pair

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.mark.parametrize("more", [("--k", "0"), ("--format", "lora-exact-rasa", "--k", "1", "--start", "allocation")])
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


def test_a_model_whose_layers_are_called_otherwise(tmp_path):
    tuned = saved_pair(tmp_path, bert, "encoder.layer.")
    assert run(tmp_path, tmp_path / "out", "--rank", "24", "--k", "0") == 0
    model = peft.PeftModel.from_pretrained(base_model(transformers.BertModel, tmp_path), tmp_path / "out")
    assert torch.allclose(logits(model), logits(tuned), atol=1e-5)
    kinds = {row["kind"] for row in report_of(tmp_path / "out")["stacks"]}
    assert {"attention.self.query", "attention.output.dense", "output.dense"} <= kinds


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


def test_a_mixture_of_experts_with_grouped_queries(tmp_path):
    """Attention goes into the adapter, narrow keys and values too, and the experts of a layer as one parameter."""
    tuned = saved_pair(tmp_path, mixtral, ".layers.")
    assert run(tmp_path, tmp_path / "all", "--rank", "3", "--k", "0") == 0
    rows = {row["name"]: row for row in report_of(tmp_path / "all")["stacks"]}
    experts = [f"model.layers.{i}.mlp.experts.{name}" for i in range(2) for name in ("gate_up_proj", "down_proj")]
    assert [rows[name]["ranks"] for name in experts] == [{name: 3} for name in experts]
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


@pytest.mark.slow
def test_the_authors_layout_alone_gives_the_error_in_the_report(llamas, tmp_path):
    folder, tuned = llamas
    few = ("--modules", "*q_proj*", "--modules", "*down_proj*")
    assert run(folder, tmp_path, "--rank", "3", "--k", "1", "--format", "rasa", "--sweeps", "4", *few) == 0
    tensors, config = (
        load_file(tmp_path / "adapter_model.safetensors"),
        json.loads((tmp_path / "adapter_config.json").read_text()),
    )
    assert (config["peft_type"], config["r"], config["rasa_k"]) == ("RASA", 3, 1)
    before, after = base_model(transformers.LlamaForCausalLM, folder).state_dict(), tuned.state_dict()
    for row in report_of(tmp_path)["stacks"]:
        kind = row["kind"].replace(".", "__")
        shared_A, shared_B = (tensors[f"base_model.rasa_shared_{s}.{kind}.weight"].double() for s in "AB")
        for module in row["modules"]:
            name = module["module"]
            A, B, d = (tensors[f"base_model.model.{name}.rasa_{s}.weight"].double() for s in ("A", "B", "mixing"))
            update = torch.cat([B, shared_B], 1) * d @ torch.cat([A, shared_A])
            M = after[f"{name}.weight"].double() - before[f"{name}.weight"].double()
            assert float(((M - update) ** 2).sum()) == pytest.approx(module["e_stored"], rel=1e-4)
        assert row["e_rasa"] < row["e_lora"]


def test_dense_differences_of_conv1d_lie_as_the_checkpoint_has_them(tmp_path):
    tuned = saved_pair(tmp_path, gpt2, ".h.")
    few = ("--modules", "*c_proj*", "--rank", "24", "--k", "0", "--format", "diff")
    assert run(tmp_path, tmp_path / "out", *few) == 0
    index = json.loads((tmp_path / "out" / "diff.safetensors.index.json").read_text())["weight_map"]
    before, after = base_model(transformers.GPT2LMHeadModel, tmp_path).state_dict(), tuned.state_dict()
    for key, file in index.items():
        assert torch.allclose(before[key] + load_file(tmp_path / "out" / file)[key], after[key], atol=1e-6)
    assert all(row["e_stored"] <= 1e-9 for row in report_of(tmp_path / "out")["stacks"])


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
    assert not (tmp_path / "out").exists()


def test_the_model_of_a_pair_is_named_and_of_updates_there_is_none(tmp_path, capsys):
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "tuned"):
        weights = {f"h.{i}.q.weight": torch.randn(9, 8, generator=generator) for i in range(2)}
        save_file(weights, tmp_path / f"{name}.safetensors")
    pair = ["--base", str(tmp_path / "base.safetensors"), "--tuned", str(tmp_path / "tuned.safetensors")]
    source = ["--source", str(tmp_path / "tuned.safetensors")]
    for n, (words, said) in enumerate((([*pair, "--base-name", "org/model"], True), (source, False))):
        assert main([*words, "--rank", "2", "--quiet", "--out", str(tmp_path / str(n))]) == 0
        assert ("It belongs to org/model; the numbers" in " ".join(capsys.readouterr().out.split())) == said


@pytest.mark.slow
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
    arguments += ["--effort", "quick"]
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


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--format", "diff", "--k", "1"], "k must be 0 for format diff, which has no ranks"),
        (["--exclude", "nothing*"], "no stack matches --exclude 'nothing*'; there are"),
        (["--exclude", "*"], "--exclude leaves no stack; name fewer"),
        (["--format", "kohya", "--save-modules"], "format kohya has no modules_to_save; write lora or lora-exact-rasa"),
        (["--format", "rasa", "--k", "0"], "k must be at least 1 for format rasa"),
        (["--k", "-1"], "shared_rank must be at least 0, got -1 (--k)"),
        (["--k", "40"], "shared_rank 40 exceeds rank 16 (--k)"),
        (["--rank", "auto"], "--rank auto needs exactly one of --energy, --error and --parameters"),
        (["--energy", "0.9"], "--energy goes with --rank auto"),
        (["--rank", "auto", "--energy", "2"], "energy must be above 0 and at most 1, got 2.0"),
        (["--rank", "auto", "--energy", "0.9", "--k", "1"], "a pool needs equal ones"),
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
    assert err.count("\n") == 1


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
            f"{adapter} is the folder of an adapter, not a model; merge it into its base first, or give"
            in capsys.readouterr().err
        )
    shutil.copy(tmp_path / "adapter" / "adapter_config.json", tmp_path)
    save_file({f"layers.{i}.q.weight": torch.ones(4, 3) for i in range(2)}, tmp_path / "model.safetensors")
    beside = open_source(base=str(tmp_path), tuned=str(tmp_path))  # a model beside the configuration of an adapter
    assert len(beside.stacks) == 1
    assert main(["--base", "nowhere", "--tuned", "neither", "--out", str(tmp_path / "out")]) == 2
    assert "'nowhere' and 'neither' do not exist; give a .safetensors file or a dir" in capsys.readouterr().err


def test_there_is_no_default_source(tmp_path, capsys):
    assert main(["--rank", "2", "--out", str(tmp_path / "out")]) == 2
    assert "give --base and --tuned, two checkpoints, or --source" in capsys.readouterr().err


def test_a_single_matrix_goes_along_and_what_has_not_changed_does_not(tmp_path, capsys):
    """The classifier of a BERT, and one kind of matrix in its layers; report.json names its embeddings."""
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
    assert "left out" not in said.err
    left_out = {one["name"] for one in report_of(tmp_path / "out")["left_out"]}
    assert "bert.embeddings.position_embeddings.weight" in left_out
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
    assert report["source"] in (tmp_path / "out" / "README.md").read_text()
    head, other = tmp_path / {"base": "tuned", "tuned": "base"}[headless], tmp_path / headless
    reason = f"in {head} but not in {other}"
    assert {"name": "classifier.weight", "reason": reason, "unknown": True} in report["left_out"]
    base = base_model(type(saved["base"]), tmp_path)
    merged = peft.PeftModel.from_pretrained(base, tmp_path / "out").merge_and_unload()
    found = merged if headless == "base" else merged.bert
    for key, weight in with_head.bert.state_dict().items():
        assert torch.allclose(found.state_dict()[key], weight, atol=1e-5)


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
