"""What tensors are: by the class of the model where it is known, else by shapes and whole components of names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from rasa_theory.formats import Architecture, Checkpoint, ModelCheckpoint, Role, architecture, place_by_name
from rasa_theory.formats import architecture as architecture_module
from tests.helpers.families import FAMILIES

IN_CLASS = {
    ("t5", "shared.weight"): Role.EMBEDDING,
    ("t5", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"): Role.EMBEDDING,
    ("mpnet", "encoder.relative_attention_bias.weight"): Role.EMBEDDING,
    ("deberta-v2", "encoder.rel_embeddings.weight"): Role.EMBEDDING,
    ("gpt2", "transformer.wpe.weight"): Role.EMBEDDING,
    ("gpt-neox", "lm_head.weight"): Role.LINEAR,
    ("gpt2", "transformer.h.0.mlp.c_proj.weight"): Role.CONV1D,
    ("whisper", "model.encoder.conv1.weight"): Role.CONVOLUTION,
    ("vit", "vit.embeddings.patch_embeddings.projection.weight"): Role.CONVOLUTION,
    ("vit", "vit.embeddings.cls_token"): Role.PARAMETER,
    ("mamba", "backbone.layers.0.mixer.conv1d.weight"): Role.CONVOLUTION,
    ("mamba", "backbone.layers.0.mixer.A_log"): Role.PARAMETER,
    ("mamba", "backbone.layers.0.mixer.in_proj.weight"): Role.LINEAR,
    ("mixtral", "model.layers.0.mlp.gate.weight"): Role.ROUTER,
    ("gpt-oss", "model.layers.0.mlp.router.weight"): Role.ROUTER,
    ("gpt-oss", "model.layers.0.mlp.experts.gate_up_proj"): Role.EXPERTS_TRANSPOSED,
    ("mixtral", "model.layers.0.mlp.experts.gate_up_proj"): Role.EXPERTS,
    ("granite-moe", "model.layers.0.block_sparse_moe.experts.down_proj"): Role.EXPERTS,
    ("siglip", "head.attention.out_proj.weight"): Role.PARAMETER,  # torch reads it without calling it
    ("siglip", "head.mlp.fc1.weight"): Role.LINEAR,
    ("falcon", "transformer.h.0.mlp.dense_h_to_4h.weight"): Role.LINEAR,  # of a Linear with a forward of its own
    ("llama4", "model.layers.0.feed_forward.router.weight"): Role.ROUTER,  # a Linear that returns a pair
    ("bert", "bert.encoder.layer.0.output.LayerNorm.weight"): Role.NORM,
    ("bert", "classifier.weight"): Role.LINEAR,
}
BY_NAME = {
    ("embed_out.weight", (50, 24)): Role.LINEAR,  # Pythia
    ("context_embedder.weight", (24, 32)): Role.LINEAR,  # Flux
    ("time_text_embed.timestep_embedder.linear_1.weight", (24, 32)): Role.LINEAR,
    ("x_embedder.weight", (24, 32)): Role.LINEAR,
    ("model.embed_tokens.weight", (50, 24)): Role.EMBEDDING,
    ("shared.weight", (50, 24)): Role.EMBEDDING,
    ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 4)): Role.EMBEDDING,
    ("transformer.wte.weight", (50, 24)): Role.EMBEDDING,
    ("lm_head.weight", (50, 24)): Role.LINEAR,
    ("model.encoder.conv1.weight", (384, 80, 3)): Role.CONVOLUTION,
    ("backbone.layers.0.mixer.conv1d.weight", (32, 1, 4)): Role.CONVOLUTION,
    ("conv_in.weight", (320, 4, 3, 3)): Role.CONVOLUTION,
    ("decoder.conv_post.weight", (1, 32, 7)): Role.CONVOLUTION,
    ("q_proj.weight", (1, 32, 48)): Role.UNKNOWN,
    ("vit.embeddings.cls_token", (1, 1, 16)): Role.PARAMETER,
    ("model.layers.0.mlp.experts.gate_up_proj", (4, 24, 64)): Role.EXPERTS,
    ("model.layers.0.mlp.router.weight", (4, 24)): Role.ROUTER,
    ("model.norm.weight", (24,)): Role.NORM,
    ("q_proj.bias", (24,)): Role.BIAS,
    ("layers.0.mixer.dt_bias", (32,)): Role.PARAMETER,
    ("logit_scale", ()): Role.PARAMETER,
    ("layers.0.mixer.A_log", (32, 4)): Role.UNKNOWN,
    ("updates", (6, 24, 24)): Role.UNKNOWN,
}


@pytest.mark.parametrize(("family", "name"), IN_CLASS)
def test_the_class_of_the_model_says_what_a_parameter_is(tmp_path: Path, family: str, name: str) -> None:
    model = FAMILIES[family]()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    known = architecture(tmp_path)
    assert known is not None
    place = known.place(name)
    assert place is not None
    assert place.role is IN_CLASS[family, name]
    assert place.decided_by.startswith(f"by the model class {type(model).__name__}")


@pytest.mark.parametrize(("name", "shape"), BY_NAME)
def test_names_and_shapes_decide_where_the_class_is_not_known(name: str, shape: tuple[int, ...]) -> None:
    assert place_by_name(name, shape).role is BY_NAME[name, shape]


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe", "llava"])
def test_a_parameter_that_is_made_of_several_tensors_is_what_the_model_has(tmp_path: Path, family: str) -> None:
    model = FAMILIES[family]().float()
    model.save_pretrained(tmp_path)
    checkpoint = ModelCheckpoint(Checkpoint(tmp_path), architecture(tmp_path))
    for name, parameter in model.named_parameters():
        assert torch.equal(checkpoint.read(name), parameter.detach()), name


def test_without_transformers_names_are_those_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FAMILIES["vit"]().save_pretrained(tmp_path)
    module = __import__(architecture_module.__module__, fromlist=["architecture"])
    monkeypatch.setattr(module, "is_transformers_here", lambda: False)
    module._built.cache_clear()
    assert architecture(tmp_path) is None
    assert "not installed" in module.why_unknown(tmp_path)
    names = ModelCheckpoint(Checkpoint(tmp_path), None).entries
    assert "vit.encoder.layer.0.attention.attention.query.weight" in names
    place = names["vit.encoder.layer.0.attention.attention.query.weight"].place
    assert place is not None
    assert (place.role, place.decided_by) == (Role.LINEAR, "by its name")


@pytest.mark.parametrize(
    "config", ['{"model_type": "nothing-known"}', '{"model_type": "llama", "hidden_size": "x"}', "{}"]
)
def test_a_configuration_that_transformers_cannot_build_leaves_it_to_names(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    assert architecture(tmp_path) is None


class _Pair(nn.Linear):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return super().forward(x), x


class _Grouped(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(x, self.weight.view(2, -1, self.in_features).mT)


class _Same(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T


@pytest.mark.parametrize(
    ("kind", "role"),
    [(_Pair, Role.PARAMETER), (_Grouped, Role.PARAMETER), (_Same, Role.LINEAR), (nn.Linear, Role.LINEAR)],
)
def test_a_subclass_of_linear_is_one_if_it_maps_vectors_to_vectors(kind: type[nn.Linear], role: Role) -> None:
    with torch.device("meta"):
        place = Architecture(nn.Sequential(kind(4, 6, bias=False))).place("0.weight")
    assert place is not None
    assert place.role is role
