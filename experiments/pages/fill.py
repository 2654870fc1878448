"""Blocks between markers in Markdown pages and in the Markdown cells of notebooks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

MARKED = re.compile(r"<!-- data: (?P<name>\w+) -->(?P<text>.*?)<!-- end -->", re.DOTALL)
OPENING = re.compile(r"<!-- data:")

Block = Callable[[str], str]
"""A function from the name of a block to its text."""


def names(text: str) -> list[str]:
    """The names of all blocks of a page, in order. Raises ValueError where a marker has no partner."""
    marked = [match["name"] for match in MARKED.finditer(text)]
    if len(marked) != len(OPENING.findall(text)) or any(OPENING.search(m["text"]) for m in MARKED.finditer(text)):
        raise ValueError("every <!-- data: NAME --> needs an <!-- end -->, and no other marker in between")
    return marked


def filled(text: str, block: Block) -> str:
    """The same page with every block written anew. A table gets lines of its own, a number stays in its line.

    Raises ValueError where a number begins a line, since Markdown takes a line that begins with a comment for HTML.
    """
    names(text)

    def anew(match: re.Match[str]) -> str:
        content = block(match["name"])
        if "\n" in content:
            content = f"\n\n{content.strip()}\n\n"
        elif not text[: match.start()].rpartition("\n")[2].strip():
            raise ValueError(f"the number {match['name']} begins a line; put a word before it")
        return f"<!-- data: {match['name']} -->{content}<!-- end -->"

    return MARKED.sub(anew, text)


def read(path: Path) -> str:
    """The Markdown of a page, or of all Markdown cells of a notebook."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    return "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown")


def refreshed(path: Path, block: Block) -> str:
    """The text of a file with every block written anew; a notebook changes in its Markdown cells alone."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return filled(text, block)
    notebook = json.loads(text)
    changed = False
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown" and (anew := filled(source, block)) != source:
            cell["source"], changed = anew.splitlines(keepends=True), True
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n" if changed else text
