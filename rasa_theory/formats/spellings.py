"""Spellings of adapters: which tensor of a file is which factor of which module, in the keys of every known tool.

One table for all of them. A key that the table knows is never the key of an update.
"""

from __future__ import annotations

import functools
import re
from enum import Enum
from typing import NamedTuple

from rasa_theory.formats.names import PEFT_PREFIX


class Spelling(Enum):
    """The tools whose keys name factors A and B; the value is what a sentence calls the format."""

    PEFT = "PEFT"
    KOHYA = "kohya"
    DIFFUSERS = "diffusers"
    XLABS = "XLabs"
    MLX = "MLX"
    TORCHTUNE = "torchtune"
    NEMO = "NeMo"


class Side(Enum):
    """What a tensor is to its module: a factor, or the alpha of both."""

    A = "A"
    B = "B"
    ALPHA = "alpha"


class Key(NamedTuple):
    """A key that is spelt as a factor, or the alpha, of a module. `adapter`: the name of the adapter in the key."""

    spelling: Spelling
    module: str
    side: Side
    adapter: str | None = None


class _Rule(NamedTuple):
    """The end of a key: `stem` before it is the module, followed by `within`, filled from the groups of the match."""

    spelling: Spelling
    end: re.Pattern[str]
    sides: dict[str, Side]
    within: dict[str, str]


_DOWN_UP = {"down": Side.A, "up": Side.B}
_PROCESSED = {
    "to_q": ".to_q", "to_k": ".to_k", "to_v": ".to_v", "to_out": ".to_out.0",
    "add_k_proj": ".add_k_proj", "add_v_proj": ".add_v_proj",
}  # fmt: skip
_TEXT_ENCODER = {"to_q": ".q_proj", "to_k": ".k_proj", "to_v": ".v_proj", "to_out": ".out_proj"}
_XLABS = {"qkv_lora1": ".img_attn.qkv", "proj_lora1": ".img_attn.proj", "qkv_lora2": ".txt_attn.qkv",
          "proj_lora2": ".txt_attn.proj"}  # fmt: skip


def _rule(spelling: Spelling, end: str, sides: dict[str, Side], within: dict[str, str] | None = None) -> _Rule:
    return _Rule(spelling, re.compile(end), sides, within or {})


_RULES = (
    _rule(Spelling.PEFT, r"\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight\Z", {"A": Side.A, "B": Side.B}),
    _rule(Spelling.KOHYA, r"\.lora_(?P<side>down|up)(?:\.(?P<adapter>[^.]+))?\.weight\Z", _DOWN_UP),
    _rule(Spelling.DIFFUSERS, r"\.lora(?:_linear_layer)?\.(?P<side>down|up)\.weight\Z", _DOWN_UP),
    _rule(
        Spelling.DIFFUSERS,
        rf"\.processor\.(?P<part>{'|'.join(_PROCESSED)})_lora\.(?P<side>down|up)\.weight\Z",
        _DOWN_UP,
        _PROCESSED,
    ),
    _rule(
        Spelling.DIFFUSERS,
        rf"\.(?P<part>{'|'.join(_TEXT_ENCODER)})_lora\.(?P<side>down|up)\.weight\Z",
        _DOWN_UP,
        _TEXT_ENCODER,
    ),
    _rule(Spelling.XLABS, rf"\.processor\.(?P<part>{'|'.join(_XLABS)})\.(?P<side>down|up)\.weight\Z", _DOWN_UP, _XLABS),
    _rule(Spelling.MLX, r"\.lora_(?P<side>[ab])\Z", {"a": Side.A, "b": Side.B}),
    _rule(Spelling.TORCHTUNE, r"\.lora_(?P<side>[ab])\.weight\Z", {"a": Side.A, "b": Side.B}),
    _rule(Spelling.NEMO, r"\.adapter\.linear_(?P<side>in|out)\.weight\Z", {"in": Side.A, "out": Side.B}),
)
_ALPHA = re.compile(r"\.alpha\Z")

_RASA = r"rasa_(?:(?:shared|private|pool)_)?(?:A|B|D|mixing)|rasa_adapters"

