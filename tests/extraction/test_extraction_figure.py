"""The figure of an extraction: shares by kind and layer, single matrices by name, and the error against the rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rasa_theory.commands.extract import main
from rasa_theory.plotting import plot_extraction
from tests.helpers.families import FAMILIES, changed_pair
from tests.helpers.models import report_of, run

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def axes_of(report: dict[str, Any]) -> list[Any]:
    """The panels of the figure, less the bar of colours."""
    return [ax for ax in plot_extraction(report).axes if ax.get_label() != "<colorbar>"]


def test_the_panels_show_the_report(llamas: Any, tmp_path: Path) -> None:
    """The output layer, which alone has no layers, as a point; error against rank as numpy has it."""
    torch.manual_seed(0)
    before, after = changed_pair(FAMILIES["llama"](), tmp_path)
    assert run(tmp_path, tmp_path / "out", "--rank", "3") == 0
    report = report_of(tmp_path / "out")
    heat, points, curves = axes_of(report)
    rows = {row["kind"]: row for row in report["stacks"]}
    many = [row for row in report["stacks"] if row["layers"] > 1]
    shown = np.ma.filled(heat.images[0].get_array(), np.nan)
    expected = [[m["e_stored"] / m["norm_squared"] for m in row["modules"]] for row in many]
    assert np.allclose(shown, expected)
    assert [text.get_text() for text in heat.get_yticklabels()] == [row["kind"] for row in many]
    assert heat.get_xlabel() == "layer"
    assert [text.get_text() for text in points.get_yticklabels()] == ["lm_head"]
    head = rows["lm_head"]
    assert points.lines[0].get_xdata()[0] == pytest.approx(head["e_stored"] / head["norm_squared"])
    sigma = np.linalg.svd((after["lm_head.weight"] - before["lm_head.weight"]).numpy(), compute_uv=False)
    for rank, error in head["error_at_rank"].items():
        assert error == pytest.approx(float((sigma[int(rank) :] ** 2).sum()), rel=1e-5, abs=1e-9)
    assert [int(rank) for rank in head["error_at_rank"]] == [0, 1, 2, 4, 8, 16, 24]
    whole = next(line for line in curves.lines if line.get_label() == "all")
    norm = sum(row["norm_squared"] for row in rows.values())
    assert whole.get_ydata()[1] == pytest.approx(sum(row["error_at_rank"]["1"] for row in rows.values()) / norm)


@pytest.mark.slow
def test_adapters_are_called_adapters_and_share_one_panel(llamas: Any, tmp_path: Path) -> None:
    folder, _ = llamas
    for name, rank in (("one", "3"), ("two", "4")):
        assert run(folder, tmp_path / name, "--rank", rank, "--modules", "*self_attn*") == 0
    adapters = ["--adapters", str(tmp_path / "one"), str(tmp_path / "two"), "--rank", "2", "--quiet"]
    assert main([*adapters, "--out", str(tmp_path / "both")]) == 0
    heat, curves = axes_of(report_of(tmp_path / "both"))
    assert heat.get_xlabel() == "adapter"
    assert len(heat.get_yticklabels()) == 3 * 4
    assert curves.get_xlabel() == "rank of the best LoRA"


def test_kinds_of_two_towers_have_their_whole_names(tmp_path: Path, capsys: Any) -> None:
    torch.manual_seed(0)
    changed_pair(FAMILIES["bart"](), tmp_path)
    assert run(tmp_path, tmp_path / "out", "--rank", "2", "--modules", "*fc1*", "--modules", "*encoder_attn.q*") == 0
    lines = capsys.readouterr().out.splitlines()[3:6]
    names = [line[: line.index(" 2 ")].rstrip() for line in lines]
    assert names == ["encoder_attn.q_proj", "decoder: fc1", "encoder: fc1"]
    (heat, _) = axes_of(report_of(tmp_path / "out"))
    assert len({text.get_text() for text in heat.get_yticklabels()}) == 3


def test_a_difference_is_drawn_by_the_size_of_its_updates(llamas: Any, tmp_path: Path) -> None:
    folder, _ = llamas
    assert run(folder, tmp_path, "--format", "diff", "--modules", "*self_attn.v*") == 0
    (heat,) = axes_of(report_of(tmp_path))
    assert float(heat.images[0].get_array().sum()) == pytest.approx(1)
