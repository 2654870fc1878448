"""The squared error: of the solvers and of the public checker, against the equation and each other."""

import numpy as np
import pytest
import torch

from rasa_theory import (
    InputError,
    LayerStack,
    LoraFactors,
    RankBudget,
    RasaFactors,
    layer_errors,
    reconstruction_error,
    solve_lora,
)
from rasa_theory.problem import StackEntries, layer_residuals, squared_error, squared_errors
from rasa_theory.solvers import STARTS, random_start
from tests.helpers import reference
from tests.helpers.problems import SHAPES, noise, planted


def factors_for(L, b, a, r, k, seed):
    """Random factors of order one, and the same for the reference."""
    q, R = r - k, L * k
    shapes = (L, b, q), (L, q, a), (1, b, R), (1, R, a), (1, L, R)
    Bt, At, B_S, A_S, D = (noise(*shape, seed + n) for n, shape in enumerate(shapes))
    plain = reference.Factors(Bt, At, B_S[0], A_S[0], D[0])
    return RasaFactors(*(torch.as_tensor(x) for x in plain)), plain


@pytest.mark.parametrize(("L", "b", "a", "r", "k", "seed"), SHAPES)
def test_against_the_equation(L, b, a, r, k, seed, monkeypatch):
    monkeypatch.setattr(StackEntries, "tile_elements", 2 * a + 1)  # tiles of two rows
    M = noise(L, b, a, seed)
    factors, plain = factors_for(L, b, a, r, k, seed)
    stack, E = LayerStack(M), reference.residuals(M, *plain)
    assert layer_errors(stack, factors) == pytest.approx((E**2).sum((1, 2)).tolist(), rel=1e-13)
    assert reconstruction_error(stack, factors) == pytest.approx(reference.error(M, *plain), rel=1e-13)
    assert reconstruction_error(stack.transpose(), factors.transpose()) == pytest.approx((E**2).sum(), rel=1e-13)


@pytest.mark.parametrize("c", [1e100, 1e-100])
def test_far_from_one(c):
    M, (factors, plain) = noise(3, 6, 5), factors_for(3, 6, 5, 2, 1, 0)
    expected = c**2 * reference.error(M, *plain)
    assert reconstruction_error(LayerStack(c * M), factors.scaled(c)) == pytest.approx(expected, rel=1e-13)


def test_lora_factors_too():
    M, B, A = noise(2, 5, 4), noise(2, 5, 2, 1), noise(2, 2, 4, 2)
    factors = LoraFactors(torch.as_tensor(B), torch.as_tensor(A))
    assert reconstruction_error(LayerStack(M), factors) == pytest.approx(((M - B @ A) ** 2).sum(), rel=1e-13)


def test_zero_is_found_exactly_and_float32_is_measured_in_float64():
    """||M||^2 - 2 <M, X> + ||X||^2 would give some 1e-6 here."""
    factors = RasaFactors(*(t.float() for t in factors_for(3, 6, 5, 2, 1, 0)[0].named().values()))
    exact = np.stack([factors.to(torch.float64).update(i) for i in range(3)])
    assert reconstruction_error(LayerStack(exact), factors) <= 1e-30 * float((exact**2).sum())
    rounded = reconstruction_error(LayerStack(exact.astype(np.float32)), factors)
    assert 0 < rounded <= (np.finfo(np.float32).eps / 2) ** 2 * (exact**2).sum()


def test_it_reads_the_data_once():
    stack = LayerStack(planted().values)
    reconstruction_error(stack, random_start(stack, RankBudget(2, 1)))
    assert stack.data_passes == 1


@pytest.mark.parametrize("shape", [(2, 6, 5), (3, 5, 5), (3, 6, 6)])
@pytest.mark.parametrize("start", ["allocation", "lora", "random"])
def test_factors_of_another_stack_are_refused(shape, start):
    factors = STARTS[start].make(LayerStack(noise(*shape)), RankBudget(2, 1), 0)
    with pytest.raises(InputError, match=f"{shape[0]} layers of {shape[1]} x {shape[2]}, stack 'mine' has 3 of 6 x 5"):
        reconstruction_error(LayerStack(noise(3, 6, 5), "mine"), factors)


@pytest.mark.parametrize(("L", "b", "a", "r", "k", "seed"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_solvers_report_is_what_the_independent_checker_measures(L, b, a, r, k, seed, dtype):
    stack = LayerStack(torch.as_tensor(noise(L, b, a, seed)).to(dtype))
    for factors in (factors_for(L, b, a, r, k, seed)[0].to(dtype), solve_lora(stack, r).factors):
        assert squared_errors(stack, factors) == pytest.approx(layer_errors(stack, factors), rel=1e-12)
        assert squared_error(stack, factors) == pytest.approx(reconstruction_error(stack, factors), rel=1e-12)
        assert layer_residuals(stack.values, factors) == pytest.approx(layer_errors(stack, factors), rel=1e-12)


def test_the_checker_uses_no_product_and_no_update_of_the_package(monkeypatch):
    M, (factors, plain) = noise(3, 6, 5), factors_for(3, 6, 5, 2, 1, 0)
    for owner, name in ((RasaFactors, "update"), (LayerStack, "right"), (LayerStack, "left")):
        monkeypatch.setattr(owner, name, lambda *_: pytest.fail("code of the solvers is called"))
    assert reconstruction_error(LayerStack(M), factors) == pytest.approx(reference.error(M, *plain), rel=1e-13)