_OTHERS = {
    r"lora_E|ranknum": "AdaLoRA, whose update has a diagonal between its factors",
    r"lora_embedding_[AB]": "LoRA of an embedding",
    r"lora_magnitude_vector|dora_scale": "DoRA, which also scales the columns of the sum",
    r"lora_diag": "KaSA",
    r"lora_mid": "LoRA of a convolution in three factors (Tucker)",
    r"hada_(?:w[12]_[ab]|t[12])": "LoHa, a product of two products entry by entry",
    r"lokr_(?:w[12](?:_[ab])?|t2)": "LoKr, a Kronecker product",
    r"b?oft_\w+": "OFT, which turns the weight",
    r"ia3_\w+|on_input": "IA3, which scales inputs or outputs",
    r"p?vera_(?:lambda_\w+|[AB])": "VeRA, whose random factors are not in the file",
    r"vblora_\w+": "VB-LoRA",
    r"fourierft_\w+|waveft_\w+": "an adapter in Fourier space",
    r"(?:randlora|gralora|delora|glora|supertuning|tinylora|unilora|hra|c3a|shira|hira|psoft|adamss|peanut|frod|osf)_\w+":
        "an adapter that is not LoRA",
    # names that begin with a word of English are given in full: a model may have a road_head
    r"poly_(?:lora_[AB]|router)|lily_(?:A|B|router)|road_(?:theta|alpha)|shadow_(?:down|up|update_transform|update_gate)":
        "an adapter that is not LoRA",
    r"adaption_(?:prompt|gate)|miss_block|bone_block|deft_[PR]|beft_bias|ln_tuning_layers|lora_monteclora_sampler":
        "an adapter that is not LoRA",
    _RASA: "RaSA",
    r"token_adapter|trainable_tokens_delta": "trained rows of an embedding",
    # w_lora.lora.0 is a Linear layer of RWKV
    r"lora_(?:A|B|a|b|down|up|linear_layer)|\w+_lora[12]?\.(?:down|up)": "LoRA",
    r"(?i:lora[ab12]|lora_[qkvo]|(?:\w+_)?lora_(?:[a-z]{1,4}_)?(?:[ab]|[0-9]|in|out|down|up|left|right|layer)(?:_weight)?)":
        "LoRA in a spelling that is not known",
}  # fmt: skip
"""What an adapter is by a component of its keys, or by two components with the dot between them."""
_OTHER = [(re.compile(names), what) for names, what in _OTHERS.items()]
_RASA_COMPONENT = re.compile(_RASA)


def spelt(name: str) -> Key | None:
    """The factor or alpha that a key is, by the table of spellings; None if it is neither A nor B of a linear layer.

    An alpha has the same spelling as kohya's; which tool wrote it, its module's factors say.
    """
    for rule in _RULES:
        if (match := rule.end.search(name)) is not None:
            groups = match.groupdict()
            module = name[: match.start()] + (rule.within[groups["part"]] if rule.within else "")
            return Key(rule.spelling, bare(module), rule.sides[groups["side"]], groups.get("adapter"))
    if (match := _ALPHA.search(name)) is not None:
        return Key(Spelling.KOHYA, bare(name[: match.start()]), Side.ALPHA)
    return None


def bare(module: str) -> str:
    """The name of a module without the wrappers of PEFT around the model."""
    return module.removeprefix(PEFT_PREFIX)


class Foreign(NamedTuple):
    """A key of an adapter that is neither A, B nor alpha of a linear layer: its module, and the format in words."""

    module: str
    what: str


def foreign(name: str) -> Foreign | None:
    """What a key is to another format than products B A; None if it belongs to none."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        what = _format_of(part) or _format_of(".".join(parts[i : i + 2]))
        if what is not None:
            return Foreign(bare(".".join(parts[:i])), what)
    if name.startswith(tuple(_COMPONENTS)) and ".".join(parts[1:]) not in _WHOLE:
        return Foreign(parts[0], "another adapter of LyCORIS")
    return None


@functools.lru_cache(maxsize=4096)  # a model has 100,000 names of a few dozen components
def _format_of(components: str) -> str | None:
    return next((what for pattern, what in _OTHER if pattern.fullmatch(components)), None)


def is_rasa_key(key: str) -> bool:
    """True if the key is of a RaSA adapter, in either of the authors' layouts."""
    return any(_RASA_COMPONENT.fullmatch(part) for part in key.split("."))


