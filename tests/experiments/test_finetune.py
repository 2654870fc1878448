"""Runs of a few steps on tiny random models, in place of the ones that are fine-tuned: BERT as MiniLM, and MPNet."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import astuple, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, MPNetConfig, MPNetModel

import rasa_theory as rt
from experiments import finetune as experiment
from experiments.models.data import Pair, split_by_module, standard_library_pairs
from experiments.models.encoder import Encoder
from experiments.models.pretrained import MODELS, Pretrained
from experiments.models.snapshot import Snapshot
from experiments.models.wheels import InFolder
from rasa_theory.formats import Checkpoint

SIZES = {
    "vocab_size": 256, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip
SETTINGS = replace(experiment.Settings(), train_pairs=40, test_pairs=20, steps=4, batch=4, warmup=1)
KINDS = {"query", "key", "value", "attention_output", "intermediate", "output"}


def letters(texts: list[str], max_length: int, **_: object) -> dict[str, torch.Tensor]:
    """A tokenizer of single bytes."""
    codes = [list(text.encode()[:max_length]) for text in texts]
    width = max(map(len, codes))
    ids = torch.tensor([code + [0] * (width - len(code)) for code in codes])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def tiny() -> Encoder:
    torch.manual_seed(0)
    return Encoder(BertModel(BertConfig(**SIZES), add_pooling_layer=False), letters)


def tiny_mpnet() -> Encoder:
    torch.manual_seed(0)
    return Encoder(MPNetModel(MPNetConfig(**SIZES), add_pooling_layer=False), letters)


TINY = {"minilm": tiny, "mpnet": tiny_mpnet}


@cache
def collected() -> tuple[Pair, ...]:
    return tuple(standard_library_pairs())


def pairs() -> tuple[list[Pair], list[Pair]]:
    return split_by_module(list(collected()), SETTINGS.split)


def shipped(model: str, kinds: int) -> int:
    """Bytes of some kinds of square matrices of the real model, in half precision."""
    layers, width = {"minilm": (6, 384), "mpnet": (12, 768)}[model]
    return 2 * kinds * layers * width**2


# ---- the table of models


@pytest.mark.parametrize("model", TINY)
def test_the_table_names_every_linear_layer_of_the_encoder(model: str) -> None:
    encoder = TINY[model]().model
    linear = {f"{n}.weight" for n, m in encoder.named_modules() if isinstance(m, torch.nn.Linear)}
    kinds = MODELS[model].kinds
    assert linear == {name.format(i) for name in kinds.values() for i in range(2)}
    assert kinds.keys() == KINDS
    wide = {kind: tuple(MODELS[model].weights(encoder.state_dict(), kind).shape) for kind in kinds}
    assert wide.pop("intermediate") == (2, 32, 16)
    assert wide.pop("output") == (2, 16, 32)
    assert set(wide.values()) == {(2, 16, 16)}


@pytest.mark.parametrize("model", TINY)
def test_the_shipped_kinds_are_square_and_at_most_30_mb(model: str) -> None:
    kinds = MODELS[model].shipped
    assert set(kinds) <= KINDS - {"intermediate", "output"}
    assert shipped(model, len(kinds)) <= 30e6


# ---- training


@pytest.mark.parametrize("model", TINY)
def test_two_steps_change_every_kind_in_every_layer(model: str) -> None:
    train, test = pairs()
    assert (len(train), len(test)) == (40, 20)
    assert {pair.module for pair in train}.isdisjoint(pair.module for pair in test)
    base = TINY[model]()
    tuned = base.clone()
    assert len(experiment.finetune(tuned, train, replace(SETTINGS, steps=2), seed=0)) == 2
    deltas = experiment.updates(MODELS[model], base.model, tuned.model)
    before, after = base.model.state_dict(), tuned.model.state_dict()
    for kind, name in MODELS[model].kinds.items():
        for i in range(2):
            expected = after[name.format(i)].numpy() - before[name.format(i)].numpy()
            assert np.array_equal(deltas[kind][i].numpy(), expected)
            assert np.linalg.norm(expected) > 0
    assert 1 / 20 <= experiment.retrieval(tuned, test, SETTINGS)["mrr"] <= 1
    found = experiment.update_statistics(MODELS[model], base.model, deltas)
    for kind, delta in deltas.items():
        for i in range(2):
            weight = before[MODELS[model].kinds[kind].format(i)].numpy()
            sigma = np.linalg.svd(delta[i].numpy().astype(float), compute_uv=False)
            assert found[kind]["relative_norm"][i] == pytest.approx(np.linalg.norm(sigma) / np.linalg.norm(weight))
            assert found[kind]["energy_in_rank_8"][i] == pytest.approx((sigma[:8] ** 2).sum() / (sigma**2).sum())


def test_the_same_seed_gives_the_same_losses() -> None:
    train, _ = pairs()
    first, second, other = (experiment.finetune(tiny(), train, SETTINGS, seed) for seed in (3, 3, 4))
    assert first == second != other


def killed_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, training is killed in the step after so many."""
    step, taken = experiment.train_step, []

    def limited(*arguments: Any) -> float:
        if len(taken) == steps:
            raise KeyboardInterrupt
        taken.append(step(*arguments))
        return taken[-1]

    monkeypatch.setattr(experiment, "train_step", limited)


