"""The adapter layouts of RaSA's authors: keys, tensors and configuration, written and read.

Every module has B~_i (b, q), A~_i (q, a) and a mixing (q + R,), first of the private terms, then of the pool. The pool
of its kind is B_S (b, R), A_S (R, a). At scaling 1 the module adds, for an input x,
[rasa_B | shared_B] (mixing * ([rasa_A; shared_A] x)).

Their first fork of PEFT (zwhe99/RaSA) calls these tensors as above. Their second (zwhe99/peft) calls them
rasa_private_B, rasa_private_A and rasa_private_D, and is otherwise the same. `first_layout` gives the keys of both, and
of checkpoints with the name of the adapter in them, those of the first.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from rasa_theory.common import InputError
from rasa_theory.formats.base_model import BaseModel
from rasa_theory.formats.checkpoint import Checkpoint
from rasa_theory.formats.names import PEFT_PREFIX, ModuleNames, layer_span
from rasa_theory.formats.orientation import adapted_conv1d
from rasa_theory.formats.stored_adapter import FactorPair, StoredAdapter, Term, wide
from rasa_theory.formats.tensors import Entry, Exclusion, LeftOut, is_floating
from rasa_theory.formats.wrappers import COMPILED
from rasa_theory.problem import RankBudget, RasaFactors

_SPELLINGS = {
    "mixing": {"A": "rasa_A", "B": "rasa_B", "mixing": "rasa_mixing"},
    "private": {"A": "rasa_private_A", "B": "rasa_private_B", "mixing": "rasa_private_D"},
}
LAYOUTS = tuple(_SPELLINGS)
"""The names of the two layouts, each by the component that only it has."""

_PRIVATE_A = re.compile(rf"{re.escape(PEFT_PREFIX)}(.+)\.rasa_A\.weight")
_OF_MODULE = re.compile(r"(?P<module>.+)\.rasa_(?:private_)?(?P<part>A|B|D|mixing)(?:\.[^.]+)?\.weight")
_OF_POOL = re.compile(r"(?P<at>.+\.)?rasa_shared_(?P<side>[AB])(?:\.[^.]+)?\.(?P<kind>[^.]+)\.weight")
_ROOTS = ("", "base_model.", PEFT_PREFIX)  # where the pools are; elsewhere are copies, one in every layer
_LOADABLE = re.compile(r"(?:\A|\.)layers\.[0-9]+\.")

RESERVED = frozenset(dir(nn.ModuleDict())) | frozenset(dir(nn.ParameterDict()))
"""Names that no part of a ModuleDict or ParameterDict can have, since its attributes have them."""

MODULE_PARTS = {"A": "rasa_private_A", "B": "rasa_private_B", "mixing": "rasa_mixing"}
"""The names of a module's parameters in a model, by the part in a key of the file."""


# ---- keys


def module_key(module: str, part: str, layout: str = LAYOUTS[0]) -> str:
    """The key of a tensor of one module; `part` is A, B or mixing."""
    return f"{PEFT_PREFIX}{module}.{_SPELLINGS[layout][part]}.weight"


def pool_key(pool: str, side: str) -> str:
    """The key of one side of a pool, A or B. It holds the name of the pool, with dots written as `__`."""
    return f"base_model.rasa_shared_{side}.{pool.replace('.', '__')}.weight"


def module_parameter(module: str, part: str, adapter: str) -> str:
    """The name of a parameter of one module in a `PeftModel`; `part` is A, B or mixing."""
    return f"{PEFT_PREFIX}{module}.{MODULE_PARTS[part]}.{adapter}"


def pool_attribute(pool: str) -> str:
    """The name of a pool among the parameters of an adapter: without dots, and none that torch keeps to itself."""
    attribute = pool.replace(".", "__")
    return f"{attribute}_" if attribute in RESERVED else attribute


def pool_parameter(pool: str, side: str, adapter: str) -> str:
    """The name of one side of a pool, A or B, in a `PeftModel`."""
    return f"base_model.rasa_pool_{side}.{adapter}.{pool_attribute(pool)}"


def key_of_parameter(parameter: str, adapter: str) -> str | None:
    """The key in a file of a parameter with such a name; None if the name is of neither form.

    A name may hold `_orig_mod.`, which torch.compile puts there; a key does not.
    """
    name = re.escape(adapter)
    if match := re.fullmatch(rf"base_model\.rasa_pool_([AB])\.{name}\.(.+)", parameter):
        pool = match[2].removesuffix("_") if match[2].removesuffix("_") in RESERVED else match[2]
        return pool_key(pool, match[1])
    for part, attribute in MODULE_PARTS.items():
        if match := re.fullmatch(rf"{re.escape(PEFT_PREFIX)}(.+)\.{attribute}\.{name}", parameter):
            return module_key(match[1].replace(COMPILED, ""), part)
    return None


