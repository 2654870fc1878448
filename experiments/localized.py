"""Block LoRA (Localized LoRA) beside LoRA at equal parameters, both at their exact optima.

    python -m experiments.localized                  # a minute on one core
    python -m experiments.localized --model mpnet

The paper (arXiv 2506.00236) says that block LoRA consistently has the lower approximation error at matched budgets. A
grid of s x s blocks of rank r / s has the parameters of LoRA of rank r. Sources:

    updates         the updates of a model, by default the bundled ones
    turned apart    the same singular values in random bases, so that no block differs from another but by chance
    local           made, at the size of the model: every block of a 4 x 4 grid has random bases of its own, and
                    sigma_j = j^-1

Written to --out: localized.csv, one row per model, source, seed, stack, r, grid and kind of ranks; an interrupted run
goes on. With `equal` ranks the
reference is LoRA, with `allocated` ones it is LoRA with its ranks allocated. Errors are in units of ||M||^2.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch

import rasa_theory as rt
from experiments.models.update_sets import MODEL_NAMES, add_model_flags, chosen_updates, corner
from experiments.support.command import refuses_bad_input
from experiments.support.rows import Row, Table, of_models
from rasa_theory import methods
from rasa_theory.commands.progress import ProgressBar

KEY = ("model", "source", "seed", "stack", "r", "side", "ranks")
COLUMNS = (*KEY, "parameters", "error", "reference", "ratio")
SIDES = (2, 4)  # of the grids
SEEDS = 3  # of the sources that are made
LOCAL_SIDE = 4


def local(layers: int, n: int, seed: int) -> rt.LayerStack:
    """Layers (n, n) of 4 x 4 blocks with nothing in common, each with singular values j^-1."""
    generator, width = torch.Generator().manual_seed(seed), n // LOCAL_SIDE
    shape = layers, LOCAL_SIDE, LOCAL_SIDE, width, width
    U, V = (torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64))[0] for _ in range(2))
    blocks = U / torch.arange(1, width + 1) @ V
    return rt.LayerStack(blocks.transpose(2, 3).reshape(layers, n, n), "made")


def stacks(updates: list[rt.LayerStack], seeds: int) -> Iterator[tuple[str, int, rt.LayerStack]]:
    """Source, seed and stack of every case."""
    yield from (("updates", 0, stack) for stack in updates)
    for seed in range(seeds):
        yield from (("turned apart", seed, rt.null_models.turned_apart(stack, seed)) for stack in updates)
    layers, (n, _) = updates[0].layers, updates[0].shape
    yield from (("local", seed, local(layers, n, seed)) for seed in range(seeds))


def compared(stack: rt.LayerStack, rank: int, side: int) -> Iterator[Row]:
    """Block LoRA of side x side blocks at the parameters of LoRA of this rank, with equal and with allocated ranks."""
    terms = stack.layers * rank
    pairs = {
        "equal": (methods.fit_block_lora(stack, rank // side, side, side), methods.fit_lora(stack, rank)),
        "allocated": (
            methods.fit_allocated_blocks(stack, terms * side, side, side),
            methods.fit_allocated(stack, terms),
        ),
    }
    for ranks, (blocks, reference) in pairs.items():
        yield {
            "stack": stack.name, "r": rank, "side": side, "ranks": ranks, "parameters": blocks.parameters,
            "error": blocks.error / stack.norm_squared, "reference": reference.error / stack.norm_squared,
            "ratio": blocks.error / reference.error,
        }  # fmt: skip


def report(rows: list[Row]) -> Iterator[str]:
    """Lines of a table: the range of block LoRA's error over the reference's, and its mean."""
    yield f"{'':14}{'grid':>8}{'r':>4}{'ranks':>11}{'mean':>9}{'lowest':>9}{'highest':>9}   of error / reference"
    keys = list(dict.fromkeys((row["source"], row["side"], row["r"], row["ranks"]) for row in rows))
    for source, side, r, ranks in sorted(keys, key=lambda key: (key[0] != "updates", *key)):
        wanted = (source, side, r, ranks)
        ratios = [row["ratio"] for row in rows if (row["source"], row["side"], row["r"], row["ranks"]) == wanted]
        numbers = "".join(f"{x:9.4f}" for x in (statistics.fmean(ratios), min(ratios), max(ratios)))
        yield f"{source:14}{side:>4} x {side}{r:>4}{ranks:>11}{numbers}"


@refuses_bad_input
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    parser.add_argument("--ranks", nargs="+", type=int, default=[4, 8, 16], help="ranks of LoRA that 4 divides")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"of the sources that are made ({SEEDS})")
    parser.add_argument("--smoke", action="store_true", help="a corner of one stack at rank 4, in seconds")
    parser.add_argument("--out", type=Path, default=Path("figures"))
    options = parser.parse_args(arguments)
    ranks, seeds = ([4], 1) if options.smoke else (options.ranks, options.seeds)
    if wrong := [rank for rank in ranks if rank < 1 or any(rank % side for side in SIDES)]:
        parser.error(f"--ranks: {wrong[0]} is no multiple of {max(SIDES)}, so blocks of equal rank cannot match it")
    chosen = chosen_updates(options)
    if options.smoke:
        chosen = corner(chosen, 2, 32)
    table = Table(options.out / "localized.csv", COLUMNS, KEY)
    with ProgressBar((1 + seeds) * len(chosen) + seeds, "stacks") as progress:
        for done, (source, seed, stack) in enumerate(stacks(list(chosen.values()), seeds)):
            progress(done, f"{source}, seed {seed}, {stack.name}")
            case = {"model": MODEL_NAMES[options.model], "source": source, "seed": seed, "stack": stack.name}
            for r, side in itertools.product(ranks, SIDES):
                if case | {"r": r, "side": side, "ranks": "allocated"} not in table:
                    table.add([case | row for row in compared(stack, r, side)])
    print(*report(of_models(table.rows, MODEL_NAMES[options.model])), sep="\n")


if __name__ == "__main__":
    main()
