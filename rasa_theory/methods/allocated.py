"""LoRA with any number of ranks in all, given to whichever layers gain most by them."""

from __future__ import annotations

from rasa_theory.bounds import RankTarget, allocate_ranks
from rasa_theory.common import at_least
from rasa_theory.methods.fit import Evidence, Fit, Found, Method, fitted
from rasa_theory.methods.settings import Settings, at_most
from rasa_theory.problem import LayerStack


def fit_allocated(stack: LayerStack, terms: int) -> Fit:
    """min sum_i ||M_i - B_i A_i||_F^2 over ranks r_i with sum_i r_i <= `terms`: the largest sigma_ij are kept.

    B_i (b, r_i), A_i (r_i, a); sum_i r_i (a + b) parameters. Closed form: by Eckart-Young each layer keeps its leading
    terms, and the largest of all lose least. What unequal ranks alone are worth, as AdaLoRA (Zhang et al., ICLR 2023)
    looks for them. Raises InputError unless 1 <= terms <= L min(b, a).
    """
    at_most("terms", at_least("terms", terms, 1), stack.layers * min(stack.shape), stack)
    U, S, Vh = stack.unit().spectra.svd()
    cost = sum(stack.shape)
    [ranks] = allocate_ranks([S], [cost], RankTarget(parameters=terms * cost))
    B = [U[i, :, :n] * S[i, :n] for i, n in enumerate(ranks)]
    A = [Vh[i, :n] for i, n in enumerate(ranks)]
    found = Found(lambda i: B[i] @ A[i], (*B, *A), max(ranks))
    return fitted(stack, "allocated", {"terms": terms}, Evidence.CLOSED_FORM, found)


def _configurations(stack: LayerStack, parameters: int) -> list[Settings]:
    terms = min(parameters // sum(stack.shape), stack.layers * min(stack.shape))
    return [{"terms": terms}] if terms else []


ALLOCATED = Method(fit_allocated, _configurations)
