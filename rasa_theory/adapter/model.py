"""Adapters in a model: injected, switched, merged, taken out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from rasa_theory.adapter.layer import AdaptedLinear
from rasa_theory.adapter.targets import PLACE, kinds_of, named, some
from rasa_theory.adapter.terms import Kind, Settings, Terms
from rasa_theory.common import InputError
from rasa_theory.problem import RankBudget, RasaFactors, lora_parameters


class Adapter(nn.Module):
    """One named adapter in a model, made by `inject`, `from_factors` or `load`.

    As a module it holds its parameters and nothing else, once: `adapter.parameters()` is what an optimiser trains,
    `adapter.state_dict()` is the adapter. Of the adapters in a model at most one is active; only the parameters of that
    one require gradients.
    """

    def __init__(self, model: nn.Module, name: str, alpha: float, kinds: Sequence[Terms]) -> None:
        super().__init__()
        self.name, self.alpha = name, alpha
        self.kinds = nn.ModuleDict()
        for terms in kinds:
            key = terms.kind.replace(".", "__")
            if key in self.kinds:
                raise InputError(f"two kinds of module are called {key!r} if a dot is `__`; give each its own adapter")
            self.kinds[key + "_" * _kept_by_torch(key)] = terms
        self._model = (model,)  # in a tuple, so that torch does not register it here

    # ---- what it is

    def check_finite(self) -> None:
        """Raise InputError if one of its values is infinite or NaN, naming the parameter."""
        for key, value in self.named_parameters():
            if not value.is_meta and not bool(value.isfinite().all()):
                raise InputError(f"adapter {self.name!r}: {key} has values that are not finite")

    @property
    def terms(self) -> dict[str, Terms]:
        """The terms by kind of module, such as `attention.self.query`."""
        return {terms.kind: terms for terms in self.kinds.values()}  # type: ignore[misc]

    @property
    def targets(self) -> dict[str, tuple[Terms, int]]:
        """The modules that it changes, by name, each with its terms and its number among the layers of its kind."""
        return {name: (terms, i) for terms in self.terms.values() for i, name in enumerate(terms.targets.names)}

    def factors(self) -> dict[str, RasaFactors]:
        """By kind of module, the updates as factors of a reconstruction; copies."""
        return {kind: terms.factors() for kind, terms in self.terms.items()}

    def delta_weight(self, name: str) -> Tensor:
        """What is added to the weight of a module, in its orientation. Raises InputError if it changes no such one."""
        if name not in self.targets:
            raise InputError(f"adapter {self.name!r} changes no module {name!r}; it has {some(list(self.targets))}")
        terms, i = self.targets[name]
        return self._layer(name).delta_weight(terms, i)

    def parameter_counts(self) -> dict[str, float]:
        """How many numbers it has, and LoRA of the same rank: private, shared, mixing, rasa, lora, extra_percent.

        RaSA of rank r has L r (a + b) as LoRA, and L (q + R) for the mixing; the mixing of k = 0 is not trained, and
        does not count.
        """
        private = shared = mixing = lora = 0
        for terms in self.terms.values():
            L, budget = len(terms.targets.names), terms.budget
            private += L * budget.private_rank * sum(terms.shape)
            shared += L * budget.shared_rank * sum(terms.shape)
            mixing += L * (budget.private_rank + L * budget.shared_rank) * (budget.shared_rank > 0)
            lora += lora_parameters(L, terms.shape, budget.rank)
        counts = {"private": private, "shared": shared, "mixing": mixing, "rasa": private + shared + mixing}
        return counts | {"lora": lora, "extra_percent": 100 * mixing / lora}

    # ---- switching

    @property
    def active(self) -> bool:
        """Whether its updates are applied."""
        return any(self._layer(name).shows(terms) for name, (terms, _) in self.targets.items())

    @property
    def merged(self) -> bool:
        """Whether its updates are in the weights themselves."""
        return self.active and any(self._layer(name).merged for name in self.targets)

    def enable(self) -> None:
        """Apply its updates, and no other adapter's; its parameters alone require gradients.

        Raises InputError, and changes nothing, while another one is merged, or if it is not in the model any more.
        """
        layers = {name: self._layer(name) for name in self.targets}
        for other in adapters(self._model[0]).values():
            if other is not self:
                other._stop()
        for name, at in self.targets.items():
            layers[name].active = at
        for terms in self.terms.values():
            terms.set_trained(True)

    def disable(self) -> None:
        """Apply its updates no more, and train nothing of it; if merged, it is taken out of the weights first."""
        if self.merged:
            self.unmerge()
        self._stop()

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """The model without it for a while, such as for the answers of the base; then as before, merged or not."""
        active, merged = self.active, self.merged
        self.disable()
        try:
            yield
        finally:
            if active:
                self.enable()
            if merged:
                self.merge()

    def _stop(self) -> None:
        if self.merged:
            raise InputError(f"adapter {self.name!r} is merged into the weights; unmerge it first")
        for name, (terms, _) in self.targets.items():
            layer = self._layer(name)
            if layer.shows(terms):
                layer.active = None
        for terms in self.terms.values():
            terms.set_trained(False)

    # ---- merging

    def merge(self) -> None:
        """Add its updates to the weights, each rounded once; the forward pass then costs nothing more.

        Until `unmerge` its parameters must stay as they are: what is taken out again is the update that they give then.
        A state dict of the model has the merged weights meanwhile. Raises InputError if it is not active, is merged
        already, or has values that are not finite.
        """
        if not self.active or self.merged:
            state = "merged already" if self.merged else "not active; enable it first"
            raise InputError(f"adapter {self.name!r} is {state}")
        self.check_finite()
        self._add(1)

    def unmerge(self) -> None:
        """Take its updates out of the weights again, to their rounding. Raises InputError if it is not merged."""
        if not self.merged:
            raise InputError(f"adapter {self.name!r} is not merged")
        self._add(-1)

    def _add(self, sign: int) -> None:
        for name, (terms, i) in self.targets.items():
            layer = self._layer(name)
            layer.add(layer.delta_weight(terms, i), sign)
            layer.merged = sign > 0

    def unload(self) -> None:
        """Take it out of the model; where no other adapter stands beside a layer, the layer itself comes back.

        What is merged stays in the weights: `merge` and `unload` leave a plain model that computes what this one did.
        The weights of the model stay frozen. Raises InputError if it is not in the model any more.
        """
        if not self.merged:
            self._stop()
        model, place = self._model[0], getattr(self._model[0], PLACE)
        others = {name for other in place.values() if other is not self for name in other.targets}
        for name, (terms, _) in self.targets.items():
            layer = self._layer(name)
            if layer.shows(terms):
                layer.active, layer.merged = None, False
            if name not in others:
                _replace(model, name, layer.base)
        del place[self.name]
        if not len(place):
            delattr(model, PLACE)

    def _layer(self, name: str) -> AdaptedLinear:
        if adapters(self._model[0]).get(self.name) is not self:
            raise InputError(f"adapter {self.name!r} has been unloaded")
        layer = self._model[0].get_submodule(name)
        if not isinstance(layer, AdaptedLinear):
            raise InputError(f"module {name!r} of the model has been replaced since the adapter was injected")
        return layer


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters in a model, by name."""
    return dict(getattr(model, PLACE, {}).items())


