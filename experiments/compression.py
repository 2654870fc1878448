"""How far trained LoRAs can be compressed together, and what is left of their updates.

    python -m experiments.compression                            experiments/trained/*
    python -m experiments.compression --adapters DIR DIR ..      folders of PEFT LoRA adapters of one base
    python -m experiments.compression --figure                   the picture alone, from the data that are there

Folders whose names differ in a number at the end alone (`lora-2-seed-0`, `lora-2-seed-1`) are a set, seeds of one task;
all sets of one rank are one more. Of each set there is a stack over adapters and layers for every kind of module, and
one over the adapters alone for every module. Each method of `rasa_theory.methods` is taken at its best within a share
of the numbers that the LoRAs themselves have, L r (a + b): at 100 % they are kept as they are, without error. Beside
them what users pick today, shared bases for the factors A_i and B_i as they were trained (SHARE), by `fit_share_basis`
and by the packages lorashare and vlora-dev where they are installed. All are judged by the product of the factors:

    error = sum_i ||M_i - X_i||^2 / sum_i ||M_i||^2,  M_i = scaling B_i A_i,  X_i what the method makes of it.

What is there by chance: the same for `random` LoRAs, of the same singular values, whose singular vectors are drawn anew
for every layer of every adapter, so that no two have anything in common. `floor`, of joint bases: no common U and V of
R columns leave less than the tails of the layers beside and below each other, whatever the cores.

Written to --out:

    compression.csv   one row per set, kind, layer, source, draw, share and method, as each is done; a run that was
                      interrupted goes on from there
    compression.png   error against the share of the numbers, all kinds together
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib.util
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import rasa_theory as rt
from experiments.support.rows import Row, read_rows
from rasa_theory import methods
from rasa_theory.formats import LoraFolder, lora_key
from rasa_theory.methods import largest, residual
from rasa_theory.plotting import style
from rasa_theory.problem import Factored, balanced

COLUMNS = (
    "set", "adapters", "kind", "layer", "layers", "source", "draw", "share", "method", "settings", "parameters",
    "used", "error", "root", "floor", "seconds",
)  # fmt: skip
KEY = ("set", "kind", "layer", "source", "draw", "share", "method")
SHARES = (0.03, 0.05, 0.0776, 0.125, 0.2, 0.3, 0.4, 0.5, 0.7)
CLAIMED = (0.03, 0.0776, 0.125, 0.5)
"""Sizes that are claimed to be enough, as shares of the numbers of LoRA."""
EVERY = "all"  # layers

LOOKS = {
    "lora": ("LoRA, lower rank", style.INK, "o-"),
    "allocated": ("largest terms alone", style.GREY, "s-"),
    "rasa": ("RaSA", style.VERMILION, "D-"),
    "joint_diagonal": ("joint, diagonal (CP)", style.PURPLE, "v-"),
    "joint_full": ("joint, full", style.PURPLE, "^--"),
    "share_columns": ("SHARE, lorashare", style.BLUE, "h-"),
    "share_whole": ("SHARE, vlora", style.SKY, "p-"),
    "share_basis": ("SHARE, best factors", style.BLUE, "h:"),
    "tied_lora": ("Tied-LoRA", style.BLUE, "P--"),
    "vb_lora": ("VB-LoRA", style.GREEN, "X-"),
    "one_sided": ("one-sided pool", style.ORANGE, "<-"),
    "share_lora": ("ShareLoRA", style.ORANGE, ">--"),
    "vera": ("VeRA", style.GREY, "*:"),
}
"""What each method is called in the figure, its colour, marker and line."""
CHANCE = ("CP of random LoRAs", style.INK, "v:")


# ------------------------------------------------------------------------------------------------ the stacks


@dataclass(frozen=True)
class Collection:
    """LoRAs of one kind of module: over adapters and layers, or over the adapters of one layer."""

    set: str
    adapters: int
    kind: str
    layer: str
    factors: rt.LoraFactors  # B (L, b, r) times the scaling, A (L, r, a), as they were trained

    @property
    def parameters(self) -> int:
        """L r (a + b)."""
        return self.factors.B.numel() + self.factors.A.numel()

    @functools.cached_property
    def stack(self) -> rt.LayerStack:
        return rt.LayerStack(Factored(self.factors.B, self.factors.A), f"{self.set} {self.kind} {self.layer}")

    @functools.cached_property
    def sides(self) -> tuple[Tensor, Tensor]:
        """Orthonormal bases of all columns of the updates, (b, m), and of all rows, (a, m): at most L r of each."""
        columns = self.factors.B.transpose(0, 1).flatten(1), self.factors.A.mT.transpose(0, 1).flatten(1)
        U, V = (torch.linalg.qr(X).Q if X.shape[1] < X.shape[0] else torch.eye(len(X), dtype=X.dtype) for X in columns)
        return U, V

    @functools.cached_property
    def turned(self) -> rt.LayerStack:
        """U^T M_i V with these: the same layers in other bases, and smaller where L r < b or a."""
        (U, V), f = self.sides, self.factors
        return rt.LayerStack(Factored(U.mT @ f.B, f.A @ V), self.stack.name)

    def random(self, draw: int) -> Collection:
        """The same singular values, each in singular vectors of its own: nothing in common but by chance."""
        L, b, r = self.factors.B.shape
        sigma = self.stack.spectra.singular_values()[:, :r]
        generator = torch.Generator().manual_seed(1000 * draw + 17)
        sides = (torch.randn(L, n, r, generator=generator, dtype=torch.float64) for n in (b, self.factors.A.shape[2]))
        U, V = (torch.linalg.qr(side).Q for side in sides)
        return replace(self, factors=rt.LoraFactors(*balanced(U * sigma[:, None], V.mT)))


def sets_of(folders: Sequence[Path]) -> dict[str, list[LoraFolder]]:
    """Folders that differ in a number at the end are one set; sets of one rank, where there are several, one more."""
    found: dict[str, list[LoraFolder]] = {}
    for folder in folders:
        found.setdefault(re.sub(r"(-seed)?-\d+$", "", folder.name), []).append(LoraFolder(folder))
    found = dict(sorted(found.items()))
    ranks = {name: frozenset(pair.rank for x in adapters for pair in x.pairs.values())
             for name, adapters in found.items()}  # fmt: skip
    for rank in sorted(set(ranks.values()), key=sorted):
        same = [name for name in ranks if ranks[name] == rank]
        if len(same) > 1:
            found[" + ".join(same)] = [adapter for name in same for adapter in found[name]]
    return found


def collections_of(name: str, adapters: Sequence[LoraFolder], kinds: Sequence[str] | None) -> Iterator[Collection]:
    """Of each kind the collection over adapters and layers, then those of every layer over the adapters."""
    groups: dict[str, list[str]] = {}
    for module in adapters[0].pairs:
        groups.setdefault(kind_of(module), []).append(module)
    for kind, modules in groups.items():
        if kinds and kind not in kinds:
            continue
        each = [_factors(adapters, module) for module in modules]
        whole = rt.LoraFactors(*(torch.cat([getattr(f, side) for f in each]) for side in "BA"))
        yield Collection(name, len(adapters), kind, EVERY, whole)
        if len(adapters) > 1 and len(modules) > 1:
            for layer, factors in enumerate(each):
                yield Collection(name, len(adapters), kind, str(layer), factors)


def kind_of(module: str) -> str:
    """`encoder.layer.3.attention.self.query` -> `query`: what follows the number of the layer, in short."""
    last = re.split(r"\.\d+\.", module)[-1]
    return last.removesuffix(".dense").removeprefix("attention.self.")


def _factors(adapters: Sequence[LoraFolder], module: str) -> rt.LoraFactors:
    pairs = [adapter.factors(module) for adapter in adapters]
    return rt.LoraFactors(torch.stack([B.double() for B, _ in pairs]), torch.stack([A.double() for _, A in pairs]))


# ----------------------------------------------------------------------------------------------- the methods


def share_columns(found: Collection, budget: int) -> methods.Fit | None:
    """SHARE on the factors as they were trained, as lorashare computes it: the most components that fit."""
    p = components(found, budget, "columns")
    return methods.fit_share_basis(found.stack, _rank(found), p, "columns", found.factors) if p else None


def share_whole(found: Collection, budget: int) -> methods.Fit | None:
    """The same as vlora-dev computes it."""
    p = components(found, budget, "whole")
    return methods.fit_share_basis(found.stack, _rank(found), p, "whole", found.factors) if p else None


def components(found: Collection, budget: int, basis: str) -> int:
    """The most components that fit into `budget` numbers; none that hold all factors."""
    (L, (b, a)), r = (found.stack.layers, found.stack.shape), _rank(found)
    if basis == "columns":
        return largest(lambda p: p * (a + b + 2 * L * r), budget, min(a, b, L * r))
    return largest(lambda p: (p + 1) * r * (a + b) + 2 * L * p, budget, L - 1)


def lorashare(found: Collection, budget: int) -> methods.Fit | None:
    """The package of that name itself."""
    from lorashare import compression

    p = components(found, budget, "columns")
    if not p:
        return None
    keys = {side: lora_key("x", side) for side in "AB"}
    adapters = {str(i): {keys[side]: getattr(found.factors, side)[i].float() for side in "AB"}
                for i in range(found.stack.layers)}  # fmt: skip
    combined = compression.combine_adapter_weights(adapters)
    basis, _, _ = compression.compute_shared_components(combined, num_components=p, device="cpu")
    loadings = {i: compression.compute_adapter_loadings(basis, adapter) for i, adapter in adapters.items()}
    made = {i: compression.reconstruct_adapter_weights(basis, loading) for i, loading in loadings.items()}
    stored = [*basis.values(), *(x for loading in loadings.values() for x in loading.values())]
    return _of_package(found, "lorashare", p, stored, lambda i: made[str(i)][keys["B"]] @ made[str(i)][keys["A"]])


def vlora(found: Collection, budget: int) -> methods.Fit | None:
    """The package vlora-dev itself."""
    import vlora as package

    p, r = components(found, budget, "whole"), _rank(found)
    if not p:
        return None
    adapters = [package.LoRAWeights(["x"], {"x": A.float()}, {"x": B.float()}, r)
                for B, A in zip(found.factors.B, found.factors.A, strict=True)]  # fmt: skip
    space = package.SharedSubspace.from_adapters(adapters, num_components=p)
    made = [space.reconstruct(f"task_{i}") for i in range(len(adapters))]
    basis = (space.means_a, space.means_b, space.components_a, space.components_b)
    loadings = [side["x"] for task in space.tasks.values() for side in (task.loadings_a, task.loadings_b)]
    return _of_package(
        found, "vlora", p, [*(x["x"] for x in basis), *loadings], lambda i: made[i].lora_b["x"] @ made[i].lora_a["x"]
    )


def _of_package(
    found: Collection, name: str, p: int, stored: list[Tensor], update: Callable[[int], Tensor]
) -> methods.Fit:
    return methods.Fit(
        name, {"components": p}, residual(found.stack, lambda i: update(i).double()), sum(x.numel() for x in stored),
        methods.Evidence.OF_FACTORS, _rank(found), update,
    )  # fmt: skip


def _rank(found: Collection) -> int:
    return found.factors.B.shape[2]


def ours(name: str, found: Collection, budget: int) -> methods.Fit | None:
    """The configuration of least error among the largest that fit.

    Those that do not care in which orthonormal bases the layers are given, `NUMBERS`, solve them turned, which takes a
    small part of the time; their numbers are counted for the layers as they are.
    """
    method = methods.METHODS[name]
    settings = method.configurations(found.stack, budget)
    if name not in NUMBERS:
        fits = [method.solve(found.stack, **each) for each in settings]
    else:
        fits = [turned_back(found, method.solve(found.turned, **each)) for each in settings]
    return min(fits, key=lambda fit: fit.error, default=None)


def turned_back(found: Collection, fit: methods.Fit) -> methods.Fit:
    """A fit of `found.turned` as one of `found.stack`."""
    U, V = found.sides
    b, a = found.stack.shape
    parameters = NUMBERS[fit.method](found.stack.layers, b, a, **fit.settings)
    return replace(fit, parameters=parameters, update=lambda i: U @ fit.update(i) @ V.mT)


NUMBERS: dict[str, Callable[..., int]] = {
    "lora": lambda L, b, a, rank: L * rank * (a + b),
    "allocated": lambda L, b, a, terms: terms * (a + b),
    "rasa": lambda L, b, a, rank, shared_rank: L * rank * (a + b) + L * L * shared_rank,
    "joint_full": lambda L, b, a, rank, core: rank * (a + b) + L * rank**2,
    "joint_diagonal": lambda L, b, a, rank, core: rank * (a + b + L),
    "share_lora": lambda L, b, a, rank, shared: rank * {"A": a + L * b, "B": b + L * a, "both": a + b}[shared],
    "one_sided": lambda L, b, a, private_rank, shared_rank, side: (
        L * private_rank * (a + b) + shared_rank * (b + L * a if side == "columns" else a + L * b)
    ),
}
"""What the methods that turn with the layers store, by their settings."""


SOLVERS: dict[str, Callable[[Collection, int], methods.Fit | None]] = {
    **{name: functools.partial(ours, name) for name in methods.METHODS},
    "share_columns": share_columns,
    "share_whole": share_whole,
    **{name: solve for name, solve in (("lorashare", lorashare), ("vlora", vlora)) if importlib.util.find_spec(name)},
}
"""Name -> the best Fit within a number of parameters, or None."""
OF_CHANCE = ("joint_diagonal", "joint_full", "share_columns", "share_whole", "share_lora", "one_sided")
"""The methods that are asked what they make of random LoRAs: those whose error depends on what is shared."""
SLOW, SLOW_TERMS = {"tied_lora", "vb_lora", "vera"}, 64
"""Those that cannot be solved turned would take hours on more than so many terms, L r; VeRA is slow on fewer, too."""


def joint_floor(stack: rt.LayerStack, rank: int) -> float:
    """No U (b, R) and V (R, a) common to all leave less, whatever the cores: the larger of two Eckart-Young tails."""
    below, beside = (methods.fit_share_lora(stack, rank, shared).error for shared in "AB")
    return max(below, beside)


# -------------------------------------------------------------------------------------------------- the rows


def tasks(found: Collection, shares: Sequence[float], draws: int) -> Iterator[tuple[str, int, float | str, str]]:
    """(source, draw, share, method): every method on what was trained, some on random LoRAs; last, the sides."""
    left_out: set[str] = set()
    if found.factors.B.shape[0] * _rank(found) > SLOW_TERMS:
        left_out |= SLOW
    if found.layer != EVERY:
        left_out.add("vera")
    for share in shares:
        yield from (("trained", 0, share, name) for name in SOLVERS if name not in left_out)
        yield from (("random", draw, share, name) for draw in range(draws) for name in OF_CHANCE)
    for source, count in (("trained", 1), ("random", draws)):
        yield from ((source, draw, "", f"side_{side}") for draw in range(count) for side in ("columns", "rows"))


def measured(found: Collection, share: float | str, method: str) -> Row | None:
    """One row, but for its key."""
    began, stack = time.perf_counter(), found.stack
    if method.startswith("side_"):  # one column (row) space of r dimensions for all
        fit: methods.Fit | None = methods.fit_share_lora(
            found.turned, _rank(found), "B" if method == "side_columns" else "A"
        )
    else:
        fit = SOLVERS[method](found, int(float(share) * found.parameters))
    if fit is None:
        return None
    error = fit.error / stack.norm_squared
    floor = fit.floor
    if method.startswith("joint"):
        floor = joint_floor(found.turned, min(int(fit.settings["rank"]), *found.turned.shape))
    return {
        "layers": stack.layers,
        "settings": " ".join(f"{key}={value}" for key, value in fit.settings.items()),
        "parameters": fit.parameters,
        "used": fit.parameters / found.parameters,
        "error": error,
        "root": math.sqrt(error),
        "floor": "" if floor is None else floor / stack.norm_squared,
        "seconds": round(time.perf_counter() - began, 2),
    }


def compared(
    found: Sequence[Collection],
    shares: Sequence[float],
    draws: int,
    done: set[tuple[str, ...]],
    only: Sequence[str] | None = None,
) -> Iterator[Row]:
    """The rows that are not done, of all methods or of some."""
    bar = tqdm(total=sum(len(list(tasks(each, shares, draws))) for each in found))
    for collection in found:
        sources = {("trained", 0): collection}
        for source, draw, share, method in tasks(collection, shares, draws):
            key = {"set": collection.set, "kind": collection.kind, "layer": collection.layer, "source": source,
                   "draw": draw, "share": share, "method": method}  # fmt: skip
            bar.update()
            if identity(key) in done or not (only is None or method in only):
                continue
            what = f"{collection.set}, {collection.kind} {collection.layer}, {share}, {method}"
            bar.set_description(what, refresh=False)
            if (source, draw) not in sources:
                sources[source, draw] = collection.random(draw)
            row = measured(sources[source, draw], share, method)
            if row is not None:
                yield key | row | {"adapters": collection.adapters}


def identity(row: Row) -> tuple[str, ...]:
    """The key of a row, whether it was read or is about to be written."""
    return tuple("" if row[name] is None else str(row[name]) for name in KEY)


# ------------------------------------------------------------------------------------------- what they come to


def pooled(
    rows: Sequence[Row], name: str, over_layers: bool, source: str = "trained"
) -> dict[tuple[str, float | None], float]:
    """(method, share) -> error / ||M||^2, the mean over the kinds (and layers) of a set, and over draws.

    Only where every stack has room for the method.
    """
    own = [row for row in rows
           if row["set"] == name and row["source"] == source and (row["layer"] == EVERY) == over_layers]  # fmt: skip
    stacks = {(row["kind"], row["layer"]) for row in own}
    groups: dict[tuple[str, float | None], list[Row]] = {}
    for row in own:
        groups.setdefault((row["method"], row["share"]), []).append(row)
    return {
        key: statistics.fmean(row["error"] for row in group)
        for key, group in groups.items()
        if {(row["kind"], row["layer"]) for row in group} == stacks
    }


def needed(errors: dict[tuple[str, float | None], float], method: str, most: float) -> float | None:
    """The least share tried at which a method leaves at most `most`."""
    return min((share for (name, share), error in errors.items()
                if name == method and share is not None and error <= most), default=None)  # fmt: skip


def shown(rows: Sequence[Row]) -> list[str]:
    """Of the sets that are part of a larger one, the first of each, and all others."""
    names = list(dict.fromkeys(row["set"] for row in rows))
    parts = [name.split(" + ") for name in names if " + " in name]
    return [name for name in names if not any(name in part[1:] for part in parts)]


def plot(rows: list[Row]) -> Figure:
    """A line of two panels for each set of `shown`: over adapters and layers, and over adapters alone."""
    names = shown(rows)
    figure = style.new_figure(1.5 + 2.6 * len(names))
    axes = style.panels(figure, len(names), 2, sharey=True, sharex=True)
    for name, line in zip(names, axes, strict=True):
        count = max(row["adapters"] for row in rows if row["set"] == name)
        for over_layers, ax in zip((True, False), line, strict=True):
            if not pooled(rows, name, over_layers):
                ax.set_axis_off()
                continue
            draw(ax, rows, name, over_layers)
            what = "adapters x layers" if over_layers else "adapters, layer by layer"
            style.name(ax, title=f"{name}\n{count} {what}")
    for ax in axes[-1]:
        style.name(ax, "numbers kept, %")
    for ax in axes[:, 0]:
        style.name(ax, y="error / $\\|M\\|^2$")
    handles = {line.get_label(): line for ax in axes.flat for line in ax.get_lines()}
    labels = [label for label, _, _ in (*LOOKS.values(), CHANCE) if label in handles]
    style.legend(figure, [handles[label] for label in labels], labels, loc="outside lower center", ncols=3)
    return figure


def draw(ax: Axes, rows: Sequence[Row], name: str, over_layers: bool) -> None:
    errors = pooled(rows, name, over_layers)
    chance = pooled(rows, name, over_layers, "random")
    lines = [(label, color, look, method, errors) for method, (label, color, look) in LOOKS.items()]
    for label, color, look, method, of in [*lines, (*CHANCE, "joint_diagonal", chance)]:
        points = sorted((share, error) for (m, share), error in of.items() if m == method and share is not None)
        if points:
            ax.plot([100 * share for share, _ in points], [error for _, error in points], look, color=color, ms=4,
                    lw=1.2, label=label)  # fmt: skip
    for share in CLAIMED:
        ax.axvline(100 * share, color=style.PALE, linewidth=0.8, zorder=0)
    ax.set_xscale("log")
    ax.minorticks_off()
    ax.set_xticks([100 * share for share in CLAIMED], [f"{100 * share:g}" for share in CLAIMED])
    ax.set_ylim(0, 1.05)


def report(rows: list[Row]) -> Iterator[str]:
    """The tables that the README and the notebook quote."""
    for name in dict.fromkeys(row["set"] for row in rows):
        for over_layers in (True, False):
            errors, chance = (pooled(rows, name, over_layers, source) for source in ("trained", "random"))
            shares = sorted({share for _, share in errors if share is not None})
            if not shares:
                continue
            where = "adapters x layers" if over_layers else "adapters, layer by layer"
            yield f"\n{name}, over {where}: error / ||M||^2, all kinds"
            yield f"{'':24}" + "".join(f"{100 * share:8.4g}%" for share in shares) + "    50 % left at, 10 % left at"
            for method in dict.fromkeys(method for method, share in errors if share is not None):
                line = "".join(f"{errors.get((method, share), math.nan):9.4f}" for share in shares)
                at = ", ".join("-" if x is None else f"{100 * x:g} %" for x in
                               (needed(errors, method, most) for most in (0.5, 0.1)))  # fmt: skip
                yield f"{method:24}{line}    {at}"
            for method in OF_CHANCE:
                line = "".join(f"{chance.get((method, share), math.nan):9.4f}" for share in shares)
                yield f"{method + ', random':24}{line}"
            for side in ("side_columns", "side_rows"):
                found, null = errors.get((side, None), math.nan), chance.get((side, None), math.nan)
                yield f"kept by one {side[5:-1]} space of r dimensions: {1 - found:.4f}, of random LoRAs {1 - null:.4f}"


# ------------------------------------------------------------------------------------------------ the command


def small(found: Collection) -> Collection:
    """A corner, for function only."""
    f = found.factors
    return replace(found, factors=rt.LoraFactors(f.B[:, :24].clone(), f.A[:, :, :16].clone()))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).resolve().parent / "trained"
    own = sorted(path.parent for path in here.glob("*/adapter_config.json"))
    parser.add_argument("--adapters", nargs="+", type=Path, metavar="DIR", default=own)
    parser.add_argument("--kinds", nargs="+", help="such as query; all of them unless named")
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES, help="of the LoRAs' own numbers")
    parser.add_argument("--draws", type=int, default=1, help="of random LoRAs, each from a seed of its own")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=(*SOLVERS, "side_columns", "side_rows"),
        help="these alone, to have the quick ones first",
    )
    parser.add_argument("--figure", action="store_true", help="draw the data that are there")
    parser.add_argument("--smoke", action="store_true", help="corners of one kind of module, in seconds")
    parser.add_argument("--out", type=Path, default=Path("figures"))
    options = parser.parse_args(arguments)
    kinds, shares, draws = options.kinds, options.shares, options.draws
    if options.smoke:
        kinds, shares, draws = ["query"], (0.125, 0.5, 0.8), 1

    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "compression.csv"
    rows = read_rows(path)
    if not options.figure:
        sets = sets_of(options.adapters)
        found = [each for name in sets for each in collections_of(name, sets[name], kinds)]
        if options.smoke:
            found = [small(each) for each in found[:2]]
        done = {identity(row) for row in rows}
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if not rows:
                writer.writeheader()
            for row in compared(found, shares, draws, done, options.methods):
                writer.writerow(row)
                file.flush()
        rows = read_rows(path)
    style.save(plot(rows), options.out / "compression.png")
    print("\n".join(report(rows)))


if __name__ == "__main__":
    main()
