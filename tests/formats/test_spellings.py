"""The table of spellings: module and side of a key, kohya's names, and what belongs to another format of adapter."""

import importlib
import pkgutil

import pytest

from rasa_theory.formats.spellings import Side, Spelling, adapter_format, foreign, kohya_module, kohya_name, spelt

ATTENTION = "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1"


@pytest.mark.parametrize(
    ("key", "spelling", "module", "sides"),
    [
        ("base_model.model.model.layers.0.q.lora_{}.weight", Spelling.PEFT, "model.layers.0.q", "AB"),
        ("base_model.model.model.layers.0.q.lora_{}.default.weight", Spelling.PEFT, "model.layers.0.q", "AB"),
        ("transformer.transformer_blocks.3.attn.to_q.lora_{}.weight", Spelling.PEFT,
         "transformer.transformer_blocks.3.attn.to_q", "AB"),
        ("lora_te_encoder_layers_0_q.lora_{}.weight", Spelling.KOHYA, "lora_te_encoder_layers_0_q", ("down", "up")),
        ("diffusion_model.blocks.0.q.lora_{}.weight", Spelling.KOHYA, "diffusion_model.blocks.0.q", ("down", "up")),
        (ATTENTION + ".processor.to_q_lora.{}.weight", Spelling.DIFFUSERS, ATTENTION + ".to_q", ("down", "up")),
        (ATTENTION + ".processor.to_out_lora.{}.weight", Spelling.DIFFUSERS, ATTENTION + ".to_out.0", ("down", "up")),
        (ATTENTION + ".to_out.0.lora.{}.weight", Spelling.DIFFUSERS, ATTENTION + ".to_out.0", ("down", "up")),
        ("text_encoder.layers.0.q_proj.lora_linear_layer.{}.weight", Spelling.DIFFUSERS, "text_encoder.layers.0.q_proj",
         ("down", "up")),
        ("text_encoder.layers.0.self_attn.to_out_lora.{}.weight", Spelling.DIFFUSERS,
         "text_encoder.layers.0.self_attn.out_proj", ("down", "up")),
        ("double_blocks.7.processor.qkv_lora2.{}.weight", Spelling.XLABS, "double_blocks.7.txt_attn.qkv",
         ("down", "up")),
        ("double_blocks.7.processor.proj_lora1.{}.weight", Spelling.XLABS, "double_blocks.7.img_attn.proj",
         ("down", "up")),
        ("model.layers.0.self_attn.q_proj.lora_{}", Spelling.MLX, "model.layers.0.self_attn.q_proj", "ab"),
        ("layers.0.attn.q_proj.lora_{}.weight", Spelling.TORCHTUNE, "layers.0.attn.q_proj", "ab"),
        ("decoder.layers.7.mlp.linear_fc1.adapter.linear_{}.weight", Spelling.NEMO, "decoder.layers.7.mlp.linear_fc1",
         ("in", "out")),
    ],
)  # fmt: skip
def test_the_sides_of_a_module(key, spelling, module, sides):
    for side, expected in zip(sides, (Side.A, Side.B), strict=True):
        place = spelt(key.format(side))
        assert (place.spelling, place.module, place.side) == (spelling, module, expected)
        assert adapter_format(key.format(side)) == f"LoRA as {spelling.value} spells it"


def test_an_alpha_alone_makes_no_adapter():
    assert spelt("layers.0.mlp.act.alpha").side is Side.ALPHA
    assert adapter_format("layers.0.mlp.act.alpha") is None


@pytest.mark.parametrize(
    ("key", "module", "word"),
    [
        ("lora_unet_mid_block_q.hada_w1_a", "lora_unet_mid_block_q", "LoHa"),
        ("lora_unet_mid_block_q.lokr_w2", "lora_unet_mid_block_q", "LoKr"),
        ("lora_unet_mid_block_q.lora_mid.weight", "lora_unet_mid_block_q", "Tucker"),
        ("lora_unet_mid_block_q.dora_scale", "lora_unet_mid_block_q", "DoRA"),
        ("lora_unet_mid_block_q.oft_blocks", "lora_unet_mid_block_q", "OFT"),
        ("lora_unet_mid_block_q.a1.weight", "lora_unet_mid_block_q", "LyCORIS"),
        ("lora_te1_layers_0_q.scalar", "lora_te1_layers_0_q", "LyCORIS"),
        ("base_model.model.layers.0.adaption_prompt", "layers.0", "not LoRA"),
        ("base_model.model.q.oft_R.weight", "q", "OFT"),
        ("base_model.model.q.boft_R", "q", "OFT"),
        ("base_model.model.q.ia3_l", "q", "IA3"),
        ("base_model.model.q.vera_lambda_b", "q", "VeRA"),
        ("base_model.vera_A", "base_model", "VeRA"),
        ("base_model.model.q.vblora_logits_A", "q", "VB-LoRA"),
        ("base_model.model.q.fourierft_spectrum", "q", "Fourier"),
        ("base_model.model.q.lora_E", "q", "AdaLoRA"),
        ("base_model.model.q.lora_magnitude_vector", "q", "DoRA"),
        ("base_model.model.embed.lora_embedding_A", "embed", "embedding"),
        ("base_model.model.q.randlora_lambda", "q", "not LoRA"),
        ("base_model.model.q.lora_A", "q", "LoRA"),
        ("base_model.model.layers.0.q.rasa_A.weight", "layers.0.q", "RaSA"),
        ("rasa_adapters.default.kinds.q.private_B.0", "", "RaSA"),
    ],
)
def test_tensors_of_other_formats(key, module, word):
    other = foreign(key)
    assert other.module == module
    assert word in other.what
    assert adapter_format(key) == other.what


