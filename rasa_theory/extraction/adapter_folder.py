"""The folder of an extraction: what is finished of it, whether it may go on, and its final files."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if sys.platform != "win32":
    pass

from rasa_theory.common import InputError, locked, unfinished, write_file
from rasa_theory.extraction.conversion import Extracted
from rasa_theory.formats import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    RasaConfig,
    join_safetensors,
    lora_config,
    name_in_task,
    read_header,
    write_safetensors,
)

_PARTS = ".extract"  # in the folder of the adapter, as long as not all is there
_LOCK = "lock"  # among the parts
_OURS = re.compile(
    r"report\.(json|csv|png)|README\.md|adapter_(model\.safetensors|config\.json)"
    r"|diff(-\d+\.safetensors|\.safetensors\.index\.json)"
)


class ExtractionFolder:
    """The folder `out`. `plan` is what must not change between two runs that share it: inputs, settings, stacks.

    Within its `with`, which anything but a finished folder needs, no other run gets in; of several processes of a run,
    one is in it for all. Raises InputError if it holds the adapter of another plan, or files that are not ours; the
    `with`, if another run works there.
    """

    def __init__(self, out: Path, plan: dict[str, Any]) -> None:
        self.out, self.plan, self.parts = out, plan, out / _PARTS
        self.finished = (out / "report.json").exists()
        begun = out / "report.json" if self.finished else self.parts / "manifest.json"
        if begun.exists():
            known = _read_json(begun).get("plan") or {}
            if changed := [key for key in plan if known.get(key) != plan[key]]:
                what = f"other {changed[0]}{_difference(known.get(changed[0]), plan[changed[0]])}"
                raise InputError(f"{out} holds an extraction with {what}; name another folder with --out, or delete it")
        if self.finished:
            self.clear()
        elif not begun.exists() and (found := sorted(path for path in out.iterdir() if path.name[0] != ".")):
            raise InputError(f"{found[0]} is there already, and not ours; name an empty or new folder with --out")

    def __enter__(self) -> ExtractionFolder:
        self.parts.mkdir(parents=True, exist_ok=True)
        self._lock = locked(self.parts / _LOCK)
        self._sweep()
        if not (self.parts / "manifest.json").exists():
            for stale in self.parts.iterdir():  # of no plan that is known
                if stale.name != _LOCK:
                    stale.unlink()
            self._write("manifest.json", {"plan": self.plan})
        return self

    def __exit__(self, *raised: object) -> None:
        if self._lock is not None:
            self._lock.close()

    @property
    def begun(self) -> bool:
        """Whether a run has entered it, and has not finished."""
        return (self.parts / "manifest.json").exists()

    def noted(self, name: str) -> Any:
        """What was kept under this name; None if nothing was."""
        path = self.parts / name
        return _read_json(path)["kept"] if path.exists() else None

    def note(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` returned when it was first asked for, which is kept as data."""
        if not (self.parts / name).exists():
            self._write(name, {"kept": make()})
        return self.noted(name)

    def _write(self, name: str, data: dict[str, Any]) -> None:
        text = json.dumps(data, indent=1, allow_nan=False)
        write_file(self.parts / name, lambda f: f.write(text.encode()))

    def row(self, n: int) -> dict[str, Any] | None:
        """The row of the n-th stack, if it is finished."""
        path = self.parts / f"{n:05d}.json"
        return _read_json(path) if path.exists() else None

    @property
    def done(self) -> int:
        """How many stacks are finished."""
        return sum(1 for _ in self.parts.glob("[0-9]*.json"))

    def add(self, n: int, extracted: Extracted) -> None:
        """Write the tensors of the n-th stack and then its row, which says that they are there."""
        write_file(self.tensors(n), lambda f: write_safetensors(extracted.tensors, f, {"format": "pt"}))
        self._write(f"{n:05d}.json", extracted.row)

    def tensors(self, n: int) -> Path:
        """Where the tensors of the n-th stack lie: dense ones in their final place."""
        if self.plan["settings"]["format"] == "diff":
            return self.out / f"diff-{n + 1:05d}.safetensors"
        return self.parts / f"{n:05d}.safetensors"

    def finish(self, rows: Sequence[dict[str, Any]]) -> None:
        """The adapter, or that of each task, with its configuration; for dense differences the index of their files."""
        settings, parts = self.plan["settings"], [self.tensors(n) for n in range(len(rows))]
        if settings["format"] == "diff":
            files = {key: part.name for part in parts for key in read_header(part).tensors}
            index = {"metadata": {"rasa_theory": "tuned - base, reconstructed"}, "weight_map": files}
            write_file(
                self.out / "diff.safetensors.index.json", lambda f: f.write(json.dumps(index, indent=1).encode())
            )
            return
        ranks = {name: rank for row in rows for name, rank in row["ranks"].items()}
        transposed = any(row["transposed"] for row in rows)
        if settings["format"] == "rasa":
            config = RasaConfig(settings["rank"], settings["k"]).plain(list(ranks), transposed, settings["base"])
            self._adapter(self.out, parts, config, None)
        elif settings["tasks"] is None:
            self._adapter(self.out, parts, lora_config(ranks, transposed, settings["base"]), None)
        else:
            for task, (folder, base) in enumerate(settings["tasks"]):
                mine = {name: rank for key, rank in ranks.items() if (name := name_in_task(key, task)) is not None}
                if mine:
                    (self.out / folder).mkdir(exist_ok=True)
                    self._adapter(self.out / folder, parts, lora_config(mine, transposed, base), task)

    def _adapter(self, folder: Path, parts: Sequence[Path], config: dict[str, Any], task: int | None) -> None:
        write_file(folder / WEIGHTS_FILE, lambda f: join_safetensors(parts, f, {"format": "pt"}, task))
        write_file(folder / CONFIG_FILE, lambda f: f.write(json.dumps(config, indent=1).encode()))

    def abandon(self) -> None:
        """Leave nothing where nothing is finished."""
        if self.done == 0:
            self.clear()

    def clear(self) -> None:
        """Remove the parts, and files that a killed process did not finish."""
        shutil.rmtree(self.parts, ignore_errors=True)
        self._sweep()

    def _sweep(self) -> None:
        """Remove what a killed process left unfinished, here and in the folders of tasks."""
        for file in [*self.out.glob(".*"), *self.out.glob("*/.*")]:
            if _OURS.fullmatch(unfinished(file) or ""):
                file.unlink(missing_ok=True)


def _difference(before: Any, now: Any) -> str:
    """Which of two plans' values differ, where that can be said in a few words."""
    if isinstance(before, dict):
        names = [str(key) for key in now if before.get(key) != now[key]]
    elif isinstance(before, list) and now and "file" in now[0]:
        names = [Path(x["file"]).name for x in now if x not in before]
    else:
        return ""
    return f" ({', '.join(names[:3])}{', ..' if len(names) > 3 else ''})" if names else ""


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); delete {path.parent} to begin anew") from None
    return found if isinstance(found, dict) else {}