def put(model: nn.Module, name: str, alpha: float, kinds: Sequence[Terms]) -> Adapter:
    """Put terms, made for layers of the model, beside these layers, and enable them; all else is frozen.

    Raises InputError, and changes nothing, if the name is taken or none, an adapter in the model is merged, or the
    terms have values that are not finite.
    """
    if not name or "." in name:
        raise InputError(f"the name of an adapter has no dot and is not empty, got {name!r}")
    if _kept_by_torch(name):
        raise InputError(f"torch keeps the name {name!r} to itself; call the adapter otherwise")
    if name in adapters(model):
        raise InputError(f"the model has an adapter {name!r} already; unload it first, or take another name")
    if merged := [other.name for other in adapters(model).values() if other.merged]:
        raise InputError(f"adapter {merged[0]!r} is merged into the weights; unmerge it first")
    adapter = Adapter(model, name, alpha, kinds).train(model.training)
    adapter.check_finite()
    model.requires_grad_(False)
    for target in adapter.targets:
        layer = model.get_submodule(target)
        if not isinstance(layer, AdaptedLinear):
            _replace(model, target, AdaptedLinear(layer))
    if not hasattr(model, PLACE):
        model.add_module(PLACE, nn.ModuleDict().train(model.training))
    getattr(model, PLACE)[name] = adapter
    adapter.enable()
    return adapter


