"""The two claims, from the runs of `train_adapters.py`: statistics over seeds, and their figures.

    python experiments/adapter_claims.py

Reads figures/train_adapters.jsonl; writes figures/train_adapters.csv and .png (learning and forgetting) and
figures/adapter_updates.png (are LoRA's ranks used; does reconstruction predict training). Intervals are 95 %, by
Student's t over seeds; differences are paired, since runs of one seed see the same batches.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

Row = dict[str, Any]
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
STYLES = [{"color": colour, "linestyle": line} for line in ("-", "--", ":") for colour in COLOURS]
SMOOTH = 20  # steps


def read(path: Path) -> dict[str, dict[int, Row]]:
    """The final runs: name -> seed -> row. Runs of other settings than the last one's are refused."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if any(row["settings"] != rows[-1]["settings"] for row in rows):
        raise SystemExit(f"{path} holds runs of different settings; take out those that are not to be compared")
    found: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in rows:
        if not row["tuning"]:
            found[row["name"]][row["run"]["seed"]] = row
    return dict(found)


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
    """The validation MRR that every method reaches with this seed: the lowest of the ends."""
    return min(of[seed]["looks"][-1]["validation_mrr"] for of in runs.values() if seed in of)


def entropy_rank(sigma: Sequence[float]) -> float:
    """exp of the entropy of the shares of energy: n for n equal singular values."""
    p = np.asarray(sigma) ** 2
    p = p[p > 0] / p.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def reference(name: str, runs: dict[str, dict[int, Row]]) -> str | None:
    """LoRA at the same number of parameters, from the same start if it ran."""
    budget, _, start = name.partition(")")
    if not budget.startswith("rasa("):
        return None
    lora = f"lora({budget.removeprefix('rasa(').split(',')[0]})"
    return next((run for run in (lora + start, lora) if run in runs), None)


def table(runs: dict[str, dict[int, Row]]) -> list[dict[str, Any]]:
    """One line per method."""
    lines = []
    for name, of in runs.items():
        rows = list(of.values())
        line: dict[str, Any] = {
            "method": name, "parameters": rows[0]["trained_parameters"], "rate": rows[0]["run"]["learning_rate"],
            "seeds": len(rows),
        }  # fmt: skip
        measures = {
            "test_mrr": lambda r: r["test_mrr"],
            "final_loss": final_loss,
            "mean_loss": mean_loss,
            "drift": lambda r: drift(r["looks"][-1]),
            "prose_mrr": lambda r: prose_mrr(r["looks"][-1]),
            "drift_at_equal_mrr": lambda r: drift_at(r, common_mrr(runs, r["run"]["seed"])),
        }
        versus = reference(name, runs)
        for key, value in measures.items():
            line[key], line[f"{key}_interval"] = interval([value(r) for r in rows])
            if versus is not None:
                line[f"{key}_minus_lora"], line[f"{key}_minus_lora_interval"] = paired(of, runs[versus], value)
        lines.append(line)
    return lines


def write_csv(lines: list[dict[str, Any]], path: Path) -> None:
    keys = list(dict.fromkeys(key for line in lines for key in line))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, keys, lineterminator="\n")
        writer.writeheader()
        for line in lines:
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in line.items()})


def band(axes: Any, x: Sequence[float], ys: Sequence[Sequence[float]], style: dict[str, str], label: str) -> None:
    """Mean over seeds, and its interval."""
    middle, half = np.transpose([interval(column) for column in zip(*ys, strict=True)])
    axes.plot(x, middle, lw=1.6, label=label, **style)
    axes.fill_between(x, middle - half, middle + half, color=style["color"], alpha=0.15, lw=0)


