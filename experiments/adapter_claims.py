"""The two claims, from the runs of `train_adapters.py`: statistics over seeds, and their figures.

    python -m experiments.adapter_claims

Reads figures/train_adapters.jsonl; writes figures/train_adapters.csv and .png (paired differences in
learning and forgetting) and
adapter_updates.png (are LoRA's ranks used) and adapter_gains.png (does reconstruction predict training). Of the runs in
figures/train_adapters_cpu.jsonl, made on another kind of machine and so compared among themselves only, it writes
train_adapters_cpu.csv and adapter_starts.png (starts from data). Intervals are 95 %, by Student's t over seeds;
differences are paired, since runs of one seed see the same batches.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy import stats

import rasa_theory as rt
from experiments.support import looks
from experiments.support.command import refuses_bad_input
from experiments.support.rows import Row, read_rows, write_rows
from experiments.train_adapters.protocol import best_rate
from rasa_theory.common import InputError
from rasa_theory.plotting import style

SMOOTH = 20  # steps


def read(path: Path) -> dict[str, dict[int, Row]]:
    """The final runs: name -> seed -> row; `name at RATE` where the rate is not the one that tuning chose.

    Raises InputError for a file without runs or with runs of several settings, and for rates that were tried with
    different numbers of tuning seeds.
    """
    rows = read_rows(path) if path.suffix == ".jsonl" else []
    if not rows or any("settings" not in row for row in rows):
        raise InputError(f"{path} has no runs of experiments.train_adapters")
    if any(row["settings"] != rows[-1]["settings"] for row in rows):
        raise InputError(f"{path} holds runs of different settings; take out those that are not to be compared")
    best = {}
    for name, tried in trials_by_method(rows).items():
        try:
            best[name] = best_rate(tried)
        except InputError as error:
            raise InputError(f"{path}: {name}: {error}") from None
    by_seed: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in rows:
        if not row["tuning"]:
            other = "" if rate(row) == best.get(row["name"], rate(row)) else f" at {rate(row):g}"
            by_seed[row["name"] + other][row["run"]["seed"]] = row
    return dict(by_seed)


def trials_by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The runs that chose learning rates."""
    trials: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["tuning"]:
            trials[row["name"]].append(row)
    return dict(trials)


def validation(row: Row) -> float:
    """MRR at the end."""
    return float(row["looks"][-1]["validation_mrr"])


def rate(row: Row) -> float:
    return float(row["run"]["learning_rate"])


def is_plain(name: str) -> bool:
    """Whether the runs start at random and have the rate of their own tuning."""
    return " from " not in name and " at " not in name


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval; nan for one value."""
    x = np.asarray(values, float)
    if len(x) < 2:
        return float(x.mean()), math.nan
    return float(x.mean()), float(stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))


def paired(runs: dict[int, Row], others: dict[int, Row], value: Any) -> tuple[float, float]:
    """Mean difference over the seeds that both have, and the half width of its interval."""
    return interval([value(runs[s]) - value(others[s]) for s in sorted(runs.keys() & others.keys())])


def final_loss(row: Row) -> float:
    return float(np.mean(row["losses"][-SMOOTH:]))


def mean_loss(row: Row) -> float:
    """Over the whole run: lower is faster."""
    return float(np.mean(row["losses"]))


def drift(look: Row) -> float:
    """Over both kinds of prose."""
    return float(np.mean(list(look["drift"].values())))


def prose_mrr(look: Row) -> float:
    return float(np.mean(list(look["prose_mrr"].values())))


def drift_at(row: Row, mrr: float) -> float:
    """Drift where the validation MRR first reaches `mrr`, between looks linearly; nan where it never does."""
    looks = row["looks"]
    for before, after in pairwise(looks):
        low, high = before["validation_mrr"], after["validation_mrr"]
        if high >= mrr:
            share = 0.0 if high <= low else max((mrr - low) / (high - low), 0.0)
            return drift(before) + share * (drift(after) - drift(before))
    return math.nan


def common_mrr(runs: dict[str, dict[int, Row]], seed: int) -> float:
    """The validation MRR that every method, at its own rate, reaches with this seed: the lowest of the ends."""
    return min(validation(of[seed]) for name, of in runs.items() if seed in of and is_plain(name))


def entropy_ranks(rows: list[Row]) -> list[float]:
    """Entropy ranks of the updates of all layers, kinds and seeds, from their 32 leading singular values at most."""
    spectra = [sigma for row in rows for update in row["updates"].values() for sigma in update["sigma"]]
    return [float(rt.spectral_ranks(torch.tensor(sigma, dtype=torch.float64)).entropy[0]) for sigma in spectra]


def reference(name: str, runs: dict[str, dict[int, Row]]) -> str | None:
    """LoRA at the same number of parameters, from the same start if it ran, each at the rate of its own tuning."""
    lora, start = _lora(name)
    return next((run for run in (lora + start, lora) if run in runs), None) if lora else None


def at_equal_rate(name: str, runs: dict[str, dict[int, Row]]) -> str | None:
    """LoRA at the same number of parameters and the same rate, if it ran."""
    lora, start = _lora(name)
    mine = {rate(row) for row in runs[name].values()}
    alike = [run for run in runs if lora and run.partition(" at ")[0] == lora + start]
    return next((run for run in alike if {rate(row) for row in runs[run].values()} == mine), None)


def _lora(name: str) -> tuple[str, str]:
    """RaSA's name -> that of LoRA with as many parameters, and the start, if it is not random; empty for others."""
    budget, _, start = name.partition(" at ")[0].partition(")")
    return (f"lora({budget.removeprefix('rasa(').split(',')[0]})", start) if budget.startswith("rasa(") else ("", "")


