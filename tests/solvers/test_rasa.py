"""The solver: its trajectory beside the literal one, laws on nasty stacks, known optima, other people's solvers."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import scipy.optimize
import tensorly
import torch
from hypothesis import given
from tensorly.decomposition import parafac

from rasa_theory import (
    InputError,
    LayerStack,
    RankBudget,
    RasaFactors,
    SolverOptions,
    StopReason,
    allocation_bound,
    load,
    lower_bound,
    reconstruction_error,
    solve_lora,
    solve_path,
    solve_rasa,
)
from rasa_theory.linalg import not_above
from rasa_theory.solvers import (
    DIVERGED,
    STARTS,
    SWEEPS,
    JointSweep,
    measurable,
    random_start,
)
from tests.helpers import reference
from tests.helpers.problems import KNOWN, SHAPES, noise, planted, shared_bases, zero
from tests.helpers.strategies import fewer_examples, nasty_stacks

BOTH = pytest.mark.parametrize("sweep", ["joint", "paper"])
EVERY = pytest.mark.parametrize("sweep", ["core", "joint", "paper"])
Q_ZERO = [(3, 6, 5, 2, 2, 9), (4, 8, 9, 2, 2, 10)]


def plain(factors):
    return reference.Factors(*(t.numpy() for t in factors.named().values()))


def exactly(n, **options):
    """n sweeps, whatever the error does, after a short search."""
    return SolverOptions(max_sweeps=n, rtol=0, **{"max_cancellation": DIVERGED, "effort": "quick"} | options)


def seeds(few, all_):
    """The seeds 0 .. all_ - 1, of which the first `few` are tried by default and the others by slow tests."""
    return [seed if seed < few else pytest.param(seed, marks=pytest.mark.slow) for seed in range(all_)]


# ---- the trajectory


@BOTH
@pytest.mark.parametrize(("L", "b", "a", "r", "k", "seed"), [*SHAPES, *Q_ZERO, (3, 6, 5, 2, 0, 9), (1, 6, 5, 3, 1, 8)])
def test_twenty_sweeps_beside_the_literal_ones(L, b, a, r, k, seed, sweep):
    M = noise(L, b, a, seed)
    stack, budget = LayerStack(M), RankBudget(r, k)
    start = random_start(stack, budget, seed, size=0.3)  # from D = 0 the literal B_S is 0 by minimum norm, and stays
    history = solve_rasa(stack, budget, exactly(20, start=start, sweep=sweep)).history
    f, expected = plain(start), []
    if sweep == "joint":  # it needs row spaces to begin with
        Bt, At = reference.private(M, r - k, f.B_S, f.A_S, f.D)
        f = f._replace(Bt=Bt, At=At)
    for _ in range(20):
        f = getattr(reference, f"{sweep}_sweep")(M, *f)
        expected.append(reference.error(M, *f))
    assert history[0] == pytest.approx(reference.error(M, *plain(start)), rel=1e-12)
    assert history[1:] == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(("L", "b", "a", "r"), [(3, 6, 5, 2), (4, 8, 7, 2), (2, 9, 5, 3), (3, 12, 10, 3)])
@pytest.mark.parametrize("sweeps", [1, 5, 20])
def test_without_private_ranks_the_papers_sweep_is_tensorlys_cp(L, b, a, r, sweeps):
    """k = r is a CP decomposition of rank R of the (L, b, a) tensor; parafac goes through D, B_S, A_S in this order."""
    M = noise(L, b, a, sweeps)
    stack, budget = LayerStack(M), RankBudget(r, r)
    start = random_start(stack, budget)
    ours = solve_rasa(stack, budget, exactly(sweeps, start=start, sweep="paper")).error
    matrices = [np.ones((L, L * r)), start.shared_B.numpy().copy(), start.shared_A.numpy().T.copy()]
    init = tensorly.cp_tensor.CPTensor((np.ones(L * r), matrices))
    theirs = parafac(tensorly.tensor(M), rank=L * r, init=init, n_iter_max=sweeps, tol=0)
    assert ours == pytest.approx(float(((M - tensorly.cp_to_tensor(theirs)) ** 2).sum()), rel=1e-9)


# ---- laws


@EVERY
@given(problem=nasty_stacks())
def test_the_history_never_rises_and_ends_at_the_measured_error(problem, sweep):
    stack = problem.stack
    for start in ("random", "lora"):
        solution = solve_rasa(stack, problem.budget, SolverOptions(start=start, sweep=sweep, max_sweeps=15))
        history, tolerance = solution.history, measurable(stack, solution.factors)
        assert all(not_above(y, x, tolerance) for x, y in itertools.pairwise(history))
        unit = problem.values / stack.scale
        measured = reference.error(unit, *plain(solution.factors.scaled(1 / stack.scale))) * stack.scale**2
        assert not_above(measured, min(history), tolerance)
        assert not_above(min(history), measured, tolerance)
        assert solution.error == math.fsum(solution.layer_errors)


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize("seed", seeds(10, 40))
def test_near_zero_error_rounding_is_not_taken_for_a_gradient(seed, sweep):
    """At r = min(b, a) the error is zero to rounding, in nearly singular systems; the sweeps must stay there."""
    rng = np.random.default_rng(seed)
    L, b, a = (int(n) for n in rng.integers(2, 9, 3))
    stack, budget = LayerStack(noise(L, b, a, seed)), RankBudget(min(b, a), 1)
    solution = solve_rasa(stack, budget, exactly(15, start="random", sweep=sweep))
    tolerance = measurable(stack, solution.factors)
    assert all(not_above(y, x, tolerance) for x, y in itertools.pairwise(solution.history))


@fewer_examples(3)
@given(nasty_stacks())
def test_rasa_is_between_the_floor_and_allocation_and_that_is_at_most_lora(problem):
    stack, budget = problem.stack, problem.budget
    e_rasa = solve_rasa(stack, budget, SolverOptions(max_sweeps=10, effort="quick")).error
    e_alloc, e_lora = allocation_bound(stack, budget).value, solve_lora(stack, problem.r).error
    assert not_above(lower_bound(stack, budget).value, e_rasa, stack.rounding)
    assert not_above(e_rasa, e_alloc, stack.rounding)
    assert not_above(e_alloc, e_lora, stack.rounding)


@pytest.mark.slow
@EVERY
@given(problem=nasty_stacks())
def test_the_path_is_nested(problem, sweep):
    stack = problem.stack
    start = "best" if sweep == "core" else "allocation"
    options = SolverOptions(sweep=sweep, max_sweeps=2, start=start, effort="quick")
    path = solve_path(stack, problem.r, [problem.r, *range(problem.r + 1)], options)
    assert list(path) == list(range(problem.r + 1))
    assert path[0].error <= solve_lora(stack, problem.r).interval[1]
    for k in range(problem.r):
        assert not_above(path[k + 1].error, path[k].error, stack.rounding)


def test_the_path_is_nested_even_where_the_start_of_a_larger_k_ends_higher():
    """One sweep from a random pool does not even reach LoRA's optimum; the solution before does."""
    stack, options = LayerStack(noise(3, 9, 8)), exactly(1, start="random", sweep="joint")
    alone = [solve_rasa(stack, RankBudget(3, k), options).error for k in range(4)]
    assert alone[3] > alone[0]
    path = solve_path(stack, 3, range(4), options)
    assert all(not_above(path[k + 1].error, path[k].error, stack.rounding) for k in range(3))
    assert path[3].start == "previous k"


