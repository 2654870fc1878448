"""What each part of the solver's search is worth: the search without it, on hard small stacks.

   python -m experiments.search_parts                  # figures/search_parts.csv
   python -m experiments.search_parts --seeds 0 1      # also with a second seed; goes on from the rows in the file
   python -m experiments.search_parts --smoke --out DIR

All variants see the same stacks, and all but those with other kinds of starts see the same starts. The excess of a
variant is its error less the lowest error of all variants that keep the bound on terms, in percent of e_lora. Seconds
are CPU seconds, on one thread.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

import rasa_theory as rt
from experiments.best_found.kinds import SIZES, Problem, Size
from experiments.support.rows import Row, Table
from rasa_theory.linalg import orthogonal
from rasa_theory.problem import LayerStack, RankBudget, RasaFactors, squared_error
from rasa_theory.solvers import allocation_start
from rasa_theory.solvers.accuracy import cancellation
from rasa_theory.solvers.search import (
    EFFORTS,
    Batch,
    BatchedSweeps,
    Effort,
    PoolSearch,
    SearchCore,
    search,
    starts_of_search,
    update_private,
)  # fmt: skip
from rasa_theory.solvers.starts import STARTS

BOUND = 8.0
KEY = ("kind", "layers", "b", "a", "rank", "k", "seed", "variant")
COLUMNS = (*KEY, "error", "largest_term", "seconds", "found")
FILE = "search_parts.csv"

SMALL, MIDDLE, FEW, MANY = SIZES
PROBLEMS = [
    Problem(kind, size, 0)
    for size, kinds in {
        MIDDLE: ("common_columns_and_rows", "half_common_bases", "hidden_dyads_80"),
        FEW: ("common_factor_A", "input_dictionary"),
        MANY: ("common_factor_A", "gradients"),
        SMALL: ("massive_direction", "common_columns", "permuted_neurons", "unequal_ranks", "common_rows"),
    }.items()
    for kind in kinds
]
DYADS, RELATIVE = 3, 0.55  # hidden in a bundled stack, at this size in units of sigma_(r+1)
CORE_BUDGET = RankBudget(8, 1)
_AGREES = 0.8  # found ones reach 0.87 or more, since the layers' own parts turn the terms; others stay below 0.1


# ---------------------------------------------------------------------------------------------- other ways to descend


class StoppedSweeps(BatchedSweeps):
    """Sweeps without multipliers: a run stops for good before a term exceeds its limit."""

    def __init__(self, K: Tensor, batch: Batch, limits: Tensor) -> None:
        super().__init__(K, batch, torch.full_like(limits, math.inf))
        self._squares = limits**2
        self._stopped = torch.zeros_like(self.errors, dtype=torch.bool)

    def select(self, index: Tensor) -> None:
        super().select(index)
        self._stopped = self._stopped[index]

    def join(self, other: BatchedSweeps) -> None:
        super().join(other)
        assert isinstance(other, StoppedSweeps)
        self._stopped = torch.cat([self._stopped, other._stopped])

    def _sweep(self) -> None:
        batch, before, errors = self.batch, self._before, self.errors
        super()._sweep()
        pool = (self._sizes.pool > self._squares[:, None]).flatten(1).any(1)
        private = (self._sizes.private > self._squares).any(1)
        self._stopped = self._stopped | pool | private
        self.batch, self._before = batch.where(self._stopped, self.batch), before.where(self._stopped, self._before)
        self.errors = torch.where(self._stopped, errors, self.errors)


class Penalised(NamedTuple):
    """sum_i ||E_i||^2 and a penalty on terms beyond their limits, with its gradient, at rows x (S, P)."""

    K: Tensor
    limits: Tensor
    private_rank: int
    pool_rank: int

    def parts(self, x: Tensor) -> Batch:
        """The factors in a row, none of them normalised."""
        (L, n, m), q, R = self.K.shape, self.private_rank, self.pool_rank
        shapes = ((L, n, q), (L, q, m), (n, R), (R, m), (L, R))
        parts = x.split([math.prod(shape) for shape in shapes], 1)
        return Batch(*(part.reshape(len(x), *shape) for part, shape in zip(parts, shapes, strict=True)))

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Values (S,) and gradients (S, P)."""
        Bt, At, B, A, D = batch = self.parts(x)
        E = batch.residual(self.K)
        EA = E @ A.mT[:, None]
        gradients = [
            -2 * E @ At.mT,
            -2 * Bt.mT @ E,
            -2 * (EA * D[:, :, None]).sum(1),
            -2 * ((B[:, None] * D[:, :, None]).mT @ E).sum(1),
            -2 * (B[:, None] * EA).sum(2),
        ]
        # w h^2 for every squared size beyond the limit: h = (size / limit^2 - 1)_+, w = (limit / 8)^2
        squares, weights = self.limits**2, (self.limits / BOUND) ** 2
        nB, nA = (B * B).sum(1)[:, None], (A * A).sum(2)[:, None]
        pool = (D * D * nB * nA / squares[:, None] - 1).clamp_min(0)
        GB, GA = Bt.mT @ Bt, At @ At.mT
        private = ((GB * GA).sum((2, 3)) / squares - 1).clamp_min(0)
        value = (E * E).sum((1, 2, 3)) + (weights[:, None] * pool**2).sum((1, 2)) + (weights * private**2).sum(1)
        slope, own = 4 / BOUND**2 * pool, (4 / BOUND**2 * private)[..., None, None]
        penalties = [
            own * (Bt @ GA),
            own * (GB @ At),
            B * (slope * D * D * nA).sum(1)[:, None],
            A * (slope * D * D * nB).sum(1)[..., None],
            slope * D * nB * nA,
        ]
        return value, flat([g + p for g, p in zip(gradients, penalties, strict=True)])


def flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.flatten(1) for part in parts], 1)


def balanced(batch: Batch) -> Tensor:
    """Rows (S, P) of the same updates, with factors of equal size in each term."""
    sizes = torch.linalg.vector_norm(batch.Bt, dim=2).clamp_min(1e-150).sqrt()  # rows of A~_i are of unit norm
    weights = torch.linalg.vector_norm(batch.D, dim=1).clamp_min(1e-150)
    root = weights ** (1 / 3)
    return flat(
        [
            batch.Bt / sizes[:, :, None],
            batch.At * sizes[..., None],
            batch.B * root[:, None],
            batch.A * root[..., None],
            batch.D * (root / weights)[:, None],
        ]
    )


class State(NamedTuple):
    """Where L-BFGS is: rows of S runs."""

    x: Tensor
    value: Tensor
    gradient: Tensor
    direction: Tensor
    length: Tensor
    scale: Tensor


class Lbfgs:
    """L-BFGS on all factors of many runs side by side, in place of `BatchedSweeps`. `errors` include the penalty."""

    MEMORY = 10
    ITERATIONS = 1.3  # in place of one sweep: about equal seconds

    def __init__(self, K: Tensor, batch: Batch, limits: Tensor) -> None:
        self._K = K
        self._objective = Penalised(K, limits, batch.Bt.shape[3], batch.D.shape[2])
        x = balanced(batch)
        value, gradient = self._objective(x)
        scale = 1 / torch.linalg.vector_norm(gradient, dim=1).clamp_min(1e-150)
        self._state = State(x, value, gradient, -scale[:, None] * gradient, torch.ones_like(value), scale)
        self._steps, self._changes = x.new_zeros(self.MEMORY, *x.shape), x.new_zeros(self.MEMORY, *x.shape)
        self._inverse_curvatures = x.new_zeros(self.MEMORY, len(x))  # 0: no step is stored
        self._next = 0

    @property
    def errors(self) -> Tensor:
        return self._state.value

    @property
    def batch(self) -> Batch:
        return update_private(self._K, self._objective.parts(self._state.x).normalised())

    def run(self, sweeps: int) -> None:
        for _ in range(round(self.ITERATIONS * sweeps)):
            self._iterate()

    def select(self, index: Tensor) -> None:
        self._state = State(*(part[index] for part in self._state))
        self._steps, self._changes = self._steps[:, index], self._changes[:, index]
        self._inverse_curvatures = self._inverse_curvatures[:, index]

    def join(self, other: Lbfgs) -> None:
        """Go on with the runs of `other` as well. All forget their steps."""
        self._state = State(*(torch.cat(pair) for pair in zip(self._state, other._state, strict=True)))
        x = self._state.x
        self._steps, self._changes = x.new_zeros(self.MEMORY, *x.shape), x.new_zeros(self.MEMORY, *x.shape)
        self._inverse_curvatures = x.new_zeros(self.MEMORY, len(x))

    def _iterate(self) -> None:
        """One evaluation for each run: a step along its direction, or a shorter one the next time."""
        old = self._state
        x = old.x + old.length[:, None] * old.direction
        value, gradient = self._objective(x)
        slope = (old.gradient * old.direction).sum(1)
        lower = value <= old.value + 1e-4 * old.length * slope
        scale = self._store(lower, x - old.x, gradient - old.gradient, old.scale)
        x, gradient = (torch.where(lower[:, None], *pair) for pair in ((x, old.x), (gradient, old.gradient)))
        bend = 2 * (value - old.value - old.length * slope)
        fit = (-slope * old.length / bend).nan_to_num(0.0).clamp(0.1, 0.5)
        renewed = lower | (old.length < 1e-9)
        direction = torch.where(renewed[:, None], self._direction(gradient, scale), old.direction)
        length = torch.where(renewed, 1.0, fit * old.length)
        self._state = State(x, torch.where(lower, value, old.value), gradient, direction, length, scale)

    def _store(self, lower: Tensor, step: Tensor, change: Tensor, scale: Tensor) -> Tensor:
        """Store the steps that went down along positive curvature. Returns the scales of H_0."""
        curvature, square = (step * change).sum(1), (change * change).sum(1)
        good = lower & (curvature > 1e-10 * square)
        zero = step.new_zeros(())
        self._steps[self._next] = torch.where(good[:, None], step, zero)
        self._changes[self._next] = torch.where(good[:, None], change, zero)
        self._inverse_curvatures[self._next] = torch.where(good, 1 / curvature, zero)
        self._next = (self._next + 1) % self.MEMORY
        return torch.where(good, curvature / square, scale)

    def _direction(self, gradient: Tensor, scale: Tensor) -> Tensor:
        """The two loops of L-BFGS; the negative gradient where they do not lead down."""
        order = [(self._next + n) % self.MEMORY for n in range(self.MEMORY)]  # oldest first
        d, shares = gradient.clone(), {}
        for n in reversed(order):
            shares[n] = self._inverse_curvatures[n] * torch.linalg.vecdot(self._steps[n], d)
            d.addcmul_(shares[n][:, None], self._changes[n], value=-1)
        d *= scale[:, None]
        for n in order:
            share = shares[n] - self._inverse_curvatures[n] * torch.linalg.vecdot(self._changes[n], d)
            d.addcmul_(share[:, None], self._steps[n])
        downward = (d * gradient).sum(1) > 0
        return -torch.where(downward[:, None], d, scale[:, None] * gradient)


