"""Ranks that reach an error or a size, against the exact spectra by NumPy and against trying all ranks."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import rasa_theory as rt
from rasa_theory.common import InputError
from rasa_theory.inspection import RankGoal

SHAPES = {"wide": (6, 20), "tall": (12, 5), "zero": (4, 4)}


def matrices(seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    found = {}
    for n, (name, (b, a)) in enumerate(SHAPES.items()):
        U, V = (np.linalg.qr(generator.standard_normal((2, side, min(b, a))))[0] for side in (b, a))
        sigma = np.stack([np.arange(1, min(b, a) + 1) ** -0.8 * 2.0**n, 0.6 ** np.arange(min(b, a))])
        found[name] = (U * sigma[:, None]) @ V.transpose(0, 2, 1)
    found["zero"] *= 0
    return found


def inspected(**goal: Any) -> dict[str, Any]:
    stacks = [rt.LayerStack(M, name) for name, M in matrices().items()]
    return rt.inspect(stacks, (1, 2, 4, 8), **goal)


def energies() -> dict[str, np.ndarray]:
    """sigma_ij^2 of both layers, by stack."""
    return {name: np.linalg.svd(M, compute_uv=False) ** 2 for name, M in matrices().items()}


def missed(rank: int) -> float:
    whole = sum(e.sum() for e in energies().values())
    return float(sum(e[:, rank:].sum() for e in energies().values()) / whole)


def parameters(rank: int) -> int:
    return sum(2 * min(rank, *shape) * sum(shape) for name, shape in SHAPES.items() if name != "zero")


def test_the_curve_is_the_tail_of_all_spectra() -> None:
    report = inspected()
    assert [point["rank"] for point in report["curve"]] == list(range(1, 9))
    for point in report["curve"]:
        low, high = point["error"]
        assert low - 1e-12 <= missed(point["rank"]) <= high + 1e-12
        assert high - low < 1e-10
        assert point["parameters"] == parameters(point["rank"]), "a narrow matrix is taken whole, zeros are not written"
        assert point["bytes"] == 4 * point["parameters"]
    assert report["recommendation"] is None


@pytest.mark.parametrize("error", [0.6, 0.3, 0.1, 0.02, 1e-6])
def test_one_rank_for_an_error_is_the_least_that_reaches_it(error: float) -> None:
    one = inspected(error=error)["recommendation"]["one_rank"]
    least = next(rank for rank in range(1, 9) if missed(rank) <= error)
    assert (one["rank"], one["not_below"]) == (least, least)
    assert inspected(energy=1 - error)["recommendation"]["one_rank"]["rank"] == least


@pytest.mark.parametrize("numbers", [parameters(1), parameters(3) + 5, parameters(8), 10**6])
def test_one_rank_for_a_size_is_the_greatest_that_fits(numbers: int) -> None:
    one = inspected(size=2 * numbers, itemsize=2)["recommendation"]["one_rank"]
    assert one["rank"] == max(rank for rank in range(1, 9) if parameters(rank) <= numbers)
    assert one["bytes"] == 2 * one["parameters"] <= 2 * numbers


@pytest.mark.parametrize("numbers", [40, 100, 180])
def test_own_ranks_hold_as_much_as_any_of_that_size(numbers: int) -> None:
    """Against all ranks of the four layers, by trial."""
    own = inspected(size=4 * numbers)["recommendation"]["own_ranks"]
    e, whole = energies(), sum(x.sum() for x in energies().values())
    layers = [(e[name][i], sum(SHAPES[name])) for name in ("wide", "tall") for i in range(2)]
    best = 1.0
    for ranks in itertools.product(*(range(len(values) + 1) for values, _ in layers)):
        if sum(r * cost for r, (_, cost) in zip(ranks, layers, strict=True)) <= own["parameters"]:
            best = min(best, sum(values[r:].sum() for r, (values, _) in zip(ranks, layers, strict=True)) / whole)
    low, high = own["error"]
    assert low - 1e-12 <= best <= high + 1e-12
    assert own["parameters"] <= numbers
    assert own["parameters"] == sum(rank * sum(SHAPES[name.partition("[")[0]]) for name, rank in own["ranks"].items())


def test_own_ranks_for_an_error_reach_it_with_fewer_parameters() -> None:
    found = inspected(error=0.1)["recommendation"]
    assert found["own_ranks"]["error"][1] <= 0.1
    assert found["own_ranks"]["parameters"] < found["one_rank"]["parameters"]


def test_all_of_an_update_is_held_by_its_rank_whatever_sums_round() -> None:
    generator = np.random.default_rng(0)
    for n in range(20):
        M = (
            generator.standard_normal((3, 20, 4))
            @ generator.standard_normal((3, 4, 16))
            * 10.0 ** generator.uniform(-3, 3)
        )
        found = rt.inspect([rt.LayerStack(M, f"h.{n}")], (1, 16), error=0.0)["recommendation"]
        assert set(found["own_ranks"]["ranks"].values()) == {4}


def test_what_no_rank_reaches_is_said() -> None:
    stack = rt.LayerStack(np.eye(20)[None])
    found = rt.inspect([stack], (4,), error=0.5)["recommendation"]
    assert found["one_rank"] is None
    assert found["own_ranks"] is None
    assert rt.inspect([stack], (4,), size=100)["recommendation"]["one_rank"] is None, "rank 1 takes 160 bytes"
    assert rt.inspect([stack], (4,), error=0.81)["recommendation"]["one_rank"]["rank"] == 4


def test_base_norms_give_relative_norms() -> None:
    stack = rt.LayerStack(np.stack([np.eye(3), 2 * np.eye(3)]), "q")
    report = rt.inspect([stack], (1,), base_norms_squared={"q": [300.0, 48.0]})
    assert [module["relative_norm"] for module in report["stacks"][0]["modules"]] == pytest.approx([0.1, 0.5])
    assert report["relative_norm"] == pytest.approx((15 / 348) ** 0.5)
    assert rt.inspect([stack], (1,))["relative_norm"] is None
    with pytest.raises(InputError, match="2 layers, and 1 base norms"):
        rt.inspect([stack], (1,), base_norms_squared={"q": [1.0]})


@pytest.mark.parametrize(
    ("goal", "sentence"),
    [
        ({"error": 0.1, "size": 3}, "exactly one of error, energy and size, got error and size"),
        ({"error": 1.0}, "error must be at least 0 and below 1"),
        ({"error": float("nan")}, "error must be at least 0"),
        ({"energy": 0.0}, "energy must be above 0"),
        ({"energy": 1.5}, "energy must be above 0 and at most 1"),
        ({"size": 0}, "size must be at least 1"),
        ({}, "got none"),
    ],
)
def test_impossible_goals_are_refused(goal: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        RankGoal(**goal)


@pytest.mark.parametrize("ranks", [(), (0,), (4, -1), (5000,), (2.5,)])
def test_impossible_ranks_are_refused(ranks: Any) -> None:
    with pytest.raises(InputError, match="rank"):
        rt.inspect([rt.LayerStack(np.eye(3)[None])], ranks)


def test_no_stack_is_refused() -> None:
    with pytest.raises(InputError, match="no stack"):
        rt.inspect([])


def test_bounds_of_the_error_are_in_order() -> None:
    for point in inspected()["curve"]:
        low, high = point["error"]
        assert 0 <= low <= high <= 1
    assert any(low < high for low, high in (point["error"] for point in inspected()["curve"]))
