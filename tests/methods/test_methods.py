"""RaSA's neighbours against known answers, and laws that hold for all of them."""

import functools
from typing import NamedTuple

import numpy as np
import pytest
import torch

import rasa_theory as rt
from rasa_theory import methods
from rasa_theory.methods import Diagonals, Evidence
from rasa_theory.problem import Factored, normalised_layers
from tests.helpers import problems
from tests.helpers.problems import noise, tail

L, B, A = 3, 8, 6


class Example(NamedTuple):
    """A configuration of a method, and the number of parameters that it stores for stacks of shape (L, B, A)."""

    method: str
    settings: dict[str, int | str]
    parameters: int

    def fit(self, stack: rt.LayerStack) -> methods.Fit:
        return methods.METHODS[self.method].solve(stack, **self.settings)


FITS = {
    "lora": Example("lora", {"rank": 2}, L * 2 * (B + A)),
    "allocated": Example("allocated", {"terms": 2 * L}, L * 2 * (B + A)),
    "blocks": Example("block_lora", {"rank": 2, "rows": 2, "columns": 2}, L * 2 * (2 * B + 2 * A)),
    "rows of blocks": Example("block_lora", {"rank": 1, "rows": 2, "columns": 1}, L * (B + 2 * A)),
    "allocated blocks": Example("allocated_blocks", {"terms": 7, "rows": 2, "columns": 2}, 7 * (B // 2 + A // 2)),
    "rasa": Example("rasa", {"rank": 2, "shared_rank": 1}, L * (B + A) + 3 * (B + A) + L * 3),
    "share A": Example("share_lora", {"rank": 2, "shared": "A"}, 2 * A + L * B * 2),
    "share B": Example("share_lora", {"rank": 2, "shared": "B"}, 2 * B + L * A * 2),
    "share both": Example("share_lora", {"rank": 2, "shared": "both"}, 2 * (A + B)),
    "tied": Example("tied_lora", {"rank": 3}, 3 * (A + B) + L * (B + 3)),
    "vera": Example("vera", {"rank": 5}, L * (B + 5)),
    "vb": Example("vb_lora", {"rank": 2, "bank": 8, "length": 2, "topk": 2}, 8 * 2 + L * 2 * (A + B) // 2 * (2 + 1)),
    "mos": Example("mos", {"rank": 2, "pool_rank": 1, "private_rank": 0, "shards": 2}, L * (A + B)),
    "mos, one term private": Example(
        "mos", {"rank": 4, "pool_rank": 2, "private_rank": 1, "shards": 2}, L * 2 * (A + B)
    ),
    "joint full": Example("joint_full", {"rank": 3, "core": "full"}, 3 * (A + B) + L * 9),
    "joint diagonal, L divides R": Example("joint_diagonal", {"rank": 3, "core": "diagonal"}, 3 * (A + B + L)),
    "joint diagonal, R = 4": Example("joint_diagonal", {"rank": 4, "core": "diagonal"}, 4 * (A + B + L)),
    "one-sided columns": Example(
        "one_sided", {"private_rank": 1, "shared_rank": 2, "side": "columns"}, L * (A + B) + 2 * B + L * 2 * A
    ),
    "one-sided rows": Example(
        "one_sided", {"private_rank": 1, "shared_rank": 2, "side": "rows"}, L * (A + B) + 2 * A + L * 2 * B
    ),
    "basis of columns": Example(
        "share_basis", {"rank": 2, "components": 3, "basis": "columns"}, 3 * (A + B) + L * 2 * 3 * 2
    ),
    "basis of whole factors": Example(
        "share_basis", {"rank": 2, "components": 1, "basis": "whole"}, 2 * 2 * (A + B) + 2 * L
    ),
}
"""A new method has its configurations here, and then the laws below hold for it too."""
STACKS = {
    "noise": noise(L, B, A),
    "decaying": problems.decaying(L, B, A),
    "identical": np.repeat(noise(1, B, A, 3), L, 0),
    "orthogonal layers": np.stack(
        [problems.orthogonal(9, 1)[:8, 2 * i : 2 * i + 2] @ noise(1, 2, A, i)[0] for i in range(L)]
    ),
    "rank one": np.stack([np.outer(x, y) for x, y in zip(noise(1, L, B, 4)[0], noise(1, L, A, 5)[0], strict=True)]),
}


EXAMPLES = [pytest.param(name, marks=pytest.mark.slow) if name == "joint diagonal, R = 4" else name for name in FITS]
"""The names of all examples. The search for a core of R = 4 terms takes seconds."""


@functools.cache
def fit(name, stack):
    return FITS[name].fit(rt.LayerStack(STACKS[stack]))


def direct(M, found):
    return sum(float(((torch.as_tensor(m) - found.update(i)) ** 2).sum()) for i, m in enumerate(M))


@pytest.mark.slow
@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("name", EXAMPLES)
def test_laws_of_all_methods(name, stack):
    M, found = STACKS[stack], fit(name, stack)
    norm = float((M**2).sum())
    assert found.error == pytest.approx(direct(M, found), rel=1e-12, abs=1e-20)
    assert found.error >= tail(M, found.update_rank) - 1e-12 * norm
    assert np.linalg.matrix_rank(found.update(0).numpy(), tol=1e-9) <= found.update_rank
    assert found.method == FITS[name].method
    assert found.settings == FITS[name].settings
    assert found.parameters == FITS[name].parameters
    if found.evidence is not Evidence.OF_FACTORS:  # which may do worse than no update at all
        assert found.error <= norm * (1 + 1e-12)
    for before, after in zip(found.history, found.history[1:], strict=False):
        assert after <= before + 1e-12 * norm
    if found.history:
        assert found.error == pytest.approx(found.history[-1], abs=1e-10 * norm)
    if found.floor is not None:
        assert 0 <= found.floor <= found.error


def test_every_method_has_its_examples():
    assert {example.method for example in FITS.values()} == set(methods.METHODS)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_formula_of_a_method_counts_what_its_fit_stores(name):
    example = FITS[name]
    method = methods.METHODS[example.method]
    assert method.parameters(L, (B, A), **example.settings) == example.parameters
    other = rt.LayerStack(problems.decaying(4, 10, 8))
    assert method.parameters(4, (10, 8), **example.settings) == example.fit(other).parameters


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_scaling_the_stack_scales_the_error_by_its_square(name):
    M = STACKS["decaying"]
    for c in (2.0**40, 3.0):
        assert FITS[name].fit(rt.LayerStack(c * M)).error == pytest.approx(c**2 * fit(name, "decaying").error, rel=2e-3)


@pytest.mark.parametrize("name", EXAMPLES)
def test_nothing_is_left_of_nothing(name):
    found = FITS[name].fit(rt.LayerStack(np.zeros((L, B, A))))
    assert found.error == 0.0
    assert not found.update(1).any()


@pytest.mark.parametrize("name", EXAMPLES)
def test_float32_is_measured_in_float64(name):
    M = STACKS["decaying"].astype(np.float32)
    found = FITS[name].fit(rt.LayerStack(M))
    assert found.update(0).dtype == torch.float64
    assert found.error == pytest.approx(direct(M.astype(np.float64), found), rel=1e-9)
    assert found.error == pytest.approx(fit(name, "decaying").error, rel=1e-2)


def test_shared_a_is_the_svd_of_the_layers_below_each_other_and_shared_b_beside():
    M, s = problems.decaying(L, B, A), rt.LayerStack(problems.decaying(L, B, A))
    below, beside = M.reshape(L * B, A), M.transpose(1, 0, 2).reshape(B, L * A)
    assert methods.fit_share_lora(s, 2, "A").error == pytest.approx(tail(below, 2))
    assert methods.fit_share_lora(s, 2, "B").error == pytest.approx(tail(beside, 2))
    assert methods.fit_share_lora(s.transpose(), 2, "A").error == pytest.approx(tail(beside, 2))


def test_all_shared_is_the_svd_of_the_mean_and_the_scatter_about_it():
    M = problems.decaying(L, B, A)
    expected = L * tail(M.mean(0), 2) + float(((M - M.mean(0)) ** 2).sum())
    assert methods.fit_share_lora(rt.LayerStack(M), 2, "both").error == pytest.approx(expected)


def test_lora_and_allocated_leave_the_smallest_singular_values():
    M = STACKS["decaying"] * np.array([1.0, 4.0, 0.3])[:, None, None]
    sigma = np.sort(np.linalg.svd(M, compute_uv=False).ravel() ** 2)
    assert methods.fit_lora(rt.LayerStack(M), 2).error == pytest.approx(tail(M, 2))
    assert methods.fit_allocated(rt.LayerStack(M), 2 * L).error == pytest.approx(sigma[: -L * 2].sum())
    assert methods.fit_allocated(rt.LayerStack(M), 2).error == pytest.approx(sigma[:-2].sum())  # fewer than layers


def cut(M, rows, columns):
    """The blocks of all layers by numpy, layer by layer and row by row."""
    return np.stack([block for m in M for strip in np.split(m, rows) for block in np.split(strip, columns, 1)])


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 2), (2, 3), (4, 1), (1, 6), (12, 18)])
def test_block_lora_leaves_what_the_svd_of_every_block_leaves(rows, columns):
    M = problems.decaying(2, 12, 18)
    blocks = cut(M, rows, columns)
    rank, s = min(2, *blocks.shape[1:]), rt.LayerStack(M)
    found = methods.fit_block_lora(s, rank, rows, columns)
    assert found.error == pytest.approx(tail(blocks, rank), rel=1e-12, abs=1e-20)
    U, S, Vh = np.linalg.svd(blocks, full_matrices=False)
    nearest = (U[:, :, :rank] * S[:, None, :rank]) @ Vh[:, :rank]
    np.testing.assert_allclose(cut([found.update(i).numpy() for i in range(2)], rows, columns), nearest, atol=1e-12)
    terms = 2 * rows * columns  # one a block, if they were equal
    squares = np.sort(S.ravel() ** 2)[::-1]
    allocated = methods.fit_allocated_blocks(s, terms, rows, columns)
    assert allocated.error == pytest.approx(squares[terms:].sum(), rel=1e-12, abs=1e-20)
    assert allocated.error <= methods.fit_block_lora(s, 1, rows, columns).error * (1 + 1e-12)


