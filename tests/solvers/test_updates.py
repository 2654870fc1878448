"""Each block update is the minimiser that it says it is, and never raises the error."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given

from rasa_theory import (
    InputError,
    LayerStack,
    RankBudget,
    RasaFactors,
    linalg,
    mixing_drop,
    reconstruction_error,
    solve_lora,
)
from rasa_theory.solvers import drop_allowance, measurable, random_start, resolve_mixing, term_norms, term_size, updates
from tests.helpers import reference
from tests.helpers.problems import SHAPES, noise, random_factors
from tests.helpers.strategies import nasty_stacks


def plain(factors):
    return reference.Factors(*(t.numpy() for t in factors.named().values()))


def norms(stack):
    return stack.layer_norms(torch.float64)


def mixing(stack, f):
    return updates.update_mixing(stack.right(f.shared_A.mT), norms(stack), f)


def shared_B(stack, f):
    return updates.update_shared_B(stack.right(f.shared_A.mT), norms(stack), f)


def shared_A(stack, f):
    return shared_B(stack.transpose(), f.transpose()).transpose()


def orthonormal(f):
    """Orthonormal rows in every A~_i, unit columns in the pool; a joint half does not read B~_i."""
    f = f.normalised()
    return dataclasses.replace(f, private_A=torch.linalg.qr(f.private_A.mT)[0].mT)


def joint(stack, f):
    f = orthonormal(f)
    return updates.joint_half(stack.right(f.shared_A.mT), stack.right(f.private_A.mT), norms(stack), f)


def joint_B(stack, f):
    return joint(stack, f).factors


def joint_A(stack, f):
    return joint(stack.transpose(), f.transpose()).factors.transpose()


STEPS = {
    "private": updates.update_private,
    "mixing": mixing,
    "shared_B": shared_B,
    "shared_A": shared_A,
    "joint_B": joint_B,
    "joint_A": joint_A,
}


def literal(M, f):
    """The same steps by the reference: name -> factors."""
    T, t = (
        M.transpose(0, 2, 1),
        reference.Factors(f.At.transpose(0, 2, 1), f.Bt.transpose(0, 2, 1), f.A_S.T, f.B_S.T, f.D),
    )

    def joint_half(M, f):
        B_S, _ = reference.all_B(M, f.At, f.A_S, f.D)
        Bt, D = reference.private_B_and_mixing(M, f.At, B_S, f.A_S)
        return reference.error(M, Bt, f.At, B_S, f.A_S, D)

    Bt, At = reference.private(M, f.Bt.shape[2], f.B_S, f.A_S, f.D)
    return {
        "private": reference.error(M, Bt, At, f.B_S, f.A_S, f.D),
        "mixing": reference.error(M, *f._replace(D=reference.mixing(M, f.Bt, f.At, f.B_S, f.A_S))),
        "shared_B": reference.error(M, *f._replace(B_S=reference.shared_B(M, f.Bt, f.At, f.A_S, f.D))),
        "shared_A": reference.error(M, *f._replace(A_S=reference.shared_A(M, f.Bt, f.At, f.B_S, f.D))),
        "joint_B": joint_half(M, f),
        "joint_A": joint_half(T, t),
    }


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("L", "b", "a", "r", "k", "seed"), [*SHAPES, (3, 6, 5, 2, 0, 6), (1, 6, 5, 2, 1, 7)])
def test_each_step_is_the_literal_minimiser(L, b, a, r, k, seed, step):
    M, factors = noise(L, b, a, seed), random_factors(L, b, a, r, k, seed)
    stack = LayerStack(M)
    found = reconstruction_error(stack, STEPS[step](stack, factors))
    assert found == pytest.approx(literal(M, plain(factors))[step], rel=1e-9)


def test_steps_leave_the_other_factors_alone():
    stack, f = LayerStack(noise(3, 6, 8, 1)), random_factors(3, 6, 8, 3, 1)
    for step, moved in (
        ("private", {"private_B", "private_A"}),
        ("mixing", {"mixing"}),
        ("shared_B", {"shared_B", "mixing"}),  # the columns' norms go into the mixing
        ("shared_A", {"shared_A", "mixing"}),
    ):
        after = STEPS[step](stack, f).named()
        # to rounding: unit columns are normalised again
        assert {name for name, x in f.named().items() if not torch.allclose(x, after[name], atol=1e-15)} == moved


def test_the_private_step_of_the_paper_and_the_short_cut_agree():
    M, f = noise(3, 20, 30, 1), random_factors(3, 20, 30, 3, 1)
    errors = [reconstruction_error(LayerStack(M), updates.update_private(LayerStack(M), f, exact=e)) for e in (0, 1)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-13)


# ---- never up


def assert_no_step_raises_the_error(stack, factors):
    before = reconstruction_error(stack, factors)
    for name, step in STEPS.items():
        after = step(stack, factors)
        allowed = max(measurable(stack, factors), measurable(stack, after))
        assert linalg.not_above(reconstruction_error(stack, after), before, allowed), name


@given(nasty_stacks(scales=(1.0,)))
def test_no_step_raises_the_error(problem):
    stack = problem.stack.unit()
    L, b, a = problem.values.shape
    assert_no_step_raises_the_error(stack, random_factors(L, b, a, problem.r, problem.k))


@pytest.mark.parametrize("size", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("gap", [1e-3, 1e-6, 1e-9, 1e-12, 0.0])
@pytest.mark.parametrize("seed", range(4))
def test_two_nearly_cancelling_terms_do_no_harm(seed, gap, size):
    """b_1 and b_2 agree to `gap`, a_1 and a_2 too, with weights `size` and -`size`."""
    f = random_factors(3, 7, 6, 3, 1, seed)
    B_S, A_S, D = f.shared_B.clone(), f.shared_A.clone(), f.mixing.clone()
    B_S[:, 1] = B_S[:, 0] + gap * B_S[:, 1]
    A_S[1] = A_S[0] + gap * A_S[1]
    D[:, 0], D[:, 1] = size, -size
    f = dataclasses.replace(f, shared_B=B_S, shared_A=A_S, mixing=D).normalised()
    # the stack is what the factors make, and a little more: the error to be kept is small beside the terms
    updates_of_f = np.stack([f.update(i).numpy() for i in range(3)])
    assert_no_step_raises_the_error(LayerStack(updates_of_f + 1e-2 * noise(3, 7, 6, seed)), f)


@pytest.mark.parametrize("dead", ["shared_B", "shared_A", "mixing", "private"])
def test_dead_columns(dead):
    """A pool term without a column, a row or a weight; no private term: finite, and never up."""
    stack, f = LayerStack(noise(3, 6, 5)), random_factors(3, 6, 5, 3, 1)
    changed = {name: x.clone() for name, x in f.named().items()}
    if dead == "shared_A":
        changed["shared_A"][1] = 0
    elif dead == "private":
        changed["private_B"].zero_()
        changed["private_A"].zero_()
    else:
        changed[dead][:, 1] = 0
    f = RasaFactors(**changed)
    assert_no_step_raises_the_error(stack, f)
    assert all(bool(torch.isfinite(x).all()) for step in STEPS.values() for x in step(stack, f).named().values())


@pytest.mark.parametrize(
    ("L", "b", "a", "r", "k"), [(4, 3, 9, 3, 3), (4, 9, 3, 3, 2), (4, 2, 2, 2, 2), (4, 1, 6, 1, 1)]
)
def test_more_pool_ranks_than_rows_or_columns(L, b, a, r, k):
    assert_no_step_raises_the_error(LayerStack(noise(L, b, a)), random_factors(L, b, a, r, k))


# ---- values that steps hand back


@pytest.mark.parametrize(("L", "b", "a", "r", "k", "seed"), SHAPES)
def test_the_error_of_a_joint_half_is_the_direct_residual(L, b, a, r, k, seed):
    stack, f = LayerStack(noise(L, b, a, seed)), random_factors(L, b, a, r, k, seed)
    for side, start in ((stack, f), (stack.transpose(), f.transpose())):
        half = joint(side, start)
        assert float(half.error) == pytest.approx(reconstruction_error(side, half.factors), rel=1e-12)


@pytest.mark.parametrize(("L", "b", "a", "r", "k", "seed"), SHAPES)
def test_a_joint_half_in_which_only_leading_rows_of_the_pool_move(L, b, a, r, k, seed):
    """The other rows of B_S stay; those of B~_i, and every d_i, are the best beside them."""
    M, f, rows = noise(L, b, a, seed), random_factors(L, b, a, r, k, seed), b // 2
    f, stack = orthonormal(f), LayerStack(M)
    products = stack.right(f.shared_A.mT), stack.right(f.private_A.mT)
    half = updates.joint_half(*products, norms(stack), f, rows)
    p = plain(f)
    B_S = np.concatenate([reference.all_B(M[:, :rows], p.At, p.A_S, p.D)[0], p.B_S[rows:]])
    Bt, D = reference.private_B_and_mixing(M, p.At, B_S, p.A_S)
    expected = reference.error(M, Bt, p.At, B_S, p.A_S, D)
    assert reconstruction_error(stack, half.factors) == pytest.approx(expected, rel=1e-9)
    assert float(half.error) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("L", "b", "a", "r", "k", "seed"), SHAPES)
@pytest.mark.parametrize("pooled", ["smallest", "largest"])
def test_mixing_drop_at_the_embedding_of_lora(L, b, a, r, k, seed, pooled):
    """Positive, and what re-solving D measures: the inequality between RaSA and LoRA is strict."""
    M = noise(L, b, a, seed)
    stack = LayerStack(M)
    f = RasaFactors.from_lora(solve_lora(stack, r).factors, RankBudget(r, k), pooled)
    p = plain(f)
    after = reference.error(M, *p._replace(D=reference.mixing(M, p.Bt, p.At, p.B_S, p.A_S)))
    drop = mixing_drop(stack, f)
    assert drop > 0
    # the measured drop is a difference of two errors, each known to 1e-13 of itself
    assert drop == pytest.approx(reference.error(M, *p) - after, rel=1e-8, abs=1e-13 * stack.norm_squared)


@given(nasty_stacks())
def test_mixing_drop_is_never_negative_nor_more_than_the_error(problem):
    stack, size = problem.stack, 0.3 if problem.values.any() else 0.0
    f = random_start(stack, problem.budget, seed=1, size=size)
    drop, error = mixing_drop(stack, f), reconstruction_error(stack, f)
    resolved, same = resolve_mixing(stack, f)
    assert drop == same >= 0
    assert linalg.not_above(drop, error, measurable(stack, f))
    left = reconstruction_error(stack, resolved)
    assert abs(error - left - drop) <= drop_allowance(stack, f, error, resolved, left)


@pytest.mark.parametrize("seed", [36, 60, 65, 89, 137])
@pytest.mark.parametrize("pooled", ["smallest", "largest"])
def test_mixing_drop_stays_a_lower_bound_where_pool_terms_nearly_cancel(seed, pooled):
    """Layers that are nearly equal: re-solving D makes terms of more than 1e4 ||M||."""
    rng = np.random.default_rng(seed)
    M = rng.standard_normal((1, 3, 2)) + 1e-3 * rng.standard_normal((6, 3, 2))
    stack = LayerStack(M)
    e_lora = reference.e_lora(M, 1)
    f = RasaFactors.from_lora(solve_lora(stack, 1).factors, RankBudget(1, 1), pooled)
    resolved, drop = resolve_mixing(stack, f)
    before, after = (reconstruction_error(stack, x) for x in (f, resolved))
    assert term_size(stack, resolved) > 1e4 * np.linalg.norm(M)
    assert 0.9 * (before - after) < drop <= e_lora
    assert abs(before - after - drop) <= drop_allowance(stack, f, before, resolved, after)


def test_mixing_drop_is_zero_where_nothing_can_be_gained():
    stack = LayerStack(noise(1, 6, 5))
    f = RasaFactors.from_lora(solve_lora(stack, 3).factors, RankBudget(3, 2))
    assert mixing_drop(stack, f) == 0.0


@pytest.mark.parametrize("shape", [(2, 6, 5), (1, 6, 5), (3, 7, 5), (3, 6, 4)])
def test_mixing_drop_refuses_factors_of_another_stack(shape):
    """Factors of one layer would broadcast, those of fewer layers would leave layers out."""
    stack, f = LayerStack(noise(3, 6, 5), "mine"), random_start(LayerStack(noise(*shape)), RankBudget(2, 1), seed=0)
    sentence = "^the factors are of {} layers of {} x {}, stack 'mine' has 3 of 6 x 5$".format(*shape)
    with pytest.raises(InputError, match=sentence):
        mixing_drop(stack, f)


def test_normalising_the_pool_changes_no_update():
    f = random_factors(3, 7, 6, 3, 1)
    loose = dataclasses.replace(f, shared_B=7 * f.shared_B, shared_A=f.shared_A / 3)
    loose.shared_B[:, 2] = 0
    changed = loose.normalised()
    for i in range(3):
        assert torch.allclose(changed.update(i), loose.update(i), rtol=0, atol=1e-13)
    assert torch.allclose(torch.linalg.vector_norm(changed.shared_B, dim=0), torch.tensor([1.0, 1.0, 0.0]).double())
    assert torch.allclose(torch.linalg.vector_norm(changed.shared_A, dim=1), torch.ones(3).double())
    expected = [
        sum(
            torch.linalg.matrix_norm(torch.outer(f.shared_B[:, j], f.shared_A[j])) * abs(f.mixing[i, j])
            for j in range(3)
        )
        for i in range(3)
    ]
    assert torch.allclose(term_norms(f), torch.stack(expected))
