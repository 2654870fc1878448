"""Each method at its best within a number of parameters, and SHARE as the packages of others compute it."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from experiments.compression.collections import Collection
from rasa_theory import methods
from rasa_theory.formats import lora_key
from rasa_theory.methods import largest, residual


def share_columns(stacked: Collection, budget: int) -> methods.Fit | None:
    """SHARE on the factors as trained, as lorashare computes it, with the most components that fit."""
    p = components(stacked, budget, "columns")
    return methods.fit_share_basis(stacked.stack, stacked.rank, p, "columns", stacked.factors) if p else None


def share_whole(stacked: Collection, budget: int) -> methods.Fit | None:
    """The same as vlora-dev computes it."""
    p = components(stacked, budget, "whole")
    return methods.fit_share_basis(stacked.stack, stacked.rank, p, "whole", stacked.factors) if p else None


def components(stacked: Collection, budget: int, basis: str) -> int:
    """The largest number of components within `budget` parameters, below the number that holds all factors."""
    (L, (b, a)), r = (stacked.stack.layers, stacked.stack.shape), stacked.rank
    if basis == "columns":
        return largest(lambda p: p * (a + b + 2 * L * r), budget, min(a, b, L * r))
    return largest(lambda p: (p + 1) * r * (a + b) + 2 * L * p, budget, L - 1)


def lorashare(stacked: Collection, budget: int) -> methods.Fit | None:
    """SHARE by the package lorashare itself."""
    from lorashare import compression

    p = components(stacked, budget, "columns")
    if not p:
        return None
    keys = {side: lora_key("x", side) for side in "AB"}
    adapters = {
        str(i): {keys["A"]: A.float(), keys["B"]: B.float()}
        for i, (B, A) in enumerate(zip(stacked.factors.B, stacked.factors.A, strict=True))
    }
    combined = compression.combine_adapter_weights(adapters)
    basis, _, _ = compression.compute_shared_components(combined, num_components=p, device="cpu")
    loadings = {i: compression.compute_adapter_loadings(basis, adapter) for i, adapter in adapters.items()}
    rebuilt = [compression.reconstruct_adapter_weights(basis, loading) for loading in loadings.values()]
    stored = [*basis.values(), *(x for loading in loadings.values() for x in loading.values())]
    return _of_package(stacked, "lorashare", p, stored, [(lora[keys["B"]], lora[keys["A"]]) for lora in rebuilt])


def vlora(stacked: Collection, budget: int) -> methods.Fit | None:
    """SHARE by the package vlora-dev itself."""
    import vlora as package

    p, r = components(stacked, budget, "whole"), stacked.rank
    if not p:
        return None
    adapters = [
        package.LoRAWeights(["x"], {"x": A.float()}, {"x": B.float()}, r)
        for B, A in zip(stacked.factors.B, stacked.factors.A, strict=True)
    ]
    space = package.SharedSubspace.from_adapters(adapters, num_components=p)
    rebuilt = [space.reconstruct(f"task_{i}") for i in range(len(adapters))]
    basis = (space.means_a, space.means_b, space.components_a, space.components_b)
    loadings = [side["x"] for task in space.tasks.values() for side in (task.loadings_a, task.loadings_b)]
    stored = [*(side["x"] for side in basis), *loadings]
    return _of_package(stacked, "vlora", p, stored, [(lora.lora_b["x"], lora.lora_a["x"]) for lora in rebuilt])


def _of_package(
    stacked: Collection, name: str, p: int, stored: list[Tensor], pairs: list[tuple[Tensor, Tensor]]
) -> methods.Fit:
    """A fit of the LoRAs (B_i, A_i) that a package rebuilds from `stored`."""

    def update(i: int) -> Tensor:
        B, A = pairs[i]
        return B @ A

    return methods.Fit(
        method=name,
        settings={"components": p},
        error=residual(stacked.stack, lambda i: update(i).double()),
        parameters=sum(x.numel() for x in stored),
        evidence=methods.Evidence.OF_FACTORS,
        update_rank=stacked.rank,
        update=update,
    )


def ours(name: str, stacked: Collection, budget: int) -> methods.Fit | None:
    """The configuration of least error among the largest that fit.

    The methods in `TURNING` do not depend on the orthonormal bases of the layers. They are solved on the turned layers,
    which takes a small part of the time; their parameters are counted for the layers as they are.
    """
    method = methods.METHODS[name]
    settings = method.configurations(stacked.stack, budget)
    if name not in TURNING:
        fits = [method.solve(stacked.stack, **each) for each in settings]
    else:
        fits = [turned_back(stacked, method.solve(stacked.turned, **each)) for each in settings]
    return min(fits, key=lambda fit: fit.error, default=None)


def turned_back(stacked: Collection, fit: methods.Fit) -> methods.Fit:
    """A fit of `stacked.turned` as one of `stacked.stack`."""
    U, V = stacked.sides
    parameters = methods.METHODS[fit.method].parameters(stacked.stack.layers, stacked.stack.shape, **fit.settings)
    return replace(fit, parameters=parameters, update=lambda i: U @ fit.update(i) @ V.mT)


TURNING = ("lora", "allocated", "rasa", "joint_full", "joint_diagonal", "share_lora", "one_sided")


SOLVERS: dict[str, Callable[[Collection, int], methods.Fit | None]] = {
    **{name: functools.partial(ours, name) for name in methods.METHODS},
    "share_columns": share_columns,
    "share_whole": share_whole,
    **{name: solve for name, solve in (("lorashare", lorashare), ("vlora", vlora)) if importlib.util.find_spec(name)},
}
"""Name -> the best Fit within a number of parameters, or None."""
OF_CHANCE = ("joint_diagonal", "joint_full", "share_columns", "share_whole", "share_lora", "one_sided", "vb_lora")
"""The methods that are also run on random LoRAs: their error depends on the directions that layers share."""
SLOW, SLOW_TERMS = {"tied_lora", "vb_lora", "vera", "mos"}, 64
"""Methods that are not solved turned would take hours on more terms L r; VeRA is slow on fewer, too."""
