"""Adapters of model families through PEFT: its merged weights are those that the report promises, in every module.

The truth is the state dict of the models in float64, before and after, and the state dict that PEFT merges.
"""

from __future__ import annotations

import warnings
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.families import FAMILIES, OTHERS, changed_pair
from tests.helpers.models import report_of, run

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def merged(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """The state dict of the base in float64 with the adapter of `folder` merged into it by PEFT."""
    base = type(model).from_pretrained(folder.parent / "base").double().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = peft.PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False)
    return tuned.merge_and_unload().state_dict()


def tail(M: torch.Tensor, rank: int) -> float:
    """The squared error of the best approximation of this rank, summed over the matrices of a tensor."""
    sigma = np.linalg.svd(M.numpy(), compute_uv=False)
    return float((sigma[..., rank:] ** 2).sum())


@pytest.mark.slow
@pytest.mark.parametrize("family", list(FAMILIES))
def test_peft_makes_of_the_file_what_the_report_says(family: str, tmp_path: Path) -> None:
    """At rank 4 every adapted matrix misses what the best of rank 4 misses, and at full rank nothing.

    All other tensors keep the values of the base, and are listed as left out with their share.
    """
    torch.manual_seed(0)
    model = FAMILIES[family]()
    before, after = changed_pair(model, tmp_path)
    for rank in (4, 64):
        out = tmp_path / f"rank-{rank}"
        assert run(tmp_path, out, "--rank", str(rank)) == 0
        report, weights = report_of(out), merged(model, out)
        errors = {name: row["e_stored"] for row in report["stacks"] for name, row in by_tensor(row).items()}
        missed_of: dict[str, float] = {}
        for name, weight in weights.items():
            missed = float(((weight - after[name]) ** 2).sum())
            if name in errors:
                transposed = isinstance(model.get_submodule(name.rpartition(".")[0]), conv1d())
                M = after[name] - before[name]
                assert missed == pytest.approx(tail(M.mT if transposed else M, rank), rel=1e-4, abs=1e-9), name
                assert missed == pytest.approx(errors[name], rel=1e-3, abs=1e-9), name
            else:
                assert torch.equal(weight, before[name]), name
                if missed > 0 and name in unshared(model):
                    (entry,) = [one["name"] for one in report["left_out"] if fnmatchcase(name, one["name"])]
                    missed_of[entry] = missed_of.get(entry, 0.0) + missed
        norms = {one["name"]: one.get("norm_squared") for one in report["left_out"]}
        for entry, missed in missed_of.items():
            assert norms[entry] == pytest.approx(missed, rel=1e-4), entry


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2-moe", "deepseek-v3"])
def test_modules_beside_fused_experts_may_have_ranks_of_their_own(family: str, tmp_path: Path) -> None:
    """PEFT is told of a shared expert by its weight, and looks for the rank and alpha of that name."""
    torch.manual_seed(0)
    model = (FAMILIES | OTHERS)[family]()
    _, after = changed_pair(model, tmp_path)
    out = tmp_path / "own"
    assert run(tmp_path, out, "--rank", "auto", "--energy", "0.5", "--ranks", "own") == 0
    report, weights = report_of(out), merged(model, out)
    ranks = {name: rank for row in report["stacks"] for name, rank in row["ranks"].items()}
    assert len({rank for name, rank in ranks.items() if "shared_expert" in name}) > 1
    for row in report["stacks"]:
        for name, of_tensor in by_tensor(row).items():
            missed = float(((weights[name] - after[name]) ** 2).sum())
            assert missed == pytest.approx(of_tensor["e_stored"], rel=1e-3), name


def by_tensor(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of the modules of a stack by the name of the tensor; of fused experts, their sum."""
    if row["parameter"] is not None:
        return {row["parameter"]: row}
    return {f"{module['module']}.weight": module for module in row["modules"]}


def conv1d() -> type:
    from transformers.pytorch_utils import Conv1D

    return Conv1D


def unshared(model: Any) -> set[str]:
    """The parameters under the one name that is saved, where several names share one."""
    return {name for name, _ in model.named_parameters()}