def _kept_by_torch(key: str) -> bool:
    """Whether no module can have this name in a ModuleDict: its methods have such names."""
    return hasattr(nn.ModuleDict(), key)


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)


def inject(
    model: nn.Module,
    targets: Sequence[str],
    budget: RankBudget,
    *,
    alpha: float | None = None,
    dropout: float = 0.0,
    seed: int = 0,
    name: str = "default",
) -> Adapter:
    """Put a RaSA adapter beside the Linear and Conv1D layers that `targets` name, and enable it.

    A target is the end of a module's name, from a dot on (`query`, `attention.self.query`), or a pattern with `*` for
    the whole name. Every kind of module (the name without its layer) and shape has a pool of its own. With k = 0 it is
    LoRA of rank r. `alpha` (2 r) is the scale of the updates, as in LoRA; `dropout` acts on the adapter's input.
    Everything else in the model is frozen; the update is zero until it is trained.

    Raises InputError if a target names nothing or something that is no such layer, a rank exceeds a layer, a weight is
    shared with another module, or the model has an adapter of this name.
    """
    settings = Settings(budget, 2.0 * budget.rank if alpha is None else alpha, dropout)
    kinds = kinds_of(model, named(model, targets))
    for kind in kinds:
        kind.check_fits(budget)
    generator = torch.Generator().manual_seed(seed)
    return put(model, name, settings.alpha, [Terms(kind, settings, generator) for kind in kinds])


def from_factors(model: nn.Module, factors: Mapping[str, RasaFactors], *, name: str = "default") -> Adapter:
    """Put reconstructed updates into a model: by target as for `inject`, factors of its layers in their order.

    A target must name modules of one kind and shape. Private terms get the mixing 1; every term is scaled so that its
    two factors are of equal norm. Raises InputError as `inject` does, and if the factors are of other sizes.
    """
    if not factors:
        raise InputError("there are no factors; give those of one target at least")
    terms: dict[str, Terms] = {}
    for target, one in factors.items():
        kinds = kinds_of(model, named(model, [target]))
        if len(kinds) > 1:
            found = some([kind.name for kind in kinds])
            raise InputError(f"{target!r} names modules of {len(kinds)} kinds, {found}; give factors for each")
        if kinds[0].name in terms:
            raise InputError(
                f"{target!r} names modules of the kind {kinds[0].name!r}, and so does another target; all layers of a "
                "kind have one pool, so give their factors together, by one target"
            )
        terms[kinds[0].name] = _reconstructed(kinds[0], one)
    return put(model, name, 1.0, list(terms.values()))


def _reconstructed(kind: Kind, factors: RasaFactors) -> Terms:
    L, q, R = len(kind.weights), factors.private_B.shape[2], factors.shared_B.shape[1]
    if factors.layers != L or R % L:
        raise InputError(
            f"{kind.name}: the factors are of {factors.layers} layers and {R} pool terms, the model has {L} layers, "
            "each of which gives as many terms to the pool"
        )
    terms = Terms(kind, Settings(RankBudget(q + R // L, R // L), 1.0), torch.Generator())
    if terms.shape != (found := (factors.shared_B.shape[0], factors.shared_A.shape[1])):
        raise InputError(f"{kind.name}: the factors are of shape {found}, the layers of {terms.shape}")
    terms.assign(factors)
    return terms
