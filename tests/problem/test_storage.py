"""Stacks read from files in parts, or kept as they are stored, beside the same stacks in memory."""

import math
import os
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import rasa_theory as rt
from rasa_theory.problem import Divided, FileRows, InMemory, OnDisk, StackEntries, normalised_layers
from rasa_theory.sources import load, open_source
from tests.helpers.problems import decaying, noise

SHAPE = (64, 12, 10)
LIMIT = 128 * 12 * 10  # bytes: just enough for the work on one layer; the stack takes four times as much


@pytest.fixture
def stack_file(tmp_path: Path) -> Path:
    path = tmp_path / "updates.npy"
    np.save(path, 100 * decaying(*SHAPE))
    return path


def streamed(path: Path | str, dtype: str | None = None, memory: int = LIMIT) -> rt.LayerStack:
    (stack,), _ = load(str(path), dtype=dtype, memory=memory)
    return stack


def assert_same(one: rt.LayerStack, other: rt.LayerStack) -> None:
    """Products, tiles, spectra, norms and passes of two stacks, in every view, to rounding."""
    L = one.layers
    for view in (lambda s: s, lambda s: s.unit(), lambda s: s.transpose(), lambda s: s.unit().transpose()):
        x, y = view(one), view(other)
        b, a = x.shape
        close = {"rtol": 0, "atol": 1e-12 * y.scale * max(b, a)}
        X, Y = torch.as_tensor(noise(L, a, 2)).to(x.dtype), torch.as_tensor(noise(L, b, 2)).to(x.dtype)
        for factor in (X, X[0]):
            torch.testing.assert_close(x.right(factor), y.right(factor), **close)
        for factor in (Y, Y[0]):
            torch.testing.assert_close(x.left(factor), y.left(factor), **close)
        for rows in (None, 1, 5, b):
            for found, expected in zip(x.tiles(rows), y.tiles(rows), strict=True):
                assert found[:2] == expected[:2]
                assert torch.equal(found.values, expected.values)
        assert torch.equal(x.values, y.values)
        assert x.layer_norms_squared == pytest.approx(y.layer_norms_squared, rel=1e-12)
        torch.testing.assert_close(x.spectra.svd().S, y.spectra.svd().S, **close)
        U, S, Vh = x.spectra.svd()
        torch.testing.assert_close((U * S[:, None]) @ Vh, y.values.double(), **close)
        torch.testing.assert_close(x.spectra.gram(), y.spectra.gram(), rtol=1e-12, atol=0)
        assert x.data_passes == y.data_passes


# ---- from files


