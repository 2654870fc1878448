"""What the bundled updates are like: the premise that full fine-tuning has a large effective rank.

    python experiments/update_spectra.py

Written to --out, for every layer of every kind:

    updates.csv    norm of the update over that of the weights (from the provenance of the run, since the weights are
                   not shipped), stable rank ||M||_F^2 / sigma_1^2, entropy rank exp(-sum_j p_j log p_j) with
                   p_j = sigma_j^2 / ||M||_F^2, and the share of ||M||_F^2 that a rank-8 approximation keeps
    updates.png    the same, and the spectra sigma_j / sigma_1 of all layers
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import rasa_theory as rt
from experiments import tables
from rasa_theory.plotting import style
from rasa_theory.sources import provenance

COLUMNS = ("stack", "layer", "relative_norm", "stable_rank", "entropy_rank", "energy_in_rank_8")


def describe(S: torch.Tensor) -> tuple[float, float, float]:
    """Stable rank, entropy rank and the share of the energy in rank 8, of one layer's singular values (m,)."""
    p = S**2 / (S**2).sum()
    entropy = -(p[p > 0] * p[p > 0].log()).sum()
    return float(1 / p[0]), float(entropy.exp()), float(p[:8].sum())


def spectra_of_bundled() -> dict[str, torch.Tensor]:
    """Singular values of every layer, (L, m), by stack; they need no file, since the updates come with the package."""
    return {stack.name: stack.spectra.svd().S for stack in rt.load("minilm-code")[0]}


def described(spectra: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """The rows of the table."""
    facts = provenance("minilm-code")
    shipped = next(run for run in facts["runs"] if run["seed"] == facts["shipped_seed"])["update"]
    return [
        dict(zip(COLUMNS, (name, i, shipped[name]["relative_norm"][i], *describe(sigma)), strict=True))
        for name, S in spectra.items()
        for i, sigma in enumerate(S)
    ]


def plot(rows: list[dict[str, Any]], spectra: dict[str, torch.Tensor]) -> Figure:
    """Spectra above, one panel per number below."""
    figure = style.new_figure(8.0)
    grid = figure.add_gridspec(3, 2, height_ratios=[1.7, 1, 1])
    above = figure.add_subplot(grid[0, :])
    below = [figure.add_subplot(grid[1 + i // 2, i % 2]) for i in range(4)]
    for ax in (above, *below):
        style.dress(ax)
    labels = ("norm / norm of weights", "stable rank", "entropy rank", "energy in rank 8")
    for (name, S), color, marker in zip(spectra.items(), style.COLOURS, style.MARKERS, strict=False):
        for sigma in S:
            above.loglog(range(1, len(sigma) + 1), sigma / sigma[0], color=color, linewidth=1, alpha=0.7)
        own = [row for row in rows if row["stack"] == name]
        for ax, column in zip(below, COLUMNS[2:], strict=True):
            values = [row[column] for row in own]
            ax.plot([row["layer"] for row in own], values, marker + "-", color=color, ms=5, label=name)
    above.axvline(8, color=style.INK, linewidth=1, linestyle=":")
    style.note(above, "rank 8", (8, 1), xytext=(4, -8), textcoords="offset points")
    above.set_ylim(1e-3, 1.2)
    style.name(above, "index j of the singular value", "$\\sigma_j / \\sigma_1$ of the update,\none line per layer")
    style.legend(above, *below[0].get_legend_handles_labels(), loc="lower left")
    for n, (ax, label) in enumerate(zip(below, labels, strict=True)):
        ax.set_ylim(bottom=0)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        style.name(ax, "layer" if n >= 2 else "", label)
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("figures"))
    options = parser.parse_args(arguments)

    spectra = spectra_of_bundled()
    rows = described(spectra)
    tables.write(options.out / "updates.csv", COLUMNS, rows)
    style.save(plot(rows, spectra), options.out / "updates.png")
    for column in COLUMNS[2:]:
        for name in spectra:
            values = [row[column] for row in rows if row["stack"] == name]
            print(f"{column:17} {name:17} {min(values):8.3f} .. {max(values):8.3f}")


if __name__ == "__main__":
    main()
