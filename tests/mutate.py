"""Break the code on purpose, one line at a time, and check that the named tests notice.

`python -m tests.mutate` reads `tests/mutations.toml`. Each entry names a `file`, an `old` text that occurs there
exactly once, the `new` text that replaces it, and the `test` that must then fail. All work happens in a temporary copy.

The exit status is 0 if every mutation is killed, 1 if any is not, and 2 if the table or the options are wrong.
"""

from __future__ import annotations

import argparse
import ast
import compileall
import contextlib
import functools
import importlib
import json
import os
import py_compile
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatch
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "tests" / "mutations.toml"
COPIED = ("rasa_theory", "tests", "experiments", "figures", "docs", "notebooks", "pyproject.toml", "README.md")
PRELOADED = (
    "torch", "numpy", "scipy.linalg", "scipy.optimize", "scipy.special", "safetensors.torch", "pytest", "hypothesis",
    "jsonschema", "matplotlib.pyplot", "transformers", "peft",
)  # fmt: skip
INVALID = ("SyntaxError", "IndentationError", "NameError", "UnboundLocalError", "ImportError", "ModuleNotFoundError")
FIELDS = {"what", "file", "old", "new", "test", "timeout"}
OUTSIDE = 77  # exit status of a test process that imported the package from outside the copy


@dataclass(frozen=True)
class Mutation:
    """One entry of the table. If `timeout` is set, a test that hangs counts as one that fails."""

    what: str
    file: str
    old: str
    new: str
    test: str
    timeout: bool = False


class Outcome(Enum):
    """The result of one mutation. Only KILLED is good."""

    KILLED = "the test fails"
    SURVIVED = "the test passes"
    STALE = "`old` does not occur exactly once"
    NO_BASELINE = "the test fails without the mutation"
    INVALID = "the mutated code is no valid program"
    TIMEOUT = "the test hangs"
    BROKEN = "the test did not run"


@dataclass(frozen=True)
class Result:
    """The outcome of `mutation`, with the error that the test raised or the end of its output."""

    mutation: Mutation
    outcome: Outcome
    detail: str
    seconds: float


@dataclass(frozen=True)
class Run:
    """One run of pytest: its exit status (None if it hung), the errors raised by name, the end of its output."""

    status: int | None
    errors: tuple[str, ...]
    output: str
    seconds: float


# ------------------------------------------------------------------------------------------------ the table


class TableError(Exception):
    """The table of mutations is wrong."""


def read_table(path: Path = TABLE) -> list[Mutation]:
    """Read the table. Raises TableError if an entry lacks a field, has an unknown one, or repeats another."""
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8")).get("mutation", [])
    except tomllib.TOMLDecodeError as error:
        raise TableError(f"{path.name}: {error}") from None
    mutations = []
    for number, entry in enumerate(entries, 1):
        if (unknown := set(entry) - FIELDS) or (FIELDS - {"timeout"}) - set(entry):
            wrong = f"unknown {sorted(unknown)}" if unknown else f"lacks {sorted(FIELDS - {'timeout'} - set(entry))}"
            raise TableError(f"entry {number} of {path.name}, {entry.get('what', 'without a name')!r}: {wrong}")
        mutations.append(Mutation(**entry))
    names = [(m.file, m.what) for m in mutations]
    if repeated := {f"{file}: {what}" for file, what in names if names.count((file, what)) > 1}:
        raise TableError(f"entries of the same name: {sorted(repeated)}")
    return mutations


def mutated(root: Path, mutation: Mutation) -> str:
    """The text of the file with the mutation. Raises TableError if `old` does not occur exactly once."""
    path = root / mutation.file
    if not path.is_file():
        raise TableError(f"no file {mutation.file}")
    text = path.read_text(encoding="utf-8")
    if (count := text.count(mutation.old)) != 1:
        raise TableError(f"{mutation.old!r} occurs {count} times in {mutation.file}")
    return text.replace(mutation.old, mutation.new)


def faults(root: Path, mutation: Mutation) -> list[str]:
    """The faults of an entry that show without running it, each as a sentence."""
    wrong = []
    try:
        if mutated(root, mutation) == (root / mutation.file).read_text(encoding="utf-8"):
            wrong.append("`new` is `old`")
    except TableError as error:
        wrong.append(str(error))
    file, _, name = mutation.test.partition("::")
    if not (root / file).is_file():
        wrong.append(f"no file {file}")
    elif name.partition("[")[0] not in names_of_tests(root / file):
        wrong.append(f"no test {name} in {file}")
    return wrong


