"""Pairs of models as transformers saves them: every parameter is found under its name in the model, with its update."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from rasa_theory.formats import Role
from rasa_theory.sources import Catalogue, open_source
from tests.helpers.families import FAMILIES, OTHERS, changed_pair, transformers

Truth = dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=FAMILIES | OTHERS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Truth, Catalogue]:
    """The model, the change of every parameter by its name in the model, and the catalogue of the pair on the disk."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = (FAMILIES | OTHERS)[request.param]().float().eval()
    before, after = changed_pair(model, folder)
    shared = {name for name, _ in model.named_parameters()}  # of tied parameters only the first name
    truth = {name: after[name] - before[name] for name in shared}
    return model, truth, open_source(base=str(folder / "base"), tuned=str(folder / "tuned"), alone=True)


def test_every_update_is_that_of_the_parameter_of_this_name(family: tuple[Any, Truth, Catalogue]) -> None:
    _, truth, catalogue = family
    for source in catalogue.stacks:
        values = source.load(torch.float64, None).values
        if len(source.keys) < source.layers:
            expected = truth[source.keys[0]].mT if source.transposed else truth[source.keys[0]]
        else:
            expected = torch.stack([truth[key].mT if source.transposed else truth[key] for key in source.keys])
        assert torch.allclose(values, expected, atol=1e-6), source.name


def test_nothing_is_lost(family: tuple[Any, Truth, Catalogue]) -> None:
    """Every parameter is in a stack or is left out with its reason; squared norms add up to the whole difference."""
    _, truth, catalogue = family
    stacked = {key for source in catalogue.stacks for key in source.keys}
    left_out = {one.name for one in catalogue.left_out}
    assert stacked.isdisjoint(left_out)
    assert truth.keys() <= stacked | left_out
    norms = [one for source in catalogue.stacks for one in catalogue.norms(source) or ()]
    total = math.fsum(one.update for one in [*norms, *catalogue.norms_left_out().values()])
    assert total == pytest.approx(sum(float((change**2).sum()) for change in truth.values()), rel=1e-4)


def test_stacks_are_of_linear_maps_that_the_class_calls(family: tuple[Any, Truth, Catalogue]) -> None:
    """Every Linear and Conv1D, by the classes of the modules, is in a stack; beside them are fused experts alone."""
    model, truth, catalogue = family
    modules = dict(model.named_modules())
    kinds = (nn.Linear, transformers.pytorch_utils.Conv1D)
    inside = {f"{n}.out_proj" for n, m in modules.items() if isinstance(m, nn.MultiheadAttention)}
    inside |= {name for name, module in modules.items() if type(module).__name__ == "Llama4Router"}  # returns a pair
    linear = {f"{name}.weight" for name, module in modules.items() if isinstance(module, kinds) and name not in inside}
    matrices = {key for s in catalogue.stacks if s.place.role in (Role.LINEAR, Role.CONV1D) for key in s.keys}
    assert matrices == linear & truth.keys()
    for source in catalogue.stacks:
        if source.place.role not in (Role.LINEAR, Role.CONV1D):
            assert source.place.role.is_experts
            assert truth[source.keys[0]].ndim == 3
        assert source.place.decided_by == f"by the model class {type(model).__name__}"