def test_lora_cannot_and_sharing_can():
    """On equal layers the pool counts L times: strictly below LoRA, by the amount that the closed form says."""
    problem = KNOWN["equal up to scale"]()
    stack = LayerStack(problem.values)
    solution = solve_rasa(stack, problem.budget)
    assert solution.error < allocation_bound(stack, problem.budget).value < solve_lora(stack, problem.budget.rank).error


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize(
    ("c", "dtype"),
    [
        (2.0**332, "float64"),
        (2.0**-50, "float32"),
        pytest.param(2.0**-332, "float64", marks=pytest.mark.slow),
        pytest.param(2.0**50, "float32", marks=pytest.mark.slow),
    ],
)
def test_a_power_of_two_changes_no_digit_of_any_sweep(c, dtype, sweep):
    M, budget = noise(3, 6, 5).astype(dtype), RankBudget(2, 1)
    one, other = (solve_rasa(LayerStack(x), budget, exactly(10, sweep=sweep)) for x in (M, M * np.asarray(c, dtype)))
    assert other.history == [c**2 * x for x in one.history]
    assert other.error == c**2 * one.error


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize(
    ("c", "dtype"), [(1e100, "float64"), (1e-100, "float64"), (1e15, "float32"), (1e-15, "float32")]
)
def test_c_squared(c, dtype, sweep):
    """Other factors round M once: eps ||M|| in norm, which a few sweeps may only amplify within `rounding`."""
    M, budget, options = noise(3, 6, 5).astype(dtype), RankBudget(2, 1), exactly(5, start="allocation", sweep=sweep)
    stack = LayerStack(M * np.asarray(c, dtype))
    one = c**2 * solve_rasa(LayerStack(M), budget, options).error
    other = solve_rasa(stack, budget, options).error
    assert not_above(one, other, stack.rounding)
    assert not_above(other, one, stack.rounding)