def test_a_grid_of_one_block_is_lora():
    s = rt.LayerStack(STACKS["decaying"])
    one, lora = methods.fit_block_lora(s, 2, 1, 1), methods.fit_lora(s, 2)
    assert (one.error, one.parameters, one.update_rank) == (pytest.approx(lora.error), lora.parameters, 2)
    one, allocated = methods.fit_allocated_blocks(s, 5, 1, 1), methods.fit_allocated(s, 5)
    assert (one.error, one.parameters) == (pytest.approx(allocated.error), allocated.parameters)
    assert one.update_rank == allocated.update_rank
    torch.testing.assert_close(one.update(2), allocated.update(2))


def test_four_unlike_blocks_of_rank_one_are_no_matrix_of_rank_two():
    u, v = noise(4, 6, 1, 1), noise(4, 1, 5, 2)
    M = np.block([[u[0] @ v[0], u[1] @ v[1]], [u[2] @ v[2], u[3] @ v[3]]])[None]
    blocks, lora = methods.fit_block_lora(rt.LayerStack(M), 1), methods.fit_lora(rt.LayerStack(M), 2)
    assert blocks.parameters == lora.parameters == 2 * (12 + 10)
    assert blocks.error < 1e-24
    assert blocks.update_rank == np.linalg.matrix_rank(M[0]) == 4
    assert lora.error == pytest.approx(tail(M, 2))
    assert lora.error > 0.05 * (M**2).sum()


