"""RaSA's neighbours against known answers, and laws that hold for all of them."""

import functools

import numpy as np
import pytest
import torch

import rasa_theory as rt
from rasa_theory import methods
from rasa_theory.methods import Diagonals, Evidence, Steps, alternate
from rasa_theory.methods import diagonals as steps
from tests.helpers import problems
from tests.helpers.problems import noise, tail

L, B, A = 3, 8, 6

FITS = {
    "lora": lambda s: methods.fit_lora(s, 2),
    "allocated": lambda s: methods.fit_allocated(s, 2 * L),
    "rasa": lambda s: methods.fit_rasa(s, 2, 1),
    "share A": lambda s: methods.fit_share_lora(s, 2, "A"),
    "share B": lambda s: methods.fit_share_lora(s, 2, "B"),
    "share both": lambda s: methods.fit_share_lora(s, 2, "both"),
    "tied": lambda s: methods.fit_tied_lora(s, 3),
    "vera": lambda s: methods.fit_vera(s, 5),
    "vb": lambda s: methods.fit_vb_lora(s, 2, bank=8, length=2),
    "joint full": lambda s: methods.fit_joint(s, 3, "full"),
    "joint diagonal, L divides R": lambda s: methods.fit_joint(s, 3, "diagonal"),
    "joint diagonal, R = 4": lambda s: methods.fit_joint(s, 4, "diagonal"),
    "one-sided columns": lambda s: methods.fit_one_sided(s, 1, 2, "columns"),
    "one-sided rows": lambda s: methods.fit_one_sided(s, 1, 2, "rows"),
    "basis of columns": lambda s: methods.fit_share_basis(s, 2, 3, "columns"),
    "basis of whole factors": lambda s: methods.fit_share_basis(s, 2, 1, "whole"),
}
PARAMETERS = {
    "lora": L * 2 * (B + A),
    "allocated": L * 2 * (B + A),
    "rasa": L * (B + A) + 3 * (B + A) + L * 3,
    "share A": 2 * A + L * B * 2,
    "share B": 2 * B + L * A * 2,
    "share both": 2 * (A + B),
    "tied": 3 * (A + B) + L * (B + 3),
    "vera": L * (B + 5),
    "vb": 8 * 2 + L * 2 * (A + B) // 2 * (2 + 1),
    "joint full": 3 * (A + B) + L * 9,
    "joint diagonal, L divides R": 3 * (A + B + L),
    "joint diagonal, R = 4": 4 * (A + B + L),
    "one-sided columns": L * (A + B) + 2 * B + L * 2 * A,
    "one-sided rows": L * (A + B) + 2 * A + L * 2 * B,
    "basis of columns": 3 * (A + B) + L * 2 * 3 * 2,
    "basis of whole factors": 2 * 2 * (A + B) + 2 * L,
}
STACKS = {
    "noise": noise(L, B, A),
    "decaying": problems.decaying(L, B, A),
    "identical": np.repeat(noise(1, B, A, 3), L, 0),
    "orthogonal layers": np.stack(
        [problems.orthogonal(9, 1)[:8, 2 * i : 2 * i + 2] @ noise(1, 2, A, i)[0] for i in range(L)]
    ),
    "rank one": np.stack([np.outer(x, y) for x, y in zip(noise(1, L, B, 4)[0], noise(1, L, A, 5)[0], strict=True)]),
}


@functools.cache
def fit(name, stack):
    return FITS[name](rt.LayerStack(STACKS[stack]))


def direct(M, found):
    return sum(float(((torch.as_tensor(m) - found.update(i)) ** 2).sum()) for i, m in enumerate(M))


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("name", FITS)
def test_laws_of_all_methods(name, stack):
    M, found = STACKS[stack], fit(name, stack)
    norm = float((M**2).sum())
    assert found.error == pytest.approx(direct(M, found), rel=1e-12, abs=1e-20)
    assert found.error >= tail(M, found.update_rank) - 1e-12 * norm
    assert np.linalg.matrix_rank(found.update(0).numpy(), tol=1e-9) <= found.update_rank
    assert found.parameters == PARAMETERS[name]
    if found.evidence is not Evidence.OF_FACTORS:  # which may do worse than no update at all
        assert found.error <= norm * (1 + 1e-12)
    for before, after in zip(found.history, found.history[1:], strict=False):
        assert after <= before + 1e-12 * norm
    if found.history:
        assert found.error == pytest.approx(found.history[-1], abs=1e-10 * norm)
    if found.floor is not None:
        assert found.floor <= found.error + 1e-12 * norm


