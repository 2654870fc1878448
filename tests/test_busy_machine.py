"""On a machine with other users: OpenMP waits passively, and work on small layers stays on one thread."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import rasa_theory as rt
from tests.helpers.problems import decaying

ROOT = Path(__file__).parents[1]

# ---- passive waiting

LOOKED_AT = """
import importlib, os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("KMP_BLOCKTIME"))
            raise SystemExit

sys.meta_path.insert(0, Watch())
importlib.import_module(sys.argv[1])
importlib.import_module("torch")
"""


def waiting(module: str, **variables: str) -> str:
    """How OpenMP is told to wait at the moment when the first import of torch begins, while `module` is imported."""
    shared = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "KMP_BLOCKTIME")}
    command = [sys.executable, "-c", LOOKED_AT, module]
    run = subprocess.run(command, cwd=ROOT, env=shared | variables, capture_output=True, text=True, check=True)
    return run.stdout.strip()


@pytest.mark.parametrize("module", ["rasa_theory", "rasa_theory.commands.verify"])
def test_waiting_is_passive_before_torch_is_imported(module: str) -> None:
    assert waiting(module) == "PASSIVE 0"


@pytest.mark.parametrize("module", ["experiments", "tests.conftest"])
def test_experiments_and_tests_wait_passively_too(module: str) -> None:
    assert waiting(module).split()[0] == "PASSIVE"


def test_how_the_user_lets_openmp_wait_is_respected() -> None:
    assert waiting("rasa_theory", OMP_WAIT_POLICY="ACTIVE") == "ACTIVE None"
    assert waiting("rasa_theory", KMP_BLOCKTIME="20") == "PASSIVE 20"


# ---- one thread


class Threads(TorchDispatchMode):
    """Collects the number of threads of every operation within this context."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: set[int] = set()

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.counts.add(torch.get_num_threads())
        return operation(*arguments, **(options or {}))


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def small_stack() -> rt.LayerStack:
    stack = rt.LayerStack(np.stack(decaying(3, 12, 10)))
    assert stack.norm_squared > 0  # read once, as every stack is
    return stack


BUDGET = rt.RankBudget(2, 1)
WORK: dict[str, Callable[[rt.LayerStack], object]] = {
    "solve_lora": lambda stack: rt.solve_lora(stack, 2),
    "solve_rasa": lambda stack: rt.solve_rasa(stack, BUDGET, rt.SolverOptions(max_sweeps=3, effort="quick")),
    "random_attempt": lambda stack: rt.random_attempt(stack, BUDGET, 1.0, 0, iterations=3),
    "lower_bound": lambda stack: rt.lower_bound(stack, BUDGET, "dual", rt.FloorOptions(max_iterations=3)),
    "study": lambda stack: rt.study([stack], 2, (1,), seeds=1, solver=rt.SolverOptions(max_sweeps=3, effort="quick")),
    "methods": lambda stack: rt.methods.at_parameters(stack, 200, ["lora", "share_lora", "tied_lora"]),
}


@pytest.mark.slow
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("name", WORK)
def test_all_work_on_small_layers_is_on_one_thread(name: str) -> None:
    stack = small_stack()
    with Threads() as threads:
        WORK[name](stack)
    assert threads.counts == {1}
    assert torch.get_num_threads() == 2