@EVERY
def test_float32_follows_float64(sweep):
    M, budget, options = noise(4, 9, 7).astype(np.float32), RankBudget(2, 1), exactly(10, start="lora", sweep=sweep)
    single, double = (solve_rasa(LayerStack(M, dtype=d), budget, options) for d in ("float32", "float64"))
    tolerance = LayerStack(M).rounding
    assert single.factors.mixing.dtype == torch.float32
    for x, y in zip(single.history, double.history, strict=True):
        assert not_above(x, y, tolerance)
        assert not_above(y, x, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(3, 1, 6), (3, 6, 1), (3, 1, 1), (1, 1, 1)])
@pytest.mark.parametrize("k", [0, 1])
def test_rows_columns_and_numbers_are_exactly_rank_one(shape, k):
    stack = LayerStack(noise(*shape))
    assert solve_rasa(stack, RankBudget(1, k)).error <= stack.rounding**2


# ---- known optima


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize("seed", seeds(1, 3))
@pytest.mark.parametrize("name", KNOWN)
def test_known_optima_are_reached(name, seed, sweep):
    problem = zero() if name == "zero" else KNOWN[name](seed)
    stack = LayerStack(problem.values)
    solution = solve_rasa(stack, problem.budget, SolverOptions(sweep=sweep))
    assert not_above(solution.error, problem.e_rasa, stack.rounding)
    assert not_above(problem.e_rasa, solution.error, stack.rounding)
    assert solution.stop_reason is StopReason.CONVERGED


def test_shared_bases_have_local_minima():
    """Allocation is a saddle here, and random starts reach the optimum at some of ten seeds only."""
    excess = []
    for seed in range(10):
        problem = shared_bases(seed)
        stack = LayerStack(problem.values)
        error = solve_rasa(stack, problem.budget, SolverOptions(start="random", seed=seed)).error
        assert not_above(problem.e_rasa, error, stack.rounding)
        excess.append(error / problem.e_rasa - 1)
    assert min(excess) <= 1e-6 < 0.01 < max(excess)


@pytest.mark.slow
@pytest.mark.parametrize("seed", seeds(1, 4))
@pytest.mark.parametrize(("L", "b", "a", "r", "k"), [(3, 9, 8, 2, 1), (4, 12, 10, 3, 1)])
def test_planted_factors_are_found_again_from_nearby(L, b, a, r, k, seed):
    """From the factors themselves zero; with 5 % noise on each, 300 sweeps remove all but 1e-6 of the error.

    From afar the sweeps do not find them, algebra does: see test_starts.py.
    """
    rng, q, R = np.random.default_rng(seed), r - k, L * k
    shapes = {"shared_B": (b, R), "mixing": (L, R), "shared_A": (R, a), "private_B": (L, b, q), "private_A": (L, q, a)}
    exact = RasaFactors(**{name: torch.as_tensor(rng.standard_normal(shape)) for name, shape in shapes.items()})
    problem = planted(seed, L, b, a, r, k)  # draws the same
    stack = LayerStack(problem.values)
    found = solve_rasa(stack, problem.budget, SolverOptions(start=exact))
    assert found.error <= stack.rounding**2
    assert found.stop_reason is StopReason.CONVERGED
    noisy = {name: x * (1 + 0.05 * torch.as_tensor(rng.standard_normal(x.shape))) for name, x in exact.named().items()}
    start = RasaFactors(**noisy)
    found = solve_rasa(stack, problem.budget, SolverOptions(start=start, max_sweeps=300))
    assert found.error <= 1e-6 * reconstruction_error(stack, start)


