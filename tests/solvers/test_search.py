"""The search for the best pool: its core, moves, runs and plan."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from rasa_theory import (
    LayerStack,
    RankBudget,
    RasaFactors,
    SolverOptions,
    StopReason,
    linalg,
    load,
    reconstruction_error,
    solve_lora,
    solve_rasa,
)
from rasa_theory.solvers import EFFORTS, STARTS, Batch, Candidate, PoolSearch, SearchCore, allocation_start
from rasa_theory.solvers import leading_terms as large_terms
from rasa_theory.solvers.search import moved, moves, search, update_private
from rasa_theory.sources.null_models import with_hidden_dyads
from tests.helpers.problems import equal_up_to_scale, falling, orthogonal, planted, random_factors

BUDGET = RankBudget(3, 1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit_columns(batch: Batch) -> bool:
    norms = torch.cat([torch.linalg.vector_norm(batch.B, dim=1), torch.linalg.vector_norm(batch.A, dim=2)])
    return torch.allclose(norms, torch.ones_like(norms))


# ---- large rank-one terms


def test_the_terms_of_an_orthogonally_decomposable_tensor_are_found() -> None:
    """Each time exactly one of them; the largest more often than the smallest."""
    U, V, W = (torch.as_tensor(orthogonal(n, n)[:, :3]) for n in (9, 8, 4))
    E = torch.einsum("bj,ij,aj->iba", U, W * torch.tensor([3.0, 2.0, 1.0]), V)
    terms = large_terms(E.expand(40, 4, 9, 8), generator())
    sizes = torch.linalg.vector_norm(terms.D, dim=1)
    which = (sizes[:, None] - torch.tensor([3.0, 2.0, 1.0])).abs().argmin(1)
    products = terms.D[:, :, None, None] * terms.B[:, None, :, None] * terms.A[:, None, None]
    exact = torch.stack([torch.einsum("b,i,a->iba", U[:, j], W[:, j], V[:, j]) for j in range(3)])
    scale = torch.tensor([3.0, 2.0, 1.0])[which, None, None, None]
    assert torch.allclose(products, scale * exact[which], atol=1e-4)
    assert torch.allclose(torch.linalg.vector_norm(terms.B, dim=1), torch.ones(40).double())
    counts = torch.bincount(which, minlength=3)
    assert int(counts[0]) > int(counts[2])


# ---- moves


def of_the_first(count: int) -> torch.Tensor:
    """The origin of `count` children that all come from parent 0."""
    return torch.zeros(count, dtype=torch.long)


@pytest.mark.parametrize(("r", "k"), [(3, 1), (2, 2)])
@pytest.mark.parametrize("parents", [1, 3])
def test_moved_batches_are_sound_and_depend_on_the_seed_alone(r: int, k: int, parents: int) -> None:
    K = torch.as_tensor(falling(3, 9, 7))
    batch = update_private(K, Batch.of([random_factors(3, 9, 7, r, k, seed) for seed in range(parents)]))
    (one, origin), (two, _), (other, _) = (moved(K, batch, 10, generator(seed)) for seed in (0, 0, 1))
    assert [x.shape[1:] for x in one] == [x.shape[1:] for x in batch]
    assert len(one.D) == len(origin) == 10
    assert set(origin.tolist()) == set(range(parents))
    assert all(bool(torch.isfinite(x).all()) for x in one)
    assert unit_columns(one)
    assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))
    assert not torch.allclose(one.B, other.B)


def test_the_loss_of_a_pool_term_is_its_part_outside_the_private_spaces() -> None:
    """Orthogonal to them, inside them, and at an angle on both sides."""
    e = torch.eye(6, dtype=torch.float64)
    half = 0.5 * e[0] + 0.75**0.5 * e[3]
    B, A = torch.stack([e[1], e[0], half], 1), torch.stack([e[1], e[0], 0.6 * e[0] + 0.8 * e[2]])
    D = torch.tensor([[2.0, 5.0, 3.0], [1.0, 5.0, 2.0]]).double()
    batch = Batch(e[:, :1].expand(1, 2, 6, 1), e[:1].expand(1, 2, 1, 6), B[None], A[None], D[None])
    assert moves.pool_losses(batch)[0].tolist() == pytest.approx([5.0, 0.0, 0.75 * 0.64 * 13.0], abs=1e-12)


def test_an_exchange_finds_a_planted_term_in_the_residual() -> None:
    """A pool with one useless term: it gives place to the dyad that all layers share."""
    U, V = (torch.as_tensor(orthogonal(n, n)) for n in (9, 8))
    D = torch.tensor([[3.0, 2.0, 0.0], [2.0, -2.0, 0.0], [-3.0, 2.0, 0.0]]).double()
    K = (U[:, :3] * (D + torch.tensor([0, 0, 1.0]))[:, None]) @ V[:, :3].mT
    spoiled = RasaFactors(K.new_zeros(3, 9, 0), K.new_zeros(3, 0, 8), U[:, [0, 1, 7]], V[:, [0, 1, 7]].mT, D + 1e-6)
    parents = Batch.of([spoiled])
    found = moves.exchanged(K, parents, of_the_first(20), generator())
    left = (found.residual(K) ** 2).sum((1, 2, 3))
    assert float((parents.residual(K) ** 2).sum()) > 2.9
    assert int((left <= 1e-6).sum()) >= 15


def test_a_term_of_one_layer_is_shared_with_the_weights_that_suit_all() -> None:
    """The pool does nothing; what the private term of each layer approximates is in all layers."""
    u, v = (torch.as_tensor(orthogonal(n, n)) for n in (9, 8))
    d = torch.tensor([3.0, 2.0, -1.0]).double()
    K = d[:, None, None] * torch.outer(u[:, 0], v[:, 0])
    private = K.new_zeros(3, 9, 1), v[:, :1].mT.expand(3, 1, 8)
    factors = RasaFactors(private[0] + u[:, :1], private[1], u[:, 1:4], v[:, 1:4].mT, 0.001 * torch.ones(3, 3).double())
    found = moves.shared(K, Batch.of([factors]), of_the_first(8), generator())
    largest = found.D.abs().amax(1)
    sizes = torch.linalg.vector_norm(found.D, dim=1).amax(1)
    assert bool((largest.amax(1) > 0.5).all())
    assert bool((sizes <= float(torch.linalg.vector_norm(d)) + 1e-6).all())


def test_children_of_two_take_each_term_from_one_of_them() -> None:
    K = torch.as_tensor(falling(3, 9, 7))
    parents = Batch.of([random_factors(3, 9, 7, 2, 2, seed) for seed in range(3)])
    origin = torch.tensor([0, 1, 2, 0, 1, 2])
    found = moves.crossed(K, parents, origin, generator())
    mixed = 0
    for n, own in enumerate(origin.tolist()):
        sources = []
        for j in range(6):
            source = [m for m in range(3) if torch.equal(found.D[n, :, j], parents.D[m, :, j])]
            assert torch.equal(found.B[n, :, j], parents.B[source[0], :, j])
            assert torch.equal(found.A[n, j], parents.A[source[0], j])
            sources += source
        assert len(set(sources) - {own}) <= 1
        mixed += own in sources and len(set(sources)) == 2
    assert mixed >= 4


def test_of_two_parents_a_child_always_has_terms_of_the_other() -> None:
    K = torch.as_tensor(falling(3, 9, 7))
    parents = Batch.of([random_factors(3, 9, 7, 4, 4, seed) for seed in range(2)])
    found = moves.crossed(K, parents, of_the_first(10), generator())
    assert all(not torch.equal(found.D[n], parents.D[0]) for n in range(10))


def test_a_shaken_term_turns_and_changes_its_weights() -> None:
    K = torch.as_tensor(falling(3, 9, 7))
    parents = Batch.of([random_factors(3, 9, 7, 3, 1, 0)])
    found = moves.shaken(K, parents, of_the_first(4), generator())
    turned = (found.B * parents.B).sum(1).abs()
    assert bool(((turned > 0.8) & (turned < 1 - 1e-4)).all())
    ratios = found.D / parents.D  # one factor for all layers comes from turning alone
    assert bool((ratios.std(1) > 1e-3).all())


def test_exchanges_replace_up_to_half_of_the_pool() -> None:
    """Of six planted dyads the pool holds the three largest. Some draws exchange its three other terms at once."""
    U, V = (torch.as_tensor(orthogonal(n, n)) for n in (9, 8))
    sizes = torch.tensor([3.0, 2.9, 2.8, 2.0, 1.9, 1.8]).double()
    D = sizes * torch.tensor([[1.0] * 6, [-1.0] * 6, [1.0, -1.0] * 3]).double()
    K = (U[:, :6] * D[:, None]) @ V[:, :6].mT
    weights = D.clone()
    weights[:, 3:] = 1e-6  # of terms that do nothing
    B, A = U[:, [0, 1, 2, 6, 7, 8]], V[:, [0, 1, 2, 6, 7, 6]].mT
    spoiled = RasaFactors(K.new_zeros(3, 9, 0), K.new_zeros(3, 0, 8), B, A, weights)
    left = []
    for seed in range(12):
        found = moves.exchanged(K, Batch.of([spoiled]), of_the_first(1), generator(seed))
        left.append(float((found.residual(K) ** 2).sum()))
    assert min(left) <= 1e-6
    assert max(left) > 1


# ---- the core


def hidden(L: int = 3, b: int = 120, a: int = 110) -> tuple[LayerStack, torch.Tensor, torch.Tensor]:
    """A stack with three dyads that all layers share, and what was added."""
    plain = LayerStack(falling(L, b, a))
    stack = with_hidden_dyads(plain, 4, count=3, size=0.8, seed=0)
    U, _, Vh = torch.linalg.svd(stack.values - plain.values, full_matrices=False)
    return stack, U[0, :, :3], Vh[0, :3].mT


def test_a_core_has_orthonormal_bases_that_hold_the_factors_and_hidden_dyads() -> None:
    stack, U, V = hidden()
    unit = stack.unit()
    factors = allocation_start(unit, RankBudget(4, 1))
    core = SearchCore.at(unit, factors)
    assert not core.is_whole
    assert core.K.dtype == torch.float64
    assert torch.allclose(core.K, core.U.mT @ unit.values @ core.V, atol=1e-12)
    for W, hidden_ones in ((core.U, U), (core.V, V)):
        assert W.shape[1] < 70
        assert torch.allclose(W.mT @ W, torch.eye(W.shape[1]).double(), atol=1e-12)
        outside = hidden_ones - W @ (W.mT @ hidden_ones)
        assert float(torch.linalg.vector_norm(outside, dim=0).max()) <= 0.3
    own = torch.linalg.qr(torch.cat([*factors.private_B, factors.shared_B], 1))[0]
    outside = U - own @ (own.mT @ U)  # the factors alone do not see them
    assert float(torch.linalg.vector_norm(outside, dim=0).min()) >= 0.5
    again = core.lifted(core.projected(factors), unit)
    for i in range(3):
        assert torch.allclose(again.update(i), factors.update(i), atol=1e-12)


def test_small_stacks_are_their_own_core() -> None:
    unit = LayerStack(falling(3, 30, 20)).unit()
    core = SearchCore.at(unit, allocation_start(unit, BUDGET))
    assert core.is_whole
    assert torch.equal(core.K, unit.values)


# ---- runs


class Fixed:
    """Sweeps that stay where they are."""

    def __init__(self, errors: list[float]) -> None:
        self.errors = torch.tensor(errors, dtype=torch.float64)

    def select(self, index: torch.Tensor) -> None:
        self.errors = self.errors[index]


def runs(errors: list[float]) -> search._Runs:
    return search._Runs(Fixed(errors), [f"run {n}" for n in range(len(errors))])  # type: ignore[arg-type]


def test_private_parts_of_large_cores_are_about_the_best_without_an_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    K = torch.as_tensor(falling(2, 170, 165))
    batch = Batch.of([random_factors(2, 170, 165, 3, 1, seed=seed) for seed in range(2)])
    sigma = torch.linalg.svdvals(K - batch.pool_updates())
    monkeypatch.setattr(linalg, "svd", None)
    errors = (update_private(K, batch).residual(K) ** 2).sum((1, 2, 3))
    assert torch.allclose(errors, (sigma[..., 2:] ** 2).sum((1, 2)), rtol=1e-4)


def test_a_cut_keeps_the_lowest_of_distinct_minima_and_counts_their_doubles() -> None:
    cut = runs([0.3, 0.2, 0.2 * (1 + 5e-5), 0.1, 0.25, 0.1 * (1 + 2e-5), 0.3])
    cut.cut(3)
    assert cut.names == ["run 3", "run 1", "run 4"]
    assert cut.sweeps.errors.tolist() == [0.1, 0.2, 0.25]
    assert cut.stands_for == [2, 2, 1]


def test_near_the_best_are_those_within_a_distance_with_all_that_they_stand_for() -> None:
    cut = runs([0.1, 0.10001, 0.1000001, 0.15, 0.2])
    cut.cut(4)
    assert cut.near(1e-3) == 3
    assert cut.near(0.06) == 4


# ---- the plan


@pytest.mark.parametrize("name", EFFORTS)
def test_on_large_cores_everything_is_done_less_and_nothing_left_out(name: str) -> None:
    effort = EFFORTS[name]
    assert effort.within(1.0, [2, 28]) is effort
    less = effort.within(1e12, [2, 28])
    assert 0 < less.starts < effort.starts
    assert [sweeps for sweeps, _ in less.heats] == [sweeps for sweeps, _ in effort.heats]
    counts = [left for _, left in (*less.heats, *less.move_heats)] + [less.parents]
    before = [left for _, left in (*effort.heats, *effort.move_heats)] + [effort.parents]
    assert all(1 <= x <= y for x, y in zip(counts, before, strict=True))
    assert less.moves >= 1
    assert less.starts >= 0.1 * effort.starts
    half = effort.within(2 * effort.cost / cost(effort), [2, 28])
    assert half.starts == pytest.approx(effort.starts / 2, rel=1e-9)


def test_starts_that_use_no_seed_take_part_once() -> None:
    assert [EFFORTS["thorough"].entries(n) for n in (1, 2)] == [1, 16]


def test_in_a_cut_the_first_runs_stay_and_only_others_are_left_out() -> None:
    cut = runs([0.3, 0.2, 0.1, 0.200001, 0.25, 0.28, 0.199999])
    cut.cut(3, after=2)
    assert cut.sweeps.errors.tolist() == [0.3, 0.2, 0.1, 0.199999, 0.25]  # a little lower than a first run is kept


def test_errors_that_rounding_makes_negative_are_one_minimum() -> None:
    cut = runs([-1e-16, -2e-16, 0.1])
    cut.cut(3)
    assert cut.stands_for == [2, 1]


def cost(effort: search.Effort) -> float:
    """The number of sweeps of single runs in a search from 30 starts per unit."""
    total, left = 0.0, 30 * effort.starts
    for sweeps, more in effort.heats:
        total, left = total + left * sweeps, more
    per_round, left = 0.0, effort.moves
    for sweeps, more in effort.move_heats:
        per_round, left = per_round + (left + effort.parents) * sweeps, more
    return total + effort.rounds * per_round + effort.parents * effort.final


# ---- the search

QUICK = EFFORTS["quick"]


def found_by(
    effort: search.Effort, seed: int = 0, limit: float = math.inf
) -> tuple[list[Candidate], search.SearchSummary]:
    unit = LayerStack(falling(3, 12, 10)).unit()
    return PoolSearch(unit, BUDGET, allocation_start(unit, BUDGET), effort, seed, limit).run()


def test_the_same_seed_gives_the_same_result_and_another_one_other_starts() -> None:
    (one, summary), (two, same), (other, _) = (found_by(QUICK, seed) for seed in (0, 0, 1))
    assert summary == same
    assert [candidate.start for candidate in one] == [candidate.start for candidate in two]
    assert all(torch.equal(x.factors.mixing, y.factors.mixing) for x, y in zip(one, two, strict=True))
    assert not torch.equal(one[0].factors.mixing, other[0].factors.mixing)


def test_results_are_distinct_come_lowest_first_and_stay_inside_the_bound() -> None:
    effort = dataclasses.replace(EFFORTS["default"], heats=((30, 8), (30, 5)), rounds=1, parents=4, final=100)
    unit = LayerStack(falling(3, 12, 10)).unit()
    results, summary = found_by(effort, limit=2.0)
    errors = [float(((unit.values - torch.stack([c.factors.update(i) for i in range(3)])) ** 2).sum()) for c in results]
    assert errors == sorted(errors)
    assert len({round(error, 9) for error in errors}) == len(results) <= 4
    norms = torch.linalg.matrix_norm(unit.values)
    for candidate in results:
        f = candidate.factors.normalised()
        assert bool((f.mixing.abs() <= 2.0 * norms[:, None] * (1 + 1e-9)).all())
        assert bool((torch.linalg.matrix_norm(f.private_B @ f.private_A) <= 2.0 * norms * (1 + 1e-9)).all())
    assert {candidate.start for candidate in results} <= set(STARTS)
    assert 1 <= summary.near_best <= summary.starts
    assert summary.moves == effort.moves


def test_on_all_of_the_stack_a_search_goes_on_as_long_as_a_run_could_end_lowest() -> None:
    """Its errors hardly fall any more: a hundred more sweeps gain less than a thousandth."""
    effort = dataclasses.replace(QUICK, heats=((5, 2),), final=10, more=40)
    results, _ = found_by(effort)
    unit = LayerStack(falling(3, 12, 10)).unit()
    ended = [reconstruction_error(unit, candidate.factors) for candidate in results]
    options = SolverOptions(start=results[0].factors, max_sweeps=100, rtol=0, sweep="joint")
    assert ended[0] <= (1 + 1e-3) * solve_rasa(unit, BUDGET, options).error


@pytest.mark.parametrize("limit", [1.05, 1.2, 8.0])
def test_the_end_of_a_search_keeps_the_lowest_of_every_run(limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the bound more sweeps can end higher, since multipliers change."""
    seen, real = [], PoolSearch._final

    def final(self: PoolSearch, runs: search._Runs) -> tuple[Batch, torch.Tensor]:
        batch, errors = real(self, runs)
        seen.append(errors)
        return batch, errors

    monkeypatch.setattr(PoolSearch, "_final", final)
    unit, budget = LayerStack(load("minilm-code")[0][0].values[:3, :12, :10]).unit(), RankBudget(3, 3)
    effort = dataclasses.replace(QUICK, final=10, more=6)
    results, _ = PoolSearch(unit, budget, allocation_start(unit, budget), effort, 0, limit).run()
    ended = [reconstruction_error(unit, candidate.factors) for candidate in results]
    assert len(seen) > 1
    assert ended[0] == pytest.approx(float(torch.stack(seen).min()), rel=1e-9)


