"""Adapters as every tool spells them: the updates are those of the formula in numpy, or the format is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import rasa_theory as rt
from rasa_theory.commands import extract, reconstruct
from rasa_theory.sources import open_source
from tests.helpers.problems import noise

b, a, r = 6, 5, 2
LAYERS = range(3)


def factors(i: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """B (b, r) and A (r, a) of layer i."""
    return noise(1, b, r, 10 + i)[0], noise(1, r, a, 20 + i)[0]


def tensors_of(down: str, up: str, alpha: str | None = None, value: float = 1.0, turned: bool = False) -> Any:
    """Tensors of all layers; the keys have `{i}` for the layer. `turned`: factors are stored transposed."""
    tensors: dict[str, Tensor] = {}
    for i in LAYERS:
        B, A = (torch.as_tensor(x) for x in factors(i))
        tensors[down.format(i=i)] = (A.T if turned else A).contiguous()
        tensors[up.format(i=i)] = (B.T if turned else B).contiguous()
        if alpha is not None:
            tensors[alpha.format(i=i)] = torch.tensor(value)
    return tensors


def check(source: str, name: str, scaling: float) -> None:
    """The one stack of a source is scaling B A."""
    (stack,), left_out = rt.load(source, dtype="float64")
    assert left_out == []
    assert (stack.name, stack.shape) == (name, (b, a))
    for i in LAYERS:
        B, A = factors(i)
        np.testing.assert_allclose(stack.values[i].numpy(), scaling * (B @ A), rtol=1e-12, atol=1e-12)


TE = "lora_te_text_model_encoder_layers_{i}_self_attn_q_proj"
UNET = "unet.down_blocks.0.attentions.0.transformer_blocks.{i}.attn1"
FILES = {
    "kohya": (
        (f"{TE}.lora_down.weight", f"{TE}.lora_up.weight", f"{TE}.alpha", 1.0),
        "text_encoder.text_model.encoder.layers.*.self_attn.q_proj.weight",
        1 / 2,
    ),
    "kohya without alpha": (
        (f"{TE}.lora_down.weight", f"{TE}.lora_up.weight"),
        "text_encoder.text_model.encoder.layers.*.self_attn.q_proj.weight",
        1,
    ),
    "kohya, a name that is not known": (
        ("lora_x_{i}_q.lora_down.weight", "lora_x_{i}_q.lora_up.weight", "lora_x_{i}_q.alpha", 8.0),
        "lora_x_*_q.weight",
        4,
    ),
    "ComfyUI": (
        (
            "diffusion_model.blocks.{i}.q.lora_down.weight",
            "diffusion_model.blocks.{i}.q.lora_up.weight",
            "diffusion_model.blocks.{i}.q.alpha",
            4.0,
        ),
        "diffusion_model.blocks.*.q.weight",
        2,
    ),
    "ComfyUI with lora_A": (
        ("diffusion_model.blocks.{i}.q.lora_A.weight", "diffusion_model.blocks.{i}.q.lora_B.weight"),
        "diffusion_model.blocks.*.q.weight",
        1,
    ),
    "OneTrainer": (
        (
            "lora_transformer_single_transformer_blocks_{i}_proj_mlp.lora_down.weight",
            "lora_transformer_single_transformer_blocks_{i}_proj_mlp.lora_up.weight",
            "lora_transformer_single_transformer_blocks_{i}_proj_mlp.alpha",
            3.0,
        ),
        "transformer.single_transformer_blocks.*.proj_mlp.weight",
        3 / 2,
    ),
    "diffusers, attention processors": (
        (UNET + ".processor.to_q_lora.down.weight", UNET + ".processor.to_q_lora.up.weight"),
        UNET.format(i="*") + ".to_q.weight",
        1,
    ),
    "diffusers, lora.down": (
        (UNET + ".to_q.lora.down.weight", UNET + ".to_q.lora.up.weight", UNET + ".to_q.alpha", 6.0),
        UNET.format(i="*") + ".to_q.weight",
        3,
    ),
    "diffusers, lora_linear_layer": (
        (
            "text_encoder.layers.{i}.q.lora_linear_layer.down.weight",
            "text_encoder.layers.{i}.q.lora_linear_layer.up.weight",
        ),
        "text_encoder.layers.*.q.weight",
        1,
    ),
    "diffusers, new": (
        ("transformer.transformer_blocks.{i}.q.lora_A.weight", "transformer.transformer_blocks.{i}.q.lora_B.weight"),
        "transformer.transformer_blocks.*.q.weight",
        1,
    ),
    "XLabs": (
        ("double_blocks.{i}.processor.qkv_lora1.down.weight", "double_blocks.{i}.processor.qkv_lora1.up.weight"),
        "double_blocks.*.img_attn.qkv.weight",
        1,
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_is_recognised_by_its_keys(case: str, tmp_path: Path) -> None:
    keys, name, scaling = FILES[case]
    save_file(tensors_of(*keys), tmp_path / "x.safetensors")
    check(str(tmp_path / "x.safetensors"), name, scaling)
    (tmp_path / "folder").mkdir()
    save_file(tensors_of(*keys), tmp_path / "folder" / "pytorch_lora_weights.safetensors")
    check(str(tmp_path / "folder"), name, scaling)


def test_transformers_of_diffusers_are_told_from_language_models(tmp_path: Path) -> None:
    for module in ("transformer.blocks.{i}.attn1.to_q", "transformer.layers.{i}.attention.to_out.0"):
        save_file(tensors_of(f"{module}.lora_A.weight", f"{module}.lora_B.weight"), tmp_path / "x.safetensors")
        check(str(tmp_path / "x.safetensors"), f"{module.format(i='*')}.weight", 1)


@pytest.mark.parametrize("module", ["text_encoder.layers.{i}.q", "transformer.blocks.{i}.attn1.to_q"])
@pytest.mark.parametrize("root", ["base_model.model.", "unet.base_model.model."])
def test_a_file_of_peft_without_its_configuration_is_refused_whatever_its_modules_are_called(
    root: str, module: str, tmp_path: Path
) -> None:
    """MusicGen has a text_encoder too, and PEFT keeps alpha in another file."""
    save_file(tensors_of(f"{root}{module}.lora_A.weight", f"{root}{module}.lora_B.weight"), tmp_path / "x.safetensors")
    with pytest.raises(rt.InputError, match="whose scaling is not in this file; give the folder of the adapter"):
        open_source(str(tmp_path / "x.safetensors"))


def test_several_files_are_stacked_over_tasks(tmp_path: Path) -> None:
    for task, alpha in enumerate((1.0, 4.0)):
        (keys, *_), names = FILES["kohya"], [str(tmp_path / f"{task}.safetensors") for task in range(2)]
        save_file(tensors_of(*keys[:3], alpha), tmp_path / f"{task}.safetensors")
    stacks = {s.name: s for s in open_source(adapters=names).stacks}
    module = "text_encoder.text_model.encoder.layers.1.self_attn.q_proj"
    B, A = factors(1)
    values = stacks[module].load(torch.float64, None).values.numpy()
    np.testing.assert_allclose(values, [B @ A / 2, 2 * B @ A], rtol=1e-12, atol=1e-12)


# ---- scalings in the metadata and in configurations


def test_the_metadata_of_diffusers_has_the_scaling(tmp_path: Path) -> None:
    module = "transformer.transformer_blocks.{i}.q"
    tensors = tensors_of(f"{module}.lora_A.weight", f"{module}.lora_B.weight")
    config = {
        "transformer.r": 2,
        "transformer.lora_alpha": 5,
        "transformer.alpha_pattern": {"transformer_blocks.1.q": 7},
    }
    file = tmp_path / "x.safetensors"
    save_file(tensors, file, {"lora_adapter_metadata": json.dumps(config)})
    (stack,), _ = rt.load(str(file))
    for i, alpha in enumerate((5, 7, 5)):
        B, A = factors(i)
        np.testing.assert_allclose(stack.values[i].numpy(), alpha / 2 * B @ A, rtol=1e-12, atol=1e-12)
    save_file(tensors, file, {"lora_adapter_metadata": json.dumps(config | {"transformer.use_dora": True})})
    with pytest.raises(rt.InputError, match="use_dora is True"):
        open_source(str(file))
    save_file(tensors, file, {"lora_adapter_metadata": json.dumps(config | {"transformer.r": 8})})
    with pytest.raises(rt.InputError, match=r"rank 8 in lora_adapter_metadata, but .* rank 2"):
        open_source(str(file))
    for text in ("[1]", "{", "[" * 100000):
        save_file(tensors, file, {"lora_adapter_metadata": text})
        with pytest.raises(rt.InputError, match="its lora_adapter_metadata is no JSON object"):
            open_source(str(file))


@pytest.mark.parametrize("alpha", [5.0, 4.0])
def test_alphas_that_contradict_the_metadata_are_refused(alpha: float, tmp_path: Path) -> None:
    """diffusers refuses a file with both; where they agree, nothing is to be guessed."""
    module = "transformer.transformer_blocks.{i}.q"
    keys = (f"{module}.lora_A.weight", f"{module}.lora_B.weight", f"{module}.alpha")
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.lora_alpha": 5})}
    file = tmp_path / "x.safetensors"
    save_file(tensors_of(*keys, alpha), file, metadata)
    if alpha == 5:
        check(str(file), "transformer.transformer_blocks.*.q.weight", 5 / 2)
        return
    with pytest.raises(rt.InputError, match=r"alpha' says the scaling 2, and lora_adapter_metadata 2\.5; remove"):
        open_source(str(file))


def mlx(folder: Path, tensors: dict[str, Tensor], **config: Any) -> str:
    folder.mkdir(exist_ok=True)
    fields = {"fine_tune_type": "lora", "num_layers": 3, "lora_parameters": {"rank": 2, "scale": 20.0, "dropout": 0.0}}
    (folder / "adapter_config.json").write_text(json.dumps(fields | config), encoding="utf-8")
    save_file(tensors, folder / "adapters.safetensors")
    return str(folder)


MLX = ("model.layers.{i}.self_attn.q_proj.lora_a", "model.layers.{i}.self_attn.q_proj.lora_b")


def test_mlx_stores_the_factors_transposed_and_a_scale(tmp_path: Path) -> None:
    folder = mlx(tmp_path / "m", tensors_of(*MLX, turned=True))
    check(folder, "model.layers.*.self_attn.q_proj.weight", 20)
    check(f"{folder}/adapters.safetensors", "model.layers.*.self_attn.q_proj.weight", 20)
    older = mlx(tmp_path / "older", tensors_of(*MLX, turned=True), lora_parameters={"rank": 2, "alpha": 2, "scale": 3})
    check(older, "model.layers.*.self_attn.q_proj.weight", 3)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"fine_tune_type": "dora"}, "fine_tune_type is 'dora', whose update is not B A"),
        ({"fine_tune_type": "full"}, "fine_tune_type is 'full'"),
        ({"lora_parameters": {"rank": 2, "alpha": 16, "scale": 10.0}}, "has both scale 10.0 and alpha 16"),
        ({"lora_parameters": {"rank": 2}}, "expected lora_parameters with a number as scale"),
        ({"lora_parameters": [1]}, "expected lora_parameters with a number as scale"),
    ],
)
def test_what_mlx_does_not_say_is_not_guessed(config: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(rt.InputError, match=sentence):
        open_source(mlx(tmp_path / "m", tensors_of(*MLX, turned=True), **config))


def test_the_experts_and_magnitudes_of_mlx_are_left_out(tmp_path: Path) -> None:
    tensors = tensors_of(*MLX, turned=True)
    expert, dora = "model.layers.0.mlp.switch_mlp.up_proj", "model.layers.0.self_attn.o_proj"
    beside = {
        f"{expert}.lora_a": torch.ones(4, 2, 5),
        f"{expert}.lora_b": torch.ones(4, 6, 2),
        f"{dora}.lora_a": torch.ones(5, 2),
        f"{dora}.lora_b": torch.ones(2, 6),
        f"{dora}.m": torch.ones(6),
    }
    catalogue = open_source(mlx(tmp_path / "m", tensors | beside))
    assert [s.name for s in catalogue.stacks] == ["model.layers.*.self_attn.q_proj.weight"]
    assert {name for name, _ in catalogue.left_out} == beside.keys()


# ---- refused


def refused(tmp_path: Path, tensors: dict[str, Tensor], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence with which the command refuses a file."""
    file = tmp_path / "x.safetensors"
    save_file(tensors, file)
    assert reconstruct.main(["--source", str(file), "--rank", "1", "--out", "none"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert str(file) in err
    return err


def layered(*ends: str, shape: tuple[int, ...] = (4, 4)) -> dict[str, Tensor]:
    """Tensors for three layers, which without the table of spellings would be stacks of updates."""
    return {
        f"layers.{i}.q.{end}": torch.as_tensor(noise(1, *shape[-2:], i)[0]).reshape(shape)
        for i in LAYERS
        for end in ends
    }


REFUSED = {
    "LoHa": (layered("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), "LoHa"),
    "LoKr": (layered("lokr_w1", "lokr_w2_a", "lokr_w2_b"), "LoKr"),
    "OFT of LyCORIS": (layered("oft_blocks"), "OFT"),
    "OFT of PEFT": (layered("oft_R.weight"), "OFT"),
    "VeRA": (layered("vera_A", "vera_B"), "VeRA"),
    "AdaLoRA": (layered("lora_A", "lora_B", "lora_E"), "AdaLoRA"),
    "loralib": (layered("lora_A", "lora_B"), "LoRA"),
    "HRA": (layered("hra_u"), "not LoRA"),
    "PEFT without its configuration": (
        layered("lora_A.weight", "lora_B.weight"),
        "whose scaling is not in this file; give the folder of the adapter, with its",
    ),
    "MLX without its configuration": (layered("lora_a", "lora_b"), "LoRA as MLX spells them"),
    "torchtune": (layered("lora_a.weight", "lora_b.weight"), "LoRA as torchtune spells them"),
    "NeMo": (layered("adapter.linear_in.weight", "adapter.linear_out.weight"), "export the adapter to PEFT's layout"),
    "GPT-2 without its configuration": (
        {
            f"transformer.{key.replace('layers', 'h')}": x
            for key, x in layered("lora_A.weight", "lora_B.weight").items()
        },
        "whose scaling is not in this file",
    ),
    "MPT without its configuration": (
        {
            f"transformer.{key.replace('layers', 'blocks')}": x
            for key, x in layered("lora_A.weight", "lora_B.weight").items()
        },
        "whose scaling is not in this file",
    ),
    "alphas that name the factor": (
        layered("lora.down.weight", "lora.up.weight")
        | {f"layers.{i}.q.lora.down.weight.alpha": torch.tensor(2.0) for i in LAYERS},
        "it is not known to which factors 'layers.0.q.lora.down.weight.alpha' belongs",
    ),
    "a scaling of another name": (
        layered("lora_down.weight", "lora_up.weight") | {f"layers.{i}.q.scalar": torch.tensor(2.0) for i in LAYERS},
        "'layers.0.q.scalar' stands beside its factors, and may change what they mean",
    ),
    "mlx-vlm": (
        layered("A", shape=(4, 2)) | layered("B", shape=(2, 4)),
        "'layers.0.q.A' (4, 2) and 'layers.0.q.B' (2, 4) look like the factors of an adapter",
    ),
    "alpha 0": (
        layered("lora_down.weight", "lora_up.weight") | {f"layers.{i}.q.alpha": torch.tensor(0.0) for i in LAYERS},
        "'layers.0.q.alpha', of shape (), must be one finite number other than 0",
    ),
    "two adapters": (layered("lora_down.a.weight", "lora_up.a.weight", "lora_down.b.weight"), "has two factors A"),
    "unequal ranks": (layered("lora_down.weight", shape=(3, 4)) | layered("lora_up.weight"), "do not multiply as B A"),
    "ZeRO-3": (
        layered("lora_down.weight", shape=(2, 4)) | layered("lora_up.weight", shape=(0, 2)),
        "without gathering its shards",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_formats_are_refused_by_name_and_never_taken_for_updates(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors, sentence = REFUSED[case]
    assert sentence in refused(tmp_path, tensors, capsys)


def test_modules_of_another_format_beside_lora_are_left_out(tmp_path: Path) -> None:
    down, up = "layers.{i}.q.lora_down.weight", "layers.{i}.q.lora_up.weight"
    beside = {
        "layers.0.conv.lora_down.weight": torch.ones(2, 3, 3, 3),
        "layers.0.conv.lora_up.weight": torch.ones(4, 2, 1, 1),
        "layers.0.tucker.lora_down.weight": torch.ones(2, 3),
        "layers.0.tucker.lora_up.weight": torch.ones(4, 2),
        "layers.0.tucker.lora_mid.weight": torch.ones(2, 2, 3, 3),
        "layers.0.dora.lora_down.weight": torch.ones(2, 3),
        "layers.0.dora.lora_up.weight": torch.ones(4, 2),
        "layers.0.dora.dora_scale": torch.ones(1, 3),
        "layers.0.full.diff": torch.ones(4, 3),
        "layers.0.loha.hada_w1_a": torch.ones(4, 3),
        "layers.0.half.lora_down.weight": torch.ones(2, 3),
        "layers.1.q.diff_b": torch.ones(6),
        "layers.2.q.lora_up.bias": torch.ones(6),
        "alphas.0.alpha": torch.tensor(1.0),
    }
    save_file(tensors_of(down, up, "layers.{i}.q.alpha", 4.0) | beside, tmp_path / "x.safetensors")
    catalogue = open_source(str(tmp_path / "x.safetensors"))
    assert [s.name for s in catalogue.stacks] == ["layers.*.q.weight"]
    assert {name for name, _ in catalogue.left_out} == beside.keys()
    B, A = factors(1)
    values = catalogue.stacks[0].load(None, None).values
    np.testing.assert_allclose(values[1].numpy(), 2 * B @ A, rtol=1e-12, atol=1e-12)


def test_factors_beside_updates_are_left_out(tmp_path: Path) -> None:
    """A file of updates stays one; no spelling of a factor in it becomes a stack."""
    updates = {f"layers.{i}.{kind}.update": torch.as_tensor(noise(1, b, a, i)[0]) for i in LAYERS for kind in "uvwxyz"}
    ends = ("lora_A.weight", "lora_down.weight", "hada_w1_a", "lora_a")
    strays = {f"layers.{i}.{end.replace('.', '_')}.{end}": torch.ones(2, 2) for i in range(2) for end in ends}
    save_file(updates | strays, tmp_path / "x.safetensors")
    stacks, left_out = rt.load(str(tmp_path / "x.safetensors"))
    assert sorted(s.name for s in stacks) == [f"layers.*.{kind}.update" for kind in "uvwxyz"]
    assert {name for name, _ in left_out} == strays.keys()
    assert all("a factor of an adapter, not an update" in reason for _, reason in left_out)


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ("q_lora_A.weight", "q_lora_B.weight"), ("LoRA_A.weight", "LoRA_B.weight"), ("loraA", "loraB"),
        ("lora1.weight", "lora2.weight"), ("lora_A_weight", "lora_B_weight"),
        ("lora_q.A", "lora_q.B"), ("q_lora_a", "q_lora_b"), ("lora_q_a.weight", "lora_q_b.weight"),
        ("lora_right", "lora_left"), ("w_lora_a", "w_lora_b"), ("lora_layer.down.weight", "lora_layer.up.weight"),
        ("linear_lora_in.weight", "linear_lora_out.weight"), ("A.weight", "B.weight"), ("a", "b"),
        ("w_a.weight", "w_b.weight"),
    ],
)  # fmt: skip
def test_factors_in_a_spelling_that_no_table_has_are_never_updates(down: str, up: str, tmp_path: Path) -> None:
    save_file(layered(down, shape=(2, 4)) | layered(up, shape=(4, 2)), tmp_path / "x.safetensors")
    with pytest.raises(rt.InputError, match=r"holds an adapter \(LoRA|look like the factors of an adapter"):
        open_source(str(tmp_path / "x.safetensors"))


def test_two_kinds_of_module_that_are_called_a_and_b_are_no_factors(tmp_path: Path) -> None:
    for shapes in (((4, 4), (4, 4)), ((6, 4), (4, 3)), ((6, 4), (5, 6))):
        A, B = (layered(end, shape=shape) for end, shape in zip("AB", shapes, strict=True))
        save_file(A | B, tmp_path / "x.safetensors")
        assert [s.name for s in open_source(str(tmp_path / "x.safetensors")).stacks] == ["layers.*.q.A", "layers.*.q.B"]


def test_an_adapter_is_no_model_of_a_pair(tmp_path: Path) -> None:
    save_file(layered("weight"), tmp_path / "base.safetensors")
    for case in ("kohya", "XLabs", "ComfyUI with lora_A"):
        save_file(tensors_of(*FILES[case][0]), tmp_path / "tuned.safetensors")
        with pytest.raises(
            rt.InputError, match=r"tuned\.safetensors is an adapter, not a model; give it alone as --so"
        ):
            open_source(base=str(tmp_path / "base.safetensors"), tuned=str(tmp_path / "tuned.safetensors"))


# ---- PEFT's own folder, as tools leave it


def peft(folder: Path, tensors: dict[str, Tensor]) -> str:
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q"]}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors")
    return str(folder)


@pytest.mark.parametrize(
    "prefix",
    [
        "base_model.model.layers.{i}.q",
        "module.base_model.model.layers.{i}.q",
        "_orig_mod.base_model.model.layers.{i}.q",
        "base_model.model._orig_mod.layers.{i}.q",
        "base_model.model.layers.{i}._fsdp_wrapped_module.q",
        "base_model.model.layers.{i}._checkpoint_wrapped_module.q._orig_mod",
        "base_model.model.module.layers.{i}.q",
    ],
)
@pytest.mark.parametrize("adapter", ["", ".default"])
def test_wrappers_and_the_name_of_the_adapter_are_taken_off(prefix: str, adapter: str, tmp_path: Path) -> None:
    tensors = tensors_of(f"{prefix}.lora_A{adapter}.weight", f"{prefix}.lora_B{adapter}.weight")
    check(peft(tmp_path / "a", tensors), "layers.*.q.weight", 3)


def test_a_folder_with_several_adapters_or_with_shards_that_were_not_gathered_is_refused(tmp_path: Path) -> None:
    module = "base_model.model.layers.{i}.q"
    tensors = tensors_of(f"{module}.lora_A.one.weight", f"{module}.lora_B.one.weight")
    other = {key.replace(".q.", ".k.").replace(".one.", ".two."): x.clone() for key, x in tensors.items()}
    with pytest.raises(rt.InputError, match=r"holds factors of several adapters, .*save each by itself"):
        open_source(peft(tmp_path / "several", tensors | other))
    for shape in ((0,), (0, 2), (6, 0)):
        empty = {key: torch.ones(shape) if "lora_B" in key else x for key, x in tensors.items()}
        with pytest.raises(rt.InputError, match="as if DeepSpeed ZeRO-3 or FSDP had saved it without gathering"):
            open_source(peft(tmp_path / "empty", empty))


@pytest.mark.parametrize("kind", ["LOHA", "LOKR", "ADALORA", "OFT", "IA3", "VERA", "XLORA", None])
def test_other_types_of_peft_are_refused_by_name(kind: str | None, tmp_path: Path) -> None:
    folder = Path(peft(tmp_path / "a", layered("weight")))
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": kind}), encoding="utf-8")
    with pytest.raises(
        rt.InputError, match=f"peft_type is {kind!r}, but only LORA and RASA have updates B A; if it can be merged, "
    ):
        open_source(str(folder))


def test_extraction_from_single_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One file over its layers, and two over tasks: a LoRA of full rank is the update."""
    paths = [str(tmp_path / f"{task}.safetensors") for task in range(2)]
    for path in paths:
        save_file(tensors_of(*FILES["kohya"][0]), path)
    common = ["--rank", "2", "--k", "0", "--quiet", "--dtype", "float32"]
    assert extract.main(["--source", paths[0], *common, "--out", str(tmp_path / "one")]) == 0
    assert extract.main(["--adapters", *paths, *common, "--out", str(tmp_path / "two")]) == 0
    capsys.readouterr()
    (stack,), _ = rt.load(str(tmp_path / "one"), dtype="float64")
    for i in LAYERS:
        B, A = factors(i)
        np.testing.assert_allclose(stack.values[i].numpy(), B @ A / 2, rtol=1e-5, atol=1e-5)
