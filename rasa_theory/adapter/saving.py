"""Save and load adapters: all parameters in the layout of RaSA's authors, or the same updates as PEFT's LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rasa_theory.adapter.model import Adapter, put
from rasa_theory.adapter.targets import kinds_of
from rasa_theory.adapter.terms import AdapterSettings, Terms
from rasa_theory.common import InputError, writable_folder, write_file
from rasa_theory.formats import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    BaseModel,
    RasaConfig,
    adapter_type,
    in_first_layout,
    lora_config,
    lora_tensors,
    peft_adapter,
    rasa_layout,
    rasa_modules,
    read_json,
    read_tensors,
    safetensors_bytes,
)
from rasa_theory.problem import RankBudget

_FORMATS = ("rasa", "lora-exact-rasa")


def save(adapter: Adapter, folder: str | Path, *, format: str = "rasa", base: str | None = None) -> Path:
    """Write `adapter_model.safetensors` and `adapter_config.json` into a folder.

    **Arguments:**

    - adapter: the adapter to save.
    - folder: the folder, which is made if it does not exist.
    - format: "rasa" is the layout of RaSA's authors with every parameter, from which training can continue.
      "lora-exact-rasa" holds the same updates as LoRA of rank q + R for each kind, for PEFT.
    - base: name of the base model, for the configuration file.

    **Returns:** the folder.

    **Raises:** InputError if the folder cannot be written, or the layout cannot hold this adapter.
    """
    if format not in _FORMATS:
        raise InputError(f"format must be one of {', '.join(_FORMATS)}, got {format!r}")
    out = writable_folder(Path(folder))
    tensors, config = _as_rasa(adapter, base) if format == "rasa" else _as_lora(adapter, base)
    content = safetensors_bytes(tensors, {"format": "pt"})
    write_file(out / WEIGHTS_FILE, lambda f: f.write(content))
    write_file(out / CONFIG_FILE, lambda f: f.write(json.dumps(config, indent=1).encode()))
    return out


def load(model: nn.Module, folder: str | Path, *, name: str = "default") -> Adapter:
    """Put the adapter of a folder into a model and enable it.

    **Arguments:**

    - model: the model, whose dtype the parameters take.
    - folder: a folder in the authors' layout, or of a PEFT LoRA with one rank for all modules.
    - name: name of the adapter in the model.

    **Returns:** the adapter.

    **Raises:** InputError, and leaves the model unchanged, if the folder holds no adapter, its files are not sound, a
    tensor is not the update of a linear layer, or the model does not have its modules.
    """
    path = Path(folder)
    config = read_json(path / CONFIG_FILE)
    kind = adapter_type(config)
    if kind == "RASA":
        return _rasa(model, path, config, name)
    if kind == "LORA":
        return _lora(model, path, name)
    raise InputError(f"{path / CONFIG_FILE}: peft_type is {kind!r}, expected RASA or LORA")


# ---- the authors' layout


def _layout(terms: Terms) -> dict[str, Tensor]:
    """The parameters of one kind, by their keys in the authors' layout."""
    if terms.kind != terms.targets.kind:
        raise InputError(
            f"layers of {terms.targets.kind!r} have several shapes, for which the authors' layout has one pool only; "
            "use lora-exact-rasa"
        )
    return rasa_layout(terms.targets, terms.private_B, terms.private_A, terms.mixing, terms.shared_B, terms.shared_A)


def _as_rasa(adapter: Adapter, base: str | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    budgets = {terms.budget for terms in adapter.terms.values()}
    if len(budgets) > 1:
        raise InputError(
            "the kinds of module have different ranks, which the authors' layout cannot say; use lora-exact-rasa"
        )
    (budget,) = budgets
    dropout = next(iter(adapter.terms.values())).dropout.p
    config = RasaConfig(budget.rank, budget.shared_rank, adapter.alpha, dropout)
    tensors = {key: t for terms in adapter.terms.values() for key, t in _layout(terms).items()}
    return tensors, config.plain(list(adapter.targets), _transposed(adapter), BaseModel(base))


def _rasa(model: nn.Module, path: Path, config: dict[str, Any], name: str) -> Adapter:
    tensors = in_first_layout(read_tensors(path / WEIGHTS_FILE))
    modules = rasa_modules(tensors, path / WEIGHTS_FILE)
    settings = _settings(path / CONFIG_FILE, config)
    kinds: list[Terms] = []
    used: set[str] = set()
    for kind in kinds_of(model, modules):
        kind.check_fits(settings.budget)  # before anything is allocated
        terms = Terms(kind, settings, torch.Generator())
        parameters = _layout(terms)
        _assign(parameters, tensors, path / WEIGHTS_FILE)
        kinds.append(terms)
        used |= parameters.keys()
    if unused := sorted(tensors.keys() - used):
        raise InputError(f"{path / WEIGHTS_FILE}: {unused[0]!r} belongs to none of its modules; save the adapter again")
    return put(model, name, settings.alpha, kinds)


def _settings(file: Path, config: dict[str, Any]) -> AdapterSettings:
    fields = RasaConfig.of(config)
    try:
        return AdapterSettings(RankBudget(fields.rank, fields.shared_rank), fields.alpha, fields.dropout)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


@torch.no_grad()
def _assign(parameters: dict[str, Tensor], tensors: dict[str, Tensor], file: Path) -> None:
    for key, parameter in parameters.items():
        if key not in tensors:
            raise InputError(f"{file} has no tensor {key!r}; the model has other layers, or the file is not whole")
        if parameter.shape != tensors[key].shape:
            stored, expected = tuple(tensors[key].shape), tuple(parameter.shape)
            raise InputError(f"{file}: {key!r} has shape {stored}, the model and {CONFIG_FILE} need {expected}")
        parameter.copy_(tensors[key])


# ---- PEFT's LoRA


def _as_lora(adapter: Adapter, base: str | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for terms in adapter.terms.values():
        lora = terms.factors().as_lora()
        tensors |= lora_tensors(terms.targets, lora)
        ranks |= dict.fromkeys(terms.targets.names, lora.B.shape[2])
    return tensors, lora_config(ranks, _transposed(adapter), BaseModel(base))


@torch.no_grad()
def _lora(model: nn.Module, path: Path, name: str) -> Adapter:
    lora = peft_adapter(path)
    if lora.left_out:
        tensor, reason = lora.left_out[0]
        raise InputError(f"{path}: {tensor!r} would be lost: {reason}; load it with PEFT")
    ranks = {pair.rank for pair in lora.pairs.values()}
    if len(ranks) != 1:
        raise InputError(f"{path}: {'ranks differ over modules' if ranks else 'it has no factors'}; load it with PEFT")
    rank = ranks.pop()
    settings = AdapterSettings(RankBudget(rank, 0), float(rank))

    kinds = []
    for kind in kinds_of(model, lora.pairs):
        terms = Terms(kind, settings, torch.Generator())
        for i, module in enumerate(kind.modules.names):
            B, A = lora.factors(module)
            if (shape := (B.shape[0], A.shape[1])) != terms.shape:
                raise InputError(f"{path}: {module!r} has an update of shape {shape}, in the model {terms.shape}")
            terms.private_B[i].copy_(B)
            terms.private_A[i].copy_(A)
        kinds.append(terms)
    return put(model, name, settings.alpha, kinds)


def _transposed(adapter: Adapter) -> bool:
    return any(terms.targets.transposed for terms in adapter.terms.values())