def test_a_thorough_search_ends_where_nothing_is_left() -> None:
    """Rounding makes such errors negative, of which every other is lower by some share."""
    unit, budget = LayerStack(planted(0, 5, 9, 8, 1, 1).values).unit(), RankBudget(1, 1)
    effort = dataclasses.replace(EFFORTS["thorough"], starts=1.0)
    results, summary = PoolSearch(unit, budget, allocation_start(unit, budget), effort, 0).run()
    assert reconstruction_error(unit, results[0].factors) <= 1e-12 * unit.norm_squared
    assert summary.moves <= 4 * effort.rounds * effort.moves


def test_returning_moves_are_a_single_round() -> None:
    unit = LayerStack(falling(3, 12, 10)).unit()
    start, errors = allocation_start(unit, BUDGET), list[float]()
    effort = dataclasses.replace(EFFORTS["thorough"], moves=4).returning()
    pool = PoolSearch(unit, BUDGET, start, effort, 0, watch=lambda done, planned, error: errors.append(error))
    assert pool.around([Candidate("mine", start)])[1].moves == 4
    assert all(map(math.isfinite, errors))


def test_a_search_until_idle_ends() -> None:
    """Small numbers for a thorough search; rounds go on to twice the last one that changed anything."""
    effort = dataclasses.replace(
        EFFORTS["thorough"], starts=0.3, heats=((10, 4),), rounds=2, moves=4, move_heats=((10, 2),), parents=2,
        final=5,
    )  # fmt: skip
    unit, budget = LayerStack(equal_up_to_scale().values).unit(), RankBudget(3, 1)  # few sweeps reach the optimum
    _, summary = PoolSearch(unit, budget, allocation_start(unit, budget), effort, 0).run()
    done = summary.moves // effort.moves
    assert done >= 2
    assert summary.moves_kept <= done / 2 + 1