# ---- another optimiser


def quasi_newton(M, r, k, seed, starts=10):
    """The lowest error of L-BFGS-B on all factors at once, from `starts` random points."""
    (L, b, a), q, R = M.shape, r - k, len(M) * k
    shapes = [(L, b, q), (L, q, a), (b, R), (R, a), (L, R)]
    sizes = [math.prod(shape) for shape in shapes]

    def value_and_gradient(x):
        parts = np.split(x, np.cumsum(sizes)[:-1])
        Bt, At, B_S, A_S, D = (p.reshape(shape) for p, shape in zip(parts, shapes, strict=True))
        E = reference.residuals(M, Bt, At, B_S, A_S, D)
        EA, BE = E @ A_S.T, B_S.T @ E
        gradient = (
            E @ At.transpose(0, 2, 1),
            Bt.transpose(0, 2, 1) @ E,
            (EA * D[:, None]).sum(0),
            (D[:, :, None] * BE).sum(0),
            (B_S * EA).sum(1),
        )
        return (E**2).sum(), -2 * np.concatenate([g.ravel() for g in gradient])

    rng = np.random.default_rng(seed)
    options = {"maxiter": 1000, "ftol": 1e-14, "gtol": 1e-10}
    runs = (
        scipy.optimize.minimize(
            value_and_gradient, rng.standard_normal(sum(sizes)), jac=True, method="L-BFGS-B", options=options
        )
        for _ in range(starts)
    )
    return min(run.fun for run in runs)


@pytest.mark.slow
@pytest.mark.parametrize(("L", "b", "a", "r", "k", "often"), [(2, 6, 6, 1, 1, 7), (2, 8, 8, 2, 1, 5)])
def test_as_low_as_ten_quasi_newton_runs(L, b, a, r, k, often):
    """On spectra that fall by halves: not above by 1e-6 on `often` of eight seeds at least, never by 2 %.

    On flat random spectra so small it is no law: there the infimum is often not attained, and sweeps crawl.
    """
    excess = []
    for seed in range(8):
        U, S, Vh = np.linalg.svd(noise(L, b, a, seed), full_matrices=False)
        M = (U * 2.0 ** -np.arange(S.shape[1])) @ Vh
        error = solve_rasa(LayerStack(M), RankBudget(r, k), exactly(12, effort="default")).error
        excess.append(error / quasi_newton(M, r, k, seed) - 1)
    assert sum(x <= 1e-6 for x in excess) >= often
    assert max(excess) <= 0.02


# ---- starts


@pytest.mark.parametrize(("L", "b", "a", "r", "k", "seed"), SHAPES)
def test_starts_have_the_errors_that_they_promise(L, b, a, r, k, seed):
    M = noise(L, b, a, seed)
    stack, budget = LayerStack(M), RankBudget(r, k)
    names = ("allocation", "lora", "random")
    errors = {name: reconstruction_error(stack, STARTS[name].make(stack, budget, 0)) for name in names}
    assert errors["allocation"] == pytest.approx(reference.allocation_bound(M, r, k), rel=1e-12)
    assert errors["lora"] == pytest.approx(reference.e_lora(M, r), rel=1e-12)
    assert errors["random"] == pytest.approx(stack.norm_squared, rel=1e-13)


def test_random_start():
    stack, budget = LayerStack(noise(3, 6, 5)), RankBudget(2, 1)
    f = random_start(stack, budget, seed=3, size=0.5)
    assert torch.equal(f.mixing, random_start(stack, budget, seed=3, size=0.5).mixing)
    assert not torch.equal(f.mixing, random_start(stack, budget, seed=4, size=0.5).mixing)
    assert sum(float((f.update(i) ** 2).sum()) for i in range(3)) == pytest.approx(0.25 * stack.norm_squared, rel=1e-12)


# ---- stopping