def table(runs: dict[str, dict[int, Row]]) -> list[dict[str, Any]]:
    """One line per method."""
    lines = []
    for name, of in runs.items():
        rows = list(of.values())
        line: dict[str, Any] = {
            "method": name, "parameters": rows[0]["trained_parameters"], "rate": rows[0]["run"]["learning_rate"],
            "seeds": len(rows), "median_entropy_rank": float(np.median(entropy_ranks(rows))),
        }  # fmt: skip
        measures: dict[str, Callable[[Row], float]] = {
            "test_mrr": lambda r: float(r["test_mrr"]),
            "final_loss": final_loss,
            "mean_loss": mean_loss,
            "drift": lambda r: drift(r["looks"][-1]),
            "prose_mrr": lambda r: prose_mrr(r["looks"][-1]),
            "drift_at_equal_mrr": lambda r: drift_at(r, common_mrr(runs, r["run"]["seed"])),
        }
        others = {"minus_lora": reference(name, runs), "minus_lora_at_equal_rate": at_equal_rate(name, runs)}
        for key, value in measures.items():
            line[key], line[f"{key}_interval"] = interval([value(r) for r in rows])
            for column, versus in others.items():
                if versus is not None:
                    line[f"{key}_{column}"], line[f"{key}_{column}_interval"] = paired(of, runs[versus], value)
        lines.append(line)
    return lines


def write_csv(lines: list[dict[str, Any]], path: Path) -> None:
    keys = list(dict.fromkeys(key for line in lines for key in line))
    write_rows(path, keys, [{k: f"{v:.5g}" if isinstance(v, float) else v for k, v in line.items()}
                              for line in lines])  # fmt: skip


def band(ax: Axes, x: Sequence[float], ys: Sequence[Sequence[float]], color: str, dash: str) -> list[float]:
    """Draw the mean over seeds and its interval; returns the mean."""
    middle, half = np.transpose([interval(column) for column in zip(*ys, strict=True)])
    ax.plot(x, middle, dash, lw=1.4, color=color)
    ax.fill_between(x, middle - half, middle + half, color=color, alpha=0.15, lw=0)
    return [float(y) for y in middle]


@dataclass(frozen=True)
class Difference:
    """RaSA minus LoRA over the seeds of one machine, both at the same parameters."""

    budget: str
    rate: float
    other_rate: float
    mrr: tuple[float, float]
    drift: tuple[float, float]

    @property
    def label(self) -> str:
        rates = [f"{rate:.0e}".replace("e-0", "e-") for rate in dict.fromkeys((self.rate, self.other_rate))]
        return f"{self.budget}, {' / '.join(rates)}"


def differences(runs: dict[str, dict[int, Row]]) -> list[Difference]:
    """RaSA from random starts, beside LoRA at the same rate, and beside LoRA at the rate of its own tuning."""
    pairs = {}
    for name in (name for name in runs if name.startswith("rasa") and " from " not in name):
        for other in (at_equal_rate(name, runs), reference(name, runs) if is_plain(name) else None):
            if other is not None:
                pairs[name, other] = Difference(
                    name.partition(" at ")[0].replace("rasa(", "(").replace(",", ", "),
                    rate(next(iter(runs[name].values()))),
                    rate(next(iter(runs[other].values()))),
                    paired(runs[name], runs[other], lambda row: float(row["test_mrr"])),
                    paired(runs[name], runs[other], lambda row: drift(row["looks"][-1])),
                )
    return list(pairs.values())


