"""Sources: which tensors form a stack, that values come out as they went in, and what a damaged file is told."""

from __future__ import annotations

import importlib.resources
import json
import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rasa_theory import (
    InputError,
    LayerStack,
    RankBudget,
    SolverOptions,
    reconstruction_error,
    solve_lora,
    solve_rasa,
)
from rasa_theory.formats import Entry, write_halves
from rasa_theory.problem import normalised_layers
from rasa_theory.sources import (
    BUNDLED,
    Group,
    Prefix,
    group,
    load,
    open_source,
    planted_stack,
    provenance,
    singular_values,
    synthetic_stack,
)

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def matrix(b: int = 3, a: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(b, a, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layers_of(names: list[str], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: matrix(seed=i).to(dtype) for i, name in enumerate(names)}


def stack_of(source: Path | str, **dtype_and_device: Any) -> Tensor:
    (stack,), _ = load(str(source), **dtype_and_device)
    return stack.values


# ------------------------------------------------------------------------------------------------ grouping

GROUPED = {
    "llama": (
        [f"model.layers.{i}.self_attn.q_proj.weight" for i in (10, 2, 0)],
        {"model.layers.*.self_attn.q_proj.weight": [f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 2, 10)]},
    ),
    "bert": (
        [f"encoder.layer.{i}.attention.{kind}.weight" for i in range(2) for kind in ("query", "key")],
        {
            f"encoder.layer.*.attention.{kind}.weight": [f"encoder.layer.{i}.attention.{kind}.weight" for i in (0, 1)]
            for kind in ("query", "key")
        },
    ),
    "gpt": (["h.0.attn.c_attn", "h.1.attn.c_attn"], {"h.*.attn.c_attn": ["h.0.attn.c_attn", "h.1.attn.c_attn"]}),
    "vit": (["blocks.1.mlp.fc1", "blocks.0.mlp.fc1"], {"blocks.*.mlp.fc1": ["blocks.0.mlp.fc1", "blocks.1.mlp.fc1"]}),
    "the first word wins": (
        ["block.0.layer.1.q", "block.1.layer.1.q"],
        {"block.*.layer.1.q": ["block.0.layer.1.q", "block.1.layer.1.q"]},
    ),
    "a word without a number is passed over": (
        ["layers.a.h.0.w", "layers.a.h.1.w"],
        {"layers.a.h.*.w": ["layers.a.h.0.w", "layers.a.h.1.w"]},
    ),
    "experts": (
        [f"layers.{i}.experts.{e}.w1" for i in range(2) for e in range(2)],
        {f"layers.*.experts.{e}.w1": [f"layers.{i}.experts.{e}.w1" for i in range(2)] for e in range(2)},
    ),
    "numpy": ([f"arr_{i}" for i in range(11)], {"arr_*": [f"arr_{i}" for i in range(11)]}),
    "digit runs": (["q8_l9_x", "q8_l10_x"], {"q8_l*_x": ["q8_l9_x", "q8_l10_x"]}),
    "whole components only": (
        ["my_layers.3.w1", "my_layers.4.w1"],
        {"my_layers.*.w1": ["my_layers.3.w1", "my_layers.4.w1"]},
    ),
    "endless numbers": (["w" + "9" * 5000, "w1"], {"w*": ["w1", "w" + "9" * 5000]}),
}


@pytest.mark.parametrize(("names", "expected"), GROUPED.values(), ids=GROUPED.keys())
def test_grouping_by_name(names: list[str], expected: dict[str, list[str]]) -> None:
    groups, left_out = group(Entry(name, (3, 4), "float32") for name in names)
    assert {g.name: g.keys for g in groups} == expected
    assert all(g.shape == (3, 4) and g.layers == len(g.keys) for g in groups)
    assert left_out == []


def test_three_axes_are_a_stack_named_by_its_key() -> None:
    groups, left_out = group([Entry("layers.0.experts", (1, 3, 4), "bfloat16")])
    expected = Group("layers.0.experts", 1, (3, 4), ["layers.0.experts"], is_one_tensor=True)
    assert (groups, left_out) == ([expected], [])


def test_unequal_shapes_form_separate_stacks() -> None:
    shapes = [(3, 4), (5, 4), (3, 4), (5, 4), (6, 6)]
    groups, left_out = group(Entry(f"h.{i}.w", shape, "float16") for i, shape in enumerate(shapes))
    assert {g.name: g.keys for g in groups} == {"h.*.w[3x4]": ["h.0.w", "h.2.w"], "h.*.w[5x4]": ["h.1.w", "h.3.w"]}
    assert left_out == [("h.4.w", "the only layer of 'h.*.w[6x6]'; a stack of matrices needs two or more")]


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([Entry(f"a{i}_b{i}", (3, 4), "float32") for i in "12"], r"2 numbers vary among the names 'a\*_b\*'"),
        ([Entry("lm_head", (3, 4), "float32")], "the only tensor of its kind"),
        ([Entry("layers.0.w", (3, 4), "float32")], r"the only layer of 'layers.\*.w'"),
        ([Entry("h.0.b", (3,), "float32")], "1 axis; a layer has 2, a stack of layers 3"),
        ([Entry("s", (), "float32")], "0 axes"),
        ([Entry("conv", (1, 2, 3, 4), "float32")], "4 axes"),
        ([Entry("none", (2, 0, 4), "float32")], r"shape \(2, 0, 4\) is empty"),
        ([Entry("ids", (2, 3, 4), "int64")], "int64 is not real floating point"),
        ([Entry("z", (2, 3, 4), "complex64")], "complex64 is not real floating point"),
        ([Entry("w8", (2, 3, 4), "float8_e4m3")], "float8_e4m3 needs its scales to be read; convert the checkpoint"),
        (
            [Entry(f"layers.{i}.w", (3, 4), "float32") for i in ("0", "1", "01")],
            r"layer 1 of 'layers.\*.w' is there twice: 'layers.1.w' and 'layers.01.w'",
        ),
        ([Entry(f"w{i}", (3, 4), "float32") for i in ("1", "01")], r"layer 1 of 'w\*' is there twice"),
    ],
)  # fmt: skip
def test_left_out_with_the_reason(entries: list[Entry], reason: str) -> None:
    groups, left_out = group(entries)
    assert groups == []
    assert sorted(name for name, _ in left_out) == sorted(entry.name for entry in entries)
    assert all(re.match(reason, found) for _, found in left_out)


