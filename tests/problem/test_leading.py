"""Leading directions from products, against those of SVDs."""

import numpy as np
import pytest
import torch

from rasa_theory import InputError, LayerStack, RankBudget, SolverOptions, allocation_bound, lower_bound, solve_lora
from rasa_theory.bounds import allocate_pool, terms_within_reach
from rasa_theory.linalg import lanczos
from rasa_theory.problem import takes_leading
from rasa_theory.solvers import allocation_start
from rasa_theory.sources import StackSource
from tests.helpers.problems import noise, tail

BUDGET = RankBudget(3, 1)


def decaying(L=3, b=130, a=120, seed=0, power=0.7):
    """Unrelated layers with singular values j^-power, times 3."""
    U, S, Vh = np.linalg.svd(noise(L, b, a, seed), full_matrices=False)
    return 3 * U * np.arange(1, S.shape[1] + 1) ** -power @ Vh


def leading(M, budget=BUDGET):
    return LayerStack(M).with_spectra("leading", budget)


@pytest.mark.parametrize("view", ["as it is", "unit", "transposed"])
def test_leading_terms_are_those_of_the_svd(view):
    stack = {"as it is": leading, "unit": lambda M: leading(M).unit(), "transposed": lambda M: leading(M).transpose()}
    stack, n = stack[view](decaying()), 5
    found, exact = stack.spectra.leading(n), stack.with_spectra("exact", BUDGET).spectra.svd()
    assert torch.allclose(found.S, exact.S[:, :n], rtol=1e-5)
    assert torch.allclose((found.U * found.S[:, None]) @ found.Vh, (exact.U[:, :, :n] * exact.S[:, None, :n])
                          @ exact.Vh[:, :n], atol=1e-2 * float(exact.S.max()))  # fmt: skip
    for i in range(3):
        assert torch.allclose(found.U[i].mT @ found.U[i], torch.eye(n, dtype=torch.float64), atol=1e-6)
    following = stack.spectra.following(n)
    assert bool((following >= exact.S[:, n] * (1 - 1e-12)).all())
    assert bool((following <= 1.2 * exact.S[:, n]).all())
    captured = (exact.S[:, :n] ** 2).sum(1).tolist()
    for most, true, norm in zip(stack.spectra.most_captured(n), captured, stack.layer_norms_squared, strict=True):
        assert true * (1 - 1e-12) <= most <= true + 1e-5 * norm


@pytest.mark.parametrize("transposed", [False, True])
def test_common_directions_are_the_leading_eigenvectors_of_the_sum(transposed):
    stack = leading(decaying(a=100)).unit()
    view = stack.transpose() if transposed else stack
    S = view.with_spectra("exact", BUDGET).spectra.gram()
    values = torch.linalg.eigvalsh(S).flip(0)
    V = view.spectra.common(4)
    assert V.shape == (len(S), 4)
    assert float((V.mT @ S @ V).trace()) == pytest.approx(float(values[:4].sum()), rel=1e-4)
    goal = 1e-6 * view.norm_squared
    most = view.transpose().spectra.common_majorant(4, goal).ky_fan(4)
    assert 0 <= most - float(values[:4].sum()) <= goal
    pairs = view.transpose().spectra.common_pairs(4)
    assert torch.allclose(pairs[0][:4], values[:4], rtol=1e-3)


def test_e_lora_lies_in_its_interval():
    M, r = decaying(), 4
    solution = solve_lora(leading(M), r)
    low, high = solution.interval
    assert low <= tail(M, r) <= high
    assert high - low <= 1e-5 * LayerStack(M).norm_squared
    assert solution.error == pytest.approx(tail(M, r), rel=1e-5)


def test_the_pool_of_allocation_is_the_exact_one():
    """One layer has all the large terms, so that the pool reaches far beyond r in it."""
    M = decaying(4, 140, 150, power=0.3) * np.array([1.0, 0.1, 0.1, 0.1])[:, None, None]
    budget = RankBudget(2, 2)
    S = terms_within_reach(leading(M, budget), budget).S
    exact = allocate_pool(LayerStack(M).spectra.singular_values(), budget)
    assert [part.tolist() for part in allocate_pool(S, budget)] == [part.tolist() for part in exact]
    bounds = [allocation_bound(LayerStack(M).with_spectra(s, budget), budget).value for s in ("exact", "leading")]
    assert bounds[0] == pytest.approx(bounds[1], rel=1e-5)
    assert allocation_start(leading(M, budget).unit(), budget).mixing.count_nonzero(dim=1).tolist() == [8, 0, 0, 0]


