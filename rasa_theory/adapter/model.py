"""Adapters in a model: inject them, switch between them, merge and unload them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from rasa_theory.adapter.layer import AdaptedLinear
from rasa_theory.adapter.targets import PLACE, kinds_of, named, some
from rasa_theory.adapter.terms import AdapterSettings, ModuleKind, Terms
from rasa_theory.common import InputError
from rasa_theory.problem import RankBudget, RasaFactors, lora_parameters


class Adapter(nn.Module):
    """One named adapter in a model, returned by `inject`, `from_factors` or `load`.

    As a module it holds every parameter of the adapter once, and nothing else. An optimiser trains
    `adapter.parameters()`, and `adapter.state_dict()` is the adapter. At most one adapter of a model is active. Only
    the parameters of the active one require gradients.
    """

    def __init__(self, model: nn.Module, name: str, alpha: float, kinds: Sequence[Terms]) -> None:
        super().__init__()
        self.name, self.alpha = name, alpha
        self.kinds = nn.ModuleDict()
        for terms in kinds:
            key = terms.kind.replace(".", "__")
            if key in self.kinds:
                raise InputError(f"two kinds of module are called {key!r} if a dot is `__`; give each its own adapter")
            self.kinds[key + "_" * _is_reserved(key)] = terms
        self._model = (model,)  # in a tuple, so that torch does not register it here

    # ---- contents

    def check_finite(self) -> None:
        """Raise InputError, naming the parameter, if a value is infinite or NaN."""
        for key, value in self.named_parameters():
            if not value.is_meta and not bool(value.isfinite().all()):
                raise InputError(f"adapter {self.name!r}: {key} has values that are not finite")

    @property
    def terms(self) -> dict[str, Terms]:
        """The terms by kind of module, such as `attention.self.query`."""
        return {terms.kind: terms for terms in self.kinds.values()}  # type: ignore[misc]

    @property
    def targets(self) -> dict[str, tuple[Terms, int]]:
        """The modules with an update, by name: their terms, and their index among the layers of their kind."""
        return {name: (terms, i) for terms in self.terms.values() for i, name in enumerate(terms.targets.names)}

    def factors(self) -> dict[str, RasaFactors]:
        """The updates as factors of a reconstruction, by kind of module; copies."""
        return {kind: terms.factors() for kind, terms in self.terms.items()}

    def delta_weight(self, name: str) -> Tensor:
        """The update of a module, in the orientation of its weight. Raises InputError if the module has none."""
        if name not in self.targets:
            raise InputError(f"adapter {self.name!r} changes no module {name!r}; it has {some(list(self.targets))}")
        terms, i = self.targets[name]
        return self._layer(name).delta_weight(terms, i)

    def parameter_counts(self) -> dict[str, float]:
        """Number of parameters: private, shared, mixing, rasa (their sum), lora of the same rank, extra_percent.

        RaSA of rank r has L r (a + b) parameters like LoRA, and L (q + R) for the mixing. The mixing of k = 0 is not
        trained and is not counted.
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
        """True if the updates are applied."""
        return any(self._layer(name).shows(terms) for name, (terms, _) in self.targets.items())

    @property
    def merged(self) -> bool:
        """True if the updates are in the weights themselves."""
        return self.active and any(self._layer(name).merged for name in self.targets)

    def enable(self) -> None:
        """Apply the updates of this adapter and of no other. Its parameters alone require gradients.

        Raises InputError, and changes nothing, while another adapter is merged, or if this one has been unloaded.
        """
        layers = {name: self._layer(name) for name in self.targets}
        for other in adapters(self._model[0]).values():
            if other is not self:
                other._deactivate()
        for name, at in self.targets.items():
            layers[name].active = at
        for terms in self.terms.values():
            terms.set_trained(True)

    def disable(self) -> None:
        """Stop applying and training the updates. A merged adapter is taken out of the weights first."""
        if self.merged:
            self.unmerge()
        self._deactivate()

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Context manager: the model without this adapter, for answers of the base. Its state returns at the end."""
        active, merged = self.active, self.merged
        self.disable()
        try:
            yield
        finally:
            if active:
                self.enable()
            if merged:
                self.merge()

    def _deactivate(self) -> None:
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
        """Add the updates to the weights, each rounded once. The forward pass then has no extra cost.

        The parameters must not change until `unmerge`, which subtracts the update computed from them at that time.
        Meanwhile a state dict of the model has the merged weights. Raises InputError if the adapter is not active, is
        merged already, or has values that are not finite.
        """
        if not self.active or self.merged:
            state = "merged already" if self.merged else "not active; enable it first"
            raise InputError(f"adapter {self.name!r} is {state}")
        self.check_finite()
        self._add(1)

    def unmerge(self) -> None:
        """Subtract the updates from the weights again, up to rounding. Raises InputError if they are not merged."""
        if not self.merged:
            raise InputError(f"adapter {self.name!r} is not merged")
        self._add(-1)

    def _add(self, sign: int) -> None:
        for name, (terms, i) in self.targets.items():
            layer = self._layer(name)
            layer.add(layer.delta_weight(terms, i), sign)
            layer.merged = sign > 0

    def unload(self) -> None:
        """Remove the adapter from the model. A layer that no other adapter uses is unwrapped.

        Merged updates stay in the weights: `merge` and `unload` leave a plain model with the same outputs. The weights
        of the model stay frozen. Raises InputError if the adapter has been unloaded already.
        """
        if not self.merged:
            self._deactivate()
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
    """Put an adapter with these terms beside the layers they were built for, and enable it. All else is frozen.

    Raises InputError, and changes nothing, if the name is taken or not valid, an adapter in the model is merged, or
    the terms have values that are not finite.
    """
    if not name or "." in name:
        raise InputError(f"the name of an adapter has no dot and is not empty, got {name!r}")
    if _is_reserved(name):
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


def _is_reserved(key: str) -> bool:
    """True if no module can have this name in a ModuleDict, since one of its attributes has it."""
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
    """Put a RaSA adapter beside the Linear and Conv1D layers that `targets` select, and enable it.

    Every kind of module (the name without its layer) and shape has a pool of its own. With k = 0 it is LoRA of rank r.
    Everything else in the model is frozen. The update is zero until it is trained.

    **Arguments:**

    - model: the model, which is changed.
    - targets: each the end of a module's name, from a dot on (`query`, `attention.self.query`), or a pattern with `*`
      for the whole name.
    - budget: the ranks r and k.
    - alpha: the scale of the updates, as in LoRA. None: 2 r.
    - dropout: probability that an entry of the adapter's input is dropped in training.
    - seed: seed of the initial A factors.
    - name: name of the adapter in the model.

    **Returns:** the adapter.

    **Raises:** InputError if a target selects nothing, or a module that is no such layer. Also if a rank exceeds a
    layer, a weight is shared with another module, or the model has an adapter of this name.
    """
    settings = AdapterSettings(budget, 2.0 * budget.rank if alpha is None else alpha, dropout)
    kinds = kinds_of(model, named(model, targets))
    for kind in kinds:
        kind.check_fits(budget)
    generator = torch.Generator().manual_seed(seed)
    return put(model, name, settings.alpha, [Terms(kind, settings, generator) for kind in kinds])


def from_factors(model: nn.Module, factors: Mapping[str, RasaFactors], *, name: str = "default") -> Adapter:
    """Put reconstructed updates into a model, as an adapter that can be trained further.

    Private terms get the mixing 1. Every term is scaled so that its two factors have equal norm.

    **Arguments:**

    - model: the model, which is changed.
    - factors: target, as for `inject` -> the factors of its layers, in the order of the model. A target must select
      modules of one kind and shape.
    - name: name of the adapter in the model.

    **Returns:** the adapter.

    **Raises:** InputError as `inject` does, and if the factors have other sizes than the layers.
    """
    if not factors:
        raise InputError("there are no factors; give those of one target at least")
    terms: dict[str, Terms] = {}
    for target, one in factors.items():
        kinds = kinds_of(model, named(model, [target]))
        if len(kinds) > 1:
            names = some([kind.name for kind in kinds])
            raise InputError(f"{target!r} names modules of {len(kinds)} kinds, {names}; give factors for each")
        if kinds[0].name in terms:
            raise InputError(
                f"{target!r} names modules of the kind {kinds[0].name!r}, and so does another target; all layers of a "
                "kind have one pool, so give their factors together, by one target"
            )
        terms[kinds[0].name] = _terms_of(kinds[0], one)
    return put(model, name, 1.0, list(terms.values()))


def _terms_of(kind: ModuleKind, factors: RasaFactors) -> Terms:
    L, q, R = len(kind.weights), factors.private_B.shape[2], factors.shared_B.shape[1]
    if factors.layers != L or R % L:
        raise InputError(
            f"{kind.name}: the factors are of {factors.layers} layers and {R} pool terms, the model has {L} layers, "
            "each of which gives as many terms to the pool"
        )
    terms = Terms(kind, AdapterSettings(RankBudget(q + R // L, R // L), 1.0), torch.Generator())
    shape = factors.shared_B.shape[0], factors.shared_A.shape[1]
    if terms.shape != shape:
        raise InputError(f"{kind.name}: the factors are of shape {shape}, the layers of {terms.shape}")
    terms.assign(factors)
    return terms
