"""Updates in half precision times a power of two: read as the updates themselves, whatever reads them."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rasa_theory.common import InputError
from rasa_theory.formats import Checkpoint, write_halves
from rasa_theory.sources import load, open_source

SIZES = {"tiny": 1e-12, "update": 3e-5, "one": 1.0, "large": 7e8}


def stacks() -> dict[str, np.ndarray]:
    """(3, 6, 5) each, with entries of either sign over six orders of magnitude below their size."""
    rng = np.random.default_rng(3)
    return {name: size * rng.choice([-1, 1], (3, 6, 5)) * 10.0 ** rng.uniform(-6, 0, (3, 6, 5))
            for name, size in SIZES.items()}  # fmt: skip


def test_every_entry_keeps_eleven_bits(tmp_path: Path) -> None:
    values = stacks() | {"zero": np.zeros((3, 6, 5))}
    write_halves({name: torch.as_tensor(M) for name, M in values.items()}, tmp_path / "x.safetensors")
    disk = Checkpoint(tmp_path / "x.safetensors")
    for name, M in values.items():
        read = disk.read(name).numpy()
        assert read.dtype == np.float64
        assert (np.abs(read - M) <= 2.0**-11 * np.abs(M)).all()


def test_the_largest_entry_in_the_file_is_below_two_to_fourteen(tmp_path: Path) -> None:
    write_halves({name: torch.as_tensor(M) for name, M in stacks().items()}, tmp_path / "x.safetensors")
    for half in load_file(tmp_path / "x.safetensors").values():
        assert half.dtype == torch.float16
        assert 2**13 <= float(half.abs().max()) <= 2**14


@pytest.mark.parametrize("how", ["file", "folder", "shards", "in parts"])
def test_a_source_reads_the_updates_however_it_is_named(tmp_path: Path, how: str) -> None:
    values = {name: torch.as_tensor(M) for name, M in stacks().items()}
    if how == "shards":
        for name, M in values.items():
            write_halves({name: M}, tmp_path / f"{name}.safetensors")
    else:
        write_halves(values, tmp_path / "x.safetensors")
    path = tmp_path / "x.safetensors" if how in ("file", "in parts") else tmp_path
    found, left_out = load(str(path), memory=2000 if how == "in parts" else None)
    assert left_out == []
    assert {stack.name for stack in found} == set(SIZES)
    for stack in found:
        assert np.allclose(stack.values.numpy(), values[stack.name].numpy(), rtol=2.0**-11, atol=0)


def test_a_pair_of_them_is_subtracted_without_the_powers(tmp_path: Path) -> None:
    base, tuned = (stacks()["update"] * scale for scale in (1, 300))
    for name, M in (("base", base), ("tuned", tuned)):
        write_halves(
            {f"layers.{i}.w.weight": torch.as_tensor(M[i]) for i in range(3)}, tmp_path / f"{name}.safetensors"
        )
    (source,) = open_source(base=str(tmp_path / "base.safetensors"), tuned=str(tmp_path / "tuned.safetensors")).stacks
    stack = source.load(None, None)
    assert np.allclose(stack.values.numpy(), tuned - base, rtol=0, atol=2.0**-10 * np.abs(tuned).max())


def test_the_bundled_file_is_what_its_updates_are_written_as(tmp_path: Path) -> None:
    file = Path(str(importlib.resources.files("rasa_theory"))) / "data" / "minilm_code.safetensors"
    disk = Checkpoint(file)
    again = tmp_path / "again.safetensors"
    write_halves({name: disk.read(name) for name in disk.entries}, again)
    assert Checkpoint(again).metadata == disk.metadata
    before, after = load_file(file), load_file(again)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    first = again.read_bytes()
    write_halves({name: disk.read(name) for name in disk.entries}, again)
    assert again.read_bytes() == first


@pytest.mark.parametrize("text", ["", "1.5", "ten", "4000", "inf"])
def test_a_scale_that_is_no_number_is_refused(tmp_path: Path, text: str) -> None:
    save_file({"w": torch.ones(2, 3, 3, dtype=torch.float16)}, tmp_path / "x.safetensors", {"w.log2_scale": text})
    with pytest.raises(InputError, match=r"x.safetensors: the scale of 'w' is '.*', no whole number; write the file"):
        load(str(tmp_path / "x.safetensors"))


@pytest.mark.parametrize("entry", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_written(tmp_path: Path, entry: float) -> None:
    with pytest.raises(InputError, match="query: an entry is infinite or NaN"):
        write_halves({"query": torch.full((2, 3, 3), entry)}, tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [1e-300, 1e305])
def test_an_update_beyond_all_scales_is_refused(tmp_path: Path, size: float) -> None:
    with pytest.raises(InputError, match=r"q: the largest entry is 1e.30\d, which no scale of this format reaches"):
        write_halves({"q": torch.full((2, 3), size, dtype=torch.float64)}, tmp_path / "x.safetensors")
