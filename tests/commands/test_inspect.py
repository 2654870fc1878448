"""From two checkpoints to the ranks that they need: right numbers, files that are whole, runs that go on."""

from __future__ import annotations

import csv
import importlib
import inspect as standard
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import rasa_theory as rt
from rasa_theory.commands.extract import main as extract
from rasa_theory.commands.inspect import main
from rasa_theory.inspection import InspectionFolder, inspection_job

SCHEMA = json.loads((Path(rt.__file__).parent / "data" / "inspect.schema.json").read_text(encoding="utf-8"))
SHAPES = {"self_attn.q_proj": (20, 16), "mlp.up_proj": (24, 16), "mlp.down_proj": (16, 24)}
LAYERS = 3


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of three layers, with one norm each and an embedding, before and after a change."""
    folder, generator = tmp_path_factory.mktemp("pair"), torch.Generator().manual_seed(0)
    base: dict[str, torch.Tensor] = {"model.embed_tokens.weight": torch.randn(30, 16, generator=generator)}
    for i in range(LAYERS):
        for kind, shape in SHAPES.items():
            base[f"model.layers.{i}.{kind}.weight"] = torch.randn(*shape, generator=generator)
        base[f"model.layers.{i}.input_layernorm.weight"] = torch.ones(16)
    tuned = {}
    for n, (key, weight) in enumerate(base.items()):
        noise = torch.randn(weight.shape, generator=generator)
        falling = torch.arange(1, 17) ** -1.0 if weight.shape[-1] == 16 else torch.ones(1)
        tuned[key] = weight + (0.01 + 0.002 * n) * noise * falling
    for name, tensors in (("base", base), ("tuned", tuned)):
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors")
    return folder


def updates(pair: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Base weight and update of each matrix in the layers, in float64, by module."""
    from safetensors.numpy import load_file

    base, tuned = (load_file(pair / name / "model.safetensors") for name in ("base", "tuned"))
    return {
        key.removesuffix(".weight"): (base[key].astype(np.float64), (tuned[key] - base[key]).astype(np.float64))
        for key in base
        if "_proj" in key
    }


def run(pair: Path, out: Path | str, *more: str) -> int:
    words = ["--base", str(pair / "base"), "--tuned", str(pair / "tuned"), "--out", str(out), "--quiet"]
    return main([*words, "--ranks", "2,4,8", *more])


def report_of(out: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out / "inspect.json").read_text())
    return report


def test_the_numbers_are_those_of_float64_singular_values(pair: Path, tmp_path: Path) -> None:
    assert run(pair, tmp_path) == 0
    report, exact = report_of(tmp_path), updates(pair)
    jsonschema.validate(report, SCHEMA)
    assert {row["kind"]: row["shape"] for row in report["stacks"]} == {k: list(s) for k, s in SHAPES.items()}
    seen = set()
    for row in report["stacks"]:
        for i, module in enumerate(row["modules"]):
            W, M = exact[module["module"]]
            share = np.cumsum(np.linalg.svd(M, compute_uv=False) ** 2) / (M**2).sum()
            assert module["layer"] == i
            assert module["relative_norm"] == pytest.approx(np.linalg.norm(M) / np.linalg.norm(W), rel=1e-6)
            for rank, (low, high) in zip((2, 4, 8), module["energy"], strict=True):
                assert low - 1e-12 <= share[rank - 1] <= high + 1e-12
                assert high - low < 1e-10
            assert module["stable_rank"] == pytest.approx([1 / share[0]] * 2, rel=1e-9)
            seen.add(module["module"])
    assert seen == exact.keys()
    whole = sum((M**2).sum() for _, M in exact.values())
    for point in report["curve"]:
        tails = sum((np.linalg.svd(M, compute_uv=False)[point["rank"] :] ** 2).sum() for _, M in exact.values())
        assert point["error"] == pytest.approx([tails / whole] * 2, abs=1e-10)


