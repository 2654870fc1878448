"""Training as people do it: Trainer with saving, resuming and the best model; two processes; sharded saving."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from rasa_theory.distributed import Processes
from rasa_theory.peft import RasaConfig
from tests.helpers.processes import Pool
from tests.helpers.tiny_models import TINY, VOCABULARY, tiny
from tests.peft.toy import adapted, data, parameters, perturbed, toy


def examples() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, VOCABULARY, (24, 8), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


def trainer(model: PeftModel, folder: Path, **settings: object) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, logging_steps=1, report_to="none",
        use_cpu=True, seed=0, disable_tqdm=True, **{"max_steps": 8, "save_steps": 4, "learning_rate": 1e-2} | settings,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=examples(), eval_dataset=examples()[:8])


def llama(**settings: object) -> PeftModel:
    config = RasaConfig(r=4, k=1, target_modules=TINY["llama"].targets, seed=0, task_type="CAUSAL_LM", **settings)
    return get_peft_model(tiny("llama", torch.bfloat16), config)


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.slow
def test_a_resumed_run_equals_an_unbroken_one(tmp_path: Path) -> None:
    whole, again = llama(dropout=0.1), llama(dropout=0.1)
    first = trainer(whole, tmp_path / "whole")
    first.train()
    second = trainer(again, tmp_path / "again")
    second.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-4"))
    for key, parameter in parameters(whole).items():
        assert torch.equal(parameters(again)[key], parameter)
    assert losses(second)[-4:] == losses(first)[-4:]
    checkpoint = tmp_path / "whole/checkpoint-8"
    assert (checkpoint / "adapter_model.safetensors").is_file()
    assert not (checkpoint / "model.safetensors").exists()
    reloaded = PeftModel.from_pretrained(tiny("llama", torch.bfloat16), str(checkpoint))
    assert torch.equal(TINY["llama"].answer(reloaded), TINY["llama"].answer(whole.eval()))


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    model = llama()
    run = trainer(model, tmp_path, eval_strategy="steps", eval_steps=2, save_steps=2, load_best_model_at_end=True,
                  max_steps=6, learning_rate=0.3)  # fmt: skip
    run.train()
    best = Path(run.state.best_model_checkpoint)
    reloaded = PeftModel.from_pretrained(tiny("llama", torch.bfloat16), str(best))
    for key, parameter in parameters(reloaded).items():
        assert torch.equal(parameters(model)[key], parameter)


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_trainer_changes_no_loss(reentrant: bool, tmp_path: Path) -> None:
    runs = []
    for checkpointed in (False, True):
        run = trainer(llama(), tmp_path / str(checkpointed), max_steps=3, gradient_checkpointing=checkpointed,
                      gradient_checkpointing_kwargs={"use_reentrant": reentrant})  # fmt: skip
        run.train()
        runs.append(losses(run))
    assert runs[0] == pytest.approx(runs[1], rel=1e-3)


def test_a_trained_adapter_is_merged_saved_and_loaded_by_transformers(tmp_path: Path) -> None:
    model = perturbed(llama())
    expected = TINY["llama"].answer(model.eval())
    model.merge_and_unload().save_pretrained(str(tmp_path))
    plain = AutoModelForCausalLM.from_pretrained(str(tmp_path), dtype=torch.bfloat16)
    torch.testing.assert_close(TINY["llama"].answer(plain), expected, rtol=0, atol=0.05)


# ---- several processes


@pytest.fixture(scope="module")
def two() -> Iterator[Pool]:
    pool = Pool(2)
    yield pool
    pool.close()


def _ddp(_: Processes, folder: Path) -> None:
    rank = torch.distributed.get_rank()
    model = adapted(seed=rank)  # DDP sends process 0's parameters to all
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        (wrapped(data(seed=rank)) - data(seed=7)).square().mean().backward()
        optimiser.step()
    model.save_pretrained(str(folder), is_main_process=rank == 0)
    torch.distributed.barrier()


@pytest.mark.slow
def test_two_processes_train_one_adapter(two: Pool, tmp_path: Path) -> None:
    two.run(2, _ddp, tmp_path)
    model = adapted(seed=0)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        parts = [(model(data(seed=rank)) - data(seed=7)).square().mean() for rank in range(2)]
        (sum(parts) / 2).backward()
        optimiser.step()
    again = PeftModel.from_pretrained(toy(), str(tmp_path))
    for key, parameter in parameters(model).items():
        torch.testing.assert_close(parameters(again)[key], parameter, rtol=1e-10, atol=1e-12)


class Checkpointed(nn.Module):
    """The blocks of an adapted toy, computed again in the backward pass."""

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.model.base_model.model.layers:
            x = checkpoint(block, x, use_reentrant=False)
        return x


def _checkpointed(_: Processes) -> None:
    plain, again = perturbed(adapted()), perturbed(adapted())
    x = data(seed=torch.distributed.get_rank())
    wrapped = nn.parallel.DistributedDataParallel(Checkpointed(again))
    wrapped(x).square().sum().backward()
    parts = [data(seed=rank) for rank in range(2)]
    for block in plain.base_model.model.layers:
        parts = [block(part) for part in parts]
    (sum(part.square().sum() for part in parts) / 2).backward()
    for key, parameter in parameters(plain).items():
        torch.testing.assert_close(parameters(again)[key].grad, parameter.grad)


@pytest.mark.slow
def test_two_processes_with_gradient_checkpointing(two: Pool) -> None:
    two.run(2, _checkpointed)


def _fsdp(_: Processes, folder: Path) -> None:
    rank = torch.distributed.get_rank()
    model = perturbed(adapted())
    expected = model(data())
    for block in model.base_model.model.layers:
        fully_shard(block)
    fully_shard(model)
    result = model(data())
    torch.testing.assert_close(result, expected)
    (result - data(seed=7)).square().mean().backward()
    model.save_pretrained(str(folder / "sharded"), is_main_process=rank == 0)
    whole = get_model_state_dict(model)
    assert any("pool_A" in key for key in whole)
    torch.distributed.barrier()


@pytest.mark.slow
def test_a_sharded_adapter_is_saved_whole(two: Pool, tmp_path: Path) -> None:
    two.run(2, _fsdp, tmp_path)
    again = PeftModel.from_pretrained(toy(), str(tmp_path / "sharded"))
    model = perturbed(adapted())
    for key, parameter in parameters(model).items():
        assert torch.equal(parameters(again)[key], parameter)
