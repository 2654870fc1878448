"""The command; see the package."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from experiments.pages import __doc__ as description
from experiments.pages.blocks import BLOCKS, block
from experiments.pages.fill import refreshed
from experiments.pages.words import ROOT


def pages(root: Path) -> list[Path]:
    """All files that may hold blocks."""
    return [root / "README.md", *sorted(root.glob("docs/**/*.md")), *sorted(root.glob("notebooks/*.ipynb"))]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="name the pages that are stale, and change nothing")
    parser.add_argument("--list", action="store_true", help="print the names of all blocks")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of the repository with the pages (%(default)s)")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(f"{name:28} {(function.__doc__ or '').partition('.')[0]}" for name, function in BLOCKS.items()))
        return 0
    stale = 0
    for path in pages(options.root):
        try:
            text = refreshed(path, block)
        except ValueError as error:
            parser.error(f"{path.relative_to(options.root)}: {error}")
        if text != path.read_text(encoding="utf-8"):
            stale += 1
            print(f"{path.relative_to(options.root)}: {'stale' if options.check else 'written'}")
            if not options.check:
                path.write_text(text, encoding="utf-8")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
