"""Spectra of updates: the premise that full fine-tuning has a large effective rank, and what adapters leave of it.

    python -m experiments.update_spectra                  # the bundled updates
    python -m experiments.update_spectra --model mpnet

Written to --out, for every layer of every kind; an interrupted run goes on after the last kind:

    updates.csv    norm of the update over the norm of the weights (from the record of the run, since the weights are
                   not shipped), stable rank, entropy rank (`rt.spectral_ranks`), and the share of ||M||_F^2 in the
                   best approximation of rank 8; then what adapters of rank 8 leave of the layer, in units of
                   ||M_i||^2: LoRA (lora_leaves), and RaSA of k = 1 (rasa_leaves). Full fine-tuning leaves nothing
    updates.png    the bundled updates: the same, and the spectra sigma_j / sigma_1 of all layers
    layers_left.png    a heat map over kinds and layers: entropy rank, what LoRA leaves, and what RaSA takes off that
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import rasa_theory as rt
from experiments.models.update_sets import FIRST_MODEL, MODEL_NAMES, add_model_flags, chosen_updates, corner, run_file
from experiments.support.command import refuses_bad_input
from experiments.support.rows import Row, Table, of_models
from rasa_theory.commands.progress import ProgressBar
from rasa_theory.plotting import style
from rasa_theory.sources import is_bundled, provenance

KEY = ("model", "stack", "layer")
MEASURES = ("relative_norm", "stable_rank", "entropy_rank", "energy_in_rank_8")
COLUMNS = (*KEY, *MEASURES, "lora_leaves", "rasa_leaves")
BUDGET = rt.RankBudget(8, 1)


def bundled_spectra() -> dict[str, torch.Tensor]:
    """Singular values of every layer, (L, m), by stack; they need no file, since the updates come with the package."""
    return {stack.name: stack.spectra.svd().S for stack in rt.load("minilm-code")[0]}


def relative_norms(model: str, runs: Path) -> dict[str, list[float]]:
    """||M_i|| / ||W_i|| of every layer of every kind, as the runs of seed 0 on code recorded them.

    As in `updates_of`, a kind in the repository is of the bundled run, also if `runs` has another.
    """
    record, name = run_file(model, "code", 0, runs).with_name("run.json"), f"{model}-code"
    update = json.loads(record.read_text(encoding="utf-8"))["update"] if record.exists() else {}
    if is_bundled(name):
        facts = provenance(name)
        update |= next(run for run in facts["runs"] if run["seed"] == facts["shipped_seed"])["update"]
    return {kind: about["relative_norm"] for kind, about in update.items()}


def measured(stack: rt.LayerStack, norms: Sequence[float], solver: rt.SolverOptions) -> list[Row]:
    """One row per layer, without the model."""
    S = stack.spectra.singular_values()
    ranks, energy = rt.spectral_ranks(S), S**2
    whole = energy.sum(1)
    columns = [norms, ranks.stable.tolist(), ranks.entropy.tolist(), (energy[:, :8].sum(1) / whole).tolist()]
    for solution in (rt.solve_lora(stack, BUDGET.rank), rt.solve_rasa(stack, BUDGET, solver)):
        errors = torch.tensor(rt.layer_errors(stack, solution.factors), dtype=whole.dtype)
        columns.append((errors / whole).tolist())
    return [
        dict(zip(COLUMNS[1:], (stack.name, i, *values), strict=True))
        for i, values in enumerate(zip(*columns, strict=True))
    ]


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
        for ax, column in zip(below, MEASURES, strict=True):
            values = [row[column] for row in own]
            ax.plot([row["layer"] for row in own], values, marker + "-", color=color, ms=3, lw=1, label=name)
    above.axvline(8, color=style.INK, linewidth=1, linestyle=":")
    style.note(above, "rank 8", (8, 1.3e-3), xytext=(4, 0), textcoords="offset points")
    above.set_ylim(1e-3, 1.2)
    style.name(above, "index j of the singular value", "$\\sigma_j / \\sigma_1$, a line per layer")
    style.legend_above(above, 2, handles=below[0].get_lines())
    for n, (ax, label) in enumerate(zip(below, labels, strict=True)):
        ax.set_ylim(bottom=0)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        style.name(ax, "layer" if n >= 2 else "", label)
    return figure


HEAT: tuple[tuple[str, str, Callable[[Row], float], str], ...] = (
    ("entropy rank", style.BLUE, lambda row: row["entropy_rank"], "{:.0f}"),
    ("% that LoRA of rank 8 leaves", style.GREY, lambda row: 100 * row["lora_leaves"], "{:.0f}"),
    ("% by which RaSA, k = 1, lowers that", style.VERMILION,
     lambda row: 100 * (1 - row["rasa_leaves"] / row["lora_leaves"]), "{:.0f}"),
)  # fmt: skip
"""The panels of the heat map: title, colour, value of a row, and its format. Full fine-tuning leaves nothing."""


SHORT = {"attention_output": "output"}
"""Names of kinds in the heat map, where they are shorter than their own."""


def plot_left(rows: Sequence[Row]) -> Figure:
    """A line for each model, a panel for each of `HEAT`: kinds down, layers across, the darker the larger."""
    by_model = {
        model: [row for row in rows if row["model"] == model] for model in dict.fromkeys(r["model"] for r in rows)
    }
    lines = [(model, own, panel) for model, own in by_model.items() for panel in HEAT]
    kinds = {model: list(dict.fromkeys(row["stack"] for row in own)) for model, own in by_model.items()}
    heights = [0.75 + 0.24 * len(kinds[model]) for model, _, _ in lines]
    figure = style.new_figure(sum(heights), title="Which layers do LoRA and RaSA miss most?")
    axes = style.panels(figure, len(lines), height_ratios=heights)[:, 0]
    for ax, (model, own, (title, color, value, form)) in zip(axes, lines, strict=True):
        values = {(row["stack"], row["layer"]): value(row) for row in own}
        most = max(map(abs, values.values()))
        names, layers = kinds[model], sorted({layer for _, layer in values})
        for (kind, layer), x in values.items():
            y = names.index(kind)
            ax.fill_between((layer - 0.5, layer + 0.5), y - 0.5, y + 0.5,
                            color=color, alpha=0.6 * max(x, 0) / most, linewidth=0)  # fmt: skip
            style.note(ax, form.format(x), (layer, y), ha="center", va="center")
        ax.set_xlim(-0.5, len(layers) - 0.5)
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.set_xticks(layers)
        ax.set_yticks(range(len(names)), [SHORT.get(name, name) for name in names])
        is_first = title == HEAT[0][0]
        style.name(ax, "layer" if ax is axes[-1] else "", title=f"{model}: {title}" if is_first else title)
    return figure


@refuses_bad_input
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser, ("minilm", "mpnet"))
    parser.add_argument("--effort", default="quick", help="of the solver: quick, default or thorough (quick)")
    parser.add_argument("--smoke", action="store_true", help="a corner of one stack, in seconds")
    parser.add_argument("--out", type=Path, default=Path("figures"))
    options = parser.parse_args(arguments)

    stacks, table = chosen_updates(options), Table(options.out / "updates.csv", COLUMNS, KEY)
    if options.smoke:
        stacks = corner(stacks)
    model = MODEL_NAMES[options.model]
    norms = relative_norms(options.model, options.runs)
    solver = rt.SolverOptions(effort=options.effort)
    with ProgressBar(len(stacks), "stacks") as progress:
        for done, (name, stack) in enumerate(stacks.items()):
            progress(done, name)
            if {"model": model, "stack": name, "layer": stack.layers - 1} not in table:
                rows = measured(stack, norms[name][: stack.layers], solver)
                table.add([{"model": model} | row for row in rows])
    if bundled := of_models(table.rows, FIRST_MODEL):
        style.save(plot(bundled, bundled_spectra()), options.out / "updates.png")
    style.save(plot_left(table.rows), options.out / "layers_left.png")
    for column in COLUMNS[3:]:
        for name in stacks:
            values = [row[column] for row in of_models(table.rows, model) if row["stack"] == name]
            print(f"{column:17} {name:17} {min(values):8.3f} .. {max(values):8.3f}")


if __name__ == "__main__":
    main()
