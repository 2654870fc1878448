"""The folder of an inspection: the rows of measured stacks, which stay there, and the files made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rasa_theory.common import PartsFolder, Plan, occupied, write_file, write_json
from rasa_theory.inspection.kinds import kinds
from rasa_theory.inspection.overview import inspection_csv
from rasa_theory.plotting import plot_inspection, style

_REPORT = "inspect.json"
FILES = (_REPORT, "inspect.csv", "inspect.png")
_PARTS = ".inspect"


class InspectionFolder(PartsFolder):
    """The folder of an inspection. Rows stay there, so that another goal is answered without measuring again."""

    def __init__(self, out: Path, plan: Plan) -> None:
        busy = f"another process is inspecting into {out}; wait for it, or name another folder"
        super().__init__(out, plan, out / _PARTS, out / _REPORT, busy)

    def conflict(self) -> str | None:
        """What the folder holds that this run would destroy, as a sentence without advice; None if there is nothing."""
        if difference := self.difference():
            return f"{self.out} holds an inspection with other {difference}"
        if not (self.finished or self.has_begun) and (there := [name for name in FILES if (self.out / name).exists()]):
            return f"{self.out / there[0]} is there already, and belongs to no inspection"
        return None

    def remove(self) -> None:
        """Remove the files and the rows of an inspection. Raises InputError if it is in progress."""
        with self:  # refuses a folder that another process has locked
            for name in FILES:
                (self.out / name).unlink(missing_ok=True)
            self.clear()

    def finish(self, report: dict[str, Any]) -> None:
        """Write the files of the report, inspect.json last."""
        figure = plot_inspection(report, kinds(report["stacks"]))
        write_file(self.out / "inspect.csv", lambda file: file.write(inspection_csv(report).encode()))
        write_file(self.out / "inspect.png", lambda file: style.save(figure, file))
        write_json(self.out / _REPORT, report)


def inspection_folder(out: Path, plan: Plan, overwrite: bool) -> InspectionFolder:
    """The folder `out`, emptied if it holds another inspection and `overwrite`. Raises InputError if it may not be."""
    folder = InspectionFolder(out, plan)
    conflict = folder.conflict()
    if conflict is None:
        return folder
    if not overwrite:
        raise occupied(conflict)
    folder.remove()
    return InspectionFolder(out, plan)