def test_shared_spaces_are_those_of_the_singular_vectors(pair: Path, tmp_path: Path) -> None:
    assert run(pair, tmp_path) == 0
    exact = updates(pair)
    for row in report_of(tmp_path)["stacks"]:
        d = row["shared"]["rank"]
        assert d == 8
        svds = [np.linalg.svd(exact[module["module"]][1]) for module in row["modules"]]
        for side, spaces in (("columns", [U[:, :d] for U, _, _ in svds]), ("rows", [Vh[:d].T for _, _, Vh in svds])):
            chance = d / len(spaces[0])
            overlaps = [((spaces[i].T @ spaces[j]) ** 2).sum() / d for i in range(LAYERS) for j in range(i + 1, LAYERS)]
            assert row["shared"][side]["overlap"] == pytest.approx(
                (np.mean(overlaps) - chance) / (1 - chance), abs=1e-6
            )


def test_the_recommended_rank_is_what_extraction_makes_of_it(pair: Path, tmp_path: Path) -> None:
    assert run(pair, tmp_path / "i", "--error", "0.2", "--ranks", "16") == 0
    found = report_of(tmp_path / "i")["recommendation"]
    words = ["--base", str(pair / "base"), "--tuned", str(pair / "tuned"), "--quiet", "--k", "0"]
    assert extract([*words, "--rank", str(found["one_rank"]["rank"]), "--out", str(tmp_path / "one")]) == 0
    assert extract([*words, "--rank", "auto", "--error", "0.2", "--out", str(tmp_path / "own")]) == 0
    for name, choice in (("one", found["one_rank"]), ("own", found["own_ranks"])):
        rows = json.loads((tmp_path / name / "report.json").read_text())["stacks"]
        error = sum(row["e_lora"] for row in rows) / sum(row["norm_squared"] for row in rows)
        assert choice["error"] == pytest.approx([error] * 2, abs=1e-9)
        assert error <= 0.2
    ranks = {name: rank for row in rows for name, rank in row["ranks"].items()}
    assert {name: rank for name, rank in found["own_ranks"]["ranks"].items() if rank} == ranks


def test_the_table_fits_80_columns_and_csv_has_a_line_for_each_rank(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(pair, tmp_path, "--size", "6KB") == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.replace(str(pair), "P").replace(str(tmp_path), "O").splitlines())) <= 80
    assert "model.embed_tokens.weight: 0.4 % (an embedding" in printed
    assert "In at most 0.006 MB: rank" in printed
    lines = list(csv.DictReader((tmp_path / "inspect.csv").open()))
    assert len(lines) == len(SHAPES) * LAYERS * 3
    assert {line["rank"] for line in lines} == {"2", "4", "8"}
    assert (tmp_path / "inspect.png").stat().st_size > 10_000


def test_left_out_tensors_have_their_share(pair: Path, tmp_path: Path) -> None:
    assert run(pair, tmp_path) == 0
    from safetensors.numpy import load_file

    base, tuned = (load_file(pair / name / "model.safetensors") for name in ("base", "tuned"))
    left_out = {one["name"]: one["norm_squared"] for one in report_of(tmp_path)["left_out"]}
    assert len(left_out) == 1 + LAYERS
    for name, norm in left_out.items():
        assert norm == pytest.approx(float(((tuned[name] - base[name]).astype(np.float64) ** 2).sum()), rel=1e-5)


