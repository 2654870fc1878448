"""The report of an inspection as text: the notes of the table, the recommendation, and the long CSV."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rasa_theory.common import aligned, csv_text, wrapped
from rasa_theory.formats import grouped
from rasa_theory.inspection.kinds import kinds

_GROUPS_SHOWN = 8
_CSV = (
    "stack", "kind", "module", "norm_squared", "base_norm_squared", "relative_norm",
    "stable_rank_low", "stable_rank_high", "rank", "energy_low", "energy_high",
)  # fmt: skip
_EXPLANATION = (
    "rel: ||tuned - base|| / ||base||. stable: stable rank ||M||^2 / sigma_1^2, median "
    "over layers. Then, for each rank, the least energy that it holds, in per cent of ||M||^2 (certified; {width}). "
    "col, row: how much of their {directions} leading column and row directions two layers share on average, in per "
    "cent; 0 for unrelated layers, 100 for equal subspaces."
)


def inspection_notes(report: dict[str, Any]) -> list[str]:
    """What the words of the table mean, what is left out, and all modules at several ranks."""
    groups = kinds(report["stacks"])
    changed = [kind for kind in groups if kind["norm_squared"] > 0]
    if not changed:
        return ["No stack has changed.", *_left_out_lines(report)]
    width = max((high - low for kind in changed for low, high in kind["energy"]), default=0.0)
    directions = max(row["shared"]["rank"] for row in report["stacks"])
    truth = f"the truth is at most {100 * width:.2g} points above"
    unchanged = [kind["kind"] for kind in groups if kind["norm_squared"] == 0]
    return [
        *wrapped(_EXPLANATION.format(width=truth, directions=directions)),
        *(wrapped(f"Unchanged: {', '.join(unchanged)}.") if unchanged else []),
        *_left_out_lines(report),
        *_curve_lines(report),
    ]


def _curve_lines(report: dict[str, Any]) -> list[str]:
    """A table of all modules at one rank: what a LoRA misses, between bounds, and the size of its parameters."""
    points = [point for point in report["curve"] if point["rank"] in report["ranks"]]
    if not points:
        return []
    rows = [("rank", "misses", "at most", "parameters", "MB")]
    for point in points:
        bounds = _outwards(point["error"])
        rows.append((str(point["rank"]), *bounds, f"{point['parameters']:,}", megabytes(point["bytes"])))
    note = (
        "All modules at one rank: the share of ||M||^2 that the best LoRA misses lies between the two columns, but for "
        f"a probability of {report['failure']:.0e}. A matrix narrower than the rank is taken whole."
    )
    return ["", *aligned(rows, left=set()), *wrapped(note)]


def _outwards(bounds: Sequence[float]) -> tuple[str, str]:
    """Bounds with five decimals, the lower rounded down and the upper up."""
    low, high = bounds
    return f"{math.floor(low * 1e5) / 1e5:.5f}", f"{math.ceil(high * 1e5) / 1e5:.5f}"


def megabytes(size: int) -> str:
    """Bytes in MB (10^6), with three digits."""
    return f"{size / 1e6:.3g}" if size < 1e9 else f"{size / 1e6:,.0f}"


def _left_out_lines(report: dict[str, Any]) -> list[str]:
    """What is in no stack, in groups, with the share of each in the squared norm of the whole source."""
    norms = {one["name"]: one["norm_squared"] for one in report["left_out"]}
    if not norms:
        return []
    whole = report["norm_squared"] + math.fsum(norm for norm in norms.values() if norm is not None)
    groups = []
    for group in grouped((one["name"], one["reason"]) for one in report["left_out"]):
        known = [norms[name] for name in group.names if norms[name] is not None]
        share = math.fsum(known) / whole if whole > 0 else 0.0
        said = f"{100 * share:.2g} %" if len(known) == len(group.names) else "share unknown"
        groups.append((share, f"{group.label}: {said} ({group.reason})"))
    groups.sort(key=lambda group: -group[0])
    lines = ["Left out, with the share of the squared norm of the whole source:"]
    for _, text in groups[:_GROUPS_SHOWN]:
        lines += wrapped(text, first="  ", later="    ")
    rest = len(groups) - _GROUPS_SHOWN
    return [*lines, f"  and {rest} groups more, in inspect.json"] if rest > 0 else lines


# ---- the recommendation


def recommendation_lines(report: dict[str, Any]) -> list[str]:
    """The ranks that reach the goal, in sentences; nothing without a goal."""
    found = report["recommendation"]
    if found is None:
        return []
    ((what, value),) = found["goal"].items()
    wanted = {
        "error": f"To miss at most {value:.6g} of ||M||^2",
        "energy": f"To hold at least {value:.6g} of ||M||^2",
        "size": f"In at most {megabytes(value)} MB",
    }[what]
    one, own, most = found["one_rank"], found["own_ranks"], report["ranks"][-1]
    lines = []
    if one is None and what == "size":
        lines.append(f"{wanted}: not even rank 1 for every module fits.")
    elif one is None:
        low, high = _outwards(report["curve"][-1]["error"])
        lines.append(
            f"{wanted}: no rank up to {most} is certain to; at {most} the LoRA misses {low} to {high}. Ask for "
            f"more with --ranks, such as --ranks {2 * most}."
        )
    else:
        lines.append(f"{wanted}: rank {one['rank']} for every module.{_minimal(one)} {_costs(one)}")
    if own is None:
        lines.append("Ranks of their own for the modules do not reach it within these ranks either.")
    else:
        ranks = sorted(own["ranks"].values())
        how = "extract --rank auto --ranks own, for PEFT alone"
        lines.append(f"With a rank of its own for every module, {ranks[0]} to {ranks[-1]} ({how}): {_costs(own)}")
    return [line for text in lines for line in wrapped(text)]


def _minimal(one: dict[str, Any]) -> str:
    """Whether a smaller rank might do."""
    least = one.get("not_below", one["rank"])
    if least == one["rank"]:
        return "" if "not_below" not in one else " No smaller one reaches it."
    return f" None below {least} reaches it; the spectra are not known well enough to decide between."


def _costs(choice: dict[str, Any]) -> str:
    low, high = _outwards(choice["error"])
    return (
        f"The best LoRA misses {low} to {high} of ||M||^2, {math.sqrt(choice['error'][1]):.2g} of ||M||, and takes "
        f"{choice['parameters']:,} parameters ({megabytes(choice['bytes'])} MB)."
    )


def inspection_csv(report: dict[str, Any]) -> str:
    """The report as CSV, with a line for each module and rank."""
    lines = []
    for row in report["stacks"]:
        for module in row["modules"]:
            facts = [module[key] for key in ("norm_squared", "base_norm_squared", "relative_norm")]
            stable = module["stable_rank"] or (None, None)
            for rank, (low, high) in zip(report["ranks"], module["energy"] or (), strict=bool(module["energy"])):
                lines.append([row["name"], row["kind"], module["module"], *facts, *stable, rank, low, high])
    return csv_text(_CSV, lines)
