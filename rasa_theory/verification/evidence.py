"""The functions under test, and their results on one instance, each computed once, when a law asks for it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from rasa_theory.bounds import CERTIFICATES, Bound, allocation_bound, closed_floors, lower_bound
from rasa_theory.common import at_least, one_of
from rasa_theory.problem import LayerStack, LoraFactors, RankBudget, RasaFactors, layer_residuals
from rasa_theory.solvers import (
    Attempt,
    LoraSolution,
    RasaSolution,
    SolverOptions,
    random_attempt,
    random_start,
    resolve_mixing,
    solve_lora,
    solve_path,
    solve_rasa,
)
from rasa_theory.verification.instances import Instance, Known

_PATH_SWEEPS = 2
_RANDOM_SWEEPS = {"joint": 8, "paper": 30}


def _probable_floor(stack: LayerStack, budget: RankBudget) -> Bound:
    """The closed floor from products alone, also where layers are small."""
    return lower_bound(stack, budget, spectra="leading")


@dataclass(frozen=True)
class Subject:
    """The functions under test: those of the package, or others in their place, so that a test can break a law."""

    solve_lora: Callable[[LayerStack, int], LoraSolution] = solve_lora
    solve_rasa: Callable[[LayerStack, RankBudget, SolverOptions], RasaSolution] = solve_rasa
    solve_path: Callable[[LayerStack, int, Iterable[int], SolverOptions], dict[int, RasaSolution]] = solve_path
    random_attempt: Callable[[LayerStack, RankBudget, float, int], Attempt] = random_attempt
    allocation_bound: Callable[[LayerStack, RankBudget], Bound] = allocation_bound
    closed_floors: Callable[[LayerStack, RankBudget], list[Bound]] = closed_floors
    lower_bound: Callable[[LayerStack, RankBudget, str], Bound] = lower_bound
    probable_floor: Callable[[LayerStack, RankBudget], Bound] = _probable_floor
    embed: Callable[[LoraFactors, RankBudget, str], RasaFactors] = RasaFactors.from_lora
    resolve_mixing: Callable[[LayerStack, RasaFactors], tuple[RasaFactors, float]] = resolve_mixing


@dataclass(frozen=True)
class VerificationSettings:
    """The certificate to compute, and the greatest number of sweeps of an answer. Raises InputError if invalid."""

    certificate: str = "closed"
    sweeps: int = 5

    def __post_init__(self) -> None:
        at_least("sweeps", self.sweeps, 1)
        one_of("certificate", self.certificate, CERTIFICATES)


class MixingStep(NamedTuple):
    """D re-solved at some factors: the squared error before and after, and the drop in closed form."""

    factors: RasaFactors
    before: float
    solved: RasaFactors
    after: float
    drop: float


class Forms(NamedTuple):
    """The values in closed form. `floors` holds the better orientation of each by name, at least 0."""

    e_lora: float
    e_allocation: float
    floors: dict[str, float]


class Evidence:
    """The results of `subject` on `instance`."""

    def __init__(self, instance: Instance, subject: Subject, settings: VerificationSettings) -> None:
        self.instance, self.subject, self.settings = instance, subject, settings
        self.stack = LayerStack(instance.draw.values, instance.family)
        self.budget = instance.draw.budget
        self.known: Known | None = instance.draw.known

    @property
    def values(self) -> Tensor:
        """The instance, (L, b, a)."""
        return self.instance.draw.values

    def rng(self) -> np.random.Generator:
        """A new generator with the seed of the instance."""
        return np.random.default_rng(self.instance.seed)

    def forms(self, stack: LayerStack) -> Forms:
        """The closed forms of `stack`, which is that of the instance or a changed one."""
        floors: dict[str, float] = {}
        for bound in self.subject.closed_floors(stack, self.budget):
            floors[bound.name] = max(bound.value, floors.get(bound.name, 0.0))
        e_lora = self.subject.solve_lora(stack, self.budget.rank).error
        return Forms(e_lora, self.subject.allocation_bound(stack, self.budget).value, floors)

    @functools.cached_property
    def lora(self) -> LoraSolution:
        """LoRA's optimum."""
        return self.subject.solve_lora(self.stack, self.budget.rank)

    @functools.cached_property
    def closed(self) -> Forms:
        """The closed forms of the instance."""
        return self.forms(self.stack)

    @functools.cached_property
    def certificate(self) -> Bound:
        """The certified floor of the kind in the settings."""
        return self.subject.lower_bound(self.stack, self.budget, self.settings.certificate)

    @functools.cached_property
    def probable(self) -> Bound:
        """The closed floor from products alone."""
        return self.subject.probable_floor(self.stack, self.budget)

    @functools.cached_property
    def answer(self) -> RasaSolution:
        """The solution of the default solver with the least effort, since the laws hold whatever a search finds."""
        return self._solve(effort="quick", max_sweeps=self.settings.sweeps)

    @functools.cached_property
    def random_runs(self) -> dict[str, RasaSolution]:
        """Solutions from a random start, by the name of the sweep."""
        return {s: self._solve(start="random", sweep=s, max_sweeps=n) for s, n in _RANDOM_SWEEPS.items()}

    @functools.cached_property
    def path(self) -> dict[int, RasaSolution]:
        """A few sweeps for every k = 0..r, from a random pool, so that it is the warm start that nests the errors."""
        options = SolverOptions(start="random", sweep="joint", max_sweeps=_PATH_SWEEPS, seed=self.instance.seed)
        return self.subject.solve_path(self.stack, self.budget.rank, range(self.budget.rank + 1), options)

    @functools.cached_property
    def attempt(self) -> Attempt:
        """The iteration count from a random start."""
        return self.subject.random_attempt(self.stack, self.budget, self.lora.error, self.instance.seed)

    @functools.cached_property
    def embeddings(self) -> list[MixingStep]:
        """D re-solved at LoRA's optimum, each layer's k smallest terms in the pool, and each layer's k largest."""
        kinds = ("smallest", "largest")
        return [self._mixing_step(self.subject.embed(self.lora.factors, self.budget, kind)) for kind in kinds]

    @functools.cached_property
    def random_mixing(self) -> MixingStep:
        """D re-solved where all layers use a random pool."""
        return self._mixing_step(random_start(self.stack, self.budget, self.instance.seed, size=0.3))

    @functools.cached_property
    def lowest(self) -> float:
        """The least measured error of all points of the budget that any solver has reached."""
        solutions = [self.answer, *self.random_runs.values(), self.path[self.budget.shared_rank]]
        measured = [residual(self.values, solution.factors) for solution in solutions]
        return min(*measured, *(step.after for step in self.embeddings))

    def allocation_at(self, k: int) -> float:
        """The allocation bound at another k."""
        return self.subject.allocation_bound(self.stack, RankBudget(self.budget.rank, k)).value

    def _solve(self, **options: Any) -> RasaSolution:
        return self.subject.solve_rasa(self.stack, self.budget, SolverOptions(seed=self.instance.seed, **options))

    def _mixing_step(self, factors: RasaFactors) -> MixingStep:
        solved, drop = self.subject.resolve_mixing(self.stack, factors)
        return MixingStep(factors, residual(self.values, factors), solved, residual(self.values, solved), drop)


def residual(values: Tensor, factors: RasaFactors | LoraFactors) -> float:
    """The sum of `layer_residuals`."""
    return math.fsum(layer_residuals(values, factors))
