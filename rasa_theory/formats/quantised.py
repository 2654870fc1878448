"""Quantised weights: recognised by their dtype, by the tensors beside them, and named as their config.json does."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from rasa_theory.common import InputError
from rasa_theory.formats.tensors import Entry

_WHOLE = re.compile(r"[iu](?:8|16|32|64)|u?int(?:8|16|32|64)")
_NARROW = re.compile(r"float(?:8|6|4)(?![0-9])")
_WEIGHT = re.compile(r"(?:\A|\.)(?:weight|kernel)\Z")
_SCALE = re.compile(r"\.\w*scales?\w*\Z")
_DEQUANTISE = (
    "load it with transformers, call dequantize() and save it, or take the model from which it was made: both models "
    "must be in bfloat16 or wider"
)
_TAKE_WIDER = "rounding to so few bits is larger than most updates: give both models in bfloat16 or wider"

_MARKS = [
    (scheme, re.compile(rf"[._](?:{mark})\Z"))
    for scheme, mark in (
        ("GPTQ", "g_idx"),
        ("GPTQ or AWQ", "qweight|qzeros"),
        ("bitsandbytes, 4 bits", r"quant_state\.bitsandbytes__\w+|absmax|quant_map"),
        ("bitsandbytes, 8 bits", "SCB|weight_format"),
        ("FP8 in blocks", "weight_scale_inv"),
        ("NVFP4", "weight_scale_2|weight_global_scale"),
        ("compressed-tensors", "weight_packed"),
        ("MXFP4", "proj_blocks"),
        ("HQQ", "W_q"),
        ("AQLM", "codebooks"),
        ("QuIP#", "Qidxs"),
        ("VPTQ", r"centroids\.weight"),
        ("GPTQ as Marlin packs it", "B"),
        ("quanto", "_data"),
        ("torchao", "int_data|qdata"),
        ("MLX", "biases"),
    )
]
"""Ends of names that only the tensors of one scheme have, beside (or as) a tensor of whole or narrow numbers."""


class _Finding(NamedTuple):
    """The scheme of quantised weights in words, a tensor that shows it, and what to do."""

    scheme: str
    example: Entry
    remedy: str = _DEQUANTISE


def refuse_quantised(path: Path, entries: Iterable[Entry], config: dict[str, Any]) -> None:
    """Raise InputError, naming the scheme, if a checkpoint holds quantised weights. `config` is its config.json.

    The config alone does not decide, for it may be left over from before a conversion. Tensors do.
    """
    entries = list(entries)
    packed = sorted(e.name for e in entries if len(e.shape) >= 2 and (_is_whole(e) or _is_narrow(e)))
    finding = _marked(entries, packed) or _by_dtype(entries)
    if finding is None:
        return
    scheme, example, remedy = finding
    if (method := _method(config)) is not None:
        scheme += f"; {method} in its config.json"
    raise InputError(
        f"{path}: its weights are quantised ({scheme}), for example {example.name!r}, {example.dtype}; {remedy}"
    )


def _marked(entries: list[Entry], packed: list[str]) -> _Finding | None:
    """The first scheme with a mark beside a tensor in `packed` (sorted names), and the tensor that shows it."""
    for scheme, mark in _MARKS:
        for entry in entries:
            if (match := mark.search(entry.name)) is not None:
                module = entry.name[: match.start()]
                place = bisect_left(packed, module)
                if place < len(packed) and packed[place].startswith(module):
                    return _Finding(scheme, entry)
    return None


def _by_dtype(entries: list[Entry]) -> _Finding | None:
    """A weight of whole numbers, or of floats below 16 bits, and the scheme as far as its neighbours tell."""
    scaled = {entry.name[: match.start()] for entry in entries if (match := _SCALE.search(entry.name)) is not None}
    for entry in entries:
        if len(entry.shape) < 2 or not (_is_narrow(entry) or _is_whole(entry)):
            continue
        is_scaled, is_weight = entry.name.rpartition(".")[0] in scaled, _WEIGHT.search(entry.name) is not None
        if is_scaled and (is_weight or _is_narrow(entry)):
            return _Finding("FP8 or integers with scales", entry)
        if is_weight and _is_narrow(entry):
            return _Finding("cast to 8 bits or fewer, with no scales", entry, _TAKE_WIDER)
        if is_weight:
            return _Finding("integers", entry)
    return None


def _is_whole(entry: Entry) -> bool:
    return _WHOLE.fullmatch(entry.dtype) is not None


def _is_narrow(entry: Entry) -> bool:
    return _NARROW.match(entry.dtype) is not None


def _method(config: dict[str, Any]) -> str | None:
    """The method that a config.json names; None if it names none."""
    settings = config.get("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    return method if isinstance(method, str) else None
