"""Folders and files in which the weights are not there, or not whole: the sentence has the true reason."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

import rasa_theory as rt
from rasa_theory.commands import reconstruct
from rasa_theory.sources import open_source
from tests.helpers.problems import noise

TENSORS = {f"layers.{i}.q.weight": torch.as_tensor(noise(1, 6, 5, i)[0]) for i in range(4)}
CONTENT = save(TENSORS)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 1312560\n"


def files(**contents: bytes) -> Callable[[Path], None]:
    """A function that writes these files into a folder; `__` in a name is a slash, `_DOT_` a dot, `_DASH_` a dash."""

    def write(folder: Path) -> None:
        for name, content in contents.items():
            path = folder / name.replace("__", "/").replace("_DOT_", ".").replace("_DASH_", "-")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    return write


def shards(*numbers: int, of: int = 3, index: bool = False) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        names = {i: f"model-{i:05}-of-{of:05}.safetensors" for i in range(1, of + 1)}
        keys = dict(zip(names, TENSORS, strict=False))
        for i in numbers:
            save_file({keys[i]: TENSORS[keys[i]]}, folder / names[i])
        if index:
            weight_map = {keys[i]: name for i, name in names.items()}
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return write


FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "only pytorch_model.bin": (
        files(pytorch_model_DOT_bin=b"x", config_DOT_json=b"{}"),
        "pytorch_model.bin is a pickle, which is never opened: convert it to safetensors",
    ),
    "the state of a training beside it": (
        files(optimizer_DOT_pt=b"x", pytorch_model_DOT_bin=b"x", rng_state_DOT_pth=b"x", scheduler_DOT_pt=b"x"),
        "pytorch_model.bin is a pickle",
    ),
    "the state of a training alone": (
        files(optimizer_DOT_pt=b"x", training_args_DOT_bin=b"x"),
        "optimizer.pt is the state of a training, not weights",
    ),
    "an unfinished download": (
        files(model_DOT_safetensors_DOT_incomplete=CONTENT[:90]),
        "model.safetensors.incomplete is a download that was not finished: resume it",
    ),
    "a part of a browser": (files(model_DOT_safetensors_DOT_crdownload=b"x"), "a download that was not finished"),
    "GGUF": (files(model_DASH_Q4_K_M_DOT_gguf=b"GGUF"), "model-Q4_K_M.gguf is of llama.cpp, and mostly quantised"),
    "a distributed checkpoint": (
        files(_DOT_metadata=b"x", **{"shard_0_DOT_distcp": b"x"}),
        "shard_0.distcp is a shard of torch's distributed checkpoints",
    ),
    "DeepSpeed": (
        files(global_step500__mp_rank_00_model_states_DOT_pt=b"x", latest=b"global_step500"),
        "global_step500 is DeepSpeed's: run zero_to_fp32.py",
    ),
    "a pipeline": (
        files(unet__x_DOT_safetensors=CONTENT, text_encoder__x_DOT_safetensors=CONTENT, model_index_DOT_json=b"{}"),
        "its folders text_encoder, unet have some: give one of them",
    ),
    "the folder of a Trainer": (
        files(checkpoint_DASH_500__model_DOT_safetensors=CONTENT),
        "its folders checkpoint-500 have some",
    ),
    "nothing": (files(), "the directory has no .safetensors file"),
    "git-lfs": (
        files(model_DOT_safetensors=POINTER),
        "it is a pointer of git-lfs that stands for the weights: run git lfs",
    ),
    "empty": (files(model_DOT_safetensors=b""), "not a sound safetensors file (it is empty)"),
    "a web page": (files(model_DOT_safetensors=b"<!DOCTYPE html><html>Access denied</html>"), "it is a web page"),
    "cut off in the data": (
        files(model_DOT_safetensors=CONTENT[:-8]),
        f"it ends after {len(CONTENT) - 8} of {len(CONTENT)} bytes: it was cut off",
    ),
    "cut off in the header": (
        files(model_DOT_safetensors=CONTENT[:40]),
        "it ends after 40 bytes, within its header of",
    ),
    "cut off at once": (files(model_DOT_safetensors=CONTENT[:5]), "it ends after 5 bytes"),
    "a shard is a pointer": (files(a_DOT_safetensors=CONTENT, b_DOT_safetensors=POINTER), "b.safetensors: not a sound"),
    "shards missing, no index": (shards(1, 3), "model-00002-of-00003.safetensors not there; download the rest"),
    "shards missing": (shards(1, index=True), "'model-00002-of-00003.safetensors' is missing; 'model-00003-of"),
    "an adapter as a pickle": (
        files(adapter_config_DOT_json=b'{"peft_type": "LORA"}', adapter_model_DOT_bin=b"x"),
        "no adapter_model.safetensors, only a pickle, which is never opened",
    ),
    "an adapter's pointer": (
        files(adapter_config_DOT_json=b'{"peft_type": "LORA"}', adapter_model_DOT_safetensors=POINTER),
        "it is a pointer of git-lfs",
    ),
    "a configuration's pointer": (
        files(adapter_config_DOT_json=POINTER, adapter_model_DOT_safetensors=CONTENT),
        "adapter_config.json: not a sound file with one JSON object",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_the_reason_is_the_true_one(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write, sentence = FOLDERS[case]
    write(tmp_path)
    assert reconstruct.main(["--source", str(tmp_path), "--rank", "1", "--out", "none"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert str(tmp_path) in err
    assert sentence in err


@pytest.mark.parametrize("beside", ["optimizer.pt", "pytorch_model.bin", "training_args.bin", "x.incomplete", "x.gguf"])
def test_what_stands_beside_the_weights_does_not_matter(beside: str, tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / beside).write_bytes(b"x")
    assert [s.name for s in open_source(str(tmp_path)).stacks] == ["layers.*.q.weight"]


def test_a_folder_of_a_hubs_cache_points_to_its_snapshots(tmp_path: Path) -> None:
    folder = tmp_path / "models--org--name"
    (folder / "blobs").mkdir(parents=True)
    with pytest.raises(
        rt.InputError, match=r"a hub's cache: .* in snapshots/, which is not there: download the model ag"
    ):
        open_source(str(folder))
    snapshot = folder / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    with pytest.raises(rt.InputError, match=r"give the folder of one revision in snapshots/\Z"):
        open_source(str(folder))
    save_file(TENSORS, folder / "blobs" / "blob")
    os.symlink("../../blobs/blob", snapshot / "model.safetensors")
    assert len(open_source(str(snapshot)).stacks) == 1


def test_all_shards_without_an_index_are_read(tmp_path: Path) -> None:
    shards(1, 2, 3)(tmp_path)
    assert open_source(str(tmp_path)).stacks[0].layers == 3


def test_a_gguf_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(rt.InputError, match=r"x\.gguf: GGUF is of llama.cpp, and mostly quantised; take the model"):
        open_source(str(tmp_path / "x.gguf"))