@pytest.mark.parametrize("name", FITS)
def test_scaling_the_stack_scales_the_error_by_its_square(name):
    M = STACKS["decaying"]
    for c in (2.0**40, 3.0):
        assert FITS[name](rt.LayerStack(c * M)).error == pytest.approx(c**2 * fit(name, "decaying").error, rel=2e-3)


@pytest.mark.parametrize("name", FITS)
def test_nothing_is_left_of_nothing(name):
    found = FITS[name](rt.LayerStack(np.zeros((L, B, A))))
    assert found.error == 0.0
    assert not found.update(1).any()


@pytest.mark.parametrize("name", FITS)
def test_float32_is_measured_in_float64(name):
    M = STACKS["decaying"].astype(np.float32)
    found = FITS[name](rt.LayerStack(M))
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


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("R", [2, 3, 4])
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


@pytest.mark.parametrize("core", ["full", "diagonal"])
def test_planted_joint_bases_are_found(core):
    U, V, C = noise(1, B, 4, 1)[0], noise(1, 4, A, 2)[0], noise(L, 4, 4, 3)
    s = rt.LayerStack(U @ (C if core == "full" else C * np.eye(4)) @ V)
    assert methods.fit_joint(s, 4, core).error <= 1e-10 * s.norm_squared


def test_a_full_core_of_full_rank_leaves_nothing():
    assert methods.fit_joint(rt.LayerStack(noise(L, A, A)), A, "full").error < 1e-20


def test_planted_tied_lora_is_found():
    f = random_diagonals(4, 10, 2, 9)
    s = rt.LayerStack(torch.stack([f.update(i) for i in range(4)]))
    assert methods.fit_tied_lora(s, 2, starts=8, max_sweeps=400).error <= 1e-20 * s.norm_squared


def test_tied_lora_of_rank_one_and_no_scaling_is_at_most_share_lora():
    s = rt.LayerStack(problems.decaying())
    assert methods.fit_tied_lora(s, 2).error <= methods.fit_share_lora(s, 2, "both").error * (1 + 1e-9)


def random_diagonals(layers, b, r, a):
    shapes = (layers, b), (b, r), (layers, r), (r, a)
    return Diagonals(*(torch.as_tensor(noise(1, *shape, n)[0]) for n, shape in enumerate(shapes)))


def test_each_step_of_the_diagonals_is_the_least_squares_solution():
    M, r = torch.as_tensor(noise(2, 5, 4)), 3
    f = Diagonals(
        *(torch.as_tensor(noise(1, *shape, n)[0]) for n, shape in enumerate(((2, 5), (5, r), (2, r), (r, 4))))
    )
    norms, MA = torch.linalg.matrix_norm(M), M @ f.A.mT
    for i in range(2):
        design = torch.stack([(f.v[i, :, None] * f.B[:, j, None] * f.A[j]).flatten() for j in range(r)], 1)
        expected = torch.linalg.lstsq(design, M[i].flatten()[:, None]).solution[:, 0]
        torch.testing.assert_close(steps.update_u(f, i, MA[i], norms[i]), expected)
        rows = (f.B * f.u[i]) @ f.A
        expected = (M[i] * rows).sum(1) / (rows * rows).sum(1)
        torch.testing.assert_close(steps.update_v(f, MA, norms)[i], expected)


def test_the_tied_sweep_ends_where_a_and_b_are_least_squares_solutions():
    from rasa_theory.methods.tied_lora import _sweep

    M, r = noise(3, 5, 4), 2
    s = rt.LayerStack(M).unit()
    f = Diagonals(
        *(torch.as_tensor(noise(1, *shape, n)[0]) for n, shape in enumerate(((3, 5), (5, r), (3, r), (r, 4))))
    )
    found = _sweep(s, s.layer_norms(), f)
    W = (found.v[..., None] * found.B * found.u[:, None]).reshape(-1, r)
    best = W @ torch.linalg.lstsq(W, s.values.reshape(-1, 4)).solution
    torch.testing.assert_close(W @ found.A, best)


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


def test_the_vectors_of_a_sub_vector_are_the_best_ones_after_each_other():
    from rasa_theory.methods.vb_lora import _nearest

    x, y, V = (torch.as_tensor(noise(1, n, 3, n)[0]) for n in (5, 5, 7))
    none = torch.zeros(5, 0, dtype=torch.long)
    for block in range(5):
        index, t = _nearest(x, y, V, none, whole=False)
        grid = torch.linspace(0, 1, 201, dtype=torch.float64)[:, None, None]
        reachable = ((x[block] - (1 - grid) * y[block] - grid * V) ** 2).sum(2)
        reached = ((x[block] - (1 - t[block]) * y[block] - t[block] * V[index[block]]) ** 2).sum()
        assert reached <= reachable.min() + 1e-12


