"""A toy model of three blocks, and adapters in it, for tests against formulas written out."""

from __future__ import annotations

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from rasa_theory.peft import RasaConfig, RasaLayer, RasaModel

KINDS = ["up", "down"]
BUDGETS = [(4, 0), (4, 1), (4, 2), (4, 4)]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Toy(nn.Module):
    """Three blocks of two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block(x)
        return self.norm(x)


def toy(dtype: torch.dtype = torch.float64) -> Toy:
    torch.manual_seed(0)
    return Toy().to(dtype)


def shaped(**layers: nn.Module) -> Toy:
    """The toy with other modules in its second block."""
    model = toy()
    for name, layer in layers.items():
        setattr(model.layers[1], name, layer)
    return model


def data(dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def config(r: int = 4, k: int = 2, targets: list[str] | str | None = None, **more: object) -> RasaConfig:
    return RasaConfig(r=r, k=k, target_modules=targets or KINDS, **{"seed": 0} | more)


def adapted(r: int = 4, k: int = 2, targets: list[str] | str | None = None, *, dtype: torch.dtype = torch.float64,
            model: nn.Module | None = None, **more: object) -> PeftModel:  # fmt: skip
    """The toy with an adapter that is not trained."""
    return get_peft_model(toy(dtype) if model is None else model, config(r, k, targets, **more))


def tuner(model: PeftModel) -> RasaModel:
    return model.base_model


def parameters(model: PeftModel, adapter: str = "default") -> dict[str, nn.Parameter]:
    return tuner(model).parameters_of(adapter)


def layers(model: PeftModel, adapter: str = "default") -> dict[str, RasaLayer]:
    return {name: tuner(model).layer(name) for pool in tuner(model).pools(adapter) for name in pool.modules}


def perturbed(model: PeftModel, adapter: str = "default", seed: int = 2) -> PeftModel:
    """Every parameter of an adapter moved away from its start, so that nothing is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters(model, adapter).values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
    return model


def trained(model: nn.Module, steps: int) -> list[float]:
    """Losses of some steps of AdamW on all parameters that require gradients."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    dtype, losses = next(model.parameters()).dtype, []
    for _ in range(steps):
        loss = (model(data(dtype)) - data(dtype, seed=7)).float().square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def literal_update(layer: RasaLayer, adapter: str = "default") -> Tensor:
    """[B~_i, B_S] diag(d_i) [A~_i; A_S] as the paper writes it, dense, from the parameters themselves."""
    d, pool = layer.rasa_mixing[adapter].double(), layer.shared_of(adapter)
    update, q = torch.zeros((), dtype=torch.float64), 0
    if adapter in layer.rasa_private_A:
        Bt, At = layer.rasa_private_B[adapter].double(), layer.rasa_private_A[adapter].double()
        q = len(At)
        update = Bt @ torch.diag(d[:q]) @ At
    if pool is not None:
        update = update + pool[0].double() @ torch.diag(d[q:]) @ pool[1].double()
    return update
