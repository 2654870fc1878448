"""The commands of the experiment, and their rows."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

import rasa_theory as rt
from experiments.benchmark.codes import their_sweeps
from experiments.best_found import __doc__ as description
from experiments.best_found import hidden
from experiments.best_found.compare import CODES, excess, lines, plot, rounding
from experiments.best_found.kinds import WHOLE, Array, Problem, Size, problems
from experiments.best_found.reference import Model, search
from experiments.support.rows import Row, Table
from rasa_theory.plotting import style

KEY = ("kind", "layers", "b", "a", "rank", "k", "seed")
CODE_COLUMNS = tuple(f"{code}{which}" for code in CODES for which in ("", "_unbounded"))
REFERENCE = (
    *KEY, "e_lora", "allocation", "reference", "unbounded", "best_of_24", "share", "start", "cancellation", "seconds",
    *CODE_COLUMNS, "code_seconds",
)  # fmt: skip
STARTS = (*REFERENCE, "errors")
COPIED = ("e_lora", "allocation", "reference", "unbounded", "best_of_24", "share", *CODE_COLUMNS)
OURS = (
    *KEY, "effort", *COPIED, "reference_seconds", "error", "seconds", "cancellation", "stop_reason", "start",
    "sweeps", "data_passes", "starts", "near_best",
)  # fmt: skip
MOST_STARTS = {WHOLE: 20}
"""Sizes at which 50 starts would take too long."""
EFFORTS = {effort: rt.SolverOptions(effort=effort) for effort in ("quick", "default", "thorough")}


def key(problem: Problem) -> Row:
    size = problem.size
    values = (problem.kind, size.layers, size.b, size.a, size.rank, size.k, problem.seed)
    return dict(zip(KEY, values, strict=True))


def problem_of(row: Row) -> Problem:
    return Problem(row["kind"], Size(*(row[name] for name in KEY[1:6])), row["seed"])


# ---- the reference


def reference_row(problem: Problem, starts: int, iterations: int) -> Row:
    """The plain search on one problem, and CP codes of others for k = r."""
    M, size = problem.values(), problem.size
    squares = np.linalg.svd(M, compute_uv=False) ** 2
    rest = np.sort(squares[:, size.private :], axis=None)
    result = search(M, size.rank, size.k, starts, problem.seed, iterations=iterations)
    row = key(problem) | {"e_lora": float(squares[:, size.rank :].sum())}
    near = [error <= 1.001 * result.error + rounding(row) for error in result.errors]
    row |= {
        "allocation": float(rest[: max(len(rest) - size.pool, 0)].sum()),
        "reference": result.error,
        "unbounded": result.unbounded,
        "best_of_24": min(result.errors[:24]),
        "share": sum(near) / starts,
        "start": result.start,
        "cancellation": result.cancellation,
        "seconds": round(result.seconds, 2),
        "errors": " ".join(f"{error:.6g}" for error in result.errors),
    }
    if size.private == 0:
        began = time.process_time()
        row |= code_errors(M, size, problem.seed)
        row["code_seconds"] = round(time.process_time() - began, 2)
    return row


def code_errors(M: Array, size: Size, seed: int, starts: int = 20, sweeps: int = 300) -> Row:
    """The lowest errors of CP codes from random starts, of all results and of those that keep the bound on terms."""
    model, row = Model(M, size.rank, size.k), Row()
    for n in range(starts):
        rng = np.random.default_rng((seed, n))
        begin = [torch.from_numpy(rng.standard_normal((m, size.pool))) for m in M.shape]
        for name, run in their_sweeps(torch.from_numpy(M), begin).items():
            code = name.split()[0]
            if code not in CODES:
                continue
            D, B, A = (factor.numpy() for factor in run(sweeps))
            error = model.error((B, A, D))
            row[f"{code}_unbounded"] = min(error, row.get(f"{code}_unbounded", np.inf))
            if model.is_inside((B, A, D)):
                row[code] = min(error, row.get(code, np.inf))
    return row


def run_reference(path: Path, chosen: list[Problem], starts: int, iterations: int) -> None:
    table = Table(path, STARTS, KEY)
    for problem in chosen:
        if key(problem) in table:
            continue
        row = reference_row(problem, min(starts, MOST_STARTS.get(problem.size, starts)), iterations)
        table.add([row])
        lora = max(row["e_lora"], 1e-12)
        print(
            f"{problem.kind:24} {tuple(row[name] for name in KEY[1:6])!s:22} seed {problem.seed}: reference "
            f"{row['reference'] / lora:.5f} of e_lora, without the bound {row['unbounded'] / lora:.5f}, "
            f"{row['share']:.0%} of the starts, {row['seconds']:.1f} s",
            flush=True,
        )


# ---- the solver


def our_row(problem: Problem, effort: str, reference: Row) -> Row:
    """The solver on one problem, on one thread."""
    stack, size = rt.LayerStack(torch.from_numpy(problem.values())), problem.size
    began = time.process_time()
    solution = rt.solve_rasa(stack, rt.RankBudget(size.rank, size.k), EFFORTS[effort])
    seconds = time.process_time() - began
    return (
        key(problem)
        | {name: reference[name] for name in COPIED}
        | {
            "effort": effort,
            "reference_seconds": reference["seconds"],
            "error": solution.error,
            "seconds": round(seconds, 3),
            "cancellation": solution.cancellation,
            "stop_reason": solution.stop_reason.name,
            "start": solution.start,
            "starts": solution.search.starts if solution.search else None,
            "near_best": solution.search.near_best if solution.search else None,
            "sweeps": solution.sweeps,
            "data_passes": solution.data_passes,
        }
    )


def run_ours(path: Path, references: list[Row], effort: str) -> None:
    torch.set_num_threads(1)
    table = Table(path, OURS, (*KEY, "effort"))
    for reference in references:
        problem = problem_of(reference)
        if key(problem) | {"effort": effort} in table:
            continue
        row = our_row(problem, effort, reference)
        table.add([row])
        print(
            f"{problem.kind:24} {tuple(row[name] for name in KEY[1:6])!s:22} seed {problem.seed}: "
            f"{100 * excess(row):+.3f} %, {row['seconds']:.2f} s, {row['stop_reason']}",
            flush=True,
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("reference", "ours", "table", "hidden"))
    parser.add_argument(
        "--effort", choices=sorted(EFFORTS), default="default", help="of the solver, for `ours`, `hidden`"
    )
    parser.add_argument("--kinds", nargs="+", help="only these kinds, for `reference` and `ours`")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these seeds, for `reference` and `ours`")
    parser.add_argument("--starts", type=int, default=50, help="of the plain search (default: 50)")
    parser.add_argument("--iterations", type=int, default=600, help="of L-BFGS from a start (default: 600)")
    parser.add_argument("--reference", type=Path, help="the file of the reference, in place of the one in --out")
    parser.add_argument("--out", type=Path, default=Path("figures"))
    options = parser.parse_args(arguments)

    def is_chosen(row: Row) -> bool:
        kinds, seeds = options.kinds or [row["kind"]], options.seeds or [row["seed"]]
        return row["kind"] in kinds and row["seed"] in seeds

    references: Path = options.reference or options.out / "best_found_starts.csv"
    ours: Path = options.out / "best_found.csv"
    if options.command == "reference":
        chosen = [problem for problem in problems() if is_chosen(key(problem))]
        run_reference(references, chosen, options.starts, options.iterations)
    elif options.command == "ours":
        run_ours(ours, [row for row in Table(references, STARTS, KEY).rows if is_chosen(row)], options.effort)
    elif options.command == "hidden":
        print("\n".join(hidden.lines(list(hidden.rows(options.out / "best_found_hidden.csv", options.effort)))))
    else:
        rows = Table(ours, OURS, (*KEY, "effort")).rows
        print("\n".join(lines(rows)))
        style.save(plot(rows), options.out / "best_found.png")
