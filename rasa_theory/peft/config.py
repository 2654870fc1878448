"""The configuration of a RaSA adapter, and its form in adapter_config.json."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field
from typing import Any

import torch

from rasa_theory.common import InputError, at_least, fraction, one_of, real_number
from rasa_theory.formats import COMPILED
from rasa_theory.peft.library import RASA, PeftConfig, get_pattern_key
from rasa_theory.problem import RankBudget

_D_INITS = ("half", "keep_scale")
_LARGEST = torch.finfo(torch.float32).max
_IN_FILE = {"k": "rasa_k", "alpha": "rasa_alpha", "dropout": "rasa_dropout", "d_init": "rasa_d_init"}
_UNKNOWN_TO_THE_AUTHORS = ("exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "k_pattern",
                           "seed", "d_init", "peft_version", "revision")  # fmt: skip


def initial_mixing(q: int, R: int, alpha: float) -> torch.Tensor:
    """Return the initial mixing of a layer (q + R,), private terms first, in float64.

    He et al., ICLR 2025, section 3.2: private terms and pool carry half of alpha each, alpha / (2 q) and alpha / (2 R)
    a term. If one of them is empty, the other carries all of it, so that k = 0 is LoRA with its scaling alpha / r.

    Arguments:
        q: number of private terms of a layer.
        R: number of terms of the pool.
        alpha: the scale of the updates, as in LoRA.

    Returns:
        The mixing, (q + R,) in float64.
    """
    half = alpha / 2 if q and R else alpha
    return torch.cat([torch.full((n,), half / max(n, 1), dtype=torch.float64) for n in (q, R)])


@dataclass
class RasaConfig(PeftConfig):  # type: ignore[misc]  # a dataclass of the library without types
    """Configuration of a RaSA adapter (He et al., ICLR 2025), for `peft.get_peft_model`.

    A layer has r - k private ranks. All layers of one kind, tower and shape share a pool of L k ranks.

    Arguments:
        r: rank budget of a layer. The adapter has as many parameters as a LoRA of rank r, and its mixing.
        k: the ranks that each layer gives to the pool, from 0 to r. k = 0 is LoRA.
        alpha: the scale of the updates, as in LoRA. None: 2 r. It enters the initial mixing only.
        d_init: initial mixing. "half" is the paper's: half of alpha on the private terms and half on the pool.
            "keep_scale" is alpha / r on every term.
        dropout: probability that an entry of the adapter's input is dropped in training.
        target_modules: names or ends of names of the modules, a regular expression, or "all-linear".
        exclude_modules: modules that get no adapter; the same forms.
        modules_to_save: modules that are trained and saved whole, such as a classifier's head.
        bias: "none", "all" or "rasa_only": the biases that are trained too.
        layers_to_transform: numbers of the layers that get an adapter. None: all.
        layers_pattern: name of the list of layers, where `layers_to_transform` needs it.
        fan_in_fan_out: true if weights are (in, out). It is set from the modules themselves.
        rank_pattern: other r, by a regular expression for names of modules. All modules of a pool need the same r.
        k_pattern: other k, likewise.
        seed: seed of the initial A factors. None: torch's global generator.

    `rasa_k`, `rasa_alpha`, `rasa_dropout` and `rasa_d_init` are the names of k, alpha, dropout and d_init in files of
    the authors' layouts; they are accepted so that such files load.

    Raises:
        InputError: a value is out of its range; the message names both.
    """

    r: int = field(default=8)
    k: int = field(default=1)
    alpha: float | None = field(default=None)
    d_init: str = field(default="half")
    dropout: float = field(default=0.0)
    target_modules: list[str] | set[str] | str | None = field(default=None)
    exclude_modules: list[str] | set[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    bias: str = field(default="none")
    layers_to_transform: list[int] | int | None = field(default=None)
    layers_pattern: list[str] | str | None = field(default=None)
    fan_in_fan_out: bool = field(default=False)
    rank_pattern: dict[str, int] = field(default_factory=dict)
    k_pattern: dict[str, int] = field(default_factory=dict)
    seed: int | None = field(default=None)
    rasa_k: InitVar[int | None] = None
    rasa_alpha: InitVar[float | None] = None
    rasa_dropout: InitVar[float | None] = None
    rasa_d_init: InitVar[str | None] = None

    def __post_init__(self, rasa_k: Any, rasa_alpha: Any, rasa_dropout: Any, rasa_d_init: Any) -> None:
        super().__post_init__()
        self.peft_type = RASA
        self.k = self.k if rasa_k is None else rasa_k
        self.dropout = self.dropout if rasa_dropout is None else rasa_dropout
        if rasa_d_init is not None:
            self.d_init = "half" if rasa_d_init == "default" else rasa_d_init
        alpha = self.alpha if rasa_alpha is None else rasa_alpha
        budget = RankBudget(self.r, self.k)
        self.r, self.k, self.alpha = budget.rank, budget.shared_rank, 2.0 * budget.rank if alpha is None else alpha
        if not 0 < real_number("alpha", self.alpha) <= _LARGEST:
            raise InputError(f"alpha must be finite and above 0, got {self.alpha}", "alpha")
        fraction("dropout", self.dropout)
        if self.seed is not None and at_least("seed", self.seed, 0) >= 2**63:
            raise InputError(f"seed must be below 2^63, got {self.seed}", "seed")
        one_of("d_init", self.d_init, _D_INITS)
        one_of("bias", self.bias, ("none", "all", "rasa_only"))
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        if self.layers_pattern and self.layers_to_transform is None:
            raise InputError("layers_pattern needs layers_to_transform, the numbers of the layers", "layers_pattern")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise InputError("layers_to_transform needs target_modules as a list, not as a regular expression")

    def budget(self, module: str) -> RankBudget:
        """The ranks r and k of a module, by its name. Raises InputError unless 0 <= k <= r."""
        module = module.replace(COMPILED, "")
        r = self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), module), self.r)
        k = self.k_pattern.get(get_pattern_key(list(self.k_pattern), module), self.k)
        return RankBudget(r, k)

    def mixing(self, budget: RankBudget, R: int) -> torch.Tensor:
        """The initial mixing (q + R,) of a layer with this budget and a pool of R terms, in float64."""
        q, alpha = budget.private_rank, float(self.alpha or 0.0)
        if self.d_init == "keep_scale":
            return torch.full((q + R,), alpha / budget.rank, dtype=torch.float64)
        return initial_mixing(q, R, alpha)

    def to_dict(self) -> dict[str, Any]:
        """The content of adapter_config.json, with the names of the authors' fork of PEFT.

        That fork refuses names which it does not know, so what it does not know is written only where it matters.
        """
        plain = dict(super().to_dict())
        defaults = {f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
                    for f in dataclasses.fields(self)}  # fmt: skip
        for name in _UNKNOWN_TO_THE_AUTHORS:
            if name == "peft_version" or plain[name] == defaults[name]:
                del plain[name]
        for name in ("target_modules", "exclude_modules"):
            if isinstance(plain.get(name), set | list):  # "all-linear" lists the modules of a compiled model
                plain[name] = type(plain[name])(module.replace(COMPILED, "") for module in plain[name])
        return {_IN_FILE.get(name) or name: value for name, value in plain.items()}


def rank_settings(budgets: Mapping[str, RankBudget]) -> dict[str, Any]:
    """The fields `r`, `k`, `rank_pattern` and `k_pattern` that give modules these budgets, by their names.

    r and k are the most common ones. Keys of a pattern are regular expressions that match the end of a name: anchored,
    they match one module.
    """
    counts = Counter(budgets.values())
    common = max(counts, key=lambda budget: (counts[budget], budget.rank, budget.shared_rank))
    others = {
        f"^{re.escape(name.replace(COMPILED, ''))}": budget for name, budget in budgets.items() if budget != common
    }
    return {
        "r": common.rank,
        "k": common.shared_rank,
        "rank_pattern": {key: budget.rank for key, budget in others.items()},
        "k_pattern": {key: budget.shared_rank for key, budget in others.items()},
    }
