"""Sharing that was planted between two sets of layers is found, and where none was planted there is none."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

import rasa_theory as rt
from experiments import seeds_and_tasks as experiment
from experiments.seeds_and_tasks import AS_THEY_ARE, TURNED_APART, TURNED_SET, Plan
from experiments.support.rows import read_rows
from tests.helpers.problems import noise, orthogonal

L, B, A = 4, 22, 20
PLAN = Plan(1, 1, rt.SolverOptions(effort="quick", max_sweeps=40))


def dyads(first: int, count: int, seed: int, layers: int = L) -> rt.LayerStack:
    """Layers of the same `count` dyads, in sizes of their own; stacks without a common number share none."""
    U, V = (torch.as_tensor(orthogonal(n, n)[:, first : first + count]) for n in (B, A))
    sizes = 3 + torch.as_tensor(noise(1, layers, count, seed)[0])
    return rt.LayerStack((U * sizes[:, None]) @ V.mT, "query")


def values(items: Iterable[experiment.Item]) -> dict[str, float]:
    return {item + index: value for item, index, value in items}


def best(first: rt.LayerStack, second: rt.LayerStack, how: str) -> float:
    return values(experiment.one_pool(first, second, PLAN, how))["best_found"]


def test_sharing_between_sets_is_found_and_lost_when_one_of_them_is_turned() -> None:
    """Eight dyads that all layers of both sets have fit into the eight terms of their pool."""
    first, second = dyads(0, 2 * L, 1), dyads(0, 2 * L, 2)
    assert best(first, second, TURNED_SET) > 0.1
    served = values(experiment.one_pool(first, second, PLAN, AS_THEY_ARE))
    assert served["best_found"] < 1e-6
    assert min(served[f"by_loss_of_sets{j}"] for j in range(2 * L)) > 1.5


def test_no_sharing_between_sets_is_found_where_only_layers_of_a_set_share() -> None:
    """Four dyads in each set: turning one of them loses nothing, turning the layers apart does."""
    first, second = dyads(0, L, 1), dyads(L, L, 2)
    assert best(first, second, TURNED_SET) < 1e-6
    assert best(first, second, TURNED_APART) > 0.1
    served = values(experiment.one_pool(first, second, PLAN, AS_THEY_ARE))
    assert served["best_found"] < 1e-6
    assert max(served[f"by_loss_of_sets{j}"] for j in range(2 * L)) < 1.01


@pytest.mark.slow
def test_pairs_of_the_same_layer_share_what_was_planted_in_them_and_permuted_ones_do_not() -> None:
    layers = [dyads(2 * i, 2, i, layers=2).values for i in range(L)]  # two dyads of their own for each pair
    first, second = (rt.LayerStack(torch.stack([pair[n] for pair in layers]), "query") for n in range(2))
    same = values(experiment.pairs(first, second, PLAN, 0))
    assert same["best_found"] < 1e-6 < same["e_lora_share"]
    assert values(experiment.pairs(first, second, PLAN, L // 2))["best_found"] > 0.1


def test_neighbours_that_share_have_a_pool_of_their_own() -> None:
    stack = rt.LayerStack(torch.cat([dyads(2 * n, 2, n, layers=2).values for n in range(2)]), "query")
    near, far = (values(experiment.by_depth(stack, PLAN, 2, how)) for how in ("neighbours", "distant"))
    assert near["best_found"] < 1e-6
    assert far["best_found"] > 0.1
    assert near["e_lora_share"] == pytest.approx(far["e_lora_share"])


@pytest.mark.parametrize(("layers", "size"), [(6, 2), (6, 3), (12, 4), (32, 8)])
def test_groups_hold_every_layer_once(layers: int, size: int) -> None:
    near, far = (experiment.groups(layers, size, how) for how in ("neighbours", "distant"))
    for groups in (near, far):
        assert sorted(layer for group in groups for layer in group) == list(range(layers))
        assert {len(group) for group in groups} == {size}
    assert all(group[-1] - group[0] == size - 1 for group in near)
    assert all(group[1] - group[0] == layers // size for group in far)
    assert size in experiment.sizes(layers)


def test_overlap_is_one_of_a_space_and_itself_and_of_others_the_mean_of_squared_cosines() -> None:
    U = torch.as_tensor(orthogonal(9, 1))[:, :6]
    turn = torch.as_tensor(orthogonal(2, 3))
    cosine = 0.6
    tilted = torch.stack([U[:, 0], cosine * U[:, 1] + 0.8 * U[:, 2]], 1)
    first = torch.stack([U[:, :2]] * 3)
    second = torch.stack([U[:, :2] @ turn, U[:, 2:4], tilted])
    each = [experiment.overlap(first[i : i + 1], second[i : i + 1]) for i in range(3)]
    assert each == pytest.approx([1, 0, (1 + cosine**2) / 2])
    assert experiment.overlap(first, second) == pytest.approx(sum(each) / 3)


def test_overlaps_are_of_the_same_layer_and_of_permuted_ones() -> None:
    """Each layer has two directions of its own, the same in both sets; the second set has the other sign."""
    U, V = torch.as_tensor(orthogonal(B, 1)), torch.as_tensor(orthogonal(A, 2))
    first = torch.stack([U[:, 2 * i : 2 * i + 2] @ V[:, 2 * i : 2 * i + 2].mT for i in range(L)])
    found = {(item, where): value for item, where, value in experiment.overlaps(
        rt.LayerStack(first, "query"), rt.LayerStack(-first, "query"), Plan(2, 1))}  # fmt: skip
    expected = {"cosine": (-1, 0), "columns": (1, 0), "rows": (1, 0)}
    for item, (same, other) in expected.items():
        assert found[item, "same layer"] == pytest.approx(same)
        assert found[item, "other layer"] == pytest.approx(other, abs=1e-12)
    assert (found["columns", "chance"], found["rows", "chance"]) == (2 / B, 2 / A)


def test_overlap_by_distance() -> None:
    """Layer i has the directions i and i + 1 of both sides: neighbours have half in common, others nothing."""
    U, V = torch.as_tensor(orthogonal(B, 1)), torch.as_tensor(orthogonal(A, 2))
    stack = rt.LayerStack(torch.stack([U[:, i : i + 2] @ V[:, i : i + 2].mT for i in range(L)]), "query")
    found = {(item, where): value for item, where, value in experiment.overlaps_by_distance(stack, Plan(2, 1))}
    for item in ("cosine", "columns", "rows"):
        assert [found[item, str(d)] for d in range(1, L)] == pytest.approx([0.5, 0, 0], abs=1e-12)


@pytest.mark.slow
def test_the_command_makes_every_row_and_takes_up_its_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--smoke", "--model", "synthetic", "--out", str(tmp_path)]
    experiment.main(words)
    file = tmp_path / "seeds_and_tasks.csv"
    rows, text = read_rows(file), file.read_bytes()
    assert {row["part"] for row in rows} == {"overlap", "pool", "pair", "depth"}
    assert {row["how"] for row in rows if row["part"] == "pool"} == {
        AS_THEY_ARE, TURNED_SET, TURNED_APART, "a pool each"
    }  # fmt: skip
    for row in (row for row in rows if row["item"] == "best_found"):
        where = {key: row[key] for key in experiment.KEY}
        own = {other["item"]: other["value"] for other in rows if where.items() <= other.items()}
        assert own["floor"] <= own["best_found"] <= own["allocation"] <= 1 + 1e-12
    experiment.main(words)
    assert file.read_bytes() == text
    assert "halves" in capsys.readouterr().out
