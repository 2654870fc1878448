"""Stacks of products B_i A_i that are never multiplied out, beside the same matrices as they are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import rasa_theory as rt
from rasa_theory.problem import Factored, normalised_layers
from tests.helpers.problems import noise


def both(L: int = 3, b: int = 14, a: int = 12, m: int = 3, seed: int = 0) -> tuple[rt.LayerStack, rt.LayerStack]:
    """The same stack as factors and as matrices; the last layer has one term less."""
    B, A = torch.as_tensor(noise(L, b, m, seed)) * 100, torch.as_tensor(noise(L, m, a, seed + 1))
    B[-1, :, -1], A[-1, -1] = 0, 0
    return rt.LayerStack(Factored(B, A)), rt.LayerStack(B @ A)


@pytest.mark.parametrize(("b", "a", "m"), [(14, 12, 3), (12, 14, 3), (5, 4, 4), (4, 5, 6)])
def test_a_factored_stack_computes_what_the_dense_one_does(b: int, a: int, m: int) -> None:
    one, other = both(b=b, a=a, m=m)
    for view in (lambda s: s, lambda s: s.unit(), lambda s: s.transpose(), lambda s: s.unit().transpose()):
        x, y = view(one), view(other)
        (b, a), before = x.shape, (x.data_passes, y.data_passes)
        close = {"rtol": 0, "atol": 1e-12 * float(y.values.norm())}
        X, Y = torch.as_tensor(noise(3, a, 2)), torch.as_tensor(noise(3, b, 2))
        for factor in (X, X[0]):
            torch.testing.assert_close(x.right(factor), y.right(factor), **close)
        for factor in (Y, Y[0]):
            torch.testing.assert_close(x.left(factor), y.left(factor), **close)
        for rows in (None, 1, 5):
            for found, expected in zip(x.tiles(rows), y.tiles(rows), strict=True):
                assert found[:2] == expected[:2]
                torch.testing.assert_close(found.values, expected.values, **close)
        torch.testing.assert_close(x.values, y.values, **close)
        torch.testing.assert_close(x.spectra.gram(), y.spectra.gram(), rtol=0, atol=1e-12 * y.norm_squared)
        assert x.layer_norms_squared == pytest.approx(y.layer_norms_squared, rel=1e-13)
        U, S, Vh = x.spectra.svd()
        torch.testing.assert_close(S, y.spectra.svd().S, **close)
        torch.testing.assert_close((U * S[:, None]) @ Vh, y.values, **close)
        eye = torch.eye(min(b, a), dtype=torch.float64).expand(3, -1, -1)
        torch.testing.assert_close(U.mT @ U, eye, rtol=0, atol=1e-13)
        torch.testing.assert_close(Vh @ Vh.mT, eye, rtol=0, atol=1e-13)
        assert x.data_passes - before[0] == y.data_passes - before[1]


def test_products_and_svds_never_form_a_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = both()[0]
    monkeypatch.setattr(Factored, "rows", lambda *_: pytest.fail("a matrix is formed"))
    stack.right(torch.ones(12, 1, dtype=torch.float64))
    stack.left(torch.ones(14, 1, dtype=torch.float64))
    stack.spectra.svd()
    assert stack.data_passes == 3


@pytest.mark.slow
@pytest.mark.parametrize("rank", [2, 5])  # below and above that of the factors
def test_solutions_and_floors_agree_with_the_dense_stack(rank: int) -> None:
    one, other = both()
    budget, tolerance = rt.RankBudget(rank, 1), 1e-8 * other.norm_squared
    lora, expected = rt.solve_lora(one, rank), rt.solve_lora(other, rank)
    assert lora.layer_errors == pytest.approx(expected.layer_errors, rel=1e-10, abs=1e-20 * other.norm_squared)
    assert rt.layer_errors(one, lora.factors) == pytest.approx(
        rt.layer_errors(other, lora.factors), rel=1e-10, abs=1e-20 * other.norm_squared
    )
    rasa, expected_rasa = (rt.solve_rasa(stack, budget, rt.SolverOptions(effort="quick")) for stack in (one, other))
    assert rasa.error == pytest.approx(expected_rasa.error, abs=tolerance)
    assert rt.allocation_bound(one, budget).value == pytest.approx(
        rt.allocation_bound(other, budget).value, rel=1e-10, abs=1e-20 * other.norm_squared
    )
    assert rt.lower_bound(one, budget).value == pytest.approx(rt.lower_bound(other, budget).value, abs=tolerance)


def test_layers_of_unit_norm_stay_factored() -> None:
    B, A = torch.as_tensor(noise(3, 14, 2)), torch.as_tensor(noise(3, 2, 12))
    B[1], B[2] = 0, 1e-170 * B[2]
    one, other = rt.LayerStack(Factored(B, A)), rt.LayerStack(B @ A)
    for view in (lambda s: s, lambda s: s.unit(), lambda s: s.transpose()):
        (x, norms), (y, expected) = (normalised_layers(view(s)) for s in (one, other))
        assert isinstance(x.entries.storage, Factored)
        torch.testing.assert_close(x.values, y.values, rtol=1e-12, atol=1e-14)
        assert norms == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize(
    ("B", "A", "sentence"),
    [
        (torch.ones(2, 5, 3), torch.ones(2, 2, 4), r"found \(2, 5, 3\) and \(2, 2, 4\)"),
        (torch.ones(2, 5, 3), torch.ones(3, 3, 4), r"found \(2, 5, 3\) and \(3, 3, 4\)"),
        (torch.ones(5, 3), torch.ones(3, 4), r"found \(5, 3\) and \(3, 4\)"),
        (torch.ones(2, 5, 0), torch.ones(2, 0, 4), "without an empty axis"),
        (torch.ones(2, 5, 3), torch.ones(2, 3, 4).double(), "factor B is torch.float32 on cpu, A is torch.float64"),
        (torch.ones(2, 5, 3).int(), torch.ones(2, 3, 4).int(), "factors of torch.int32 are not real floating point"),
    ],
)
def test_factors_that_do_not_fit(B: Tensor, A: Tensor, sentence: str) -> None:
    with pytest.raises(rt.InputError, match=sentence):
        rt.LayerStack(Factored(B, A))
