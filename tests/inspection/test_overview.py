"""The text of an inspection: bounds are rounded outwards, experts share a line, nothing is hidden."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import rasa_theory as rt
from rasa_theory.inspection import EnergyTable, inspection_notes, kinds, overview, recommendation_lines
from rasa_theory.plotting import plot_inspection
from rasa_theory.problem import energies


def report_of(*stacks: rt.LayerStack, ranks: tuple[int, ...] = (1, 2, 4), **goal: Any) -> dict[str, Any]:
    return rt.inspect(stacks, ranks, **goal) | {"left_out": [], "warnings": []}


def inspection_table(report: dict[str, Any]) -> str:
    """The rows and the notes, as the command prints them."""
    table = EnergyTable(report["stacks"], report["ranks"])
    rows = [line for row in report["stacks"] for line in table.rows(row)]
    return "\n".join([*(table.head() if rows else []), *rows, *inspection_notes(report)])


def diagonal(*sigma: float) -> np.ndarray:
    return np.diag(np.array(sigma))[None]


def test_printed_bounds_are_rounded_outwards() -> None:
    report = report_of(rt.LayerStack(diagonal(9.99**0.5, 0.01**0.5), "q"), ranks=(1, 2))
    line = next(line for line in inspection_table(report).splitlines() if line.startswith("q "))
    assert line.split()[5:7] == ["99", "100"], "99.9 % is no 100 %, and all terms hold all"
    assert overview._outwards((0.123456, 0.123451)) == ("0.12345", "0.12346")


def test_experts_of_one_shape_share_a_line() -> None:
    generator = np.random.default_rng(0)
    stacks = [rt.LayerStack(generator.standard_normal((2, 6, 5)), f"mlp.experts.{n}.up") for n in range(3)]
    lines = inspection_table(report_of(*stacks)).splitlines()
    (line,) = [line for line in lines if line.startswith("mlp.experts")]
    assert line.split()[:3] == ["mlp.experts.*.up", "6", "6x5"]
    whole = np.concatenate([np.linalg.svd(stack.values.numpy(), compute_uv=False) ** 2 for stack in stacks])
    shares = [int(100 * whole[:, :rank].sum() / whole.sum()) for rank in (1, 2, 4)]
    assert [int(cell) for cell in line.split()[5:8]] == shares


def test_the_parts_of_a_model_are_told_apart() -> None:
    """T5 has the same kinds in its encoder and its decoder, and experts of one part still share a line."""
    sigma = {"encoder": (2.0, 0.0), "decoder": (1.0, 1.0)}
    stacks = [
        rt.LayerStack(diagonal(*sigma[part]), f"{part}.block.*.layer.{n}.SelfAttention.k.weight")
        for part in sigma
        for n in range(2)
    ]
    report = report_of(*stacks, ranks=(1, 2))
    for row in report["stacks"]:
        row["kind"] = row["name"].partition("*.")[2].removesuffix(".weight")
    groups = {group["kind"]: group for group in kinds.kinds(report["stacks"])}
    assert groups.keys() == {f"{part}: layer.*.SelfAttention.k" for part in sigma}
    assert groups["encoder: layer.*.SelfAttention.k"]["energy"][0] == pytest.approx([1.0, 1.0])
    assert groups["decoder: layer.*.SelfAttention.k"]["energy"][0] == pytest.approx([0.5, 0.5])
    assert [len(group["modules"]) for group in groups.values()] == [2, 2]
    for line in inspection_table(report).splitlines():
        assert len(line) <= 80


def test_wide_intervals_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pure noise and a short search: no smaller rank is excluded, and the text says so."""
    monkeypatch.setattr(energies, "SMALL", 50)
    monkeypatch.setattr(energies, "_DEPTH", 3)
    noise = torch.randn(1, 300, 280, generator=torch.Generator().manual_seed(0))
    report = report_of(rt.LayerStack(noise, "noise"), ranks=(8,), error=0.95)
    one = report["recommendation"]["one_rank"]
    tails = 1 - np.cumsum(np.linalg.svd(noise[0].double().numpy(), compute_uv=False) ** 2) / float((noise**2).sum())
    least = int(np.argmax(tails <= 0.95)) + 1
    assert one["not_below"] <= least <= one["rank"]
    assert one["not_below"] < one["rank"]
    text = " ".join(recommendation_lines(report))
    assert f"None below {one['not_below']} reaches it" in text
    width = report["stacks"][0]["energy"][0][1] - report["stacks"][0]["energy"][0][0]
    assert width > 0.01
    assert f"the truth is at most {100 * width:.2g} points above" in " ".join(inspection_table(report).split())


def test_what_is_out_of_reach_is_said() -> None:
    report = report_of(rt.LayerStack(np.eye(20)[None], "eye"), ranks=(4,), error=0.1)
    text = " ".join(recommendation_lines(report))
    assert "no rank up to 4 is certain to" in text
    assert "--ranks 8" in text
    small = report_of(rt.LayerStack(np.eye(20)[None], "eye"), ranks=(4,), size=10)
    assert "not even rank 1" in recommendation_lines(small)[0]


def test_left_out_tensors_are_grouped_with_the_largest_first() -> None:
    report = report_of(rt.LayerStack(diagonal(3.0), "q"))
    report["left_out"] = [
        {"name": f"layers.{i}.norm.weight", "reason": "a norm", "norm_squared": 0.25} for i in range(4)
    ]
    report["left_out"] += [{"name": "embed.weight", "reason": "an embedding", "norm_squared": 10.0}]
    report["left_out"] += [{"name": "mask", "reason": "bool", "norm_squared": None}]
    lines = [line.strip() for line in inspection_table(report).splitlines()]
    at = lines.index("Left out, with the share of the squared norm of the whole source:")
    assert lines[at + 1] == "embed.weight: 50 % (an embedding)"
    assert lines[at + 2] == "4 norms: 5 % (a norm)"
    assert lines[at + 3] == "mask: share unknown (bool)"


def test_the_figure_has_a_row_for_each_kind_and_white_where_nothing_is() -> None:
    stacks = [
        rt.LayerStack(np.random.default_rng(0).standard_normal((layers, 6, 5)), f"kind{layers}") for layers in (1, 3)
    ]
    report = report_of(*stacks, rt.LayerStack(np.zeros((1, 3, 3)), "zero"), error=0.5)
    figure = plot_inspection(report, kinds.kinds(report["stacks"]))
    maps = [ax.images[0].get_array() for ax in figure.axes[:2]]
    for grid in maps:
        assert grid.shape == (2, 3)
        assert np.ma.getmaskarray(grid).sum() == 2, "one kind has two layers fewer"
    assert plot_inspection(report_of(rt.LayerStack(np.zeros((1, 3, 3)))), []).axes, "nothing has changed"


def test_a_table_without_a_line_is_not_explained() -> None:
    text = inspection_table(report_of(rt.LayerStack(np.zeros((2, 3, 3)), "q")))
    assert text == "No stack has changed."
