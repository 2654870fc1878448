"""Quantised weights are named with their scheme, whatever the scheme stores; other whole numbers do not matter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import rasa_theory as rt
from rasa_theory.commands import extract, reconstruct
from rasa_theory.formats import Entry
from rasa_theory.formats.quantised import refuse_quantised
from rasa_theory.sources import open_source
from tests.helpers.problems import noise

F8, HALF, INT, BYTE = torch.float8_e4m3fn, torch.float16, torch.int32, torch.uint8


def full(seed: int) -> dict[str, Tensor]:
    """A model in bfloat16: two layers, an embedding and a norm."""
    names = [f"model.layers.{i}.self_attn.{kind}.weight" for i in range(2) for kind in ("q_proj", "o_proj")]
    tensors = {name: torch.as_tensor(noise(1, 16, 16, seed + j)[0]).bfloat16() for j, name in enumerate(names)}
    return tensors | {"model.embed_tokens.weight": torch.ones(20, 16).bfloat16(), "model.norm.weight": torch.ones(16)}


def quantised(parts: dict[str, Tensor], experts: bool = False) -> dict[str, Tensor]:
    """The same model with these tensors in place of every weight of a layer."""
    kept = {name: x for name, x in full(0).items() if "layers" not in name}
    modules = [name.removesuffix(".weight") for name in full(0) if "layers" in name]
    if experts:
        modules = [f"model.layers.{i}.mlp.experts" for i in range(2)]
    return kept | {f"{module}.{part}": x.clone() for module in modules for part, x in parts.items()}


def whole(*shape: int, dtype: torch.dtype = INT) -> Tensor:
    return torch.ones(shape, dtype=dtype)


SCHEMES: dict[str, tuple[dict[str, Tensor], str]] = {
    "GPTQ": (
        {"qweight": whole(2, 16), "qzeros": whole(1, 2), "scales": torch.ones(1, 16).half(), "g_idx": whole(16)},
        "GPTQ",
    ),
    "AWQ": ({"qweight": whole(16, 2), "qzeros": whole(1, 2), "scales": torch.ones(1, 16).half()}, "GPTQ or AWQ"),
    "bitsandbytes 4": (
        {
            "weight": whole(128, 1, dtype=BYTE),
            "weight.absmax": whole(4, dtype=BYTE),
            "weight.quant_map": torch.ones(16),
            "weight.nested_absmax": torch.ones(1),
            "weight.quant_state.bitsandbytes__nf4": whole(80, dtype=BYTE),
        },
        "bitsandbytes, 4 bits",
    ),
    "bitsandbytes 8": (
        {"weight": whole(16, 16, dtype=torch.int8), "SCB": torch.ones(16), "weight_format": whole(1, dtype=BYTE)[0]},
        "bitsandbytes, 8 bits",
    ),
    "FP8 in blocks": ({"weight": torch.ones(16, 16).to(F8), "weight_scale_inv": torch.ones(1, 1)}, "FP8 in blocks"),
    "FP8 by channel": (
        {"weight": torch.ones(16, 16).to(F8), "weight_scale": torch.ones(16, 1)},
        "FP8 or integers with scales",
    ),
    "FP8 of Mistral": (
        {"weight": torch.ones(16, 16).to(F8), "qscale_weight": torch.tensor(1.0)},
        "FP8 or integers with scales",
    ),
    "int8 by channel": (
        {"weight": whole(16, 16, dtype=torch.int8), "weight_scale": torch.ones(16, 1)},
        "FP8 or integers with scales",
    ),
    "compressed-tensors": (
        {"weight_packed": whole(16, 2), "weight_scale": torch.ones(16, 1), "weight_shape": whole(2)},
        "compressed-tensors",
    ),
    "NVFP4": (
        {
            "weight": whole(16, 8, dtype=BYTE),
            "weight_scale": torch.ones(16, 1).to(F8),
            "weight_scale_2": torch.tensor(1.0),
            "input_scale": torch.tensor(1.0),
        },
        "NVFP4",
    ),
    "torchao": ({"_weight_qdata": whole(16, 16, dtype=torch.int8), "_weight_scale": torch.ones(16, 1)}, "torchao"),
    "HQQ": ({"W_q": whole(8, 16, dtype=BYTE), "scale": torch.ones(16, 1), "zero": torch.ones(16, 1)}, "HQQ"),
    "AQLM": (
        {
            "codes": whole(16, 2, 1, dtype=torch.int16),
            "codebooks": torch.ones(1, 16, 1, 8),
            "scales": torch.ones(16, 1),
        },
        "AQLM",
    ),
    "VPTQ": (
        {
            "indices": whole(1, 8, 4),
            "centroids.weight": torch.ones(1, 64),
            "res_centroids.weight": torch.ones(1, 64),
            "perm": whole(16, dtype=torch.int16),
            "weight_scale": torch.ones(16),
        },
        "VPTQ",
    ),
    "QuIP#": ({"Qidxs": whole(8, 2), "SU": torch.ones(16).half(), "SV": torch.ones(16).half()}, "QuIP#"),
    "Marlin": ({"B": whole(1, 32), "s": torch.ones(1, 16).half(), "workspace": whole(16)}, "GPTQ as Marlin packs it"),
    "quanto": ({"weight._data": whole(16, 16, dtype=torch.int8), "weight._scale": torch.ones(16, 1)}, "quanto"),
    "MLX": (
        {
            "weight": whole(16, 2).to(torch.uint32),
            "scales": torch.ones(16, 1).half(),
            "biases": torch.ones(16, 1).half(),
        },
        "MLX",
    ),
    "BitNet": ({"weight": whole(4, 16, dtype=BYTE), "weight_scale": torch.ones(1)}, "FP8 or integers with scales"),
    "integers alone": ({"weight": whole(16, 16, dtype=torch.int8)}, "integers"),
    "cast": ({"weight": torch.ones(16, 16).to(F8)}, "cast to 8 bits or fewer, with no scales"),
    "cast to e5m2": ({"weight": torch.ones(16, 16).to(torch.float8_e5m2)}, "cast to 8 bits or fewer, with no scales"),
}
EXPERTS: dict[str, tuple[dict[str, Tensor], str]] = {
    "MXFP4": (
        {
            "gate_up_proj_blocks": whole(4, 8, 2, 16, dtype=BYTE),
            "gate_up_proj_scales": whole(4, 8, 2, dtype=BYTE),
            "gate_up_proj_bias": torch.ones(4, 8),
        },
        "MXFP4",
    ),
    "FP8 experts": (
        {"gate_up_proj": torch.ones(4, 8, 16).to(F8), "gate_up_proj_scale_inv": torch.ones(4, 1, 1)},
        "FP8 or integers with scales",
    ),
}


def written(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = None) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize("case", [*SCHEMES, *EXPERTS])
def test_every_scheme_is_named_on_either_side_of_a_pair(case: str, tmp_path: Path) -> None:
    parts, scheme = (SCHEMES | EXPERTS)[case]
    packed = str(written(tmp_path / "packed", quantised(parts, case in EXPERTS)))
    plain = str(written(tmp_path / "plain", full(1)))
    for sources in ({"base": plain, "tuned": packed}, {"base": packed, "tuned": plain}, {"source": packed}):
        with pytest.raises(rt.InputError) as refusal:
            open_source(**sources)
        sentence = str(refusal.value)
        assert sentence.startswith(f"{packed}: its weights are quantised ({scheme}")
        assert "bfloat16" in sentence
        assert ("call dequantize()" in sentence) is not case.startswith("cast")
        assert "\n" not in sentence


def test_the_commands_refuse_a_pair_with_exit_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}}
    packed = str(written(tmp_path / "packed", quantised(SCHEMES["GPTQ"][0]), config))
    for command in (reconstruct.main, extract.main):
        for base in (packed, str(tmp_path / "packed")):
            out = [str(tmp_path / "out")] if command is extract.main else ["none"]
            assert command(["--base", base, "--tuned", packed, "--rank", "1", "--out", *out]) == 2
            stdout, stderr = capsys.readouterr()
            assert (stdout, stderr.count("\n")) == ("", 1)
            assert "its weights are quantised (GPTQ; gptq in its config.json), for example" in stderr
            assert "dequantize()" in stderr


def test_tensors_decide_and_not_the_config(tmp_path: Path) -> None:
    """A model that was converted keeps its quantization_config."""
    config = {"quantization_config": {"quant_method": "fp8"}}
    base, tuned = (str(written(tmp_path / str(seed), full(seed), config)) for seed in (0, 1))
    assert len(open_source(base=base, tuned=tuned).stacks) == 2


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        ("embeddings.position_ids", (1, 512), "i64"),
        ("h.0.attn.bias", (1, 1, 8, 8), "u8"),
        ("layers.0.relative_position_index", (49, 49), "i64"),
        ("layers.0.kv.k_scale", (1,), "float32"),
        ("layers.0.biases", (4,), "float32"),
        ("quantizer.codebooks", (2, 8, 4), "float32"),
        ("layers.0.inv_freq_data", (8,), "float32"),
        ("bn.num_batches_tracked", (), "i64"),
        ("layers.0.weight", (4, 4), "float64"),
        ("layers.0.weight_scale", (4, 4), "float32"),
    ],
)  # fmt: skip
def test_what_is_not_quantised(name: str, shape: tuple[int, ...], dtype: str) -> None:
    others = [Entry("layers.0.q.weight", (4, 4), "bfloat16"), Entry("layers.1.q.weight", (4, 4), "float64")]
    refuse_quantised(Path("x"), [*others, Entry(name, shape, dtype)], {})
