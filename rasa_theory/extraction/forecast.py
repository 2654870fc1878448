"""The dry run of an extraction: sizes, reads, memory and time, as text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from rasa_theory.extraction.conversion import extract_stack
from rasa_theory.extraction.extract_settings import DENSE, STORED, ExtractSettings
from rasa_theory.extraction.job import Job, free_bytes
from rasa_theory.formats import ModuleNames, grouped
from rasa_theory.linalg import worth_it
from rasa_theory.problem import RankBudget
from rasa_theory.solvers import EFFORT_TIMES, exact_solver_seconds, sample_seconds, solver_seconds, svd_cost
from rasa_theory.sources import StackSource, left_out_lines, memory_line, size_line

_SAMPLE = 512  # side of the layer whose exact SVD is timed
_LEADING_SAMPLE = 1280  # side of the layer whose leading part is timed: smaller ones have it from the exact SVD


def forecast(job: Job, out: Path, world_size: int = 1) -> str:
    """The stacks that `world_size` processes would extract into `out`, with sizes, memory and time, as text."""
    settings, catalogue = job.settings, job.catalogue
    lines = [f"Source {catalogue.source}. Would extract, format {settings.format}:"]
    lines += [size_line(s, job.dtype, ", stored transposed" if s.transposed else "") for s in catalogue.stacks]
    lines += left_out_lines(catalogue)
    twice = ", twice that while it is made" if job.copies_on_disk > 1 else ""
    lines += _notes(job)
    ranks = "" if settings.format == "diff" else f"r = {_or_auto(settings.rank)}, k = {_or_auto(settings.k)}; "
    lines.append(
        f"{ranks}{'the files take' if settings.format in DENSE else 'the adapter takes'} at most about "
        f"{job.adapter_bytes() / 2**20:.1f} MiB{twice}; {free_bytes(out) / 2**30:.3g} GiB are free in {out}."
    )
    lines += [_reads(settings), *([] if settings.format == "diff" else [duration(job, world_size)])]
    on_disk = sum(source.stays_on_disk(job.memory) for source in catalogue.stacks)
    lines.append(memory_line(_memory(job), world_size, f" in each of {world_size} processes", on_disk))
    return "\n".join(lines)


def _notes(job: Job) -> list[str]:
    """What the settings mean for this source and cannot be seen in the sizes: narrow matrices, zeros, an idle k."""
    settings, stacks = job.settings, job.catalogue.stacks
    notes = []
    if settings.rank is not None and settings.format != "diff":
        if narrow := [s.name for s in stacks if min(s.shape) < settings.rank]:
            notes.append(
                f"Taken whole, since they have fewer than {settings.rank} rows or columns: {', '.join(narrow)}."
            )
        ranks = [settings.written_rank(s.shape, s.layers) for s in stacks]
        if settings.is_padded and settings.k is not None:
            notes.append(f"All factors have rank {max(ranks)} in the file.")
    if settings.k != 0 and not settings.is_pooled:
        notes.append(f"k concerns the report alone: format {settings.format} holds no pool. --k 0 takes less time.")
    if job.whole:
        labels = ", ".join(group.label for group in grouped((module.name, "") for module in job.whole))
        notes.append(f"Saved whole, where they changed: {labels}.")
    return notes


def _memory(job: Job) -> int:
    """Bytes of the largest piece of work: a stack with its dense updates, or an unnamed one read in float32."""
    settings = job.settings
    dense = STORED[settings.dtype].itemsize if settings.format in DENSE else 0
    stacks = [
        s.memory(job.dtype, settings.format != "diff" and settings.exact(s), job.memory)
        + s.layers * math.prod(s.shape) * dense
        for s in job.catalogue.stacks
    ]
    return max([*stacks, *(4 * s.layers * math.prod(s.shape) for s in job.unnamed)])


def _or_auto(number: int | None) -> str:
    return "auto" if number is None else str(number)


def _reads(settings: ExtractSettings) -> str:
    """How often M is read: to check that it is finite, for norms, LoRA, the error of the file, and the solver.

    A target needs all spectra before any rank is known. The solver's 50 to 350 reads were counted on the bundled
    updates and on synthetic stacks of all kinds.
    """
    if settings.format == "diff":
        text = "Every stack is read 3 times"
    elif settings.target is not None:
        text = "Every stack is read 8 times"
    elif settings.k == 0:
        text = "Every stack is read 4 times"
    elif settings.solver.start == "best":
        each = " for each k" if settings.k is None else ""
        text = f"Every stack is read some 50 to 350 times{each}, by the solver for the most part"
    else:
        text = "Every stack is read some 20 times, and by the solver twice or three times a sweep"
    return f"{text}; from its files each time, where --memory leaves it there."


# ---- time

Shape = tuple[int, int]


def duration(job: Job, world_size: int = 1, seconds_of_sample: Callable[[Job, Shape], float] | None = None) -> str:
    """A sentence with the seconds that LoRA takes, extrapolated from one timed layer of each kind of work.

    The search for a leading part is extrapolated in proportion to b a, an exact SVD in proportion to b a min(b, a).
    Where singular values hardly fall, the search ends in an exact SVD. The time of the default solver follows from
    LoRA's by a measured rule. That of another start depends on the number of sweeps, which nobody knows before.

    `seconds_of_sample` is the time of one layer of that shape (None: a layer is timed now).
    """
    settings = job.settings
    timed = seconds_of_sample or _seconds_of_sample

    def is_searched(s: StackSource) -> bool:
        rank = settings.rank
        return rank is not None and not settings.exact(s) and worth_it(s.shape, rank)

    searched = [s for s in job.catalogue.stacks if is_searched(s)]
    decomposed = [s for s in job.catalogue.stacks if not is_searched(s)]

    def seconds_of(sources: Sequence[StackSource], side: int, cost: Callable[[Shape], int]) -> float:
        """The seconds of all layers of `sources`, by one of at most `side` x `side`, in proportion to `cost`."""
        if not sources:
            return 0.0
        b, a = max((s.shape for s in sources), key=min)
        sample = (side, side) if side == _LEADING_SAMPLE else (min(b, side), min(a, side))
        return timed(job, sample) * sum(s.layers * cost(s.shape) for s in sources) / cost(sample)

    seconds = exact = seconds_of(decomposed, _SAMPLE, svd_cost)
    if settings.target is not None:
        seconds *= 2  # all spectra come first
    most = seconds + seconds_of(searched, _SAMPLE, svd_cost)
    by_products = seconds_of(searched, _LEADING_SAMPLE, math.prod)
    seconds += by_products
    about = "up to about" if decomposed else "about"  # SVDs of larger layers are up to three times faster
    flat = f", and up to {most:.0f} s where singular values hardly fall" if searched and most >= 1 else ""
    solver = ""
    if settings.k != 0 and settings.rank is not None:
        solving = exact_solver_seconds(exact, decomposed, settings.rank)
        budget = RankBudget(settings.rank, 1 if settings.k is None else settings.k)
        solver = _solver_time(settings, solving + solver_seconds(by_products, searched, budget))
    if seconds < 1:
        about, seconds = "less than", 1
    shared = "" if world_size == 1 else f", in all {world_size} processes together"
    return f"LoRA takes {about} {seconds:.0f} s here{shared}{flat}, reading aside, by a layer timed now{solver}."


def _solver_time(settings: ExtractSettings, seconds: float) -> str:
    """The time of solver and floors as text, which the default solver does in `seconds` for each k."""
    if settings.solver.start != "best":
        return "; the solver comes on top"
    each = " for each k" if settings.k is None else ""
    return f"; solver and floors {EFFORT_TIMES[settings.solver.effort]} {seconds:.0f} s more{each}"


def _seconds_of_sample(job: Job, shape: Shape) -> float:
    """The seconds of a LoRA of one layer of this shape."""
    settings = dataclasses.replace(
        job.settings,
        rank=min(job.settings.rank or 1, *shape),
        k=0,
        format="dense" if job.settings.format == "dense" else "lora",
        target=None,
        save_modules=False,
    )
    modules = ModuleNames(("sample",))
    return sample_seconds(shape, job.dtype, job.device, lambda stack: extract_stack(stack, modules, settings))
