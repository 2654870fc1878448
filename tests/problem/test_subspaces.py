"""The mean projector: what is shared has eigenvalue 1, what is unrelated stays below its level."""

import numpy as np
import pytest

from rasa_theory import InputError, LayerStack, SharedSubspaceSpectrum, load, shared_subspace_spectrum
from rasa_theory.problem import unrelated_level
from tests.helpers.problems import noise, orthogonal, planted

MIDDLING = [(6, 80, 70, 4, 2), (8, 100, 90, 4, 1), (5, 60, 60, 3, 3), (3, 9, 8, 2, 1)]


@pytest.mark.parametrize(("L", "b", "a", "r", "k"), MIDDLING)
@pytest.mark.parametrize("seed", range(3))
def test_a_planted_pool_has_eigenvalue_one_and_the_private_rest_its_own_level(L, b, a, r, k, seed):
    q, R = r - k, L * k
    spectrum = shared_subspace_spectrum(LayerStack(planted(seed, L, b, a, r, k).values), q + R)
    for values, n, whole in zip((spectrum.columns, spectrum.rows), (b, a), spectrum.unrelated, strict=True):
        rest = values[R:].tolist()
        assert values[:R].tolist() == pytest.approx([1.0] * R, abs=1e-12)
        assert max(rest, default=0.0) <= unrelated_level(L, q / (n - R)) + 0.5 * n ** (-2 / 3)
        assert max(rest, default=0.0) <= whole
        assert float(values.sum()) == pytest.approx(q + R, rel=1e-12)  # the trace of every projector


@pytest.mark.parametrize(("L", "b", "a", "rank"), [(6, 200, 150, 8), (2, 120, 100, 10), (12, 100, 300, 30)])
@pytest.mark.parametrize("seed", range(3))
def test_unrelated_layers_stay_below_their_level_and_come_near_it(L, b, a, rank, seed):
    spectrum = shared_subspace_spectrum(LayerStack(noise(L, b, a, seed)), rank)
    for values, n, level in zip((spectrum.columns, spectrum.rows), (b, a), spectrum.unrelated, strict=True):
        assert len(values) == min(n, L * rank)
        assert level - 2 * n ** (-2 / 3) <= float(values[0]) <= level + 0.5 * n ** (-2 / 3)


def test_one_common_direction_of_two_layers_of_three():
    Q = orthogonal(9)
    M = np.stack([np.outer(Q[:, i], Q[i]) for i in (0, 0, 1)])
    spectrum = shared_subspace_spectrum(LayerStack(M), 2)  # the second singular direction of each is rounding
    assert spectrum.columns.tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0, 0, 0], abs=1e-14)
    assert spectrum.rows.tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0, 0, 0], abs=1e-14)


def test_a_zero_layer_shares_nothing():
    M = np.concatenate([planted(0, 2, 20, 18).values, np.zeros((1, 20, 18))])
    assert float(shared_subspace_spectrum(LayerStack(M), 3).columns.max()) == pytest.approx(2 / 3, abs=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("c", [1e-12, 1.0, 1e12])
def test_neither_scale_nor_transposition_matters(c, dtype):
    M = noise(3, 12, 9, 1).astype(dtype)
    one, other = (shared_subspace_spectrum(LayerStack(x), 2) for x in (M, (c * M.transpose(0, 2, 1)).astype(dtype)))
    assert isinstance(one, SharedSubspaceSpectrum)
    assert one.columns.tolist() == pytest.approx(other.rows.tolist(), abs=1e-5)
    assert one.rows.tolist() == pytest.approx(other.columns.tolist(), abs=1e-5)
    assert one.unrelated == other.unrelated[::-1]


@pytest.mark.parametrize(
    ("layers", "share", "level"), [(1, 0.1, 1), (2, 0.5, 1), (2, 0.1, 0.8), (3, 0.7, 1), (4, 0, 0.25)]
)
def test_the_level_in_cases_done_by_hand(layers, share, level):
    """L = 2: (1 + 2 sqrt(0.1 * 0.9)) / 2; from c = 1 - 1/L on the subspaces meet."""
    assert unrelated_level(layers, share) == pytest.approx(level, rel=1e-15)


def test_the_bundled_updates_share_the_side_that_faces_the_residual_stream():
    """Query, key and value read it (rows), the attention output writes it (columns); the other side is unrelated."""
    for stack in load("minilm-code")[0]:
        spectrum = shared_subspace_spectrum(stack, 8)
        facing, other = spectrum.rows, spectrum.columns
        if stack.name == "attention_output":
            facing, other = other, facing
        level = max(spectrum.unrelated)
        assert float(facing[0]) >= 1.8 * level
        assert float(other[0]) <= level + 384 ** (-2 / 3)


def test_a_rank_that_does_not_fit_is_named():
    with pytest.raises(InputError, match=r"rank 6 exceeds min\(b, a\) = 5"):
        shared_subspace_spectrum(LayerStack(noise(2, 7, 5)), 6)
