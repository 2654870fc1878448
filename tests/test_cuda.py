"""The same code on a GPU: the numbers of the CPU. Skipped where there is none."""

import pytest
import torch

from rasa_theory import LayerStack, RankBudget, SolverOptions, lower_bound, reconstruction_error, solve_lora, solve_rasa
from rasa_theory.linalg import Recorded
from tests.helpers.problems import falling, noise

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CASES = [(3, 60, 50, 3, 1), (3, 60, 50, 2, 0), (3, 50, 60, 2, 2), (2, 14, 14, 3, 1)]


def both(L, b, a, dtype=torch.float64):
    M = torch.as_tensor(falling(L, b, a)).to(dtype)
    return LayerStack(M), LayerStack(M, device="cuda")


@pytest.mark.parametrize(("L", "b", "a", "r", "k"), CASES)
@pytest.mark.parametrize("sweep", ["joint", "paper"])
def test_sweeps_are_those_of_the_cpu(L, b, a, r, k, sweep):
    options = SolverOptions(start="random", sweep=sweep, max_sweeps=10, rtol=0)
    here, there = (solve_rasa(stack, RankBudget(r, k), options) for stack in both(L, b, a))
    assert there.history == pytest.approx(here.history, rel=1e-8)


@pytest.mark.parametrize(("L", "b", "a", "r", "k"), CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_default_solver_ends_as_low(L, b, a, r, k, dtype):
    """Rounding changes the way, as between two processors; the error is that of the factors that come back."""
    here, there = both(L, b, a, dtype)
    found, expected = solve_rasa(there, RankBudget(r, k)), solve_rasa(here, RankBudget(r, k))
    assert found.error == pytest.approx(expected.error, rel=1e-3)
    assert found.factors.mixing.device.type == "cuda"
    on_cpu = found.factors.to(device=torch.device("cpu"))
    assert reconstruction_error(here, on_cpu) == pytest.approx(found.error, rel=1e-12)


@pytest.mark.parametrize("method", ["exact", "fast"])
def test_lora_is_that_of_the_cpu(method):
    here, there = both(2, 300, 280)
    expected = solve_lora(here, 4).error
    found = solve_lora(there, 4, method=method)
    assert found.interval[0] <= expected * (1 + 1e-12)
    assert expected * (1 - 1e-12) <= found.interval[1]
    assert found.error == pytest.approx(expected, rel=1e-5)


def test_floors_are_those_of_the_cpu():
    values = [lower_bound(stack, RankBudget(3, 1)).value for stack in both(3, 20, 18)]
    assert values[1] == pytest.approx(values[0], rel=1e-6)


def test_leading_directions_are_those_of_the_cpu():
    found, budget = [], RankBudget(3, 1)
    options = SolverOptions(start="allocation", max_sweeps=2, spectra="leading")
    for stack in both(3, 220, 200):
        found.append((solve_rasa(stack, budget, options).error, lower_bound(stack, budget, spectra="leading").value))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_storage(dtype):
    M = torch.as_tensor(noise(3, 40, 30)).to(dtype)
    options = SolverOptions(start="random", sweep="joint", max_sweeps=4, rtol=0)
    here, there = (solve_rasa(LayerStack(M, device=d), RankBudget(3, 1), options).error for d in ("cpu", "cuda"))
    assert there == pytest.approx(here, rel=1e-5)


def test_a_recording_reads_its_arguments_anew():
    x = torch.arange(3.0, device="cuda")
    torch.linalg.cholesky_ex(torch.eye(3, device="cuda"))
    recorded = Recorded(lambda x, y: (x + y, x * y))
    assert [t.tolist() for t in recorded(x, x)] == [[0, 2, 4], [0, 1, 4]]
    first = recorded(x, x + 1)
    recorded(x, x + 2)
    assert [t.tolist() for t in first] == [[1, 3, 5], [0, 2, 6]]


def test_tf32_products_are_rounded_and_the_error_is_not():
    """An A100 or later rounds the factors of products to 10 bits; others ignore it."""
    values = torch.as_tensor(noise(2, 256, 256)).float().cuda()
    exact, rounded = LayerStack(values), LayerStack(values, tf32=True)
    X = torch.randn(256, 32, device="cuda")
    change = float((exact.right(X) - rounded.right(X)).norm() / exact.right(X).norm())
    assert change < 2e-3
    assert (change > 1e-5) == (torch.cuda.get_device_capability()[0] >= 8)
    found = solve_rasa(rounded, RankBudget(4, 1), SolverOptions(start="allocation", max_sweeps=4))
    assert found.error == pytest.approx(reconstruction_error(exact, found.factors), rel=1e-12)
