"""The experiment on block LoRA: what is compared is of one size, and the numbers are those of numpy's SVDs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import rasa_theory as rt
from experiments import localized
from experiments.support.rows import read_rows
from rasa_theory import methods
from tests.helpers.problems import decaying, tail


def blocks_of(layers: np.ndarray, side: int) -> np.ndarray:
    return np.stack([b for m in layers for strip in np.split(m, side) for b in np.split(strip, side, 1)])


def test_a_row_compares_blocks_with_lora_at_its_number_of_parameters() -> None:
    M = decaying(2, 16, 24)
    equal, allocated = localized.compared(rt.LayerStack(M), 4, 2)
    norm, blocks = float((M**2).sum()), blocks_of(M, 2)
    assert equal["parameters"] == allocated["parameters"] == methods.lora_parameters(2, (16, 24), 4)
    assert equal["error"] == pytest.approx(tail(blocks, 2) / norm)
    assert equal["reference"] == pytest.approx(tail(M, 4) / norm)
    assert equal["ratio"] == pytest.approx(tail(blocks, 2) / tail(M, 4))
    squares, of_layers = (np.sort(np.linalg.svd(x, compute_uv=False).ravel() ** 2) for x in (blocks, M))
    assert allocated["error"] == pytest.approx(squares[:-16].sum() / norm)
    assert allocated["reference"] == pytest.approx(of_layers[:-8].sum() / norm)


def test_the_blocks_of_local_layers_have_the_same_spectrum_and_nothing_in_common() -> None:
    stack = localized.local(2, 32, seed=1)
    blocks = blocks_of(stack.values.numpy(), localized.LOCAL_SIDE)
    sigma = np.linalg.svd(blocks, compute_uv=False)
    np.testing.assert_allclose(sigma, np.tile(1 / np.arange(1, 9), (32, 1)))
    assert abs(np.vdot(blocks[0], blocks[1])) < 0.5 * np.vdot(blocks[0], blocks[0])
    assert localized.local(2, 32, seed=2).values.ne(stack.values).all()


def test_every_source_rank_and_grid_has_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    localized.main(["--smoke", "--out", str(tmp_path)])
    rows = read_rows(tmp_path / "localized.csv")
    keys = {(row["source"], row["side"], row["ranks"]) for row in rows}
    sources = ("updates", "turned apart", "local")
    assert keys == {(s, g, r) for s in sources for g in localized.SIDES for r in ("equal", "allocated")}
    turned, real = ([row["reference"] for row in rows if row["source"] == s] for s in ("turned apart", "updates"))
    assert turned == pytest.approx(real)  # LoRA sees the singular values alone
    assert f"{'updates':14}   2 x 2   4      equal" in capsys.readouterr().out


def test_ranks_that_blocks_cannot_match_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        localized.main(["--ranks", "8", "6", "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert "--ranks: 6 is no multiple of 4" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
