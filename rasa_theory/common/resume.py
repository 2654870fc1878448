"""Runs that go on where an earlier run of the same command ended: the plan, its record, finished rows, and a lock.

A run writes down its plan, all that its results depend on, as plain data. A later run takes up the results only if its
own plan is the same, field by field. So a changed input file, setting or stack is noticed and named.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, Self

from rasa_theory.common.errors import InputError
from rasa_theory.common.files import identity, write_file

if sys.platform != "win32":
    import fcntl

Plan = dict[str, Any]

_LOCK = "lock"
_MANIFEST = "manifest.json"


def plan_of(inputs: Iterable[Path], **fields: Any) -> Plan:
    """The plan of a run: fingerprints of its input files, and further fields such as settings and stacks.

    JSON has no tuples and no other keys than strings. The plan goes through JSON at once, so that it equals a plan that
    was read from a file.
    """
    plan: Plan = json.loads(json.dumps({"inputs": [identity(path) for path in inputs]} | fields))
    return plan


def read_run_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError if the file cannot be read."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); delete {path.parent} to begin anew") from None
    return data if isinstance(data, dict) else {}


def write_json(path: Path, data: Any, end: str = "\n") -> None:
    """Write data as JSON, whole or not at all. Raises InputError if that fails."""
    text = json.dumps(data, indent=1, allow_nan=False) + end
    write_file(path, lambda file: file.write(text.encode()))


class RunFolder:
    """The folder `out` of a run whose `plan` stands in the JSON file `record`, under `key`."""

    def __init__(self, out: Path, plan: Plan, record: Path, key: str) -> None:
        self.out, self.plan = out, plan
        self._record, self._key = record, key
        self._lock: IO[bytes] | None = None

    def _lock_by(self, file: Path, busy: str) -> None:
        """Lock the folder by a file in it. Raises InputError, with the sentence `busy`, if another run has done so."""
        self._lock = locked(file, busy)

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def recorded(self) -> dict[str, Any] | None:
        """The content of the record, None if there is none. Raises InputError if it cannot be read."""
        return read_run_json(self._record) if self._record.exists() else None

    def difference(self) -> str | None:
        """The first field in which the recorded plan differs, such as "settings (rank)"; None if none does.

        A record without a plan differs in every field. Raises InputError if the record cannot be read.
        """
        record = self.recorded()
        return None if record is None else self.difference_from(record.get(self._key) or {})

    def difference_from(self, earlier: Plan) -> str | None:
        """The first field in which an earlier plan differs, as in `difference`."""
        for field, value in self.plan.items():
            if earlier.get(field) != value:
                return field + _details(earlier.get(field), value)
        return None


def occupied(conflict: str) -> InputError:
    """The refusal of a folder, with what to do; `conflict` says what it holds."""
    return InputError(f"{conflict}; name another folder with --out, or take this one with --overwrite")


def _details(earlier: Any, now: Any) -> str:
    """The names of the settings or files that differ, in parentheses; nothing where there are no such names."""
    if isinstance(earlier, dict):
        names = [str(key) for key in now if earlier.get(key) != now[key]]
    elif isinstance(earlier, list) and now and "file" in now[0]:
        names = [Path(entry["file"]).name for entry in now if entry not in earlier]
    else:
        return ""
    return f" ({', '.join(names[:3])}{', ..' if len(names) > 3 else ''})" if names else ""


class PartsFolder(RunFolder):
    """A run that keeps one row for each part of its work in the folder `parts`, until it writes the file `last`.

    Both `last` and a file in `parts` hold the plan. Use the object as a context manager to write rows: it locks the
    folder, and raises InputError, with the sentence `busy`, if another run has locked it. In a run of several processes
    one process takes the lock for all.
    """

    def __init__(self, out: Path, plan: Plan, parts: Path, last: Path, busy: str) -> None:
        self._last, self.finished = last, last.exists()
        super().__init__(out, plan, last if self.finished else parts / _MANIFEST, "plan")
        self.parts, self._busy = parts, busy

    def __enter__(self) -> Self:
        self.parts.mkdir(parents=True, exist_ok=True)
        self._lock_by(self.parts / _LOCK, self._busy)
        try:
            if self._last.exists() and not self.finished:
                raise InputError(f"another process has finished {self._last}; the same command reads it")
            self._begin()
        except BaseException:
            self._unlock()
            raise
        return self

    def _begin(self) -> None:
        """Write the plan, where no run has begun."""
        if self.has_begun:
            return
        for stale in self.parts.iterdir():  # they belong to no recorded plan
            if stale.name != _LOCK:
                stale.unlink()
        write_json(self.parts / _MANIFEST, {"plan": self.plan}, end="")

    def __exit__(self, *raised: object) -> None:
        self._unlock()

    @property
    def has_begun(self) -> bool:
        """Whether a run has written its plan here and has not finished."""
        return (self.parts / _MANIFEST).exists()

    def row(self, n: int) -> dict[str, Any] | None:
        """The row of part n; None if that part is not finished."""
        path = self._row(n)
        return read_run_json(path) if path.exists() else None

    def add_row(self, n: int, row: dict[str, Any]) -> None:
        """Write the row of part n. It says that the part is finished, so all other files of the part come before."""
        write_json(self._row(n), row, end="")

    def _row(self, n: int) -> Path:
        return self.parts / f"{n:05d}.json"

    @property
    def finished_parts(self) -> int:
        """The number of parts that are finished."""
        return sum(1 for _ in self.parts.glob("[0-9]*.json"))

    def cached(self, name: str) -> Any:
        """The plain data that `compute_once` has written under this name; None if there are none."""
        path = self.parts / name
        return read_run_json(path)["kept"] if path.exists() else None

    def compute_once(self, name: str, compute: Callable[[], Any]) -> Any:
        """The plain data that `compute` returns, computed by the first run that asks for this name."""
        if not (self.parts / name).exists():
            write_json(self.parts / name, {"kept": compute()}, end="")
        return self.cached(name)

    def abandon(self) -> None:
        """Remove the parts if none is finished, so that a run which fails at once leaves nothing."""
        if self.finished_parts == 0:
            self.clear()

    def clear(self) -> None:
        """Remove all parts."""
        shutil.rmtree(self.parts, ignore_errors=True)


def locked(path: Path, busy: str) -> IO[bytes] | None:
    """The file, locked until it is closed or the process ends, even if it is killed; None where there are no locks.

    Raises InputError, with the sentence `busy`, if another process has locked the file, or has just removed it together
    with its folder. In that case the lock is held on a file that nobody else can find, and would protect nothing.
    """
    if sys.platform == "win32":
        return None
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_ours = path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
    except BlockingIOError:
        is_ours = False
    except OSError:  # the file system has no locks
        is_ours = True
    if not is_ours:
        file.close()
        raise InputError(busy)
    return file
