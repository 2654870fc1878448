"""Exchanges of pool terms: worth by brute force, and terms that all layers share, hidden where sweeps miss them."""

import dataclasses

import numpy as np
import pytest
import torch

from rasa_theory import (
    LayerStack,
    RankBudget,
    RasaFactors,
    SolverOptions,
    load,
    reconstruction_error,
    solve_lora,
    solve_rasa,
)
from rasa_theory.solvers import Exchanges, allocation_start, leading_terms, pool_losses, sign_patterns
from tests.helpers.problems import SHAPES, noise, random_factors


def tensor(x):
    return torch.as_tensor(np.ascontiguousarray(x))


@pytest.mark.parametrize(("L", "b", "a", "r", "k", "seed"), SHAPES)
def test_losses_are_singular_values_of_the_literal_sums(L, b, a, r, k, seed):
    f = random_factors(L, b, a, r, k, seed).normalised()
    Bt, At, B_S, A_S, D = (t.numpy() for t in f.named().values())
    q = Bt.shape[2]
    for j, loss in enumerate(pool_losses(f).tolist()):
        sums = Bt @ At + D[:, j, None, None] * np.outer(B_S[:, j], A_S[j])
        values = np.linalg.svd(sums, compute_uv=False)
        assert loss == pytest.approx(float((values[:, q] ** 2).sum()) if q < values.shape[1] else 0.0, abs=1e-12)


def test_leading_terms_of_orthogonal_ones_come_in_order():
    U, V = (np.linalg.qr(noise(1, n, 3, n)[0])[0] for n in (9, 8))
    D = np.array([[3.0, -2.0, 1.0], [3.0, 2.0, 0.0], [-3.0, 2.0, 1.0], [0.0, 2.0, 1.0]])
    E = tensor(np.einsum("nj,ij,pj->inp", U, D, V))
    terms = leading_terms(E, sign_patterns(4, 0), 3)
    assert torch.allclose((terms.D**2).sum(0), tensor((D**2).sum(0)))
    rebuilt = torch.einsum("nj,ij,jp->inp", terms.B, terms.D, terms.A)
    assert torch.allclose(rebuilt, E, atol=1e-10)
    assert torch.allclose(terms.B.square().sum(0), torch.ones(3).double())


def test_sign_patterns_hold_every_layer_alone_and_every_sign():
    patterns = sign_patterns(4, 0)
    assert patterns.shape == (4 + 8, 4)
    assert len({tuple(p) for p in patterns.tolist()}) == 12
    assert sign_patterns(9, 0).shape == (9 + 32, 9)
    assert torch.equal(sign_patterns(9, 1), sign_patterns(9, 1))


def with_shared(M, terms, size, seed):
    """M, and `terms` dyads common to all layers, of random sign and about `size` times the mean sigma_{r+1}."""
    L, b, a = M.shape
    rng = np.random.default_rng(seed)
    U, V = (np.linalg.qr(rng.standard_normal((n, terms)))[0] for n in (b, a))
    d = size * (1 + 0.2 * rng.standard_normal((L, terms))) * rng.choice([-1.0, 1.0], (L, terms))
    return M + (U * d[:, None]) @ V.T, (U, d, V)


@pytest.mark.parametrize(
    ("name", "seed", "gain"),
    [
        ("value", 1, 9e-3),
        pytest.param("query", 4, 2e-3, marks=pytest.mark.slow),
        pytest.param("value", 3, 9e-3, marks=pytest.mark.slow),
    ],
)
def test_terms_hidden_in_the_bundled_updates_are_found(name, seed, gain):
    """Three shared dyads of 0.8 sigma_9, missed from allocation alone; found as by a start that knows them, to 5e-4."""
    bundled = next(stack for stack in load("minilm-code")[0] if stack.name == name)
    crop, budget = LayerStack(bundled.values[:, :128, :128]), RankBudget(8, 1)
    size = 0.8 * float(crop.spectra.svd().S[:, 8].mean())
    values, (U, d, V) = with_shared(crop.values.double().numpy(), 3, size, seed)
    hidden = LayerStack(values)
    f = allocation_start(crop, budget).to(torch.float64)
    knows = dataclasses.replace(
        f,
        shared_B=torch.cat([f.shared_B[:, :3], tensor(U)], 1),
        shared_A=torch.cat([f.shared_A[:3], tensor(V.T)]),
        mixing=torch.cat([f.mixing[:, :3], tensor(d)], 1),
    )
    found, alone, informed = (
        solve_rasa(hidden, budget, SolverOptions(start=start)).error for start in ("best", "allocation", knows)
    )
    e_lora = solve_lora(hidden, 8).error
    assert found <= informed + 5e-4 * e_lora
    assert found <= alone - gain * e_lora


def test_nothing_is_exchanged_where_the_pool_is_as_good_as_can_be():
    """Orthogonal layers, k = r: allocation is the optimum; and without a pool there is nothing to exchange."""
    Q = np.linalg.qr(noise(1, 12, 12)[0])[0]
    M = np.stack([Q[:, 4 * i : 4 * i + 4] * [4.0, 3.0, 2.0, 1.0 + 0.1 * i] @ noise(1, 4, 9, i)[0] for i in range(3)])
    stack = LayerStack(M)
    for budget in (RankBudget(2, 2), RankBudget(2, 0)):
        unit = stack.unit()
        assert Exchanges(unit, budget, 0).exchanged(allocation_start(unit, budget)) is None


@pytest.mark.parametrize(("L", "b", "a", "r", "k", "seed"), SHAPES)
def test_exchanged_factors_are_what_the_gain_and_the_losses_promise(L, b, a, r, k, seed):
    """From a poor point: what the new terms gain is more than what leaving out the old ones costs."""
    stack = LayerStack(noise(L, b, a, seed))
    unit, budget = stack.unit(), RankBudget(r, k)
    f = random_factors(L, b, a, r, k, seed).scaled(0.1).normalised()
    other = Exchanges(unit, budget, 0).exchanged(f)
    assert other is not None
    assert {n: t.shape for n, t in other.named().items()} == {n: t.shape for n, t in f.named().items()}
    assert reconstruction_error(unit, other) < reconstruction_error(unit, f)


def test_private_terms_take_up_what_the_pool_gives_up():
    """One private term per layer, not used yet, and the leading dyad of each layer in the pool: nothing is lost."""
    stack = LayerStack(noise(2, 7, 6))
    unit, budget = stack.unit(), RankBudget(2, 1)
    f = allocation_start(unit, RankBudget(1, 1))
    empty = RasaFactors(
        torch.zeros(2, 7, 1).double(), torch.eye(6)[:1].expand(2, 1, 6).double(), f.shared_B, f.shared_A, f.mixing
    )
    assert torch.allclose(pool_losses(empty), torch.zeros(2).double(), atol=1e-12)
    other = Exchanges(unit, budget, 0).exchanged(empty)
    assert other is not None
    assert reconstruction_error(unit, other) < reconstruction_error(unit, empty)
