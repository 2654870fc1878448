"""Checkpoints that are forged, damaged or incomplete: success, or InputError in one sentence, and nothing else."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from rasa_theory import InputError
from rasa_theory.commands import reconstruct
from rasa_theory.sources import load, open_source
from tests.helpers.problems import noise

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def layers(count: int = 4, b: int = 3, a: int = 5) -> dict[str, Tensor]:
    return {f"h.{i}.w": layer.clone() for i, layer in enumerate(torch.as_tensor(noise(count, b, a)).float())}


def write_index(directory: Path, weight_map: Any) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """h.0.w and h.1.w in the first of two shards, h.2.w and h.3.w in the second, and an index."""
    directory, tensors = tmp_path / "checkpoint", layers()
    directory.mkdir()
    save_file({k: tensors[k] for k in ("h.0.w", "h.1.w")}, directory / FIRST)
    save_file({k: tensors[k] for k in ("h.2.w", "h.3.w")}, directory / SECOND)
    write_index(directory, dict.fromkeys(("h.0.w", "h.1.w"), FIRST) | dict.fromkeys(("h.2.w", "h.3.w"), SECOND))
    return directory


def values(source: Path) -> Tensor:
    (stack,), _ = load(str(source))
    return stack.values


def refused(source: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_source(str(source))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------- indexes


def test_the_index_decides_which_file_holds_a_tensor(sharded: Path) -> None:
    expected = torch.stack(list(layers().values()))
    assert torch.equal(values(sharded), expected)
    (sharded / "unread.safetensors").write_bytes(b"not read, for the index does not name it")
    save_file({"h.0.w": torch.zeros(3, 5), "h.3.w": torch.zeros(3, 5)}, sharded / FIRST)
    write_index(sharded, {"h.3.w": FIRST, "h.2.w": SECOND})
    stacks, left_out = load(str(sharded))
    assert torch.equal(stacks[0].values, torch.stack([layers()["h.2.w"], torch.zeros(3, 5)]))
    assert left_out == [
        ("h.0.w", f"in {sharded / FIRST}, where {INDEX} does not look for it"),
        ("h.3.w", f"in {sharded / SECOND}, where {INDEX} does not look for it"),
    ]
    pair = open_source(base=str(sharded), tuned=str(sharded))
    assert pair.left_out == left_out * 2
    assert pair.stacks[0].load(None, None).norm_squared == 0


def test_all_that_is_wrong_with_shards_is_said_at_once(sharded: Path) -> None:
    (sharded / "cut.safetensors").write_bytes((sharded / FIRST).read_bytes()[:-1])
    places = {"h.0.w": FIRST, "x": FIRST, "h.1.w": SECOND, "y": "cut.safetensors", "z": "gone.safetensors"}
    write_index(sharded, places | {f"n{i}": SECOND for i in range(7)} | {"p": "pytorch_model-00001-of-00002.bin"})
    sentence = refused(sharded)
    assert sentence.startswith(f"{sharded / INDEX}: 'gone.safetensors' is missing; ")
    assert f"{sharded / 'cut.safetensors'}: not a sound safetensors file (" in sentence
    assert f"'{FIRST}' has not got 'x'; '{SECOND}' has not got 'h.1.w', 'n0', 'n1', 'n2', 'n3' and 3 more" in sentence
    assert "'pytorch_model-00001-of-00002.bin' is a pickle, which is never opened: convert it to" in sentence
    assert sentence.endswith("; download the checkpoint again, in safetensors")


def test_without_an_index_all_unreadable_files_are_named(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    assert values(sharded).shape == (4, 3, 5)
    for name in (FIRST, SECOND):
        (sharded / name).write_bytes(b"\0")
    pattern = rf"{FIRST}: not a sound .+; .+{SECOND}: not a sound .+; download or write them again"
    assert re.search(pattern, refused(sharded))


def test_one_file_beside_shards_is_unclear_unless_the_index_names_it(sharded: Path) -> None:
    """transformers loads model.safetensors, others the shards of the index."""
    single = sharded / "model.safetensors"
    save_file({key: x + 1 for key, x in layers().items()}, single)
    sentence = f"{sharded}: has both model.safetensors and {INDEX} with its shards, of which one may be left over; "
    assert refused(sharded).startswith(sentence)
    assert torch.equal(values(single), torch.stack(list(layers().values())) + 1)
    for file in (FIRST, SECOND):
        (sharded / file).unlink()
    assert refused(sharded).startswith(sentence)
    write_index(sharded, dict.fromkeys(layers(), single.name))
    assert torch.equal(values(sharded), torch.stack(list(layers().values())) + 1)


@pytest.mark.parametrize("name", ["consolidated.safetensors", "consolidated-00001-of-00001.safetensors"])
def test_a_copy_of_a_model_under_the_names_of_its_authors_counts_once(tmp_path: Path, name: str) -> None:
    save_file({f"layers.{i}.wq.weight": torch.ones(3, 5) for i in range(2)}, tmp_path / name)
    assert [source.name for source in open_source(str(tmp_path)).stacks] == ["layers.*.wq.weight"]
    save_file(layers(), tmp_path / "model.safetensors")
    assert [source.name for source in open_source(str(tmp_path)).stacks] == ["h.*.w"]
    (tmp_path / "consolidated.safetensors.index.json").write_text("{}", encoding="utf-8")
    write_index(tmp_path, dict.fromkeys(layers(), "model.safetensors"))
    assert [source.name for source in open_source(str(tmp_path)).stacks] == ["h.*.w"]


@pytest.mark.parametrize(
    "name", ["/etc/x.safetensors", "../x.safetensors", "a/../../x.safetensors", "../checkpoint/" + FIRST]
)
def test_an_index_does_not_lead_out_of_its_directory(sharded: Path, name: str) -> None:
    save_file(layers(), sharded.parent / "x.safetensors")
    write_index(sharded, {"h.0.w": name, "h.2.w": SECOND})
    assert refused(sharded).startswith(f"{sharded / INDEX}: {name!r} leads out of the directory; download")


def test_links_stay_in_the_directory_or_in_the_cache_of_the_hub(sharded: Path, tmp_path: Path) -> None:
    outside = tmp_path / "x.safetensors"
    (sharded / FIRST).rename(outside)
    (sharded / FIRST).symlink_to(outside)
    assert f"{FIRST!r} is a link out of the directory, to {outside.resolve()}: put the file itself there; " in refused(
        sharded
    )
    (sharded / FIRST).unlink()
    outside.rename(sharded / "x.safetensors")
    (sharded / FIRST).symlink_to("x.safetensors")
    assert values(sharded).shape == (4, 3, 5)

    blobs, snapshot = (tmp_path / "hub" / "models--me--tiny" / name for name in ("blobs", "snapshots/0a1b"))
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, name in enumerate((FIRST, SECOND, INDEX)):
        (blobs / f"{i}").write_bytes((sharded / name).read_bytes())
        (snapshot / name).symlink_to(f"../../blobs/{i}")
    assert torch.equal(values(snapshot), values(sharded))
    (tmp_path / "short").symlink_to(snapshot)
    assert torch.equal(values(tmp_path / "short"), values(sharded))
    (snapshot / FIRST).unlink()
    (snapshot / FIRST).symlink_to(sharded / "x.safetensors")
    assert "is a link out of the directory" in refused(snapshot)
    (snapshot / FIRST).unlink()
    (snapshot / FIRST).symlink_to(FIRST)
    assert f"{FIRST!r} is missing" in refused(snapshot)


DEEP = "[" * 100_000 + "]" * 100_000
BAD_INDEXES = {
    "empty": ("", "not a sound file with one JSON object"),
    "not JSON": ("{]", "not a sound file with one JSON object"),
    "deep": (f'{{"weight_map": {DEEP}}}', "it is nested too deep"),
    "a list": ("[]", "it holds a list"),
    "a key twice": ('{"weight_map": {"h.0.w": "a.safetensors", "h.0.w": "b.safetensors"}}', "'h.0.w' is there twice"),
    "half a surrogate": ('{"weight_map": {"\\ud800": "a.safetensors"}}', "surrogates not allowed"),
    "no weight_map": ('{"metadata": {}}', "expected weight_map, the name of a file for every tensor"),
    "weight_map a list": ('{"weight_map": ["a"]}', "expected weight_map"),
    "weight_map empty": ('{"weight_map": {}}', "expected weight_map"),
    "a number for a file": ('{"weight_map": {"a": 3}}', "expected weight_map"),
    "a name that is none": ('{"weight_map": {"a": ""}}', "'' is not the name of a .safetensors file"),
    "a name with a zero": ('{"weight_map": {"a": "a\\u0000.safetensors"}}', "is not the name of a .safetensors"),
    "a name with half a surrogate": ('{"weight_map": {"a": "\\udc80.safetensors"}}', "is not the name of a"),
    "a name without end": (json.dumps({"weight_map": {"a": "x" * 5000 + ".safetensors"}}), "is missing"),
    "a folder": ('{"weight_map": {"a": "folder.safetensors"}}', "not a regular file"),
    "a pipe": ('{"weight_map": {"a": "pipe.safetensors"}}', "not a regular file"),
}


@pytest.mark.parametrize(("text", "sentence"), BAD_INDEXES.values(), ids=BAD_INDEXES.keys())
def test_bad_indexes_are_refused(sharded: Path, text: str, sentence: str) -> None:
    (sharded / "folder.safetensors").mkdir()
    os.mkfifo(sharded / "pipe.safetensors")
    (sharded / INDEX).write_text(text)
    found = refused(sharded)
    assert found.startswith(f"{sharded / INDEX}: ")
    assert sentence in found


def test_an_index_may_be_the_only_one_and_no_larger_than_100_mb(sharded: Path) -> None:
    (sharded / "model.fp16.safetensors.index.json").write_text("{}")
    assert "has 2 indexes (model.fp16.safetensors.index.json, model.safetensors.index.json); keep the" in refused(
        sharded
    )
    (sharded / "model.fp16.safetensors.index.json").unlink()
    os.truncate(sharded / INDEX, 100_000_001)  # a hole: takes no room on the disk
    assert "it has 100000001 bytes, more than 100000000" in refused(sharded)
    (sharded / INDEX).unlink()
    os.mkfifo(sharded / INDEX)
    assert "not a regular file" in refused(sharded)


def test_a_directory_of_pickles_is_told_to_convert_them(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin.index.json").write_text("{}")
    assert "pytorch_model.bin.index.json names pickles, which are never opened: convert them to" in refused(tmp_path)
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(pickle.dumps({}))
    assert "pytorch_model-00001-of-00002.bin is a pickle, which is never opened: convert it to" in refused(tmp_path)


# ---------------------------------------------------------------------------------------------------- headers


def file_of(header: str | bytes, data: int = 16, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else header.encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(data)


def tensor(shape: str = "[1, 2, 2]", start: int = 0, stop: int = 16, dtype: str = "F32", more: str = "") -> str:
    return f'{{"dtype": "{dtype}", "shape": {shape}, "data_offsets": [{start}, {stop}]{more}}}'


FORGED = {
    "a header of all the file and more": file_of(f'{{"a": {tensor()}}}', length=2**20),
    "a giant header": file_of(f'{{"a": {tensor()}}}', length=2**63 + 1),
    "a header of 99 MB": file_of(f'{{"a": {tensor()}}}', length=99_000_000),
    "an empty header": file_of(""),
    "a list for a header": file_of("[]"),
    "no UTF-8": file_of(b'{"\xff": 1}'),
    "overlapping offsets": file_of(f'{{"a": {tensor()}, "b": {tensor(start=8, stop=24)}}}', 24),
    "the same bytes twice": file_of(f'{{"a": {tensor()}, "b": {tensor()}}}'),
    "a gap between tensors": file_of(f'{{"a": {tensor()}, "b": {tensor(start=20, stop=36)}}}', 36),
    "offsets beyond the file": file_of(f'{{"a": {tensor(start=16, stop=32)}}}'),
    "offsets backwards": file_of(f'{{"a": {tensor(start=16, stop=0)}}}'),
    "negative offsets": file_of(f'{{"a": {tensor(start=-16, stop=0)}}}'),
    "bytes behind the tensors": file_of(f'{{"a": {tensor()}}}', 17),
    "a byte short": file_of(f'{{"a": {tensor()}}}', 15),
    "a shape of more than the bytes": file_of(f'{{"a": {tensor("[1, 2, 3]")}}}'),
    "a shape of fewer than the bytes": file_of(f'{{"a": {tensor("[1, 2, 1]")}}}'),
    "a negative shape": file_of(f'{{"a": {tensor("[-1, 2, -2]")}}}'),
    "a shape that overflows to the bytes": file_of(f'{{"a": {tensor(f"[{2**62}, 4, 1]", 0, 0)}}}', 0),
    "a shape of floats": file_of(f'{{"a": {tensor("[1.0, 2, 2]")}}}'),
    "a shape of text": file_of(f'{{"a": {tensor(chr(34) + "122" + chr(34))}}}'),
    "an endless number": file_of(f'{{"a": {tensor("[" + "9" * 5000 + "]")}}}'),
    "an unknown dtype": file_of(f'{{"a": {tensor(dtype="F33")}}}'),
    "no shape": file_of('{"a": {"dtype": "F32", "data_offsets": [0, 16]}}'),
    "a tensor twice": file_of(f'{{"a": {tensor()}, "a": {tensor()}}}'),
    "a tensor twice, elsewhere": file_of(f'{{"a": {tensor("[9]", 16, 52)}, "a": {tensor()}}}'),
    "a shape twice": file_of(f'{{"a": {tensor(more=", " + chr(34) + "shape" + chr(34) + ": [4, 1, 1]")}}}'),
    "metadata twice": file_of(f'{{"__metadata__": {{}}, "__metadata__": {{}}, "a": {tensor()}}}'),
    "half a surrogate": file_of(f'{{"\\ud800": {tensor()}}}'),
    "orders for a terminal": file_of(f'{{"\\u001b[2J\\n": {tensor(start=1, stop=17)}}}', 17),
    "a name of 100 kB": file_of(f'{{"{"x" * 100_000}": {tensor(start=1, stop=17)}}}', 17),
    "deep": file_of(DEEP),
    "deep, where it is passed over": file_of(f'{{"a": {tensor(more=f", {chr(34)}x{chr(34)}: {DEEP}")}}}'),
    "deep metadata": file_of(f'{{"__metadata__": {{"x": {DEEP}}}, "a": {tensor()}}}'),
}


@pytest.mark.parametrize("content", FORGED.values(), ids=FORGED.keys())
def test_forged_headers_are_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "forged.safetensors"
    file.write_bytes(file_of(f'{{"a": {tensor()}}}'))
    assert values(file).shape == (1, 2, 2)
    file.write_bytes(content)
    tracemalloc.start()
    found, (_, peak) = refused(file), tracemalloc.get_traced_memory()
    tracemalloc.stop()
    sentence = re.escape(f"{file}: not a sound safetensors file (") + r".{,210}\); download or write it again"
    assert re.fullmatch(sentence, found)
    assert found.isprintable()
    assert peak < 2**18 + 4 * len(content)  # and not what a length or a shape claims


def test_a_file_that_changes_after_it_was_opened_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "u.safetensors"
    save_file({"w": torch.as_tensor(noise(64, 12, 10))}, file)
    sources = [open_source(str(file), memory=memory).stacks[0] for memory in (None, 128 * 12 * 10)]
    before = sources[0].load(None, None).values.clone()
    assert torch.equal(sources[1].load(None, None).values, before)
    save_file({"w": torch.as_tensor(noise(64, 12, 10, 1)), "x": torch.zeros(1)}, file)
    for source in sources:
        with pytest.raises(InputError, match=r"u.safetensors: not a sound safetensors file \(it has changed since"):
            source.load(None, None)


# ------------------------------------------------------------------------------------------------------- fuzz

CASES, THROUGH_THE_COMMAND = 2000, 66  # every so many cases also through the command


def sound_files(directory: Path) -> list[bytes]:
    """Small files as they are: layers in single precision, a stack in bfloat16, mixed dtypes with metadata."""
    wide = torch.as_tensor(noise(20, 2, 3))
    contents: list[tuple[dict[str, Tensor], dict[str, str] | None]] = [
        (layers(10), None),
        ({"w": wide.bfloat16()}, None),
        ({"h.0.c_fc": wide[0].half(), "h.1.c_fc": wide[1].clone(), "ids": torch.arange(3)}, {"format": "pt"}),
    ]
    for i, (tensors, metadata) in enumerate(contents):
        save_file(tensors, directory / f"sound{i}.safetensors", metadata)
    return [(directory / f"sound{i}.safetensors").read_bytes() for i in range(len(contents))]


def parts(content: bytes) -> tuple[bytes, bytes]:
    """Header and data."""
    (size,) = struct.unpack("<Q", content[:8])
    return content[8 : 8 + size], content[8 + size :]


def flip_bytes(content: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(content)
    end = len(content) if rng.random() < 0.3 else 8 + len(parts(content)[0])
    for place in rng.integers(0, end, rng.integers(1, 4)):
        changed[place] = rng.integers(256)
    return bytes(changed)


def flip_data(content: bytes, rng: np.random.Generator) -> bytes:
    header, data = parts(content)
    changed = bytearray(data)
    changed[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    return file_of(header, 0) + bytes(changed)


def cut(content: bytes, rng: np.random.Generator) -> bytes:
    return content[: rng.integers(len(content))]


def another_length(content: bytes, rng: np.random.Generator) -> bytes:
    (size,) = struct.unpack("<Q", content[:8])
    near, far = size + rng.integers(-9, 10), int(rng.integers(2**63)) >> int(rng.integers(63))
    return struct.pack("<Q", near if rng.random() < 0.5 else far) + content[8:]


def another_number(content: bytes, rng: np.random.Generator) -> bytes:
    """One number of the header (in shapes, offsets or names) becomes another."""
    header, data = parts(content)
    found = list(re.finditer(rb"[0-9]+", header))
    number = found[rng.integers(len(found))]
    choices = ["0", "1", "7", "-1", "1.5", "1e3", "true", "null", "[]", str(2**32), str(2**63), str(2**64), "9" * 5000]
    new = str(rng.choice(choices)).encode()
    return file_of(header[: number.start()] + new + header[number.end() :], 0) + data


def swap_offsets(content: bytes, rng: np.random.Generator) -> bytes:
    """Two fields of two tensors, or of one, change places."""
    header, data = parts(content)
    found = json.loads(header)
    keys = [key for key in found if key != "__metadata__"]
    one, other = (found[keys[i]] for i in rng.integers(0, len(keys), 2))
    field = rng.choice(["data_offsets", "shape", "dtype"])
    one[field], other[field] = other[field], one[field]
    if rng.random() < 0.3:
        one["data_offsets"] = one["data_offsets"][::-1]
    return file_of(json.dumps(found), 0) + data


def key_twice(content: bytes, rng: np.random.Generator) -> bytes:
    header, data = parts(content)
    members = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in json.loads(header).items()]
    members.insert(rng.integers(len(members)), members[rng.integers(len(members))])
    return file_of("{" + ", ".join(members) + "}", 0) + data


def nest(content: bytes, rng: np.random.Generator) -> bytes:
    header, data = parts(content)
    places = [i for i, byte in enumerate(header) if byte in b'[{,:"0123456789']
    place, depth = places[rng.integers(len(places))] + int(rng.integers(2)), int(10 ** rng.uniform(0, 5))
    opening, closing = (b"[", b"]") if rng.random() < 0.5 else (b'{"a":', b"}")
    return file_of(header[:place] + opening * depth + closing * depth + header[place:], 0) + data


MUTATIONS = [flip_bytes, flip_data, cut, another_length, another_number, swap_offsets, key_twice, nest]


def outcome(source: str, **options: Any) -> str:
    """The sentence that refuses a source, at opening or at loading one of its stacks; empty if all were read."""
    try:
        for found in open_source(source, **options).stacks:
            assert found.load(None, None).shape == found.shape
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_mutated_files_are_read_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng, outcomes = np.random.default_rng(0), {mutate.__name__: [0, 0] for mutate in MUTATIONS}
    sound = sound_files(tmp_path)
    file = tmp_path / "mutated.safetensors"
    for case in range(CASES):
        which, mutate = case % len(sound), MUTATIONS[rng.integers(len(MUTATIONS))]
        content = mutate(sound[which], rng)
        file.write_bytes(content)
        pair = {"base": str(tmp_path / f"sound{which}.safetensors"), "tuned": str(file)} if case % 5 == 0 else {}
        memory = 128 * (15, 6, 6)[which] if case % 7 == 0 else None  # the first two stacks then stay on disk
        try:
            sentence = outcome(str(file), memory=memory, **pair)
        except BaseException as error:
            raise AssertionError(f"case {case}, {mutate.__name__}: {content[:500]!r}") from error
        assert "\n" not in sentence
        assert len(sentence) < 2000
        outcomes[mutate.__name__][sentence != ""] += 1
        if case % THROUGH_THE_COMMAND == 0:
            status = reconstruct.main(["--source", str(file), "--rank", "1", "--dry-run"])
            assert status in (0, 2)
            assert capsys.readouterr().err.count("\n") == (status == 2)
    assert all(refusals >= 5 for _, refusals in outcomes.values()), outcomes
    assert sum(read for read, _ in outcomes.values()) > 200, outcomes
    assert outcomes["key_twice"][0] == outcomes["cut"][0] == 0


def test_mutated_indexes_and_configs_are_read_or_refused(sharded: Path) -> None:
    rng, read = np.random.default_rng(1), 0
    (sharded / "config.json").write_text('{"model_type": "gpt2", "n_layer": 4}')
    for case in range(300):
        file = sharded / (INDEX if case % 2 else "config.json")
        text = file.read_bytes()
        changed = bytearray(text)
        for place in rng.integers(0, len(text), rng.integers(1, 3)):
            changed[place] = rng.integers(256)
        file.write_bytes(changed)
        sentence = outcome(str(sharded))
        assert "\n" not in sentence
        read += sentence == ""
        file.write_bytes(text)
    assert 20 < read < 280


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_entries_that_are_not_finite_are_exit_status_2(
    tmp_path: Path, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = layers()
    save_file(tensors, tmp_path / "base.safetensors")
    tensors["h.2.w"][1, 4] = value
    save_file(tensors, tmp_path / "tuned.safetensors")
    base, tuned = str(tmp_path / "base.safetensors"), str(tmp_path / "tuned.safetensors")
    for given, file in (
        (["--source", tuned], tuned),
        (["--base", base, "--tuned", tuned], f"{tuned} minus {base}"),
        (["--base", tuned, "--tuned", base], f"{base} minus {tuned}"),
    ):
        assert reconstruct.main([*given, "--rank", "2", "--out", "none", "--quiet"]) == 2
        out, err = capsys.readouterr()
        found = -value if file.startswith(base) else value
        sentence = (
            f"{file}: stack 'h.*.w': layer 2, entry (1, 4) is {found}; all entries must be finite (tensor 'h.2.w')"
        )
        assert (out, err) == ("", f"rasa reconstruct: {sentence}\n")