def test_a_name_that_is_taken_gets_a_number() -> None:
    entries = [Entry("w*", (2, 3, 4), "float32"), Entry("w0", (3, 4), "float32"), Entry("w1", (3, 4), "float32")]
    groups, left_out = group(entries)
    assert {g.name: g.keys for g in groups} == {"w*": ["w*"], "w*(2)": ["w0", "w1"]}
    assert left_out == []


# ----------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("dtype", FLOATS)
def test_safetensors_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = layers_of(["h.10.w", "h.2.w", "h.0.w"], dtype)
    save_file(tensors, tmp_path / "m.safetensors")
    values = stack_of(tmp_path / "m.safetensors")
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(values, torch.stack([tensors[f"h.{i}.w"] for i in (0, 2, 10)]).to(values.dtype))
    asked = stack_of(tmp_path / "m.safetensors", dtype="float64")
    assert torch.equal(asked, torch.stack([tensors[f"h.{i}.w"].double() for i in (0, 2, 10)]))


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4", "longdouble"])
def test_numpy_round_trips(tmp_path: Path, dtype: str) -> None:
    values = np.stack([matrix(seed=i).numpy() for i in range(3)]).astype(dtype)
    np.save(tmp_path / "delta.npy", values)
    np.save(tmp_path / "fortran.npy", np.asfortranarray(values))
    np.savez(tmp_path / "stacks.npz", q=values)
    np.savez_compressed(tmp_path / "matrices.npz", *values)
    expected = torch.from_numpy(values.astype("<f8" if values.itemsize > 4 else "<f4"))
    for file in ("delta.npy", "fortran.npy", "stacks.npz", "matrices.npz"):
        assert torch.equal(stack_of(tmp_path / file), expected), file
    assert [open_source(str(tmp_path / f)).stacks[0].name for f in ("delta.npy", "stacks.npz", "matrices.npz")] == [
        "delta",
        "q",
        "arr_*",
    ]


