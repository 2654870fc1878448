"""Pairs that are none or differ by rounding, names with several numbers, whole models, and models of the Hub."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rasa_theory.commands import extract, reconstruct
from rasa_theory.common import InputError
from rasa_theory.sources import Norms, open_source, pair_warning
from tests.helpers.families import FAMILIES, changed_pair, transformers

Tensors = dict[str, torch.Tensor]
QUICK = ("--quiet", "--rank", "2", "--k", "0", "--effort", "quick")


def weights(seed: int = 0, layers: int = 2, vocabulary: int = 30) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    names = {f"model.layers.{i}.q_proj.weight": (8, 6) for i in range(layers)}
    names |= {"model.embed_tokens.weight": (vocabulary, 6), "model.norm.weight": (6,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in names.items()}


def saved(folder: Path, base: Tensors, tuned: Tensors) -> dict[str, str]:
    paths = {side: str(folder / f"{side}.safetensors") for side in ("base", "tuned")}
    save_file(base, paths["base"])
    save_file(tuned, paths["tuned"])
    return paths


def flags(paths: dict[str, str], out: Path, *more: str) -> list[str]:
    return ["--base", paths["base"], "--tuned", paths["tuned"], "--out", str(out), *QUICK, *more]


# ---- norms


def test_relative_norms_are_those_of_numpy(tmp_path: Path) -> None:
    base, step = weights(), weights(1)
    tuned = {name: base[name] + 0.01 * step[name] for name in base}
    catalogue = open_source(**saved(tmp_path, base, tuned), alone=True)
    (source,) = catalogue.stacks
    norms = catalogue.norms(source)
    assert norms is not None
    for key, one in zip(source.keys, norms, strict=True):
        change = (tuned[key] - base[key]).double()
        assert one.relative == pytest.approx(math.sqrt(float((change**2).sum() / (base[key].double() ** 2).sum())))
    assert catalogue.norms_left_out().keys() == {"model.embed_tokens.weight", "model.norm.weight"}
    assert pair_warning(Norms.together(norms), "pair") is None


@pytest.mark.parametrize(("relative", "warns"), [(0.1, False), (0.499, False), (0.501, True), (1.4, True)])
def test_a_warning_from_one_half_on(relative: float, warns: bool) -> None:
    warning = pair_warning(Norms(relative**2 * 7.0, 7.0), "tuned minus base")
    assert (warning is not None) == warns
    assert warning is None or "These may be no pair" in warning


@pytest.mark.parametrize("command", [extract, reconstruct])
def test_another_model_as_tuned_is_said_in_every_output(
    tmp_path: Path, command: object, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of more layers and another vocabulary, as somebody else's model has them."""
    paths = saved(tmp_path, weights(0), weights(1, layers=3, vocabulary=40))
    assert command.main(flags(paths, tmp_path / "out")) == 0  # type: ignore[attr-defined]
    assert "WARNING" in capsys.readouterr().out
    name = "report.json" if command is extract else "results.json"
    report = json.loads((tmp_path / "out" / name).read_text())
    assert "may be no pair" in report["warning"]
    assert report["relative_norm"] == pytest.approx(math.sqrt(2), rel=0.3)
    assert report["stacks"][0]["relative_norm"] == pytest.approx(math.sqrt(2), rel=0.3)
    left_out = {one["name"]: one for one in report["left_out"]}
    assert left_out["model.norm.weight"]["norm_squared"] > 0
    if command is extract:
        assert "may be no pair" in (tmp_path / "out" / "README.md").read_text().replace("\n", " ")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rounded", ["base", "tuned"])
def test_the_rounding_of_a_dtype_is_recognised(tmp_path: Path, dtype: torch.dtype, rounded: str) -> None:
    """Also where the rounded side is stored in float32 again; not where anything else has changed as well."""
    exact = weights(vocabulary=1000)
    other = {name: tensor.to(dtype).float() for name, tensor in exact.items()}
    sides = {"base": exact, "tuned": other} if rounded == "tuned" else {"base": other, "tuned": exact}
    catalogue = open_source(**saved(tmp_path, sides["base"], sides["tuned"]), alone=True)
    norms = Norms.together([*(catalogue.norms(catalogue.stacks[0]) or ()), *catalogue.norms_left_out().values()])
    name = str(dtype).removeprefix("torch.")
    assert norms.rounding == {name}
    assert f"differs by the rounding of {name}" in (pair_warning(norms, "pair") or "")
    sides["tuned"]["model.embed_tokens.weight"][-1, -1] += 0.5
    catalogue = open_source(**saved(tmp_path, sides["base"], sides["tuned"]), alone=True)
    assert catalogue.norms_left_out()["model.embed_tokens.weight"].rounding == frozenset()


