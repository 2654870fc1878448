"""What a stack and a budget accept, how memory is borrowed, what the views compute, and how passes are counted."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given

from rasa_theory import InputError, LayerStack, RankBudget, SolverOptions, solve_rasa
from rasa_theory.problem import normalised_layers
from tests.helpers.problems import noise
from tests.helpers.strategies import nasty_stacks


def with_entry(value):
    M = noise(3, 4, 5)
    M[1, 2, 0] = value
    return M


BAD_VALUES = [
    (with_entry(math.nan), r"layer 1, entry \(2, 0\) is nan; all entries must be finite"),
    (with_entry(math.inf), r"layer 1, entry \(2, 0\) is inf"),
    (with_entry(-math.inf), r"layer 1, entry \(2, 0\) is -inf"),
    (np.zeros((2, 3, 4), int), "dtype int64 is not real floating point; convert it"),
    (np.zeros((2, 3, 4), bool), "dtype bool is not real floating point"),
    (np.zeros((2, 3, 4), complex), "dtype complex128 is not real floating point"),
    (np.zeros((2, 3, 4), object), "dtype object is not numeric; real floating point is needed"),
    (np.full((2, 3, 4), "x"), "is not numeric"),
    (torch.zeros(2, 3, 4, dtype=torch.int8), "dtype int8 is not real floating point"),
    (torch.zeros(2, 3, 4).to_sparse(), "a torch.sparse_coo tensor; a dense one is needed"),
    (np.zeros((3, 4)), r"expected three axes \(layers, b, a\), found shape \(3, 4\)"),
    (np.zeros((1, 2, 3, 4)), r"found shape \(1, 2, 3, 4\)"),
    (np.zeros((2, 0, 4)), r"shape \(2, 0, 4\) is empty; every axis needs at least one entry"),
    (np.zeros((0, 3, 4)), r"shape \(0, 3, 4\) is empty"),
    ([], "the list is empty; at least one matrix is needed"),
    ([np.zeros((2, 4)), np.zeros((3, 4))], "layer 1 is 3 x 4, layer 0 is 2 x 4; the layers of a stack"),
    ([np.zeros((2, 4)), np.zeros(4)], r"layer 1 has shape \(4,\); a layer is a \(b, a\) matrix"),
    ([np.zeros((2, 4)), np.zeros((2, 4), np.float32)], "layer 1 is torch.float32 on cpu, layer 0 torch.float64 on cpu"),
    ([np.zeros((2, 4)), np.zeros((2, 4), int)], "layer 1: dtype int64 is not real floating point"),
    ([[[1.0, 2.0], [3.0]]], "layer 0: not an array"),
    (np.full((1, 2, 2), 1e200), r"the largest entry is 1e\+200, outside 2\^-500 .. 2\^500"),
    (np.full((1, 2, 2), 1e-200), "the largest entry is 1e-200, outside"),
    (np.full((1, 2, 2), 1e35, np.float32), r"the largest entry is 1e\+35, outside 2\^-100 .. 2\^100"),
]


@pytest.mark.parametrize(("values", "sentence"), BAD_VALUES)
def test_bad_values_are_named(values, sentence):
    with pytest.raises(InputError, match="^stack 'mine'.*" + sentence):
        LayerStack(values, "mine")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"dtype": "float16"}, "dtype must be float32 or float64, got float16"),
        ({"dtype": "nonsense"}, "dtype must be float32 or float64, got nonsense"),
        ({"dtype": torch.int64}, "dtype must be float32 or float64, got torch.int64"),
        ({"device": "nonsense"}, "device 'nonsense' is not available on this machine; use cpu or auto"),
        ({"device": "meta"}, "device 'meta' holds no numbers"),
    ],
)
def test_bad_dtypes_and_devices_are_named(options, sentence):
    with pytest.raises(InputError, match=sentence):
        LayerStack(noise(1, 2, 2), **options)


@pytest.mark.parametrize(
    ("ranks", "sentence"),
    [
        ((8, 9), "shared_rank 9 exceeds rank 8"),
        ((0, 0), "rank must be at least 1, got 0"),
        ((2, -1), "shared_rank must be at least 0, got -1"),
        ((1.5, 1), "rank must be a whole number, got 1.5"),
        ((2, True), "shared_rank must be a whole number, got True"),
        (("2", 1), "rank must be a whole number, got '2'"),
    ],
)
def test_bad_budgets_are_named(ranks, sentence):
    with pytest.raises(InputError, match=sentence):
        RankBudget(*ranks)


def test_budget():
    budget = RankBudget(np.int64(8), np.int64(3))
    assert (budget.rank, budget.shared_rank, budget.private_rank, budget.pool_rank(6)) == (8, 3, 5, 18)
    assert type(budget.rank) is int
    with pytest.raises(InputError, match=r"rank 8 exceeds min\(b, a\) = 4 of stack 'mine' \(4 x 9\); lower the rank"):
        budget.check_fits(LayerStack(noise(2, 4, 9), "mine"))


# ---- memory


def test_float64_memory_is_borrowed():
    M = noise(2, 3, 4)
    assert LayerStack(M).values.data_ptr() == M.ctypes.data
    T = torch.as_tensor(M)
    assert LayerStack(T.requires_grad_()).values.data_ptr() == T.data_ptr()
    assert not LayerStack(T).values.requires_grad


@pytest.mark.filterwarnings("error")
def test_a_read_only_array_is_borrowed_without_a_warning():
    M = noise(2, 3, 4)
    M.flags.writeable = False
    assert LayerStack(M).values.data_ptr() == M.ctypes.data


@pytest.mark.parametrize(
    "change",
    [
        lambda M: M.astype(">f8"),
        lambda M: M[:, ::-1, ::-1][:, ::-1, ::-1],
        lambda M: M.astype(np.longdouble),
        lambda M: np.asfortranarray(M),
        lambda M: list(M),
        lambda M: M.tolist(),
        lambda M: [torch.as_tensor(m) for m in M],
    ],
)
def test_every_layout_gives_the_same_numbers(change):
    M = noise(2, 3, 4)
    stack = LayerStack(change(M))
    assert stack.dtype == torch.float64
    assert np.array_equal(stack.values, M)


def test_negative_strides():
    M = noise(2, 3, 4)
    assert np.array_equal(LayerStack(M[::-1, :, ::-1]).values, M[::-1, :, ::-1])


@pytest.mark.parametrize(
    ("dtype", "computed"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_dtype_of_the_computation(dtype, computed):
    M = torch.as_tensor(noise(2, 3, 4)).to(dtype)
    stack = LayerStack(M)
    assert stack.dtype == computed
    assert torch.equal(stack.values, M.to(computed))
    assert stack.eps == torch.finfo(computed).eps
    assert LayerStack(M, dtype="float64").dtype == torch.float64


@pytest.mark.parametrize("sweep", ["joint", "paper"])
def test_the_input_is_never_written(sweep):
    M = 100 * noise(3, 5, 4)
    before = M.tobytes()
    solve_rasa(LayerStack(M), RankBudget(2, 1), SolverOptions(sweep=sweep, max_sweeps=3, effort="quick"))
    assert M.tobytes() == before


# ---- products and views


def test_products_tiles_and_passes():
    M, X, Y = noise(3, 5, 4), torch.as_tensor(noise(3, 4, 2)), torch.as_tensor(noise(3, 5, 2))
    stack = LayerStack(M)
    assert stack.data_passes == 0
    assert np.allclose(stack.right(X), M @ X.numpy())
    assert np.allclose(stack.right(X[0]), M @ X[0].numpy())
    assert np.allclose(stack.left(Y), M.transpose(0, 2, 1) @ Y.numpy())
    assert stack.data_passes == 3
    for rows in (None, 1, 2, 5):
        rebuilt = np.full_like(M, np.nan)
        for tile in stack.tiles(rows):
            rebuilt[tile.layer, tile.rows] = tile.values
        assert np.array_equal(rebuilt, M)
    assert stack.data_passes == 7


def test_views_compute_the_scaled_and_the_transposed_stack():
    M, X = 100 * noise(3, 5, 4), torch.as_tensor(noise(1, 5, 2)[0])
    stack = LayerStack(M)
    view = stack.transpose().unit()
    expected = M.transpose(0, 2, 1) / stack.scale
    assert view.shape == (4, 5)
    assert view.scale == 1.0
    assert np.array_equal(view.values, expected)
    assert np.allclose(view.right(X), expected @ X.numpy())
    assert np.array_equal(np.stack([tile.values.numpy() for tile in view.tiles(rows=4)]), expected)
    assert view.norm_squared == pytest.approx(float((expected**2).sum()), rel=1e-14)
    assert view.rounding == pytest.approx(stack.rounding / stack.scale, rel=1e-14)
    assert np.array_equal(view.transpose().values, M / stack.scale)
    assert stack.data_passes == view.data_passes == 2


@pytest.mark.parametrize("first", [lambda s: s, lambda s: s.transpose(), lambda s: s.unit().transpose()])
def test_the_svd_is_computed_once_for_all_views(first):
    M = 100 * noise(3, 5, 4)
    stack = LayerStack(M)
    first(stack).spectra.svd()
    for view, expected in (
        (stack, M),
        (stack.transpose(), M.transpose(0, 2, 1)),
        (stack.unit(), M / stack.scale),
        (stack.unit().transpose(), M.transpose(0, 2, 1) / stack.scale),
    ):
        U, S, Vh = view.spectra.svd()
        assert U.shape == (3, view.shape[0], 4)
        assert np.allclose((U * S[:, None]) @ Vh, expected, rtol=0, atol=1e-13 * view.scale)
    assert stack.data_passes == 1


def test_the_svd_of_a_float32_stack_is_float64():
    M = noise(2, 5, 4).astype(np.float32)
    S = LayerStack(M).spectra.svd().S
    assert S.dtype == torch.float64
    assert np.allclose(S, np.linalg.svd(M.astype(float), compute_uv=False), rtol=1e-13)


@given(nasty_stacks())
def test_scale_is_the_power_of_two_just_above_the_largest_entry(problem):
    scale, largest = problem.stack.scale, float(np.abs(problem.values).max())
    assert math.frexp(scale)[0] == 0.5
    assert scale / 2 <= largest < scale or largest == 0 == scale - 1


@pytest.mark.parametrize("c", [1e100, 1e-100, 1e-150, 1e150])
def test_norms_far_from_one(c):
    M = noise(3, 5, 4)
    stack = LayerStack(c * M)
    assert stack.layer_norms_squared == pytest.approx([c**2 * x for x in (M**2).sum((1, 2))], rel=1e-13)
    assert stack.norm_squared == pytest.approx(c**2 * (M**2).sum(), rel=1e-13)
    assert stack.rounding == pytest.approx(50 * stack.eps * c * np.linalg.norm(M), rel=1e-13)


def test_normalised_layers():
    M = noise(3, 5, 4)
    M[1] = 0
    stack, norms = normalised_layers(LayerStack(M))
    assert stack.layer_norms_squared == pytest.approx([1, 0, 1], rel=1e-13)
    assert norms == pytest.approx([np.linalg.norm(M[0]), 1, np.linalg.norm(M[2])], rel=1e-14)


def test_repr_names_what_matters():
    assert repr(LayerStack(noise(3, 5, 4), "query")) == "LayerStack('query', 3 x 5 x 4, torch.float64, cpu)"


def test_normalised_layers_of_a_view_and_of_tiny_layers():
    M = noise(3, 4, 5)
    M[1] *= 1e-170  # its square underflows
    stack = LayerStack(M * 1024)
    for view in (stack, stack.unit(), stack.transpose()):
        normalised, norms = normalised_layers(view)
        assert normalised.layer_norms_squared == pytest.approx([1, 1, 1], rel=1e-12)
        expected = np.linalg.norm(view.values.numpy() * [[[1]], [[1e170]], [[1]]], axis=(1, 2)) * [1, 1e-170, 1]
        assert norms == pytest.approx(list(expected), rel=1e-12)
