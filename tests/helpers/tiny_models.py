"""Tiny models of transformers from their configurations, with the modules to adapt and inputs; no download."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = 32
IDS = torch.arange(3, 15).reshape(2, 6)
_DECODER = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip

_EXPERTS = {"num_local_experts": 2, "experts_implementation": "eager"}  # the others take no float64


class Tiny(NamedTuple):
    """A model, the modules to adapt, the names of its pools, and a function from the model to one tensor."""

    build: Callable[[], nn.Module]
    targets: list[str]
    pools: list[str]
    answer: Callable[[nn.Module], Tensor]


def _causal(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


def _t5(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, decoder_input_ids=IDS).logits


def _clip(model: nn.Module) -> Tensor:
    pixels = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8).to(next(model.parameters()).dtype)
    out = model(input_ids=IDS, pixel_values=pixels)
    return torch.cat([out.text_embeds, out.image_embeds])


def _build_clip() -> nn.Module:
    tower = {"num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 8}
    text = tower | {"vocab_size": VOCABULARY, "hidden_size": 12, "intermediate_size": 20,
                    "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
    vision = tower | {"hidden_size": 16, "intermediate_size": 20, "image_size": 8, "patch_size": 4}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


TINY = {
    "llama": Tiny(lambda: LlamaForCausalLM(LlamaConfig(**_DECODER)), ["q_proj", "v_proj", "down_proj"],
                  ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"], _causal),
    "qwen2": Tiny(lambda: Qwen2ForCausalLM(Qwen2Config(**_DECODER, tie_word_embeddings=True)), ["q_proj", "up_proj"],
                  ["self_attn.q_proj", "mlp.up_proj"], _causal),
    "gpt2": Tiny(lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=3, n_head=2,
                                                    n_positions=32, bos_token_id=1, eos_token_id=2)),
                 ["c_attn", "mlp.c_proj"], ["attn.c_attn", "mlp.c_proj"], _causal),
    "bert": Tiny(lambda: BertForSequenceClassification(
                     BertConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
                                intermediate_size=24, num_labels=3)),
                 ["query", "attention.output.dense"], ["attention.self.query", "attention.output.dense"], _causal),
    "t5": Tiny(lambda: T5ForConditionalGeneration(
                   T5Config(vocab_size=VOCABULARY, d_model=12, d_kv=6, d_ff=20, num_layers=2, num_heads=2,
                            decoder_start_token_id=0)),
               ["SelfAttention.q", "wo"],
               ["encoder.block.layer.0.SelfAttention.q", "decoder.block.layer.0.SelfAttention.q",
                "layer.1.DenseReluDense.wo", "layer.2.DenseReluDense.wo"], _t5),
    "mixtral": Tiny(lambda: MixtralForCausalLM(MixtralConfig(**_DECODER, **_EXPERTS)), ["q_proj", "o_proj"],
                    ["self_attn.q_proj", "self_attn.o_proj"], _causal),
    "clip": Tiny(_build_clip, ["q_proj", "fc1"],
                 ["text_model.encoder.layers.self_attn.q_proj", "vision_model.encoder.layers.self_attn.q_proj",
                  "text_model.encoder.layers.mlp.fc1", "vision_model.encoder.layers.mlp.fc1"], _clip),
}  # fmt: skip


def tiny(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model of this name with the same random weights each time, in evaluation mode."""
    torch.manual_seed(0)
    return TINY[name].build().to(dtype).eval()