def plot_claims(machines: dict[str, dict[str, dict[int, Row]]]) -> Figure:
    """A forest plot of paired differences, mean and 95 % interval: test MRR on the left, drift on the right."""
    all_pairs = [(machine, one) for machine, runs in machines.items() for one in differences(runs)]
    groups = {
        "at the same rate": [pair for pair in all_pairs if pair[1].rate == pair[1].other_rate],
        "as chosen: RaSA / LoRA": [pair for pair in all_pairs if pair[1].rate != pair[1].other_rate],
    }
    title = "Does RaSA learn more or forget less?"
    figure = style.new_figure(1.5 + 0.24 * len(all_pairs), title=title)
    axes = style.panels(figure, 1, 2, sharey=True)[0]
    y, ticks, color = 0.0, [], looks.METHODS["rasa"].color
    for (group, pairs), look in zip(groups.items(), ("o", "s"), strict=True):
        if not pairs:
            continue
        ticks.append((y, group))
        for machine, one in sorted(pairs, key=lambda pair: (pair[1].budget, -pair[1].rate)):
            y += 1
            for ax, (middle, half) in zip(axes, (one.mrr, one.drift), strict=True):
                ax.errorbar([middle], [y], xerr=[half], fmt=look, color=color, ms=4, lw=1.4, capsize=2)
            ticks.append((y, f"{one.label}, {machine}"))
        y += 1.3
    for ax, x in zip(axes, ("test MRR", "drift"), strict=True):
        ax.axvline(0, color=looks.METHODS["lora"].color, lw=1)
        style.name(ax, x)
        ax.xaxis.set_major_locator(MaxNLocator(2))
        ax.margins(x=0.08)
    axes[0].set_yticks([at for at, _ in ticks], [label for _, label in ticks])
    for label in (label for label in axes[0].get_yticklabels() if label.get_text() in groups):
        label.set_weight("bold")
    for ax in axes:
        ax.tick_params(axis="y", length=0)
    axes[0].set_ylim(y - 0.7, -0.5)
    figure.supxlabel("RaSA(r, k) minus LoRA(r): mean, 95 % interval", fontsize=style.MEDIUM)
    return figure


def plot_updates(runs: dict[str, dict[int, Row]]) -> Figure:
    """How much of its rank each method's updates use: violins over layers, kinds and seeds, with medians."""
    names = [name for name in runs if name != "full" and is_plain(name)]
    figure = style.new_figure(0.9 + 0.27 * len(names), title="How much of its rank does training use?")
    ((ax,),) = style.panels(figure)
    for y, name in enumerate(names):
        ranks, look = entropy_ranks(list(runs[name].values())), looks.METHODS[name.partition("(")[0]]
        parts = ax.violinplot([ranks], [y], orientation="horizontal", widths=0.8, showextrema=False)
        for body in parts["bodies"]:
            body.set(facecolor=look.color, alpha=0.35)
        ax.plot([np.median(ranks)], [y], look.marker, color=look.color, ms=4)
    ax.set_yticks(range(len(names)), list(map(titled, names)))
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlim(left=0)
    ax.grid(axis="x", color=style.PALE, linewidth=0.5)
    style.name(ax, "entropy rank of an update (point: median)")
    return figure


def titled(name: str) -> str:
    """`rasa(2,1)` as RaSA(2, 1)."""
    return name.replace("rasa", "RaSA").replace("lora", "LoRA").replace(",", ", ")


def plot_gains(runs: dict[str, dict[int, Row]]) -> Figure | None:
    """Whether reconstruction predicts training: a point for each RaSA and seed; None if no run says so."""
    gains = predicted(runs)
    if not gains:
        return None
    figure = style.new_figure(2.6, title="Does reconstruction predict training?")
    ((ax,),) = style.panels(figure)
    for color, marker, (name, points) in zip(style.COLOURS, style.MARKERS, gains.items(), strict=False):
        x, y = [100 * gain for gain, _ in points], [better for _, better in points]
        ax.plot(x, y, marker, color=color, label=titled(name), ms=4)
    ax.axhline(0, color=style.GREY, lw=0.8)
    style.name(ax, "reconstruction: error below LoRA's, %", "training: test MRR,\nRaSA minus LoRA")
    style.legend_above(ax, len(gains), bbox_to_anchor=(-0.2, 1), handletextpad=0.1)
    return figure


