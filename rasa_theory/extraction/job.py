"""Before an extraction: what it is to do, what can be known to fail, and how much it will take."""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rasa_theory.common import InputError, identity
from rasa_theory.extraction.conversion import extract_stack
from rasa_theory.extraction.extract_settings import STORED, ExtractSettings
from rasa_theory.formats import CONFIG_FILE, ModuleNames, called_conv1d
from rasa_theory.linalg import worth_it
from rasa_theory.problem import LayerStack, RankBudget, check_memory
from rasa_theory.sources import Catalogue, StackSource, synthetic_stack

_PROBLEMS = 20  # spelt out, more than a model has kinds of module
_LEADING = 1280  # so large a layer has its leading part searched for


@dataclass(frozen=True)
class Job:
    """An extraction: the stacks of `catalogue`, each with its `modules`, and how.

    `unnamed` are stacks that no adapter can name, among what the catalogue leaves out: of them the norms are told.
    `base`: what the adapter says that it belongs to. `tasks`: folder and base of every adapter where the layers of a
    stack are adapters of one base, compressed together, else None. `memory` in bytes, None: no limit.
    """

    catalogue: Catalogue
    modules: Sequence[ModuleNames]
    settings: ExtractSettings
    dtype: torch.dtype
    device: torch.device
    unnamed: Sequence[StackSource] = ()
    base: str | None = None
    tasks: list[list[str | None]] | None = None
    memory: int | None = None

    def plan(self) -> dict[str, Any]:
        """What two runs must have in common to share a folder."""
        compute = str(self.dtype).removeprefix("torch.")
        return {
            "inputs": [identity(path) for path in self.catalogue.files],
            "settings": self.settings.plain() | {"compute": compute, "base": self.base, "tasks": self.tasks},
            "stacks": [
                {"name": s.name, "shape": list(s.shape), "transposed": s.transposed, "modules": list(m.names)}
                for s, m in zip(self.catalogue.stacks, self.modules, strict=True)
            ],
        }


# ---- what can be known to fail


def check(job: Job, out: Path | None) -> None:
    """Raise InputError, one sentence, for all that can be known before anything is read.

    `out` is the folder of the adapter, None if nothing will be written.
    """
    settings, problems = job.settings, []
    for source in job.catalogue.stacks:
        try:
            RankBudget(settings.rank or 1, 0).check_fits(source)
            if job.memory is not None:
                check_memory(source, job.memory, settings.exact(source.shape))
        except InputError as error:
            problems.append(str(error))
    if settings.format == "rasa":
        kinds = [m.kind.replace(".", "__") for m in job.modules]
        problems += [f"two stacks are of the kind {k!r}, which has one pool; keep one with --modules"
                     for k in sorted({k for k in kinds if kinds.count(k) > 1})]  # fmt: skip
    if job.tasks is not None and settings.format not in ("lora", "lora-exact-rasa"):
        problems.append(f"format {settings.format} is for one model; write adapters as lora or lora-exact-rasa")
    elif settings.format == "diff" and (turned := [s.name for s in job.catalogue.stacks if _unclear(job, s)]):
        problems.append(
            f"{turned[0]!r} may be stored transposed: it is called like a Conv1D, but the adapter's fan_in_fan_out is "
            "false; set that to true if it is one, or write another --format"
        )
    if out is not None and settings.target is None:
        problems += _room(job, out)
    if problems:
        more = f"; and {len(problems) - _PROBLEMS} more of this kind" if len(problems) > _PROBLEMS else ""
        raise InputError("; ".join(problems[:_PROBLEMS]) + more)


def _unclear(job: Job, source: StackSource) -> bool:
    """Whether the stack comes from factors of what is called like a Conv1D, and the adapter does not say it is one."""
    adapter = any(path.name == CONFIG_FILE for path in job.catalogue.files)
    return adapter and called_conv1d(source.keys[0]) and not source.transposed


def _room(job: Job, out: Path) -> list[str]:
    """The sentence that says that the disk is too small, if it is: for the parts and the whole, less what is there."""
    there = sum(file.stat().st_size for file in out.rglob("*.safetensors")) if out.is_dir() else 0
    wanted, free = _copies(job) * adapter_bytes(job) - there, _free(out)
    if wanted <= free:
        return []
    return [f"--out {out} needs {wanted / 2**30:.3g} GiB, of which {free / 2**30:.3g} GiB are free; name another disk"]


def _copies(job: Job) -> int:
    """How often the adapter is on disk at most: dense updates are written where they stay."""
    return 1 if job.settings.format == "diff" else 2


def _free(out: Path) -> int:
    """Free bytes where `out` is, or is to be."""
    while not out.exists():
        out = out.parent
    return shutil.disk_usage(out).free


# ---- what it will take


def adapter_bytes(job: Job) -> int:
    """About how large the adapter will be, at most."""
    settings, numbers = job.settings, 0
    for s in job.catalogue.stacks:
        L, (b, a) = s.layers, s.shape
        r = min(b, a) if settings.rank is None else settings.rank
        k = r if settings.k is None else settings.k
        rank = r - k + L * k if settings.format == "lora-exact-rasa" else r
        numbers += L * (b * a if settings.format == "diff" else rank * (b + a))
    if settings.target is not None and settings.target.parameters is not None:
        numbers = min(numbers, settings.target.parameters)
    return numbers * STORED[settings.dtype].itemsize


