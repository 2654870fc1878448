"""What users give for a stack: arrays, tensors and lists of them, names of dtypes and devices; checked here."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rasa_theory.common import InputError
from rasa_theory.problem.storage import Divided, Factored, InMemory, OnDisk, Storage

_COMPUTE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
_COMPUTE |= {torch.float32: torch.float32, torch.float64: torch.float64}


def compute_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """float32 or float64 from a name or a dtype; raises InputError for anything else."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.float64):
        raise InputError(f"dtype must be float32 or float64, got {dtype}", "dtype")
    return found


def compute_device(device: str | torch.device) -> torch.device:
    """The device of a name such as cpu, cuda, cuda:1, or auto (cuda if there is one, else cpu).

    Raises InputError if the name is unknown or the device is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise InputError(
            f"device {str(device)!r} is not available on this machine; use cpu or auto", "device"
        ) from None
    if found.type == "meta":
        raise InputError("device 'meta' holds no numbers; use cpu or auto", "device")
    return found


def as_storage(
    values: Any,
    name: str,
    dtype: str | torch.dtype | None,
    device: str | torch.device | None,
    held: int | None = None,
) -> tuple[Storage, torch.dtype, torch.device]:
    """Check axes and dtype; what holds the entries, and dtype and device to compute with.

    `held`: so many layers there must be, perhaps none; None: at least one.
    """
    place = None if device is None else compute_device(device)
    if isinstance(values, InMemory):
        values = values.values
    elif isinstance(values, OnDisk | Divided):
        computed = _COMPUTE[values.dtype] if dtype is None else compute_dtype(dtype)
        return values, computed, place or torch.device("cpu")
    elif isinstance(values, Factored):
        if held is None and values.shape[0] == 0:
            raise InputError(f"stack {name!r}: the factors are of no layer; at least one is needed")
        if values.dtype not in _COMPUTE:
            raise InputError(f"stack {name!r}: factors of {values.dtype} are not real floating point; convert them")
        values = values.to(_COMPUTE[values.dtype] if dtype is None else compute_dtype(dtype), place)
        return values, values.dtype, values.B.device
    if isinstance(values, Sequence) and not isinstance(values, str | bytes):
        M = _join([_as_tensor(m, f"stack {name!r}, layer {i}") for i, m in enumerate(values)], name)
    else:
        M = _as_tensor(values, f"stack {name!r}")
    if M.ndim != 3:
        raise InputError(f"stack {name!r}: expected three axes (layers, b, a), found shape {tuple(M.shape)}")
    if held is not None and len(M) != held:
        raise InputError(f"stack {name!r}: {len(M)} layers are given, but this process holds {held}; give those")
    if 0 in M.shape[held is not None :]:
        raise InputError(f"stack {name!r}: shape {tuple(M.shape)} is empty; every axis needs at least one entry")
    computed = _COMPUTE[M.dtype] if dtype is None else compute_dtype(dtype)
    M = M.to(device=place, dtype=computed if computed.itemsize < M.dtype.itemsize else M.dtype)
    return InMemory(M), computed, M.device


def _join(matrices: list[Tensor], name: str) -> Tensor:
    if not matrices:
        raise InputError(f"stack {name!r}: the list is empty; at least one matrix is needed")
    for i, m in enumerate(matrices):
        if m.ndim != 2:
            raise InputError(f"stack {name!r}: layer {i} has shape {tuple(m.shape)}; a layer is a (b, a) matrix")
        if m.shape != matrices[0].shape:
            raise InputError(
                f"stack {name!r}: layer {i} is {m.shape[0]} x {m.shape[1]}, "
                f"layer 0 is {matrices[0].shape[0]} x {matrices[0].shape[1]}; the layers of a stack have equal shapes"
            )
        if m.dtype != matrices[0].dtype or m.device != matrices[0].device:
            raise InputError(
                f"stack {name!r}: layer {i} is {m.dtype} on {m.device}, layer 0 {matrices[0].dtype} on "
                f"{matrices[0].device}; give all layers the same"
            )
    return torch.stack(matrices)


def _as_tensor(values: Any, what: str) -> Tensor:
    """A detached tensor of a real floating dtype that shares memory with `values` if it can."""
    if isinstance(values, Tensor):
        M = values.detach()
    else:
        try:
            array = np.asarray(values)
        except ValueError as error:
            raise InputError(f"{what}: not an array ({error})") from None
        if array.dtype.kind not in "fiubc":
            raise InputError(f"{what}: dtype {array.dtype} is not numeric; real floating point is needed")
        if array.dtype.kind == "f":
            native = array.dtype.newbyteorder("=")
            array = array.astype(np.float64 if native.itemsize > 8 else native, copy=False)
        if any(stride < 0 for stride in array.strides):
            array = array.copy()
        with warnings.catch_warnings():  # torch warns that a read-only array could be written; it never is
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            M = torch.from_numpy(array) if array.dtype.kind in "fc" else torch.as_tensor(array)
    if M.dtype not in _COMPUTE:
        raise InputError(f"{what}: dtype {str(M.dtype).removeprefix('torch.')} is not real floating point; convert it")
    if M.layout != torch.strided:
        raise InputError(f"{what}: a {M.layout} tensor; a dense one is needed")
    return M
