"""Pairs of texts for the two training tasks, and their split into training and test modules."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from experiments.models import sentences
from rasa_theory.common import InputError


@dataclass(frozen=True)
class Pair:
    """A description in prose and the function body that it describes; in the task prose, a sentence and the next."""

    module: str
    docstring: str
    body: str


@dataclass(frozen=True)
class Split:
    """Sizes of the training and the test set, and the largest module that may be tested on."""

    train_pairs: int = 3600
    test_pairs: int = 600
    test_module_limit: int = 40


def standard_library_pairs() -> list[Pair]:
    """Return every documented function of the standard library as a pair, without duplicates, in a fixed order."""
    pairs: list[Pair] = []
    seen: set[str] = set()
    for module, path in sentences.standard_library_files():
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for pair in _pairs_of_module(module, tree):
            if pair.docstring not in seen and pair.body not in seen:
                seen.update((pair.docstring, pair.body))
                pairs.append(pair)
    return pairs


def _pairs_of_module(module: str, tree: ast.Module) -> Iterator[Pair]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node)
        statements = node.body[1:]
        if not docstring or not statements:
            continue
        first_paragraph = " ".join(docstring.split("\n\n")[0].split())
        body = "\n".join(ast.unparse(statement) for statement in statements)
        if len(first_paragraph.split()) >= 4 and len(body) >= 40:
            yield Pair(module, first_paragraph, body)


def next_sentences() -> list[Pair]:
    """Return every sentence of a docstring with the one that follows it."""
    return [Pair(*texts) for texts in sentences.of_docstrings()]


TASKS: dict[str, tuple[Callable[[], list[Pair]], str]] = {
    "code": (
        standard_library_pairs,
        "docstring -> function body, pairs from the Python standard library, split by module",
    ),
    "prose": (
        next_sentences,
        "sentence -> next sentence, from docstrings of the Python standard library, numpy, scipy and torch, "
        "split by module",
    ),
}
"""Task -> the function that collects its pairs, and its description."""


def cached(folder: Path | None, name: str, collect: Callable[[], Any]) -> Any:
    """Return the result of `collect` as JSON holds it, from the file `name` in `folder`, which is made if missing.

    Without a folder nothing is cached. Machines of other versions of Python train on the same texts through a folder.
    """
    if folder is None:
        return collect()
    file = folder / f"{name}.json"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(collect()), encoding="utf-8")
    return json.loads(file.read_text(encoding="utf-8"))


def pairs_of(task: str, folder: Path | None) -> list[Pair]:
    """Return all pairs of a task, collected on this machine or cached in `folder`."""
    return [Pair(*texts) for texts in cached(folder, task, lambda: [astuple(pair) for pair in TASKS[task][0]()])]


def split_by_module(pairs: list[Pair], split: Split) -> tuple[list[Pair], list[Pair]]:
    """Return training and test pairs from disjoint modules; a hash of the module's name decides, not a seed.

    Modules of more than `test_module_limit` pairs are trained on, so that no single module decides the test.
    Raises InputError if there are fewer pairs than `split` asks for.
    """
    order = sorted({pair.module for pair in pairs}, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    of_module: dict[str, list[Pair]] = {}
    for pair in pairs:
        of_module.setdefault(pair.module, []).append(pair)
    test: list[Pair] = []
    train: list[Pair] = []
    for module in order:
        held_out = len(of_module[module]) <= split.test_module_limit and len(test) < split.test_pairs
        (test if held_out else train).extend(of_module[module])
    test, train = test[: split.test_pairs], _shuffled(train)[: split.train_pairs]
    if len(train) < split.train_pairs or len(test) < split.test_pairs:
        raise InputError(
            f"found {len(train)} training and {len(test)} test pairs; "
            f"{split.train_pairs} and {split.test_pairs} were asked for; are the sources of Python installed?"
        )
    return train, test


def _shuffled(pairs: list[Pair]) -> list[Pair]:
    return sorted(pairs, key=lambda pair: hashlib.sha256(pair.docstring.encode()).hexdigest())
