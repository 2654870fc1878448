"""Branch and bound stays below minima, descents reach them, and the table tells minima from the solver's errors."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

import rasa_theory as rt
from experiments.support.rows import Row, read_rows, write_rows
from experiments.tiny_instances import run
from experiments.tiny_instances.branching import Chart, Elimination, enclose, largest_eigenvalue, three_terms, two_terms
from experiments.tiny_instances.descent import Array, Model, descend, descend_frames
from experiments.tiny_instances.instances import INSTANCES
from tests.helpers.problems import noise, orthogonal

ROOT = Path(__file__).resolve().parents[2]
STORED = ROOT / "figures" / "tiny_instances.csv"
PROBLEMS = {
    "two terms, b = 2": lambda: two_terms(noise(2, 2, 3, 1)),
    "two terms, b = 3": lambda: two_terms(noise(2, 3, 4, 2)),
    "three terms": lambda: three_terms(noise(2, 3, 3, 3)),
    "three terms, three slices": lambda: three_terms(noise(3, 3, 3, 4)),
}
problems = pytest.mark.parametrize("problem", [make() for make in PROBLEMS.values()], ids=PROBLEMS)


def in_ranges(problem: Elimination, n: int, seed: int) -> Array:
    low, high = problem.ranges.T
    values: Array = np.random.default_rng(seed).uniform(low, high, (n, len(low)))
    return values


# ------------------------------------------------------------------------------------------------ branch and bound


@problems
@pytest.mark.parametrize("width", [1e-3, 0.03, 0.3])
def test_no_error_in_a_box_is_below_its_bound(problem: Elimination, width: float) -> None:
    centres, rng = in_ranges(problem, 200, 0), np.random.default_rng(1)
    half = width * rng.uniform(0.2, 1, centres.shape)
    _, low = problem.bounds(centres, half)
    for corner in (rng.choice([-1, 1], centres.shape), rng.uniform(-1, 1, centres.shape)):
        error, _ = problem.bounds(centres + half * corner, half)
        assert (error >= low).all()


@pytest.mark.parametrize("gap", [0.0, 0.1, 3.0])
def test_the_largest_eigenvalue_does_not_rise_above_its_bound(gap: float) -> None:
    rng = np.random.default_rng(0)
    slopes = rng.standard_normal((500, 2, 3, 3))
    slopes, X = slopes + slopes.transpose(0, 1, 3, 2), np.diag([1.0, -1.0, 1.0])
    S = np.broadcast_to(np.diag([1.0, 1.0, 1.0 + gap]), (500, 3, 3))
    half, rest = 0.3 * rng.uniform(0, 1, (500, 2)), 0.05 * rng.uniform(0, 1, 500)
    t = half * rng.choice([-1, 1], half.shape)
    moved = S + (t[:, :, None, None] * slopes).sum(1)
    for part, allowed in ((0 * rest, 0 * rest), (rest, rest)):
        top, slope, excess = largest_eigenvalue(S, slopes, half, allowed)
        found = np.linalg.eigvalsh(moved + part[:, None, None] * X)[:, -1]
        assert (found <= top + (slope * t).sum(1) + excess + 1e-12).all()


@pytest.mark.parametrize("chart", [Chart.of_lines(2), Chart.of_lines(3), Chart.of_frames(2), Chart.of_frames(3)])
def test_angles_in_their_ranges_reach_every_frame(chart: Chart) -> None:
    low, high = np.array(chart.ranges).T
    rotations, _ = chart.rotations(np.random.default_rng(0).uniform(low, high, (20_000, len(low))))
    columns = 1 if chart == Chart.of_lines(chart.n) else 2
    for seed in range(40):
        cosines = abs(np.einsum("nij,ij->nj", rotations, orthogonal(chart.n, seed))[:, :columns])
        assert cosines.min(1).max() > 0.98


@problems
def test_bounds_at_a_minimum_close_with_the_square_of_the_width(problem: Elimination) -> None:
    angles = in_ranges(problem, 1000, 0)
    centre = angles[problem.bounds(angles, 0 * angles)[0].argmin()][None]
    for step in 0.3 * 0.8 ** np.arange(60):
        around = np.concatenate(
            [centre, centre + step * np.random.default_rng(0).standard_normal((500, centre.shape[1]))]
        )
        centre = around[problem.bounds(around, 0 * around)[0].argmin()][None]
    gaps = []
    for width in (2e-3, 1e-3):
        error, low = problem.bounds(centre, np.full_like(centre, width))
        gaps.append(float((error - low)[0]))
    assert gaps[1] < 0.3 * gaps[0]


@pytest.mark.parametrize("seed", range(4))
def test_two_terms_of_2_x_2_slices_are_a_schur_form_with_one_angle(seed: int) -> None:
    """The slices are triangular in some frames: e = min over z of the least eigenvalue of sum_i M_i z z^T M_i^T."""
    M = np.random.default_rng(seed).standard_normal((2, 2, 2))
    angle = np.linspace(0, math.pi, 20_001)
    images = np.einsum("iba,na->nib", M, np.stack([np.cos(angle), np.sin(angle)], 1))
    expected = float(np.linalg.eigvalsh(images.transpose(0, 2, 1) @ images)[:, 0].min())
    found = enclose(two_terms(M), math.inf, 1e-4, 100_000)
    assert found.low - 1e-12 <= expected <= found.high + 1e-6
    assert found.high - found.low <= 1.01e-4


@pytest.mark.slow
def test_both_problems_enclose_optima_that_are_known() -> None:
    orthogonal_layers = np.zeros((2, 3, 3))
    orthogonal_layers[0, 0, 0], orthogonal_layers[1, 1:, 1:] = 1.0, np.diag([0.8, 0.5])
    turned = orthogonal(3, 1) @ orthogonal_layers @ orthogonal(3, 2)
    found = enclose(two_terms(turned), math.inf, 0.02, 300_000)
    assert found.low <= 0.25 <= found.high <= 0.3  # two dyads of squared norm 1 and 0.64 are taken
    triangular = orthogonal(3, 3) @ np.triu(noise(2, 3, 3, 5)) @ orthogonal(3, 4)
    angles = in_ranges(three_terms(triangular), 4000, 0)
    error, _ = three_terms(triangular).bounds(angles, 0 * angles)
    assert error.min() >= -1e-12
    assert three_terms(np.triu(noise(2, 3, 3, 5))[:, ::-1]).bounds(np.zeros((1, 4)), np.zeros((1, 4)))[
        0
    ] == pytest.approx(0)


def test_a_limit_on_the_boxes_leaves_a_wider_enclosure() -> None:
    problem = two_terms(noise(2, 2, 2, 5))
    narrow, wide = enclose(problem, math.inf, 1e-5, 100_000), enclose(problem, math.inf, 1e-5, 500)
    assert wide.boxes <= 500 < narrow.boxes
    assert wide.low < narrow.low <= narrow.high <= wide.high


# ---------------------------------------------------------------------------------------------------- descents


def test_updates_and_derivatives_of_all_factors() -> None:
    model = Model(2, 3, 4, 1, 2)
    x, step = np.random.default_rng(0).standard_normal((2, 5, model.parameters))
    Bt, At, B, D, A = (torch_like[0] for torch_like in model.factors(x))
    for i in range(2):
        assert model.updates(x)[0, i] == pytest.approx(Bt[i] @ At[i] + B @ np.diag(D[i]) @ A)
    slope = (model.updates(x + 1e-6 * step) - model.updates(x - 1e-6 * step)) / 2e-6
    assert np.einsum("np,npm->nm", step, model.jacobian(x)) == pytest.approx(slope.reshape(5, -1), abs=1e-7)
    assert model.updates(model.balanced(x)) == pytest.approx(model.updates(x))


@pytest.mark.slow
def test_descents_reach_planted_factors_and_respect_the_cap() -> None:
    model = Model(2, 4, 4, 1, 2)
    M = model.updates(np.random.default_rng(1).standard_normal((1, model.parameters)))[0]
    assert descend(M, 2, 1, 32, 200, seed=0).errors.min() < 1e-15
    degenerate = INSTANCES[0].updates()
    found = descend(degenerate, 1, 1, 16, 200, seed=0)
    tighter = descend(degenerate, 1, 1, 16, 200, seed=0, cap=2.0)
    assert found.errors.min() < found.capped < tighter.capped


@pytest.mark.slow
def test_frames_and_factors_descend_to_one_minimum() -> None:
    M = noise(2, 3, 3, 0).transpose(0, 2, 1)
    triangular = orthogonal(3, 3) @ np.triu(M) @ orthogonal(3, 4)
    assert descend_frames(triangular, 8, 100, seed=0).min() < 1e-20
    degenerate = noise(2, 2, 2, 8)
    frames = descend_frames(degenerate, 8, 100, seed=0)
    assert frames.min() == pytest.approx(frames.max(), rel=1e-9)
    factors = descend(degenerate, 1, 1, 16, 200, seed=0).errors.min()
    assert frames.min() <= factors <= 1.001 * frames.min()


@pytest.mark.slow
def test_descents_end_in_the_interval_that_boxes_prove() -> None:
    M = noise(2, 3, 3, 7)
    high = float(descend(M, 1, 1, 32, 200, seed=0).errors.min() * (M**2).sum())
    found = enclose(two_terms(M), math.inf, 0.05 * float((M**2).sum()), 300_000)
    assert found.low <= high <= found.high + 1e-9


# --------------------------------------------------------------------------------------------------- the table


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """The rows of a short run."""
    folder = tmp_path_factory.mktemp("smoke")
    assert run.main(["--smoke", "--out", str(folder)]) == 0
    return read_rows(folder / "tiny_instances.csv")


@pytest.mark.slow
def test_minima_are_stored_and_errors_made_again(
    smoke: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, first = tmp_path / "tiny_instances.csv", smoke
    assert [row["minimum"] for row in first] == pytest.approx([0.322826, 0.225652], abs=1e-5)
    write_rows(path, run.COLUMNS, [row | {"best_found": 2.0} for row in first])
    monkeypatch.setattr(run, "minimum", lambda *_: pytest.fail("a stored minimum was made again"))
    assert run.main(["--smoke", "--out", str(tmp_path)]) == 0
    assert read_rows(path) == first


@pytest.mark.slow
def test_an_error_below_a_minimum_or_a_bound_is_reported(
    smoke: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "tiny_instances.csv", run.COLUMNS, smoke)

    def finds(error: float) -> None:
        rows = iter([{name: row[name] for name in run.SOLVER} | {"best_found": error} for row in smoke])
        monkeypatch.setattr(run, "solver", lambda *_: next(rows))

    finds(0.3222)
    assert run.main(["--smoke", "--out", str(tmp_path)]) == 1
    assert "0.322200 is below the stored minimum 0.322827" in capsys.readouterr().out
    finds(0.2)
    assert run.main(["--smoke", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().out.count("is below the lower bound") == 2


def test_the_stored_table_is_of_these_instances_and_consistent() -> None:
    rows = read_rows(STORED)
    assert all(run.is_stored(run.key(instance), row) for instance, row in zip(INSTANCES, rows, strict=True))
    for instance, row in zip(INSTANCES, rows, strict=True):
        assert run.contradictions(row) == []
        assert row["closed"] <= row["dual"] <= row["two_sided"] <= row["minimum"] <= row["capped_minimum"] + 1e-12
        if instance.eliminate is not None and instance.exact:
            assert row["minimum"] - row["proved"] <= 1.001 * run.TOLERANCE


def test_the_page_shows_the_stored_table() -> None:
    page = (ROOT / "docs" / "theory" / "tiny_instances.md").read_text(encoding="utf-8")
    assert run.with_table(page, read_rows(STORED)) == page


def test_stored_floors_are_those_of_the_package() -> None:
    instance, row = INSTANCES[2], read_rows(STORED)[2]
    floor = rt.lower_bound(rt.LayerStack(instance.updates()), rt.RankBudget(instance.rank, instance.k)).value
    assert floor / row["e_lora"] == pytest.approx(row["closed"], rel=1e-6)
