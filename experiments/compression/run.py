"""The rows of the experiment, and its command."""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import rasa_theory as rt
from experiments.compression import __doc__ as description
from experiments.compression.approaches import OF_CHANCE, SLOW, SLOW_TERMS, SOLVERS
from experiments.compression.collections import EVERY, Collection, collections_of, kind_of, sets_of
from experiments.compression.figure import plot, report
from experiments.support.command import refuses_bad_input
from experiments.support.rows import Row, Table
from rasa_theory import methods
from rasa_theory.commands.progress import ProgressBar
from rasa_theory.common import InputError
from rasa_theory.plotting import style

COLUMNS = (
    "set", "adapters", "kind", "layer", "layers", "source", "draw", "share", "method", "settings", "parameters",
    "used", "error", "root", "floor", "seconds",
)  # fmt: skip
KEY = ("set", "kind", "layer", "source", "draw", "share", "method")
SHARES = (0.03, 0.05, 0.0776, 0.125, 0.2, 0.3, 0.4, 0.5, 0.7)


def tasks(stacked: Collection, shares: Sequence[float], draws: int) -> Iterator[tuple[str, int, float | str, str]]:
    """Yield (source, draw, share, method): every method on trained LoRAs, some on random LoRAs, and the sides last."""
    left_out: set[str] = set()
    if stacked.factors.B.shape[0] * stacked.rank > SLOW_TERMS:
        left_out |= SLOW
    if stacked.layer != EVERY:
        left_out.add("vera")
    for share in shares:
        yield from (("trained", 0, share, name) for name in SOLVERS if name not in left_out)
        yield from (
            ("random", draw, share, name) for draw in range(draws) for name in OF_CHANCE if name not in left_out
        )
    for source, count in (("trained", 1), ("random", draws)):
        yield from ((source, draw, "", f"side_{side}") for draw in range(count) for side in ("columns", "rows"))


def measured(stacked: Collection, share: float | str, method: str) -> Row | None:
    """One row without its key."""
    began, stack = time.perf_counter(), stacked.stack
    if method.startswith("side_"):  # one column (row) space of r dimensions for all
        fit: methods.Fit | None = methods.fit_share_lora(
            stacked.turned, stacked.rank, "B" if method == "side_columns" else "A"
        )
    else:
        fit = SOLVERS[method](stacked, int(float(share) * stacked.parameters))
    if fit is None:
        return None
    error = fit.error / stack.norm_squared
    return {
        "layers": stack.layers,
        "settings": " ".join(f"{key}={value}" for key, value in fit.settings.items()),
        "parameters": fit.parameters,
        "used": fit.parameters / stacked.parameters,
        "error": error,
        "root": math.sqrt(error),
        "floor": "" if fit.floor is None else fit.floor / stack.norm_squared,
        "seconds": round(time.perf_counter() - began, 2),
    }


def compared(
    collections: Sequence[Collection],
    shares: Sequence[float],
    draws: int,
    done: Table,
    only: Sequence[str] | None = None,
) -> Iterator[Row]:
    """Yield the rows that are not in `done`, of all methods or of some."""
    position = itertools.count()
    with ProgressBar(sum(len(list(tasks(each, shares, draws))) for each in collections), "rows") as progress:
        for collection in collections:
            sources = {("trained", 0): collection}
            for source, draw, share, method in tasks(collection, shares, draws):
                key = {"set": collection.set, "kind": collection.kind, "layer": collection.layer, "source": source,
                       "draw": draw, "share": share, "method": method}  # fmt: skip
                n = next(position)
                if key in done or not (only is None or method in only):
                    continue
                progress(n, f"{collection.set}, {collection.kind} {collection.layer}, {share}, {method}")
                if (source, draw) not in sources:
                    sources[source, draw] = collection.random(draw)
                row = measured(sources[source, draw], share, method)
                if row is not None:
                    yield key | row | {"adapters": collection.adapters}


def small(stacked: Collection) -> Collection:
    """A corner of a collection, for function only."""
    f = stacked.factors
    return replace(stacked, factors=rt.LoraFactors(f.B[:, :24].clone(), f.A[:, :, :16].clone()))


def chosen_collections(folders: Sequence[Path], kinds: Sequence[str] | None) -> list[Collection]:
    """The collections of all sets. Raises InputError for a kind that no adapter has."""
    sets = sets_of(folders)
    there = {kind_of(module) for adapters in sets.values() for module in adapters[0].pairs}
    if unknown := [kind for kind in kinds or () if kind not in there]:
        raise InputError(f"--kinds {unknown[0]!r} is none of {', '.join(sorted(there))}")
    return [each for name, adapters in sets.items() for each in collections_of(name, adapters, kinds)]


@refuses_bad_input
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    trained = Path(__file__).resolve().parents[1] / "trained"
    own = sorted(path.parent for path in trained.glob("*/adapter_config.json"))
    parser.add_argument("--adapters", nargs="+", type=Path, metavar="DIR", default=own)
    parser.add_argument("--kinds", nargs="+", help="such as query; by default all of them")
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES, help="shares of the LoRAs' own parameters")
    parser.add_argument("--draws", type=int, default=1, help="draws of random LoRAs, each with its own seed")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=(*SOLVERS, "side_columns", "side_rows"),
        help="these alone, to have the quick ones first",
    )
    parser.add_argument("--figure", action="store_true", help="the picture alone, from the data")
    parser.add_argument("--smoke", action="store_true", help="corners of one kind of module, in seconds")
    parser.add_argument("--out", type=Path, default=Path("figures"))
    options = parser.parse_args(arguments)
    kinds, shares, draws = options.kinds, options.shares, options.draws
    if options.smoke:
        shares, draws = (0.125, 0.5, 0.8), 1
    if draws < 1:
        raise InputError(f"--draws must be at least 1, not {draws}")
    if wrong := [share for share in shares if not 0 < share <= 1]:
        raise InputError(f"--shares must be above 0 and at most 1, not {wrong[0]:g}")

    table = Table(options.out / "compression.csv", COLUMNS, KEY)
    if not options.figure:
        collections = chosen_collections(options.adapters, kinds)
        if options.smoke:
            collections = [small(each) for each in collections[:2]]
        for row in compared(collections, shares, draws, table, options.methods):
            table.add([row])
    style.save(plot(table.rows), options.out / "compression.png")
    print("\n".join(report(table.rows)))