shared_directions = SearchCore.at


def layers_alone(unit: LayerStack, factors: RasaFactors) -> SearchCore:
    """A core as wide as `SearchCore.at` has it, in the leading singular directions of each layer alone."""
    like = shared_directions(unit, factors)
    svd = unit.spectra.svd()

    def basis(W: Tensor, width: int) -> Tensor:
        each = math.ceil(width / unit.layers)
        ranked = W[:, :, :each].permute(1, 2, 0).flatten(1)  # the first directions of all layers, then the second ones
        return orthogonal.orthonormal_columns(ranked.double()[:, :width])

    U, V = basis(svd.U, like.U.shape[1]), basis(svd.Vh.mT, like.V.shape[1])
    return SearchCore(U.mT @ unit.right(V.to(unit.dtype)).double(), U, V)


# ------------------------------------------------------------------------------------------------------- the variants


@dataclass(frozen=True)
class Variant:
    """A search that differs from the default one in a part.

    - entries: how many starts of each kind stand in `STARTS`, None for the package's own numbers.
    - sweeps: the class in place of `BatchedSweeps`.
    - extrapolates: False if sweeps begin at the last point.
    - core: in place of `SearchCore.at`.
    """

    effort: Effort = EFFORTS["default"]
    entries: Mapping[str, int] | None = None
    bound: float = BOUND
    sweeps: type[Any] = BatchedSweeps
    extrapolates: bool = True
    core: Callable[[LayerStack, RasaFactors], SearchCore] | None = None

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Context in which `PoolSearch` is this variant."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(search, "BatchedSweeps", self.sweeps))
            if self.entries is not None:
                starts = {name: replace(STARTS[name], entries=count) for name, count in self.entries.items()}
                stack.enter_context(mock.patch.dict(STARTS, starts, clear=True))
            if not self.extrapolates:
                stack.enter_context(mock.patch.object(Batch, "beyond", lambda batch, before, stride: batch))
            if self.core is not None:
                stack.enter_context(mock.patch.object(SearchCore, "at", self.core))
            yield


