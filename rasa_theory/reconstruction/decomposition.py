"""The gain of RaSA over LoRA, split by its cause: unequal allocation of ranks, or terms that layers share."""

from __future__ import annotations

from dataclasses import dataclass

from rasa_theory.bounds import Bound, allocation_bound, lower_bound
from rasa_theory.common import InputError
from rasa_theory.problem import LayerStack, RankBudget, RasaFactors
from rasa_theory.solvers import RasaSolution, SolverOptions, solve_lora, solve_rasa


@dataclass(frozen=True)
class Gain:
    """The gain of RaSA(r, k) over LoRA of rank r on one stack, in three parts.

    Errors are squared, summed over layers, in units of the input. The three shares are fractions of e_lora; with the
    share of `floor` that is left they add up to 1. They are 0 where e_lora is 0.

    Attributes:
        e_lora: LoRA's optimum; 0 where it is no more than rounding, as on layers of no higher rank.
        e_allocation: the least error of a pool in which every term serves one layer. Such a pool hands ranks to the
            layers that need them.
        e_rasa: the error of the best solution that the solver reached, an upper bound on the optimum.
        floor: a certified lower bound on the optimum of RaSA(r, k), with its name.
    """

    e_lora: float
    e_allocation: float
    e_rasa: float
    floor: Bound

    @property
    def allocation(self) -> float:
        """The share of e_lora that unequal allocation of ranks gains: (e_lora - e_allocation) / e_lora."""
        return self._share(self.e_lora - self.e_allocation)

    @property
    def sharing(self) -> float:
        """The share of e_lora that shared terms gain beyond that: (e_allocation - e_rasa) / e_lora."""
        return self._share(self.e_allocation - self.e_rasa)

    @property
    def unknown(self) -> float:
        """The share of e_lora that better solutions could gain at most: (e_rasa - floor) / e_lora."""
        return self._share(self.e_rasa - self.floor.value)

    def _share(self, difference: float) -> float:
        return difference / self.e_lora if self.e_lora > 0 else 0.0


def gain(
    stack: LayerStack,
    budget: RankBudget,
    solver: SolverOptions | None = None,
    *,
    certificate: str = "closed",
    solution: RasaSolution | None = None,
) -> Gain:
    """Split the gain of RaSA over LoRA into unequal allocation and sharing, with the unknown down to the floor.

    A pool can gain in two ways. It can hand more ranks to the layers that need them: `allocation_bound` is the optimum
    of pools that do only this, in closed form. Or its terms can serve several layers at once: the rest of the gain.
    What the solver may have missed is bounded by a certified floor, so that the parts are known up to `unknown`.

    Arguments:
        stack: the updates M_i, (L, b, a).
        budget: r and k, with r <= min(b, a).
        solver: how to solve (None: the defaults). Only a start of "best" or "allocation" ensures that e_rasa is at
            most e_allocation, and `sharing` at least 0.
        certificate: floors up to this kind, "closed", "dual" or "two-sided", as for `lower_bound`.
        solution: a solution of this stack and budget; if there is one, nothing is solved and `solver` is not used.

    Returns:
        Errors and floor, squared, in units of the input, and the three shares of e_lora.

    Raises:
        InputError: r exceeds min(b, a), `solution` has other layers or ranks, or `certificate` is unknown.
    """
    budget.check_fits(stack)
    if solution is not None:
        _check_fits(solution.factors, stack, budget)
    spectra = (solver or SolverOptions()).spectra
    stack = stack.with_spectra(spectra, budget)
    best = solve_rasa(stack, budget, solver) if solution is None else solution
    lora = solve_lora(stack, budget.rank)
    return Gain(
        e_lora=lora.error if lora.interval[0] > 0 else 0.0,  # shares of a rounding error mean nothing
        e_allocation=allocation_bound(stack, budget).value,
        e_rasa=best.error,
        floor=lower_bound(stack, budget, certificate, spectra=spectra),
    )


def _check_fits(factors: RasaFactors, stack: LayerStack, budget: RankBudget) -> None:
    """Raise InputError unless the layers and ranks of `factors` are those of the stack and budget."""
    b, a = stack.shape
    expected = (stack.layers, b, a, budget.private_rank, budget.pool_rank(stack.layers))
    private_B, shared_A = factors.private_B, factors.shared_A
    actual = (factors.layers, private_B.shape[1], shared_A.shape[1], private_B.shape[2], shared_A.shape[0])
    if actual != expected:
        raise InputError(
            f"the solution has (L, b, a, q, R) = {actual}, stack {stack.name!r} and budget need {expected}", "solution"
        )