def forecast(job: Job, out: Path, world_size: int = 1) -> str:
    """What would be extracted into `out` by so many processes, with its sizes, memory and time, for --dry-run."""
    settings, catalogue = job.settings, job.catalogue
    lines, largest = [f"Source {catalogue.source}. Would extract, format {settings.format}:"], 0
    for s in catalogue.stacks:
        L, (b, a) = s.layers, s.shape
        size = L * b * a * job.dtype.itemsize
        dense = L * b * a * STORED[settings.dtype].itemsize if settings.format == "diff" else 0
        largest = max(largest, s.memory(job.dtype, settings.exact(s.shape)) + dense)
        turned = ", stored transposed" if s.transposed else ""
        lines.append(f"  {s.name}: {L} x {b} x {a}{turned} ({size / 2**20:.1f} MiB)")
    largest = max([largest, *(4 * s.layers * math.prod(s.shape) for s in job.unnamed)])  # read in float32
    lines += [f"  left out: {name}: {reason}" for name, reason in catalogue.left_out]
    twice = ", twice that while it is made" if _copies(job) > 1 else ""
    lines.append(
        f"r = {_said(settings.rank)}, k = {_said(settings.k)}; the adapter takes at most about "
        f"{adapter_bytes(job) / 2**20:.1f} MiB{twice}; {_free(out) / 2**30:.3g} GiB are free in {out}."
    )
    lines += [_reads(settings), _duration(job, world_size)]
    each, of_each = ("", "") if world_size == 1 else (f" in each of {world_size} processes", " in each")
    most = f"about {largest / 2**20:.0f} MiB at most{of_each}"
    lines.append(f"One stack is in memory at a time{each}: {most}, beside the libraries.")
    return "\n".join(lines)


def _said(number: int | None) -> str:
    return "auto" if number is None else str(number)


def _reads(settings: ExtractSettings) -> str:
    """How often M is read: to see that it is finite, for norms, LoRA and the error of the file, and what comes beside.

    The ranks of a target need all spectra first. The solver's 50 to 350 are what it took on the bundled updates and on
    synthetic stacks of all kinds.
    """
    if settings.target is not None:
        text = "Every stack is read 8 times"
    elif settings.k == 0:
        text = "Every stack is read 4 times"
    elif settings.solver.start == "best":
        each = " for each k" if settings.k is None else ""
        text = f"Every stack is read some 50 to 350 times{each}, by the solver for the most part"
    else:
        text = "Every stack is read some 20 times, and by the solver twice or three times a sweep"
    return f"{text}; from its files each time, where --memory leaves it there."


def _duration(job: Job, world_size: int = 1) -> str:
    """Seconds of LoRA, extrapolated from one layer of each kind of work; those of the solver cannot be known."""
    settings = job.settings

    def leading(s: StackSource) -> bool:
        rank = settings.rank
        return rank is not None and not settings.exact(s.shape) and worth_it(s.shape, rank)

    stacks = job.catalogue.stacks
    searched, decomposed = [s for s in stacks if leading(s)], [s for s in stacks if not leading(s)]
    seconds = _seconds(job, decomposed, 512, _svd_cost)
    if settings.target is not None:
        seconds *= 2  # spectra first
    most = seconds + _seconds(job, searched, 512, _svd_cost)
    seconds += _seconds(job, searched, _LEADING, math.prod)
    about = "up to about" if decomposed else "about"
    flat = f", and up to {most:.0f} s where singular values hardly fall" if searched and most >= 1 else ""
    solver = "" if settings.k == 0 else "; the solver comes on top"
    if seconds < 1:
        about, seconds = "less than", 1
    shared = "" if world_size == 1 else f", in all {world_size} processes together"
    return f"LoRA takes {about} {seconds:.0f} s here{shared}{flat}, reading aside, by a layer timed now{solver}."


def _svd_cost(shape: tuple[int, int]) -> int:
    return math.prod(shape) * min(shape)


def _seconds(job: Job, sources: Sequence[StackSource], side: int, cost: Callable[[tuple[int, int]], int]) -> float:
    """Of a LoRA of all `sources`, by one layer of at most `side` x `side` whose singular values fall like j^-0.7.

    In proportion to `cost`. SVDs of larger layers are up to three times faster than that.
    """
    if not sources:
        return 0.0
    b, a = max((s.shape for s in sources), key=min)
    shape = min(b, side), min(a, side)
    made = synthetic_stack(1, shape, "power:0.7", 0.0, 0).values
    settings = dataclasses.replace(
        job.settings,
        rank=min(job.settings.rank or 1, *shape),
        k=0,
        format="diff" if job.settings.format == "diff" else "lora",
        target=None,
    )
    taken = []
    for _ in range(2):  # the first time, libraries begin
        began = time.perf_counter()
        extract_stack(LayerStack(made, "sample", job.dtype, job.device), ModuleNames(("sample",)), settings)
        taken.append(time.perf_counter() - began)
    return min(taken) * sum(s.layers * cost(s.shape) for s in sources) / cost(shape)
