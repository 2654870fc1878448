"""Variants of the search differ in the part that they name, and the page shows the stored table."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch

from experiments import search_parts as parts
from experiments.support.rows import read_rows
from rasa_theory.problem import LayerStack, RankBudget
from rasa_theory.solvers import allocation_start, random_start
from rasa_theory.solvers.search import Batch, BatchedSweeps, PoolSearch, SearchCore, inside, search, update_private
from rasa_theory.solvers.starts import STARTS
from tests.helpers.problems import noise

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "theory" / "search.md"
K = torch.as_tensor(noise(3, 6, 5))
BUDGET = RankBudget(2, 1)


def starts(count: int) -> Batch:
    batch = Batch.of([random_start(LayerStack(K), BUDGET, seed, 0.7) for seed in range(count)])
    return update_private(K, batch)


@pytest.mark.slow
def test_a_short_run_has_a_row_for_every_variant_and_goes_on_from_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts.main(["--smoke", "--out", str(tmp_path)])
    rows = read_rows(tmp_path / parts.FILE)
    assert {row["variant"] for row in rows} == parts.VARIANTS.keys() | parts.CORES.keys()
    over = [excess for row, excess in parts.excesses(rows) if row["variant"] != "no bound"]
    assert min(over) == 0
    assert all(0 <= excess < 20 for excess in over)
    monkeypatch.setattr(parts, "searched", lambda *_: pytest.fail("a stored search was made again"))
    parts.main(["--smoke", "--out", str(tmp_path)])
    first, second = (text.split("| variant", 1)[1].split("half_common")[0] for text in [capsys.readouterr().out] * 2)
    assert first == second
    assert read_rows(tmp_path / parts.FILE) == rows


def test_parts_are_back_in_place_after_a_variant() -> None:
    before = (search.BatchedSweeps, dict(STARTS), Batch.beyond, SearchCore.at)
    for variant in (*parts.VARIANTS.values(), *parts.CORES.values()):
        with variant.in_place():
            assert search.BatchedSweeps is variant.sweeps
            assert sum(start.entries for start in STARTS.values()) > 0
            assert (Batch.beyond is before[2]) == variant.extrapolates
    assert (search.BatchedSweeps, dict(STARTS), Batch.beyond, SearchCore.at) == before


def test_starts_of_one_kind_are_as_many_as_those_of_all() -> None:
    for name in parts.KINDS:
        with parts.VARIANTS[f"{name} starts alone, no moves"].in_place():
            assert sum(parts.ALONE.entries(start.entries) for start in STARTS.values()) == parts.ALL_STARTS
    unit = LayerStack(noise(3, 9, 8)).unit()
    pool = PoolSearch(unit, BUDGET, allocation_start(unit, BUDGET), parts.DEFAULT, 0)
    assert len(list(pool._starts())) == parts.ALL_STARTS


def test_gradient_of_the_penalised_error() -> None:
    objective = parts.Penalised(K, torch.tensor([0.1, 1.0, 100.0]).double(), 1, 3)
    batch = starts(2)
    x = parts.balanced(batch) + 0.3 * torch.as_tensor(noise(1, *parts.balanced(batch).shape, 1))[0]
    x.requires_grad_()
    value, gradient = objective(x)
    assert bool((value > (objective.parts(x).residual(K) ** 2).sum((1, 2, 3))).all())  # terms are beyond the limits
    expected = torch.autograd.grad(value.sum(), x)[0]
    assert torch.allclose(gradient, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


def test_balanced_factors_have_the_same_updates() -> None:
    batch = starts(3)
    objective = parts.Penalised(K, torch.ones(3).double(), 1, 3)
    assert torch.allclose(objective.parts(parts.balanced(batch)).residual(K), batch.residual(K), atol=1e-12)


def test_lbfgs_goes_down_to_stationary_points_and_joins() -> None:
    limits = 8 * torch.linalg.matrix_norm(K)
    runs, others = (parts.Lbfgs(K, starts(4), limits) for _ in range(2))
    errors = [runs.errors]
    for _ in range(20):
        runs.run(20)
        errors.append(runs.errors)
    assert all(bool((now <= before).all()) for before, now in itertools.pairwise(errors))
    assert bool((errors[-1] < errors[0] / 2).all())
    _, after = inside(K, BatchedSweeps(K, runs.batch, limits).run(100).batch, limits)
    assert float(after.min()) == pytest.approx(float(errors[-1].min()), rel=0.02)
    runs.select(torch.tensor([2, 0]))
    assert torch.equal(runs.errors, errors[-1][[2, 0]])
    runs.join(others)
    runs.run(1)
    assert len(runs.errors) == len(runs.batch.D) == 6


def test_lbfgs_without_private_terms() -> None:
    batch = Batch.of([random_start(LayerStack(K), RankBudget(1, 1), seed, 0.7) for seed in range(3)])
    runs = parts.Lbfgs(K, batch, 8 * torch.linalg.matrix_norm(K))
    before = runs.errors
    runs.run(50)
    assert runs.batch.Bt.shape == (3, 3, 6, 0)
    assert bool((runs.errors < 0.9 * before).all())


def test_stopped_sweeps_end_before_a_term_exceeds_its_limit() -> None:
    limits = 0.5 * torch.linalg.matrix_norm(K)
    stopped = parts.StoppedSweeps(K, starts(6), limits)
    free = BatchedSweeps(K, starts(6), torch.full_like(limits, math.inf)).run(200)
    assert bool((free.batch.D.abs() > limits[:, None]).any())
    stopped.run(200)
    swept = torch.isfinite(stopped.errors)  # the others stopped in their first sweep
    assert bool((stopped.batch.D[swept].abs() <= limits[:, None]).all())
    before = stopped.batch
    stopped.run(1)
    assert torch.equal(before.D[swept], stopped.batch.D[swept])


def test_a_core_of_layers_alone_is_as_wide_and_orthonormal() -> None:
    unit = LayerStack(torch.as_tensor(noise(2, 120, 110))).unit()
    factors = allocation_start(unit, BUDGET)
    core, like = parts.layers_alone(unit, factors), SearchCore.at(unit, factors)
    assert (core.U.shape, core.V.shape) == (like.U.shape, like.V.shape)
    assert torch.allclose(core.K, core.U.mT @ unit.values.double() @ core.V)
    eye = torch.eye(core.U.shape[1], dtype=torch.float64)
    assert torch.allclose(core.U.mT @ core.U, eye, atol=1e-12)
    leading = torch.linalg.svd(unit.values.double()).U[:, :, :3]
    assert torch.allclose(core.U @ (core.U.mT @ leading), leading, atol=1e-10)


def test_the_page_shows_the_stored_table() -> None:
    rows = read_rows(ROOT / "figures" / parts.FILE)
    stored = {(row["kind"], row["b"], row["variant"]) for row in rows if row["variant"] in parts.VARIANTS}
    assert stored == {(p.kind, p.size.b, name) for p in parts.PROBLEMS for name in parts.VARIANTS}
    page = PAGE.read_text(encoding="utf-8")
    assert parts.with_tables(page, rows) == page
