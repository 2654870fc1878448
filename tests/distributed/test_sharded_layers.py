"""Layers sharded over several processes: the same answers as in one, and counted traffic."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import rasa_theory as rt
from rasa_theory import linalg
from rasa_theory.common import InputError
from rasa_theory.distributed import LayerSharding, Processes
from rasa_theory.solvers import RasaDescent, SearchCore, allocation_start, cancellation, term_size, updates
from rasa_theory.sources import open_source, planted_stack
from tests.helpers.problems import decaying
from tests.helpers.processes import Pool
from tests.helpers.strategies import fewer_examples

STARTS = ("best", "allocation", "lora", "random", "common", "pencil")


def dealt(processes: Processes, values: Any, **options: Any) -> rt.LayerStack:
    sharding = LayerSharding.of(len(values), processes)
    return rt.LayerStack(torch.as_tensor(values)[sharding.local], sharding=sharding, **options)


# ---- the same answers


def solved(processes: Processes, values: Any, rank: int, k: int, options: dict[str, Any]) -> tuple[Any, ...]:
    stack, budget = dealt(processes, values), rt.RankBudget(rank, k)
    found = rt.solve_rasa(stack, budget, rt.SolverOptions(**options))
    again = rt.reconstruction_error(stack, found.factors)
    drop = rt.mixing_drop(stack, rt.RasaFactors.from_lora(rt.solve_lora(stack, rank).factors, budget))
    floors = [floor.value for floor in rt.bounds.closed_floors(stack, budget)]
    whole = found.factors.gathered()
    facts = (found.error, again, rt.solve_lora(stack, rank).error, rt.allocation_bound(stack, budget).value, drop)
    words = (found.stop_reason.name, found.start, found.sweeps, found.data_passes, whole.layers, whole.parameters)
    return facts, floors, found.layer_errors, words


def check_same(pool: Pool, worlds: tuple[int, ...], *arguments: Any) -> None:
    ((facts, floors, errors, words),) = pool.run(1, solved, *arguments)
    for world_size in worlds:
        answers = pool.run(world_size, solved, *arguments)
        assert all(answer == answers[0] for answer in answers)  # bit by bit
        other, other_floors, other_errors, other_words = answers[0]
        assert other_words == words
        assert np.allclose(other[:4], facts[:4], rtol=1e-10, atol=0)
        assert np.isclose(other[4], facts[4], rtol=1e-8, atol=1e-12 * facts[2])
        assert np.allclose(other_floors, floors, rtol=1e-10, atol=1e-12 * facts[2])
        assert np.allclose(other_errors, errors, rtol=1e-9, atol=1e-12 * facts[2])


@pytest.mark.slow
@pytest.mark.parametrize("start", [pytest.param("best", marks=pytest.mark.slow), *STARTS[1:]])
def test_two_three_and_four_processes_give_the_errors_of_one(pool: Pool, start: str) -> None:
    """Seven layers: every share is uneven."""
    worlds = (3,) if start == "best" else (2, 3, 4)  # the race is of the other starts
    check_same(pool, worlds, decaying(7, 24, 20, 2), 3, 1, {"start": start, "max_sweeps": 1 + (start != "best")})


@pytest.mark.parametrize("sweep", ["joint", "paper"])
def test_the_other_sweeps(pool: Pool, sweep: str) -> None:
    check_same(pool, (3,), decaying(5, 24, 20, 1), 3, 2, {"start": "lora", "sweep": sweep, "max_sweeps": 12})


@pytest.mark.slow
@pytest.mark.parametrize("start", ["random", "lora"])
def test_bases_that_grow_do_so_by_what_all_layers_show(pool: Pool, start: str) -> None:
    """Too large for bases of the whole space; at LoRA's optimum the directions are noise, and random ones are tried."""
    check_same(pool, (2,), decaying(3, 90, 80, 1), 2, 1, {"start": start, "max_sweeps": 2})


def solved_by_products(processes: Processes, values: Any, rank: int, k: int) -> tuple[float, ...]:
    stack, budget = dealt(processes, values), rt.RankBudget(rank, k)
    found = rt.solve_rasa(stack, budget, rt.SolverOptions(start="allocation", max_sweeps=2, spectra="leading"))
    leading = stack.with_spectra("leading", budget)
    lora, allocation = rt.solve_lora(leading, rank).error, rt.allocation_bound(leading, budget).value
    return lora, allocation, found.error, rt.lower_bound(stack, budget, spectra="leading").value


@pytest.mark.slow
def test_leading_directions_are_those_of_one_process(pool: Pool) -> None:
    values = decaying(5, 110, 120, 1)
    (one,) = pool.run(1, solved_by_products, values, 2, 1)
    for world_size in (2, 4):
        answers = pool.run(world_size, solved_by_products, values, 2, 1)
        assert all(answer == answers[0] for answer in answers)
        assert np.allclose(answers[0], one, rtol=1e-7, atol=0)