@pytest.mark.parametrize(
    "name",
    ["layers.0.q.weight", "my.lora_Alpha", "colora_A.weight", "h.0.diff", "layers.0.A", "layers.0.on_inputs.weight",
     "base_layer.weight", "encoder.flora_down.weight", "layers.0.attn.w_lora.lora.0.weight", "layers.0.g_lora.weight",
     "road_head.weight", "layers.0.poly_attention.q.weight", "bone_embedding.weight", "miss_token",
     "lora_unet_mid_block_q.diff",
     "shadow_net.weight", "exploration.weight", "lora_unet_conv_in.diff", "layers.0.lorax.weight"],
)  # fmt: skip
def test_names_of_no_adapter(name):
    assert adapter_format(name) is None


def test_the_parameters_of_the_installed_peft_are_all_known():
    """Adapters of every tuner are told from updates by each of their keys, also in a file without configuration."""
    peft = pytest.importorskip("peft")
    names = set()
    for found in pkgutil.walk_packages(peft.tuners.__path__, f"{peft.tuners.__name__}."):
        if found.name.endswith(("layer", "layers")):
            for kind in vars(importlib.import_module(found.name)).values():
                own = getattr(kind, "adapter_layer_names", ())
                names |= set(own if isinstance(own, tuple) else ())
    assert len(names) > 50
    of_no_tensor = {"lora_dropout", "lora_variant", "shadow_dropout"}
    assert {name for name in names - of_no_tensor if adapter_format(f"layers.0.q.{name}.weight") is None} == set()


@pytest.mark.parametrize(
    ("name", "dotted"),
    [
        ("lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_q",
         "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q"),
        ("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0",
         "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"),
        ("lora_unet_up_blocks_1_attentions_2_transformer_blocks_0_ff_net_0_proj",
         "unet.up_blocks.1.attentions.2.transformer_blocks.0.ff.net.0.proj"),
        ("lora_unet_up_blocks_1_attentions_2_proj_in", "unet.up_blocks.1.attentions.2.proj_in"),
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k",
         "unet.input_blocks.4.1.transformer_blocks.0.attn1.to_k"),
        ("lora_unet_double_blocks_3_img_attn_qkv", "unet.double_blocks.3.img_attn.qkv"),
        ("lora_unet_single_blocks_10_linear1", "unet.single_blocks.10.linear1"),
        ("lora_unet_double_blocks_3_txt_mod_lin", "unet.double_blocks.3.txt_mod.lin"),
        ("lora_unet_blocks_0_self_attn_q", "unet.blocks.0.self_attn.q"),
        ("lora_transformer_single_transformer_blocks_0_proj_mlp",
         "transformer.single_transformer_blocks.0.proj_mlp"),
        ("lora_te_text_model_encoder_layers_11_self_attn_q_proj",
         "text_encoder.text_model.encoder.layers.11.self_attn.q_proj"),
        ("lora_te2_text_model_encoder_layers_3_mlp_fc1", "text_encoder_2.text_model.encoder.layers.3.mlp.fc1"),
        ("lora_te3_encoder_block_0_layer_0_SelfAttention_k",
         "text_encoder_3.encoder.block.0.layer.0.SelfAttention.k"),
        ("lora_te3_encoder_block_0_layer_1_DenseReluDense_wi_0",
         "text_encoder_3.encoder.block.0.layer.1.DenseReluDense.wi_0"),
        ("lora_unet_blocks_0_strange_part_q", "lora_unet_blocks_0_strange_part_q"),
        ("model.layers.0.q", "model.layers.0.q"),
    ],
)  # fmt: skip
def test_kohyas_names_of_modules(name, dotted):
    assert kohya_module(name) == dotted
    if name.startswith("lora_"):
        assert kohya_name(dotted, "lora_unet_") == name


def test_modules_of_no_part_of_a_pipeline_get_the_prefix():
    assert kohya_name("down_blocks.0.proj_in", "lora_unet_") == "lora_unet_down_blocks_0_proj_in"
    assert kohya_name("encoder.layers.0.mlp.fc1", "lora_te_") == "lora_te_encoder_layers_0_mlp_fc1"


def test_kohyas_names_are_those_of_a_text_encoder():
    """Dotted names of all Linear layers of CLIP come back from their underscores."""
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.CLIPTextModelWithProjection(config)
    names = [name for name, module in model.named_modules() if type(module).__name__ == "Linear"]
    assert len(names) > 12
    for name in names:
        assert kohya_module("lora_te1_" + name.replace(".", "_")) == f"text_encoder_1.{name}"
