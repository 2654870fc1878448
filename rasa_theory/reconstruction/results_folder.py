"""The folder of a study: its files, and the stacks that an earlier run of the same plan has finished."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rasa_theory.common import InputError, Plan, RunFolder, write_file, write_json
from rasa_theory.formats import read_tensors, safetensors_bytes
from rasa_theory.plotting import plot_iterations, style
from rasa_theory.reconstruction.driver import StudyState
from rasa_theory.reconstruction.summary import history_csv

_FACTORS = ("private_B", "private_A", "shared_B", "shared_A", "mixing")


class ResultsFolder(RunFolder):
    """The folder of a study. results.json holds the plan, under `unfinished` while stacks are left, then `plan`."""

    FILES = ("results.json", "history.csv", "factors.safetensors", "iterations.png", "iterations.svg")

    def __init__(self, out: Path, plan: Plan) -> None:
        super().__init__(out, plan, out / "results.json", "unfinished")

    def conflict(self) -> str | None:
        """What speaks against writing here, as the beginning of a sentence: another study; None if nothing does.

        A study of the same plan is no obstacle: it is gone on with, or computed again. Raises InputError if
        results.json cannot be read.
        """
        record = self.recorded()
        if record is None:
            return None
        earlier = record.get("unfinished") or record.get("plan")
        difference = self.difference_from(earlier) if earlier else "settings"
        return None if difference is None else f"{self.out} holds a reconstruction with other {difference}"

    def finished_stacks(self, ks: Sequence[int]) -> StudyState | None:
        """The stacks that an earlier run of the same plan has finished, with all of `ks`; None if there are none.

        A folder that cannot be read, or belongs to another plan, is no error: the run begins anew.
        """
        try:
            results = self.recorded()
            if results is None or self.difference() is not None:
                return None
            complete = [row for row in results["stacks"] if [run["k"] for run in row["runs"]] == list(ks)]
            tensors = read_tensors(self.out / "factors.safetensors") if complete else {}
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
        write_file(self.out / "factors.safetensors", lambda file: file.write(safetensors_bytes(state.factors)))
        write_json(self.out / "results.json", state.results)
        write_file(self.out / "history.csv", lambda file: file.write(history_csv(state.results).encode()))
        write_file(self.out / "iterations.png", lambda file: style.save(figure, file))
        write_file(self.out / "iterations.svg", lambda file: style.save(figure, file, "svg"))


def _factor_keys(row: dict[str, Any], ks: Sequence[int]) -> list[str]:
    """The keys of the factors of one stack in factors.safetensors."""
    return [f"{row['name']}/{k}/{factor}" for k in ks for factor in _FACTORS]