@pytest.mark.parametrize("command", [extract, reconstruct])
def test_two_equal_checkpoints_are_refused_alike(
    tmp_path: Path, command: object, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = saved(tmp_path, weights(), weights())
    assert command.main(flags(paths, tmp_path / "out")) == 2  # type: ignore[attr-defined]
    assert "every update is zero, there is nothing to" in capsys.readouterr().err
    only = weights() | {"model.embed_tokens.weight": torch.ones(30, 6)}
    assert command.main(flags(saved(tmp_path, weights(), only), tmp_path / "out")) == 2  # type: ignore[attr-defined]
    assert "only 'model.embed_tokens.weight' has changed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


# ---- names with several numbers

UNET = {
    f"{side}_blocks.{i}.attentions.{j}.transformer_blocks.0.{kind}.weight": (8 * (1 + i), 8 * (1 + i))
    for side in ("down", "up")
    for i in range(3)
    for j in range(2)
    for kind in ("attn1.to_q", "attn2.to_out.0", "ff.net.2")
}
SDXL = {
    f"down_blocks.{i}.attentions.{j}.transformer_blocks.{n}.attn1.to_q.weight": (8 * i, 8 * i)
    for i, depth in ((1, 2), (2, 5))
    for j in range(2)
    for n in range(depth)
}
SWIN = {
    f"encoder.layers.{i}.blocks.{j}.attention.self.query.weight": (8 * 2**i, 8 * 2**i)
    for i in range(3)
    for j in range(2)
}
EXPERTS = {f"model.layers.{i}.mlp.experts.{e}.w1.weight": (6, 8) for i in range(3) for e in range(4)}
NAMES = {
    "UNet": (UNET, {f"{s}_blocks.{i}.attentions.*.transformer_blocks.0.{k}.weight": 2
                    for s in ("down", "up") for i in range(3) for k in ("attn1.to_q", "attn2.to_out.0", "ff.net.2")}),
    "SDXL": (SDXL, {f"down_blocks.{i}.attentions.{j}.transformer_blocks.*.attn1.to_q.weight": n
                    for i, n in ((1, 2), (2, 5)) for j in range(2)}),
    "Swin": (SWIN, {f"encoder.layers.{i}.blocks.*.attention.self.query.weight": 2 for i in range(3)}),
    "experts": (EXPERTS, {f"model.layers.*.mlp.experts.{e}.w1.weight": 3 for e in range(4)}),
    "names like an adapter's": (  # RWKV-7 has Linear layers of low rank that are called so
        {f"layers.{i}.attn.w_lora.lora.{j}.weight": (8 - 4 * j, 4 + 4 * j) for i in range(2) for j in range(2)},
        {f"layers.*.attn.w_lora.lora.{j}.weight": 2 for j in range(2)},
    ),
    "no stack": ({"a.1.b.2.weight": (4, 4), "a.2.b.3.weight": (5, 4)}, {"a.1.b.2.weight": 1, "a.2.b.3.weight": 1}),
    "one narrow layer": (
        {f"layers.{i}.q.weight": (6, 8) for i in range(3)} | {"layers.3.q.weight": (4, 8)},
        {"layers.*.q.weight[6x8]": 3, "layers.3.q.weight": 1},
    ),
    "two widths": (
        {f"{t}.layers.{i}.q.weight": (w, w) for t, w in (("text", 8), ("image", 12)) for i in range(2)}
        | {f"encoder.layers.{i}.k.weight": (8 + 4 * (i // 2), 8) for i in range(4)},
        {"text.layers.*.q.weight": 2, "image.layers.*.q.weight": 2, "encoder.layers.*.k.weight[8x8]": 2,
         "encoder.layers.*.k.weight[12x8]": 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_matrix_is_in_a_stack_whatever_its_numbers(tmp_path: Path, name: str) -> None:
    shapes, expected = NAMES[name]
    base = {key: torch.randn(shape) for key, shape in shapes.items()}
    paths = saved(tmp_path, base, {key: tensor + 1 for key, tensor in base.items()})
    catalogue = open_source(**paths, alone=True)
    assert {source.name: source.layers for source in catalogue.stacks} == expected
    assert {key for source in catalogue.stacks for key in source.keys} == shapes.keys()
    assert catalogue.left_out == []


# ---- reconstruct on whole models


@pytest.mark.slow
@pytest.mark.parametrize("family", ["whisper", "vit", "mamba", "clip"])
def test_a_default_study_of_a_whole_model_runs(tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Kinds that are narrower than the rank are left out with a sentence; convolutions and tokens as what they are."""
    changed_pair(FAMILIES[family](), tmp_path)
    paths = {side: str(tmp_path / side) for side in ("base", "tuned")}
    assert reconstruct.main([*flags(paths, tmp_path / "out"), "--rank", "12", "--seeds", "0", "--sweeps", "2"]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    reasons = {one["name"]: one["reason"] for one in results["left_out"]}
    for name, reason in reasons.items():
        if "conv" in name and name.endswith("weight"):
            assert reason.startswith("a convolution, by the model class")
    if family == "mamba":
        assert any(reason.startswith("rank 12 exceeds min(b, a) = ") for reason in reasons.values())
    assert all(min(row["shape"]) >= 12 for row in results["stacks"])
    assert results["relative_norm"] < 0.6


# ---- names of the model in adapters


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "known"),
    [
        ("vit", "vit.layers.0.attention.q_proj"),
        ("mixtral", "model.layers.1.self_attn.o_proj"),
        ("swin", "swin.encoder.layers.0.blocks.0.attention.q_proj"),
        ("gemma3", "model.language_model.layers.0.self_attn.q_proj"),
    ],
)
def test_an_adapter_names_modules_of_the_model(tmp_path: Path, family: str, known: str) -> None:
    """With ranks chosen layer by layer; on the disk these modules, or the experts beside them, have other names."""
    peft = pytest.importorskip("peft")
    model = FAMILIES[family]().float()
    _, after = changed_pair(model, tmp_path)
    paths = {side: str(tmp_path / side) for side in ("base", "tuned")}
    arguments = [*flags(paths, tmp_path / "out")[:-6], "--quiet", "--rank", "auto", "--energy", "1", "--k", "0"]
    assert extract.main(arguments) == 0
    base = type(model).from_pretrained(tmp_path / "base")
    merged = peft.PeftModel.from_pretrained(base, tmp_path / "out").merge_and_unload().state_dict()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    modules = [module["module"] for row in report["stacks"] for module in row["modules"]]
    assert known in modules
    for module in modules:
        expert = module.rpartition(".")[0]  # the matrices of a fused tensor are numbered
        name = expert if expert in after else f"{module}.weight"
        assert torch.allclose(merged[name].double(), after[name], atol=1e-5)


@pytest.mark.parametrize("family", ["llava", "vit", "mixtral", "qwen3-moe"])
def test_both_arrangements_of_one_model_are_a_pair(tmp_path: Path, family: str) -> None:
    """One side saved as transformers 4 did, expert by expert; the other under the names of the model in memory."""
    model = FAMILIES[family]().float()
    before, after = changed_pair(model, tmp_path)
    in_memory = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    save_file(in_memory, tmp_path / "tuned" / "model.safetensors")
    assert in_memory.keys() != load_file(tmp_path / "base" / "model.safetensors").keys()
    catalogue = open_source(base=str(tmp_path / "base"), tuned=str(tmp_path / "tuned"), alone=True)
    assert not [one for one in catalogue.left_out if one.reason.startswith("in ")]
    for source in catalogue.stacks:
        expected = torch.stack([after[key] - before[key] for key in source.keys])
        values = source.load(torch.float64, None).values
        assert torch.allclose(values, expected[0] if expected.ndim == 4 else expected, atol=1e-6)


LAYOUTS: dict[str, Callable[[str], str]] = {
    "a base model saved inside a wrapper": lambda name: f"bert.{name}",
    "torch.compile in DDP": lambda name: f"module._orig_mod.{name}",
    "the names of TensorFlow's norms": lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tuned_model_under_other_names_is_read_under_those_of_the_base(tmp_path: Path, layout: str) -> None:
    model = transformers.BertModel(FAMILIES["bert"]().config).float()
    before, after = changed_pair(model, tmp_path)
    file = tmp_path / "tuned" / "model.safetensors"
    save_file({LAYOUTS[layout](name): tensor for name, tensor in load_file(file).items()}, file)
    catalogue = open_source(base=str(tmp_path / "base"), tuned=str(tmp_path / "tuned"), alone=True)
    assert not [one for one in catalogue.left_out if one.reason.startswith("in ")]
    for source in catalogue.stacks:
        expected = torch.stack([after[key] - before[key] for key in source.keys])
        assert torch.allclose(source.load(torch.float64, None).values, expected, atol=1e-6)


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_one_configuration_of_the_two_is_enough(tmp_path: Path, side: str) -> None:
    changed_pair(FAMILIES["vit"](), tmp_path)
    (tmp_path / side / "config.json").unlink()
    catalogue = open_source(base=str(tmp_path / "base"), tuned=str(tmp_path / "tuned"), alone=True)
    assert "vit.layers.*.attention.q_proj.weight" in {source.name for source in catalogue.stacks}
    assert catalogue.notes == ()


def test_a_model_with_code_of_its_own_is_read_by_names_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No code of a checkpoint is run."""
    changed_pair(FAMILIES["llama"](), tmp_path)
    for side in ("base", "tuned"):
        file = tmp_path / side / "config.json"
        config = json.loads(file.read_text()) | {"model_type": "mine", "auto_map": {"AutoModel": "model.Mine"}}
        file.write_text(json.dumps(config))
    paths = {side: str(tmp_path / side) for side in ("base", "tuned")}
    assert extract.main(flags(paths, tmp_path / "out")) == 0
    assert "note: Modules are named as on the disk, " in capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "transformers cannot build the model of" in report["notes"][0]
    assert {one["reason"] for one in report["left_out"]} == {
        "an embedding, by its name",
        "the weight of a norm, by its name and its number of axes",
    }


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_the_note_on_names_is_about_the_configuration_that_there_is(tmp_path: Path, side: str) -> None:
    paths = {one: str(tmp_path / one) for one in ("base", "tuned")}
    for seed, one in enumerate(paths):
        (tmp_path / one).mkdir()
        save_file(weights(seed), tmp_path / one / "model.safetensors")
    file = tmp_path / side / "config.json"
    file.write_text('{"model_type": "mine"}')
    (note,) = open_source(**paths).notes
    assert f"transformers cannot build the model of {file}." in note
    file.unlink()
    (note,) = open_source(**paths).notes
    assert "has no config.json." in note


# ---- the Hub


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the Hub, offline, with two revisions of org/name in its own layout: blobs and links to them."""
    hub = pytest.importorskip("huggingface_hub")
    root = tmp_path / "hub"
    for revision, seed in (("1" * 40, 0), ("2" * 40, 1)):
        folder = root / "models--org--name"
        (folder / "blobs").mkdir(parents=True, exist_ok=True)
        (folder / "snapshots" / revision).mkdir(parents=True)
        save_file(weights(seed), folder / "blobs" / f"blob{seed}")
        (folder / "snapshots" / revision / "model.safetensors").symlink_to(Path("../../blobs") / f"blob{seed}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("1" * 40)
    (folder / "refs" / "tuned").write_text("2" * 40)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(root))
    return root


def test_a_model_of_the_hub_comes_from_its_cache(cache: Path) -> None:
    catalogue = open_source(base="org/name", tuned="org/name@tuned", alone=True)
    expected = weights(1)["model.layers.1.q_proj.weight"] - weights(0)["model.layers.1.q_proj.weight"]
    assert torch.equal(catalogue.stacks[0].load(None, None).values[1], expected)
    assert open_source("org/name@" + "2" * 40, alone=True).stacks


@pytest.mark.parametrize("name", ["org/absent", "org/name@absent"])
def test_a_model_that_is_nowhere_is_one_sentence(cache: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"'{name}' is no file or folder here, and could not be had from the Hub"):
        open_source(base=name, tuned="org/name")


def test_without_huggingface_hub_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"'org/name' is no file or folder here; .* install the extra hub"):
        open_source(base="org/name", tuned="org/name")


@pytest.mark.parametrize("name", ["org/model.safetensors", "tests/absent", "name", "a/b/c"])
def test_a_path_with_a_mistake_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "tests").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"'{name}' does not exist"):
        open_source(name)


def test_the_configuration_of_another_model_is_refused(tmp_path: Path) -> None:
    """By it a Conv1D would be taken for a Linear layer, and modules be named that the model has not."""
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2}
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
        tensors = {f"transformer.h.{i}.attn.c_attn.weight": torch.randn(4, 12) for i in range(2)}
        save_file(tensors, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InputError, match=r"describes a LlamaForCausalLM, which has no matrix called as those"):
        open_source(base=str(tmp_path / "base"), tuned=str(tmp_path / "tuned"))