def test_a_bank_begins_with_means_of_its_points_and_each_further_vector_brings_nearer():
    from rasa_theory.methods.vb_lora import _begun, _distances, _kmeans
    from rasa_theory.problem import balanced

    s = rt.LayerStack(problems.decaying(4, 16, 12)).unit()
    points = torch.as_tensor(noise(1, 6, 3, 1)[0]).repeat(8, 1) + 1e-4 * torch.as_tensor(noise(1, 48, 3, 2)[0])
    centres = _kmeans(points, 6, s, 0)
    own = _distances(points, centres).argmin(1)
    torch.testing.assert_close(centres, torch.stack([points[own == n].mean(0) for n in range(6)]))
    lora = rt.solve_lora(s, 2).factors
    B, A = balanced(lora.B, lora.A)
    wanted, left = torch.cat([B.mT.flatten(), A.flatten()]).reshape(-1, 4), []
    for K in (1, 2, 3):
        bank = _begun(s, 2, 12, 4, K, 0)
        assert all(len(set(row)) == K for row in bank.indices.tolist()), "no vector twice"
        left.append(float((bank.sub_vectors() - wanted).square().sum()))
    assert left[2] < left[1] < left[0]


@pytest.mark.parametrize("R", [5, 7])
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


def test_configurations_fit_and_are_the_largest():
    s = rt.LayerStack(problems.decaying(4, 24, 16))
    limit = methods.lora_parameters(4, (24, 16), 3)
    for name, method in methods.METHODS.items():
        for settings in method.configurations(s, limit):
            found = method.solve(s, **settings)
            assert found.method == name
            assert found.settings == settings
            assert found.parameters <= limit, (name, settings)
        assert method.configurations(s, 1) == []
    assert {"rank": 3} in methods.METHODS["lora"].configurations(s, limit)
    assert methods.METHODS["allocated"].configurations(s, 2 * 40 + 39) == [{"terms": 2}]
    assert {"rank": 7, "shared": "A"} in methods.METHODS["share_lora"].configurations(s, 7 * (16 + 4 * 24) + 111)
    own = {"rank": 3, "shared_rank": 1}  # L^2 k = 16 numbers of mixing beside those of LoRA
    assert own not in methods.METHODS["rasa"].configurations(s, limit + 15)
    assert own in methods.METHODS["rasa"].configurations(s, limit + 16)
    assert methods.METHODS["tied_lora"].configurations(s, 5 * 40 + 4 * (24 + 5)) == [{"rank": 5}]
    assert methods.METHODS["vera"].configurations(s, 4 * (24 + 6)) == [{"rank": 6}]
    assert methods.METHODS["joint_full"].configurations(s, 3 * 40 + 4 * 9) == [{"rank": 3, "core": "full"}]
    assert methods.METHODS["joint_diagonal"].configurations(s, 5 * 44) == [{"rank": 5, "core": "diagonal"}]


