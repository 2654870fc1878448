"""The grid of ranks and shared ranks, on stacks with known answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import rasa_theory as rt
from experiments import floors, iteration_count, neighbours, seeds_and_tasks, update_spectra
from experiments import ranks_and_pools as experiment
from experiments.support.rows import read_rows
from rasa_theory.sources import planted_stack
from tests.helpers.problems import decaying, tail

QUICK = rt.SolverOptions(effort="quick", max_sweeps=40)


@pytest.mark.parametrize(
    ("r", "ks"), [(1, [1]), (4, [1, 2, 4]), (8, [1, 2, 4, 8]), (16, [1, 2, 4, 8, 16]), (32, [1, 2, 4, 8, 16, 32])]
)
def test_shared_ranks(r: int, ks: list[int]) -> None:
    assert experiment.shared_ranks(r) == ks


def test_a_planted_pool_is_found_at_its_k_and_rounding_is_that_of_bfloat16() -> None:
    stack, _ = planted_stack(3, (14, 12), rt.RankBudget(4, 2), seed=3)
    (row,) = experiment.path(stack, 4, [2], QUICK)
    assert row["best_found"] < 1e-8
    assert 0 < row["mixing_drop"] < 1
    assert 1e-7 < row["bfloat16"] * row["e_lora_share"] < 1e-3  # about (2^-9)^2 of ||M||^2


@pytest.mark.slow
def test_a_row_has_the_closed_forms_of_its_rank() -> None:
    M, r = decaying(2, 10, 12), 4
    rows = list(experiment.path(rt.LayerStack(M), r, [1, 2], QUICK))
    squares = torch.linalg.svdvals(torch.as_tensor(M)).flatten().sort().values ** 2
    for row in rows:
        terms = (2 * r * 22 + 4 * row["k"]) // 22
        assert row["e_lora_share"] == pytest.approx(tail(M, r) / (M**2).sum())
        assert row["allocated"] == pytest.approx(float(squares[:-terms].sum()) / tail(M, r))
        assert row["floor"] <= row["best_found"] <= 1 - row["mixing_drop"] + 1e-12
        assert row["best_found"] <= row["bfloat16"]
    assert rows[0]["uncancelled"] >= rows[0]["best_found"] - 1e-9
    assert rows[0]["cancellation"] <= 8 + 1e-9
    assert "uncancelled" not in rows[1]  # k = 2 is neither 1 nor r/8


ROW = {
    "model": "synthetic", "stack": "query", "r": 8, "k": 1, "effort": "quick",
    "best_found": 0.9, "bfloat16": 0.97, "lora_bfloat16": 1.01,
}  # fmt: skip
OTHER = ROW | {"stack": "attention_output", "best_found": 0.8}


def test_gains_are_means_over_kinds_and_rounding_counts_for_both() -> None:
    rows = [ROW, OTHER, ROW | {"k": 2}]
    assert experiment.mean_over_kinds(rows, experiment.gain) == pytest.approx({(8, 1): 0.15, (8, 2): 0.1})
    assert experiment.rounded_gain(ROW) == pytest.approx(0.04)


def test_points_that_one_kind_lacks_other_kinds_and_other_efforts_are_not_shown() -> None:
    others = [ROW | {"r": 16}, ROW | {"stack": "key"}, ROW | {"effort": "default"}, OTHER | {"effort": "default"}]
    assert experiment.shown([ROW, *others, OTHER]) == [ROW, OTHER]
    assert experiment.shown([ROW]) == []
    with pytest.raises(ValueError, match="two rows of the same r and k"):
        experiment.shown([ROW, OTHER, ROW | {"best_found": 0.7}])


def test_every_rank_has_a_look_of_its_own() -> None:
    (ax,) = experiment.plot([row | {"r": r} for row in (ROW, OTHER) for r in (2, 8, 12)]).axes
    assert len({line.get_color() for line in ax.get_lines() if line.get_linestyle() == "-"}) == 3


def test_the_command_takes_up_its_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--smoke", "--out", str(tmp_path)]
    experiment.main(words)
    file = tmp_path / "ranks_and_pools.csv"
    assert [row["k"] for row in read_rows(file)] == [1, 2, 4, 8]
    text = file.read_bytes()
    experiment.main(words)
    assert file.read_bytes() == text
    assert "all-MiniLM-L6-v2  query" in capsys.readouterr().out


def test_missing_updates_are_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        experiment.main(["--kinds", "gate", "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert (
        "the updates of minilm have no 'gate'; there are: query, key, value, attention_output"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("command", "words", "sentence"),
    [
        (experiment, ["--ranks", "0"], "rank must be at least 1, got 0"),
        (experiment, ["--ranks", "500"], "rank 500 exceeds min(b, a) = 384 of stack 'query'"),
        (experiment, ["--effort", "fast"], "unknown effort 'fast'"),
        (iteration_count, ["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (iteration_count, ["--ks", "99"], "none of these --parts and --ks"),
        (update_spectra, ["--effort", "fast"], "unknown effort 'fast'"),
        (floors, ["--rank", "0"], "rank must be at least 1, got 0"),
        (seeds_and_tasks, ["--effort", "fast"], "unknown effort 'fast'"),
        (neighbours, ["--ranks", "0"], "parameters must be at least 1, got 0"),
    ],
)
def test_bad_options_are_a_sentence(
    command: Any, words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(["--kinds", "query", "--out", str(tmp_path), *words])
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
