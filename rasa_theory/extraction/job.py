"""An extraction: its stacks and settings, its plan, and the faults that can be known before any work."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rasa_theory.common import InputError, Plan, plan_of
from rasa_theory.extraction.extract_settings import DENSE, STORED, ExtractSettings
from rasa_theory.extraction.whole_modules import WholeModule, whole_modules
from rasa_theory.formats import (
    CONFIG_FILE,
    OUTPUT_LAYERS,
    BaseModel,
    Exclusion,
    LeftOut,
    ModuleNames,
    Place,
    called_conv1d,
    place_by_name,
    refused_by_peft,
)
from rasa_theory.problem import check_memory, least_memory
from rasa_theory.sources import Catalogue, StackSource

_MOST_PROBLEMS = 20  # sentences in one error: more than a model has kinds of module


@dataclass(frozen=True)
class Job:
    """An extraction of the stacks of `catalogue`.

    - modules: the names of the modules of each stack.
    - unnamed: stacks that no adapter can name, such as embeddings. They are among the `left_out` of the catalogue, and
      only their norms are reported.
    - base: the base model that the adapter's configuration names.
    - rest: single tensors that form no stack and can be read, such as norms and biases. They are left out, too.
    - whole: modules that the adapter may replace, where the settings ask for it.
    - tasks: folder and base model of every adapter where the layers of a stack are adapters of one base; else None.
    - memory: the limit in bytes, None for no limit.
    """

    catalogue: Catalogue
    modules: Sequence[ModuleNames]
    settings: ExtractSettings
    dtype: torch.dtype
    device: torch.device
    unnamed: Sequence[StackSource] = ()
    base: BaseModel = field(default_factory=lambda: BaseModel(None))
    tasks: list[list[str | None]] | None = None
    rest: Sequence[str] = ()
    whole: Sequence[WholeModule] = ()
    memory: int | None = None

    def plan(self) -> Plan:
        """All that two runs must have in common to share a folder."""
        compute = str(self.dtype).removeprefix("torch.")
        return plan_of(
            self.catalogue.files,
            settings=self.settings.plain()
            | {"compute": compute, "base": dataclasses.asdict(self.base), "tasks": self.tasks},
            stacks=[
                {"name": s.name, "shape": list(s.shape), "transposed": s.transposed, "modules": list(m.names)}
                for s, m in zip(self.catalogue.stacks, self.modules, strict=True)
            ],
        )

    def outline(self) -> list[dict[str, Any]]:
        """Kind, name, layers and shape of every stack, as in their rows."""
        return [
            {"name": source.name, "kind": names.kind, "layers": source.layers, "shape": source.shape}
            for source, names in zip(self.catalogue.stacks, self.modules, strict=True)
        ]

    @property
    def has_experts(self) -> bool:
        """True if the model has fused experts, whether or not they are adapted."""
        entries = {} if self.catalogue.updates is None else self.catalogue.updates.entries
        return any(entry.place is not None and entry.place.role.is_experts for entry in entries.values())

    @property
    def copies_on_disk(self) -> int:
        """How often the adapter is on disk at most: dense updates are written in their final place."""
        return 1 if self.settings.format in DENSE else 2

    def adapter_bytes(self) -> int:
        """The size of the adapter at most, about: with the zeros that pad all factors to one rank."""
        settings, stacks = self.settings, self.catalogue.stacks
        itemsize = STORED[settings.dtype].itemsize
        if settings.format in DENSE:
            return itemsize * sum(s.layers * math.prod(s.shape) for s in stacks)
        ranks = [settings.written_rank(s.shape, s.layers) for s in stacks]
        if settings.target is not None and settings.target.parameters is not None:
            ranks = [min(r, settings.target.parameters // sum(s.shape)) for r, s in zip(ranks, stacks, strict=True)]
        if settings.is_padded:
            ranks = [max(ranks)] * len(ranks)
        return itemsize * sum(r * s.layers * sum(s.shape) for r, s in zip(ranks, stacks, strict=True))


def job_of(
    catalogue: Catalogue,
    settings: ExtractSettings,
    dtype: torch.dtype,
    device: torch.device,
    base: BaseModel,
    tasks: list[list[str | None]] | None = None,
    memory: int | None = None,
) -> Job:
    """The extraction of all stacks of `catalogue` that the format can name; with `tasks` their layers are adapters.

    Raises InputError if no stack remains, or if the source does not hold what `save_modules` needs.
    """
    unnamed: list[StackSource] = []
    if tasks is None and settings.format != "diff":
        catalogue, unnamed = nameable(catalogue, settings, base.model_type)
    readable = {} if catalogue.updates is None else catalogue.updates.entries
    rest = [one.name for one in catalogue.left_out if one.name in readable and one.kind != Exclusion.UNSELECTED]
    whole: list[WholeModule] = []
    if settings.save_modules:
        if catalogue.updates is None or not catalogue.updates.is_pair:
            raise InputError("--save-modules needs the weights after fine-tuning: give --base and --tuned")
        whole = whole_modules(readable, [key for s in catalogue.stacks for key in s.keys], rest)
    modules = [module_names(source, settings, tasks is not None) for source in catalogue.stacks]
    return Job(catalogue, modules, settings, dtype, device, unnamed, base, tasks, rest, whole, memory)


def module_names(source: StackSource, settings: ExtractSettings, over_tasks: bool) -> ModuleNames:
    """The names of the modules of a stack, or the tensors of format diff, one for each layer."""
    prefix = "" if settings.format == "kohya" else settings.prefix
    if over_tasks:
        return ModuleNames(tuple(f"{task}/{prefix}{source.name}" for task in range(source.layers)))
    if source.has_named_layers:
        kernel = () if source.place is None else source.place.kernel
        return dataclasses.replace(ModuleNames.of(source.keys, source.transposed, prefix), kernel=kernel)
    (parameter,) = source.keys or (source.name,)
    return ModuleNames.experts(prefix + parameter, source.layers, source.transposed)


def _unnameable(place: Place | None, settings: ExtractSettings) -> str | None:
    """The reason why no adapter of the format can name a tensor with three axes; None if one can: fused experts."""
    if place is None or not place.role.is_experts:
        return "one tensor with three axes, whose layers are no modules"
    if settings.format in ("kohya", "rasa"):
        return f"{place.reason}, which format {settings.format} cannot name"
    if place.position is None:
        return f"{place.reason}; transformers would say which axis is the input, but does not know the model"
    return None


def _is_output(source: StackSource) -> bool:
    """True for the weight of an output layer, by its name."""
    return source.keys[0].removesuffix(".weight").rpartition(".")[2] in OUTPUT_LAYERS


def _in_model_order(stacks: list[StackSource]) -> list[StackSource]:
    """The stacks, with the fused experts last and in the order of the model, in which PEFT wraps their parameters."""
    experts = [s for s in stacks if s.place is not None and s.place.role.is_experts]
    others = [s for s in stacks if s not in experts]
    return others + sorted(experts, key=lambda s: (s.place and s.place.position) or 0)


def nameable(
    catalogue: Catalogue, settings: ExtractSettings, model_type: str | None = None
) -> tuple[Catalogue, list[StackSource]]:
    """Split off the stacks whose layers are no weights of modules: return the other stacks, and those split off.

    They move to `left_out`, each with its reason. With `save_modules` so does the output layer. Raises InputError if no
    stack remains.
    """
    named: list[StackSource] = []
    unnamed: list[StackSource] = []
    left_out = list(catalogue.left_out)
    for source in catalogue.stacks:
        reason = None
        if not source.has_named_layers:
            reason = _unnameable(source.place, settings)
        elif strange := [key for key in source.keys if not key.endswith(".weight")]:
            reason = f"{strange[0]!r} is not the weight of a module, so no adapter can name it"
        elif not (place := source.place or place_by_name(source.keys[0], source.shape)).role.is_matrix:
            reason = place.reason
        elif settings.save_modules and _is_output(source):
            reason = "the output layer, which --save-modules saves whole"
        elif settings.format in ("lora", "lora-exact-rasa"):
            reason = refused_by_peft(source.keys[0].removesuffix(".weight"), model_type)
        if reason is None:
            named.append(source)
        else:
            unnamed.append(source)
            left_out.append(LeftOut(source.name, reason, Exclusion.NO_MODULE))
    if not named:
        raise InputError(f"{catalogue.source}: no stack remains ({left_out[-1].name!r}: {left_out[-1].reason})")
    return dataclasses.replace(catalogue, stacks=_in_model_order(named), left_out=left_out), unnamed


def check(job: Job, out: Path | None) -> None:
    """Raise InputError, in one sentence, for every fault that can be known before anything is read.

    `out` is the folder of the adapter, None if nothing will be written.
    """
    settings, problems = job.settings, []
    if job.memory is not None:
        largest = max(job.catalogue.stacks, key=lambda source: least_memory(source, settings.exact(source)))
        try:
            check_memory(largest, job.memory, settings.exact(largest))
        except InputError as error:
            problems.append(f"{error} (--memory)")
    if settings.format == "rasa":
        kinds = [m.kind.replace(".", "__") for m in job.modules]
        problems += [f"two stacks are of the kind {k!r}, which has one pool; keep one with --modules"
                     for k in sorted({k for k in kinds if kinds.count(k) > 1})]  # fmt: skip
    if settings.format == "kohya" and (turned := [s.name for s in job.catalogue.stacks if s.transposed]):
        problems.append(f"{turned[0]!r} is stored transposed, as Conv1D is, which format kohya cannot say; write lora")
    if job.tasks is not None and settings.format not in ("lora", "lora-exact-rasa"):
        problems.append(f"format {settings.format} is for one model; write adapters as lora or lora-exact-rasa")
    elif settings.format in (*DENSE, "kohya") and (
        turned := [s.name for s in job.catalogue.stacks if _unclear(job, s)]
    ):
        problems.append(
            f"{turned[0]!r} may be stored transposed: it is called like a Conv1D, but the adapter's fan_in_fan_out is "
            "false; set that to true if it is one, or write another --format"
        )
    if out is not None and settings.target is None:
        problems += _lack_of_room(job, out)
    if problems:
        more = f"; and {len(problems) - _MOST_PROBLEMS} more of this kind" if len(problems) > _MOST_PROBLEMS else ""
        raise InputError("; ".join(problems[:_MOST_PROBLEMS]) + more)


def _unclear(job: Job, source: StackSource) -> bool:
    """Whether the stack comes from an adapter, is named like a Conv1D, and the adapter does not say that it is one."""
    from_adapter = any(path.name == CONFIG_FILE for path in job.catalogue.files)
    return from_adapter and called_conv1d(source.keys[0]) and not source.transposed


def _lack_of_room(job: Job, out: Path) -> list[str]:
    """The sentence that the disk is too small, if it is, for all files less those that are there already."""
    present = sum(file.stat().st_size for file in out.rglob("*.safetensors")) if out.is_dir() else 0
    needed, free = job.copies_on_disk * job.adapter_bytes() - present, free_bytes(out)
    if needed <= free:
        return []
    return [f"--out {out} needs {needed / 2**30:.3g} GiB, of which {free / 2**30:.3g} GiB are free; name another disk"]


def free_bytes(out: Path) -> int:
    """Free bytes on the disk of the folder `out`, which need not exist yet."""
    while not out.exists():
        out = out.parent
    return shutil.disk_usage(out).free
