"""safetensors files as they are written: the same tensors, without a second copy in memory."""

import tracemalloc

import pytest
import torch
from safetensors.torch import load_file, save_file

from rasa_theory import InputError
from rasa_theory.formats import join_safetensors, read_header, read_tensors, safetensors_bytes, write_safetensors


def test_joined_files_hold_the_same_tensors(tmp_path):
    parts = []
    for n, dtype in enumerate((torch.float16, torch.float32, torch.bfloat16)):
        parts.append(tmp_path / f"{n}.safetensors")
        save_file({f"t{n}.{m}": torch.randn(3, 5 + m).to(dtype) for m in range(3)}, parts[-1])
    with open(tmp_path / "all.safetensors", "wb") as out:
        join_safetensors(parts, out, {"format": "pt"})
    joined = load_file(tmp_path / "all.safetensors")
    expected = {key: tensor for part in parts for key, tensor in load_file(part).items()}
    assert joined.keys() == expected.keys()
    assert all(torch.equal(joined[key], expected[key]) for key in joined)
    with open(tmp_path / "twice.safetensors", "wb") as out, pytest.raises(InputError, match="two stacks would write"):
        join_safetensors([parts[0], parts[0]], out, {})


def test_a_part_that_is_cut_off_while_it_is_read_is_an_error(tmp_path, monkeypatch):
    part = tmp_path / "part.safetensors"
    save_file({"t": torch.randn(300, 500)}, part)
    header = read_header(part)
    part.write_bytes(part.read_bytes()[:-1000])
    monkeypatch.setattr("rasa_theory.formats.safetensors.read_header", lambda path: header)
    with open(tmp_path / "all.safetensors", "wb") as out, pytest.raises(InputError, match="was cut off while"):
        join_safetensors([part], out, {})


def test_one_task_of_joined_files_loses_its_number(tmp_path):
    tensors = {f"{task}/h.0.q.weight": torch.full((2, 3), float(task)) for task in (0, 1, 11)}
    save_file(tensors, tmp_path / "part.safetensors")
    with open(tmp_path / "one.safetensors", "wb") as out:
        join_safetensors([tmp_path / "part.safetensors"], out, {}, task=1)
    joined = load_file(tmp_path / "one.safetensors")
    assert joined.keys() == {"h.0.q.weight"}
    assert torch.equal(joined["h.0.q.weight"], torch.ones(2, 3))


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.float64, "float64"),
        (torch.float32, "float32"),
        (torch.float16, "float16"),
        (torch.bfloat16, "bfloat16"),
        (torch.float8_e4m3fn, "float8_e4m3"),
        (torch.int64, "i64"),
    ],
)
def test_dtypes_by_their_usual_names(tmp_path, dtype, name):
    save_file({"x": torch.zeros(2, 3).to(dtype)}, tmp_path / "x.safetensors")
    stored = read_header(tmp_path / "x.safetensors").tensors["x"]
    assert (stored.dtype, stored.shape) == (name, (2, 3))


def test_tensors_are_written_one_by_one(tmp_path):
    """Any dtype that is written, turned ones and empty ones; no bytes of all of them beside the tensors."""
    tensors = {
        "turned": torch.randn(3, 5).mT, "half": torch.randn(4, 3).half(), "double": torch.randn(2, 2).double(),
        "none": torch.zeros(4, 0), "column": torch.randn(5, 5)[:1].mT, "one": torch.randn(7, 7).bfloat16()[:1, :1].mT,
        "row": torch.randn(3).bfloat16(),
    }  # fmt: skip
    tensors |= {f"large.{i}": torch.randn(256, 256) for i in range(8)}
    tracemalloc.start()
    try:
        with (tmp_path / "all.safetensors").open("wb") as out:
            write_safetensors(tensors, out, {"format": "pt"})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 256 * 256 * 4
    found = load_file(tmp_path / "all.safetensors")
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor)


def test_small_files_as_bytes_hold_the_same_tensors(tmp_path):
    tensors = {
        "turned": torch.randn(3, 5).mT,
        "half": torch.randn(4, 3).half(),
        "trained": torch.nn.Parameter(torch.ones(2)),
    }
    file = tmp_path / "x.safetensors"
    file.write_bytes(safetensors_bytes(tensors, {"format": "pt"}))
    found = read_tensors(file)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"x.safetensors: not a sound safetensors file \("):
        read_tensors(file)