def test_interrupted_it_goes_on_and_gives_the_same_files(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(pair, tmp_path / "whole", "--error", "0.1") == 0
    table = capsys.readouterr().out.splitlines()[:6]  # source, head, rule, three kinds
    real, measured = inspection_job.measure, []

    def watched(stack: rt.LayerStack, *rest: Any) -> Any:
        if len(measured) == 2 and not stopped:
            stopped.append(stack.name)
            raise KeyboardInterrupt
        measured.append(stack.name)
        return real(stack, *rest)

    stopped: list[str] = []
    monkeypatch.setattr(inspection_job, "measure", watched)
    assert run(pair, tmp_path / "broken", "--error", "0.1") == 130
    printed = capsys.readouterr()
    assert (
        f"interrupted: 2 of 3 stacks finished and kept in {tmp_path}/broken/; the same command goes on" in printed.err
    )
    assert printed.out.splitlines() == table[:5], "each row as it is finished"
    assert not (tmp_path / "broken" / "inspect.json").exists()
    monkeypatch.setattr(
        inspection_job, "measure", lambda stack, *rest: measured.append(stack.name) or real(stack, *rest)
    )
    assert run(pair, tmp_path / "broken", "--error", "0.1") == 0
    assert len(measured) == len(set(measured)) == 3, "no stack twice"
    assert capsys.readouterr().out.splitlines()[:6] == table
    for name in ("inspect.csv", "inspect.png"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    reports = [report_of(tmp_path / name) for name in ("broken", "whole")]
    for report in reports:
        del report["command"]
    assert reports[0] == reports[1]


def test_another_goal_measures_nothing_again(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(pair, tmp_path) == 0
    assert report_of(tmp_path)["recommendation"] is None
    monkeypatch.setattr(inspection_job, "measure", lambda *_: pytest.fail("measured again"))
    assert run(pair, tmp_path, "--energy", "0.9") == 0
    assert report_of(tmp_path)["recommendation"]["goal"] == {"energy": 0.9}


def test_a_folder_of_another_run_is_refused_unless_overwritten(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(pair, tmp_path, "--modules", "*q_proj*") == 0
    before = (tmp_path / "inspect.json").read_bytes()
    assert run(pair, tmp_path) == 2
    assert "holds an inspection with other stacks" in capsys.readouterr().err
    assert (tmp_path / "inspect.json").read_bytes() == before
    assert run(pair, tmp_path, "--overwrite") == 0
    assert len(report_of(tmp_path)["stacks"]) == 3
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "inspect.csv").write_text("mine")
    assert run(pair, tmp_path / "other") == 2
    assert "belongs to no inspection" in capsys.readouterr().err
    assert (tmp_path / "other" / "inspect.csv").read_text() == "mine"


@pytest.mark.skipif(sys.platform == "win32", reason="there are no locks")
def test_an_inspection_in_progress_is_not_overwritten(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with InspectionFolder(tmp_path, {"stacks": ["of another pair"]}) as folder:
        folder.add_row(0, {"stack": 0})
        assert run(pair, tmp_path, "--overwrite") == 2
        assert "another process is inspecting into" in capsys.readouterr().err
        assert folder.row(0) == {"stack": 0}
    assert run(pair, tmp_path, "--overwrite") == 0


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--error", "2"], "error must be at least 0 and below 1"),
        (["--energy", "0"], "energy must be above 0"),
        (["--error", "0.1", "--size", "3MB"], "name exactly one of error, energy and size, got error and size"),
        (["--size", "many"], "'many' is not a size"),
        (["--size", "0"], "size must be at least 1"),
        (["--ranks", "4,x"], "'4,x' is not a whole number or a list"),
        (["--ranks", "0"], "ranks must be at least 1"),
        (["--ranks", "9999"], "from 1 to 4096, got 9999"),
        (["--modules", "nothing"], "no stack matches"),
        (["--memory", "1KB"], "(--memory)"),
        (["--device", "nowhere"], "(--device)"),
        (["--rank", "4"], "unrecognized arguments"),
        (["--source", "x"], "exclude each other"),
    ],
)
def test_bad_input_is_one_sentence(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], sentence: str
) -> None:
    assert run(pair, tmp_path / "out", *more) == 2
    said = capsys.readouterr().err.strip()
    assert sentence in said
    assert said.count("\n") == 0
    assert not (tmp_path / "out").exists()


def test_strangers_are_warned_of_last(pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = {key: torch.randn(20, 16) for key in ("model.layers.0.a.weight", "model.layers.1.a.weight")}
    for name, factor in (("base", 1.0), ("tuned", 1.9)):
        (tmp_path / name).mkdir()
        save_file({key: factor * weight for key, weight in base.items()}, tmp_path / name / "model.safetensors")
    assert run(tmp_path, tmp_path / "out") == 0
    assert "WARNING" in capsys.readouterr().out.split("Files:")[1]
    (warning,) = report_of(tmp_path / "out")["warnings"]
    assert "0.9 times ||base||" in warning
    assert run(pair, tmp_path / "fine") == 0
    assert report_of(tmp_path / "fine")["warnings"] == []


def test_other_sources_have_no_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "stack.npy", np.random.default_rng(0).standard_normal((2, 9, 7)))
    assert main(["--source", str(tmp_path / "stack.npy"), "--out", "none", "--quiet", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    jsonschema.validate(report, SCHEMA)
    assert report["relative_norm"] is None
    assert report["stacks"][0]["modules"][1]["module"] == "stack[1]"
    assert list(report["stacks"][0]["energy"][1:]) == [[1.0, 1.0]] * 5


def test_adapters_are_compared_over_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Factors are never multiplied out; the truth is alpha / r times B A, by NumPy."""
    generator, updates_of = np.random.default_rng(0), []
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj"]}
    for task in ("a", "b"):
        B, A = generator.standard_normal((10, 3)), generator.standard_normal((3, 12))
        updates_of.append(2 * B @ A)
        (tmp_path / task).mkdir()
        tensors = {f"{name}.lora_B.weight": torch.tensor(B), f"{name}.lora_A.weight": torch.tensor(A)}
        save_file(tensors, tmp_path / task / "adapter_model.safetensors")
        (tmp_path / task / "adapter_config.json").write_text(json.dumps(config))
    words = ["--adapters", str(tmp_path / "a"), str(tmp_path / "b"), "--out", "none", "--quiet", "--json"]
    assert main([*words, "--ranks", "1,2,3"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["stacks"]
    assert [module["module"].partition("/")[0] for module in row["modules"]] == ["0", "1"]
    for module, M in zip(row["modules"], updates_of, strict=True):
        share = np.cumsum(np.linalg.svd(M, compute_uv=False) ** 2)[:3] / (M**2).sum()
        assert module["norm_squared"] == pytest.approx((M**2).sum())
        assert [low for low, _ in module["energy"]] == pytest.approx(share, abs=1e-9)


@pytest.mark.slow
def test_a_memory_limit_reads_the_same_from_the_files(pair: Path, tmp_path: Path) -> None:
    assert run(pair, tmp_path / "all") == 0
    assert run(pair, tmp_path / "limited", "--memory", "30KB") == 0
    reports = [report_of(tmp_path / name) for name in ("all", "limited")]
    assert reports[0]["stacks"] == reports[1]["stacks"]


def test_a_dry_run_writes_nothing(pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(pair, tmp_path / "out", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "mlp.up_proj.weight: 3 x 24 x 16" in printed
    assert "One stack is in memory at a time" in printed
    assert not (tmp_path / "out").exists()


def test_unchanged_models_are_said_to_be_so(pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--base", str(pair / "base"), "--tuned", str(pair / "base"), "--out", str(tmp_path), "--quiet"]
    assert main([*words, "--error", "0.1"]) == 0
    assert "No stack has changed." in capsys.readouterr().out
    assert report_of(tmp_path)["curve"] == []


# ---- three things called inspect


def test_the_function_stays_one_after_the_module_is_imported() -> None:
    module = importlib.import_module("rasa_theory.inspect")
    report = rt.inspect([rt.LayerStack(np.eye(3)[None])], (1,))
    jsonschema.validate(report, SCHEMA)
    assert module([rt.LayerStack(np.eye(3)[None])], (1,)) == report  # type: ignore[operator]
    assert module.main(["--source", "nowhere", "--out", "none"]) == 2


def test_the_standard_library_keeps_its_inspect() -> None:
    """Also where the folder of the package is on sys.path, as for `python rasa_theory/extract.py`."""
    folder = Path(rt.__file__).parent
    code = (
        f"import sys; sys.path.insert(0, {str(folder)!r}); import dataclasses, inspect;"
        f"assert inspect.__file__ == {standard.__file__!r}, inspect; assert inspect.signature(dataclasses.dataclass)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_as_a_module_it_runs(pair: Path) -> None:
    words = ["-m", "rasa_theory.inspect", "--base", str(pair / "base"), "--tuned", str(pair / "tuned"), "--out", "none"]
    environment = os.environ | {"PYTHONPATH": str(Path(rt.__file__).parents[1])}
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "All modules at one rank" in done.stdout
