"""A room imports only from lower floors, through their faces, and only the commands print."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import rasa_theory

ROOT = Path(rasa_theory.__file__).parent
FLOORS = (
    "common",
    "plotting distributed",
    "linalg",
    "problem",
    "bounds formats",
    "solvers sources peft",
    "methods reconstruction verification extraction inspection",
    "commands",
    "__init__ __main__ reconstruct verify extract inspect",
)
ROOMS = " ".join(FLOORS[:-2]).split()
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms.split()}


def nodes() -> Iterator[tuple[Path, str, ast.AST]]:
    """Every node of the package's code, with its file and room."""
    for path in sorted(ROOT.rglob("*.py")):
        file = path.relative_to(ROOT)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            yield file, file.parts[0].removesuffix(".py"), node


def test_a_room_imports_only_the_faces_of_lower_floors() -> None:
    wrong, faces = [], {room: importlib.import_module(f"rasa_theory.{room}").__all__ for room in ROOMS}
    for file, room, node in nodes():
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rasa_theory":
            for name in node.names:
                there, *inside = f"{node.module}.{name.name}".split(".")[1:]
                is_lower = FLOOR.get(there, len(FLOORS)) < FLOOR[room]
                is_through_face = there == "commands" or not inside or inside[0] in faces[there]
                if there != room and not (is_lower and is_through_face):
                    wrong.append(f"{file}: from {node.module} import {name.name}")
    assert wrong == []


def test_only_the_commands_print() -> None:
    printing = {
        room
        for _, room, node in nodes()
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    assert printing == {"commands"}


def test_the_package_is_imported_without_what_only_its_commands_and_figures_need() -> None:
    code = "import sys; sys.modules['matplotlib'] = sys.modules['rich'] = None; import rasa_theory as rt; "
    code += "[getattr(rt, name) for name in rt.__all__]"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
