"""Null models: spectra are kept, and layers have in common what is promised, and no more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import rasa_theory as rt
from rasa_theory import null_models
from rasa_theory.sources import power_law_stack
from tests.helpers.problems import decaying, noise, orthogonal

L, B, A = 3, 14, 12
SHAPES = [(14, 12), (12, 14), (9, 9)]


def stack(values: Any) -> rt.LayerStack:
    return rt.LayerStack(torch.as_tensor(values), "query")


def alike(count: int = 2) -> rt.LayerStack:
    """Three layers of the same `count` dyads, of other sizes in each."""
    U, V = (torch.as_tensor(orthogonal(n, n)[:, :count]) for n in (B, A))
    sizes = 3 + torch.as_tensor(noise(1, L, count)[0]).sin()
    return stack((U * sizes[:, None]) @ V.mT)


def spectra(values: Tensor) -> Tensor:
    return torch.linalg.svdvals(values)


def rank(matrix: Tensor) -> int:
    return int(torch.linalg.matrix_rank(matrix, rtol=1e-9))


def common_ranks(values: Tensor) -> tuple[int, int]:
    """Dimensions of the row space and of the column space that all layers span together."""
    return rank(values.flatten(0, 1)), rank(values.mT.flatten(0, 1))


@pytest.mark.parametrize(("b", "a"), SHAPES)
@pytest.mark.parametrize("null_model", [null_models.turned_apart, null_models.with_common_bases])
def test_spectra_names_and_errors_of_lora_are_kept(null_model: Any, b: int, a: int) -> None:
    whole = stack(decaying(L, b, a))
    made = null_model(whole)
    torch.testing.assert_close(spectra(made.values), spectra(whole.values), rtol=1e-12, atol=1e-12)
    assert (made.name, made.shape, made.dtype) == (whole.name, whole.shape, whole.dtype)
    assert rt.solve_lora(made, 2).layer_errors == pytest.approx(rt.solve_lora(whole, 2).layer_errors, rel=1e-10)


def test_layers_turned_apart_have_nothing_in_common() -> None:
    whole = alike()
    turned = null_models.turned_apart(whole)
    assert common_ranks(whole.values) == (2, 2)
    assert common_ranks(turned.values) == (2 * L, 2 * L)


def test_layers_are_turned_by_orthogonal_matrices() -> None:
    """Of the identity, U_i I V_i is orthogonal, and another one in every layer."""
    turned = null_models.turned_apart(stack(torch.eye(7).double().expand(L, -1, -1))).values
    torch.testing.assert_close(turned @ turned.mT, torch.eye(7).double().expand(L, -1, -1), rtol=0, atol=1e-13)
    assert all(float((turned[i] - turned[j]).abs().max()) > 0.1 for i in range(L) for j in range(i))


def test_the_gain_of_sharing_goes_when_the_layers_are_turned_apart() -> None:
    whole, budget = alike(), rt.RankBudget(1, 1)
    shared, apart = (rt.solve_rasa(s, budget).error / s.norm_squared for s in (whole, null_models.turned_apart(whole)))
    assert shared < 1e-10  # two common dyads fit into the pool
    assert apart > 0.01


def test_in_common_bases_every_dyad_is_in_all_layers() -> None:
    made = null_models.with_common_bases(stack(decaying(L, B, A)))
    first = made.values[0]
    for other in made.values:  # of common singular vectors: products commute
        torch.testing.assert_close(first @ other.mT, other @ first.mT)
        torch.testing.assert_close(first.mT @ other, other.mT @ first)


@pytest.mark.parametrize(("r", "count", "size"), [(2, 3, 0.8), (0, 1, 2.0), (5, 4, 0.1)])
def test_hidden_dyads_are_in_every_layer_and_of_the_size_asked_for(r: int, count: int, size: float) -> None:
    whole = stack(decaying(L, B, A))
    added = null_models.with_hidden_dyads(whole, r, count, size).values - whole.values
    sizes = spectra(added)
    unit = size * float(spectra(whole.values)[:, r].mean())
    assert int((sizes > 1e-9 * unit).sum()) == count * L
    assert 0.3 * unit < float(sizes[:, :count].min()) <= float(sizes[:, :count].max()) < 2 * unit
    assert common_ranks(added) == (count, count)


def test_resized_stacks_have_the_spectra_of_the_stack_between_its_layers() -> None:
    whole = stack(decaying(L, B, A))
    S = spectra(whole.values)[:, :5]
    for bases in null_models.BASES:
        deep = null_models.resized(whole, 2 * L - 1, 20, 5, bases)
        assert (deep.layers, deep.shape, deep.name) == (5, (20, 20), "L = 5")
        torch.testing.assert_close(spectra(deep.values)[::2, :5], S)
        torch.testing.assert_close(spectra(deep.values)[1, :5], (S[0] * S[1]).sqrt())
        assert float(spectra(deep.values)[:, 5:].max()) < 1e-12
    one = null_models.resized(stack(decaying(1, B, A)), 2, 20, 5)
    torch.testing.assert_close(
        spectra(one.values)[:, :5], spectra(torch.as_tensor(decaying(1, B, A)))[:, :5].expand(2, -1)
    )


def overlaps(values: Tensor, count: int) -> tuple[float, float]:
    """Mean squared cosine between the row spaces, and the column spaces, of the first two layers."""
    U, _, Vh = torch.linalg.svd(values)
    rows, columns = Vh[0, :count] @ Vh[1, :count].mT, U[0, :, :count].mT @ U[1, :, :count]
    return float((rows**2).sum() / count), float((columns**2).sum() / count)


def test_the_bases_of_resized_stacks_overlap_as_they_are_called() -> None:
    whole = stack(decaying(2, 30, 30))
    size = 200
    rows, columns = {}, {}
    for bases in null_models.BASES:
        rows[bases], columns[bases] = overlaps(null_models.resized(whole, 2, size, 4, bases).values, 4)
    chance = 2 * 4 / size  # twice the mean cosine of independent bases
    assert rows["independent"] < chance
    assert max(columns["independent"], columns["one side common"], columns["one side equal"]) < chance
    assert min(rows["half common"], columns["half common"]) > chance
    assert chance < rows["one side common"] < rows["half common"]
    assert rows["one side equal"] == pytest.approx(1)


def test_random_loras_have_the_spectra_of_given_ones_and_nothing_in_common() -> None:
    same = rt.LoraFactors(
        *(torch.as_tensor(noise(1, *shape, 1)).expand(L, -1, -1).clone() for shape in ((B, 2), (2, A)))
    )
    drawn = null_models.random_loras(same)
    values, before = (torch.stack([f.update(i) for i in range(L)]) for f in (drawn, same))
    torch.testing.assert_close(spectra(values), spectra(before), rtol=1e-12, atol=1e-12)
    assert common_ranks(before) == (2, 2)
    assert common_ranks(values) == (2 * L, 2 * L)
    norms = torch.linalg.vector_norm(drawn.B, dim=1), torch.linalg.vector_norm(drawn.A, dim=2)
    torch.testing.assert_close(*norms)


@pytest.mark.parametrize(
    "made",
    [
        lambda seed: null_models.turned_apart(alike(), seed).values,
        lambda seed: null_models.with_common_bases(alike(), seed).values,
        lambda seed: null_models.with_hidden_dyads(alike(), 2, seed=seed).values,
        lambda seed: null_models.resized(alike(), 2, 9, 2, seed=seed).values,
        lambda seed: null_models.random_loras(rt.LoraFactors(alike().values, alike().values.mT), seed).B,
        lambda seed: power_law_stack(2, (9, 8), seed=seed).values,
    ],
)
def test_the_seed_alone_decides(made: Any) -> None:
    torch.manual_seed(1)
    first = made(3)
    torch.manual_seed(2)
    assert torch.equal(first, made(3))
    assert not torch.equal(first, made(4))
    with pytest.raises(rt.InputError, match="seed must lie between 0 and"):
        made(-1)
    for wrong in (True, 1.5, "1", None):
        with pytest.raises(rt.InputError, match="seed must be a whole number, got"):
            made(wrong)


@pytest.mark.parametrize(
    ("made", "sentence"),
    [
        (lambda s: null_models.with_hidden_dyads(s, 12), r"rank must be below min\(b, a\) = 12, got 12"),
        (lambda s: null_models.with_hidden_dyads(s, 2, 13), r"count must be at most min\(b, a\) = 12, got 13"),
        (lambda s: null_models.with_hidden_dyads(s, 2, 0), "count must be at least 1, got 0"),
        (lambda s: null_models.with_hidden_dyads(s, 2, size=-1), "size must be finite and not negative, got -1"),
        (lambda s: null_models.with_hidden_dyads(s, 2, size="1"), "size must be a number, got '1'"),
        (lambda s: null_models.resized(s, 0, 9, 2), "layers must be at least 1, got 0"),
        (lambda s: null_models.resized(s, 2, 4, 5), "count must be at most width = 4, got 5"),
        (lambda s: null_models.resized(s, 2, 9, 2, "equal"), "unknown bases 'equal'; known: independent, "),
        (
            lambda s: null_models.random_loras(rt.LoraFactors(s.values.mT, s.values)),
            r"rank 14 .* exceeds min\(b, a\) = 12",
        ),
    ],
)
def test_values_out_of_range_are_refused(made: Any, sentence: str) -> None:
    with pytest.raises(rt.InputError, match=sentence):
        made(stack(decaying(L, B, A)))


def test_a_power_law_stack_has_its_spectrum_and_a_tail_below_it() -> None:
    made = power_law_stack(3, (40, 32), overlap=0.9)
    assert (made.dtype, made.shape, made.name) == (torch.float32, (40, 32), "power:0.7 of rank 8 in a Gaussian tail")
    S = spectra(made.values.double()) / torch.tensor([0.5, 1.0, 1.5])[:, None]
    expected = torch.arange(1, 9, dtype=torch.float64) ** -0.7
    torch.testing.assert_close(S[:, :4], expected[:4].expand(3, -1), rtol=0.25, atol=0)
    assert float(S[:, 8:].max()) < 1.3 * float(expected[-1])
