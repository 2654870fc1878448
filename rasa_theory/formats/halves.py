"""Updates in half precision: a tensor times a power of two, which the metadata of its safetensors file names.

Updates are small: entries of 1e-5 would lose most of their bits to the smallest numbers of half precision. The power of
two puts the largest entry of a tensor just below 2^14, so that entries down to 2^-28 of it keep all 11 bits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from rasa_theory.common import InputError, UnsoundFile, write_file
from rasa_theory.formats.safetensors import Header, write_safetensors
from rasa_theory.problem import Part

_KEY = "{}.log2_scale"
_EXPONENT = re.compile(r"-?[0-9]{1,3}")
_MOST = 999  # in absolute value, by _EXPONENT
_TOP = 14  # half precision ends just below 2^16


def write_halves(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write each tensor times a power of two, in half precision, whole or not at all.

    Raises InputError if an entry is infinite or NaN, all are below 1e-296, or the file cannot be written.
    """
    halves, metadata = {}, {}
    for name, tensor in tensors.items():
        largest = float(tensor.abs().max())
        if not math.isfinite(largest):
            raise InputError(f"{name}: an entry is infinite or NaN, which is no update of a trained model")
        s = _TOP - math.frexp(largest)[1]
        if abs(s) > _MOST:
            raise InputError(f"{name}: the largest entry is {largest:.3g}, which no scale of this format reaches")
        halves[name] = (tensor.detach().cpu().double() * 2.0**s).half()
        metadata[_KEY.format(name)] = str(s)
    write_file(path, lambda file: write_safetensors(halves, file, metadata))


def scale_of(header: Header, key: str) -> int | None:
    """The s of a tensor that the file holds times 2^s; None if it holds the tensor itself.

    Raises UnsoundFile if that is no whole number of at most three digits.
    """
    text = header.metadata.get(_KEY.format(key))
    if text is None:
        return None
    if not _EXPONENT.fullmatch(text):
        raise UnsoundFile(
            f"{header.file}: the scale of {key!r} is {text[:20]!r}, no whole number", "write the file again"
        )
    return int(text)


def unscaled(tensor: Tensor, s: int) -> Tensor:
    """The tensor times 2^-s in float64, where this is exact for what is in half precision."""
    return tensor.double() * 2.0**-s


@dataclass(frozen=True)
class UnscaledRows:
    """The rows of a tensor that its file holds times 2^s, in float64."""

    rows: Part
    s: int

    def read(self, start: int, stop: int) -> Tensor:
        return unscaled(self.rows.read(start, stop), self.s)
