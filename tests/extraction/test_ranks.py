"""Ranks by layer, the best k, and the settings that decide between exact and leading SVDs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rasa_theory import LayerStack
from rasa_theory.commands.extract import main
from rasa_theory.extraction import ExtractSettings, extract_settings, extract_stack, spectral_facts
from rasa_theory.formats import ModuleNames
from rasa_theory.sources import synthetic_stack
from tests.helpers.models import base_model, report_of, run

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.mark.slow
@pytest.mark.parametrize("target", [("--energy", "0.6"), ("--error", "0.4"), ("--parameters", "4000")])
def test_ranks_are_chosen_layer_by_layer_and_peft_takes_them(llamas, tmp_path, target):
    folder, tuned = llamas
    few = ("--modules", "*self_attn.v*", "--modules", "*mlp.down*")
    assert run(folder, tmp_path, "--rank", "auto", *target, *few, "--ranks", "own") == 0
    rows, config = report_of(tmp_path)["stacks"], json.loads((tmp_path / "adapter_config.json").read_text())
    ranks = {name: rank for row in rows for name, rank in row["ranks"].items()}
    assert len(set(ranks.values())) > 1
    others = {"^" + name.replace(".", r"\."): rank for name, rank in ranks.items() if rank != config["r"]}
    assert config["rank_pattern"] == others
    spent = sum(rank * sum(row["shape"]) for row in rows for rank in row["ranks"].values())
    missed, norm = (sum(row[key] for row in rows) for key in ("e_stored", "norm_squared"))
    if target[0] == "--parameters":
        assert 4000 - 56 < spent <= 4000
    else:
        assert 0.38 <= missed / norm <= 0.4
    model = peft.PeftModel.from_pretrained(base_model(transformers.LlamaForCausalLM, folder).double(), tmp_path)
    merged, after = model.merge_and_unload().state_dict(), tuned.state_dict()
    for row in rows:
        for module in row["modules"]:
            key = f"{module['module']}.weight"
            error = float(((merged[key] - after[key].double()) ** 2).sum())
            assert error == pytest.approx(module["e_stored"], rel=1e-5)
            assert error == pytest.approx(module["e_lora"], rel=1e-5)
        assert row["parameters"]["stored"] == sum(rank * sum(row["shape"]) for rank in row["ranks"].values())


def test_names_that_end_alike_do_not_share_a_rank(tmp_path):
    """`layers.0.q` is the end of `mtp.layers.0.q`: a pattern of PEFT that is not anchored would hit both."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"layers": (2, 5), "mtp.layers": (5, 5)}
    updates = {}
    for name, ranks in sizes.items():
        for i, r in enumerate(ranks):
            product = torch.randn(8, r, generator=generator) @ torch.randn(r, 8, generator=generator)
            updates[f"{name}.{i}.q.weight"] = product
    save_file(updates, tmp_path / "updates.safetensors")
    arguments = ["--source", str(tmp_path / "updates.safetensors"), "--rank", "auto", "--energy", "0.999999", "--quiet"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.mtp = self.made(), torch.nn.Module()
            self.mtp.layers = self.made()

        def made(self):
            layers = [torch.nn.Module() for _ in range(2)]
            for layer in layers:
                layer.q = torch.nn.Linear(8, 8, bias=False)
            return torch.nn.ModuleList(layers)

    model = Model()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    merged = peft.PeftModel.from_pretrained(model, tmp_path / "out").merge_and_unload().state_dict()
    for key, M in updates.items():
        assert torch.allclose(merged[key] - before[key], M, atol=2e-2)


def test_large_layers_without_a_pool_go_without_full_spectra(llamas, tmp_path, monkeypatch):
    folder, _ = llamas
    few = ("--rank", "9", "--k", "0", "--modules", "*self_attn.v*")
    assert run(folder, tmp_path / "exact", *few) == 0
    monkeypatch.setattr(extract_settings, "LARGEST_EXACT", 1)
    assert run(folder, tmp_path / "fast", *few) == 0
    (exact,), (fast,) = (report_of(tmp_path / name)["stacks"] for name in ("exact", "fast"))
    assert fast["e_stored"] == pytest.approx(exact["e_stored"], rel=1e-5)
    for x, y in zip(exact["modules"], fast["modules"], strict=True):
        assert y["stable_rank"] == pytest.approx(x["stable_rank"], rel=1e-5)
        assert y["rank_50"] == x["rank_50"] <= 9
        assert (y["entropy_rank"], y["rank_90"], y["rank_99"]) == (None, None, None)


@pytest.mark.slow
def test_a_pool_from_leading_directions_is_as_good_and_its_floor_says_so(tmp_path, capsys):
    """Beside it: the memory of an SVD is not asked for."""
    values = synthetic_stack(3, (130, 120), "power:0.7", 0.3, 0).values.float()
    save_file({f"h.{i}.q.weight": M.clone() for i, M in enumerate(values)}, tmp_path / "updates.safetensors")
    arguments = ["--source", str(tmp_path / "updates.safetensors"), "--rank", "2", "--k", "1", "--quiet"]
    rows, said = [], []
    for spectra, memory in (("exact", 128), ("leading", 64)):
        out = tmp_path / spectra
        limited = ["--memory", str(memory * 130 * 120), "--spectra", spectra, "--out", str(out)]
        assert main([*arguments, *limited]) == 0
        rows += report_of(out)["stacks"]
        said.append("holds but for a probability of 1e-10" in " ".join(capsys.readouterr().out.split()))
    assert said == [False, True]
    exact, leading = rows
    for name in ("e_lora", "e_rasa", "e_stored", "norm_squared"):
        assert leading[name] == pytest.approx(exact[name], rel=1e-4)
    assert abs(exact["lower_bound"] - leading["lower_bound"]) <= 1e-4 * exact["e_lora"]
    assert leading["lower_bound_name"] == f"{exact['lower_bound_name']}, probable"
    assert (exact["lower_bound_failure"], leading["lower_bound_failure"]) == (0, 1e-10)
    assert (exact["modules"][0]["entropy_rank"] is None, leading["modules"][0]["entropy_rank"] is None) == (False, True)


def test_memory_for_svds_is_demanded_only_where_they_are_taken(tmp_path, monkeypatch, capsys):
    """Layers of 120 x 100, r = 2: half the memory of an SVD is enough for their leading parts."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.arange(1, 101) ** -1.5
    updates = {f"h.{i}.q.weight": torch.randn(120, 100, generator=generator) * sizes for i in range(2)}
    save_file(updates, tmp_path / "updates.safetensors")
    arguments = ["--source", str(tmp_path / "updates.safetensors"), "--rank", "2", "--k", "0", "--quiet"]
    arguments += ["--memory", str(64 * 120 * 100), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "twice what the exact SVD of one takes" in capsys.readouterr().err
    monkeypatch.setattr(extract_settings, "LARGEST_EXACT", 1)
    assert main(arguments) == 0
    assert main([*arguments[:-3], "760000", "--out", str(tmp_path / "less")]) == 2
    assert "twice what the work on one takes" in capsys.readouterr().err


@pytest.mark.slow
def test_the_best_k_is_found(llamas, tmp_path):
    folder, _ = llamas
    more = ("--rank", "4", "--sweeps", "4", "--modules", "*self_attn.v*", "--format", "lora-exact-rasa")
    assert run(folder, tmp_path / "auto", "--k", "auto", *more) == 0
    (auto,) = report_of(tmp_path / "auto")["stacks"]
    assert run(folder, tmp_path / "one", "--k", "1", *more) == 0
    (one,) = report_of(tmp_path / "one")["stacks"]
    assert auto["e_rasa"] <= one["e_rasa"]
    assert auto["k"] in (1, 2, 4)


def test_spectral_facts():
    sigma = torch.tensor([[3.0, 1.0, 0.0], [2.0, 2.0, 2.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    first, equal, zero = spectral_facts(sigma)
    assert first["stable_rank"] == pytest.approx(10 / 9)
    assert first["entropy_rank"] == pytest.approx(np.exp(-0.9 * np.log(0.9) - 0.1 * np.log(0.1)))
    assert (first["rank_50"], first["rank_90"], first["rank_99"]) == (1, 1, 2)
    assert [equal["stable_rank"], equal["entropy_rank"]] == pytest.approx([3, 3])
    assert (equal["rank_50"], equal["rank_90"]) == (2, 3)
    assert set(zero.values()) == {0}


def test_a_stack_that_has_not_changed_is_not_decomposed():
    stack = LayerStack(torch.zeros(2, 6, 5))
    extracted = extract_stack(stack, ModuleNames(("h.0.q", "h.1.q")), ExtractSettings(3, 1))
    assert extracted.tensors == {}
    assert extracted.row["ranks"] == {}
    assert extracted.row["e_rasa"] == extracted.row["e_stored"] == 0
    assert stack.data_passes == 0


@pytest.mark.parametrize(("rank", "shape", "r"), [(4, (24, 4), 8), (3, (24, 20), 4)], ids=["taken whole", "exact"])
def test_k_auto_takes_no_pool_where_lora_misses_nothing(
    tmp_path: Path, rank: int, shape: tuple[int, int], r: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    b, a = shape
    factors = [
        [torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((b, rank), (rank, a))]
        for _ in range(5)
    ]
    save_file({f"h.{i}.q.weight": B @ A for i, (B, A) in enumerate(factors)}, tmp_path / "x.safetensors")
    words = ["--source", str(tmp_path / "x.safetensors"), "--rank", str(r), "--k", "auto"]
    assert main([*words, "--format", "lora-exact-rasa", "--out", str(tmp_path / "out"), "--quiet"]) == 0
    (row,) = report_of(tmp_path / "out")["stacks"]
    assert (row["k"], row["rank"], row["lower_bound_name"]) == (0, min(r, a), "none")