def pools_of(shapes: Mapping[str, tuple[int, int]]) -> dict[str, list[str]]:
    """Group modules into pools: one for each kind of module, tower and shape.

    The kind is the part of a name after the layer's number, and the tower the part before it: `encoder.block` and
    `decoder.block` of a T5 are two towers. A pool is named after its kind. If several pools are of one kind, the tower
    stands before it; if several are of one kind and tower, the shape (b x a) stands after it.

    Arguments:
        shapes: the shape (b, a) of the update of each module, by the module's name, in the order of the model.

    Returns:
        The modules of each pool by the pool's name, in the order of the model.
    """
    by_kind: dict[str, dict[str, dict[tuple[int, int], list[str]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for name, shape in shapes.items():
        plain = name.replace(COMPILED, "")
        by_kind[ModuleNames((plain,)).kind][_tower(plain)][shape].append(name)
    pools = {}
    for kind, by_tower in by_kind.items():
        for tower, by_shape in by_tower.items():
            stem = f"{tower}.{kind}" if len(by_tower) > 1 else kind
            for (b, a), names in by_shape.items():
                pools[f"{stem}.{b}x{a}" if len(by_shape) > 1 else stem] = names
    return pools


def _tower(name: str) -> str:
    span = layer_span(name)
    return "" if span is None else name[: span[0] - 1]


# ---- tensors


def rasa_layout(
    modules: ModuleNames,
    private_B: Iterable[Tensor],
    private_A: Iterable[Tensor],
    mixing: Iterable[Tensor],
    shared_B: Tensor,
    shared_A: Tensor,
    layout: str = LAYOUTS[0],
) -> dict[str, Tensor]:
    """The tensors by key, not copied: B~_i, A~_i and the mixing (q + R,) of each module, and the sides of the pool."""
    tensors = {pool_key(modules.kind, "A"): shared_A, pool_key(modules.kind, "B"): shared_B}
    for name, Bt, At, d in zip(modules.names, private_B, private_A, mixing, strict=True):
        tensors[module_key(name, "A", layout)] = At
        tensors[module_key(name, "B", layout)] = Bt
        tensors[module_key(name, "mixing", layout)] = d
    return tensors


def rasa_tensors(
    modules: ModuleNames, factors: RasaFactors, layout: str = LAYOUTS[0], budget: RankBudget | None = None
) -> dict[str, Tensor]:
    """The adapter of these updates: `evened` factors, with the mixing 1 for private terms.

    Factors of matrices narrower than `budget` are padded with zeros to its ranks, as the one configuration says them.
    """
    even = factors.evened()
    L, (q, R) = even.layers, (even.private_A.shape[1], even.shared_A.shape[0])
    private, pool = (0, 0) if budget is None else (budget.private_rank - q, budget.pool_rank(L) - R)
    mixing = torch.cat([even.mixing.new_ones(L, q + private), pad(even.mixing, (0, pool))], 1)
    return rasa_layout(
        modules,
        pad(even.private_B, (0, private)),
        pad(even.private_A, (0, 0, 0, private)),
        mixing,
        pad(even.shared_B, (0, pool)),
        pad(even.shared_A, (0, 0, 0, pool)),
        layout,
    )


def rasa_factors(modules: ModuleNames, tensors: Mapping[str, Tensor]) -> RasaFactors:
    """The factors of an adapter in either layout, in float64; the mixing of the private terms goes into B~_i."""
    tensors = in_first_layout(tensors)

    def of_modules(part: str) -> list[Tensor]:
        return [tensors[module_key(name, part)].double() for name in modules.names]

    At, Bt, mixing = of_modules("A"), of_modules("B"), of_modules("mixing")
    q = At[0].shape[0]
    return RasaFactors(
        private_B=torch.stack([B * d[:q] for B, d in zip(Bt, mixing, strict=True)]),
        private_A=torch.stack(At),
        shared_B=tensors[pool_key(modules.kind, "B")].double(),
        shared_A=tensors[pool_key(modules.kind, "A")].double(),
        mixing=torch.stack([d[q:] for d in mixing]),
    )


def rasa_modules(tensors: Iterable[str], file: Path) -> list[str]:
    """The modules of an adapter, from its keys. Raises InputError, naming `file`, if there is none."""
    modules = [match[1] for key in tensors if (match := _PRIVATE_A.fullmatch(key))]
    if not modules:
        raise InputError(f"{file}: no tensor is called {module_key('<module>', 'A')}")
    return modules


def not_loadable(modules: Iterable[str]) -> list[str]:
    """The modules that the authors' forks cannot load: they take the number after `layers.`, and nothing else."""
    return [module for module in modules if not _LOADABLE.search(module)]


def first_layout(keys: Iterable[str]) -> dict[str, str]:
    """The keys of the first layout, by the key in a file of either; copies of pools inside layers are left away."""
    first: dict[str, str] = {}
    for key in keys:
        if (match := _OF_POOL.fullmatch(key)) is not None:
            if (match["at"] or "") in _ROOTS:
                first[key] = f"base_model.rasa_shared_{match['side']}.{match['kind']}.weight"
        elif (match := _OF_MODULE.fullmatch(key)) is not None:
            part = "mixing" if match["part"] == "D" else match["part"]
            first[key] = module_key(match["module"].removeprefix(PEFT_PREFIX), part)
        else:
            first[key] = key
    return first


def in_first_layout(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of either layout by the keys of the first."""
    return {first: tensors[key] for key, first in first_layout(tensors).items()}


# ---- an adapter in files


def rasa_adapter(
    path: Path, checkpoint: Checkpoint, files: tuple[Path, ...], fan_in_fan_out: bool = False
) -> StoredAdapter:
    """The updates of an adapter in either layout, as factors of rank q + R; `files` as in StoredAdapter.

    `fan_in_fan_out`: the flag in its configuration, for the orientation of weights as in PEFT's LoRA.
    Raises InputError, naming the file of the tensors, if it holds several adapters, or a factor is missing or has
    another shape than the others of its module.
    """
    file = files[-1]
    key_of: dict[str, str] = {}
    for key, first in first_layout(checkpoint.entries).items():
        if first in key_of:
            raise InputError(f"{file}: {key_of[first]!r} and {key!r} are of two adapters; save each by itself")
        key_of[first] = key
    pairs: dict[str, FactorPair] = {}
    used: set[str] = set()
    modules = rasa_modules(key_of, file)
    transposed = adapted_conv1d(modules, fan_in_fan_out)
    pools = _pools_in(checkpoint, key_of, modules)
    for module in modules:
        keys = [
            *(module_key(module, part) for part in ("B", "A", "mixing")),
            *(pool_key(pools[module], side) for side in "BA"),
        ]
        if missing := [key for key in keys if key not in key_of]:
            raise InputError(f"{file} has no tensor {missing[0]!r} beside the others of {module!r}; save it again")
        used.update(keys)
        pairs[module] = _pair(file, [checkpoint.entries[key_of[key]] for key in keys], module in transposed)
    left_out = [
        LeftOut(key_of[first], "a whole tensor beside the factors, not an update", Exclusion.NO_FACTOR)
        for first in key_of
        if first not in used
    ]
    return StoredAdapter(path, checkpoint, pairs, left_out, files)


def _pools_in(checkpoint: Checkpoint, key_of: Mapping[str, str], modules: Sequence[str]) -> dict[str, str]:
    """The name of the pool of each module: as `pools_of` says, or its kind where one pool serves several towers."""

    def size(module: str, part: str, axis: int) -> int:
        entry = checkpoint.entries.get(key_of.get(module_key(module, part), ""))
        return entry.shape[axis] if entry is not None and len(entry.shape) == 2 else 0

    shapes = {module: (size(module, "B", 0), size(module, "A", 1)) for module in modules}
    named = {module: pool for pool, members in pools_of(shapes).items() for module in members}
    return {
        module: pool if pool_key(pool, "B") in key_of else ModuleNames((module,)).kind for module, pool in named.items()
    }


def _pair(file: Path, entries: Sequence[Entry], transposed: bool) -> FactorPair:
    """The update of a module from its B~ (b, q), A~ (q, a), mixing (q + R,), B_S (b, R) and A_S (R, a)."""
    B, A, mixing, B_S, A_S = entries
    for entry in entries:
        if not is_floating(entry.dtype):
            raise InputError(f"{file}: {entry.name!r} is {entry.dtype}, which cannot be computed with; save it again")
    axes = [len(entry.shape) for entry in entries]
    if axes == [2, 2, 1, 2, 2]:
        (b, q), (R, a) = B.shape, A_S.shape
        if [A.shape, mixing.shape, B_S.shape] == [(q, a), (q + R,), (b, R)]:
            terms = Term(B.name, A.name, mixing.name), Term(B_S.name, A_S.name, mixing.name, q)
            return FactorPair(terms, (b, a), q + R, 1.0, wide(*entries), transposed)
    shapes = ", ".join(f"{entry.name!r} {entry.shape}" for entry in entries)
    raise InputError(f"{file}: the factors of one module do not fit each other: {shapes}; save the adapter again")


# ---- the configuration


@dataclass(frozen=True)
class RasaConfig:
    """The fields of the adapter_config.json of the authors' fork of PEFT that decide about the updates.

    `alpha` enters only the initial mixing; the scaling of a stored adapter is 1.
    """

    rank: int
    shared_rank: int
    alpha: float = 1
    dropout: float = 0.0

    def plain(self, modules: Sequence[str], transposed: bool, base: BaseModel) -> dict[str, Any]:
        """The whole file for these modules of the base model `base`; `transposed`: their weights are (in, out)."""
        return {
            "peft_type": "RASA",
            **base.fields(),
            "inference_mode": True,
            "r": self.rank,
            "rasa_k": self.shared_rank,
            "rasa_alpha": self.alpha,
            "rasa_dropout": self.dropout,
            "target_modules": list(modules),
            "fan_in_fan_out": transposed,
            "bias": "none",
        }
