"""The folder of a study: its files, and the stacks that an earlier run of the same plan has finished."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from rasa_theory.common import InputError, Plan, RunFolder, write_file, write_json
from rasa_theory.formats import read_header, read_tensors, safetensors_bytes
from rasa_theory.plotting import plot_iterations, style
from rasa_theory.reconstruction.driver import StudyState
from rasa_theory.reconstruction.summary import history_csv

_LOCK = ".reconstruct.lock"
_FACTORS_FILE = "factors.safetensors"
_FACTORS = ("private_B", "private_A", "shared_B", "shared_A", "mixing")


class ResultsFolder(RunFolder):
    """The folder of a study. results.json holds the plan, under `unfinished` while stacks are left, then `plan`.

    The file of the factors names its plan by a digest, since a run that dies may leave one file of two. Use the object
    as a context manager to write: it locks the folder, and raises InputError if another run has locked it.
    """

    FILES = ("results.json", "history.csv", _FACTORS_FILE, "iterations.png", "iterations.svg")

    def __init__(self, out: Path, plan: Plan) -> None:
        super().__init__(out, plan, out / "results.json", "unfinished")

    def __enter__(self) -> Self:
        busy = f"another process is reconstructing into {self.out}; wait for it, or name another folder"
        self._lock_by(self.out / _LOCK, busy)
        return self

    def __exit__(self, *raised: object) -> None:
        (self.out / _LOCK).unlink(missing_ok=True)
        self._unlock()

    def conflict(self) -> str | None:
        """What speaks against writing here, as the beginning of a sentence: another study; None if nothing does.

        A study of the same plan is no obstacle: it is gone on with. Raises InputError if results.json cannot be read.
        """
        difference = self.difference()
        return None if difference is None else f"{self.out} holds a reconstruction with other {difference}"

    def difference(self) -> str | None:
        """The first field in which the plan of results.json differs, as in `RunFolder`, finished or not."""
        record = self.recorded()
        if record is None:
            return None
        earlier = record.get("unfinished") or record.get("plan")
        return self.difference_from(earlier) if earlier else "settings"

    def finished_stacks(self, ks: Sequence[int]) -> StudyState | None:
        """The stacks that an earlier run of the same plan has finished, with all of `ks`; None if there are none.

        A folder that cannot be read, or belongs to another plan, is no error: the run begins anew.
        """
        try:
            results = self.recorded()
            if results is None or self.difference() is not None:
                return None
            complete = [row for row in results["stacks"] if [run["k"] for run in row["runs"]] == list(ks)]
            factors_file = self.out / _FACTORS_FILE
            if not complete or read_header(factors_file).metadata.get("plan") != self._digest:
                return None
            tensors = read_tensors(factors_file)
        except (InputError, OSError):
            return None
        rows = [row for row in complete if tensors.keys() >= set(_factor_keys(row, ks))]
        if not rows:
            return None
        factors = {key: tensors[key] for row in rows for key in _factor_keys(row, ks)}
        return StudyState(results | {"stacks": rows}, factors)

    def write(self, state: StudyState) -> None:
        """Write all files of the study, each whole or not at all. Raises InputError if that fails.

        The factors come before the results that speak of them, so that a run that dies in between loses nothing.
        """
        figure = plot_iterations(state.results)
        factors = safetensors_bytes(state.factors, {"plan": self._digest})
        write_file(self.out / _FACTORS_FILE, lambda file: file.write(factors))
        write_json(self.out / "results.json", state.results)
        write_file(self.out / "history.csv", lambda file: file.write(history_csv(state.results).encode()))
        write_file(self.out / "iterations.png", lambda file: style.save(figure, file))
        write_file(self.out / "iterations.svg", lambda file: style.save(figure, file, "svg"))

    @property
    def _digest(self) -> str:
        """A digest of the plan."""
        return hashlib.sha256(json.dumps(self.plan, sort_keys=True).encode()).hexdigest()


def _factor_keys(row: dict[str, Any], ks: Sequence[int]) -> list[str]:
    """The keys of the factors of one stack in factors.safetensors."""
    return [f"{row['name']}/{k}/{factor}" for k in ks for factor in _FACTORS]