@pytest.mark.slow
def test_fewer_layers_than_processes(pool: Pool) -> None:
    """The last processes hold none."""
    check_same(pool, (4,), decaying(2, 24, 20, 1), 3, 1, {"start": "random", "max_sweeps": 2})


@fewer_examples(10)
@given(
    st.tuples(st.integers(1, 5), st.integers(6, 14), st.integers(6, 14)),
    st.integers(1, 3),
    st.integers(0, 3),
    st.integers(0, 100),
)
def test_small_stacks_in_two_processes(pool: Pool, shape: tuple[int, int, int], rank: int, k: int, seed: int) -> None:
    options = {"start": "allocation", "max_sweeps": 2, "sweep": "joint"}
    check_same(pool, (2,), decaying(*shape, seed), rank, min(rank, k), options)


def core_arrays(processes: Processes, values: Any) -> tuple[Any, Any, Any]:
    """K, U and V of the core at the allocation start."""
    unit = dealt(processes, values).unit()
    start = allocation_start(unit, rt.RankBudget(3, 1))
    core = SearchCore.at(unit, start)
    return core.K.numpy(), core.U.numpy(), core.V.numpy()


def test_the_core_of_a_search_is_the_same_to_the_bit_in_all_processes(pool: Pool) -> None:
    """Sides of 120 and 110, so that its bases are smaller; as a whole the same as in one process."""
    values = decaying(5, 120, 110, 1)
    ((K, U, V),) = pool.run(1, core_arrays, values)
    assert K.shape[0] == 5
    assert all(W.shape[1] < len(W) for W in (U, V))
    answers = pool.run(3, core_arrays, values)
    for name, *found in zip("KUV", *answers, strict=True):
        assert all(np.array_equal(one, found[0]) for one in found), name
    projections = (U @ K @ V.T, *(other_U @ other_K @ other_V.T for other_K, other_U, other_V in answers))
    assert np.allclose(projections, projections[0], rtol=0, atol=1e-9 * np.linalg.norm(projections[0]))


def test_planted_factors_are_found(pool: Pool) -> None:
    stack, _ = planted_stack(5, (30, 28), rt.RankBudget(2, 1))
    values = stack.values.numpy()
    (alone,) = pool.run(1, solved, values, 2, 1, {})
    for found in pool.run(3, solved, values, 2, 1, {}):
        assert found[3][1] == alone[3][1]
        assert max(found[0][0], alone[0][0]) <= stack.rounding**2


# ---- one process alone decides, or all


def one_layer_is_singular(processes: Processes) -> tuple[list[float], float]:
    sharding = LayerSharding.of(3, processes)
    G = torch.eye(2).double().repeat(3, 1, 1)
    G[2] = 1.0
    g, noise = torch.ones(3, 2, 1).double(), torch.full((3, 1), 1e-14).double()
    own = sharding.local
    x, value = linalg.solve_layers(
        G[own], g[own], torch.ones(2).double(), noise[own], sharding, lambda x: (x * x).sum()
    )
    return sharding.all_gather(x).flatten().tolist(), float(value)


def test_all_take_the_safe_way_where_one_layer_needs_it(pool: Pool) -> None:
    (alone,) = pool.run(1, one_layer_is_singular)
    for found in pool.run(2, one_layer_is_singular):
        assert found[0] == alone[0]
        assert np.isclose(found[1], alone[1], rtol=1e-15)
    assert np.allclose(alone[0], [1, 1, 1, 1, 0.5, 0.5])


def in_order(processes: Processes, terms: list[float]) -> float:
    sharding = LayerSharding.of(len(terms), processes)
    own = [torch.tensor(x, dtype=torch.float64) for x in terms[sharding.local]]
    return float(sharding.sum_in_order(torch.zeros(()).double(), own))


def test_a_sum_in_order_is_the_same_to_the_last_bit(pool: Pool) -> None:
    terms = [1.0, *8 * [1e-16]]  # in any other order more than 1
    assert {found for n in (1, 2, 3, 4) for found in pool.run(n, in_order, terms)} == {sum(terms)}


def most_of_all(processes: Processes, values: Any) -> tuple[float, float, list[float]]:
    stack = dealt(processes, values)
    f = rt.RasaFactors.from_lora(rt.solve_lora(stack, 2).factors, rt.RankBudget(2, 1))
    f = f.scaled(torch.tensor([1.0, 2.0, 5.0]).double()[stack.sharding.local])
    mixing = torch.arange(1.0, 10.0).double().reshape(3, 3)[stack.sharding.local]
    evened = dataclasses.replace(f, mixing=mixing).evened()
    return cancellation(stack, f), term_size(stack, f), evened.mixing.abs().amax(1).tolist()