def sum_of_cubes(e):
    """(u + e v)^(x)3 / e - u^(x)3 / e, u and v the unit vectors: terms of size 1/e, the sum near one of rank three."""
    V = torch.tensor([[1.0, 1.0], [e, 0.0]], dtype=torch.float64)
    D = torch.tensor([[1 / e, -1 / e], [1.0, 0.0]], dtype=torch.float64)
    return RasaFactors(torch.zeros(2, 2, 0).double(), torch.zeros(2, 0, 2).double(), V, V.mT.clone(), D)


BORDER_RANK = np.array([[[0.0, 1.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]]])  # uuv + uvu + vuu: rank 3, border rank 2


@BOTH
def test_an_infimum_that_is_not_attained_is_named(sweep):
    stack, start = LayerStack(BORDER_RANK), sum_of_cubes(0.5)
    limit = 1.5 * solve_rasa(stack, RankBudget(1, 1), exactly(1, start=start, sweep=sweep)).cancellation
    solution = solve_rasa(stack, RankBudget(1, 1), exactly(1000, start=start, sweep=sweep, max_cancellation=limit))
    assert solution.stop_reason is StopReason.DEGENERATE
    assert limit / 2 < solution.cancellation <= limit * (1 + 1e-3)
    assert all(bool(torch.isfinite(t).all()) for t in solution.factors.named().values())
    assert solution.error <= reconstruction_error(stack, start)


@pytest.mark.slow
@BOTH
def test_on_a_border_rank_tensor_the_error_falls_while_the_terms_grow(sweep):
    stack, errors, sizes = LayerStack(BORDER_RANK), [], []
    for n in (10, 100, 1000):
        solution = solve_rasa(stack, RankBudget(1, 1), exactly(n, start=sum_of_cubes(0.5), sweep=sweep))
        errors.append(solution.error)
        sizes.append(float(solution.factors.mixing.abs().max()))
        assert solution.stop_reason is StopReason.SWEEP_LIMIT
    assert errors[0] > errors[1] > errors[2] > 0
    assert sizes[0] < sizes[1] < sizes[2]


@pytest.mark.slow
def test_terms_stay_as_small_as_asked_and_the_price_is_small():
    """On a crop of the bundled updates, bounded by 2, by 8 and not at all; the descent goes on inside the bound."""
    stack = LayerStack(load("minilm-code")[0][0].values[:, :64, :64])
    budget, limits = RankBudget(6, 3), (2.0, 8.0, math.inf)
    runs = [solve_rasa(stack, budget, SolverOptions(max_sweeps=25, max_cancellation=x, rtol=0)) for x in limits]
    e_lora = solve_lora(stack, 6).error
    for run, limit in zip(runs, limits, strict=True):
        f, norms = plain(run.factors), np.sqrt(stack.layer_norms_squared)
        terms = [np.linalg.norm(f.Bt[i] @ f.At[i]) / norms[i] for i in range(6)]
        for j in range(18):
            dyad = np.linalg.norm(np.outer(f.B_S[:, j], f.A_S[j]))
            terms += list(np.abs(f.D[:, j]) * dyad / norms)
        assert run.cancellation == pytest.approx(max(terms), rel=1e-12)
        assert run.cancellation <= limit * (1 + 1e-3)
        assert run.stop_reason is not StopReason.DEGENERATE
    lowest = min(run.error for run in runs)
    assert all(run.error <= lowest + price * e_lora for run, price in zip(runs, (0.02, 0.005, 0.005), strict=True))


@pytest.mark.slow
def test_factors_in_half_precision_reproduce_the_error():
    """Rounding is independent: the error rises by about the unit roundoff squared times the squared norms of terms."""
    stack = LayerStack(load("minilm-code")[0][0].values[:, :96, :96])
    run, rises = solve_rasa(stack, RankBudget(8, 4), SolverOptions(max_sweeps=25, effort="quick")), {}
    f = run.factors.normalised()
    terms = float((f.mixing**2).sum() + ((f.private_B @ f.private_A) ** 2).sum())
    for dtype in (torch.float16, torch.bfloat16):
        rounded = run.factors.scaled(1 / stack.scale).to(dtype).to(torch.float64).scaled(stack.scale)
        rises[dtype] = reconstruction_error(stack, rounded) - run.error
        assert abs(rises[dtype]) <= (torch.finfo(dtype).eps / 2) ** 2 * terms
    assert rises[torch.float16] <= 1e-4 * run.error
    assert rises[torch.bfloat16] <= 5e-3 * run.error