@pytest.mark.parametrize("model", TINY)
@pytest.mark.parametrize("kills", [(1,), (2, 1), (3,)])
def test_a_killed_run_goes_on_and_ends_with_the_same_numbers(
    model: str, kills: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batches, dropout, the moments of AdamW and the learning rate all have to be where they were."""
    train, _ = pairs()
    whole = TINY[model]()
    assert whole.model.config.hidden_dropout_prob > 0
    losses = experiment.finetune(whole, train, SETTINGS, seed=0)
    for steps in kills:
        with monkeypatch.context() as patch:
            killed_after(steps, patch)
            with pytest.raises(KeyboardInterrupt):
                experiment.finetune(TINY[model](), train, SETTINGS, 0, Snapshot(tmp_path / "x.pt", every=0))
    torch.manual_seed(77)  # whatever was drawn before
    again = TINY[model]()
    assert experiment.finetune(again, train, SETTINGS, 0, Snapshot(tmp_path / "x.pt", every=0)) == losses
    after = again.model.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in whole.model.state_dict().items())


def test_a_snapshot_is_written_no_more_often_than_asked_for_and_its_seconds_add_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("experiments.models.snapshot.time.monotonic", lambda: now[0])
    weight = torch.nn.Linear(2, 2)
    optimiser = torch.optim.AdamW(weight.parameters())
    snapshot = Snapshot(tmp_path / "x.pt", every=60)
    for seconds, count in ((59, 0), (60, 1), (119, 1), (121, 2)):
        now[0] = 100 + seconds
        snapshot.save_if_due(weight, optimiser, [float(seconds)])
        assert len(list(tmp_path.iterdir())) == min(count, 1)
    now[0] = 1000.0
    later = Snapshot(tmp_path / "x.pt", every=60)
    assert later.restore(weight, optimiser) == [121.0]
    now[0] += 7
    assert later.seconds == 121 + 7


def test_a_damaged_snapshot_is_named(tmp_path: Path) -> None:
    train, _ = pairs()
    for content in (b"", b"no snapshot", b"PK\x03\x04 cut off"):
        (tmp_path / "x.pt").write_bytes(content)
        with pytest.raises(rt.InputError, match=r"x.pt cannot be read \(.*\); delete it to begin this run anew"):
            experiment.finetune(tiny(), train, SETTINGS, 0, Snapshot(tmp_path / "x.pt"))


def test_training_that_diverges_stops_with_a_sentence() -> None:
    train, _ = pairs()
    encoder = tiny()
    with torch.no_grad():
        next(encoder.model.parameters()).fill_(float("nan"))
    with pytest.raises(rt.InputError, match="the loss is nan at step 1: give a lower --learning-rate"):
        experiment.finetune(encoder, train, SETTINGS, 0)


# ---- the command


@pytest.fixture(params=["minilm", "mpnet"])
def command(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """The command on a tiny model; it returns the shipped file and its provenance."""
    model: str = request.param
    real = MODELS[model]
    wheels = InFolder("numpy", "numpy")  # a package that is installed
    monkeypatch.setitem(MODELS, model, Pretrained("tiny", wheels, real.kinds, ("query", "output"), SETTINGS))
    monkeypatch.setattr(Encoder, "pretrained", staticmethod(lambda name: TINY[name]()))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "code.json").write_text(json.dumps([astuple(pair) for pair in collected()]), encoding="utf-8")

    def run(*words: str, out: str = "out") -> tuple[Path, dict[str, Any]]:
        folders = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / out), "--data", str(tmp_path / "data")]
        experiment.main(["--model", model, *folders, *words])
        (file,) = (tmp_path / out).glob("*.safetensors")
        assert file.stem == f"{model}_code"
        return file, json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))

    return run


def test_every_seed_has_its_updates_and_one_is_shipped(
    command: Callable[..., tuple[Path, dict[str, Any]]], tmp_path: Path
) -> None:
    file, facts = command("--seeds", "0", "1", "--ship", "1")
    assert facts["shipped_seed"] == 1
    assert [run["seed"] for run in facts["runs"]] == [0, 1]
    assert facts["pairs"] == {"train": 40, "test": 20}
    assert facts["package"].keys() == {"numpy"}
    assert facts["kinds"].keys() == facts["runs"][1]["update"].keys() == {"query", "output"}
    runs = [Checkpoint(folder / "updates.safetensors") for folder in sorted((tmp_path / "runs").iterdir())]
    assert [run.entries.keys() for run in runs] == [KINDS, KINDS]
    disk = Checkpoint(file)
    assert disk.entries.keys() == {"query", "output"}
    for kind in disk.entries:
        assert torch.equal(disk.read(kind), runs[1].read(kind))
        assert not torch.equal(disk.read(kind), runs[0].read(kind))
    base, tuned = TINY[file.stem[:-5]](), TINY[file.stem[:-5]]()
    experiment.finetune(tuned, pairs()[0], SETTINGS, 1)
    for kind, delta in experiment.updates(MODELS[file.stem[:-5]], base.model, tuned.model).items():
        half = np.abs(delta.numpy()) * 2.0**-11 + float(delta.abs().max()) * 2.0**-37
        assert (np.abs(runs[1].read(kind).numpy() - delta.numpy()) <= half).all()


@pytest.mark.slow
def test_a_killed_command_goes_on_and_a_finished_one_trains_no_more(
    command: Callable[..., tuple[Path, dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "Snapshot", lambda path, every: Snapshot(path, 0))
        killed_after(6, patch)  # in the second run
        with pytest.raises(KeyboardInterrupt):
            command()
    assert [path.name for path in (tmp_path / "runs").glob("*/snapshot.pt")] == ["snapshot.pt"]
    file, facts = command()
    assert list((tmp_path / "runs").glob("*/snapshot.pt")) == []
    whole, expected = command("--runs", str(tmp_path / "others"), out="whole")
    assert file.read_bytes() == whole.read_bytes()
    assert [run["update"] for run in facts["runs"]] == [run["update"] for run in expected["runs"]]
    killed_after(0, monkeypatch)
    other, same = command("--kinds", "key", "intermediate", out="other")
    assert [run["after"] for run in same["runs"]] == [run["after"] for run in facts["runs"]]
    assert same["kinds"].keys() == {"key", "intermediate"} == Checkpoint(other).entries.keys()


def test_a_snapshot_of_an_unknown_run_is_not_taken_up(
    command: Callable[..., tuple[Path, dict[str, Any]]], tmp_path: Path
) -> None:
    _, expected = command("--seeds", "0")
    (folder,) = (tmp_path / "runs").iterdir()
    (folder / "run.json").unlink()
    model = folder.name.split("-")[0]
    experiment.finetune(TINY[model](), pairs()[0], SETTINGS, 9, Snapshot(folder / "snapshot.pt", every=0))
    _, facts = command("--seeds", "0")
    assert facts["runs"][0]["last_loss"] == expected["runs"][0]["last_loss"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--steps", "3"], r"holds a run that differs in settings \(steps\); delete it, or name another folder"),
        (["--learning-rate", "1e-3"], r"holds a run that differs in settings \(learning_rate\)"),
        (["--ship", "7"], r"--ship 7 is not one of --seeds \[0, 1\]"),
        (["--kinds", "norm"], "--kinds 'norm' is none of query, key, value, attention_output, intermediate, output"),
        (["--steps", "0"], "--steps and --threads must be at least 1, got 0 and "),
        (["--learning-rate", "0"], "--learning-rate must be positive, got 0"),
        (["--seeds", "2", "3", "2"], r"--seeds \[2, 3, 2\] names a seed twice"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_other_settings_are_refused_in_a_sentence(
    command: Callable[..., tuple[Path, dict[str, Any]]],
    words: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command("--seeds", "0")
    with pytest.raises(SystemExit) as ended:
        command(*words)
    assert ended.value.code == 2
    assert re.search(sentence, capsys.readouterr().err)