@pytest.mark.slow
def test_a_thorough_search_ends_where_terms_meet_the_bound() -> None:
    """There the errors of sweeps rise and fall with the multipliers, for ever."""
    values = falling(3, 9, 7)
    values[1] = 0
    unit = LayerStack(values).unit()
    effort = dataclasses.replace(
        EFFORTS["thorough"], starts=0.5, heats=((20, 8),), moves=4, move_heats=((10, 4),), parents=4, more=2
    )

    def watch(done: int, planned: int, error: float) -> None:
        assert done <= 50

    for limit in (1.0, 2.0, 8.0):
        pool = PoolSearch(unit, BUDGET, allocation_start(unit, BUDGET), effort, 0, limit, watch)
        assert pool.run()[1].moves >= effort.rounds * effort.moves


def searching(effort: search.Effort, stack: LayerStack, budget: RankBudget, **options: object) -> PoolSearch:
    unit = stack.unit()
    return PoolSearch(unit, budget, allocation_start(unit, budget), effort, 0, **options)  # type: ignore[arg-type]


def test_rounds_go_on_to_twice_the_last_one_that_changed_anything() -> None:
    stack = LayerStack(falling(3, 12, 10))
    idle, fixed = (searching(EFFORTS[name], stack, BUDGET) for name in ("thorough", "default"))
    rounds = EFFORTS["thorough"].rounds
    assert [idle._rounds(n) for n in (0, rounds // 2, rounds, 10 * rounds)] == [rounds, rounds, 2 * rounds, 20 * rounds]
    assert [fixed._rounds(n) for n in (0, 10)] == 2 * [EFFORTS["default"].rounds]


def test_near_the_best_is_a_thousandth_of_what_lora_leaves() -> None:
    stack = LayerStack(falling(3, 12, 10))
    near = searching(QUICK, stack, BUDGET)._near * stack.scale**2
    assert near == pytest.approx(1e-3 * solve_lora(stack, BUDGET.rank).error, rel=1e-12)


def test_every_entry_of_a_start_is_another_one() -> None:
    effort = dataclasses.replace(QUICK, starts=2.0)
    starts = list(searching(effort, LayerStack(falling(4, 12, 10)), BUDGET)._starts())
    for name in {candidate.start for candidate in starts}:
        pools = [candidate.factors.shared_B for candidate in starts if candidate.start == name]
        assert not any(torch.allclose(x, y) for n, x in enumerate(pools) for y in pools[:n]), name


def test_the_error_told_is_that_on_the_stack() -> None:
    """On a core that is not all of it. The last step is before the final sweeps, which end lower."""
    stack, told = hidden()[0], list[float]()
    unit, budget = stack.unit(), RankBudget(4, 1)
    effort = dataclasses.replace(QUICK, starts=0.1, heats=((100, 1),), parents=1)
    pool = searching(effort, stack, budget, watch=lambda done, planned, error: told.append(error))
    (result, *_), _ = pool.run()
    assert not pool.core.is_whole
    error = reconstruction_error(unit, result.factors)
    assert error * (1 - 1e-6) <= told[-1] <= error * 1.02


@pytest.mark.parametrize(("gain", "calls"), [(0.01, 5), (0.0, 2)])
def test_final_sweeps_go_on_while_a_run_could_still_end_lowest(
    gain: float, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs, the higher one 2.5 gains above: with steady gains it needs three more rounds to be the lowest."""
    effort = dataclasses.replace(QUICK, more=4)
    pool = searching(effort, LayerStack(falling(3, 12, 10)), BUDGET)
    batch = Batch.of([random_factors(3, 12, 10, 3, 1, seed) for seed in range(2)])
    done = 0

    def final(self: PoolSearch, runs: search._Runs) -> tuple[Batch, torch.Tensor]:
        nonlocal done
        done += 1
        return batch, torch.tensor([1.0, 1.025 - gain * (done - 1)], dtype=torch.float64)

    monkeypatch.setattr(PoolSearch, "_final", final)
    _, errors = pool._settled(runs([0.0, 0.0]))
    assert done == calls
    assert float(errors.min()) == pytest.approx(min(1.0, 1.025 - gain * (calls - 1)))


def test_the_runs_that_moves_come_from_stay_until_the_moves_have_swept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, real = [], search._Runs.run

    def watched(self: search._Runs, heats: tuple[tuple[int, int], ...], after: int = 0) -> None:
        parents = self.names[:after]
        real(self, heats, after)
        kept.append((after, self.names[:after] == parents))

    monkeypatch.setattr(search._Runs, "run", watched)
    effort = dataclasses.replace(QUICK, rounds=2, moves=6, move_heats=((5, 1),), parents=3)
    searching(effort, LayerStack(falling(3, 12, 10)), BUDGET).run()
    assert all(1 <= parents <= 3 and stayed for parents, stayed in kept[-2:])


def test_moves_alone_start_from_what_is_given() -> None:
    unit = LayerStack(falling(3, 12, 10)).unit()
    start = allocation_start(unit, BUDGET)
    pool = PoolSearch(unit, BUDGET, start, EFFORTS["default"].returning(), 0)
    results, summary = pool.around([Candidate("mine", start)])
    assert {candidate.start for candidate in results} == {"mine"}
    assert summary.starts == 1


@pytest.mark.slow
@pytest.mark.parametrize("effort", ["quick", "default"])
def test_the_bound_is_kept_where_sweeps_without_one_would_never_end(effort: str) -> None:
    """A crop of the bundled updates, on which terms grow and cancel: core sweeps go on inside the bound."""
    stack = LayerStack(load("minilm-code")[0][0].values[:3, :64, :64])
    solution = solve_rasa(stack, RankBudget(6, 3), SolverOptions(effort=effort, max_sweeps=20, max_cancellation=2.0))
    assert solution.cancellation <= 2.0 * (1 + 1e-3)
    assert solution.stop_reason in (StopReason.CONVERGED, StopReason.SWEEP_LIMIT)
