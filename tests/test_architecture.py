"""A module imports only from lower floors, and only the commands print."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import rasa_theory

ROOT = Path(rasa_theory.__file__).parent
FLOORS = [
    {"errors", "_version"},
    {"distributed"},
    {"linalg", "layers", "console", "storage", "ranks", "style"},
    {"bases", "inputs"},
    {"problem", "spectra", "algebra"},
    {"factors"},
    {"sources", "objective", "bounds"},
    {"lora", "updates", "subspaces", "exports"},
    {"inner", "adapter", "ownership"},
    {"starts", "core", "exchange"},
    {"descent"},
    {"rasa", "attempts"},
    {"study", "bench", "extraction", "flags", "methods"},
    {"plotting", "report", "extract_report", "workplace"},
    {"preflight"},
    {"reconstruct", "verify", "extract"},
]
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def modules() -> list[Path]:
    return [path for path in sorted(ROOT.rglob("*.py")) if room_of(path) != "__init__"]


def test_every_module_has_a_floor() -> None:
    assert {room_of(path) for path in modules()} == set(FLOOR)


def test_imports_point_downwards() -> None:
    wrong = []
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rasa_theory":
                named = [f"{node.module}.{alias.name}".split(".")[1] for alias in node.names]
                for there in {name for name in named if name in FLOOR} - {room_of(path)}:
                    if FLOOR[there] >= FLOOR[room_of(path)]:
                        wrong.append(f"{path.relative_to(ROOT)} imports {there}")
    assert wrong == []


def test_only_the_commands_print() -> None:
    printing = {
        room_of(path)
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    assert printing == {"console", "reconstruct", "verify", "extract"}


def test_the_package_is_imported_without_what_only_its_commands_and_figures_need() -> None:
    code = "import sys; sys.modules['matplotlib'] = sys.modules['tqdm'] = None; import rasa_theory"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