@functools.cache
def names_of_tests(path: Path) -> frozenset[str]:
    """The names of the test functions of a file; one in a class is called Class::name."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        inside = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        names |= {prefix + one.name for one in inside if isinstance(one, ast.FunctionDef)}
    return frozenset(names)


# ------------------------------------------------------------------------------------------------ one test


class _Errors:
    """A plugin of pytest that collects the names of the exceptions that tests raise."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def pytest_exception_interact(self, call: Any) -> None:
        self.names.append(type(call.excinfo.value).__name__)


def run_test(copy: Path, test: str, patience: float, cached: bool) -> Run:
    """Run one test in a fork of this process, in the folder `copy`.

    The fork has torch and pytest already, which take seconds to import, and nothing of the project. Bytecode is written
    only if `cached`, so that no mutated module is mistaken for the original later.
    """
    with tempfile.TemporaryDirectory() as scratch:
        output, errors = Path(scratch, "output"), Path(scratch, "errors")
        start = time.perf_counter()
        child = os.fork()
        if child == 0:
            os._exit(_in_child(copy, test, cached, output, errors))
        status = _wait(child, start + patience)
        names = json.loads(errors.read_text()) if errors.exists() else []
        text = output.read_text(encoding="utf-8", errors="replace") if output.exists() else ""
    return Run(status, tuple(names), text, time.perf_counter() - start)


def _in_child(copy: Path, test: str, cached: bool, output: Path, errors: Path) -> int:
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sink = os.open(output, os.O_WRONLY | os.O_CREAT)
        for stream in (1, 2):
            os.dup2(sink, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(copy)
        sys.dont_write_bytecode = not cached
        for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "rasa_theory", "experiments")]:
            del sys.modules[name]
        sys.modules["__main__"] = ModuleType("__main__")  # else processes that a test spawns import this module again
        sys.path[:] = [str(copy), *(p for p in sys.path if Path(p or ".").resolve() not in (ROOT, copy))]
        os.environ.update(
            HYPOTHESIS_PROFILE="thorough", PYTHONPATH=str(copy), PYTHONDONTWRITEBYTECODE="" if cached else "1"
        )
        import pytest

        plugin = _Errors()
        arguments = ["-x", "-q", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short"]
        status = int(pytest.main([*arguments, test], plugins=[plugin]))
        package = getattr(sys.modules.get("rasa_theory"), "__file__", None)
        if package is not None and not Path(package).is_relative_to(copy):
            status = OUTSIDE
        errors.write_text(json.dumps(plugin.names))
        sys.stdout.flush()
        sys.stderr.flush()
        return status
    except BaseException as error:
        os.write(2, repr(error).encode())
        return OUTSIDE + 1


def _wait(child: int, deadline: float) -> int | None:
    """The exit status of the child; None, and it is killed with all its own children, once the deadline is over."""
    pause = 0.01
    try:
        while time.perf_counter() < deadline:
            if (ended := os.waitpid(child, os.WNOHANG))[0]:
                return os.waitstatus_to_exitcode(ended[1])
            time.sleep(pause)
            pause = min(1.2 * pause, 0.2)
        return None
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)


# ------------------------------------------------------------------------------------------------ all of them


