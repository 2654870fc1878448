"""Write the pages that follow from the code: flags, JSON files, mutations and experiments.

python -m docs.generate            write them
python -m docs.generate --check    exit with status 1 if one is not up to date
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
NOTE = "<!-- Written by `python -m docs.generate`. Change the code that it reads, not this page. -->\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table. Bars in cells are escaped."""
    lines = [tuple(head), ("---",) * len(head), *(tuple(cell.replace("|", "\\|") for cell in row) for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


# ---- the command line


def command_line() -> str:
    from rasa_theory.commands.main import COMMANDS

    page = """# Command line

`rasa COMMAND` and `python -m rasa_theory COMMAND` are the same. This page lists the flags of `rasa COMMAND --help`. A
value in parentheses at the end of a meaning is the default.

"""
    rows = [(f"[`rasa {name}`](#rasa-{name})", purpose) for name, (purpose, _) in COMMANDS.items()]
    page += table(("command", "shows"), rows)
    page += """
| exit status | meaning |
| --- | --- |
| 0 | all is well |
| 1 | a checked law failed (`reconstruct`, `verify`) |
| 2 | bad input or usage, which one sentence names |
| 130 | interrupted; the same command resumes where it can |
"""
    return page + "".join(map(_command, COMMANDS))


def _command(name: str) -> str:
    parser: argparse.ArgumentParser = importlib.import_module(f"rasa_theory.commands.{name}").flag_parser()
    formatter = parser._get_formatter()  # expands defaults in help texts as --help does
    page = f"\n## rasa {name}\n\n{_prose(parser.description or '')}"
    for group in parser._action_groups:
        rows = [
            (_flag(action), formatter._expand_help(action) if action.help else "")
            for action in group._group_actions
            if action.help != argparse.SUPPRESS and action.dest not in ("help", "version")
        ]
        title = "" if group.title in ("options", "positional arguments") else f"\n**{group.title}**\n"
        if rows:
            page += title + "\n" + table(("flag", "meaning"), rows)
    return page + ("\n" + _prose(parser.epilog) if parser.epilog else "")


def _flag(action: argparse.Action) -> str:
    """The spellings of a flag, and the value that it takes."""
    spellings = ", ".join(f"`{option}`" for option in action.option_strings)
    if action.choices is not None:
        return f"{spellings} " + " or ".join(f"`{choice}`" for choice in action.choices)
    if action.nargs == 0:
        return spellings
    value = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    return f"{spellings} `{value}{' ..' if action.nargs in ('+', '*') else ''}`"


def _prose(text: str) -> str:
    """Text of a help: lines that begin with a space are commands."""
    lines: list[str] = []
    for line in text.split("\n"):
        is_code = line.startswith(" ")
        if is_code != (bool(lines) and lines[-1].startswith("    ")):
            lines.append("")
        lines.append(f"    {line.strip()}" if is_code else line)
    return "\n".join(lines).strip("\n") + "\n"


# ---- JSON files

SCHEMAS = {
    "results": "`rasa reconstruct` writes it, and `rasa_theory.study` returns the same data.",
    "report": "`rasa extract` writes it into the folder of the adapter.",
    "inspect": "`rasa inspect` writes it, and `rasa_theory.inspect` returns the same data.",
    "verify": "`rasa verify` writes it.",
}


def results_json() -> str:
    page = """# JSON files

The commands write their results as JSON. A [JSON Schema](https://json-schema.org) for each file is part of the package,
in `rasa_theory/data/`. A field in brackets, such as `[processes]`, is there only if it applies.
"""
    for name, written in SCHEMAS.items():
        schema = json.loads((ROOT / "rasa_theory" / "data" / f"{name}.schema.json").read_text(encoding="utf-8"))
        page += f"\n## {name}.json\n\n{written} Schema: `{name}.schema.json`.\n\n{schema['description']}\n"
        page += "\n" + _fields(schema, schema)
        for part, node in schema.get("$defs", {}).items():
            if "properties" in node:
                page += f"\n### {part}\n\n" + _fields(node, schema)
    return page


def _fields(node: dict[str, Any], schema: dict[str, Any]) -> str:
    rows = [(f"`{path}`", _type(field, schema), field.get("description", "")) for path, field in _walk(node, "")]
    return table(("field", "type", "meaning"), rows)


def _walk(node: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The fields of an object and of the objects within it, by their paths. Definitions have tables of their own."""
    for part in node.get("anyOf", []):
        yield from _walk(part, path)
    for name, field in node.get("properties", {}).items():
        is_optional = name not in node.get("required", [])
        here = f"{path}[{name}]" if is_optional else f"{path}{name}"
        yield here, field
        yield from _walk(field.get("items", field), here + ("[]." if "items" in field else "."))
    if isinstance(node.get("additionalProperties"), dict):
        yield f"{path}NAME", node["additionalProperties"]


def _type(field: dict[str, Any], schema: dict[str, Any]) -> str:
    if "$ref" in field:
        part = field["$ref"].rpartition("/")[2]
        target = schema["$defs"][part]
        return f"[{part}](#{part})" if "properties" in target else _type(target, schema)
    if "const" in field:
        return f"`{json.dumps(field['const'])}`"
    if "enum" in field:
        return " or ".join(f"`{value}`" for value in field["enum"])
    if "anyOf" in field:
        return " or ".join(_type(part, schema) for part in field["anyOf"])
    kinds = field["type"] if isinstance(field["type"], list) else [field["type"]]
    return " or ".join(_array(field, schema) if kind == "array" else kind for kind in kinds)


def _array(field: dict[str, Any], schema: dict[str, Any]) -> str:
    least, most = field.get("minItems"), field.get("maxItems")
    count = f"{most} x " if most is not None and least == most else "array of "
    return count + _type(field["items"], schema) if "items" in field else "array"


# ---- mutations


def mutations() -> str:
    entries = tomllib.loads((ROOT / "tests" / "mutations.toml").read_text(encoding="utf-8"))["mutation"]
    rooms = Counter("/".join(Path(entry["file"]).parts[:2]) for entry in entries)
    rows = [(f"`{room}`", str(count)) for room, count in sorted(rooms.items())]
    return f"""# Mutations

A test that cannot fail is worth nothing. So the code is broken on purpose, one line at a time, and a named test has to
notice. `tests/mutations.toml` has {len(entries)} such entries:

```toml
[[mutation]]
what = 'sigma_r counted in the tail after r'
file = 'rasa_theory/linalg/dense.py'
old = '(sigma[..., rank:] ** 2)'
new = '(sigma[..., max(rank - 1, 0) :] ** 2)'
test = 'tests/linalg/test_dense.py::test_tail_energy'
```

`old` must occur exactly once in `file`. The test must pass without the mutation, and fail with it. `timeout = true`
allows it to hang as well.

    python -m tests.mutate --jobs 2         # all of them, in a copy of the repository
    python -m tests.mutate --only GLOB      # those whose file, text or test matches
    python -m tests.mutate --check          # only whether every `old` occurs exactly once

The exit status is 0 if every mutation is noticed, 1 if one is not, and 2 if the table or the options are wrong. Add an
entry for every formula that a test protects.

{table(("code", "mutations"), rows)}"""


# ---- experiments


def experiments() -> str:
    from experiments.figures import duration
    from experiments.registry import EXPERIMENTS

    rows = [
        (
            f"`{name}`",
            "<br>".join(f"`python {command.replace('{out}', 'figures')}`" for command in experiment.commands),
            ", ".join(f"[{picture}](../../figures/{picture}.png)" for picture in experiment.pictures),
            duration(name, ROOT / "figures"),
            experiment.needs or "",
        )
        for name, experiment in EXPERIMENTS.items()
    ]
    others = [(f"`python -m experiments.{name}`", purpose) for name, purpose in _scripts() if name not in EXPERIMENTS]
    return f"""# Experiments

Every number of the result pages comes from a script in `experiments/`, which runs as `python -m experiments.NAME` from
the root of a checkout. Its data lie in `figures/`, beside the pictures that are drawn from them. An interrupted run
resumes where it can.

    python -m experiments.figures                     # draw every picture again from its data, in seconds
    python -m experiments.figures --from-scratch      # make the data first, by the commands below

## With a picture

The time is that of the last run of all commands on the machine that `figures/seconds.json` names.

{table(("experiment", "commands", "pictures", "time", "needs"), rows)}
## Without a picture, and tools

{table(("command", "purpose"), others)}"""


def _scripts() -> Iterator[tuple[str, str]]:
    """The modules of `experiments` that can be run, each with the first sentence of its docstring."""
    for path in sorted((ROOT / "experiments").iterdir()):
        main = path / "__main__.py"
        file = path if path.suffix == ".py" else path / "__init__.py"
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        if "__main__" in text or main.exists():
            purpose = (ast.get_docstring(ast.parse(text)) or "").partition("\n\n")[0].replace("\n", " ")
            yield path.stem, purpose.removeprefix(f"python -m experiments.{path.stem}: ")


PAGES = {
    "reference/command_line.md": command_line,
    "reference/results_json.md": results_json,
    "development/mutations.md": mutations,
    "development/experiments.md": experiments,
}


def text_of(page: str) -> str:
    """The text of one of `PAGES`, as it follows from the code."""
    return f"{NOTE}\n{PAGES[page]()}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with status 1 if a page differs")
    is_check = parser.parse_args(arguments).check
    written = {DOCS / page: text_of(page) for page in PAGES}
    stale = {path: text for path, text in written.items() if path.read_text(encoding="utf-8") != text}
    for path, text in stale.items():
        if is_check:
            print(f"{path.relative_to(ROOT)} is not up to date; run python -m docs.generate", file=sys.stderr)
        else:
            path.write_text(text, encoding="utf-8")
    return 1 if is_check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