def test_a_matrix_of_rank_two_is_no_four_blocks_of_rank_one():
    M = noise(1, 12, 2, 1) @ noise(1, 2, 10, 2)
    blocks, lora = methods.fit_block_lora(rt.LayerStack(M), 1), methods.fit_lora(rt.LayerStack(M), 2)
    assert blocks.parameters == lora.parameters
    assert lora.error < 1e-24
    assert blocks.error == pytest.approx(tail(cut(M, 2, 2), 1))
    assert blocks.error > 0.05 * (M**2).sum()


def test_a_block_diagonal_matrix_needs_ranks_on_its_diagonal_alone():
    """Equal ranks pay for the zeros: then LoRA of the same size is exact as well. Allocated ranks do not."""
    M = np.zeros((1, 12, 10))
    M[0, :6, :5], M[0, 6:, 5:] = noise(2, 6, 2, 1) @ noise(2, 2, 5, 2)
    s = rt.LayerStack(M)
    equal, lora = methods.fit_block_lora(s, 2), methods.fit_lora(s, 4)
    assert equal.parameters == lora.parameters
    assert max(equal.error, lora.error) < 1e-24
    allocated, lora = methods.fit_allocated_blocks(s, 4), methods.fit_lora(s, 2)
    assert allocated.parameters == lora.parameters
    assert allocated.error < 1e-24
    assert allocated.update_rank == 4
    assert lora.error == pytest.approx(tail(M, 2))
    assert lora.error > 0.01 * (M**2).sum()