def plot_claims(runs: dict[str, dict[int, Row]], path: Path) -> None:
    """Learning: loss and MRR against the step. Forgetting: drift against MRR."""
    plain = {name: of for name, of in runs.items() if " from " not in name}
    figure, (loss, mrr, forget) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for (name, of), style in zip(plain.items(), cycle(STYLES), strict=False):
        rows = list(of.values())
        smooth = [np.convolve(r["losses"], np.ones(SMOOTH) / SMOOTH, "valid") for r in rows]
        band(loss, range(SMOOTH, SMOOTH + len(smooth[0])), smooth, style, name)
        steps = [look["step"] for look in rows[0]["looks"]]
        band(mrr, steps, [[look["validation_mrr"] for look in r["looks"]] for r in rows], style, name)
        at = np.mean([[(look["validation_mrr"], drift(look)) for look in r["looks"]] for r in rows], 0)
        forget.plot(*at.T, marker="o", lw=1.4, ms=4, label=name, **style)
    loss.set(xlabel="step", ylabel=f"training loss, mean of {SMOOTH} steps", title="learning")
    mrr.set(xlabel="step", ylabel="validation MRR", title="learning")
    forget.set(xlabel="validation MRR", ylabel="drift of prose, 1 - mean cosine", title="forgetting, by performance")
    mrr.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_updates(runs: dict[str, dict[int, Row]], path: Path) -> None:
    """How much of their rank the trained updates use, and whether reconstruction predicts training."""
    figure, (used, predicts) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    names = [name for name in runs if name != "full" and " from " not in name]
    for x, name in enumerate(names):
        ranks = [entropy_rank(s) for r in runs[name].values() for of in r["updates"].values() for s in of["sigma"]]
        parts = used.violinplot([ranks], [x], showmedians=True)
        for body in parts["bodies"]:
            body.set_facecolor(COLOURS[0])
    used.set_xticks(range(len(names)), names, rotation=30)
    used.set(ylabel="entropy rank of an update", title="ranks that training uses, over layers, kinds and seeds")
    for colour, (name, gains) in zip(cycle(COLOURS), predicted(runs).items(), strict=False):
        predicts.plot(*zip(*gains, strict=True), "o", color=colour, label=name)
    predicts.axhline(0, color="0.6", lw=0.8)
    predicts.set(xlabel="1 - e_rasa / e_lora of the full update", ylabel="test MRR, RaSA minus LoRA",
                 title="does reconstruction predict training? (a point per seed)")  # fmt: skip
    if predicted(runs):
        predicts.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def total_error(full: Row, errors: dict[str, dict[str, float]], which: str) -> float:
    """Squared error over all kinds; that of every kind is given relative to the energy of its update."""
    return sum(e[which] * float(np.square(full["updates"][kind]["norms"]).sum()) for kind, e in errors.items())


def predicted(runs: dict[str, dict[int, Row]]) -> dict[str, list[tuple[float, float]]]:
    """By RaSA's budget and seed: what sharing gains in reconstruction of the full update, and in test MRR."""
    found: dict[str, list[tuple[float, float]]] = {}
    for name, of in runs.items():
        versus, budget = reference(name, runs), name.removeprefix("rasa(").removesuffix(")")
        if versus is None or " from " in name:
            continue
        for seed in sorted(of.keys() & runs[versus].keys() & runs.get("full", {}).keys()):
            errors = runs["full"][seed]["reconstruction"].get(budget)
            if errors is not None:
                rasa, lora = (total_error(runs["full"][seed], errors, which) for which in ("e_rasa", "e_lora"))
                gain = 1 - rasa / lora
                better = of[seed]["test_mrr"] - runs[versus][seed]["test_mrr"]
                found.setdefault(name, []).append((gain, better))
    return found


def plot_starts(runs: dict[str, dict[int, Row]], short_steps: int, path: Path) -> None:
    """Starts from data beside random ones; steps count the full fine-tuning before."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    for panel, method in zip(axes, ("lora(2)", "rasa(2,1)"), strict=True):
        for style, start in zip(STYLES, ("", " from gradient", " from updates"), strict=False):
            if of := runs.get(method + start):
                before = short_steps if "updates" in start else 0
                steps = [before + look["step"] for look in next(iter(of.values()))["looks"]]
                curves = [[look["validation_mrr"] for look in r["looks"]] for r in of.values()]
                band(panel, steps, curves, style, start.strip() or "random start")
        panel.set(xlabel="step", title=method)
        panel.legend(frameon=False)
    axes[0].set_ylabel("validation MRR")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=Path, default=Path("figures/train_adapters.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("figures"))
    args = parser.parse_args(arguments)
    runs = read(args.rows)
    lines = table(runs)
    write_csv(lines, args.out / "train_adapters.csv")
    plot_claims(runs, args.out / "train_adapters.png")
    plot_updates(runs, args.out / "adapter_updates.png")
    if any(" from " in name for name in runs):
        short = next(row for of in runs.values() for row in of.values())["settings"]["short_steps"]
        plot_starts(runs, short, args.out / "adapter_starts.png")
    for line in lines:
        print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in line.items()))


if __name__ == "__main__":
    main()
