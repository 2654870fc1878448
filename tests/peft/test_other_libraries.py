"""TRL, bitsandbytes, torchao (extra `train`) and diffusers, where they are installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import rasa_theory as rt
from rasa_theory.peft import RasaConfig, save_as_lora
from tests.helpers.tiny_models import IDS, TINY, VOCABULARY, tiny
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


# ---- bitsandbytes


def quantised_by_bitsandbytes(bits: int, folder: Path) -> nn.Module:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes)).save_pretrained(str(folder))
    config = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_quant_type="nf4",
                                bnb_4bit_compute_dtype=torch.float32)  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(
        str(folder), quantization_config=config, dtype=torch.float32, device_map="cpu"
    )


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.filterwarnings("ignore")
def test_a_base_quantised_by_bitsandbytes_trains_merges_and_reloads(bits: int, tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    model = get_peft_model(quantised_by_bitsandbytes(bits, tmp_path / "base"),
                           RasaConfig(r=4, k=1, target_modules=["q_proj", "v_proj"], seed=0)).train()  # fmt: skip
    assert {p.dtype for p in parameters(model).values()} == {torch.float32}
    optimiser, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01), []
    for _ in range(10):
        losses.append(model(input_ids=IDS, labels=IDS).loss)
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < 0.95 * losses[0]
    after = model(input_ids=IDS).logits.detach()
    model.save_pretrained(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(quantised_by_bitsandbytes(bits, tmp_path / "base"), str(tmp_path / "adapter"))
    torch.testing.assert_close(again.train()(input_ids=IDS).logits, after, rtol=0, atol=1e-3)
    layer = layers(model)["model.layers.1.self_attn.q_proj"]
    exact = layer.get_base_weight().float() + layer.get_delta_weight("default")
    model.merge_adapter()
    error = (layer.get_base_weight().float() - exact).abs().max()
    assert float(error) < {8: 0.02, 4: 0.2}[bits] * float(exact.abs().max())  # one rounding of the quantiser
    assert float((model(input_ids=IDS).logits - after).abs().max()) < {8: 0.02, 4: 0.2}[bits] * float(after.abs().max())
    model.unmerge_adapter()
    assert not layer.merged
    if bits == 4:
        again.eval()(input_ids=IDS)
        for name, layer in layers(again).items():
            state = layer.get_base_layer().weight.quant_state
            if functional.has_avx512bf16():
                assert state.packing_format_for_cpu, name
            state.packing_format_for_cpu = True  # other processors never pack
        with pytest.raises(rt.InputError, match="has packed the 4-bit weights for the CPU"):
            again.merge_adapter()


# ---- torchao


@pytest.mark.filterwarnings("ignore")
def test_a_base_quantised_by_torchao_trains_and_says_that_it_cannot_merge() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    base = toy(torch.float32)
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


# ---- diffusers


@pytest.mark.filterwarnings("ignore")
def test_diffusers_loads_the_exact_lora_into_a_unet(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")

    def unet() -> nn.Module:
        torch.manual_seed(0)
        return diffusers.UNet2DConditionModel(
            sample_size=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=8,
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ).eval()  # fmt: skip

    def answer(model: nn.Module) -> torch.Tensor:
        torch.manual_seed(1)
        noise, text = torch.randn(1, 4, 4, 4), torch.randn(1, 3, 8)
        with torch.no_grad():
            return model(noise, torch.tensor([3]), encoder_hidden_states=text).sample

    model = perturbed(get_peft_model(unet(), RasaConfig(r=4, k=1, target_modules=["to_q", "to_v"], seed=0)))
    expected = answer(model)
    assert not torch.allclose(expected, answer(unet()), atol=1e-3)
    save_as_lora(tmp_path, model)
    loaded = unet()
    loaded.load_lora_adapter(str(tmp_path), prefix="base_model.model", weight_name="adapter_model.safetensors")
    torch.testing.assert_close(answer(loaded), expected, rtol=1e-4, atol=1e-5)


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


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.filterwarnings("ignore")
def test_the_line_of_the_guide_undoes_the_cast_of_trl(bits: int, tmp_path: Path) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    base = quantised_by_bitsandbytes(bits, tmp_path / "base")
    settings = SETTINGS | {"learning_rate": 1e-3}
    run = trl.SFTTrainer(base, trl.SFTConfig(output_dir=str(tmp_path), **settings),
                         peft_config=RasaConfig(r=4, k=1, target_modules=["q_proj"], task_type="CAUSAL_LM"),
                         train_dataset=datasets.Dataset.from_list([{"text": text(i)} for i in range(8)]),
                         processing_class=tokenizer())  # fmt: skip
    assert {p.dtype for p in parameters(run.model).values()} == {torch.bfloat16}
    run.model.base_model._cast_adapter_dtype("default")
    assert {(p.dtype, p.requires_grad) for p in parameters(run.model).values()} == {(torch.float32, True)}
    before = {key: p.detach().clone() for key, p in parameters(run.model).items()}
    run.train()
    mixing = [key for key in before if "mixing" in key]
    assert all(bool((parameters(run.model)[key] != before[key]).all()) for key in mixing)
