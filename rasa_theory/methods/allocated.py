"""LoRA with L r ranks in all, given to whichever layers gain most by them."""

from __future__ import annotations

from rasa_theory.factors import lora_parameters
from rasa_theory.methods.fit import Evidence, Fit, Found, Method, fitted
from rasa_theory.methods.settings import Settings, at_least, largest
from rasa_theory.problem import LayerStack, RankBudget
from rasa_theory.ranks import RankTarget, allocate_ranks


def fit_allocated(stack: LayerStack, rank: int) -> Fit:
    """min sum_i ||M_i - B_i A_i||_F^2 over ranks r_i with sum_i r_i <= L r: the L r largest sigma_ij are kept.

    B_i (b, r_i), A_i (r_i, a); sum_i r_i (a + b) parameters. Closed form: by Eckart-Young each layer keeps its leading
    terms, and the largest of all lose least. What unequal ranks alone are worth, as AdaLoRA (Zhang et al., ICLR 2023)
    looks for them. Raises InputError unless 1 <= rank <= min(b, a).
    """
    RankBudget(at_least("rank", rank, 1), 0).check_fits(stack)
    U, S, Vh = stack.unit().svd()
    target = RankTarget(parameters=lora_parameters(stack.layers, stack.shape, rank))
    [ranks] = allocate_ranks([S], [sum(stack.shape)], target)
    B = [U[i, :, :n] * S[i, :n] for i, n in enumerate(ranks)]
    A = [Vh[i, :n] for i, n in enumerate(ranks)]
    found = Found(lambda i: B[i] @ A[i], (*B, *A), max(ranks))
    return fitted(stack, "allocated", {"rank": rank}, Evidence.CLOSED_FORM, found)


def _configurations(stack: LayerStack, parameters: int) -> list[Settings]:
    rank = largest(lambda r: lora_parameters(stack.layers, stack.shape, r), parameters, min(stack.shape))
    return [{"rank": rank}] if rank else []


ALLOCATED = Method(fit_allocated, _configurations)
