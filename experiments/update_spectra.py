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
import csv
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

import rasa_theory as rt
from rasa_theory.sources import provenance

COLUMNS = ("stack", "layer", "relative_norm", "stable_rank", "entropy_rank", "energy_in_rank_8")
STYLES = (("#0072B2", "o"), ("#E69F00", "s"), ("#009E73", "^"), ("#CC79A7", "D"))


def describe(S: torch.Tensor) -> tuple[float, float, float]:
    """Stable rank, entropy rank and the share of the energy in rank 8, of one layer's singular values (m,)."""
    p = S**2 / (S**2).sum()
    entropy = -(p[p > 0] * p[p > 0].log()).sum()
    return float(1 / p[0]), float(entropy.exp()), float(p[:8].sum())


def plot(rows: list[dict[str, Any]], spectra: dict[str, torch.Tensor]) -> Figure:
    """Spectra on the left, one panel per number on the right."""
    figure = Figure(figsize=(11.5, 5.6), layout="constrained")
    grid = figure.add_gridspec(2, 4)
    left = figure.add_subplot(grid[:, :2])
    panels = [figure.add_subplot(grid[i // 2, 2 + i % 2]) for i in range(4)]
    labels = ("norm / norm of the weights", "stable rank", "entropy rank", "energy in rank 8")
    for (name, S), (color, marker) in zip(spectra.items(), STYLES, strict=True):
        for i, sigma in enumerate(S):
            j = range(1, len(sigma) + 1)
            left.loglog(j, sigma / sigma[0], color=color, linewidth=1, alpha=0.7, label=name if i == 0 else None)
        own = [row for row in rows if row["stack"] == name]
        for ax, column in zip(panels, COLUMNS[2:], strict=True):
            ax.plot([row["layer"] for row in own], [row[column] for row in own], marker + "-", color=color, ms=5)
    left.axvline(8, color="black", linewidth=1, linestyle=":")
    left.annotate("rank 8", (8, 1), (4, -8), textcoords="offset points")
    left.set_ylim(1e-3, 1.2)
    left.set_xlabel("j")
    left.set_ylabel("$\\sigma_j / \\sigma_1$ of the update, one line per layer")
    left.legend(frameon=False, loc="lower left")
    for ax, label in zip(panels, labels, strict=True):
        ax.set_title(label, fontsize=10)
        ax.set_ylim(bottom=0)
        ax.set_xlabel("layer")
    for ax in (left, *panels):
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("figures"))
    options = parser.parse_args()

    facts = provenance("minilm-code")
    shipped = next(run for run in facts["runs"] if run["seed"] == facts["shipped_seed"])["update"]
    spectra = {stack.name: stack.svd().S for stack in rt.load("minilm-code")[0]}
    rows = [
        dict(zip(COLUMNS, (name, i, shipped[name]["relative_norm"][i], *describe(sigma)), strict=True))
        for name, S in spectra.items()
        for i, sigma in enumerate(S)
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    with open(options.out / "updates.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, spectra).savefig(options.out / "updates.png", dpi=130)
    for column in COLUMNS[2:]:
        for name in spectra:
            values = [row[column] for row in rows if row["stack"] == name]
            print(f"{column:17} {name:17} {min(values):8.3f} .. {max(values):8.3f}")


if __name__ == "__main__":
    main()