def broken_after(sweeps, how):
    """A joint sweep that works `sweeps` times and then fails in the given way."""

    class Broken(JointSweep):
        calls = 0

        def __call__(self, factors):
            self.calls += 1
            if self.calls <= sweeps:
                return super().__call__(factors)
            if how == "raises":
                raise torch.linalg.LinAlgError
            nan = dataclasses.replace(factors, mixing=factors.mixing * math.nan)
            return nan, math.inf if how == "inf" else math.nan

    return Broken


@pytest.mark.parametrize("how", ["nan", "inf", "raises"])
def test_after_a_failure_the_best_earlier_iterate_comes_back(monkeypatch, how):
    stack, budget = LayerStack(noise(3, 6, 5)), RankBudget(2, 1)
    expected = solve_rasa(stack, budget, exactly(3, start="allocation", sweep="joint"))
    monkeypatch.setitem(SWEEPS, "joint", broken_after(3, how))
    solution = solve_rasa(stack, budget, exactly(50, start="allocation", sweep="joint"))
    assert solution.stop_reason is StopReason.NON_FINITE
    assert solution.history == expected.history
    assert solution.error == expected.error
    assert all(torch.equal(x, expected.factors.named()[name]) for name, x in solution.factors.named().items())


def test_if_the_error_rises_the_best_iterate_comes_back(monkeypatch):
    """No sweep of ours does; rounding near zero error can."""
    stack, budget = LayerStack(noise(3, 6, 5)), RankBudget(2, 1)
    expected = solve_rasa(stack, budget, exactly(3, start="lora", sweep="joint"))

    class Worse(JointSweep):
        def __call__(self, factors):
            factors, error = super().__call__(factors)
            if error * stack.scale**2 < expected.error * (1 - 1e-12):
                factors = factors.scaled(2.0)
                error = reconstruction_error(stack.unit(), factors)
            return factors, error

    monkeypatch.setitem(SWEEPS, "joint", Worse)
    solution = solve_rasa(stack, budget, exactly(4, start="lora", sweep="joint"))
    assert solution.history[:4] == expected.history
    assert solution.history[4] > solution.history[3] == pytest.approx(solution.error, rel=1e-12)


def test_the_two_other_reasons():
    stack, budget = LayerStack(noise(3, 6, 5)), RankBudget(2, 1)
    limited = solve_rasa(stack, budget, SolverOptions(start="lora", max_sweeps=2, rtol=1e-9))
    assert limited.stop_reason is StopReason.SWEEP_LIMIT
    converged = solve_rasa(stack, budget, SolverOptions(start="lora", max_sweeps=400, rtol=1e-3))
    x, y = converged.history[-2:]
    assert converged.stop_reason is StopReason.CONVERGED
    assert converged.sweeps < 400
    assert x - y <= 1e-3 * x


@EVERY
def test_the_callback_is_told_of_every_sweep(sweep):
    told, stack = [], LayerStack(1e6 * noise(3, 6, 5))
    options = exactly(7, start="lora", sweep=sweep)
    solution = solve_rasa(stack, RankBudget(2, 1), options, callback=told.append)
    assert [(p.start, p.sweep) for p in told] == [("lora", n) for n in range(1, 8)]
    assert all(p.sweep <= p.max_sweeps <= 7 for p in told)
    assert [p.error for p in told] == solution.history[1:]


def test_the_callback_is_told_of_every_run_on_the_stack():
    """After the steps of the search its lowest result sweeps to the limit."""
    told = []
    solve_rasa(LayerStack(noise(3, 6, 5)), RankBudget(2, 1), exactly(10), callback=told.append)
    steps = [p.sweep for p in told if p.start == "search"]
    assert steps == list(range(steps[-1] + 1))
    (start,) = {p.start for p in told} - {"search"}
    assert [p.sweep for p in told[len(steps) :]] == list(range(1, 11))
    assert start in STARTS


