"""The documentation covers the public names and the files, and the pages made from the code are up to date."""

from __future__ import annotations

import dataclasses
import inspect
import json
import pkgutil
import re
from pathlib import Path

import pytest

import rasa_theory
from docs import generate
from rasa_theory.bounds import BoundName

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTED = [
    name
    for page in sorted((ROOT / "docs" / "reference" / "api").glob("*.md"))
    for name in re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), re.MULTILINE)
]
FUNCTIONS = [name for name in DOCUMENTED if inspect.isfunction(pkgutil.resolve_name(name))]
RECORDS = [
    name
    for name in DOCUMENTED
    if dataclasses.is_dataclass(pkgutil.resolve_name(name)) or hasattr(pkgutil.resolve_name(name), "_fields")
]
LETTERS_ONLY = ("rank_floor", "stack_floor", "clipped_floor", "split_floor", "dual_value", "two_sided_value")
"""Floors, whose docstrings are a formula and its proof."""


def items(name: str, *titles: str) -> list[str]:
    """The names listed in sections of the docstring of `name`."""
    text = inspect.getdoc(pkgutil.resolve_name(name)) or ""
    sections = re.findall(rf"^(?:{'|'.join(titles)}):\n((?:    .*\n?|\n(?=    ))+)", text, re.MULTILINE)
    return [item for section in sections for item in re.findall(r"^    (\w+):", section, re.MULTILINE)]


def test_every_public_name_is_in_the_reference() -> None:
    modules = {name for name in rasa_theory.__all__ if inspect.ismodule(getattr(rasa_theory, name))}
    public = {f"rasa_theory.{name}" for name in rasa_theory.__all__ if name not in modules | {"__version__"}}
    assert public <= set(DOCUMENTED)
    assert len(set(DOCUMENTED)) == len(DOCUMENTED)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_public_function_describes_its_arguments_and_its_result(name: str) -> None:
    if name.endswith(LETTERS_ONLY):
        assert "Proof" in (inspect.getdoc(pkgutil.resolve_name(name)) or "")
        return
    parameters = inspect.signature(pkgutil.resolve_name(name)).parameters
    assert items(name, "Arguments") == list(parameters)
    assert "\nReturns:\n    " in (inspect.getdoc(pkgutil.resolve_name(name)) or "")


@pytest.mark.parametrize("name", RECORDS)
def test_a_public_class_describes_its_fields(name: str) -> None:
    own = pkgutil.resolve_name(name).__annotations__  # without inherited ones, such as those of peft's configuration
    aliases = {"rasa_k", "rasa_alpha", "rasa_dropout", "rasa_d_init"}
    assert items(name, "Arguments", "Attributes") == [field for field in own if field not in aliases]


def test_every_field_of_the_json_files_is_described() -> None:
    for name in generate.SCHEMAS:
        page = generate.results_json()
        assert f"## {name}.json" in page
        assert not [line for line in page.splitlines() if line.startswith("| `") and line.endswith("|  |")]


def test_the_schema_has_every_name_of_a_floor() -> None:
    schema = json.loads((ROOT / "rasa_theory" / "data" / "results.schema.json").read_text(encoding="utf-8"))
    names = {str(name) for name in BoundName} - {BoundName.ALLOCATION}
    probable = {f"{name}, probable" for name in names - {BoundName.ZERO}}
    assert set(schema["$defs"]["run"]["properties"]["lower_bound_name"]["enum"]) == names | probable


@pytest.mark.parametrize("page", generate.PAGES)
def test_pages_made_from_the_code_are_up_to_date(page: str) -> None:
    text = (generate.DOCS / page).read_text(encoding="utf-8")
    assert text == generate.text_of(page), "run python -m docs.generate"


def test_the_tests_and_functions_that_the_theory_names_exist() -> None:
    code = "".join(
        path.read_text(encoding="utf-8") for room in ("tests", "rasa_theory") for path in (ROOT / room).rglob("*.py")
    )
    for page in ("theorem", "certificates"):
        text = (ROOT / "docs" / "theory" / f"{page}.md").read_text(encoding="utf-8")
        names = re.findall(r"`(test_\w+|\w+_floor|\w+_value|solve_\w+|mixing_drop|allocation_bound)`", text)
        assert len(names) > 5
        assert [name for name in names if f"def {name}(" not in code] == []