def test_large_layers_of_small_ranks_take_leading_directions():
    def taken(spectra, layers, shape, rank):
        return takes_leading(spectra, StackSource("q", layers, shape, None), rank)

    assert taken("auto", 4, (4096, 2048), 8)
    assert not taken("auto", 4, (4096, 700), 8)
    assert not taken("auto", 32, (1024, 1024), 8)
    assert taken("leading", 2, (30, 20), 8)
    assert not taken("exact", 2, (4096, 4096), 4)


@pytest.mark.parametrize(
    ("shape", "r", "k"), [((3, 3, 4), 1, 1), ((6, 5, 50), 2, 1), ((1, 4, 4), 4, 2), ((2, 1, 1), 1, 1)]
)
def test_stacks_with_few_directions_have_their_allocation(shape, r, k):
    M, budget = noise(*shape, 0), RankBudget(r, k)
    exact = allocation_bound(LayerStack(M), budget).value
    found = allocation_bound(leading(M, budget), budget).value
    assert found == pytest.approx(exact, rel=1e-6, abs=1e-12 * LayerStack(M).norm_squared)


def test_layers_of_any_size_and_of_zeros_have_their_own_scale():
    M = decaying() * np.array([1e30, 0.0, 1e-30])[:, None, None]
    found, exact = leading(M).spectra.leading(3).S, LayerStack(M).spectra.singular_values()[:, :3]
    assert torch.allclose(found, exact, rtol=1e-5, atol=0)
    assert leading(np.zeros((2, 90, 80))).spectra.leading(3).S.tolist() == [[0.0] * 3] * 2


def test_an_unknown_kind_of_spectra_is_refused():
    with pytest.raises(InputError, match="unknown spectra 'fast'; known: auto, exact, leading"):
        SolverOptions(spectra="fast")
    with pytest.raises(InputError, match="unknown spectra 'fast'"):
        lower_bound(LayerStack(np.ones((2, 4, 3))), RankBudget(1, 1), spectra="fast")


FLAT = {
    "flat": np.ones(120),
    "flat beyond two": np.r_[30.0, 20.0, np.ones(118)],
    "two levels": np.r_[np.full(9, 1.0), np.full(111, 1 - 1e-6)],
    "steep": 0.1 ** np.arange(120),
    "zero": np.zeros(120),
}


@pytest.mark.parametrize("name", FLAT)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_no_large_layer_is_decomposed_however_flat_it_is(name, dtype, monkeypatch):
    """Its bounds are less close instead, and hold: e_lora, the next singular value and the floor."""
    monkeypatch.setattr(lanczos, "LARGEST_FORMED", 100)
    U, _, Vh = np.linalg.svd(noise(2, 130, 120, 5), full_matrices=False)
    M, budget = (U * FLAT[name] @ Vh).astype(dtype), RankBudget(2, 1)
    sizes, svd = [], torch.linalg.svd

    def watched(X, *args, **kwargs):
        sizes.append(min(X.shape[-2:]))
        return svd(X, *args, **kwargs)

    monkeypatch.setattr(torch.linalg, "svd", watched)
    stack = leading(M, budget)
    low, high = solve_lora(stack, 2).interval
    norm_squared = float((M.astype(np.float64) ** 2).sum())
    exact = tail(M.astype(np.float64), 2)
    assert low - 1e-15 * norm_squared <= exact <= high + 1e-15 * norm_squared
    assert high - low <= 2e-3 * norm_squared
    S = np.linalg.svd(M.astype(np.float64), compute_uv=False)
    assert np.all(stack.spectra.following(2).numpy() >= S[:, 2] * (1 - 1e-12))
    assert max(sizes, default=0) < 60
