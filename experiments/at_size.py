"""How the time of an answer grows with the size of the layers: from leading directions, and from SVDs.

    python -m experiments.at_size                     # 4 layers of 512^2 to 4096^2: two minutes on two cores
    python -m experiments.at_size --sizes 4096 --layers 8 --exact-up-to 0

Updates are made: 96 singular terms of sigma_j = j^-0.6 in bases of their own, and noise of about half their norm, in
float32. An answer is `solve_rasa` with the default options and the closed floor, at r = 8 and k = 1. Each runs in this
process, after a stack of 256^2 to warm up. Written to --out:

    at_size.csv    a row per size and way, added to those that are there: seconds of the answer, of the certified LoRA
                   (`solve_lora`, method "fast") and of one product M X with 16 columns; error and floor over e_lora
    at_size.png    seconds against n; `--figure` draws it from the rows
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure

import rasa_theory as rt
from experiments.support.rows import Row, append_rows, read_rows
from rasa_theory.plotting import style
from rasa_theory.solvers import solve_lora

BUDGET = rt.RankBudget(8, 1)
TERMS, POWER, NOISE = 96, 0.6, 0.5  # NOISE: its norm over that of the terms, about
COLUMNS = (
    "layers", "n", "way", "seconds", "solve_seconds", "floor_seconds", "lora_seconds", "product_seconds", "over_lora",
    "error", "floor", "floor_name", "start", "data_passes", "threads", "torch",
)  # fmt: skip
LOOK = {"exact": (style.VERMILION, "s"), "leading": (style.BLUE, "o")}


def updates(layers: int, n: int, seed: int = 0) -> torch.Tensor:
    """Updates (L, n, n) in float32."""
    generator = torch.Generator().manual_seed(seed)
    terms = min(TERMS, n // 2)
    sigma = torch.arange(1, terms + 1) ** -POWER
    M = torch.empty(layers, n, n)
    for i in range(layers):
        U, V = (torch.linalg.qr(torch.randn(n, terms, generator=generator))[0] for _ in range(2))
        torch.randn(n, n, generator=generator, out=M[i])
        M[i] *= NOISE * float(sigma.norm()) / n
        M[i] += (U * sigma) @ V.T
    return M


def seconds_of_product(stack: rt.LayerStack) -> float:
    """The median time of M X, X (n, 16)."""
    X = torch.randn(stack.shape[1], 16, dtype=stack.dtype)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        stack.right(X)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def measure(layers: int, n: int, way: str) -> Row:
    """A row: the answer and the certified LoRA of one stack, the spectra computed anew for each."""
    M = updates(layers, n)
    began = time.perf_counter()
    lora = solve_lora(rt.LayerStack(M), BUDGET.rank, method="fast")
    lora_seconds = time.perf_counter() - began
    stack = rt.LayerStack(M)
    began = time.perf_counter()
    solution = rt.solve_rasa(stack, BUDGET, rt.SolverOptions(spectra=way))
    solved = time.perf_counter()
    floor = rt.lower_bound(stack, BUDGET, spectra=way)
    ended = time.perf_counter()
    return {
        "layers": layers, "n": n, "way": way, "seconds": ended - began, "solve_seconds": solved - began,
        "floor_seconds": ended - solved, "lora_seconds": lora_seconds, "product_seconds": seconds_of_product(stack),
        "over_lora": (ended - began) / lora_seconds, "error": solution.error / lora.error,
        "floor": floor.value / lora.error, "floor_name": floor.name, "start": solution.start,
        "data_passes": solution.data_passes, "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip


def plot(rows: list[Row]) -> Figure:
    """Seconds against n, for the number of layers that most rows have."""
    layers = statistics.mode(row["layers"] for row in rows)
    figure = style.new_figure(2.6, title=f"What does an answer for {layers} layers cost?")
    ((ax,),) = style.panels(figure)
    ends = []
    for way, (colour, marker) in LOOK.items():
        chosen = sorted((row["n"], row["seconds"]) for row in rows if (row["layers"], row["way"]) == (layers, way))
        if chosen:
            ax.plot(*zip(*chosen, strict=True), color=colour, marker=marker, ms=4)
            ends.append((*chosen[-1], f"answer with\nfloor, {way}", colour))
    last = {row["n"]: row for row in rows if row["layers"] == layers}
    for key, label, dash in (("lora_seconds", "certified LoRA", "--"), ("product_seconds", "one product", ":")):
        ax.plot(sorted(last), [last[n][key] for n in sorted(last)], color=style.INK, linestyle=dash)
        ends.append((max(last), last[max(last)][key], label, style.INK))
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(sorted(last), [str(n) for n in sorted(last)])
    style.grid(ax)
    style.name(ax, "n, for layers of n × n", "seconds")
    style.label_ends(ax, ends, line=0.17)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--exact-up-to", type=int, default=1024, metavar="N", help="from SVDs too, up to this n")
    parser.add_argument("--figure", action="store_true", help="draw the picture from the rows, and nothing else")
    parser.add_argument("--smoke", action="store_true", help="two small sizes")
    parser.add_argument("--out", type=Path, default=Path("figures"))
    options = parser.parse_args()
    path = options.out / "at_size.csv"
    if not options.figure:
        measure(2, 256, "leading")
        for n in [128, 256] if options.smoke else options.sizes:
            for way in ("leading", "exact") if n <= options.exact_up_to else ("leading",):
                row = measure(options.layers, n, way)
                append_rows(path, [row], COLUMNS)
                print({name: row[name] for name in ("layers", "n", "way", "seconds", "over_lora", "error", "floor")})
    style.save(plot(read_rows(path)), options.out / "at_size.png")


if __name__ == "__main__":
    main()
