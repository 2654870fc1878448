"""Names of many things that are told apart, also where there is little room."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence


def unique_labels(short: Sequence[str], long: Sequence[str]) -> list[str]:
    """The short names; where one occurs several times, what tells the long ones apart stands before it.

    Of `model.encoder.layers.*.fc1` and `model.decoder.layers.*.fc1` that is `encoder` and `decoder`.
    """
    labels = list(short)
    for name in {name for name in short if short.count(name) > 1}:
        alike = [i for i, one in enumerate(short) if one == name]
        parts = [long[i].split(".") for i in alike]
        start = _common(parts)
        stop = _common([part[start:][::-1] for part in parts])
        for i, part in zip(alike, parts, strict=True):
            labels[i] = f"{'.'.join(part[start : len(part) - stop])}: {name}"
    return labels


def _common(lists: Sequence[Sequence[str]]) -> int:
    """The number of components at the beginning that all lists share."""
    return next((n for n, column in enumerate(zip(*lists, strict=False)) if len(set(column)) > 1), min(map(len, lists)))


def columns_of(text: str) -> int:
    """The number of columns that a text takes in a terminal, where East Asian characters take two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def shortened(labels: Sequence[str], width: int) -> list[str]:
    """The labels in at most `width` characters, or as many more as it takes for different ones to stay different.

    A label that is too long loses its beginning, for which ".." stands. What tells it from others and ends in a colon,
    as in "decoder: layer.0.SelfAttention.q", is left whole.
    """
    for room in range(width, max(map(columns_of, labels), default=0)):
        short = [_shortened(label, room) for label in labels]
        if len(set(short)) == len(set(labels)) and max(map(columns_of, short)) <= room:
            return short
    return list(labels)


def _shortened(label: str, width: int) -> str:
    if columns_of(label) <= width:
        return label
    group, colon, name = label.rpartition(": ")
    room = width - columns_of(group + colon) - len("..")
    end = next((name[n:] for n in range(len(name)) if columns_of(name[n:]) <= room), name[-1:])
    return f"{group}{colon}..{end}"
