"""The work of an extraction: ranks, stacks and norms, shared by all processes, and the report of it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rasa_theory.bounds import allocate_ranks
from rasa_theory.common import InputError
from rasa_theory.distributed import Processes, balanced_shares
from rasa_theory.extraction.adapter_folder import ExtractionFolder
from rasa_theory.extraction.conversion import Extracted, difference_of, extract_stack, rounded
from rasa_theory.extraction.extract_settings import STORED, ExtractSettings
from rasa_theory.extraction.job import Job
from rasa_theory.extraction.whole_modules import changed_modules
from rasa_theory.formats import Exclusion, LeftOut, whole_key
from rasa_theory.solvers import Callback, Progress
from rasa_theory.sources import Norms, StackSource, pair_warning

Show = Callable[[int, str], None]
"""Called with the number of finished steps and the name of the step in hand."""
Bar = Callable[[int, str], AbstractContextManager[Show]]
"""Makes a context of progress for a number of steps, which are called by the second argument."""
Finished = Callable[[dict[str, Any]], None]
"""Called in process 0 with the row of every stack, in their order, when it and those before it are finished."""

_RANKS = "ranks.json"
_LEFT_OUT = "left-out.json"


@contextlib.contextmanager
def no_progress(total: int, unit: str) -> Iterator[Show]:
    """A `Bar` that shows nothing."""
    yield lambda done, doing: None


@contextlib.contextmanager
def entered(out: Path, job: Job, processes: Processes) -> Iterator[ExtractionFolder | None]:
    """The folder of the extraction, locked by process 0 for all; None if the extraction is finished.

    All processes write their stacks there. Raises InputError as ExtractionFolder does, and if a process does not see
    the folder that process 0 sees.
    """
    with contextlib.ExitStack() as locks:

        def enter() -> dict[str, Any] | None:
            folder = ExtractionFolder(out, job.plan())
            return None if folder.finished else locks.enter_context(folder).plan

        plan = processes.from_first(enter)
        if plan is None:
            yield None
            return
        with processes.raise_together():
            folder = ExtractionFolder(out, plan)
            if not folder.has_begun:
                raise InputError(
                    f"--out {out} is not the folder that process 0 sees; name one that all processes share"
                )
        yield folder


def extract_all(
    job: Job, folder: ExtractionFolder, processes: Processes, bar: Bar = no_progress, finished: Finished | None = None
) -> None:
    """Write the part and the row of every stack that is not finished, and the norms of the stacks without names.

    Stacks are dealt to the processes as wholes, by the cost of their SVDs, and each process reads only its own. Where
    one process fails or is interrupted, the others stop after the stack in hand. A failure before any stack is finished
    leaves no parts.
    """
    stacks = job.catalogue.stacks
    try:
        ranks = _ranks(job, folder, processes, bar)
        unfinished = processes.from_first(lambda: [n for n in range(len(stacks)) if folder.row(n) is None])
        share = _shares([stacks[n] for n in unfinished], processes)[processes.process]
        with bar(len(stacks), "stacks") as show:
            tell = _teller(folder, len(stacks), finished if processes.first else None)
            tell()
            with processes.raise_together():
                for n in (unfinished[i] for i in share):
                    if processes.board.ending:
                        break
                    folder.add(n, _extracted(job, n, ranks[n], folder, show))
                    tell()
                _measure_left_out(job, folder, processes, show)
            tell()  # what other processes finished last
    except InputError:
        if processes.first:
            folder.abandon()
        raise


def _teller(folder: ExtractionFolder, count: int, finished: Finished | None) -> Callable[[], None]:
    """A function that calls `finished` with the rows that are there by now, each once and in the order of stacks."""
    following = 0

    def tell() -> None:
        nonlocal following
        while finished is not None and following < count and (row := folder.row(following)) is not None:
            finished(row)
            following += 1

    return tell


def _extracted(job: Job, n: int, ranks: Sequence[int] | None, folder: ExtractionFolder, show: Show) -> Extracted:
    """The tensors and the row of stack n."""
    source, names, settings = job.catalogue.stacks[n], job.modules[n], job.settings
    show(folder.finished_parts, f"{source.name}: reading")
    stack = source.load(job.dtype, job.device)
    with stack.suitable_threads():
        if settings.format == "diff":
            keys = [settings.prefix + key for key in source.keys]
            extracted = difference_of(stack, keys, source.is_one_tensor, names, settings)
        else:
            extracted = extract_stack(stack, names, settings, ranks, _solver_progress(show, folder, source))
    return with_norms(extracted, job.catalogue.norms(source))


def _measure_left_out(job: Job, folder: ExtractionFolder, processes: Processes, show: Show) -> None:
    """Write the norms of what the adapter leaves out: stacks without names, shared by processes, and single tensors."""
    for n in _shares(job.unnamed, processes)[processes.process]:
        if processes.board.ending:
            break
        source = job.unnamed[n]
        show(folder.finished_parts, f"{source.name}: norm")
        folder.compute_once(_norm_file(n), functools.partial(plain_norms, job, source))
    if processes.first and not processes.board.ending:
        show(folder.finished_parts, "norms of what is left out")
        folder.compute_once(_LEFT_OUT, lambda: norms_left_out(job))


def _shares(sources: Sequence[StackSource], processes: Processes) -> list[list[int]]:
    """Deal the sources to the processes by the cost of their SVDs, L b a min(b, a): their positions, per process."""
    return balanced_shares([s.layers * math.prod(s.shape) * min(s.shape) for s in sources], processes.world_size)


def _solver_progress(show: Show, folder: ExtractionFolder, source: StackSource) -> Callback:
    def say(progress: Progress) -> None:
        step = f"from {progress.start}, sweep {progress.sweep}"
        if progress.start == "search":
            step = f"searching, step {progress.sweep} of {progress.max_sweeps}"
        show(folder.finished_parts, f"{source.name}: {step}")

    return say


def _norm_file(n: int) -> str:
    return f"norm-{n:05d}.json"


def plain_norms(job: Job, source: StackSource) -> dict[str, Any] | None:
    """The norms of a stack that is not extracted; None if it cannot be read, or has entries that are not finite."""
    norms = job.catalogue.norms(source)
    return None if norms is None else Norms.together(norms).plain()


def norms_left_out(job: Job) -> dict[str, dict[str, Any]]:
    """The norms of the tensors that are left out, by name."""
    return {name: norms.plain() for name, norms in job.catalogue.norms_left_out().items()}


def with_norms(extracted: Extracted, norms: Sequence[Norms] | None) -> Extracted:
    """Add the norms of the weights before to a row, and ||update|| / ||weights|| of the stack and of every module."""
    if norms is None:
        return extracted
    modules = [
        module | {"relative_norm": one.relative} for module, one in zip(extracted.row["modules"], norms, strict=True)
    ]
    return dataclasses.replace(extracted, row=extracted.row | Norms.together(norms).facts() | {"modules": modules})


# ---- ranks that reach a target


def _ranks(job: Job, folder: ExtractionFolder, processes: Processes, bar: Bar) -> Sequence[Sequence[int] | None]:
    """The rank of every layer of every stack, chosen once from all spectra; None for stacks without a target.

    Raises InputError if the target leaves every layer rank 0.
    """
    ranks: Sequence[Sequence[int] | None] | None = processes.from_first(lambda: folder.cached(_RANKS))
    if ranks is not None:
        return ranks
    spectra = [] if job.settings.target is None else _spectra(job, processes, bar)
    chosen: Sequence[Sequence[int] | None] = processes.from_first(
        lambda: folder.compute_once(_RANKS, lambda: _allocated(job, spectra))
    )
    return chosen


def _spectra(job: Job, processes: Processes, bar: Bar) -> list[Tensor]:
    """Return the singular values of all stacks, (L, min(b, a)) each; every process computes its share of the stacks."""
    stacks = job.catalogue.stacks
    share_spectra: dict[int, Tensor] = {}
    share = _shares(stacks, processes)[processes.process]
    with processes.raise_together(), bar(len(share), "spectra") as show:
        for done, n in enumerate(share):
            if processes.board.ending:
                break
            show(done, stacks[n].name)
            stack = stacks[n].load(job.dtype, job.device)
            zeros = torch.zeros(stack.layers, min(stack.shape), dtype=torch.float64)
            share_spectra[n] = stack.spectra.singular_values().cpu() if stack.norm_squared > 0 else zeros
    gathered = processes.all_gather_objects(share_spectra)
    spectra = {n: spectrum for of_process in gathered for n, spectrum in of_process.items()}
    return [spectra[n] for n in range(len(stacks))]


def _allocated(job: Job, spectra: Sequence[Tensor]) -> Sequence[Sequence[int] | None]:
    stacks, target = job.catalogue.stacks, job.settings.target
    if target is None:
        return [None] * len(stacks)
    ranks = allocate_ranks(spectra, [sum(source.shape) for source in stacks], target)
    if not any(map(any, ranks)):
        raise InputError(
            "the target leaves every layer rank 0: the updates are zero, or one term costs more than allowed"
        )
    return ranks


# ---- the end


def _common_rank(settings: ExtractSettings, rows: Sequence[dict[str, Any]]) -> int | None:
    """The rank to which all factors of the file are padded; None if they keep their own."""
    ranks = [rank for row in rows for rank in row["ranks"].values()]
    return max(ranks) if settings.is_padded and ranks else None


def _write_whole(job: Job, folder: ExtractionFolder, norms: Mapping[str, Norms]) -> tuple[list[str], list[str]]:
    """Write the changed tensors that the file holds whole; return their names, and those of modules saved whole.

    Those are, in format diff, the updates of all tensors that form no stack. With `save_modules` they are the tuned
    tensors of modules that no factors adapt.
    """
    updates, n = job.catalogue.updates, len(job.catalogue.stacks)
    if updates is None:
        return [], []
    if job.settings.format == "diff":
        changed = [key for key in job.rest if key in norms and norms[key].update > 0]
        prefix, dtype = job.settings.prefix, STORED[job.settings.dtype]
        folder.add_tensors(n, ((prefix + key, rounded(key, updates.read(key), dtype)) for key in changed))
        return changed, []
    modules = changed_modules(job.whole, {name for name, one in norms.items() if one.update > 0})
    tuned = ((whole_key(module.name, part), updates.tuned(key)) for module in modules for part, key in module.keys)
    folder.add_tensors(n, ((key, tensor) for key, tensor in tuned if tensor is not None))
    changed = [name for module in modules for name in module.changes if name in norms and norms[name].update > 0]
    return list(dict.fromkeys(changed)), [module.name for module in modules]


def _is_unknown(job: Job, one: LeftOut) -> bool:
    """True if what is left out without a norm may have changed: it has no partner, or entries that are not finite."""
    is_tensor = job.catalogue.updates is not None
    return is_tensor and one.kind in (Exclusion.UNMATCHED, Exclusion.ROLE, Exclusion.AXES, Exclusion.NO_MODULE)


def finish(job: Job, folder: ExtractionFolder, about: dict[str, Any]) -> dict[str, Any]:
    """Write the final files from the rows and norms in the folder; return the report, which begins with `about`.

    Raises InputError if every update is zero.
    """
    rows = [row for n in range(len(job.catalogue.stacks)) if (row := folder.row(n)) is not None]
    norms: dict[str, Norms] = {
        name: Norms.of_plain(plain)
        for name, plain in [
            *(folder.cached(_LEFT_OUT) or {}).items(),
            *((source.name, folder.cached(_norm_file(n))) for n, source in enumerate(job.unnamed)),
        ]
        if plain is not None
    }
    written, saved = _write_whole(job, folder, norms)
    if not any(row["norm_squared"] for row in rows) and not (written and job.settings.format == "diff"):
        folder.clear()
        changed = [name for name, one in norms.items() if one.update]
        only = f"; only {changed[0]!r} has changed, which no adapter of these formats can hold" if changed else ""
        raise InputError(f"{job.catalogue.source}: every update is zero, there is nothing to extract{only}")
    left_out = [
        {"name": one.name, "reason": one.reason}
        | ({} if one.name not in norms else {"norm_squared": norms[one.name].update} | norms[one.name].facts())
        | ({"unknown": True} if one.name not in norms and _is_unknown(job, one) else {})
        for one in job.catalogue.left_out
    ]
    total = Norms.together([*(Norms.of_plain(row) for row in rows), *norms.values()])
    pair = total.facts() | {"warning": pair_warning(total, job.catalogue.source)} if total.base is not None else {}
    report = (
        about
        | pair
        | {
            "notes": list(job.catalogue.notes),
            "stacks": rows,
            "rank": _common_rank(job.settings, rows),
            "whole": [{"name": name, "norm_squared": norms[name].update} for name in written],
            "saved_modules": saved,
            "has_experts": job.has_experts,
            "left_out": [one for one in left_out if one["name"] not in written],
        }
    )
    folder.finish(report)
    return report
