"""Pairs of consecutive sentences, from prose that is installed with Python and its packages."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sysconfig
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

DOCUMENTED = ("numpy", "scipy", "torch")
"""Packages whose docstrings are read, beside the standard library."""
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3", "pydoc_data"}


def consecutive(text: str) -> Iterator[tuple[str, str]]:
    """Yield pairs of sentences of 6 to 60 words that follow one another in a paragraph."""
    for paragraph in re.split(r"\n\s*\n", text):
        sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(paragraph.split()))
        for pair in pairwise(sentences):
            if all(6 <= len(s.split()) <= 60 for s in pair):
                yield pair


def of_docstrings() -> Iterator[tuple[str, str, str]]:
    """Yield (module, sentence, next sentence), no sentence twice, in a fixed order.

    The module is the top-level one of the standard library, or a subpackage of a package (`scipy/stats`).
    """
    seen: set[str] = set()
    for module, path in _sources():
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                for pair in consecutive(ast.get_docstring(node) or ""):
                    if not seen & set(pair):
                        seen.update(pair)
                        yield module, *pair


def standard_library_files() -> Iterator[tuple[str, Path]]:
    """Yield (top-level module, source file) of the standard library, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not SKIPPED_FOLDERS & set(parts):
            yield parts[0].removesuffix(".py"), path


def _sources() -> Iterator[tuple[str, Path]]:
    yield from standard_library_files()
    for package in DOCUMENTED:
        for file in sorted(importlib.metadata.distribution(package).files or []):
            if file.suffix == ".py" and file.parts[0] == package and not SKIPPED_FOLDERS & set(file.parts):
                yield "/".join(file.parts[:2]).removesuffix(".py"), Path(str(file.locate()))
