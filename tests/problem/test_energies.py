"""Bounds on the energy of leading terms against float64 singular values by NumPy, on steep and on flat spectra."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import rasa_theory as rt
from rasa_theory.problem import Factored, LayerEnergies, energies, is_decomposed, layer_energies, mean_overlap

FAILURE = 1e-12
SPECTRA = {
    "steep": 0.5 ** np.arange(200),
    "power": np.arange(1, 201) ** -0.5,
    "flat": np.ones(200),
    "step": np.r_[np.ones(7), np.full(193, 0.1)],
    "rank one": np.r_[1.0, np.zeros(199)],
    "rank 12": np.r_[np.linspace(1, 0.5, 12), np.zeros(188)],
}


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of 200 rows and columns count as large."""
    monkeypatch.setattr(energies, "SMALL", 50)
    assert not is_decomposed((260, 200), 12)


def layer(spectrum: np.ndarray, b: int = 260, a: int = 200, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    U, V = (np.linalg.qr(generator.standard_normal((n, len(spectrum))))[0] for n in (b, a))
    product: np.ndarray = (U * spectrum) @ V.T
    return product


def measured(M: np.ndarray | torch.Tensor, rank: int = 12, directions: int = 6) -> LayerEnergies:
    return next(layer_energies(rt.LayerStack(M[None]), rank, directions, FAILURE))


def truth(M: np.ndarray, rank: int) -> np.ndarray:
    sums: np.ndarray = np.cumsum(np.linalg.svd(M.astype(np.float64), compute_uv=False) ** 2)[:rank]
    return sums


def check(found: LayerEnergies, M: np.ndarray, rank: int = 12) -> None:
    exact = truth(M, rank)
    rounding = 1e-14 * exact[-1]  # of NumPy's own
    assert np.all(found.low.numpy() <= exact + rounding)
    assert np.all(exact <= found.high.numpy() + rounding)
    assert found.norm_squared == pytest.approx(float((M.astype(np.float64) ** 2).sum()), rel=1e-12)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("is_wide", [False, True])
def test_products_bound_the_energy_of_every_rank(searched: None, name: str, dtype: type, is_wide: bool) -> None:
    for seed in range(3):
        M = layer(SPECTRA[name], seed=seed).astype(dtype)
        M = M.T if is_wide else M
        found = measured(M)
        check(found, M)
        width = float((found.high - found.low)[-1]) / found.norm_squared
        assert width < (0.02 if name == "flat" else 2e-3)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (9, 5), (1, 7)])
def test_small_layers_are_known_to_rounding(name: str, shape: tuple[int, int]) -> None:
    M = layer(SPECTRA[name][: min(shape)], *shape)
    assert is_decomposed(shape, 12)
    found = measured(M)
    check(found, M, min(12, *shape))
    assert float((found.high - found.low).max()) <= 1e-11 * found.norm_squared
    if min(shape) > 12:
        allowed = max(shape) * torch.finfo(torch.float64).eps * found.norm_squared  # of products that long
        assert float((found.high - found.low).min()) >= allowed or name in ("rank one", "rank 12")
    else:
        assert float(found.low[-1]) == float(found.high[-1]) == found.norm_squared, "all terms hold all of the energy"


@pytest.mark.parametrize("scale", [1e-140, 1e-30, 1e30, 1e140])
def test_the_scale_of_a_layer_does_not_matter(searched: None, scale: float) -> None:
    M = layer(SPECTRA["power"])
    one, other = measured(M), measured(scale * M)
    assert torch.allclose(other.low / scale / scale, one.low, rtol=1e-9)
    assert torch.allclose(other.high / scale / scale, one.high, rtol=1e-9)


def test_leading_directions_are_singular_vectors(searched: None) -> None:
    M = layer(SPECTRA["steep"])
    U, _, Vh = np.linalg.svd(M)
    for turned, stack in ((False, rt.LayerStack(M[None])), (True, rt.LayerStack(M[None]).transpose())):
        found = next(layer_energies(stack, 12, 6, FAILURE))
        left, right = (found.V, found.U) if turned else (found.U, found.V)
        assert np.allclose(np.abs(left.numpy().T @ U[:, :6]), np.eye(6), atol=1e-5)
        assert np.allclose(np.abs(right.numpy().T @ Vh[:6].T), np.eye(6), atol=1e-5)


def test_directions_at_rounding_level_are_left_out(searched: None) -> None:
    for M in (layer(SPECTRA["rank one"]), layer(SPECTRA["rank one"][:30], 40, 30)):
        found = measured(M)
        assert torch.linalg.vector_norm(found.U, dim=0).tolist() == pytest.approx([1, 0, 0, 0, 0, 0], abs=1e-9)
        assert torch.linalg.vector_norm(found.V, dim=0).tolist() == pytest.approx([1, 0, 0, 0, 0, 0], abs=1e-9)


def test_thin_factors_are_never_multiplied_out() -> None:
    generator = torch.Generator().manual_seed(0)
    B, A = (torch.randn(2, *shape, generator=generator) for shape in ((30, 4), (4, 20)))
    B[1] = 0
    stack = rt.LayerStack(Factored(B, A))
    for view in (stack, stack.transpose()):
        first, zero = layer_energies(view, 12, 6, FAILURE)
        M = (B[0].double() @ A[0].double()).numpy()
        check(first, M)
        assert float(first.low[3]) == float(first.high[3]) == first.norm_squared
        assert (first.U.shape, first.V.shape) == ((view.shape[0], 4), (view.shape[1], 4))
        assert zero.norm_squared == 0
        assert not zero.high.any()
        assert (zero.U.shape, zero.V.shape) == (first.U.shape, first.V.shape)
        assert not zero.U.any()


def test_a_layer_of_zeros_holds_nothing(searched: None) -> None:
    found = measured(np.zeros((260, 200)))
    assert found.norm_squared == 0
    assert not torch.cat([found.low, found.high]).any()
    assert not found.U.any()


def test_bounds_do_not_depend_on_other_layers(searched: None) -> None:
    """Random probes belong to the layer, so that a run that is taken up gives the same numbers."""
    M = np.stack([layer(SPECTRA["power"], seed=seed) for seed in range(2)])
    together = list(layer_energies(rt.LayerStack(M), 12, 6, FAILURE))
    again = list(layer_energies(rt.LayerStack(M), 12, 6, FAILURE))
    assert [x.high.tolist() for x in together] == [x.high.tolist() for x in again]


def test_overlap_is_the_mean_squared_cosine_beyond_chance() -> None:
    n, m = 12, 3
    eye = torch.eye(n, dtype=torch.float64)
    same, other = eye[:, :m], eye[:, m : 2 * m]
    chance = m / n
    assert mean_overlap(torch.stack([same, same, same])) == pytest.approx(1)
    assert mean_overlap(torch.stack([same, other])) == pytest.approx(-chance / (1 - chance))
    tilted = (same + other) / 2**0.5
    assert mean_overlap(torch.stack([same, tilted])) == pytest.approx((0.5 - chance) / (1 - chance))
    inside = same.clone()
    inside[:, 1:] = 0  # one direction, which the other layer has as well
    assert mean_overlap(torch.stack([same, inside])) == pytest.approx(1)
    assert mean_overlap(torch.stack([same, 0 * same])) is None
    assert mean_overlap(same[None]) is None


def test_unrelated_layers_have_no_overlap_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(30, 40, 8, generator=generator, dtype=torch.float64))[0]
    assert mean_overlap(U) == pytest.approx(0, abs=0.01)
