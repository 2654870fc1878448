"""Files for image models beside diffusers: the updates are what its loader adds to the weights of a small UNet."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import rasa_theory as rt
from rasa_theory.formats.spellings import kohya_module
from rasa_theory.sources import open_source

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")


@pytest.fixture(scope="module")
def unet() -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, cross_attention_dim=8, norm_num_groups=2,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def processor(name: str) -> str:
    """The oldest spelling: `attn1.to_out.0` is `attn1.processor.to_out_lora`."""
    attention, _, part = name.partition(".to_")
    return f"unet.{attention}.processor.to_{part.removesuffix('.0')}_lora"


SPELLINGS = {
    "kohya": lambda name: ("lora_unet_" + name.replace(".", "_"), ".lora_down.weight", ".lora_up.weight", ".alpha"),
    "kohya without alpha": lambda name: ("lora_unet_" + name.replace(".", "_"), ".lora_down.weight", ".lora_up.weight"),
    "new": lambda name: (f"unet.{name}", ".lora_A.weight", ".lora_B.weight"),
    "lora.down": lambda name: (f"unet.{name}", ".lora.down.weight", ".lora.up.weight"),
    "processors": lambda name: (processor(name), ".down.weight", ".up.weight"),
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_updates_are_what_diffusers_fuses(case: str, unet: Any, tmp_path: Path) -> None:
    layers = {n: m for n, m in unet.named_modules() if isinstance(m, nn.Linear) and ".attn" in n}
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        stem, down, up, *alpha = SPELLINGS[case](name)
        tensors[stem + down] = torch.randn(2, layer.in_features, generator=generator)
        tensors[stem + up] = torch.randn(layer.out_features, 2, generator=generator)
        tensors |= {stem + key: torch.tensor(3.0) for key in alpha}
    save_file(tensors, tmp_path / "x.safetensors")
    updates = {}
    for source in open_source(str(tmp_path / "x.safetensors"), alone=True).stacks:
        updates |= dict(zip(source.keys, source.load(torch.float64, None).values, strict=True))
    assert updates.keys() == {f"unet.{name}.weight" for name in layers}

    loader = diffusers.loaders.StableDiffusionLoraLoaderMixin
    fused = copy.deepcopy(unet)
    state, alphas = loader.lora_state_dict(dict(tensors), unet_config=fused.config)
    loader.load_lora_into_unet(state, alphas, fused)
    fused.fuse_lora()
    for name, layer in layers.items():
        truth = fused.get_submodule(name).base_layer.weight.double() - layer.weight.double()
        torch.testing.assert_close(updates[f"unet.{name}.weight"], truth.detach(), rtol=0, atol=1e-5)


def test_kohyas_names_of_all_modules_of_diffusers(unet: Any) -> None:
    flux = diffusers.FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=1, joint_attention_dim=8,
        pooled_projection_dim=8, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    for model, prefix, component in ((unet, "lora_unet_", "unet"), (flux, "lora_transformer_", "transformer")):
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        assert len(names) >= 30
        for name in names:
            assert kohya_module(prefix + name.replace(".", "_")) == f"{component}.{name}"


def test_kohyas_convolutions_come_back(unet: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Read as matrices (out, in k k) for kohya's format, written at full rank, and read again: the same updates."""
    from rasa_theory.commands import extract

    layers = {n: m for n, m in unet.named_modules() if isinstance(m, nn.Conv2d) and (".resnets" in n or "proj_" in n)}
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {}
    truth: dict[str, Tensor] = {}
    for name, layer in layers.items():
        stem = "lora_unet_" + name.replace(".", "_")
        down = torch.randn(2, *layer.weight.shape[1:], generator=generator)
        up = torch.randn(layer.out_channels, 2, 1, 1, generator=generator)
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(3.0)}
        truth[name] = 1.5 * up.double()[:, :, 0, 0] @ down.double().flatten(1)
    save_file(tensors, tmp_path / "x.safetensors")

    def updates(file: Path) -> dict[str, Tensor]:
        read = {}
        for source in open_source(str(file), alone=True, convolutions=True).stacks:
            read |= dict(zip(source.keys, source.load(torch.float64, None).values, strict=True))
        return read

    assert len(layers) > 10
    first = updates(tmp_path / "x.safetensors")
    assert {key.removesuffix(".weight").partition(".")[2] for key in first} == layers.keys()
    for name, update in truth.items():
        torch.testing.assert_close(first[f"unet.{name}.weight"], update, rtol=0, atol=1e-12)
    with pytest.raises(rt.InputError, match=r"no stack remains .*factors with 4 axes \(of a convolution\?\)"):
        open_source(str(tmp_path / "x.safetensors"), alone=True)

    out = ["--rank", "2", "--format", "kohya", "--quiet", "--out", str(tmp_path / "out")]
    assert extract.main(["--source", str(tmp_path / "x.safetensors"), *out]) == 0
    capsys.readouterr()
    (file,) = (tmp_path / "out").glob("*.safetensors")
    again = updates(file)
    assert again.keys() == first.keys()
    for key, update in first.items():
        torch.testing.assert_close(again[key], update, rtol=0, atol=1e-5)