DEFAULT = EFFORTS["default"]
NO_MOVES = replace(DEFAULT, rounds=0, moves=0)
EARLY = tuple((sweeps, left) for sweeps, (_, left) in zip((2, 4), DEFAULT.heats, strict=True))
LATE = sum(sweeps for sweeps, _ in DEFAULT.heats) - 6  # what early cuts leave out for the runs that go on
ALL_STARTS = sum(DEFAULT.entries(start.entries) for start in starts_of_search())
ONE_EACH = {start.name: 1 for start in starts_of_search()}
ALONE = replace(NO_MOVES, starts=1.0)
KINDS = {
    "allocation": {"allocation": 1, "near-allocation": ALL_STARTS - 1},
    "random": {"random": ALL_STARTS},
    "scattered": {"scattered": ALL_STARTS},
    "greedy": {"greedy": ALL_STARTS},
    "subspace": {"subspace": ALL_STARTS},
}
VARIANTS: dict[str, Variant] = {
    "default": Variant(),
    "no moves": Variant(NO_MOVES),
    "moves from the two lowest runs": Variant(replace(DEFAULT, parents=2)),
    "one start of each kind": Variant(replace(DEFAULT, starts=1.0), ONE_EACH),
    "one start of each kind, no moves": Variant(ALONE, ONE_EACH),
    **{f"{name} starts alone, no moves": Variant(ALONE, entries) for name, entries in KINDS.items()},
    "early cuts": Variant(replace(DEFAULT, heats=EARLY)),
    "early cuts, no moves": Variant(replace(NO_MOVES, heats=(*EARLY, (LATE, EARLY[-1][1])))),
    "no extrapolation": Variant(extrapolates=False),
    "no bound": Variant(bound=math.inf),
    "stop at the bound": Variant(sweeps=StoppedSweeps),
    "stop at the bound, no moves": Variant(NO_MOVES, sweeps=StoppedSweeps),
    "L-BFGS": Variant(sweeps=Lbfgs),
    "L-BFGS, no moves": Variant(NO_MOVES, sweeps=Lbfgs),
}
CORES = {
    "core: shared directions of the residual": Variant(),
    "core: each layer alone": Variant(core=layers_alone),
}


