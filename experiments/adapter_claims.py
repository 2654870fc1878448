"""The two claims, from the runs of `train_adapters.py`: statistics over seeds, and their figures.

    python -m experiments.adapter_claims

Reads figures/train_adapters.jsonl; writes figures/train_adapters.csv and .png (learning and forgetting) and
figures/adapter_updates.png (are LoRA's ranks used; does reconstruction predict training). Of the runs in
figures/train_adapters_cpu.jsonl, made on another kind of machine and so compared among themselves only, it writes
train_adapters_cpu.csv and adapter_starts.png (starts from data). Intervals are 95 %, by Student's t over seeds;
differences are paired, since runs of one seed see the same batches.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import cycle, pairwise, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats

import rasa_theory as rt
from experiments.support.rows import Row, read_rows, write_rows
from rasa_theory.plotting import style

STYLES = [{"color": color, "linestyle": line} for line in ("-", "--", ":") for color in style.COLOURS]
SMOOTH = 20  # steps


def read(path: Path) -> dict[str, dict[int, Row]]:
    """The final runs: name -> seed -> row; `name at RATE` where the rate is not the one that tuning chose.

    Runs of several settings in one file are refused.
    """
    rows = read_rows(path)
    if any(row["settings"] != rows[-1]["settings"] for row in rows):
        raise SystemExit(f"{path} holds runs of different settings; take out those that are not to be compared")
    best: dict[str, Row] = {}
    for row in rows:
        if row["tuning"] and validation(row) > validation(best.get(row["name"])):
            best[row["name"]] = row
    found: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in rows:
        if not row["tuning"]:
            name, tuned = row["name"], best.get(row["name"], row)
            other = "" if rate(row) == rate(tuned) else f" at {rate(row):g}"
            found[name + other][row["run"]["seed"]] = row
    return dict(found)


def validation(row: Row | None) -> float:
    """MRR at the end; -1 for no row."""
    return -1.0 if row is None else float(row["looks"][-1]["validation_mrr"])


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


def band(axes: Any, x: Sequence[float], ys: Sequence[Sequence[float]], look: dict[str, str], label: str) -> None:
    """Mean over seeds, and its interval."""
    middle, half = np.transpose([interval(column) for column in zip(*ys, strict=True)])
    axes.plot(x, middle, lw=1.6, label=label, **look)
    axes.fill_between(x, middle - half, middle + half, color=look["color"], alpha=0.15, lw=0)


def by_budget(runs: dict[str, dict[int, Row]]) -> list[list[str]]:
    """The plain methods, a list for every r: full fine-tuning, LoRA(r), RaSA(r, k), and what each RaSA can express."""

    def rank(name: str) -> int:
        return int(name.partition("(")[2].rstrip(")").split(",")[0]) if name != "full" else 0

    plain = sorted(filter(is_plain, runs), key=lambda name: (rank(name), name))
    rasa, lora = ([name for name in plain if name.startswith(method)] for method in ("rasa", "lora"))
    budgets = sorted(set(map(rank, rasa))) or [0]
    found = []
    for low, high in zip(budgets, [*budgets[1:], math.inf], strict=True):
        shared, alone = ([name for name in names if low <= rank(name) < high] for names in (rasa, lora))
        mixed = [name for pair in zip_longest(alone, shared) for name in pair if name]
        found.append([*(["full"] if "full" in runs else []), *mixed])
    return found


def plot_claims(runs: dict[str, dict[int, Row]]) -> Figure:
    """A column for every r. Learning: loss and MRR against the step. Forgetting: drift against MRR."""
    budgets = by_budget(runs)
    figure = style.new_figure(9.0)
    grid = style.panels(figure, 3, len(budgets), sharey="row")
    for n, names in enumerate(budgets):
        loss, mrr, forget = grid[:, n]
        for name, look in zip(names, cycle(STYLES), strict=False):
            rows = list(runs[name].values())
            smooth = [np.convolve(r["losses"], np.ones(SMOOTH) / SMOOTH, "valid").tolist() for r in rows]
            band(loss, range(SMOOTH, SMOOTH + len(smooth[0])), smooth, look, name)
            steps = [look["step"] for look in rows[0]["looks"]]
            band(mrr, steps, [[look["validation_mrr"] for look in r["looks"]] for r in rows], look, name)
            at = np.mean([[(look["validation_mrr"], drift(look)) for look in r["looks"]] for r in rows], 0)
            forget.plot(*at.T, marker="o", lw=1.4, ms=4, label=name, **look)
        first = n == 0
        r = next((name for name in names if name.startswith("rasa")), "").partition("(")[2].partition(",")[0]
        style.name(loss, "step", f"training loss,\nmean of {SMOOTH} steps" if first else "", f"r = {r}" if r else "")
        style.name(mrr, "step", "validation MRR" if first else "")
        style.name(forget, "validation MRR", "drift of prose,\n1 - mean cosine" if first else "")
        style.legend(loss, loc="upper right", ncols=2)
    return figure


def plot_updates(runs: dict[str, dict[int, Row]]) -> Figure:
    """How much of their rank the trained updates use, and whether reconstruction predicts training."""
    names, gains = [name for name in runs if name != "full" and is_plain(name)], predicted(runs)
    figure = style.new_figure(7.0 if gains else 3.6)
    axes = style.panels(figure, 2 if gains else 1)[:, 0]
    for x, name in enumerate(names):
        parts = axes[0].violinplot([entropy_ranks(list(runs[name].values()))], [x], showmedians=True)
        for body in parts.pop("bodies"):
            body.set_facecolor(style.BLUE)
        for lines in parts.values():
            lines.set_color(style.BLUE)
    axes[0].set_xticks(range(len(names)), names, rotation=30)
    style.name(axes[0], "method; over layers, kinds and seeds", "entropy rank of an update")
    for ax in axes[1:]:
        for color, marker, (name, points) in zip(style.COLOURS, style.MARKERS, gains.items(), strict=False):
            ax.plot(*zip(*points, strict=True), marker, color=color, label=name)
        ax.axhline(0, color=style.GREY, lw=0.8)
        style.name(ax, "1 - $e_{\\mathrm{RaSA}}$ / $e_{\\mathrm{LoRA}}$ of the full update, a point per seed",
                   "test MRR, RaSA minus LoRA")  # fmt: skip
        style.legend(ax)
    return figure


def total_error(full: Row, errors: dict[str, dict[str, float]], which: str) -> float:
    """Squared error over all kinds; that of every kind is given relative to the energy of its update."""
    return sum(e[which] * float(np.square(full["updates"][kind]["norms"]).sum()) for kind, e in errors.items())


def predicted(runs: dict[str, dict[int, Row]]) -> dict[str, list[tuple[float, float]]]:
    """By RaSA's budget and seed: what sharing gains in reconstruction of the full update, and in test MRR."""
    found: dict[str, list[tuple[float, float]]] = {}
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
                found.setdefault(name, []).append((gain, better))
    return found