def test_the_largest_and_the_sums_are_those_of_all_layers(pool: Pool) -> None:
    """The largest lies in the last process."""
    (alone,) = pool.run(1, most_of_all, decaying())
    found = pool.run(3, most_of_all, decaying())
    assert [x[0] for x in found] == [alone[0]] * 3
    assert np.allclose([x[1] for x in found], alone[1], rtol=1e-14)
    assert [x for one in found for x in one[2]] == alone[2]


def first_without_private_terms(processes: Processes, values: Any) -> list[float]:
    unit = dealt(processes, values).unit()
    f = rt.RasaFactors.from_lora(rt.solve_lora(unit, 2).factors, rt.RankBudget(2, 1))
    kept = torch.tensor([0.0, 1.0, 1.0]).double()[unit.sharding.local, None, None]
    f = dataclasses.replace(f, private_A=f.private_A * kept)
    return RasaDescent(unit, f, "joint", "lora").run(1, 0.0).history


def test_private_terms_lack_only_where_no_layer_has_any(pool: Pool) -> None:
    """The first layer has none, and is alone in its process."""
    (alone,) = pool.run(1, first_without_private_terms, decaying())
    for found in pool.run(3, first_without_private_terms, decaying()):
        assert np.allclose(found, alone, rtol=1e-12)


# ---- traffic


def sweep_traffic(processes: Processes, values: Any, rank: int, k: int) -> tuple[int, int]:
    stack, budget = dealt(processes, values), rt.RankBudget(rank, k)
    unit = stack.unit()
    factors = rt.RasaFactors.from_lora(rt.solve_lora(unit, rank).factors, budget)
    norms = unit.layer_norms()
    before = processes.communication.reductions, processes.communication.reduced_bytes
    updates.joint_sweep((unit.right, unit.left), norms, factors)
    return processes.communication.reductions - before[0], processes.communication.reduced_bytes - before[1]


def test_a_sweep_reduces_right_hand_sides_and_grams_and_nothing_else(pool: Pool) -> None:
    """Per side one reduction of n R + R^2 + 2 R numbers, and one of 4 that decides and measures."""
    L, b, a, rank, k = 5, 24, 20, 3, 2
    R = L * k
    for found in pool.run(2, sweep_traffic, decaying(L, b, a), rank, k):
        assert found == (4, 8 * ((b + a) * R + 2 * (R * R + 2 * R) + 8))


# ---- sources


def loaded(processes: Processes, path: str, memory: int | None) -> tuple[str, list[float], tuple[int, ...]]:
    stack = open_source(path, memory=memory).stacks[0].load(None, None, processes)
    return stack.name, stack.layer_norms_squared, tuple(stack.values.shape)


@pytest.mark.parametrize("kind", ["npy", "npz", "safetensors", "one tensor", "bundled"])
@pytest.mark.parametrize("memory", [None, 60_000])
def test_each_process_reads_its_own_layers(pool: Pool, tmp_path: Path, kind: str, memory: int | None) -> None:
    values, path = decaying(5, 16, 18), tmp_path / f"x.{kind}"
    if kind == "npy":
        np.save(path, values)
    elif kind == "npz":
        memory = None
        np.savez(path, **{f"layers.{i}.w": M for i, M in enumerate(values)})
    elif kind == "bundled":
        path, memory = Path("minilm-code"), None
    elif kind == "one tensor":
        path = tmp_path / "x.safetensors"
        save_file({"w": torch.as_tensor(values)}, path)
    else:
        save_file({f"layers.{i}.w": torch.as_tensor(M.copy()) for i, M in enumerate(values)}, path)
    ((name, norms, shape),) = pool.run(1, loaded, str(path), memory)
    found = pool.run(3, loaded, str(path), memory)
    assert all(one[:2] == (name, norms) for one in found)
    assert sum(one[2][0] for one in found) == shape[0]


def refusal(processes: Processes, path: str) -> str:
    try:
        open_source(path).stacks[0].load(None, None, processes)
    except InputError as error:
        return str(error)
    return ""


def test_what_is_wrong_in_one_process_is_said_in_all(pool: Pool, tmp_path: Path) -> None:
    values = {f"layers.{i}.w": M for i, M in enumerate(decaying(4, 6, 5))}
    values["layers.3.w"][2, 1] = np.nan
    np.savez(tmp_path / "x.npz", **values)
    first, second = pool.run(2, refusal, str(tmp_path / "x.npz"))
    assert first == f"process 1 of 2: {second}"
    assert "layer 3, entry (2, 1) is nan" in second
    assert "x.npz" in second


def floor_of(processes: Processes) -> str:
    try:
        rt.lower_bound(dealt(processes, decaying()), rt.RankBudget(2, 1), "dual")
    except InputError as error:
        return str(error)
    return ""


def test_a_floor_that_needs_all_layers_in_one_process_is_refused(pool: Pool) -> None:
    for said in pool.run(2, floor_of):
        assert said.startswith("certificate dual is searched for in all layers")
