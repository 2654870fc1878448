"""One version everywhere, schemas that name theirs, a source distribution that makes the wheel and runs the tests."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import jsonschema
import pytest
import yaml

import rasa_theory

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rasa_theory"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TESTED = ("docs", "experiments", "figures", "notebooks", "tests")
"""Folders beside the package that tests read."""
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"


def files(folder: Path) -> set[str]:
    """The files in a folder by their paths from its parent, without caches and what only studies of sharing need."""
    paths = (path.relative_to(folder.parent) for path in folder.rglob("*") if path.is_file())
    return {
        str(path)
        for path in paths
        if not path.name.startswith(("mpnet_", "."))
        and not any(part == "__pycache__" or part.startswith(".") for part in path.parts)
    }


def test_the_citation_names_the_version_of_the_package() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == rasa_theory.__version__


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("data/*.schema.json")), ids=lambda path: path.name)
def test_a_schema_names_itself_and_its_version(path: Path) -> None:
    schema = json.loads(path.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    version = schema["properties"]["schema"]["const"]
    assert schema["$id"] == f"urn:rasa-theory:schema:{path.name.removesuffix('.schema.json')}:{version}"
    assert "schema" in schema["required"]


@pytest.mark.slow
def test_the_source_distribution_holds_all_for_the_tests_and_for_the_wheel(tmp_path: Path) -> None:
    def build(what: str, folder: Path) -> None:
        run = subprocess.run([sys.executable, "-c", BUILD, what, str(tmp_path)], cwd=folder, capture_output=True)
        assert run.returncode == 0, run.stderr.decode()

    build("build_sdist", ROOT)
    name = f"rasa_theory-{rasa_theory.__version__}"
    with tarfile.open(tmp_path / f"{name}.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    for folder in TESTED:
        assert files(ROOT / folder) - files(tmp_path / name / folder) == set()
    build("build_wheel", tmp_path / name)
    with zipfile.ZipFile(tmp_path / f"{name}-py3-none-any.whl") as wheel:
        modules = {path for path in wheel.namelist() if not path.startswith(name)}
        scripts = wheel.read(f"{name}.dist-info/entry_points.txt").decode()
    assert modules == files(PACKAGE)
    assert [script for script in PROJECT["project"]["scripts"] if f"{script} = " not in scripts] == []
