"""An inspection of the stacks of a source: its plan, its dry run, and its measurements, which can be taken up."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from rasa_theory.common import Plan, plan_of
from rasa_theory.formats import Exclusion, ModuleNames
from rasa_theory.inspection.inspect_settings import InspectSettings
from rasa_theory.inspection.inspection_folder import InspectionFolder
from rasa_theory.inspection.measurement import LayerNames, Row, measure
from rasa_theory.problem import check_memory
from rasa_theory.solvers import sample_seconds
from rasa_theory.sources import (
    Catalogue,
    Norms,
    StackSource,
    left_out_lines,
    memory_line,
    size_line,
)

Show = Callable[[int, str], None]
"""Called with the number of finished stacks and the name of the one in hand."""
Finished = Callable[[Row], None]
"""Called with the row of every stack, once it is measured or found in the folder."""

_LEFT_OUT = "left_out.json"
_SAMPLE = (1536, 1536)  # the layer that is timed for --dry-run: a smaller one would be decomposed


@dataclass(frozen=True)
class InspectionJob:
    """An inspection of the stacks of `catalogue`.

    - tasks: the layers of a stack are adapters of one base.
    - memory: the limit in bytes, None for no limit.
    """

    catalogue: Catalogue
    settings: InspectSettings
    device: torch.device
    tasks: bool = False
    memory: int | None = None

    def plan(self) -> Plan:
        """All that the measurements depend on."""
        return plan_of(
            self.catalogue.files,
            source=self.catalogue.source,
            settings=self.settings.plain(),
            stacks=[[s.name, s.layers, *s.shape, s.transposed] for s in self.catalogue.stacks],
        )

    def outline(self) -> list[dict[str, Any]]:
        """Kind, name, layers and shape of every stack, as in their rows."""
        return [
            {"name": s.name, "kind": layer_names(s, self.tasks).kind, "layers": s.layers, "shape": s.shape}
            for s in self.catalogue.stacks
        ]

    def check(self) -> None:
        """Raise InputError if a layer needs more memory than is allowed."""
        if self.memory is not None:
            largest = max(self.catalogue.stacks, key=lambda source: math.prod(source.shape))
            check_memory(largest, self.memory, decomposed=False)

    def forecast(self) -> str:
        """The stacks to inspect, with sizes, memory and time, as text for --dry-run."""
        dtype, stacks = torch.float32, self.catalogue.stacks
        lines = [f"Source {self.catalogue.source}. Would inspect, up to rank {self.settings.rank}:"]
        lines += [size_line(source, dtype) for source in stacks] + left_out_lines(self.catalogue)
        seconds = _seconds_of_sample(self) * sum(s.layers * math.prod(s.shape) for s in stacks) / math.prod(_SAMPLE)
        lines.append(f"It takes about {max(1, seconds):.0f} s here, reading aside, by a layer timed now.")
        most = max(source.memory(dtype, decomposed=False, limit=self.memory) for source in stacks)
        lines.append(memory_line(most, 1, "", sum(source.stays_on_disk(self.memory) for source in stacks)))
        return "\n".join(lines)


def measure_all(
    job: InspectionJob, folder: InspectionFolder | None, show: Show, finished: Finished | None = None
) -> list[Row]:
    """The rows of all stacks: those in the folder, and those that are measured now and written there.

    One stack is in memory at a time.
    """
    stacks = job.catalogue.stacks
    rows: list[Row] = []
    for n, source in enumerate(stacks):
        show(n, source.name)
        row = None if folder is None else folder.row(n)
        if row is None:
            row = _measured(job, n)
            if folder is not None:
                folder.add_row(n, row)
        rows.append(row)
        if finished is not None:
            finished(row)
    return rows


def _measured(job: InspectionJob, n: int) -> Row:
    source = job.catalogue.stacks[n]
    stack = source.load(None, job.device)
    with stack.suitable_threads():
        row = measure(stack, layer_names(source, job.tasks), job.settings.rank, n)
    norms = job.catalogue.norms(source) or []
    bases = [one.base for one in norms if one.base is not None]
    return row | {
        "base_norms_squared": bases if len(bases) == source.layers else None,
        "rounding": sorted(Norms.together(norms).rounding),
    }


def left_out_rows(job: InspectionJob, folder: InspectionFolder | None) -> list[dict[str, Any]]:
    """The tensors in no stack, with the reason, and with ||M||^2 where it can be known; not what nobody asked for."""

    def rows() -> list[dict[str, Any]]:
        norms = {name: norm.update for name, norm in job.catalogue.norms_left_out().items()}
        return [
            {"name": one.name, "reason": one.reason, "norm_squared": norms.get(one.name)}
            for one in job.catalogue.left_out
            if one.kind is not Exclusion.UNSELECTED
        ]

    return rows() if folder is None else folder.compute_once(_LEFT_OUT, rows)


def layer_names(source: StackSource, tasks: bool) -> LayerNames:
    """The names of the layers of a stack: modules of the model, or of several adapters."""
    if tasks:
        return LayerNames(source.name, tuple(f"{task}/{source.name}" for task in range(source.layers)))
    if not source.has_named_layers:
        return LayerNames.numbered(source.name, source.layers)
    modules = ModuleNames.of(source.keys)
    return LayerNames(modules.kind, modules.names)


def _seconds_of_sample(job: InspectionJob) -> float:
    """The seconds of one layer of the sample's shape."""
    names = LayerNames.numbered("sample", 1)
    return sample_seconds(_SAMPLE, torch.float32, job.device, lambda stack: measure(stack, names, job.settings.rank, 0))
