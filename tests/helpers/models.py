"""Small models of transformers, saved before and after a change, and the extraction command applied to them."""

import json
from pathlib import Path

import jsonschema
import pytest
import torch

import rasa_theory
from rasa_theory.commands.extract import main

transformers = pytest.importorskip("transformers")

SCHEMA = json.loads((Path(rasa_theory.__file__).parent / "data" / "report.schema.json").read_text(encoding="utf-8"))
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


def gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, n_embd=24, n_layer=2, n_head=4))


def mixtral():
    config = transformers.MixtralConfig(
        vocab_size=50, hidden_size=24, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def saved_pair(folder, build, layers):
    """The model before and after a change of all matrices in its layers, in shards that differ; base and tuned."""
    torch.manual_seed(0)
    model = build().eval()
    model.save_pretrained(folder / "base", max_shard_size="20KB")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if layers in name and weight.ndim in (2, 3):
                weight.add_(0.05 * torch.randn_like(weight))
    model.save_pretrained(folder / "tuned", max_shard_size="33KB")
    return model


def base_model(kind, folder):
    return kind.from_pretrained(folder / "base").eval()


def logits(model):
    with torch.no_grad():
        return model(IDS)[0]


def run(folder, out, *more):
    pair = ["--base", str(folder / "base"), "--tuned", str(folder / "tuned")]
    effort = () if "--start" in more else ("--effort", "quick")
    return main([*pair, "--out", str(out), "--quiet", *effort, *more])


def report_of(out):
    """The report of an extraction, which follows its schema."""
    report = json.loads((out / "report.json").read_text())
    jsonschema.validate(report, SCHEMA)
    return report


def options(fmt="lora"):
    """Of an extraction that searches for nothing, so that it is quick."""
    return ("--rank", "2", "--start", "allocation", "--sweeps", "2", "--modules", "*self_attn*", "--format", fmt)