@pytest.mark.parametrize("name", ["rows of blocks", "blocks", "allocated blocks"])
def test_blocks_of_transposed_layers_are_transposed_blocks(name):
    s, example = rt.LayerStack(noise(3, 8, 6)), FITS[name]
    turned = example.settings | {"rows": example.settings["columns"], "columns": example.settings["rows"]}
    found = methods.METHODS[example.method].solve(s.transpose(), **turned)
    assert found.error == pytest.approx(example.fit(s).error)
    assert found.parameters == example.parameters
    torch.testing.assert_close(found.update(1), example.fit(s).update(1).mT)
    assert found.error == pytest.approx(direct(s.values.mT, found))


def test_blocks_are_read_from_any_storage():
    B, A = torch.as_tensor(noise(3, 8, 4, 1)), torch.as_tensor(noise(3, 4, 6, 2))
    dense = B @ A
    stored = {
        "factors": rt.LayerStack(Factored(B, A)),
        "unit view": rt.LayerStack(5 * dense).unit(),
        "half precision": rt.LayerStack(dense.half()),
        "layers of unit norm": normalised_layers(rt.LayerStack(dense))[0],
    }
    for name, s in stored.items():
        found = methods.fit_block_lora(s, 1)
        M = s.values.double().numpy()
        assert found.error == pytest.approx(tail(cut(M, 2, 2), 1), rel=1e-5), name
        assert found.error == pytest.approx(direct(M, found), rel=1e-9), name


def test_rasa_without_a_pool_is_lora_and_keeps_its_floor():
    s = rt.LayerStack(problems.decaying())
    assert methods.fit_rasa(s, 3, 0).error == pytest.approx(methods.fit_lora(s, 3).error)
    found = methods.fit_rasa(s, 3, 1)
    assert found.floor == pytest.approx(rt.lower_bound(s, rt.RankBudget(3, 1)).value)
    assert 0 < found.floor <= found.error <= rt.allocation_bound(s, rt.RankBudget(3, 1)).value * (1 + 1e-12)


def test_identical_layers_need_one_update_only():
    M = STACKS["identical"]
    for name, rank in (("share both", 2), ("joint full", 3), ("joint diagonal, L divides R", 3), ("rasa", 4)):
        assert fit(name, "identical").error == pytest.approx(tail(M, rank), rel=1e-6)
    # rank-one layers of one common row
    rows = np.stack([np.outer(x, noise(1, 1, A, 5)[0, 0]) for x in noise(1, L, B, 4)[0]])
    assert methods.fit_share_lora(rt.LayerStack(rows), 1, "A").error == pytest.approx(0, abs=1e-20)


def test_with_orthogonal_layers_plain_cp_is_the_best_allocation():
    M, budget, optimum = problems.orthogonal_columns()
    assert methods.fit_joint(rt.LayerStack(M), budget.rank * len(M), "diagonal").error == pytest.approx(optimum)
    assert methods.fit_allocated(rt.LayerStack(M), budget.rank * len(M)).error == pytest.approx(optimum)


