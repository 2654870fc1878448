"""Models with adapters beside their weights, and names with the wrappers of training in them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import save_file
from torch import Tensor

import rasa_theory as rt
from rasa_theory.commands import reconstruct
from rasa_theory.formats.wrappers import unwrapped
from rasa_theory.peft import RasaConfig
from rasa_theory.sources import open_source
from tests.helpers.problems import noise

MODULES = [f"model.layers.{i}.{kind}" for i in range(2) for kind in ("q_proj", "k_proj")]


def model(seed: int = 0) -> dict[str, Tensor]:
    return {f"{m}.weight": torch.as_tensor(noise(1, 6, 6, seed + j)[0]).float() for j, m in enumerate(MODULES)}


def beside(weight: str, *factors: str, prefix: str = "") -> dict[str, Tensor]:
    """A model whose q_proj has its weight under another name, with factors beside it."""
    tensors = {}
    for name, x in model().items():
        module = name.removesuffix(".weight")
        if "q_proj" not in module:
            tensors[prefix + name] = x
            continue
        tensors[f"{prefix}{module}.{weight}"] = x
        tensors |= {f"{prefix}{module}.{key}": torch.ones(6, 6) for key in factors}
    return tensors


UNMERGED = {
    "PEFT": beside("base_layer.weight", "lora_A.default.weight", "lora_B.default.weight"),
    "PEFT, the whole": beside("base_layer.weight", "lora_A.default.weight", "lora_B.default.weight",
                              prefix="base_model.model."),
    "DoRA": beside("base_layer.weight", "lora_magnitude_vector.default.weight"),
    "the authors' RaSA": beside("base_layer.weight", "rasa_A.default.weight", "rasa_B.default.weight"),
    "OFT": beside("base_layer.weight", "oft_R.default.weight"),
    "loralib and litgpt": beside("weight", "lora_A", "lora_B"),
    "torchtune": beside("weight", "lora_a.weight", "lora_b.weight"),
    "MLX": beside("linear.weight", "lora_a", "lora_b"),
    "NeMo": beside("weight", "adapter.linear_in.weight", "adapter.linear_out.weight"),
}  # fmt: skip


def saved(folder: Path, tensors: dict[str, Tensor]) -> str:
    folder.mkdir()
    save_file({key: x.clone() for key, x in tensors.items()}, folder / "model.safetensors")
    return str(folder)


@pytest.mark.parametrize("case", UNMERGED)
def test_a_model_with_unmerged_adapters_is_refused_with_the_reason(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its weights are those of the base: the difference would be zero, or miss what the adapter adds."""
    base, tuned = saved(tmp_path / "base", model()), saved(tmp_path / "tuned", UNMERGED[case])
    for sources in (["--base", base, "--tuned", tuned], ["--base", tuned, "--tuned", base], ["--source", tuned]):
        assert reconstruct.main([*sources, "--rank", "1", "--out", "none"]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert f"{tuned}: a model with adapters that are not merged" in err
        assert "merge_and_unload" in err


def test_a_checkpoint_of_a_model_with_an_injected_adapter_is_refused(tmp_path: Path) -> None:
    net = torch.nn.Module()
    net.layers = torch.nn.ModuleList(torch.nn.ModuleDict({"q": torch.nn.Linear(6, 6)}) for _ in range(2))
    save_file(net.state_dict(), tmp_path / "base.safetensors")
    model = get_peft_model(net, RasaConfig(r=2, k=1, target_modules=["q"]))
    save_file({key: x.clone() for key, x in model.state_dict().items()}, tmp_path / "tuned.safetensors")
    with pytest.raises(rt.InputError, match="a model with adapters that are not merged"):
        open_source(base=str(tmp_path / "base.safetensors"), tuned=str(tmp_path / "tuned.safetensors"))


def test_a_model_with_the_file_of_an_adapter_beside_it_is_unclear(tmp_path: Path) -> None:
    """Whoever merges into the folder of the adapter has both; so has who keeps an adapter with its base."""
    folder = saved(tmp_path / "tuned", model(3))
    factors = {f"base_model.model.{MODULES[0]}.lora_{side}.weight": torch.ones(6, 6) for side in "AB"}
    save_file(factors, tmp_path / "tuned" / "adapter_model.safetensors")
    with pytest.raises(
        rt.InputError, match=r"adapter_model\.safetensors holds an adapter .* name the one file that is"
    ):
        open_source(base=saved(tmp_path / "base", model()), tuned=folder)
    alone = str(tmp_path / "tuned" / "model.safetensors")
    assert len(open_source(base=str(tmp_path / "base"), tuned=alone).stacks) == 2


# ---- wrappers


@pytest.mark.parametrize(
    ("wrapped", "plain"),
    [
        ("_orig_mod.model.layers.0.q", "model.layers.0.q"),
        ("model.layers.0._orig_mod.q", "model.layers.0.q"),
        ("module._orig_mod.model.layers.0.q", "model.layers.0.q"),
        ("_forward_module.module.model.layers.0.q", "model.layers.0.q"),
        ("_fsdp_wrapped_module.model.layers.0._checkpoint_wrapped_module.q._fsdp_wrapped_module", "model.layers.0.q"),
        ("model.module.layers.0.q", "model.layers.0.q"),
        ("model.layers.0.module", "model.layers.0.module"),
        ("model.modules.0.q", "model.modules.0.q"),
    ],
)
def test_wrappers_are_taken_off_wherever_they_stand(wrapped: str, plain: str) -> None:
    names = [wrapped, wrapped.replace("0", "1")]
    assert list(unwrapped(names).values()) == [plain, plain.replace("0", "1")]


def test_a_module_that_is_called_so_keeps_its_name_beside_others() -> None:
    for names in (["a.module.w", "a.other.w"], ["module.w", "head.w"], ["q.w", "_orig_mod.q.w"]):
        assert unwrapped(names) == {name: name for name in names}
    names = ["module.encoder.module.w", "module.encoder.norm.w"]
    assert list(unwrapped(names).values()) == ["encoder.module.w", "encoder.norm.w"]


@pytest.mark.parametrize(
    ("plain", "wrapped_name"),
    [
        ("model.", "_orig_mod.model."),
        ("model.", "module.model."),
        ("q_proj", "_fsdp_wrapped_module.q_proj._orig_mod"),
        ("layers.1", "layers.1._checkpoint_wrapped_module"),
    ],
)
def test_a_pair_is_matched_through_wrappers(plain: str, wrapped_name: str, tmp_path: Path) -> None:
    before, after = model(0), model(50)
    wrapped = {key.replace(plain, wrapped_name): x for key, x in after.items()}
    base, tuned = saved(tmp_path / "base", before), saved(tmp_path / "tuned", wrapped)
    catalogue = open_source(base=base, tuned=tuned)
    assert sorted(s.name for s in catalogue.stacks) == ["model.layers.*.k_proj.weight", "model.layers.*.q_proj.weight"]
    for source in catalogue.stacks:
        for key, values in zip(source.keys, source.load(None, None).values, strict=True):
            assert torch.equal(values, after[key] - before[key])
