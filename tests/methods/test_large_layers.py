"""Methods on layers that count as large: their directions come from products, and their errors stay the same."""

import numpy as np
import pytest

from rasa_theory import LayerStack, solve_lora
from rasa_theory.methods import METHODS
from rasa_theory.problem import spectra
from tests.helpers.problems import decaying, falling

CASES = [
    ("share_lora", {"rank": 3, "shared": "A"}),
    ("share_lora", {"rank": 3, "shared": "B"}),
    ("allocated", {"terms": 12}),
    ("tied_lora", {"rank": 2, "max_sweeps": 3}),
    ("joint_full", {"rank": 3, "core": "full"}),
    ("lora", {"rank": 2}),
]
MOS = ("mos", {"rank": 3, "pool_rank": 2, "private_rank": 1, "shards": 2, "max_sweeps": 3})
"""Its start depends on the signs of singular vectors, so its error does as well."""


@pytest.fixture
def small_is_large(monkeypatch):
    monkeypatch.setattr(spectra, "_SMALL", 100)


@pytest.mark.parametrize(("method", "settings"), CASES)
def test_directions_from_products_give_the_same_error(method, settings, monkeypatch):
    M = falling(2, 120, 110, seed=1) * np.array([1.0, 0.1])[:, None, None]  # most terms are the first layer's
    exact = METHODS[method].solve(LayerStack(M), **settings).error
    monkeypatch.setattr(spectra, "_SMALL", 100)
    stack = LayerStack(M)
    assert METHODS[method].solve(stack, **settings).error == pytest.approx(exact, abs=1e-5 * stack.norm_squared)


@pytest.mark.parametrize(("method", "settings"), [MOS, *(case for case in CASES if not case[0].startswith("joint"))])
def test_no_large_layer_is_decomposed(method, settings, small_is_large, monkeypatch):
    def refuse(self, *args):
        raise AssertionError("a decomposition of a large layer")

    for name in ("svd", "singular_values", "gram"):
        monkeypatch.setattr(spectra.ExactDecompositions, name, refuse)
    METHODS[method].solve(LayerStack(decaying(2, 120, 110, seed=1)), **settings)


def test_lora_of_large_layers_has_an_interval_from_products(small_is_large):
    M = decaying(2, 120, 110, seed=1)
    found, exact = solve_lora(LayerStack(M), 2), solve_lora(LayerStack(M), 2, "exact")
    low, high = found.interval
    assert low <= exact.error <= high
    assert high - low <= 2e-6 * (M**2).sum()


def test_the_largest_terms_are_found_in_whichever_layer_they_are(small_is_large):
    M = falling(2, 120, 110, seed=1) * np.array([1.0, 0.1])[:, None, None]
    energies = np.sort(np.linalg.svd(M, compute_uv=False).ravel() ** 2)
    error = METHODS["allocated"].solve(LayerStack(M), terms=12).error
    assert error == pytest.approx(energies[:-12].sum(), rel=1e-5)


BLOCKS = [("block_lora", {"rank": 2}), ("allocated_blocks", {"terms": 16})]


@pytest.mark.parametrize(("method", "settings"), BLOCKS)
def test_of_large_blocks_no_decomposition_is_taken(method, settings, small_is_large, monkeypatch):
    M = falling(2, 240, 220, seed=1) * np.array([1.0, 0.3])[:, None, None]
    blocks = M.reshape(2, 2, 120, 2, 110).swapaxes(2, 3)
    energies = np.linalg.svd(blocks, compute_uv=False) ** 2
    left = energies[..., 2:].sum() if method == "block_lora" else np.sort(energies.ravel())[:-16].sum()

    def refuse(self, *args):
        raise AssertionError("a decomposition of a large block")

    for name in ("svd", "singular_values", "gram"):
        monkeypatch.setattr(spectra.ExactDecompositions, name, refuse)
    error = METHODS[method].solve(LayerStack(M), **settings).error
    assert left * (1 - 1e-12) <= error <= left + 1e-5 * (M**2).sum()


@pytest.mark.parametrize(("method", "settings"), BLOCKS)
def test_of_small_blocks_of_large_layers_no_layer_is_decomposed(method, settings, small_is_large, monkeypatch):
    svd, shapes = spectra.ExactDecompositions.svd, []
    monkeypatch.setattr(
        spectra.ExactDecompositions, "svd", lambda self: (shapes.append(self._entries.shape), svd(self))[1]
    )
    METHODS[method].solve(LayerStack(decaying(2, 120, 110, seed=1)), **settings)
    assert set(shapes) == {(60, 55)}