def shorter(effort: Effort) -> Effort:
    """A tenth of the sweeps, from a tenth of the starts, for a run of seconds."""
    return replace(
        effort,
        starts=0.1 * effort.starts,
        heats=tuple((max(sweeps // 10, 1), 4) for sweeps, _ in effort.heats),
        rounds=min(effort.rounds, 1),
        moves=effort.moves // 4,
        move_heats=((6, 2),),
        final=effort.final // 10,
        more=1,
    )


# ------------------------------------------------------------------------------------------------------------ the run


def searched(stack: LayerStack, budget: RankBudget, variant: Variant, seed: int) -> tuple[Row, RasaFactors]:
    """Error, largest term and seconds of one search; and the factors, in units of the stack's scale."""
    unit = stack.unit()
    start = allocation_start(unit, budget)
    with variant.in_place():
        began = time.process_time()
        candidates, _ = PoolSearch(unit, budget, start, variant.effort, seed, variant.bound).run()
        seconds = time.process_time() - began
    factors = candidates[0].factors
    error = squared_error(unit, factors) / rt.solve_lora(unit, budget.rank).error
    row = {"error": error, "largest_term": cancellation(unit, factors), "seconds": round(seconds, 3)}
    return row, factors


def bundled(layers: int) -> tuple[LayerStack, LayerStack]:
    """The bundled updates of the query matrices, and the same with dyads hidden in them."""
    stack = LayerStack(next(stack for stack in rt.load("minilm-code")[0] if stack.name == "query").values[:layers])
    return stack, rt.null_models.with_hidden_dyads(stack, CORE_BUDGET.rank, DYADS, RELATIVE, seed=0)


def dyads_found(factors: RasaFactors, hidden: Tensor) -> int:
    """How many dyads of `hidden` (L, b, a) have a pool term with |b^T b_j| |a^T a_j| > 0.8."""
    U, _, Vh = torch.linalg.svd(hidden[0])  # sizes differ, so singular vectors are the dyads themselves
    terms = factors.to(torch.float64).normalised()
    agreement = (U[:, :DYADS].mT @ terms.shared_B).abs() * (Vh[:DYADS] @ terms.shared_A.mT).abs()
    return int((agreement.amax(1) > _AGREES).sum())


def key(kind: str, size: Size, seed: int, variant: str) -> Row:
    return dict(zip(KEY, (kind, size.layers, size.b, size.a, size.rank, size.k, seed, variant), strict=True))


def run(path: Path, problems: Sequence[Problem], seeds: Sequence[int], layers: int, is_short: bool) -> list[Row]:
    """Add the rows that the file does not have yet. `layers` is the number of bundled ones."""
    table = Table(path, COLUMNS, KEY)

    def add(stack: LayerStack, budget: RankBudget, identity: Row, variant: Variant, hidden: Tensor | None) -> None:
        if identity in table:
            return
        used = replace(variant, effort=shorter(variant.effort)) if is_short else variant
        row, factors = searched(stack, budget, used, identity["seed"])
        if hidden is not None:
            row["found"] = dyads_found(factors, hidden)
        table.add([identity | row])

    plain, with_dyads = bundled(layers)
    whole = Size(with_dyads.layers, *with_dyads.shape, CORE_BUDGET.rank, CORE_BUDGET.shared_rank)
    for seed in seeds:
        for name, variant in CORES.items():
            hidden = (with_dyads.values - plain.values).double()
            identity = key(f"updates query hidden {RELATIVE}", whole, seed, name)
            add(with_dyads, CORE_BUDGET, identity, variant, hidden)
        for problem in problems:
            stack, size = LayerStack(torch.from_numpy(problem.values())), problem.size
            for name, variant in VARIANTS.items():
                add(stack, RankBudget(size.rank, size.k), key(problem.kind, size, seed, name), variant, None)
            print(f"{problem.kind} {size}, seed {seed}: done", flush=True)
    return table.rows


# ---------------------------------------------------------------------------------------------------------- the table


def excesses(rows: Sequence[Row]) -> list[tuple[Row, float]]:
    """The rows of `VARIANTS`, each with its error over the lowest one inside the bound, in % of e_lora."""
    best: dict[tuple[Any, ...], float] = {}
    small = [row for row in rows if row["variant"] in VARIANTS]
    for row in small:
        if row["largest_term"] <= BOUND * (1 + 1e-6):
            stack = tuple(row[name] for name in KEY[:6])
            best[stack] = min(row["error"], best.get(stack, math.inf))
    return [(row, 100 * (row["error"] - best[tuple(row[name] for name in KEY[:6])])) for row in small]


def lines(rows: Sequence[Row]) -> list[str]:
    """The table in Markdown. Variants without moves are compared with the default search without moves."""
    pairs = excesses(rows)
    over = {name: [excess for row, excess in pairs if row["variant"] == name] for name in VARIANTS}
    table = [
        "| variant | mean, % | worst, % | above 0.1 % | less the default | largest term | CPU s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in VARIANTS:
        own = [row for row, _ in pairs if row["variant"] == name]
        like = "no moves" if name.endswith(", no moves") else "default"
        changes = [x - y for x, y in zip(over[name], over[like], strict=True)]
        error = statistics.stdev(changes) / len(changes) ** 0.5 if len(changes) > 1 else 0.0
        numbers = [
            f"{statistics.mean(over[name]):.2f}",
            f"{max(over[name]):.2f}",
            f"{sum(excess > 0.1 for excess in over[name])} of {len(own)}",
            f"{statistics.mean(changes):+.2f} ± {error:.2f}" if name != "default" else "",
            f"{max(row['largest_term'] for row in own):.3g}",
            f"{statistics.mean(row['seconds'] for row in own):.2f}",
        ]
        table.append(f"| {name} | {' | '.join(numbers)} |")
    return table


def core_lines(rows: Sequence[Row]) -> list[str]:
    """What the two cores lead to, in Markdown."""
    table = [
        f"| bases of the core | dyads found, of {DYADS} | error / e_lora | CPU s |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name in CORES:
        own = [row for row in rows if row["variant"] == name]
        counts = ", ".join(str(row["found"]) for row in own)
        errors = ", ".join(f"{row['error']:.5f}" for row in own)
        seconds = statistics.mean(row["seconds"] for row in own)
        table.append(f"| {name.removeprefix('core: ')} | {counts} | {errors} | {seconds:.2f} |")
    return table


def with_tables(page: str, rows: Sequence[Row]) -> str:
    """The page with its first two Markdown tables replaced by those of `rows`."""
    tables = iter(("\n".join(lines(rows)), "\n".join(core_lines(rows))))
    blocks = itertools.groupby(page.splitlines(), lambda line: line.startswith("|"))
    parts = ((is_table, "\n".join(block)) for is_table, block in blocks)
    return "".join((next(tables, text) if is_table else text) + "\n" for is_table, text in parts)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the search (default: 0)")
    parser.add_argument("--smoke", action="store_true", help="one tiny stack and short searches, in seconds")
    parser.add_argument("--out", type=Path, default=Path("figures"))
    parser.add_argument("--page", type=Path, help="a page whose tables are replaced")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    problems = [Problem("half_common_bases", Size(2, 8, 7, 2, 1), 0)] if options.smoke else PROBLEMS
    rows = run(options.out / FILE, problems, options.seeds, 2 if options.smoke else 6, options.smoke)
    print("\n".join([*lines(rows), "", *core_lines(rows)]))
    if options.page is not None:
        options.page.write_text(with_tables(options.page.read_text(encoding="utf-8"), rows), encoding="utf-8")


if __name__ == "__main__":
    main()