def adapter_format(name: str) -> str | None:
    """The format of adapter whose key this name of a tensor is, in words; None if it belongs to no adapter.

    An `.alpha` alone does not make an adapter: other modules have parameters of this name.
    """
    key = spelt(name)
    if key is not None and key.side is not Side.ALPHA:
        return f"LoRA as {key.spelling.value} spells it"
    return None if (other := foreign(name)) is None else other.what


# ---- kohya's names of modules

_COMPONENTS = {
    "lora_unet_": "unet.", "lora_te_": "text_encoder.", "lora_te1_": "text_encoder_1.", "lora_te2_": "text_encoder_2.",
    "lora_te3_": "text_encoder_3.", "lora_transformer_": "transformer.",
}  # fmt: skip
_WHOLE = frozenset({"", "weight", "bias", "alpha", "diff", "diff_b", "w_norm", "b_norm"})
"""What follows kohya's name of a module where a tensor is a whole update or weight, or the alpha of factors."""
_COMPONENT_NAMES = """
down_blocks up_blocks mid_block single_transformer_blocks transformer_blocks attentions attn attn1 attn2 resnets
downsamplers upsamplers conv conv1 conv2 conv_in conv_out conv_shortcut to_q to_k to_v to_out to_add_out add_q_proj
add_k_proj add_v_proj proj_in proj_out proj_mlp time_emb_proj time_embedding linear linear_1 linear_2 time_text_embed
timestep_embedder guidance_embedder text_embedder context_embedder x_embedder norm norm1 norm1_context norm_out ff
ff_context net proj

input_blocks output_blocks middle_block emb_layers in_layers out_layers skip_connection op time_embed label_emb
double_blocks single_blocks img_attn img_mlp img_mod txt_attn txt_mlp txt_mod qkv lin linear1 linear2 modulation
final_layer adaLN_modulation time_in vector_in guidance_in img_in txt_in in_layer out_layer blocks self_attn cross_attn
ffn q k v o

text_model model encoder decoder layers layer block mlp fc1 fc2 q_proj k_proj v_proj out_proj o_proj gate_proj up_proj
down_proj text_projection SelfAttention EncDecAttention DenseReluDense wi wi_0 wi_1 wo
"""
"""Components of names of modules: in diffusers, in the original code of Stable Diffusion, Flux and Wan, and in text
encoders."""
_NAMES = frozenset(_COMPONENT_NAMES.split())


def kohya_module(name: str) -> str:
    """The dotted name of a module from kohya's, which has `_` for every dot; the name itself if it is not recognised.

    `lora_unet_down_blocks_0_attentions_1_proj_in` is `unet.down_blocks.0.attentions.1.proj_in`. Components are numbers
    and the names in `_NAMES`, the longest first; a name with any other component stays as it is.
    """
    prefix = next((p for p in _COMPONENTS if name.startswith(p)), None)
    if prefix is None:
        return name
    parts, words = [], name[len(prefix) :].split("_")
    while words:
        count = next((n for n in range(min(4, len(words)), 0, -1) if _is_component("_".join(words[:n]))), 0)
        if count == 0:
            return name
        parts.append("_".join(words[:count]))
        words = words[count:]
    return _COMPONENTS[prefix] + ".".join(parts)


def kohya_name(module: str, prefix: str) -> str:
    """kohya's name of a module, with `_` for every dot, after the prefix of its part of a pipeline, or else `prefix`.

    It undoes `kohya_module`: `unet.mid_block.proj` is `lora_unet_mid_block_proj`, whatever the prefix.
    """
    if module.startswith(tuple(_COMPONENTS)):
        return module  # the name of a file that `kohya_module` has not recognised
    for own, component in _COMPONENTS.items():
        if module.startswith(component):
            return own + module.removeprefix(component).replace(".", "_")
    return prefix + module.replace(".", "_")


def _is_component(text: str) -> bool:
    return text in _NAMES or text.isdecimal()
