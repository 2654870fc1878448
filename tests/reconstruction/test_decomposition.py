"""The parts of the gain on stacks whose answer is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import rasa_theory as rt
from rasa_theory.sources import synthetic_stack
from tests.helpers.problems import noise

CLOSE = 1e-9


def of_spectra(spectra: Tensor, seed: int = 0) -> rt.LayerStack:
    """Layers of the given singular values (L, m), with bases that have nothing in common: orthogonal blocks."""
    L, m = spectra.shape
    generator = torch.Generator().manual_seed(seed)
    U, V = (
        torch.linalg.qr(torch.randn(L * m, L * m, generator=generator, dtype=torch.float64))[0]
        .reshape(L * m, L, m)
        .transpose(0, 1)
        for _ in range(2)
    )
    return rt.LayerStack((U * spectra[:, None]) @ V.mT)


def test_identical_layers_gain_by_sharing_alone() -> None:
    """One pool of L k terms serves all layers: LoRA of rank r - k + L k for each. Equal spectra allocate nothing."""
    sigma = torch.arange(8, 0, -1, dtype=torch.float64)
    M = torch.diag(sigma)[None].repeat(3, 1, 1)
    parts = rt.gain(rt.LayerStack(M), rt.RankBudget(2, 1))
    lora, rasa = 3 * float((sigma[2:] ** 2).sum()), 3 * float((sigma[4:] ** 2).sum())
    assert parts.e_lora == pytest.approx(lora, rel=CLOSE)
    assert parts.e_allocation == pytest.approx(lora, rel=CLOSE)
    assert parts.e_rasa == pytest.approx(rasa, rel=1e-6)
    assert parts.allocation == pytest.approx(0, abs=CLOSE)
    assert parts.sharing == pytest.approx(1 - rasa / lora, rel=1e-6)
    assert parts.floor.value <= parts.e_rasa * (1 + CLOSE)


def test_layers_without_common_directions_gain_by_allocation_alone() -> None:
    """Layers in orthogonal row and column spaces: no term can serve two of them."""
    spectra = torch.tensor([[4.0, 3.0, 2.0], [1.0, 0.5, 0.25]], dtype=torch.float64)
    parts = rt.gain(of_spectra(spectra), rt.RankBudget(1, 1))
    assert parts.e_lora == pytest.approx(9 + 4 + 0.25 + 0.0625, rel=CLOSE)
    assert parts.e_allocation == pytest.approx(4 + 1 + 0.25 + 0.0625, rel=CLOSE)
    assert parts.allocation == pytest.approx(8 / 13.3125, rel=CLOSE)
    assert parts.sharing == pytest.approx(0, abs=1e-6)
    assert parts.e_rasa == pytest.approx(parts.e_allocation, rel=1e-6)


def test_equal_spectra_have_nothing_to_allocate() -> None:
    stack = synthetic_stack(4, (12, 10), "power:0.7", 0.5, 0)
    parts = rt.gain(stack, rt.RankBudget(3, 1), rt.SolverOptions(max_sweeps=10, effort="quick"))
    assert parts.allocation == pytest.approx(0, abs=CLOSE)
    assert parts.sharing > 0.01


def test_the_parts_and_the_floor_add_up() -> None:
    stack, budget = rt.LayerStack(noise(3, 9, 8)), rt.RankBudget(2, 1)
    parts = rt.gain(stack, budget, rt.SolverOptions(max_sweeps=10, effort="quick"))
    left = parts.floor.value / parts.e_lora
    assert parts.allocation + parts.sharing + parts.unknown + left == pytest.approx(1, abs=CLOSE)
    assert min(parts.allocation, parts.sharing, parts.unknown) >= 0


@pytest.mark.slow
def test_a_solution_that_is_there_is_not_solved_again_and_a_better_floor_leaves_less_unknown() -> None:
    stack, budget = rt.LayerStack(noise(3, 9, 8)), rt.RankBudget(2, 1)
    solution = rt.solve_rasa(stack, budget, rt.SolverOptions(max_sweeps=10, effort="quick"))
    parts = rt.gain(stack, budget, solution=solution)
    assert parts.e_rasa == solution.error
    better = rt.gain(stack, budget, solution=solution, certificate="two-sided")
    assert better.floor.name == "two-sided"
    assert better.unknown < parts.unknown


def test_exact_layers_have_no_parts() -> None:
    parts = rt.gain(rt.LayerStack(torch.zeros(2, 4, 3)), rt.RankBudget(1, 1))
    assert (parts.e_lora, parts.allocation, parts.sharing, parts.unknown) == (0, 0, 0, 0)


def test_a_rank_that_does_not_fit_is_refused() -> None:
    with pytest.raises(rt.InputError, match="rank 9 exceeds min"):
        rt.gain(rt.LayerStack(noise(3, 9, 8)), rt.RankBudget(9, 1))


def test_layers_of_no_higher_rank_have_no_parts() -> None:
    """LoRA is exact but for rounding; the residual of a solution is another rounding error, and no share of it."""
    z = noise(3, 9, 8)
    parts = rt.gain(rt.LayerStack(z[:, :, :2] @ z[:, :2]), rt.RankBudget(2, 1), rt.SolverOptions(max_sweeps=5))
    assert (parts.e_lora, parts.allocation, parts.sharing, parts.unknown) == (0, 0, 0, 0)
    assert parts.e_rasa == pytest.approx(0, abs=1e-20)


def test_a_solution_of_other_layers_or_ranks_is_refused() -> None:
    M, budget, options = noise(3, 9, 8), rt.RankBudget(2, 1), rt.SolverOptions("allocation", max_sweeps=1)
    stack = rt.LayerStack(M)
    for other, ranks in ((M, rt.RankBudget(3, 1)), (M, rt.RankBudget(2, 2)), (M[:2], budget), (M[:, :5], budget)):
        solution = rt.solve_rasa(rt.LayerStack(other), ranks, options)
        with pytest.raises(rt.InputError, match="the solution has"):
            rt.gain(stack, budget, solution=solution)