def test_loading_never_writes_the_file(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", np.ones((2, 3, 4)))
    stack_of(tmp_path / "d.npy").zero_()
    assert torch.equal(stack_of(tmp_path / "d.npy"), torch.ones(2, 3, 4, dtype=torch.float64))


def test_layers_of_mixed_dtypes_meet_in_the_widest(tmp_path: Path) -> None:
    tensors = {"h.0.w": matrix(seed=0).bfloat16(), "h.1.w": matrix(seed=1)}
    save_file(tensors, tmp_path / "m.safetensors")
    assert torch.equal(stack_of(tmp_path / "m.safetensors"), torch.stack([t.double() for t in tensors.values()]))


def test_a_directory_joins_its_shards(tmp_path: Path) -> None:
    tensors = layers_of([f"h.{i}.w" for i in range(4)])
    save_file({k: tensors[k] for k in ("h.0.w", "h.3.w")}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({k: tensors[k] for k in ("h.1.w", "h.2.w")}, tmp_path / "model-00002-of-00002.safetensors")
    assert torch.equal(stack_of(tmp_path), torch.stack(list(tensors.values())))
    save_file({"h.3.w": tensors["h.3.w"]}, tmp_path / "copy.safetensors")
    with pytest.raises(InputError, match=r"'h.3.w' is in both copy.safetensors and model-00001-of-00002.safetensors"):
        open_source(str(tmp_path))


def test_left_out_tensors_stand_beside_the_stacks(tmp_path: Path) -> None:
    tensors = layers_of(["h.0.w", "h.1.w"])
    save_file(
        {**tensors, "bias": torch.ones(3), "f8": torch.ones(2, 3, 4).to(torch.float8_e4m3fn)},
        tmp_path / "m.safetensors",
    )
    stacks, left_out = load(str(tmp_path / "m.safetensors"))
    assert [s.name for s in stacks] == ["h.*.w"]
    assert left_out == [
        ("bias", "1 axis; a layer has 2, a stack of layers 3"),
        ("f8", "float8_e4m3 needs its scales to be read; convert the checkpoint to bfloat16"),
    ]


def test_matching_keeps_globs_and_literal_names(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", **{f"h.{i}.{k}": np.ones((i // 2 + 1, 3)) for i in range(4) for k in "qv"})
    catalogue = open_source(str(tmp_path / "s.npz"))
    assert [s.name for s in catalogue.stacks] == ["h.*.q[1x3]", "h.*.q[2x3]", "h.*.v[1x3]", "h.*.v[2x3]"]
    assert catalogue.matching([]) == catalogue
    assert [s.name for s in catalogue.matching(["*.q*"]).stacks] == ["h.*.q[1x3]", "h.*.q[2x3]"]
    kept = catalogue.matching(["h.*.q[2x3]", "*.v*"])
    assert [s.name for s in kept.stacks] == ["h.*.q[2x3]", "h.*.v[1x3]", "h.*.v[2x3]"]
    assert kept.left_out == [("h.*.q[1x3]", "does not match --modules 'h.*.q[2x3]', '*.v*'")]
    with pytest.raises(InputError, match=r"no stack matches --modules '\*K\*'; there are 'h.\*.q\[1x3\]', "):
        catalogue.matching(["*K*"])


# ----------------------------------------------------------------------------------------------------- pairs


@pytest.mark.parametrize("dtype", FLOATS)
def test_pair_is_the_difference_in_wide_arithmetic(tmp_path: Path, dtype: torch.dtype) -> None:
    names = ["h.0.w", "h.1.w"]
    base, tuned = layers_of(names, dtype), {n: t.to(dtype) for n, t in layers_of(names[::-1], torch.float64).items()}
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    (source,) = open_source(base=str(tmp_path / "base.safetensors"), tuned=str(tmp_path / "tuned.safetensors")).stacks
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    values = source.load(None, None).values
    assert values.dtype == wide
    assert torch.equal(values, torch.stack([tuned[n].to(wide) - base[n].to(wide) for n in names]))


def test_pair_leaves_out_what_does_not_correspond(tmp_path: Path) -> None:
    base, tuned = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    both = layers_of(["h.0.w", "h.1.w"])
    save_file({**both, "old": matrix(), "wte": matrix(3, 4), "ids": torch.ones(2, 2, 2, dtype=torch.int32)}, base)
    save_file({**both, "new": matrix(), "wte": matrix(4, 4), "ids": torch.ones(2, 2, 2)}, tuned)
    catalogue = open_source(base=str(base), tuned=str(tuned))
    assert [s.name for s in catalogue.stacks] == ["h.*.w"]
    assert dict(catalogue.left_out) == {
        "old": f"in {base} but not in {tuned}",
        "new": f"in {tuned} but not in {base}",
        "wte": f"shape (3, 4) in {base}, (4, 4) in {tuned}",
        "ids": "i32 is not real floating point",
    }
    assert catalogue.stacks[0].load(torch.float64, None).norm_squared == 0.0


BERT = [f"encoder.layer.{i}.attention.self.{kind}.weight" for i in range(3) for kind in ("query", "key")]
PREFIXED = {  # the longer names begin so, the shorter ones so; what is said of the tuned names, if longer, if shorter
    "a headless model": ("bert.", "", [*BERT, "embeddings.word.weight"], "'bert.' taken off", "'bert.' put before"),
    "two components": (
        "model.text.", "", ["layers.0.q", "layers.1.q", "tok"], "'model.text.' taken off", "'model.text.' put before",
    ),
    "behind a component that both have": (
        "model.text.", "model.", ["model.layers.0.q", "model.layers.1.q", "model.tok"],
        "'model.text.' read as 'model.' in", "'model.' read as 'model.text.' in",
    ),
    "a component twice": (
        "model.model.", "model.", ["model.layers.0.q", "model.layers.1.q"], "'model.' taken off", "'model.' put before",
    ),
    "numbers first": ("net.", "", ["0.weight", "1.weight"], "'net.' taken off", "'net.' put before"),
}  # fmt: skip


@pytest.mark.parametrize(("long", "short", "names", "if_longer", "if_shorter"), PREFIXED.values(), ids=PREFIXED.keys())
@pytest.mark.parametrize("longer", ["base", "tuned"])
def test_a_pair_whose_names_differ_by_a_prefix(
    tmp_path: Path, long: str, short: str, names: list[str], if_longer: str, if_shorter: str, longer: str
) -> None:
    base, tuned = layers_of(names), layers_of(names[::-1])
    prefixed = {name: long + name.removeprefix(short) for name in names}
    paths = {side: str(tmp_path / f"{side}.safetensors") for side in ("base", "tuned")}
    for side, tensors in (("base", base), ("tuned", tuned)):
        head = {"classifier.weight": matrix()} if side == longer else {}
        save_file({prefixed[n] if side == longer else n: t for n, t in tensors.items()} | head, paths[side])
    catalogue = open_source(**paths, alone=True)
    in_base = [prefixed[name] if longer == "base" else name for name in names]
    assert sorted(key for s in catalogue.stacks for key in s.keys) == sorted(in_base)
    for source in catalogue.stacks:
        updates = [tuned[names[in_base.index(key)]] - base[names[in_base.index(key)]] for key in source.keys]
        assert torch.equal(source.load(None, None).values, torch.stack(updates))
    other = "tuned" if longer == "base" else "base"
    assert catalogue.left_out == [("classifier.weight", f"in {paths[longer]} but not in {paths[other]}")]
    said = f"{if_longer if longer == 'tuned' else if_shorter} the names of {paths['tuned']}"
    assert catalogue.source == f"{paths['tuned']} minus {paths['base']} ({said})"


def test_a_prefix_is_put_only_before_names_that_begin_as_it_says(tmp_path: Path) -> None:
    """`tok` of the tuned checkpoint is not `model.text.tok`, though that has its shape."""
    prefix = Prefix(base="model.text.", tuned="model.")
    tuned = layers_of(["model.layers.0.q", "model.layers.1.q", "tok"])
    base = {prefix.in_base(name): t for name, t in layers_of(list(tuned)).items() if name != "tok"}
    save_file(base | {"model.text.tok": matrix()}, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    paths = {side: str(tmp_path / f"{side}.safetensors") for side in ("base", "tuned")}
    assert [name for name, _ in open_source(**paths).left_out] == ["model.text.tok", "tok"]


def test_a_pair_with_a_prefix_reads_from_disk_as_from_memory(tmp_path: Path) -> None:
    names = [f"layer.{i}.query" for i in range(16)]
    base, tuned = layers_of(names), layers_of(names[::-1])
    save_file(base, tmp_path / "base.safetensors")
    save_file({f"bert.{name}": tensor for name, tensor in tuned.items()}, tmp_path / "tuned.safetensors")
    pair = {side: str(tmp_path / f"{side}.safetensors") for side in ("base", "tuned")}
    (stack,) = open_source(**pair, memory=2048).stacks
    rows = [rows for _, _, rows in stack.load(None, None).tiles(rows=2)]
    assert torch.equal(torch.cat(rows), torch.cat([tuned[name] - base[name] for name in names]))


def test_a_copy_beside_layers_of_the_same_name_is_none_of_them(tmp_path: Path) -> None:
    """Such as a teacher or an average of weights."""
    base, tuned = layers_of(BERT), layers_of([*BERT, *(f"teacher.{name}" for name in BERT)])
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    pair = {side: str(tmp_path / f"{side}.safetensors") for side in ("base", "tuned")}
    catalogue = open_source(**pair, alone=True)
    assert {key for s in catalogue.stacks for key in s.keys} == set(BERT)
    assert {one.name for one in catalogue.left_out} == {f"teacher.{name}" for name in BERT}
    assert catalogue.source == f"{pair['tuned']} minus {pair['base']}"


VISION = [f"vision_tower.layers.{i}.fc.weight" for i in range(2)]
ARRANGED = {  # a part under the same name on both sides, another one moved
    "LLaVA": ("language_model.model.", "model.language_model.", "language_model.lm_head.weight", "lm_head.weight"),
    "one component more": ("", "text.", "text.lm_head.weight", "text.lm_head.weight"),
}


@pytest.mark.parametrize("name", ARRANGED)
@pytest.mark.parametrize("turned", [False, True])
def test_all_parts_of_a_pair_are_matched_where_one_has_kept_its_name(tmp_path: Path, name: str, turned: bool) -> None:
    old, new, old_head, new_head = ARRANGED[name]
    base = layers_of([*VISION, *(f"{old}layers.{i}.q.weight" for i in range(3)), old_head])
    tuned = layers_of([*VISION, *(f"{new}layers.{i}.q.weight" for i in range(3)), new_head][::-1])
    sides = {"base": tuned, "tuned": base} if turned else {"base": base, "tuned": tuned}
    for side, tensors in sides.items():
        save_file(tensors, tmp_path / f"{side}.safetensors")
    pair = {side: str(tmp_path / f"{side}.safetensors") for side in sides}
    catalogue = open_source(**pair, alone=True)
    assert catalogue.left_out == []
    assert {key for s in catalogue.stacks for key in s.keys} == set(sides["base"])
    first, other = (new, old) if turned else (old, new)
    (source,) = (s for s in catalogue.stacks if ".q." in s.name)
    expected = [sides["tuned"][other + key.removeprefix(first)] - sides["base"][key] for key in source.keys]
    assert torch.equal(source.load(None, None).values, torch.stack(expected))


def test_a_pair_of_which_half_has_no_partner_is_refused(tmp_path: Path) -> None:
    """The text layers are found under another name, and more layers remain on both sides that nothing connects."""
    base = layers_of([f"a.model.layers.{i}.q.weight" for i in range(2)] + [f"old.block.{i}.w" for i in range(3)])
    tuned = layers_of([f"model.a.layers.{i}.q.weight" for i in range(2)] + [f"new.unit.{i}.v" for i in range(3)])
    for side, tensors in (("base", base), ("tuned", tuned)):
        save_file(tensors, tmp_path / f"{side}.safetensors")
    with pytest.raises(InputError, match=r"match in part: 3 of 5 layers of the base, such as 'old.block.0.w'"):
        open_source(base=str(tmp_path / "base.safetensors"), tuned=str(tmp_path / "tuned.safetensors"))


def test_two_towers_that_fit_one_are_refused(tmp_path: Path) -> None:
    """Both towers of the tuned checkpoint have the ends and shapes of the one in the base."""
    base = layers_of([f"a.b.layers.{i}.q" for i in range(2)])
    tuned = layers_of([f"{tower}.layers.{i}.q" for tower in ("one.c", "two.d") for i in range(2)])
    for side, tensors in (("base", base), ("tuned", tuned)):
        save_file(tensors, tmp_path / f"{side}.safetensors")
    with pytest.raises(InputError, match=r"which layers correspond is unclear"):
        open_source(base=str(tmp_path / "base.safetensors"), tuned=str(tmp_path / "tuned.safetensors"))


def test_equal_names_without_a_number_do_not_hide_a_prefix_and_come_first(tmp_path: Path) -> None:
    base = layers_of(["layers.0.q", "layers.1.q", "lm_head.weight", "norms"])
    tuned = layers_of(["text.norms", "text.layers.1.q", "text.layers.0.q", "norms", "lm_head.weight"])
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    pair = {side: str(tmp_path / f"{side}.safetensors") for side in ("base", "tuned")}
    catalogue = open_source(**pair, alone=True)
    found = {s.name: s.load(None, None).values for s in catalogue.stacks}
    assert found.keys() == {"layers.*.q", "lm_head.weight", "norms"}
    assert torch.equal(found["norms"][0], tuned["norms"] - base["norms"])
    assert torch.equal(found["layers.*.q"][1], tuned["text.layers.1.q"] - base["layers.1.q"])
    assert catalogue.left_out == [("text.norms", f"in {pair['tuned']} but not in {pair['base']}")]


def test_a_prefix_that_is_not_the_only_one_is_refused_and_of_another_shape_is_none(tmp_path: Path) -> None:
    names = ["layers.0.q", "layers.1.q"]
    towers = layers_of([f"{tower}.{name}" for tower in ("text", "image") for name in names])
    save_file(layers_of(names), tmp_path / "one.safetensors")
    save_file(towers, tmp_path / "two.safetensors")
    one, two = str(tmp_path / "one.safetensors"), str(tmp_path / "two.safetensors")
    unclear = "which layers correspond is unclear, .* 'image.' {0} the names, and with 'text.' {0} the names of "
    with pytest.raises(InputError, match=unclear.format("taken off")):
        open_source(base=one, tuned=two)
    with pytest.raises(InputError, match=unclear.format("put before")):
        open_source(base=two, tuned=one)
    wider = {name: torch.ones(9, 9) for name in towers if name.startswith("image.")}
    save_file({**towers, **wider}, two)
    catalogue = open_source(base=one, tuned=two)
    assert [s.keys for s in catalogue.stacks] == [tuple(names)]
    assert {name for name, _ in catalogue.left_out} == {"image.layers.0.q", "image.layers.1.q"}


def test_two_different_models_are_no_pair(tmp_path: Path) -> None:
    small = {**layers_of(BERT), "norm": torch.ones(4)}
    large = {name: torch.ones(9, 9) if t.ndim == 2 else t for name, t in small.items()}
    other = {f"h.{i}.attn.weight": matrix() for i in range(2)} | {"norm": torch.ones(4)}
    paths = {name: str(tmp_path / f"{name}.safetensors") for name in ("small", "large", "other", "vectors")}
    for name, tensors in zip(paths, (small, large, other, {"h.0.b": torch.ones(4)}), strict=True):
        save_file(tensors, paths[name])
    one, another = min(BERT), "h.0.attn.weight"
    absent = "no matrix of {t}, such as {mine!r}, is in {b}, which has others, such as {theirs!r}"
    unequal = (
        "{t} and {b} have no matrix of the same name and shape: {mine!r}, for one, is (9, 9) in the one and (3, 4) "
    )
    for base, tuned, sentence in [
        ("small", "other", absent.format(t=paths["other"], b=paths["small"], mine=another, theirs=one)),
        ("other", "small", absent.format(t=paths["small"], b=paths["other"], mine=one, theirs=another)),
        ("small", "large", unequal.format(t=paths["large"], b=paths["small"], mine=one) + "in the other"),
    ]:
        with pytest.raises(InputError) as caught:
            open_source(base=paths[base], tuned=paths[tuned])
        assert str(caught.value) == f"{sentence}; give a model and what was fine-tuned from it, both in full"
    with pytest.raises(InputError, match=r"no stack remains \('h.0.b': in "):
        open_source(base=paths["vectors"], tuned=paths["small"])


def test_pair_needs_both_sides(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--base is given without --tuned"):
        open_source(base="x")
    with pytest.raises(InputError, match="--tuned is given without --base"):
        open_source(tuned="x")
    np.save(tmp_path / "a.npy", np.ones((2, 3, 4)))
    with pytest.raises(InputError, match=r"a.npy: a checkpoint is a .safetensors file or a directory of them"):
        open_source(base=str(tmp_path / "a.npy"), tuned=str(tmp_path / "a.npy"))


# ---------------------------------------------------------------------------------------------------- Conv1D

GPT2 = {"attn.c_attn": (4, 12), "attn.c_proj": (4, 4), "mlp.c_fc": (4, 16), "mlp.c_proj": (16, 4)}  # (in, out)


def gpt2_like(seed: int = 0, transposed: bool = False) -> dict[str, Tensor]:
    shapes = {name: shape[::-1] if transposed else shape for name, shape in GPT2.items()}
    return {
        f"transformer.h.{i}.{name}.weight": matrix(*shape, seed=100 * seed + 10 * i + j).float()
        for i in range(3)
        for j, (name, shape) in enumerate([*shapes.items(), ("other", (5, 4))])
    }


def save_checkpoint(directory: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None) -> str:
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    return str(directory)


@pytest.mark.parametrize(
    ("config", "transposed"),
    [
        ({"model_type": "gpt2"}, True),
        ({"model_type": "openai-gpt"}, True),
        ({"model_type": "imagegpt"}, True),
        ({"model_type": "decision_transformer"}, True),
        ({"model_type": "vision-encoder-decoder", "decoder": {"model_type": "gpt2"}}, True),
        ({"model_type": "qwen"}, False),
        ({"model_type": 3}, True),
        (None, True),
    ],
)
def test_conv1d_weights_are_seen_as_out_times_in(
    tmp_path: Path, config: dict[str, Any] | None, transposed: bool
) -> None:
    tensors = gpt2_like()
    path = save_checkpoint(tmp_path / "c", tensors, config)
    for source in (path, f"{path}/model.safetensors"):
        for found in open_source(source).stacks:
            stored = [tensors[key] for key in found.keys]
            kind = found.name.removeprefix("transformer.h.*.").removesuffix(".weight")
            assert found.keys == tuple(f"transformer.h.{i}.{kind}.weight" for i in range(3))
            assert found.transposed == (transposed and kind in GPT2)
            expected = torch.stack([t.mT for t in stored] if found.transposed else stored)
            stack = found.load(None, None)
            assert found.shape == stack.shape == tuple(expected.shape[1:])
            assert torch.equal(stack.values, expected)


def test_without_a_config_linear_modules_of_these_names_are_told_by_their_shape(tmp_path: Path) -> None:
    linear = gpt2_like(transposed=True)
    path = save_checkpoint(tmp_path / "c", linear, None)
    assert not any(s.transposed for s in open_source(path).stacks)
    only = save_checkpoint(tmp_path / "only", {k: t for k, t in linear.items() if "c_proj" in k}, None)
    assert all(s.transposed for s in open_source(only).stacks)
    same = save_checkpoint(tmp_path / "deep", {f"h.{i}.c_attn": torch.ones(2, 4, 4) * i for i in (1, 2)}, None)
    assert not any(s.transposed for s in open_source(same).stacks)  # (L, b, a) is no Conv1D weight


def test_a_pair_of_conv1d_checkpoints(tmp_path: Path) -> None:
    base, tuned = gpt2_like(0), gpt2_like(1)
    for n, configs in enumerate([(None, None), ({"model_type": "gpt2"}, None), ({}, {"model_type": "gpt2"})]):
        paths = [
            save_checkpoint(tmp_path / f"{name}{n}", tensors, config)
            for name, tensors, config in (("base", base, configs[0]), ("tuned", tuned, configs[1]))
        ]
        found = {s.name: s for s in open_source(base=paths[0], tuned=paths[1]).stacks}
        source = found["transformer.h.*.attn.c_attn.weight"]
        expected = torch.stack([(tuned[key] - base[key]).mT for key in source.keys])
        assert (source.shape, source.transposed) == ((12, 4), True)
        assert torch.equal(source.load(None, None).values, expected)
        assert not found["transformer.h.*.other.weight"].transposed
    (tmp_path / "tuned0" / "config.json").write_text('{"model_type": "qwen"}')
    pair = open_source(base=str(tmp_path / "base0"), tuned=str(tmp_path / "tuned0"))
    assert not any(s.transposed for s in pair.stacks)


@pytest.mark.slow
def test_results_of_a_transposed_stack_are_those_of_the_transposed_matrices(tmp_path: Path) -> None:
    tensors = {f"h.{i}.c_attn.weight": matrix(7, 12, seed=i) for i in range(4)}
    path = save_checkpoint(tmp_path / "c", tensors, None)
    seen, explicit = load(path)[0][0], LayerStack(torch.stack([t.mT for t in tensors.values()]), "explicit")
    assert seen.shape == explicit.shape == (12, 7)
    for stacks in ((seen, explicit), (normalised_layers(seen)[0], normalised_layers(explicit)[0])):
        lora = [solve_lora(stack, 3) for stack in stacks]
        assert lora[0].error == pytest.approx(lora[1].error, rel=1e-12)
        rasa = [
            solve_rasa(stack, RankBudget(3, 1), SolverOptions(start="allocation", max_sweeps=20)) for stack in stacks
        ]
        assert rasa[0].error == pytest.approx(rasa[1].error, rel=1e-6)
        assert rasa[0].factors.shared_B.shape == rasa[1].factors.shared_B.shape == (12, 4)
        assert reconstruction_error(stacks[1], rasa[0].factors) == pytest.approx(rasa[0].error, rel=1e-10)


def test_a_config_that_is_not_sound_is_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "c", gpt2_like(), None)
    for text in ("", "[]", "{" * 9999, '{"model_type": "gpt2", "model_type": "qwen"}'):
        (tmp_path / "c" / "config.json").write_text(text)
        with pytest.raises(
            InputError, match=r"config.json: not a sound file with one JSON object \(.*\); download or write it"
        ):
            open_source(path)


def test_the_keys_of_a_stack() -> None:
    assert [(s.keys, s.transposed) for s in open_source().stacks][:2] == [(("query",), False), (("key",), False)]


# --------------------------------------------------------------------------------------------------- bundled


def test_bundled_stacks_are_the_file_with_its_scale_undone() -> None:
    assert list(BUNDLED) == ["minilm-code", "mpnet-code"]
    stacks, left_out = load("minilm-code")
    assert [s.name for s in stacks] == ["query", "key", "value", "attention_output"]
    assert left_out == []
    file = importlib.resources.files("rasa_theory") / "data" / "minilm_code.safetensors"
    with importlib.resources.as_file(file) as path, safe_open(path, framework="pt") as tensors:
        for stack in stacks:
            s = int(tensors.metadata()[f"{stack.name}.log2_scale"])
            assert (stack.layers, stack.shape, stack.dtype) == (6, (384, 384), torch.float64)
            assert torch.equal(stack.values, torch.ldexp(tensors.get_tensor(stack.name).double(), torch.tensor(-s)))
            assert torch.equal(stack.values.float().double(), stack.values)  # exact in single precision too
    assert load("minilm-code", dtype="float32")[0][0].dtype == torch.float32


def test_bundled_provenance() -> None:
    facts = provenance("minilm-code")
    assert facts["model"] == "all-MiniLM-L6-v2"
    assert set(facts["kinds"]) == {s.name for s in open_source("minilm-code").stacks}
    with pytest.raises(InputError, match="no bundled set is named 'minilm'; there are: minilm-code, mpnet-code"):
        provenance("minilm")


def test_a_bundled_set_is_read_where_its_file_is_and_a_sentence_says_what_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.resources, "files", lambda package: tmp_path)
    for ask in (open_source, provenance):
        with pytest.raises(InputError, match=r"^the set mpnet-code is not in .* experiments.finetune --model mpnet --"):
            ask("mpnet-code")
    (tmp_path / "data").mkdir()
    values = {kind: 1e-6 * torch.rand(12, 7, 7) for kind in ("attention_output", "output", "query")}
    write_halves(values, tmp_path / "data" / "mpnet_code.safetensors")
    (tmp_path / "data" / "mpnet_code.json").write_text('{"model": "all-mpnet-base-v2"}', encoding="utf-8")
    stacks, left_out = load("mpnet-code")
    assert [stack.name for stack in stacks] == ["query", "attention_output", "output"]
    assert left_out == []
    assert all(torch.allclose(stack.values.float(), values[stack.name], rtol=2**-11, atol=0) for stack in stacks)
    assert provenance("mpnet-code") == {"model": "all-mpnet-base-v2"}


# -------------------------------------------------------------------------------------------------- refusals


def safetensors_bytes(header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


TENSOR = {"dtype": "F32", "shape": [1, 2, 2], "data_offsets": [0, 16]}
DAMAGED_SAFETENSORS = {
    "empty": b"",
    "giant header": safetensors_bytes({"a": TENSOR}, bytes(16), length=2**62),
    "random bytes": bytes(np.random.default_rng(0).integers(0, 256, 400, dtype=np.uint8)),
    "not JSON": safetensors_bytes(b"{]", bytes(16)),
    "truncated": safetensors_bytes({"a": TENSOR}, bytes(8)),
    "overlapping": safetensors_bytes({"a": TENSOR, "b": {**TENSOR, "data_offsets": [8, 24]}}, bytes(24)),
    "backwards": safetensors_bytes({"a": {**TENSOR, "data_offsets": [16, 0]}}, bytes(16)),
    "shape and size disagree": safetensors_bytes({"a": {**TENSOR, "shape": [9, 2, 2]}}, bytes(16)),
    "overflowing shape": safetensors_bytes({"a": {**TENSOR, "shape": [2**63, 2**63, 2]}}, bytes(16)),
    "pickle": pickle.dumps({"a": 1}),
}


@pytest.mark.parametrize("content", DAMAGED_SAFETENSORS.values(), ids=DAMAGED_SAFETENSORS.keys())
def test_damaged_safetensors_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.safetensors").write_bytes(content)
    for source in (tmp_path / "bad.safetensors", tmp_path):
        with pytest.raises(
            InputError, match=r"bad\.safetensors: not a sound safetensors file \(.+\); download or write"
        ):
            open_source(str(source))


def npy_bytes(shape: str, descr: str = "'<f8'", data: bytes = bytes(64)) -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


DAMAGED_NPY = {
    "empty": b"",
    "truncated header": npy_bytes("(2, 2, 2)")[:20],
    "truncated data": npy_bytes("(2, 2, 2)", data=bytes(30))[:-1],
    "giant": npy_bytes("(1000000, 1000000, 1000000)"),
    "negative": npy_bytes("(-2, 2, 2)"),
    "not a literal": npy_bytes("__import__('os')"),
    "unbalanced": npy_bytes("(" * 3000),
    "unknown dtype": npy_bytes("(2, 2, 2)", descr="'<q17'"),
    "unknown version": b"\x93NUMPY\x09\x00" + npy_bytes("(2, 2, 2)")[8:],
    "pickle": pickle.dumps(np.ones((2, 2, 2))),
}


@pytest.mark.parametrize("content", DAMAGED_NPY.values(), ids=DAMAGED_NPY.keys())
def test_damaged_arrays_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.npy").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "bad.npz", "w") as archive:
        archive.writestr("delta.npy", content)
    for name in ("bad.npy", "bad.npz"):
        with pytest.raises(InputError, match=rf"{name}: not a sound \.np[yz] file \(.+\); save numeric arrays again"):
            open_source(str(tmp_path / name))


def test_pickled_objects_are_never_opened(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
            return Path.touch, (tmp_path / "exploded",)

    content = npy_bytes("(1, 1, 1)", descr="'|O'", data=pickle.dumps(Bomb()))
    (tmp_path / "o.npy").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "o.npz", "w") as archive:
        archive.writestr("o.npy", content)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    for name in ("o.npy", "o.npz"):
        with pytest.raises(InputError, match=f"{name}: 'o' holds Python objects; pickles are never opened"):
            open_source(str(tmp_path / name))
    with pytest.raises(
        InputError, match=r"pytorch_model.bin: pickles are never opened.*; convert the file to safetensors"
    ):
        open_source(str(tmp_path / "pytorch_model.bin"))
    with pytest.raises(
        InputError, match=r"has no .safetensors file; pytorch_model.bin is a pickle, which is never opened"
    ):
        open_source(str(tmp_path))
    assert not (tmp_path / "exploded").exists()


def test_damaged_archives_are_refused_at_opening_or_loading(tmp_path: Path) -> None:
    np.savez(tmp_path / "good.npz", w=np.ones((2, 30, 40)))
    content = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"cut.npz: not a sound .npz file"):
        open_source(str(tmp_path / "cut.npz"))
    (tmp_path / "bit.npz").write_bytes(content[:2000] + b"\x01" + content[2001:])
    with pytest.raises(InputError, match=r"bit.npz: not a sound .npz file .*CRC"):
        load(str(tmp_path / "bit.npz"))


def test_sources_that_do_not_exist_or_hold_no_stack(tmp_path: Path) -> None:
    for name in ("nowhere", "", "x" * 5000, "a\0b"):
        with pytest.raises(InputError, match=r"does not exist; give a file, .* \(minilm-code, mpnet-code\)"):
            open_source(name)
    (tmp_path / "a.csv").write_text("1,2")
    with pytest.raises(InputError, match=r"kind of file '.csv' is not known; give a .safetensors, .npy or .npz file"):
        open_source(str(tmp_path / "a.csv"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"the directory has no .safetensors file$"):
        open_source(str(tmp_path / "empty"))
    np.save(tmp_path / "flat.npy", np.ones((3, 4)))
    with pytest.raises(
        InputError, match=r"flat.npy: expected one array with three axes \(layers, b, a\), found shape \(3, 4\)"
    ):
        open_source(str(tmp_path / "flat.npy"))
    np.save(tmp_path / "whole.npy", np.ones((2, 3, 4), dtype=int))
    with pytest.raises(InputError, match=r"no stack remains \('whole': int64 is not real floating point\)"):
        open_source(str(tmp_path / "whole.npy"))
    np.savez(tmp_path / "b.npz", **{f"b{i}": np.ones(3) for i in range(7)})
    with pytest.raises(InputError, match=r"no stack remains \('b0': 1 axis; .*'b4': 1 axis; [^;]*; and 2 more\)"):
        open_source(str(tmp_path / "b.npz"))
    np.savez(tmp_path / "none.npz")
    with pytest.raises(InputError, match="no stack remains \\(it holds no tensors\\)"):
        open_source(str(tmp_path / "none.npz"))


def test_values_that_are_not_finite_name_file_and_tensor(tmp_path: Path) -> None:
    tensors = layers_of(["h.3.w", "h.7.w"])
    save_file({"h.3.w": tensors["h.3.w"]}, tmp_path / "a.safetensors")
    tensors["h.7.w"][1, 2] = torch.nan
    save_file({"h.7.w": tensors["h.7.w"]}, tmp_path / "b.safetensors")
    with pytest.raises(
        InputError, match=r"b.safetensors: stack 'h.\*.w': layer 1, entry \(1, 2\) is nan.*\(tensor 'h.7.w'\)"
    ):
        load(str(tmp_path))
    np.save(tmp_path / "delta.npy", np.full((2, 3, 4), np.inf))
    with pytest.raises(InputError, match=r"delta.npy: stack 'delta': layer 0, entry \(0, 0\) is inf"):
        load(str(tmp_path / "delta.npy"))
    with pytest.raises(
        InputError, match=r"b.safetensors minus .*b.safetensors: stack 'h.\*.w': layer 1, entry \(1, 2\) is nan"
    ):
        open_source(base=str(tmp_path), tuned=str(tmp_path)).stacks[0].load(None, None)


# ------------------------------------------------------------------------------------------------- synthetic


@pytest.mark.parametrize(
    ("spectrum", "law"),
    [
        ("flat", lambda j: 1.0 + 0 * j),
        ("power:0.7", lambda j: j**-0.7),
        ("exp:0.3", lambda j: torch.exp(-0.3 * (j - 1))),
    ],
)
@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
def test_synthetic_spectrum_is_what_was_asked(spectrum: str, law: Any, shape: tuple[int, int]) -> None:
    for overlap in (0.0, 0.5, 1.0):
        stack = synthetic_stack(3, shape, spectrum, overlap)
        expected = law(torch.arange(1, 8, dtype=torch.float64)).expand(3, 7)
        assert (stack.layers, stack.shape, stack.dtype) == (3, shape, torch.float64)
        torch.testing.assert_close(torch.linalg.svdvals(stack.values), expected, rtol=1e-12, atol=1e-13)


def test_overlap_brings_the_layers_together() -> None:
    def distance(overlap: float) -> float:
        M = synthetic_stack(2, (20, 15), overlap=overlap).values
        return float((M[0] - M[1]).norm() / M[0].norm())

    assert distance(0.0) > distance(0.5) > distance(0.9) > distance(0.999) > 0.0
    assert distance(1 - 1e-8) < 1e-3  # continuous at 1
    assert distance(1.0) < 1e-14  # a batch of equal matrices may be rounded differently where memory is aligned so


def test_seeds_decide_and_the_global_state_does_not() -> None:
    torch.manual_seed(1)
    first, planted = synthetic_stack(2, (5, 4), seed=3), planted_stack(2, (5, 4), RankBudget(2, 1), 0.1, 3)[0]
    torch.manual_seed(2)
    assert torch.equal(first.values, synthetic_stack(2, (5, 4), seed=3).values)
    assert torch.equal(planted.values, planted_stack(2, (5, 4), RankBudget(2, 1), 0.1, 3)[0].values)
    assert not torch.equal(first.values, synthetic_stack(2, (5, 4), seed=4).values)


@pytest.mark.parametrize("budget", [RankBudget(3, 0), RankBudget(3, 1), RankBudget(3, 3)], ids=str)
def test_planted_factors_leave_exactly_the_noise(budget: RankBudget) -> None:
    clean, factors = planted_stack(4, (9, 8), budget)
    assert factors.private_B.shape == (4, 9, budget.private_rank)
    assert factors.mixing.shape == (4, budget.pool_rank(4))
    assert reconstruction_error(clean, factors) <= 1e-28 * clean.norm_squared
    for noise in (1e-3, 0.5):
        stack, same = planted_stack(4, (9, 8), budget, noise)
        assert torch.equal(same.mixing, factors.mixing)
        assert reconstruction_error(stack, same) == pytest.approx(noise**2 * clean.norm_squared, rel=1e-10)


@pytest.mark.parametrize(
    "spectrum", ["", "flat:1", "power", "power:", "power:x", "power:-1", "power:inf", "exp:nan", "log:2"]
)
def test_unknown_spectra_are_refused(spectrum: str) -> None:
    with pytest.raises(InputError, match=rf"spectrum '{spectrum}' is not flat, power:P or exp:C .* such as power:0.7"):
        singular_values(spectrum, 3)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"shape": (3, 0)}, r"shape must be two numbers B,A of at least 1, got \(3, 0\)"),
        ({"shape": (3,)}, r"shape must be two numbers B,A of at least 1, got \(3,\)"),
        ({"overlap": 1.5}, "overlap must lie between 0 and 1, got 1.5"),
        ({"overlap": float("nan")}, "overlap must lie between 0 and 1, got nan"),
        ({"seed": -1}, "seed must lie between 0 and"),
    ],
)
def test_synthetic_values_out_of_range_are_refused(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        synthetic_stack(**arguments)


def test_planted_values_out_of_range_are_refused() -> None:
    with pytest.raises(InputError, match=r"rank 5 exceeds min\(b, a\) = 4 of shape 6 x 4"):
        planted_stack(2, (6, 4), RankBudget(5, 1))
    with pytest.raises(InputError, match=r"noise must be finite and not negative, got -0.1"):
        planted_stack(2, (6, 4), RankBudget(2, 1), noise=-0.1)


def test_at_overlap_one_half_the_bases_share_half_of_their_energy() -> None:
    """sqrt(x) G + sqrt(1 - x) G_i, long columns: two layers' bases have the expected cosine x, here 1/2."""
    M = synthetic_stack(2, (4000, 2), spectrum="flat", overlap=0.5).values
    U = [torch.linalg.qr(m)[0] for m in M]
    cosines = torch.linalg.svdvals(U[0].mT @ U[1])
    assert cosines.tolist() == pytest.approx([0.5, 0.5], abs=0.05)


def test_the_factors_of_an_adapter_are_not_taken_for_updates() -> None:
    keys = [f"base_model.model.h.{i}.attn.lora_{f}.weight" for i in range(2) for f in "AB"]
    groups, left_out = group(
        [*(Entry(key, (4, 8), "float32") for key in keys), Entry("my.lora_Alpha", (2, 4, 8), "float32")]
    )
    assert [g.name for g in groups] == ["my.lora_Alpha"]
    assert [name for name, _ in left_out] == keys
    assert all("a factor of an adapter, not an update" in reason for _, reason in left_out)