def plot_starts(runs: dict[str, dict[int, Row]]) -> Figure:
    """Starts from data beside random ones; steps count the full fine-tuning before."""
    short_steps = next(row for of in runs.values() for row in of.values())["settings"]["short_steps"]
    names = [method for method in ("lora(2)", "rasa(2,1)") if any(run.startswith(method) for run in runs)]
    figure = style.new_figure(3.4)
    axes = style.panels(figure, 1, len(names), sharey=True)[0]
    for n, (panel, method) in enumerate(zip(axes, names, strict=True)):
        for look, start in zip(STYLES, ("", " from gradient", " from updates"), strict=False):
            if of := runs.get(method + start):
                before = short_steps if "updates" in start else 0
                steps = [before + look["step"] for look in next(iter(of.values()))["looks"]]
                curves = [[look["validation_mrr"] for look in r["looks"]] for r in of.values()]
                band(panel, steps, curves, look, start.strip() or "random start")
        style.name(panel, "step", "validation MRR" if n == 0 else "", method)
        style.legend(panel)
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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--rows", type=Path, default=Path("figures/train_adapters.jsonl"), help="the runs; NAME_cpu.jsonl beside it too"
    )
    parser.add_argument("--out", type=Path, default=Path("figures"), help="folder for the tables and pictures")
    args = parser.parse_args(arguments)
    runs = report(args.rows, args.out)
    style.save(plot_claims(runs), args.out / "train_adapters.png")
    style.save(plot_updates(runs), args.out / "adapter_updates.png")
    others = args.rows.with_name(f"{args.rows.stem}_cpu.jsonl")
    starts = report(others, args.out) if others.exists() else runs
    if any(" from " in name for name in starts):
        style.save(plot_starts(starts), args.out / "adapter_starts.png")


if __name__ == "__main__":
    main()
