"""The folder of an extraction: the stacks that are finished, and the final files of the adapter."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from rasa_theory.common import InputError, PartsFolder, Plan, occupied, unfinished, write_file, write_json
from rasa_theory.extraction.conversion import Extracted
from rasa_theory.extraction.extract_settings import DENSE
from rasa_theory.extraction.report import extraction_csv, model_card
from rasa_theory.formats import (
    CONFIG_FILE,
    KOHYA_FILE,
    WEIGHTS_FILE,
    BaseModel,
    KohyaFile,
    LoraFile,
    RasaConfig,
    join_safetensors,
    kohya_metadata,
    lora_config,
    name_in_task,
    read_header,
    write_safetensors,
)
from rasa_theory.plotting import plot_extraction, style

_PARTS = ".extract"  # lies in the folder of the adapter until all stacks are finished
_REPORT = "report.json"
_PART = 2**28  # bytes
_DENSE_TENSORS = {"dense": "tuned - base, the best approximation", "diff": "tuned - base"}
_OURS = re.compile(
    r"report\.(json|csv|png)|README\.md|lora\.safetensors|adapter_(model\.safetensors|config\.json)"
    r"|(diff|dense)(-\d+\.safetensors|\.safetensors\.index\.json)"
)


class ExtractionFolder(PartsFolder):
    """The folder of an extraction. The report is written last, so it says that all files are there.

    Raises InputError if the folder holds an extraction of another plan, or files of somebody else.
    """

    def __init__(self, out: Path, plan: Plan) -> None:
        super().__init__(out, plan, out / _PARTS, out / _REPORT, _busy(out))
        if difference := self.difference():
            raise occupied(f"{out} holds an extraction with other {difference}")
        if self.finished:
            self.clear()
        elif not self.has_begun and (others := sorted(path for path in out.iterdir() if path.name[0] != ".")):
            raise InputError(f"{others[0]} is there already, and not ours; name an empty or new folder with --out")

    def __enter__(self) -> Self:
        super().__enter__()
        self._remove_temporary_files()
        return self

    def add(self, n: int, extracted: Extracted) -> None:
        """Write the tensors of stack n and then its row, which says that they are there."""
        write_file(self.tensors(n), lambda file: write_safetensors(extracted.tensors, file, {"format": "pt"}))
        self.add_row(n, extracted.row)

    def add_tensors(self, n: int, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Write tensors that belong to no stack as parts n, n + 1, .., each of some `_PART` bytes or of one tensor."""
        part: dict[str, Tensor] = {}

        def write() -> None:
            write_file(self.tensors(n), lambda file: write_safetensors(part, file, {"format": "pt"}))

        for name, tensor in tensors:
            if part and sum(t.nbytes for t in part.values()) + tensor.nbytes > _PART:
                write()
                part, n = {}, n + 1
            part[name] = tensor
        if part:
            write()

    def tensors(self, n: int) -> Path:
        """The file with the tensors of stack n. Dense updates lie in their final place at once."""
        if (dense := self.plan["settings"]["format"]) in DENSE:
            return self.out / f"{dense}-{n + 1:05d}.safetensors"
        return self.parts / f"{n:05d}.safetensors"

    def finish(self, report: dict[str, Any]) -> None:
        """Write all final files, the report last, and remove the parts."""
        figure = plot_extraction(report)
        self._write_adapters(report)
        write_file(self.out / "report.csv", lambda file: file.write(extraction_csv(report).encode()))
        write_file(self.out / "report.png", lambda file: style.save(figure, file))
        write_file(self.out / "README.md", lambda file: file.write(model_card(report).encode()))
        write_json(self.out / _REPORT, report)
        self.clear()

    def _write_adapters(self, report: dict[str, Any]) -> None:
        """Write the adapter, or one for each task, with its configuration; for dense updates their index."""
        rows: Sequence[dict[str, Any]] = report["stacks"]
        settings = self.plan["settings"]
        parts = list(itertools.takewhile(Path.exists, map(self.tensors, itertools.count())))
        base = BaseModel(**settings["base"])
        ranks = {name: rank for row in rows for name, rank in row["ranks"].items()}
        transposed = any(row["transposed"] and not row["parameter"] for row in rows)
        if (dense := settings["format"]) in DENSE:
            files = {key: part.name for part in parts for key in read_header(part).tensors}
            index = {"metadata": {"rasa_theory": _DENSE_TENSORS[dense]}, "weight_map": files}
            write_json(self.out / f"{dense}.safetensors.index.json", index, end="")
        elif settings["format"] == "kohya":
            finish, metadata = KohyaFile(report["rank"]), kohya_metadata(_padded(ranks, report["rank"]), base.name)
            write_file(self.out / KOHYA_FILE, lambda file: join_safetensors(parts, file, metadata, finish=finish))
        elif settings["format"] == "rasa":
            config = RasaConfig(settings["rank"], settings["k"]).plain(list(ranks), transposed, base)
            self._write_adapter(self.out, parts, config, None)
        elif settings["tasks"] is None:
            self._write_lora(self.out, parts, report, ranks, base, None)
        else:
            for task, (folder, base_of_task) in enumerate(settings["tasks"]):
                task_ranks = {
                    name: rank for key, rank in ranks.items() if (name := name_in_task(key, task)) is not None
                }
                if task_ranks:
                    (self.out / folder).mkdir(exist_ok=True)
                    named = dataclasses.replace(base, name=base_of_task)
                    self._write_lora(self.out / folder, parts, report, task_ranks, named, task)

    def _write_lora(
        self,
        folder: Path,
        parts: Sequence[Path],
        report: dict[str, Any],
        ranks: Mapping[str, int],
        base: BaseModel,
        task: int | None,
    ) -> None:
        """Write a LoRA whose modules have these ranks, and beside it the modules that are saved whole."""
        parameters = tuple(row["parameter"] for row in report["stacks"] if row["parameter"] and row["ranks"])
        finish = LoraFile(report["rank"], parameters)
        transposed = any(row["transposed"] and not row["parameter"] for row in report["stacks"])
        padded = dict(zip(ranks, _padded(ranks, report["rank"]), strict=True))
        config = lora_config(padded, transposed, base, parameters, report["saved_modules"], report["has_experts"])
        self._write_adapter(folder, parts, config, task, finish)

    def _write_adapter(
        self,
        folder: Path,
        parts: Sequence[Path],
        config: dict[str, Any],
        task: int | None,
        finish: LoraFile | None = None,
    ) -> None:
        metadata = {"format": "pt"}
        write_file(folder / WEIGHTS_FILE, lambda file: join_safetensors(parts, file, metadata, task, finish))
        write_json(folder / CONFIG_FILE, config, end="")

    def clear(self) -> None:
        """Remove the parts, and temporary files that a killed process has left."""
        super().clear()
        self._remove_temporary_files()

    def _remove_temporary_files(self) -> None:
        """Remove temporary files of `write_file`, here and in the folders of tasks; hidden files of others stay."""
        for file in [*self.out.glob(".*"), *self.out.glob("*/.*")]:
            if _OURS.fullmatch(unfinished(file) or ""):
                file.unlink(missing_ok=True)


def remove_other_extraction(out: Path, plan: Plan) -> None:
    """Remove the files of an extraction of another plan from `out`; those of this plan stay.

    Raises InputError, and removes nothing, if there are files of somebody else, if that extraction is in progress, or
    if its record cannot be read.
    """
    other = PartsFolder(out, plan, out / _PARTS, out / _REPORT, _busy(out))
    if other.difference() is None:
        return
    settings = ((other.recorded() or {}).get("plan") or {}).get("settings") or {}
    folders = [out / name for name, _ in settings.get("tasks") or []]
    files = [path for folder in (out, *folders) for path in folder.glob("[!.]*") if path not in folders]
    if foreign := [path for path in files if not _OURS.fullmatch(path.name)]:
        raise InputError(f"{foreign[0]} is not ours, and would lie among the files of the adapter; name another folder")
    with other:  # refuses a folder that another process has locked
        for path in files:
            path.unlink()
        for folder in folders:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        other.clear()


def _busy(out: Path) -> str:
    return f"another process is extracting into {out}; wait for it, or name another folder"


def _padded(ranks: Mapping[str, int], rank: int | None) -> list[int]:
    """The ranks of the factors in the file: all `rank`, or each its own with None."""
    return [own if rank is None else rank for own in ranks.values()]
