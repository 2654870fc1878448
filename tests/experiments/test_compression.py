"""The experiment on trained LoRAs: what is stacked, what is counted, what is there by chance."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import rasa_theory as rt
from experiments.compression import approaches, collections, figure, run
from experiments.support.rows import read_rows
from rasa_theory import methods
from rasa_theory.common import InputError
from tests.helpers.problems import noise


def folder(path: Path, seed: int, rank: int = 2) -> Path:
    """A PEFT adapter of two layers and a head, of scaling 3."""
    path.mkdir()
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 3 * rank}
    (path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    factors = {}
    for n, module in enumerate(("layer.0.attention.self.query", "layer.1.attention.self.query", "head")):
        for side, shape in (("A", (rank, 6)), ("B", (8, rank))):
            values = noise(1, *shape, 10 * seed + 2 * n + (side == "B"))[0]
            factors[f"base_model.model.{module}.lora_{side}.weight"] = torch.as_tensor(values, dtype=torch.float32)
    save_file(factors, path / "adapter_model.safetensors")
    return path


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    names = {"lora-2-seed-0": 2, "lora-2-seed-1": 2, "lora-2-prose-seed-0": 2, "lora-3-seed-0": 3}
    return [folder(tmp_path / name, seed, rank) for seed, (name, rank) in enumerate(names.items())]


def collection(layers: int = 5, b: int = 12, a: int = 10, r: int = 2) -> collections.Collection:
    factors = rt.LoraFactors(torch.as_tensor(noise(layers, b, r, 1)), torch.as_tensor(noise(layers, r, a, 2)))
    return collections.Collection("lora", layers, "query", collections.EVERY, factors)


def test_seeds_are_a_set_and_tasks_of_one_rank_another(folders: list[Path]) -> None:
    found = collections.sets_of(folders)
    assert list(found) == ["lora-2", "lora-2-prose", "lora-3", "lora-2 + lora-2-prose"]
    assert {name: [adapter.path.name for adapter in adapters] for name, adapters in found.items()} == {
        "lora-2": ["lora-2-seed-0", "lora-2-seed-1"],
        "lora-2-prose": ["lora-2-prose-seed-0"],
        "lora-3": ["lora-3-seed-0"],
        "lora-2 + lora-2-prose": ["lora-2-seed-0", "lora-2-seed-1", "lora-2-prose-seed-0"],
    }


def test_slow_methods_take_part_where_they_are_not_too_slow() -> None:
    def methods_of(found: collections.Collection) -> set[str]:
        return {method for source, _, _, method in run.tasks(found, (0.5,), 1) if source == "trained"}

    sides, layer = {"side_columns", "side_rows"}, replace(collection(), layer="0")
    assert methods_of(collection()) == approaches.SOLVERS.keys() | sides
    assert methods_of(layer) == (approaches.SOLVERS.keys() | sides) - {"vera"}
    assert methods_of(collection(33)) == (approaches.SOLVERS.keys() | sides) - approaches.SLOW


def test_stacks_are_over_adapters_and_layers_and_over_adapters(folders: list[Path]) -> None:
    found = list(collections.collections_of("lora-2", collections.sets_of(folders)["lora-2"], None))
    assert {(c.kind, c.layer): c.stack.layers for c in found} == {
        ("query", "all"): 4, ("query", "0"): 2, ("query", "1"): 2, ("head", "all"): 2,
    }  # fmt: skip
    found = [c for c in found if c.kind == "query"]
    second = rt.load(str(folders[1]), torch.float64)[0][0]  # its layers, scaled as PEFT does
    torch.testing.assert_close(found[0].stack.values[1::2], second.values)
    torch.testing.assert_close(found[2].stack.values[1], second.values[1])
    assert found[0].parameters == methods.lora_parameters(4, (8, 6), 2)


EVERY = [
    pytest.param(name, marks=pytest.mark.slow) if name == "joint_diagonal" else name for name in approaches.SOLVERS
]
"""The names of all solvers. A diagonal core takes seconds."""


@pytest.mark.parametrize("module", ["encoder.layer.3.attention.self.query", "model.layers.0.query.dense"])
def test_kinds_have_short_names(module: str) -> None:
    assert collections.kind_of(module) == "query"


@pytest.mark.parametrize("name", EVERY)
def test_every_method_keeps_within_the_numbers_and_its_error_is_that_of_the_product(name: str) -> None:
    found = collection()
    for share in (0.3, 0.8):
        fit = approaches.SOLVERS[name](found, int(share * found.parameters))
        if fit is None:
            continue
        assert 0 < fit.parameters <= share * found.parameters
        direct = sum(float(((found.factors.update(i) - fit.update(i)) ** 2).sum()) for i in range(5))
        assert fit.error == pytest.approx(direct, rel=1e-6)  # the packages compute in float32


@pytest.mark.slow
@pytest.mark.parametrize("name", approaches.TURNING)
def test_in_bases_of_their_own_the_layers_are_smaller_and_nothing_else_changes(name: str) -> None:
    found = collection(3, 14, 13)
    assert found.turned.shape == (6, 6)
    for share in (0.5, 0.9):
        budget = int(share * found.parameters)
        fit = approaches.SOLVERS[name](found, budget)
        whole = methods.at_parameters(found.stack, budget, [name], slack=0.0).get(name)
        if whole is None or fit is None:
            assert whole is fit
            continue
        assert (fit.settings, fit.parameters) == (whole.settings, whole.parameters)
        assert fit.error == pytest.approx(whole.error, rel=1e-8)


@pytest.mark.parametrize("basis", ["columns", "whole"])
def test_as_many_components_as_fit(basis: str) -> None:
    found = collection()
    p = approaches.components(found, 200, basis)
    sizes = [methods.fit_share_basis(found.stack, 2, n, basis, found.factors).parameters for n in (p, p + 1)]
    assert sizes[0] <= 200 < sizes[1]


@pytest.mark.parametrize(("package", "ours"), [("lorashare", "share_columns"), ("vlora", "share_whole")])
def test_packages_compute_what_share_basis_does(package: str, ours: str) -> None:
    pytest.importorskip(package)
    found = collection()
    budget = int(0.8 * found.parameters)
    theirs, mine = (approaches.SOLVERS[name](found, budget) for name in (package, ours))
    assert theirs.parameters == mine.parameters
    assert theirs.error == pytest.approx(mine.error, rel=1e-5)


def test_random_loras_have_the_same_spectra_and_nothing_else_in_common() -> None:
    same = rt.LoraFactors(*(x[:1].expand(5, -1, -1).clone() for x in (collection().factors.B, collection().factors.A)))
    found = collections.Collection("lora", 5, "query", "0", same)
    drawn = found.random(0)
    torch.testing.assert_close(drawn.stack.spectra.singular_values(), found.stack.spectra.singular_values())
    torch.testing.assert_close(drawn.factors.B, found.random(0).factors.B)
    torch.testing.assert_close(
        collection().random(0).stack.spectra.singular_values(), collection().stack.spectra.singular_values()
    )  # of every layer its own
    assert not torch.equal(drawn.factors.B, found.random(1).factors.B)
    budget = found.parameters // 3  # five equal updates are one; in random directions they are not
    errors = [approaches.SOLVERS["joint_diagonal"](c, budget).error / c.stack.norm_squared for c in (found, drawn)]
    assert errors[0] < 1e-12
    assert errors[1] > 0.1
    assert approaches.SOLVERS["allocated"](found, budget).error == pytest.approx(
        approaches.SOLVERS["allocated"](drawn, budget).error
    )


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("core", ["full", "diagonal"])
def test_no_joint_basis_is_below_its_floor(rank: int, core: str) -> None:
    stack = collection().stack
    assert 0 < methods.joint_floor(stack, rank) <= methods.fit_joint(stack, rank, core).error


def test_the_floor_of_joint_bases_is_the_larger_tail_in_units_of_the_norm() -> None:
    """Layers of one common row: beside each other they are of rank five, below each other of rank one."""
    rows = rt.LoraFactors(torch.as_tensor(noise(5, 12, 1, 1)), torch.as_tensor(noise(1, 1, 10, 2)).expand(5, -1, -1))
    found = collections.Collection("lora", 5, "query", collections.EVERY, rows)
    literal = float((torch.linalg.svdvals(found.stack.values.transpose(0, 1).flatten(1))[2:] ** 2).sum())
    assert methods.joint_floor(found.stack, 2) == pytest.approx(literal)
    assert methods.joint_floor(found.stack.transpose(), 2) == pytest.approx(literal)
    factors = collection().factors
    large = replace(collection(), factors=rt.LoraFactors(10 * factors.B, factors.A))
    for method in ("joint_full", "joint_diagonal"):
        row = run.measured(large, 0.5, method)
        rank = int(row["settings"].split()[0].removeprefix("rank="))
        assert row["floor"] == pytest.approx(methods.joint_floor(large.stack, rank) / large.stack.norm_squared)
        assert 0 < row["floor"] <= row["error"] < 1
        assert row["used"] == row["parameters"] / large.parameters <= 0.5


def test_sides_say_what_one_space_of_r_dimensions_keeps() -> None:
    """Columns in common, rows apart."""
    factors = rt.LoraFactors(torch.as_tensor(noise(1, 12, 2, 1)).expand(4, -1, -1), torch.as_tensor(noise(4, 2, 10, 2)))
    found = collections.Collection("lora", 4, "query", collections.EVERY, factors)
    errors = [run.measured(found, "", f"side_{side}")["error"] for side in ("columns", "rows")]
    assert errors[0] < 1e-12
    assert errors[1] > 0.1


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_and_one_without_room_is_left_out(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--adapters", *map(str, folders[:2]), "--shares", "0.1", "0.5", "--draws", "1", "--out", str(tmp_path)]
    run.main(arguments)
    path = tmp_path / "compression.csv"
    whole = read_rows(path)
    assert "kept by one column space" in capsys.readouterr().out
    assert {row["share"] for row in whole if row["method"] == "lora"} == {0.5}
    assert all(row["used"] <= row["share"] for row in whole if row["share"] is not None)
    assert len({tuple(row[name] for name in run.KEY) for row in whole}) == len(whole)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[: len(lines) // 2]))
    run.main(arguments)
    again = read_rows(path)
    assert [row | {"seconds": 0} for row in again] == [row | {"seconds": 0} for row in whole]
    assert (tmp_path / "compression.png").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--kinds", "norm"], "--kinds 'norm' is none of head, query"),
        (["--shares", "0.5", "1.5"], "--shares must be above 0 and at most 1, not 1.5"),
        (["--shares", "0"], "--shares must be above 0 and at most 1, not 0"),
        (["--adapters", "missing"], "missing: not a folder with adapter_config.json"),
        (["--draws", "0"], "--draws must be at least 1, not 0"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(
    folders: list[Path], tmp_path: Path, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run.main(["--adapters", *map(str, folders), *words, "--out", str(tmp_path / "out")])
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_adapters_of_different_modules_are_refused(folders: list[Path], tmp_path: Path) -> None:
    other = folder(tmp_path / "lora-2-seed-7", 7)
    file = other / "adapter_model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if "head" not in name}, file)
    with pytest.raises(InputError, match=r"lora-2-seed-0 and .*lora-2-seed-7 are adapters of different modules"):
        collections.sets_of([*folders, other])


def test_means_are_over_stacks_that_all_have_room() -> None:
    base = {"set": "x", "source": "trained", "share": 0.5}
    rows = [base | {"kind": kind, "layer": "all", "method": "lora", "error": e} for kind, e in (("q", 0.2), ("k", 0.4))]
    rows.append(base | {"kind": "q", "layer": "all", "method": "vera", "error": 0.9})
    errors = figure.pooled(rows, "x", True)
    assert errors == {("lora", 0.5): pytest.approx(0.3)}
    assert figure.needed(errors, "lora", 0.3 + 1e-12) == 0.5
    assert figure.needed(errors, "lora", 0.1) is None
    assert figure.needed(errors | {("lora", 0.3): 0.3, ("lora", 0.2): 0.4}, "lora", 0.35) == 0.3
