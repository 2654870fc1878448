"""Model families of transformers, built tiny from their configurations, each in a fraction of a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

_TEXT = {
    "vocab_size": 50, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_MOE = _TEXT | {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_ENCODER = {
    "vocab_size": 50, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 40, "pad_token_id": 0,
}  # fmt: skip
_IMAGE = {
    "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
_SEQ2SEQ = {
    "vocab_size": 50, "d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
_T5 = {"vocab_size": 50, "d_model": 24, "d_kv": 6, "d_ff": 32, "num_layers": 2, "num_heads": 4}
_QWEN_VISION = {
    "depth": 2, "hidden_size": 16, "intermediate_size": 20, "num_heads": 2, "out_hidden_size": 24, "patch_size": 4,
    "fullatt_block_indexes": [1],
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1]}
_ENDS = {"bos_token_id": 1, "eos_token_id": 2}


def _of(model: str, config: str, **settings: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**settings))


def _parts(**configs: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    return {name: getattr(transformers, config)(**settings) for name, (config, settings) in configs.items()}


def _llava() -> Any:
    parts = _parts(vision_config=("CLIPVisionConfig", _IMAGE), text_config=("LlamaConfig", _TEXT))
    return transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**parts, image_token_index=49))


def _gemma3() -> Any:
    parts = _parts(
        vision_config=("SiglipVisionConfig", _IMAGE | {"vision_use_head": False}),
        text_config=("Gemma3TextConfig", _TEXT),
    )
    return transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(**parts, mm_tokens_per_image=4))


def _qwen25_vl() -> Any:
    config = transformers.Qwen2_5_VLConfig(text_config=_TEXT | {"rope_parameters": _ROPE}, vision_config=_QWEN_VISION)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": _of("LlamaForCausalLM", "LlamaConfig", **_TEXT),
    "qwen2": _of("Qwen2ForCausalLM", "Qwen2Config", **_TEXT),
    "qwen3": _of("Qwen3ForCausalLM", "Qwen3Config", **_TEXT),
    "gemma3": _gemma3,
    "gemma3-text": _of("Gemma3ForCausalLM", "Gemma3TextConfig", **_TEXT),
    "mistral": _of("MistralForCausalLM", "MistralConfig", **_TEXT),
    "mixtral": _of("MixtralForCausalLM", "MixtralConfig", **_MOE),
    "qwen3-moe": _of("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **_MOE),
    "gpt-oss": _of("GptOssForCausalLM", "GptOssConfig", **_MOE),
    "granite-moe": _of("GraniteMoeForCausalLM", "GraniteMoeConfig", **_MOE),
    "deepseek-v3": _of(
        "DeepseekV3ForCausalLM", "DeepseekV3Config", **_TEXT | {"num_key_value_heads": 4},
        moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, q_lora_rank=8,
        kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4, first_k_dense_replace=1,
    ),
    "llama4": _of(
        "Llama4ForCausalLM", "Llama4TextConfig", **_MOE, intermediate_size_mlp=32, moe_layers=[0, 1],
        attention_chunk_size=8,
    ),
    "phi3": _of("Phi3ForCausalLM", "Phi3Config", **_TEXT),
    "gpt2": _of("GPT2LMHeadModel", "GPT2Config", vocab_size=50, n_embd=24, n_layer=2, n_head=4, n_positions=40),
    "gpt-neox": _of("GPTNeoXForCausalLM", "GPTNeoXConfig", **_ENCODER),
    "bloom": _of("BloomForCausalLM", "BloomConfig", vocab_size=50, hidden_size=24, n_layer=2, n_head=4),
    "falcon": _of(
        "FalconForCausalLM", "FalconConfig", vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=4
    ),
    "opt": _of(
        "OPTForCausalLM", "OPTConfig", vocab_size=50, hidden_size=24, ffn_dim=32, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=40, word_embed_proj_dim=24,
    ),
    "bert": _of("BertForSequenceClassification", "BertConfig", **_ENCODER),
    "modernbert": _of("ModernBertModel", "ModernBertConfig", **_ENCODER, **_ENDS,
                      cls_token_id=3, sep_token_id=4),
    "mpnet": _of("MPNetModel", "MPNetConfig", **_ENCODER),
    "deberta-v2": _of(
        "DebertaV2Model", "DebertaV2Config", **_ENCODER, relative_attention=True, pos_att_type=["p2c", "c2p"]
    ),
    "t5": _of("T5ForConditionalGeneration", "T5Config", **_T5),
    "bart": _of("BartForConditionalGeneration", "BartConfig", **_SEQ2SEQ, max_position_embeddings=40),
    "vit": _of("ViTForImageClassification", "ViTConfig", **_IMAGE),
    "dinov2": _of("Dinov2Model", "Dinov2Config", **_IMAGE),
    "swin": _of(
        "SwinForImageClassification", "SwinConfig", image_size=32, patch_size=4, embed_dim=8, depths=[2, 2],
        num_heads=[2, 4], window_size=4,
    ),
    "clip": lambda: transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=_ENCODER | {"hidden_size": 32} | _ENDS,
            vision_config=_IMAGE | {"hidden_size": 48}, projection_dim=16,
        )
    ),
    "siglip": _of("SiglipVisionModel", "SiglipVisionConfig", **_IMAGE),
    "llava": _llava,
    "qwen2.5-vl": _qwen25_vl,
    "whisper": _of(
        "WhisperForConditionalGeneration", "WhisperConfig", **_SEQ2SEQ, num_mel_bins=80, max_source_positions=20,
        max_target_positions=20,
    ),
    "wav2vec2": _of(
        "Wav2Vec2Model", "Wav2Vec2Config", **_ENCODER, conv_dim=(8, 8), conv_stride=(2, 2), conv_kernel=(3, 3),
        num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    ),
    "mamba": _of("MambaForCausalLM", "MambaConfig", vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4),
}  # fmt: skip
"""A function that builds the model, by the name of the family."""


_NO_HEAD_DIM = {name: value for name, value in _MOE.items() if name != "head_dim"}
OTHERS: dict[str, Callable[[], Any]] = {
    "qwen2-moe": _of("Qwen2MoeForCausalLM", "Qwen2MoeConfig", **_MOE, shared_expert_intermediate_size=16),
    "qwen3-next": _of(
        "Qwen3NextForCausalLM", "Qwen3NextConfig", **_MOE, linear_num_key_heads=2, linear_num_value_heads=2,
        linear_key_head_dim=6, linear_value_head_dim=6, shared_expert_intermediate_size=16,
        layer_types=["linear_attention", "full_attention"],
    ),
    "jamba": _of(
        "JambaForCausalLM", "JambaConfig", **_NO_HEAD_DIM, attn_layer_period=2, attn_layer_offset=1,
        expert_layer_period=2, expert_layer_offset=1, mamba_d_state=4, mamba_dt_rank=4,
    ),
    "mpt": _of("MptForCausalLM", "MptConfig", vocab_size=50, d_model=24, n_heads=4, n_layers=2),
    "albert": _of("AlbertModel", "AlbertConfig", **_ENCODER, embedding_size=16),
    "longformer": _of("LongformerModel", "LongformerConfig", **_ENCODER, attention_window=8),
    "segformer": _of(
        "SegformerForSemanticSegmentation", "SegformerConfig", hidden_sizes=[8, 16], depths=[1, 2],
        num_encoder_blocks=2, num_attention_heads=[1, 2], sr_ratios=[2, 1], patch_sizes=[3, 3], strides=[2, 2],
        mlp_ratios=[2, 2], decoder_hidden_size=16,
    ),
    "convnext": _of("ConvNextModel", "ConvNextConfig", hidden_sizes=[8, 16], depths=[1, 2], num_stages=2),
    "rwkv": _of(
        "RwkvForCausalLM", "RwkvConfig", vocab_size=50, hidden_size=16, num_hidden_layers=2, attention_hidden_size=16,
        intermediate_size=32,
    ),
}  # fmt: skip
"""Models of other layouts: layers shared or of unequal kinds, mixtures beside shared experts, convolutions."""


def changed_pair(model: Any, folder: Any, size: float = 0.01) -> tuple[dict[str, Any], dict[str, Any]]:
    """Save a model under base/, change every parameter, save it under tuned/; return the state dicts of both."""
    generator = torch.Generator().manual_seed(1)
    model.save_pretrained(folder / "base")
    before = {name: tensor.double().clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder / "tuned")
    return before, {name: tensor.double().clone() for name, tensor in model.state_dict().items()}
