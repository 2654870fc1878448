"""TRL, bitsandbytes and torchao, where they are installed (extra `train`)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import rasa_theory as rt
from rasa_theory.peft import RasaConfig
from tests.helpers.tiny_models import TINY, VOCABULARY, tiny
from tests.peft.toy import data, layers, parameters, perturbed, toy


def trained(model: nn.Module, dtype: torch.dtype = torch.float32) -> list[float]:
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(10):
        loss = (model(data(dtype)) - data(dtype, seed=7)).float().square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def wide_toy(dtype: torch.dtype = torch.float32) -> nn.Module:
    """The toy with sides that quantisers accept."""
    torch.manual_seed(0)
    model = toy()
    for block in model.layers:
        block.up, block.down = nn.Linear(6, 64), nn.Linear(64, 6, bias=False)
    return model.to(dtype)


# ---- bitsandbytes


def quantised_by_bitsandbytes(bits: int) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    model = wide_toy()
    for block in model.layers:
        old = block.up
        if bits == 8:
            block.up = bnb.nn.Linear8bitLt(6, 64, has_fp16_weights=False)
        else:
            block.up = bnb.nn.Linear4bit(6, 64, compute_dtype=torch.float32, quant_type="nf4")
        block.up.load_state_dict(old.state_dict())
        block.up = block.up.to("cpu")
    return model


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.filterwarnings("ignore")
def test_a_base_quantised_by_bitsandbytes_trains_merges_and_reloads(bits: int, tmp_path: Path) -> None:
    base = quantised_by_bitsandbytes(bits)
    with torch.no_grad():
        before = base(data(torch.float32))
    model = get_peft_model(base, RasaConfig(r=4, k=1, target_modules=["up"], seed=0))
    assert {p.dtype for p in parameters(model).values()} == {torch.float32}
    with torch.no_grad():
        torch.testing.assert_close(model(data(torch.float32)), before)
    losses = trained(model)
    assert losses[-1] < losses[0]
    after = model(data(torch.float32)).detach()
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(quantised_by_bitsandbytes(bits), str(tmp_path))
    torch.testing.assert_close(again(data(torch.float32)), after)
    layer = layers(model)["layers.1.up"]
    exact = layer.get_base_weight().float() + layer.get_delta_weight("default")
    model.merge_adapter()
    error = (layer.get_base_weight().float() - exact).abs().max()
    assert float(error) < {8: 0.02, 4: 0.2}[bits] * float(exact.abs().max())  # one rounding of the quantiser
    model.unmerge_adapter()
    assert not layer.merged


# ---- torchao


@pytest.mark.filterwarnings("ignore")
def test_a_base_quantised_by_torchao_trains_and_says_that_it_cannot_merge() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    base = wide_toy()
    quantization.quantize_(base, quantization.Int8WeightOnlyConfig())
    model = get_peft_model(base, RasaConfig(r=4, k=1, target_modules=["up"], seed=0))
    losses = trained(model)
    assert losses[-1] < losses[0]
    with pytest.raises(rt.InputError, match="does not say how its torchao weights were quantised"):
        model.merge_adapter()


@pytest.mark.filterwarnings("ignore")
def test_a_model_of_transformers_quantised_by_torchao_is_merged(tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import AutoModelForCausalLM, TorchAoConfig

    tiny("llama").save_pretrained(str(tmp_path))
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    base = AutoModelForCausalLM.from_pretrained(str(tmp_path), quantization_config=config, dtype=torch.float32)
    model = get_peft_model(base.eval(), RasaConfig(r=4, k=1, target_modules=["q_proj"], seed=0))
    perturbed(model)
    expected = TINY["llama"].answer(model).detach()
    layer = layers(model)["model.layers.1.self_attn.q_proj"]
    exact = layer.get_base_weight() + layer.get_delta_weight("default")
    model.merge_adapter()
    assert float((layer.get_base_weight() - exact).abs().max()) < 0.02 * float(exact.abs().max())
    assert float((TINY["llama"].answer(model) - expected).abs().max()) < 0.1 * float(expected.abs().max())


# ---- TRL


def tokenizer() -> object:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCABULARY))])}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


SETTINGS = {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True, "bf16": False,
            "disable_tqdm": True, "learning_rate": 1e-2, "logging_steps": 1}  # fmt: skip


def text(i: int) -> str:
    return " ".join(f"w{3 + (i + j) % 20}" for j in range(6))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_supervised_fine_tuning_with_trl(tmp_path: Path) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    config = RasaConfig(r=4, k=1, target_modules=["q_proj"], task_type="CAUSAL_LM")
    run = trl.SFTTrainer(tiny("llama"), trl.SFTConfig(output_dir=str(tmp_path), **SETTINGS), peft_config=config,
                         train_dataset=datasets.Dataset.from_list([{"text": text(i)} for i in range(8)]),
                         processing_class=tokenizer())  # fmt: skip
    assert isinstance(run.model, PeftModel)
    run.train()
    run.save_model(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(tiny("llama"), str(tmp_path / "adapter"))
    assert torch.equal(TINY["llama"].answer(again), TINY["llama"].answer(run.model.eval()))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_preferences_with_trl_need_no_second_model(tmp_path: Path) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    config = RasaConfig(r=4, k=1, target_modules=["q_proj"], task_type="CAUSAL_LM")
    rows = [{"prompt": text(i), "chosen": text(i + 1), "rejected": text(i + 5)} for i in range(8)]
    run = trl.DPOTrainer(tiny("llama"), args=trl.DPOConfig(output_dir=str(tmp_path), **SETTINGS), peft_config=config,
                         train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer())  # fmt: skip
    assert run.ref_model is None
    run.train()
    first = next(entry["loss"] for entry in run.state.log_history if "loss" in entry)
    assert first == pytest.approx(torch.log(torch.tensor(2.0)).item(), rel=1e-4)  # policy = reference at the start