@pytest.mark.slow
@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("R", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_a_full_core_is_not_above_a_diagonal_one(stack, R):
    s = rt.LayerStack(STACKS[stack])
    full, diagonal = (methods.fit_joint(s, R, core).error for core in ("full", "diagonal"))
    assert full <= diagonal + 1e-9 * s.norm_squared


def test_what_many_layers_have_a_little_of_does_not_hide_what_one_has_much_of():
    """One dyad of norm 1 in one layer; in the others, columns and rows in common, but no dyad: each norm 0.9."""
    M = np.zeros((4, 6, 6))
    M[0, 0, 0] = 1.0
    M[1, 1, 1], M[2, 1, 2] = 0.9, 0.9  # a common column
    M[3, 3, 2] = 0.9  # a common row
    for core in ("full", "diagonal"):
        assert methods.fit_joint(rt.LayerStack(M), 1, core).error == pytest.approx(3 * 0.81)


def test_the_floor_of_joint_bases_is_the_larger_tail_of_the_layers_beside_and_below_each_other():
    """Layers of one common row: beside each other they are of full rank, below each other of rank one."""
    M = noise(5, 12, 1, 1) @ noise(1, 1, 10, 2)
    s = rt.LayerStack(3 * M)
    beside = 9 * tail(M.transpose(1, 0, 2).reshape(12, 50), 2)
    assert methods.joint_floor(s, 2) == pytest.approx(beside)
    assert methods.joint_floor(s.transpose(), 2) == pytest.approx(beside)
    for core in ("full", "diagonal"):
        assert methods.fit_joint(s, 2, core).floor == methods.joint_floor(s, 2)
    assert methods.joint_floor(s, 12) == 0.0


def test_identical_layers_reach_the_floor_of_joint_bases():
    s = rt.LayerStack(STACKS["identical"])
    for R in (1, 3, 5):
        assert methods.fit_joint(s, R, "full").error == pytest.approx(methods.joint_floor(s, R))


@pytest.mark.slow
@pytest.mark.parametrize("R", [6, pytest.param(7, marks=pytest.mark.slow), 9])
def test_the_floor_holds_for_more_columns_than_the_smaller_side(R):
    """A diagonal core of R > min(b, a) terms: all rows, and still not all columns if R < b."""
    s = rt.LayerStack(noise(4, 8, 6))
    found = methods.fit_joint(s, R, "diagonal")
    assert 0 <= found.floor <= found.error
    assert (found.floor > 0) == (R < 8)


@pytest.mark.slow
@pytest.mark.parametrize("core", ["full", "diagonal"])
def test_planted_joint_bases_are_found(core):
    U, V, C = noise(1, B, 4, 1)[0], noise(1, 4, A, 2)[0], noise(L, 4, 4, 3)
    s = rt.LayerStack(U @ (C if core == "full" else C * np.eye(4)) @ V)
    assert methods.fit_joint(s, 4, core).error <= 1e-10 * s.norm_squared


def test_a_full_core_of_full_rank_leaves_nothing():
    assert methods.fit_joint(rt.LayerStack(noise(L, A, A)), A, "full").error < 1e-20


def test_planted_tied_lora_is_found():
    shapes = (4, 10), (10, 2), (4, 2), (2, 9)
    f = Diagonals(*(torch.as_tensor(noise(1, *shape, n)[0]) for n, shape in enumerate(shapes)))
    s = rt.LayerStack(torch.stack([f.update(i) for i in range(4)]))
    assert methods.fit_tied_lora(s, 2, starts=8, max_sweeps=400).error <= 1e-20 * s.norm_squared


def test_tied_lora_of_rank_one_and_no_scaling_is_at_most_share_lora():
    s = rt.LayerStack(problems.decaying())
    assert methods.fit_tied_lora(s, 2).error <= methods.fit_share_lora(s, 2, "both").error * (1 + 1e-9)


def test_vera_of_rank_a_b_fits_anything():
    s = rt.LayerStack(noise(2, 3, 4))
    assert methods.fit_vera(s, 12).error <= 1e-12 * s.norm_squared
    assert methods.fit_vera(s, 2).error > 0.1 * s.norm_squared


def test_vera_draws_the_same_bases_from_the_same_seed():
    s = rt.LayerStack(STACKS["noise"])
    assert methods.fit_vera(s, 4, seed=1).error == methods.fit_vera(s, 4, seed=1).error
    assert methods.fit_vera(s, 4, seed=1).error != methods.fit_vera(s, 4, seed=2).error


def test_a_bank_with_a_vector_for_every_sub_vector_is_lora():
    s = rt.LayerStack(STACKS["decaying"])
    n = L * 2 * (A + B) // 2
    found = methods.fit_vb_lora(s, 2, bank=n, length=2, topk=1)
    assert found.error == pytest.approx(methods.fit_lora(s, 2).error, rel=1e-6)


def test_a_bank_falls_below_where_it_begins_and_rises_nowhere():
    found = methods.fit_vb_lora(rt.LayerStack(STACKS["decaying"]), 2, bank=10, length=2)
    assert found.error < 0.9 * found.history[0]
    assert found.error >= methods.fit_lora(rt.LayerStack(STACKS["decaying"]), 2).error


def test_mos_with_private_shards_alone_is_lora():
    s = rt.LayerStack(STACKS["decaying"])
    found = methods.fit_mos(s, rank=2, pool_rank=2, private_rank=2, shards=2)
    assert found.error == pytest.approx(methods.fit_lora(s, 2).error)
    assert found.parameters == methods.fit_lora(s, 2).parameters


def test_mos_puts_its_vectors_together_as_its_authors_do():
    """Their rows: mat[mask], every l-th of them from i on, side by side for i = 0 .. l - 1."""
    pool, places = torch.as_tensor(noise(1, 12, 3, 1)[0]), torch.randperm(24).reshape(2, 4, 3) % 12
    for i, mask in enumerate(places.flatten(1)):
        rows = pool[mask]
        theirs = torch.cat([rows[n::3] for n in range(3)], 1)
        torch.testing.assert_close(methods.Shards(pool, places).vectors()[i], theirs)


def test_planted_pools_of_shards_are_found():
    s = rt.LayerStack(noise(3, 8, 6))
    first = methods.fit_mos(s, 3, 2, 1, 2, seed=5, max_sweeps=1)
    planted = rt.LayerStack(torch.stack([first.update(i) for i in range(3)]))
    assert methods.fit_mos(planted, 3, 2, 1, 2, seed=5, max_sweeps=2000).error <= 1e-6 * planted.norm_squared
    assert methods.fit_mos(planted, 3, 2, 1, 2, seed=6).error > 1e-3 * planted.norm_squared  # at other places


def test_layers_of_rank_one_fit_into_a_private_term_that_no_other_layer_uses():
    s = rt.LayerStack(STACKS["rank one"])
    assert methods.fit_mos(s, rank=2, pool_rank=2, private_rank=1, shards=2).error <= 1e-20 * s.norm_squared
    assert methods.fit_mos(s, rank=2, pool_rank=2, private_rank=0, shards=2).error > 1e-3 * s.norm_squared


def test_mos_is_not_above_lora_of_its_private_terms():
    s = rt.LayerStack(problems.decaying(4, 16, 12))
    for p in (1, 2):
        found = methods.fit_mos(s, rank=6, pool_rank=3, private_rank=p, shards=4)
        assert found.error < methods.fit_lora(s, p).error
        assert found.error >= methods.fit_lora(s, 6).error


@pytest.mark.slow
@pytest.mark.parametrize("R", [pytest.param(5, marks=pytest.mark.slow), 7])
def test_a_diagonal_core_is_not_above_the_leading_terms_of_all_layers(R):
    s = rt.LayerStack(problems.decaying(4, 16, 12))
    assert methods.fit_joint(s, R, "diagonal").error <= methods.fit_allocated(s, R).error * (1 + 1e-12)


@pytest.mark.parametrize("side", ["columns", "rows"])
def test_planted_one_sided_pools_are_found(side):
    layers, b, a, q, p = 4, 10, 12, 1, 2
    M = noise(layers, b, q, 1) @ noise(layers, q, a, 2) + noise(1, b, p, 3) @ noise(layers, p, a, 4)
    s = rt.LayerStack(M if side == "columns" else M.transpose(0, 2, 1))
    assert methods.fit_one_sided(s, q, p, side, max_sweeps=500).error <= 1e-5 * s.norm_squared


def test_one_sided_pools_without_one_part_are_lora_and_share_lora():
    s = rt.LayerStack(STACKS["decaying"])
    assert methods.fit_one_sided(s, 2, 0).error == pytest.approx(methods.fit_lora(s, 2).error)
    assert methods.fit_one_sided(s, 0, 2, "columns").error == pytest.approx(methods.fit_share_lora(s, 2, "B").error)
    assert methods.fit_one_sided(s, 0, 2, "rows").error == pytest.approx(methods.fit_share_lora(s, 2, "A").error)
    assert methods.fit_one_sided(s, 0, 2).evidence is Evidence.CLOSED_FORM
    assert methods.fit_one_sided(s, 1, 2).error <= methods.fit_lora(s, 1).error
    assert methods.fit_one_sided(s, 1, 2).error <= methods.fit_share_lora(s, 2, "B").error


def test_bases_that_hold_all_factors_lose_nothing_and_without_their_mean_they_do():
    s = rt.LayerStack(problems.decaying(3, 14, 14))
    e_lora = methods.fit_lora(s, 2).error
    assert methods.fit_share_basis(s, 2, 14, "columns").error == pytest.approx(e_lora)
    assert methods.fit_share_basis(s, 2, 6, "columns").error > 1.05 * e_lora  # six columns less their mean span five
    assert methods.fit_share_basis(s, 2, 2, "whole").error == pytest.approx(e_lora)
    assert methods.fit_share_basis(s, 2, 3, "columns").error >= methods.fit_joint(s, 3, "full").error


def test_given_factors_are_what_is_compressed():
    s = rt.LayerStack(4 * STACKS["decaying"])
    factors = rt.LoraFactors(torch.as_tensor(noise(L, B, 2, 8)), torch.as_tensor(noise(L, 2, A, 9)))
    found = methods.fit_share_basis(s, 2, 6, "columns", factors)
    P = factors.B.transpose(0, 1).flatten(1)
    P = torch.linalg.eigh((P - P.mean(1, keepdim=True)) @ (P - P.mean(1, keepdim=True)).mT)[1][:, -6:]
    torch.testing.assert_close(found.update(1), P @ P.mT @ factors.B[1] @ factors.A[1])


def collection(layers=4, b=12, a=10, r=2):
    return rt.LoraFactors(torch.as_tensor(noise(layers, b, r, 1)), torch.as_tensor(noise(layers, r, a, 2)))


def as_stack(factors):
    return rt.LayerStack(torch.stack([factors.update(i) for i in range(len(factors.B))]))


def test_columns_are_what_lorashare_computes():
    compression = pytest.importorskip("lorashare.compression")
    factors = collection()
    keys = {side: f"base_model.model.q.lora_{side}.weight" for side in "AB"}
    adapters = {
        str(i): {keys["A"]: factors.A[i].float(), keys["B"]: factors.B[i].float()} for i in range(len(factors.B))
    }
    parts, _, _ = compression.compute_shared_components(
        compression.combine_adapter_weights(adapters), num_components=5, device="cpu"
    )
    found = methods.fit_share_basis(as_stack(factors), 2, 5, "columns", factors)
    for i, adapter in adapters.items():
        theirs = compression.reconstruct_adapter_weights(parts, compression.compute_adapter_loadings(parts, adapter))
        update = theirs[keys["B"]] @ theirs[keys["A"]]
        torch.testing.assert_close(found.update(int(i)).float(), update, rtol=1e-4, atol=1e-4)


def test_whole_factors_are_what_vlora_computes():
    vlora = pytest.importorskip("vlora")
    factors = collection()
    adapters = [
        vlora.LoRAWeights(["q"], {"q": factors.A[i].float()}, {"q": factors.B[i].float()}, 2)
        for i in range(len(factors.B))
    ]
    space = vlora.SharedSubspace.from_adapters(adapters, num_components=2)
    found = methods.fit_share_basis(as_stack(factors), 2, 2, "whole", factors)
    for i in range(len(adapters)):
        theirs = space.reconstruct(f"task_{i}")
        update = theirs.lora_b["q"] @ theirs.lora_a["q"]
        torch.testing.assert_close(found.update(i).float(), update, rtol=1e-4, atol=1e-4)