def test_at_parameters_takes_the_best_configuration_of_every_method():
    s = rt.LayerStack(problems.decaying(4, 24, 16))
    limit = methods.lora_parameters(4, (24, 16), 3)
    found = methods.at_parameters(s, limit)
    assert list(found) == list(methods.METHODS)
    assert all(fit.parameters <= limit + limit // 10 for fit in found.values())
    assert found["rasa"].error <= found["lora"].error
    assert found["rasa"].settings["rank"] == 3
    shares = [
        methods.fit_share_lora(s, **c) for c in methods.METHODS["share_lora"].configurations(s, limit + limit // 10)
    ]
    assert found["share_lora"].error == min(fit.error for fit in shares)
    flipped = methods.at_parameters(s.transpose(), limit, ["share_lora"])["share_lora"]
    assert flipped.error == pytest.approx(found["share_lora"].error)
    assert flipped.settings["shared"] != found["share_lora"].settings["shared"]
    assert methods.at_parameters(s, 1) == {}


def test_what_is_allowed_is_enough_for_the_mixing_of_rasa():
    for shape, r, k in (((6, 384, 384), 8, 8), ((5, 9, 4), 3, 2)):
        s = rt.LayerStack(np.ones(shape, np.float32))
        parameters = methods.lora_parameters(shape[0], shape[1:], r)
        assert methods.allowed(s, parameters) >= parameters + shape[0] ** 2 * k
        assert methods.allowed(s, parameters, 0.0) == parameters
    assert methods.allowed(rt.LayerStack(np.ones((6, 384, 384), np.float32)), 36864) == 36864 + 288


def test_pareto_is_at_parameters_of_each_rank():
    s = rt.LayerStack(STACKS["decaying"])
    front = methods.pareto(s, (1, 2), ["lora", "share_lora"])
    assert front[2]["lora"].error == methods.fit_lora(s, 2).error
    assert front[1]["share_lora"].parameters <= L * (A + B) + L * L


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: methods.fit_lora(s, 0), "rank must be at least 1, got 0"),
        (lambda s: methods.fit_lora(s, 7), r"rank 7 exceeds min\(b, a\) = 6"),
        (lambda s: methods.fit_allocated(s, 2.5), "terms must be a whole number, got 2.5"),
        (lambda s: methods.fit_allocated(s, 19), "terms 19 exceeds 18"),
        (lambda s: methods.fit_rasa(s, 2, 3), "shared_rank 3 exceeds rank 2"),
        (lambda s: methods.fit_share_lora(s, 2, "C"), "unknown shared 'C'; known: A, B, both"),
        (lambda s: methods.fit_share_lora(s, 7, "A"), r"rank 7 exceeds 6, all that can be of use to stack 'stack'"),
        (lambda s: methods.fit_tied_lora(s, True), "rank must be a whole number, got True"),
        (lambda s: methods.fit_tied_lora(s, 2, max_sweeps=0), "max_sweeps must be at least 1, got 0"),
        (lambda s: methods.fit_vera(s, -1), "rank must be at least 1, got -1"),
        (
            lambda s: methods.fit_vb_lora(s, 2, 8, 5),
            "length 5 does not divide the layers of 8 x 6; give a divisor of 2",
        ),
        (lambda s: methods.fit_vb_lora(s, 2, 2, 2, 3), "topk 3 exceeds the 2 vectors of the bank"),
        (lambda s: methods.fit_joint(s, 7), "rank 7 exceeds 6"),
        (lambda s: methods.fit_joint(s, 2, "sparse"), "unknown core 'sparse'; known: full, diagonal"),
        (lambda s: methods.fit_one_sided(s, 0, 0), r"private_rank \+ shared_rank must be at least 1, got 0"),
        (lambda s: methods.fit_one_sided(s, 1, 7, "rows"), "shared_rank 7 exceeds 6"),
        (lambda s: methods.fit_one_sided(s, 1, 1, "both"), "unknown side 'both'; known: columns, rows"),
        (lambda s: methods.fit_share_basis(s, 2, 4, "whole"), "components 4 exceeds 3"),
        (lambda s: methods.fit_share_basis(s, 3, 2, "columns", collection()), "the LoRA factors have shapes"),
        (lambda s: methods.at_parameters(s, 0), "parameters must be at least 1, got 0"),
        (lambda s: methods.at_parameters(s, 99, ["dora"]), "unknown method 'dora'; known: lora, allocated"),
        (lambda s: methods.at_parameters(s, 99, slack=1), "slack must be at least 0 and below 1, got 1"),
        (lambda s: methods.pareto(s, [9]), r"rank 9 exceeds min\(b, a\) = 6"),
    ],
)
def test_bad_input_is_a_sentence(call, message):
    with pytest.raises(rt.InputError, match=message):
        call(rt.LayerStack(STACKS["noise"]))


def test_the_loop_keeps_every_error_and_goes_on_from_the_lowest_start():
    s, starts = rt.LayerStack(noise(1, 4, 4)).unit(), [(torch.tensor(9.0),), (torch.tensor(4.0),)]
    state, history = alternate(s, Steps(lambda x: (x[0] / 2,), lambda x: float(x[0])), starts, 10)
    assert history == tuple(4.0 / 2**n for n in range(11))
    assert float(state[0]) == history[-1]
    assert alternate(s, Steps(lambda x: x, lambda x: float(x[0])), starts, 10)[1] == (4.0, 4.0)


def test_a_sweep_from_beyond_that_is_not_lower_is_done_again_from_the_state_itself():
    s, asked = rt.LayerStack(noise(1, 4, 4)).unit(), []

    def beyond(x, before, stride):
        asked.append(stride)
        return (x[0] * (100 if len(asked) == 2 else 1 - stride / 4),)

    steps = Steps(lambda x: (x[0] / 2,), lambda x: float(x[0]), beyond)
    _, history = alternate(s, steps, [(torch.tensor(8.0),)], 4)
    assert asked == [1.0, 1.3, 0.65]
    assert history == pytest.approx((8.0, 4.0, 1.5, 0.75, 0.75 / 2 * (1 - 0.65 / 4)))