def test_a_stack_on_disk_computes_what_it_does_in_memory(stack_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for size in ("cached_elements", "tile_elements"):
        monkeypatch.setattr(StackEntries, size, 50)  # several tiles a layer
    assert_same(streamed(stack_file), rt.LayerStack(np.load(stack_file)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("apart", [False, True])
def test_safetensors_on_disk(tmp_path: Path, dtype: torch.dtype, apart: bool) -> None:
    M = torch.as_tensor(noise(*SHAPE)).to(dtype)
    tensors = {f"h.{i}.w": layer.clone() for i, layer in enumerate(M)} if apart else {"w": M}
    save_file(tensors, tmp_path / "u.safetensors")
    stack = streamed(tmp_path / "u.safetensors", "float64", LIMIT)
    assert isinstance(stack.entries.storage, OnDisk)
    assert_same(stack, rt.LayerStack(M, dtype="float64"))


def test_conv1d_weights_on_disk(tmp_path: Path) -> None:
    M = torch.as_tensor(noise(*SHAPE))
    save_file({f"h.{i}.mlp.c_proj.weight": layer.clone() for i, layer in enumerate(M)}, tmp_path / "u.safetensors")
    stack, explicit = streamed(tmp_path / "u.safetensors"), rt.LayerStack(M.mT.contiguous())
    assert isinstance(stack.entries.storage, OnDisk)
    assert stack.shape == (10, 12)
    assert_same(stack, explicit)
    units, norms = normalised_layers(stack)
    expected, expected_norms = normalised_layers(explicit)
    torch.testing.assert_close(units.values, expected.values, rtol=1e-14, atol=0)  # sums of squares in another order
    torch.testing.assert_close(units.spectra.svd().S, expected.spectra.svd().S, rtol=1e-12, atol=1e-13)
    assert norms == pytest.approx(expected_norms, rel=1e-14)


def test_a_pair_on_disk(tmp_path: Path) -> None:
    M, N = (torch.as_tensor(noise(*SHAPE, seed)).bfloat16() for seed in (0, 1))
    for name, values in (("base", M), ("tuned", N)):
        save_file({f"h.{i}.w": layer.clone() for i, layer in enumerate(values)}, tmp_path / f"{name}.safetensors")
    pair = {name: str(tmp_path / f"{name}.safetensors") for name in ("base", "tuned")}
    stack = open_source(**pair, memory=LIMIT).stacks[0].load(torch.float64, None)
    assert isinstance(stack.entries.storage, OnDisk)
    assert torch.equal(stack.values, (N.float() - M.float()).double())


@pytest.mark.parametrize("kind", [">f4", "<f8", "<f2", np.longdouble])
def test_numpy_dtypes_on_disk(tmp_path: Path, kind: str) -> None:
    M = noise(*SHAPE).astype(kind)
    np.save(tmp_path / "u.npy", M)
    stack = streamed(tmp_path / "u.npy", "float64", LIMIT)
    assert isinstance(stack.entries.storage, OnDisk)
    assert np.array_equal(stack.values, M.astype(float))


@pytest.mark.parametrize("start", ["allocation", pytest.param("best", marks=pytest.mark.slow)])
def test_reads_are_in_order_and_none_exceeds_the_limit(
    start: str, stack_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[tuple[int, int]] = []
    read = FileRows.read

    def counted(rows: FileRows, start: int, stop: int) -> torch.Tensor:
        reads.append((start, stop))
        return read(rows, start, stop)

    monkeypatch.setattr(FileRows, "read", counted)
    stack, budget = streamed(stack_file), rt.RankBudget(2, 1)
    assert stack.values.nbytes >= 4 * LIMIT
    reads.clear()
    before = stack.passes.total
    rt.solve_lora(stack, 2)
    rt.allocation_bound(stack, budget)
    rt.lower_bound(stack, budget)
    rt.solve_rasa(stack, budget, rt.SolverOptions(start, max_sweeps=3, effort="quick"))
    ends = [start for start, stop in reads if start == 0]
    assert all(stop == following or following == 0 for (_, stop), (following, _) in pairwise(reads))
    assert len(ends) == stack.passes.total - before
    assert stack.passes.copies == 1  # the `values` above
    assert stack.passes.checks == 2  # construction and norms
    assert max(stop - start for start, stop in reads) * SHAPE[2] * 8 <= LIMIT / 16


def test_large_svds_lie_in_files_that_vanish(stack_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    descriptors: list[int] = []
    temporary_file = tempfile.TemporaryFile

    def recorded() -> IO[bytes]:
        file = temporary_file()
        descriptors.append(os.dup(file.fileno()))
        return file

    monkeypatch.setattr(tempfile, "TemporaryFile", recorded)
    stack = streamed(stack_file)
    stack.spectra.svd()
    assert [os.fstat(one).st_size for one in descriptors] == [8 * 64 * 10 * 12, 8 * 64 * 10 * 10]
    assert list(tmp_path.iterdir()) == [stack_file]
    small = rt.LayerStack(noise(2, 5, 4), memory=10**6)
    small.spectra.svd()
    assert len(descriptors) == 2


def test_no_room_for_the_svds_is_one_sentence(stack_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(stack_file.parent / "missing"))
    with pytest.raises(rt.InputError, match=r"the exact SVDs need a temporary file of .* GiB in .*missing.*set TMPDIR"):
        streamed(stack_file).spectra.svd()


@pytest.mark.parametrize("values", [noise(64, 12, 10), noise(64, 10, 12)])
def test_layers_of_unit_norm_on_disk(tmp_path: Path, values: np.ndarray) -> None:
    values[1] = 0
    values[2] *= 1e-170
    np.save(tmp_path / "u.npy", values)
    on_disk, in_memory = streamed(tmp_path / "u.npy"), rt.LayerStack(values)
    for view in (lambda s: s, lambda s: s.unit(), lambda s: s.transpose()):
        (one, norms), (other, expected) = (normalised_layers(view(s)) for s in (on_disk, in_memory))
        assert isinstance(one.entries.storage, Divided)
        assert torch.equal(one.values, other.values)
        assert norms == expected
        assert one.layer_norms_squared == pytest.approx([1.0, 0.0] + [1.0] * 62, rel=1e-12)


# ---- kept as they are stored


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stored", "dtype"),
    [(torch.float16, None), (torch.bfloat16, None), (torch.bfloat16, "float64"), (torch.float32, "float64")],
)
def test_narrow_values_stay_as_they_are_and_compute_as_if_converted(
    stored: torch.dtype, dtype: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    M = torch.as_tensor(noise(3, 8, 6)).to(stored)
    stack, budget = rt.LayerStack(M, dtype=dtype), rt.RankBudget(2, 1)
    converted = rt.LayerStack(M.to(stack.dtype))
    assert stack.dtype == converted.dtype == (torch.float32 if dtype is None else torch.float64)
    held = stack.entries.storage
    assert isinstance(held, InMemory)
    assert held.values.data_ptr() == M.data_ptr()
    if stack.dtype == torch.float64:
        assert_same(stack, converted)
    factors = rt.solve_lora(converted, 2).factors
    exact = float(((M.double() - factors.B.double() @ factors.A.double()) ** 2).sum())
    assert rt.reconstruction_error(stack, factors) == pytest.approx(exact, rel=1e-13)

    sizes: list[int] = []
    rows = InMemory.rows

    def counted(self: InMemory, layer: int, start: int, stop: int) -> torch.Tensor:
        block = rows(self, layer, start, stop)
        sizes.append(block.numel())
        return block

    monkeypatch.setattr(InMemory, "rows", counted)
    monkeypatch.setattr(rt.LayerStack, "values", property(lambda self: pytest.fail("the whole stack is converted")))
    rt.solve_rasa(stack, budget, rt.SolverOptions(max_sweeps=2, effort="quick"))
    rt.lower_bound(stack, budget)
    assert max(sizes) == 8 * 6


# ---- bad input


def test_a_limit_below_one_layer(stack_file: Path) -> None:
    sentence = (
        r"memory of 0.007324 MiB is too little for stack 'updates': its layers of 12 x 10 need "
        r"0.01465 MiB, twice what the exact SVD of one takes; allow at least that"
    )
    stack = streamed(stack_file, memory=LIMIT // 2)
    for work in (stack.spectra.svd, lambda: rt.solve_rasa(stack, rt.RankBudget(2, 1)), lambda: rt.solve_lora(stack, 2)):
        with pytest.raises(rt.InputError, match=sentence):
            work()
    with pytest.raises(rt.InputError, match=sentence):  # so small a layer has its SVD taken
        rt.solve_lora(stack, 2, "fast")
    exact = rt.LayerStack(stack.values)
    assert torch.allclose(stack.spectra.singular_values(), exact.spectra.singular_values())
    least = streamed(stack_file, memory=LIMIT // 2 - 1)
    assert least.norm_squared == pytest.approx(exact.norm_squared, rel=1e-12)
    with pytest.raises(rt.InputError, match="twice what the work on one takes"):
        least.spectra.singular_values()
    with pytest.raises(rt.InputError, match="twice what the work on one takes"):
        rt.solve_lora(least, 2, "fast")
    with pytest.raises(rt.InputError, match="memory must be at least 1 byte, got 0"):
        streamed(stack_file, memory=0)
    with pytest.raises(rt.InputError, match=r"memory must be a whole number, got 2\.5"):
        open_source(str(stack_file), memory=2.5)  # type: ignore[arg-type]


def test_a_file_that_was_cut_short(stack_file: Path) -> None:
    source, stack = open_source(str(stack_file), memory=LIMIT).stacks[0], streamed(stack_file)
    stack_file.write_bytes(stack_file.read_bytes()[:-8])
    sentence = rf"^{stack_file}: ends at byte {stack_file.stat().st_size}, amid a stack; write it again$"
    with pytest.raises(rt.InputError, match=sentence):
        source.load(None, None)
    with pytest.raises(rt.InputError, match=sentence):
        stack.right(torch.zeros(10, 1, dtype=torch.float64))
    save_file({"w": torch.as_tensor(noise(*SHAPE))}, stack_file.with_suffix(".safetensors"))
    later = open_source(str(stack_file.with_suffix(".safetensors")), memory=LIMIT).stacks[0]
    stack_file.with_suffix(".safetensors").unlink()
    with pytest.raises(rt.InputError, match=r"updates.safetensors: not a sound safetensors file"):
        later.load(None, None)
    stack_file.unlink()
    with pytest.raises(rt.InputError, match=r"updates.npy: cannot be read"):
        stack.spectra.gram()


def test_entries_that_are_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StackEntries, "tile_elements", 20)  # two rows
    values = noise(*SHAPE)
    values[2, 3, 1] = math.nan
    np.save(tmp_path / "u.npy", values)
    with pytest.raises(rt.InputError, match=r"u.npy: stack 'u': layer 2, entry \(3, 1\) is nan; all entries must be"):
        streamed(tmp_path / "u.npy")
    tensors = {f"h.{i}.w": layer.clone() for i, layer in enumerate(torch.as_tensor(values))}
    save_file(tensors, tmp_path / "u.safetensors")
    with pytest.raises(rt.InputError, match=r"layer 2, entry \(3, 1\) is nan; .* \(tensor 'h.2.w'\)"):
        streamed(tmp_path / "u.safetensors")


def test_files_that_cannot_be_read_in_parts(tmp_path: Path) -> None:
    np.savez(tmp_path / "u.npz", w=noise(*SHAPE))
    with pytest.raises(rt.InputError, match=r"u.npz: stack 'w' takes 0.05859 MiB, more than a quarter of the memory"):
        streamed(tmp_path / "u.npz")
    np.save(tmp_path / "f.npy", np.asfortranarray(noise(*SHAPE)))
    with pytest.raises(rt.InputError, match=r"f.npy: the array is in Fortran order, .*; save it in C order"):
        streamed(tmp_path / "f.npy")