def total_error(full: Row, errors: dict[str, dict[str, float]], which: str) -> float:
    """Squared error over all kinds; that of every kind is given relative to the energy of its update."""
    return sum(e[which] * float(np.square(full["updates"][kind]["norms"]).sum()) for kind, e in errors.items())


def predicted(runs: dict[str, dict[int, Row]]) -> dict[str, list[tuple[float, float]]]:
    """By RaSA's budget and seed: what sharing gains in reconstruction of the full update, and in test MRR."""
    gains: dict[str, list[tuple[float, float]]] = {}
    for name, of in runs.items():
        versus, budget = reference(name, runs), name.removeprefix("rasa(").removesuffix(")")
        if versus is None or not is_plain(name):
            continue
        for seed in sorted(of.keys() & runs[versus].keys() & runs.get("full", {}).keys()):
            errors = runs["full"][seed]["reconstruction"].get(budget)
            if errors is not None:
                rasa, lora = (total_error(runs["full"][seed], errors, which) for which in ("e_rasa", "e_lora"))
                gain = 1 - rasa / lora
                better = of[seed]["test_mrr"] - runs[versus][seed]["test_mrr"]
                gains.setdefault(name, []).append((gain, better))
    return gains


STARTS = {
    "": ("random", style.BLUE, "-"),
    " from gradient": ("gradient", style.ORANGE, "--"),
    " from updates": ("updates", style.GREEN, "-."),
}
"""Starts of an adapter: how a name ends, and the label, colour and dashes of its line."""


def plot_starts(runs: dict[str, dict[int, Row]]) -> Figure:
    """Starts from data beside random ones; steps count the full fine-tuning before."""
    short_steps = next(row for of in runs.values() for row in of.values())["settings"]["short_steps"]
    names = [method for method in ("lora(2)", "rasa(2,1)") if any(run.startswith(method) for run in runs)]
    figure = style.new_figure(0.6 + 1.8 * len(names), title="Does a start from data learn faster?")
    axes = style.panels(figure, len(names), 1, sharex=True, sharey=True)[:, 0]
    for panel, method in zip(axes, names, strict=True):
        ends = []
        for start, (label, color, dash) in STARTS.items():
            if of := runs.get(method + start):
                before = short_steps if "updates" in start else 0
                steps = [before + look["step"] for look in next(iter(of.values()))["looks"]]
                curves = [[look["validation_mrr"] for look in r["looks"]] for r in of.values()]
                middle = band(panel, steps, curves, color, dash)
                ends.append((steps[-1], middle[-1], label, color))
        style.name(panel, "", "validation MRR", titled(method))
        style.label_ends(panel, ends, 0.12)
    style.name(axes[-1], "step")
    return figure


def report(rows: Path, out: Path) -> dict[str, dict[int, Row]]:
    """Writes the table of a file of runs, and prints it; the runs."""
    runs = read(rows)
    lines = table(runs)
    write_csv(lines, out / f"{rows.stem}.csv")
    print(f"\n{rows} (means over seeds; minus LoRA: paired, +- 95 %)")
    print(f"{'method':22} {'parameters':>10}   rate  test MRR       minus LoRA          mean loss  drift")
    for line in lines:
        minus = "{:+.4f} +- {:.4f}".format(*(line.get(f"test_mrr_minus_lora{x}", math.nan) for x in ("", "_interval")))
        print(
            f"{line['method']:22} {line['parameters']:10} {line['rate']:6g}  {line['test_mrr']:.4f}   "
            f"{minus if 'test_mrr_minus_lora' in line else '':19} {line['mean_loss']:12.4f}  {line['drift']:.4f}"
        )
    return runs


@refuses_bad_input
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--rows", type=Path, default=Path("figures/train_adapters.jsonl"), help="the runs; NAME_cpu.jsonl beside it too"
    )
    parser.add_argument("--out", type=Path, default=Path("figures"), help="folder for the tables and pictures")
    args = parser.parse_args(arguments)
    runs = report(args.rows, args.out)
    style.save(plot_updates(runs), args.out / "adapter_updates.png")
    if (gains := plot_gains(runs)) is not None:
        style.save(gains, args.out / "adapter_gains.png")
    others = args.rows.with_name(f"{args.rows.stem}_cpu.jsonl")
    starts = report(others, args.out) if others.exists() else runs
    style.save(
        plot_claims({"GPU": runs} | ({"CPU": starts} if others.exists() else {})), args.out / "train_adapters.png"
    )
    if any(" from " in name for name in starts):
        style.save(plot_starts(starts), args.out / "adapter_starts.png")


if __name__ == "__main__":
    main()
