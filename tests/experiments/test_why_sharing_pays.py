"""Overlaps, counts and ranks in the experiment on sharing, on stacks with planted pools."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

import rasa_theory as rt
from experiments.why_sharing_pays import figure, measures, run
from experiments.why_sharing_pays.stacks import KINDS, Plan
from tests.helpers.problems import noise, orthogonal

PLAN = Plan(rank=2, kinds_ks=(1,), task_ks=(1,), sweeps=30)
L, B, A = 3, 14, 12


def stack(values: object, name: str = "query") -> rt.LayerStack:
    return rt.LayerStack(torch.as_tensor(values), name)


def alike(first: int, count: int, scale: float = 1.0) -> rt.LayerStack:
    """Three layers of the same `count` dyads, of other sizes in each; stacks without a common number have none."""
    U, V = (torch.as_tensor(orthogonal(n, n)[:, first : first + count]) for n in (B, A))
    sizes = scale * (3 + torch.as_tensor(noise(1, L, count, first)[0]).sin())
    return stack((U * sizes[:, None]) @ V.mT)


def items(rows: Iterable[measures.Item]) -> dict[str, list[float | str]]:
    values: dict[str, list[float | str]] = {}
    for _, item, _, value in rows:
        values.setdefault(item, []).append(value)
    return values


@pytest.mark.slow
def test_one_pool_over_two_tasks_counts_the_tasks_that_a_term_serves() -> None:
    plan = Plan(rank=1, task_ks=(1,), sweeps=30)
    apart = items(measures.over_tasks(alike(0, 3), alike(3, 3, 0.9), plan, figure.HOW[0]))
    assert apart["by_loss_of_tasks"] == pytest.approx([1] * 6)  # three dyads of either task, six terms
    assert min(map(float, apart["by_loss"])) > 2
    one, other = alike(0, 6), alike(0, 6, 1.1)
    both = items(measures.over_tasks(one, other, plan, figure.HOW[0]))
    assert min(map(float, both["by_loss_of_tasks"])) > 1.9
    assert float(both["e_lora"][0]) == pytest.approx(sum(rt.solve_lora(s, 1).error for s in (one, other)))
    turned = items(measures.over_tasks(one, other, plan, figure.HOW[2]))
    assert turned["allocation"] == pytest.approx(both["allocation"])
    assert float(turned["best_found"][0]) > 0.1 > float(both["best_found"][0])


@pytest.mark.slow
def test_one_pool_over_kinds_counts_the_kinds_and_the_numbers() -> None:
    plan = Plan(rank=1, kinds_ks=(1,), sweeps=30)
    found = {"query": alike(0, 3), "key": alike(3, 3, 0.9)}
    row = items(measures.over_kinds(found, figure.HOW[0], plan))
    assert row["by_loss_of_kinds"] == pytest.approx([1] * 6)
    assert row["parameters"] == [2 * L * (A + B) + (2 * L) ** 2]
    square = stack(noise(L, B, B))
    flipped = {"query": square, "attention_output": square.transpose()}
    row = items(measures.over_kinds(flipped, figure.HOW[1], plan))  # transposed again, the two are one
    plain = items(measures.over_kinds({"query": square, "key": square}, figure.HOW[0], plan))
    assert row["best_found"] == pytest.approx(plain["best_found"])


@pytest.mark.slow
def test_a_pool_for_each_kind_gains_what_each_gains_alone() -> None:
    plan = Plan(rank=1, kinds_ks=(1,), sweeps=30)
    stacks = {"query": stack(noise(L, B, A)), "key": stack(3 * noise(L, B, A, 1))}
    row, budget = items(measures.separately(stacks, plan)), rt.RankBudget(1, 1)
    own = [rt.gain(one, budget, plan.solver) for one in stacks.values()]
    e_lora = sum(gain.e_lora for gain in own)
    assert row["e_lora"] == pytest.approx([e_lora])
    assert row["allocation"] == pytest.approx([sum(gain.e_allocation for gain in own) / e_lora])
    assert row["best_found"] == pytest.approx([sum(gain.e_rasa for gain in own) / e_lora], rel=1e-3)
    assert row["floor"] == pytest.approx([sum(gain.floor.value for gain in own) / e_lora])
    assert len(row["by_loss"]) == 6


def test_a_pool_for_each_layer_has_one_layer_of_each_kind() -> None:
    kinds = {
        "query": stack(noise(3, 5, 5, 0)),
        "key": stack(noise(3, 5, 5, 1)),
        "attention_output": stack(noise(3, 5, 5, 2)),
    }
    query, key, output = (kind.values for kind in kinds.values())
    same, other = (measures.one_of_each_kind(kinds, step) for step in (0, 1))
    assert len(same) == len(other) == 3
    assert torch.equal(same["layer 2"].values, torch.stack([query[2], key[2], output[2].mT]))
    assert torch.equal(other["layer 2"].values, torch.stack([query[2], key[0], output[1].mT]))


def test_pools_over_kinds_have_the_matrices_that_their_names_say() -> None:
    kinds = {name: stack(noise(4, 5, 5, n), name) for n, name in enumerate(KINDS)}
    first = {key[1]: work.args[0] for key, work in run.units_over_kinds(kinds, PLAN, figure.FIRST_RUN)}
    assert first[figure.EACH] is kinds
    query, key = (kinds[name].values for name in ("query", "key"))
    assert torch.equal(first[figure.LAYER]["layer 1"].values[:2], torch.stack([query[1], key[1]]))
    assert torch.equal(first[figure.LAYERS]["layer 1"].values[:2], torch.stack([query[1], key[2]]))
    turned, same = first[figure.LAYER_APART]["layer 1"], first[figure.LAYER]["layer 1"]
    assert torch.allclose(turned.spectra.singular_values(), same.spectra.singular_values())
    assert not torch.allclose(turned.values, same.values)
    few = {name: stack(one.values[:3], name) for name, one in kinds.items()}
    ways = [key[1] for key, _ in run.units_over_kinds(few, PLAN, "all kinds, prose")]
    assert ways == [figure.EACH, figure.LAYER, figure.LAYER_APART]  # three layers of four kinds cannot all differ


def test_a_floor_of_other_updates_of_the_same_name_is_not_used(capsys: pytest.CaptureFixture[str]) -> None:
    one, budget = stack(noise(L, B, A)), rt.RankBudget(2, 1)
    solution = rt.solve_rasa(one, budget, rt.SolverOptions(max_sweeps=3))
    parts = rt.gain(one, budget, solution=solution)
    allocation = parts.e_allocation / parts.e_lora
    own = items(measures.point(one, budget, solution, {"allocation": allocation, "two_sided": 0.5}))
    assert (own["floor"], own["floor_name"]) == ([0.5], ["two-sided"])
    other = items(measures.point(one, budget, solution, {"allocation": allocation + 1e-6, "two_sided": 0.5}))
    assert (other["floor"], other["floor_name"]) == ([parts.floor.value / parts.e_lora], [parts.floor.name])
    assert "two-sided floor of query, k = 1 left out" in capsys.readouterr().out


def test_separate_pools_are_weighed_by_the_errors_of_lora() -> None:
    def rows(source: str, name: str, e_lora: float, allocation: float, best: float) -> list[dict[str, object]]:
        base = {"part": "pool", "source": source, "stack": name}
        return [base | {"k": None, "item": "e_lora", "value": e_lora},
                base | {"k": 1, "item": "allocation", "value": allocation},
                base | {"k": 1, "item": "best_found", "value": best},
                base | {"k": 4, "item": "best_found", "value": 0.1}]  # fmt: skip

    table = figure.Results([*rows("updates", "query", 3.0, 0.9, 0.8), *rows("second task", "query", 1.0, 0.7, 0.4)])
    found = figure.separate_pools(table, [("updates", "query"), ("second task", "query")], 1)
    assert found == pytest.approx(((3 * 0.9 + 0.7) / 4, (3 * 0.8 + 0.4) / 4))
    assert figure.separate_pools(table, [("updates", "query")], 1) == pytest.approx((0.9, 0.8))


def test_ranks_of_layers_are_those_of_equal_values() -> None:
    sigma = torch.zeros(2, 10, dtype=torch.float64)
    sigma[0, :4], sigma[1, 0] = 2.0, 3.0
    U, V = torch.as_tensor(orthogonal(B, 1))[:, :10], torch.as_tensor(orthogonal(A, 2))[:, :10]
    row = items(measures.sides(stack((U * sigma[:, None]) @ V.mT), PLAN))
    assert row["entropy_rank"] == pytest.approx([4, 1])
    assert row["stable_rank"] == pytest.approx([4, 1])
    assert row["rank_90"] == [4, 1]
