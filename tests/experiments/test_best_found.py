"""The plain search of the experiment `best_found`, on stacks whose optimum is known, and its problems."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import rasa_theory as rt
from experiments.best_found import compare, hidden, run
from experiments.best_found.kinds import SIZES, SYNTHETIC, Array, Problem, Size, basis, problems
from experiments.best_found.reference import Model, Point, added, balanced, search, start
from experiments.support.rows import read_rows
from rasa_theory.solvers import allocation_start

L, B, A = 3, 12, 10


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def tail(M: Array, rank: int) -> float:
    return float((np.linalg.svd(M, compute_uv=False)[..., rank:] ** 2).sum())


def copies(rank: int, k: int) -> tuple[Array, float]:
    M, c = rng().standard_normal((B, A)), np.array([1.0, -2.0, 0.5])
    return c[:, None, None] * M, float((c**2).sum()) * tail(M, rank - k + L * k)


def shared_bases(rank: int, k: int) -> tuple[Array, float]:
    """All but the R columns with the largest sum_i s_ij^2, for k = r."""
    s = rng().standard_normal((L, A))
    M = (basis(rng(1), B, A) * s[:, None]) @ basis(rng(2), A, A).T
    return M, float(np.sort((s**2).sum(0))[: A - L * k].sum())


def orthogonal_layers(rank: int, k: int) -> tuple[Array, float]:
    """Rows of each layer in a space of its own: the allocation bound, for k = r."""
    M = np.zeros((L, B, 3 * L))
    for i in range(L):
        M[i, :, 3 * i : 3 * i + 3] = (1 + i) * rng(i).standard_normal((B, 3))
    squares = np.sort((np.linalg.svd(M, compute_uv=False) ** 2).ravel())
    return M, float(squares[: len(squares) - L * k].sum())


def planted(rank: int, k: int) -> tuple[Array, float]:
    B_S, D, A_S = (rng(n).standard_normal(shape) for n, shape in enumerate(((B, L * k), (L, L * k), (L * k, A))))
    private = rng(3).standard_normal((L, B, rank - k)) @ rng(4).standard_normal((L, rank - k, A))
    return private + (B_S * D[:, None]) @ A_S, 0.0


def one_layer(rank: int, k: int) -> tuple[Array, float]:
    M = rng().standard_normal((1, B, A))
    return M, tail(M, rank)


@pytest.mark.parametrize(
    ("instance", "rank", "k"),
    [
        (copies, 2, 1), (copies, 2, 2), (shared_bases, 2, 2), (orthogonal_layers, 2, 2), (planted, 2, 1),
        (planted, 2, 2), (one_layer, 3, 1), (one_layer, 3, 3),
    ],
)  # fmt: skip
def test_the_search_reaches_known_optima_and_is_not_below(
    instance: Callable[[int, int], tuple[Array, float]], rank: int, k: int
) -> None:
    M, optimum = instance(rank, k)
    result = search(M, rank, k, starts=10)
    rounding = 1e-6 * tail(M, rank)
    assert optimum - 1e-12 * np.linalg.norm(M) ** 2 <= result.error <= optimum + rounding
    assert result.unbounded <= result.error == pytest.approx(np.linalg.norm(M - literal(result.point)) ** 2)


def literal(point: Point) -> Array:
    B_, A_, D = point
    return np.einsum("bt,at,lt->lba", B_, A_, D)


@pytest.mark.slow
def test_noise_on_planted_factors_is_fitted_by_the_share_of_the_parameters() -> None:
    M, _ = planted(3, 1)
    N = 0.1 * rng(9).standard_normal(M.shape)
    q, R = 2, L
    dof = L * q * (A + B - q) + R * (A + B - 2) + L * R
    expected = (1 - dof / M.size) * (N**2).sum()
    assert search(M + N, 3, 1, starts=20).error == pytest.approx(expected, rel=0.2)


def model_and_point(limit: float) -> tuple[Model, Point]:
    """A model, and a point some of whose pool terms and private parts are larger than allowed."""
    model = Model(rng().standard_normal((L, B, A)), 3, 1, limit)
    B_, A_, D = start(model, "normal", rng(1))
    return model, (2 * B_, 2 * A_, 2 * D)


def literal_sizes(model: Model, point: Point) -> list[float]:
    """Norms of pool terms and private parts over the largest allowed, from the terms themselves."""
    B_, A_, D = point
    terms = np.einsum("bt,at,lt->ltba", B_, A_, D)
    n = model.L * model.q
    parts = [*terms[:, n:].transpose(1, 0, 2, 3), terms[:, :n].sum(1)]
    return [np.linalg.norm(part[i]) / (model.limit * model.norms[i]) for part in parts for i in range(model.L)]


def test_inside_means_that_no_pool_term_and_no_private_part_is_too_large() -> None:
    model, point = model_and_point(0.1)
    sizes = literal_sizes(model, point)
    assert min(sizes) < 1 < max(sizes)
    assert model.largest(point) ** 0.5 == pytest.approx(max(sizes))
    assert not model.is_inside(point)
    moved = model.moved_inside(point)
    assert model.is_inside(moved)
    assert max(literal_sizes(model, moved)) == pytest.approx(1)
    assert literal_sizes(model, moved) == pytest.approx(np.minimum(sizes, 1))


@pytest.mark.parametrize("which", ["pool", "private"])
def test_gradients_are_those_of_error_and_penalty(which: str) -> None:
    model, point = model_and_point(0.1)
    B_, A_, D = point
    D = D.copy()
    D[:, model.private if which == "pool" else model.pool] = 0
    point = B_, A_, D
    assert model.penalty(point)[0] > 0
    for value, half in (
        (model.error, tuple(-F for F in model.gradients(model.residual(point), point))),
        (lambda at: model.penalty(at)[0], model.penalty(point)[1]),
    ):
        b, a, d = (1e-6 * rng(n).standard_normal(F.shape) for n, F in enumerate(point))
        step = b, a, d * model.mask
        change = (value(added(point, step, 1)) - value(added(point, step, -1))) / 2
        assert change == pytest.approx(2 * sum(float((F * S).sum()) for F, S in zip(half, step, strict=True)), rel=1e-5)


def test_where_no_minimum_is_attained_the_bound_holds_and_costs_something() -> None:
    """x v d + y u d + x u e as two layers and two terms: the infimum is 0."""
    M = Problem("border_rank", Size(2, 8, 7, 1, 1), 0).values()
    tight = Model(M, 1, 1, 1.0)
    result = search(M, 1, 1, starts=10)
    assert result.cancellation <= 8
    assert not tight.is_inside(result.point)
    swept = tight.sweeps(tight.moved_inside(result.point), 10, inside=True)
    assert tight.is_inside(swept)
    assert result.error < tight.error(swept) <= tight.error(tight.moved_inside(result.point)) * (1 + 1e-12)


def test_balanced_terms_are_the_same_terms() -> None:
    _, point = model_and_point(1)
    assert literal(balanced(point)) == pytest.approx(literal(point))


@pytest.mark.parametrize("kind", SYNTHETIC)
def test_problems_have_their_size_and_follow_their_seed(kind: str) -> None:
    for size in SIZES:
        M = Problem(kind, size, 0).values()
        assert M.shape == (size.layers, size.b, size.a)
        assert np.linalg.norm(M) == pytest.approx(1)
        assert np.array_equal(M, Problem(kind, size, 0).values())
        assert not np.allclose(M, Problem(kind, size, 1).values())


def test_every_problem_comes_once_and_all_kinds_at_all_sizes_come_first() -> None:
    listed = list(problems())
    assert len(set(listed)) == len(listed)
    first = listed[: len(SYNTHETIC) * len(SIZES)]
    assert {problem.kind for problem in first} == set(SYNTHETIC)
    assert {problem.seed for problem in first} == {0}


@pytest.mark.slow
def test_an_interrupted_run_goes_on_and_the_solver_stands_beside_the_reference(tmp_path: Path) -> None:
    options = ["--kinds", "two_copies", "--seeds", "0", "--starts", "5", "--iterations", "50", "--out", str(tmp_path)]
    run.main(["reference", *options])
    rows = read_rows(tmp_path / "best_found_starts.csv")
    assert len(rows) == len(SIZES)
    assert all(len(row["errors"].split()) == 5 for row in rows)
    assert {row["tensorly"] is None for row in rows if row["k"] < row["rank"]} == {True}
    run.main(["reference", *options])
    assert read_rows(tmp_path / "best_found_starts.csv") == rows
    run.main(["ours", "--effort", "quick", *options])
    ours = read_rows(tmp_path / "best_found.csv")
    assert [row["reference"] for row in ours] == [row["reference"] for row in rows]
    assert max(map(compare.excess, ours)) < 1e-3  # the optimum is known, and both reach it
    run.main(["table", *options])
    assert (tmp_path / "best_found.png").exists()


def ours(error: float, reference: float, seconds: float = 1.0, **more: object) -> dict[str, object]:
    row = {"kind": "one", "effort": "default", "e_lora": 0.8, "reference": reference, "error": error}
    row |= {"seconds": seconds, "cancellation": 1.0, "best_of_24": reference, "tensorly": None, "pyttb": None}
    row |= {"unbounded": reference, "reference_seconds": 5.0}
    return row | more


def test_excess_is_over_the_lowest_admissible_error_and_ignores_rounding() -> None:
    assert compare.excess(ours(0.58, 0.5)) == pytest.approx(0.1)
    assert compare.excess(ours(0.58, 0.6, pyttb=0.5)) == pytest.approx(0.1)
    assert compare.excess(ours(0.42, 0.5)) == pytest.approx(-0.1)
    assert compare.excess(ours(1e-30, 1e-9)) == compare.excess(ours(1e-9, 1e-30)) == 0


def test_the_table_counts_what_is_above_and_below() -> None:
    rows = [ours(0.5, 0.5), ours(0.501, 0.5), ours(0.516, 0.5, 3.0), ours(0.49, 0.5, cancellation=9.0)]
    rows[0]["best_of_24"] = 0.6
    for row, unbounded in zip(rows, (0.4996, 0.498, 0.496, 0.484), strict=True):
        row["unbounded"] = unbounded
    *_, one, _, plain, price, outside = compare.lines(rows)
    assert one.split() == ["one", "4", "2", "1", "1", "+2.000%", "1.00"]
    assert plain.split() == ["24", "plain", "starts", "4", "1", "1", "0", "+12.500%", "2.40"]
    assert "0.3750 % of e_lora (median), 2.00 % at most, above 0.1 % in 3" in price
    assert outside.endswith(": 1")
    heights = {float(y) for line in compare.plot(rows).axes[0].get_lines() for y in line.get_ydata()}
    assert {100 * compare.excess(row) for row in rows} <= heights


def test_the_truth_holds_exactly_what_is_hidden() -> None:
    """Three dyads in the pool, and the two largest terms that the stack without them has."""
    plain = rt.LayerStack(rng().standard_normal((5, 30, 24)))
    stack = rt.null_models.with_hidden_dyads(plain, 8, 3, 0.5, 0)
    factors = hidden.truth(plain, rt.null_models.hidden_dyads(plain, 8, 3, 0.5, 0))
    rest = allocation_start(plain, hidden.BUDGET)
    largest = rest.mixing.abs().amax(0).argsort(descending=True)[:2]
    assert torch.equal(factors.shared_B[:, 3:], rest.shared_B[:, largest])
    assert torch.equal(factors.mixing[:, 3:], rest.mixing[:, largest])
    pool = torch.stack([(factors.shared_B[:, :3] * factors.mixing[i, :3]) @ factors.shared_A[:3] for i in range(5)])
    assert torch.allclose(pool, stack.values - plain.values, atol=1e-12)
    assert torch.equal(factors.private_B, rest.private_B)
