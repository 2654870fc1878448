"""Labels stay different, however little room there is, and keep what tells them apart."""

from __future__ import annotations

import pytest

from rasa_theory.common import aligned, shortened, unique_labels

PARTS = [f"{part}: layer.0.SelfAttention.{x}" for part in ("encoder", "decoder") for x in "qk"]


@pytest.mark.parametrize("width", [0, 5, 12, 14, 20, 26, 40])
def test_labels_that_differ_still_differ_when_they_are_short(width: int) -> None:
    short = shortened(PARTS, width)
    assert len(set(short)) == 4
    assert max(map(len, short)) <= max(width, len("encoder: ..k"))
    assert all(name.startswith(("encoder: ", "decoder: ")) for name in short)


def test_labels_take_the_room_that_they_need() -> None:
    assert shortened(["a.long.name.x", "a.long.name.y", "b"], 4) == ["...x", "...y", "b"]
    assert shortened(["left.tail", "right.tail"], 6) == ["left.tail", "..ht.tail"]
    assert shortened(["same", "same"], 9) == ["same", "same"]
    assert shortened([], 3) == []


def test_alike_names_are_told_apart_by_what_differs() -> None:
    long = ["model.encoder.layers.*.fc1", "model.decoder.layers.*.fc1", "head"]
    assert unique_labels(["fc1", "fc1", "head"], long) == ["encoder: fc1", "decoder: fc1", "head"]


def test_tables_grow_rather_than_confuse() -> None:
    lines = aligned([("kind", "n"), *((name, "1") for name in PARTS)], left={0}, gap=1, width=10)
    assert len({line.rpartition(" ")[0] for line in lines[2:]}) == 4
    assert max(map(len, lines)) == len("encoder: ..k 1")