@functools.cache
def _own_copy(folder: Path) -> Path:
    """The copy of the project that belongs to this worker, made at the first call, with the imports its forks share."""
    copy = Path(tempfile.mkdtemp(dir=folder)).resolve()
    for name in COPIED:
        source, ignored = ROOT / name, shutil.ignore_patterns("__pycache__", ".*")
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=ignored)
        elif source.exists():
            shutil.copy2(source, copy / name)
    hashed = py_compile.PycInvalidationMode.CHECKED_HASH  # a mutation may keep the size of a file and its time
    for name in ("rasa_theory", "experiments", "tests"):
        compileall.compile_dir(copy / name, quiet=2, invalidation_mode=hashed)
    os.environ.update(MPLBACKEND="Agg", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
    texts = [path.read_text(encoding="utf-8") for path in copy.rglob("*.py")]
    for module in PRELOADED:
        top = module.partition(".")[0]
        if any(f"import {top}" in text or f"from {top}" in text for text in texts):
            with contextlib.suppress(ImportError):
                importlib.import_module(module)
    return copy


def _try_all(folder: Path, test: str, mutations: list[Mutation], patience: float) -> list[Result]:
    """Run one test without any mutation, then with each."""
    copy = _own_copy(folder)
    baseline = run_test(copy, test, patience, cached=True)
    if baseline.status != 0:
        detail = f"exit status {baseline.status}\n{baseline.output[-2000:]}"
        return [Result(m, Outcome.NO_BASELINE, detail, baseline.seconds) for m in mutations]
    return [_try(copy, m, min(patience, 60 + 20 * baseline.seconds)) for m in mutations]


def _try(copy: Path, mutation: Mutation, patience: float) -> Result:
    """Run the test with the mutation in the copy, which is as before afterwards."""
    path = copy / mutation.file
    try:
        text = mutated(copy, mutation)
    except TableError as error:
        return Result(mutation, Outcome.STALE, str(error), 0.0)
    original = path.read_bytes()
    try:
        path.write_text(text, encoding="utf-8")
        run = run_test(copy, mutation.test, patience, cached=False)
    finally:
        path.write_bytes(original)
    outcome, detail = judged(mutation, run)
    return Result(mutation, outcome, detail, run.seconds)


def judged(mutation: Mutation, run: Run) -> tuple[Outcome, str]:
    """The outcome of one run with a mutation, and a detail: the error raised, or the end of the output."""
    error = run.errors[-1] if run.errors else ""
    if run.status == 0:
        return Outcome.SURVIVED, ""
    if run.status is None:
        return (Outcome.KILLED, "it hangs") if mutation.timeout else (Outcome.TIMEOUT, run.output[-2000:])
    if error in INVALID:
        return Outcome.INVALID, run.output[-2000:]
    if run.status == 1:
        return Outcome.KILLED, error
    return Outcome.BROKEN, f"exit status {run.status}\n{run.output[-2000:]}"


def by_test(mutations: Sequence[Mutation]) -> dict[str, list[Mutation]]:
    """The mutations of each test."""
    groups: dict[str, list[Mutation]] = {}
    for mutation in mutations:
        groups.setdefault(mutation.test, []).append(mutation)
    return groups


def results(mutations: Sequence[Mutation], jobs: int, patience: float) -> Iterator[Result]:
    """Apply each mutation in a temporary copy, and yield the results as they come, in `jobs` processes."""
    groups = by_test(mutations)
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        pool = ProcessPoolExecutor(min(jobs, len(groups)), mp_context=get_context("fork"))
        try:
            futures = [pool.submit(_try_all, Path(folder), test, group, patience) for test, group in groups.items()]
            for future in as_completed(futures):
                yield from future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


# ------------------------------------------------------------------------------------------------ the command


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutate", description=str(__doc__).partition("\n\n")[0])
    parser.add_argument("--only", metavar="GLOB", help="only entries whose file, name or test matches")
    parser.add_argument("--jobs", metavar="N", type=int, default=1, help="processes that run tests (default: 1)")
    parser.add_argument("--patience", metavar="SECONDS", type=float, default=600, help="limit of one test (600)")
    parser.add_argument("--list", action="store_true", help="list the entries, run nothing")
    parser.add_argument("--check", action="store_true", help="check the table against the code, run nothing")
    args = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that temporary copies go
    try:
        mutations = [m for m in read_table() if args.only is None or _matches(m, args.only)]
    except TableError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not mutations or args.jobs < 1:
        print("error: no entry matches" if not mutations else "error: --jobs must be at least 1", file=sys.stderr)
        return 2
    if args.list:
        for m in mutations:
            print(f"{m.file}: {m.what}\n    {m.test}")
        return 0
    wrong = [(m, fault) for m in mutations for fault in faults(ROOT, m)]
    for m, fault in wrong:
        print(f"STALE     {m.file}: {m.what}: {fault}", flush=True)
    if args.check:
        print(f"{len(mutations)} mutations, {len(wrong)} faults")
        return 1 if wrong else 0
    stale = {m for m, _ in wrong}
    return _run([m for m in mutations if m not in stale], len(stale), args.jobs, args.patience)


def _matches(mutation: Mutation, glob: str) -> bool:
    return any(fnmatch(text, glob) for text in (mutation.file, mutation.what, mutation.test))


def _run(mutations: Sequence[Mutation], stale: int, jobs: int, patience: float) -> int:
    start, counts = time.perf_counter(), dict.fromkeys(Outcome, 0)
    counts[Outcome.STALE] = stale
    for number, result in enumerate(results(mutations, jobs, patience) if mutations else (), 1):
        counts[result.outcome] += 1
        m, name = result.mutation, result.outcome.name.replace("_", " ")
        detail = f" [{result.detail}]" if result.outcome is Outcome.KILLED and result.detail else ""
        print(f"{name:9} {number}/{len(mutations)} {result.seconds:5.1f} s  {m.file}: {m.what}{detail}", flush=True)
        if result.outcome is not Outcome.KILLED:
            print(f"    {m.test}: {result.outcome.value}", flush=True)
            for line in result.detail.splitlines():
                print(f"    | {line}", flush=True)
    total = len(mutations) + stale
    rest = "".join(
        f", {n} {o.name.lower().replace('_', ' ')}" for o, n in counts.items() if n and o is not Outcome.KILLED
    )
    print(f"{total} mutations, {counts[Outcome.KILLED]} killed{rest}, in {time.perf_counter() - start:.0f} s")
    return 0 if counts[Outcome.KILLED] == total else 1


if __name__ == "__main__":
    sys.exit(main())
