"""Spectra of the bundled updates: the premise that full fine-tuning has a large effective rank.

    python -m experiments.update_spectra

Written to --out, for every layer of every kind:

    updates.csv    norm of the update over the norm of the weights (from the provenance of the run, since the weights
                   are not shipped), stable rank, entropy rank (`rt.spectral_ranks`), and the share of ||M||_F^2 in the
                   best approximation of rank 8
    updates.png    the same, and the spectra sigma_j / sigma_1 of all layers
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import rasa_theory as rt
from experiments.support.rows import Row, write_rows
from rasa_theory.plotting import style
from rasa_theory.sources import provenance

COLUMNS = ("stack", "layer", "relative_norm", "stable_rank", "entropy_rank", "energy_in_rank_8")


def bundled_spectra() -> dict[str, torch.Tensor]:
    """Singular values of every layer, (L, m), by stack; they need no file, since the updates come with the package."""
    return {stack.name: stack.spectra.svd().S for stack in rt.load("minilm-code")[0]}


def table(spectra: dict[str, torch.Tensor]) -> list[Row]:
    """One row per stack and layer."""
    facts = provenance("minilm-code")
    shipped = next(run for run in facts["runs"] if run["seed"] == facts["shipped_seed"])["update"]
    lines: list[Row] = []
    for name, S in spectra.items():
        ranks, energy = rt.spectral_ranks(S), S**2
        columns = (shipped[name]["relative_norm"], ranks.stable.tolist(), ranks.entropy.tolist(),
                   (energy[:, :8].sum(1) / energy.sum(1)).tolist())  # fmt: skip
        lines += [
            dict(zip(COLUMNS, (name, i, *values), strict=True)) for i, values in enumerate(zip(*columns, strict=True))
        ]
    return lines


def plot(lines: list[Row], spectra: dict[str, torch.Tensor]) -> Figure:
    """Spectra above, one panel per measure below."""
    figure = style.new_figure(5.4, title="Are the fine-tuning updates of low rank?")
    grid = figure.add_gridspec(3, 2, height_ratios=[1.7, 1, 1])
    above = figure.add_subplot(grid[0, :])
    below = [figure.add_subplot(grid[1 + i // 2, i % 2]) for i in range(4)]
    for ax in (above, *below):
        style.dress(ax)
    labels = ("norm / weights' norm", "stable rank", "entropy rank", "energy in rank 8")
    for (name, S), color, marker in zip(spectra.items(), style.COLOURS, style.MARKERS, strict=False):
        for sigma in S:
            above.loglog(range(1, len(sigma) + 1), sigma / sigma[0], color=color, linewidth=0.7, alpha=0.7)
        own = [row for row in lines if row["stack"] == name]
        for ax, column in zip(below, COLUMNS[2:], strict=True):
            values = [row[column] for row in own]
            ax.plot([row["layer"] for row in own], values, marker + "-", color=color, ms=3, lw=1, label=name)
    above.axvline(8, color=style.INK, linewidth=1, linestyle=":")
    style.note(above, "rank 8", (8, 1.3e-3), xytext=(4, 0), textcoords="offset points")
    above.set_ylim(1e-3, 1.2)
    style.name(above, "index j of the singular value", "$\\sigma_j / \\sigma_1$, a line per layer")
    for line in below[0].get_lines():
        above.plot([], [], line.get_marker() + "-", color=line.get_color(), ms=3, label=line.get_label())
    style.legend_above(above, 2)
    for n, (ax, label) in enumerate(zip(below, labels, strict=True)):
        ax.set_ylim(bottom=0)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        style.name(ax, "layer" if n >= 2 else "", label)
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("figures"))
    options = parser.parse_args(arguments)

    spectra = bundled_spectra()
    lines = table(spectra)
    write_rows(options.out / "updates.csv", COLUMNS, lines)
    style.save(plot(lines, spectra), options.out / "updates.png")
    for column in COLUMNS[2:]:
        for name in spectra:
            values = [row[column] for row in lines if row["stack"] == name]
            print(f"{column:17} {name:17} {min(values):8.3f} .. {max(values):8.3f}")


if __name__ == "__main__":
    main()