@EVERY
def test_the_same_seed_gives_the_same_numbers(sweep):
    stack, budget, options = LayerStack(noise(3, 6, 5)), RankBudget(2, 1), exactly(20, start="random", sweep=sweep)
    one, two = (solve_rasa(stack, budget, options) for _ in range(2))
    other = solve_rasa(stack, budget, dataclasses.replace(options, seed=1))
    assert one.history == two.history
    assert all(torch.equal(x, two.factors.named()[name]) for name, x in one.factors.named().items())
    assert other.history[-1] != one.history[-1]


@pytest.mark.slow
@pytest.mark.parametrize(("sweep", "passes"), [("core", 2), ("joint", 2), ("paper", 4)])
def test_passes_over_the_data(sweep, passes):
    """What a sweep costs where the error is far from zero; the paper's with its residual."""
    stack, budget = LayerStack(noise(3, 20, 20)), RankBudget(2, 1)
    solve_lora(stack, 2)  # so that both find the SVD
    few, many = (solve_rasa(stack, budget, exactly(n, start="lora", sweep=sweep)).data_passes for n in (5, 15))
    assert many - few == 10 * passes


# ---- bad input


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"start": "bset"},
            "unknown start 'bset'; known: best, allocation, lora, random, common, pencil, near-allocation",
        ),
        ({"effort": "slow"}, "unknown effort 'slow'; known: quick, default, thorough"),
        ({"sweep": "als"}, "unknown sweep 'als'; known: core, joint, paper"),
        ({"max_sweeps": 0}, "max_sweeps must be at least 1, got 0"),
        ({"rtol": -1e-9}, "rtol must be at least 0 and below 1, got -1e-09"),
        ({"rtol": 1.0}, "rtol must be at least 0 and below 1, got 1.0"),
        ({"rtol": math.nan}, "rtol must be at least 0 and below 1, got nan"),
        ({"max_cancellation": 0.5}, "max_cancellation must be at least 1, got 0.5"),
        ({"max_cancellation": "1"}, "max_cancellation must be a number, got '1'"),
        ({"max_cancellation": True}, "max_cancellation must be a number, got True"),
        ({"effort": ["quick"]}, r"unknown effort \['quick'\]; known: quick, default, thorough"),
        ({"sweep": {}}, r"unknown sweep \{\}; known: core, joint, paper"),
        ({"max_cancellation": math.nan}, "max_cancellation must be at least 1, got nan"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"start": None}, "unknown start of type NoneType; known: best"),
        ({"max_sweeps": 2.5}, "max_sweeps must be a whole number, got 2.5"),
        ({"rtol": "1"}, "rtol must be a number, got '1'"),
        ({"seed": math.nan}, "seed must be a whole number, got nan"),
        ({"seed": 2**62}, r"seed must be below 2\^62, got 4611686018427387904"),
    ],
)
def test_bad_options_are_named(options, sentence):
    with pytest.raises(InputError, match=sentence):
        SolverOptions(**options)


def test_starts_that_do_not_fit_are_named():
    stack, small = LayerStack(noise(3, 6, 5), "mine"), LayerStack(noise(2, 6, 5))
    budget = RankBudget(2, 1)
    wrong_layers, wrong_budget = random_start(small, budget), random_start(stack, RankBudget(2, 2))
    wrong_width = random_start(LayerStack(noise(3, 6, 4)), budget)
    for start, sentence in (
        (wrong_layers, r"private_B has shape \(2, 6, 1\), stack 'mine' and budget need \(3, 6, 1\)"),
        (wrong_budget, r"private_B has shape \(3, 6, 0\), stack 'mine' and budget need \(3, 6, 1\)"),
        (wrong_width, r"shared_A has shape \(3, 4\), stack 'mine' and budget need \(3, 5\)"),
    ):
        with pytest.raises(InputError, match=sentence):
            solve_rasa(stack, budget, SolverOptions(start=start))
    nan = dataclasses.replace(random_start(stack, budget), mixing=torch.full((3, 3), math.nan, dtype=torch.float64))
    with pytest.raises(InputError, match="the error of start 'given' is nan; a start needs finite factors"):
        solve_rasa(stack, budget, SolverOptions(start=nan))
    with pytest.raises(InputError, match=r"rank 6 exceeds min\(b, a\) = 5 of stack 'mine'"):
        solve_rasa(stack, RankBudget(6, 1))
    with pytest.raises(InputError, match="shared_rank 3 exceeds rank 2"):
        solve_path(stack, 2, [1, 3])
