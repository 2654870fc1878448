"""The extraction command within processes of a pool, and the files that it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import rasa_theory as rt
from rasa_theory.commands import extract
from rasa_theory.common import InputError
from rasa_theory.distributed import Processes
from rasa_theory.extraction import run


def extracts(processes: Processes, arguments: list[str], breaks: str = "", error: Exception | None = None) -> Any:
    """Run the command in this process; return its exit status or sentence, and the names of the stacks that it read.

    It fails with `error` at stack `breaks`.
    """
    real, read = run.extract_stack, []

    def watched(stack: rt.LayerStack, *rest: Any) -> Any:
        read.append(stack.name)
        if stack.name == breaks and error is not None:
            raise error
        return real(stack, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "extract_stack", watched)
        try:
            return extract.run(arguments, processes), read
        except InputError as problem:
            return str(problem), read


def written(out: Path) -> dict[str, Any]:
    """Return the files of an adapter by name, without the command, and the report and its number of processes."""
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    files["README.md"] = files["README.md"].replace(str(out).encode(), b"OUT")  # its command
    report = json.loads(files.pop("report.json"))
    processes = report["environment"].pop("processes", 1)
    del report["command"]
    return {"report": report, "processes": processes} | files
