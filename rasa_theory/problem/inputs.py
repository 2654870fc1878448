"""Checks of the input for a stack: arrays, tensors, lists of matrices, names of dtypes and devices."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rasa_theory.common import InputError
from rasa_theory.problem.storage import Divided, Factored, InMemory, OnDisk, Storage, native

# The dtype of the computation for each stored dtype: half precisions are too narrow for sums of squares.
_COMPUTE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
_COMPUTE |= {torch.float32: torch.float32, torch.float64: torch.float64}


def compute_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return float32 or float64 from a name or a dtype; raise InputError for anything else."""
    computed = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if computed not in (torch.float32, torch.float64):
        raise InputError(f"dtype must be float32 or float64, got {dtype}", "dtype")
    return computed


def compute_device(device: str | torch.device) -> torch.device:
    """Return the device with a name such as cpu, cuda, cuda:1, or auto (cuda if there is one, else cpu).

    Raises InputError if the name is unknown or the device is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise InputError(
            f"device {str(device)!r} is not available on this machine; use cpu or auto", "device"
        ) from None
    if place.type == "meta":
        raise InputError("device 'meta' holds no numbers; use cpu or auto", "device")
    return place


def as_storage(
    values: Any,
    name: str,
    dtype: str | torch.dtype | None,
    device: str | torch.device | None,
    local_layers: int | None = None,
) -> tuple[Storage, torch.dtype, torch.device]:
    """Check axes and dtype; return the storage of the entries, and the dtype and device of the computation.

    `local_layers` is the required number of layers, which may be 0. None: any number from 1 on.
    """
    place = None if device is None else compute_device(device)
    if isinstance(values, InMemory):
        values = values.values
    elif isinstance(values, OnDisk | Divided):
        computed = _COMPUTE[values.dtype] if dtype is None else compute_dtype(dtype)
        return values, computed, place or torch.device("cpu")
    elif isinstance(values, Factored):
        if local_layers is None and values.shape[0] == 0:
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
    if local_layers is not None and len(M) != local_layers:
        raise InputError(
            f"stack {name!r}: {len(M)} layers are given, but this process holds {local_layers}; give those"
        )
    if 0 in M.shape[local_layers is not None :]:  # a process may hold no layers, but b and a are never 0
        raise InputError(f"stack {name!r}: shape {tuple(M.shape)} is empty; every axis needs at least one entry")
    computed = _COMPUTE[M.dtype] if dtype is None else compute_dtype(dtype)
    M = M.to(device=place, dtype=computed if computed.itemsize < M.dtype.itemsize else M.dtype)
    return InMemory(M), computed, M.device


def _join(matrices: list[Tensor], name: str) -> Tensor:
    """Stack the matrices of all layers, (L, b, a). They must agree in shape, dtype and device."""
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


def _as_tensor(values: Any, label: str) -> Tensor:
    """Return a detached tensor of a real floating dtype, which shares memory with `values` if it can.

    Messages begin with `label`.
    """
    if isinstance(values, Tensor):
        M = values.detach()
    else:
        try:
            array = np.asarray(values)
        except ValueError as error:
            raise InputError(f"{label}: not an array ({error})") from None
        if array.dtype.kind not in "fiubc":
            raise InputError(f"{label}: dtype {array.dtype} is not numeric; real floating point is needed")
        if array.dtype.kind == "f":
            array = array.astype(native(array.dtype), copy=False)
        if any(stride < 0 for stride in array.strides):  # torch has no negative strides
            array = array.copy()
        with warnings.catch_warnings():  # torch warns that a read-only array could be written; it never is
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            M = torch.from_numpy(array) if array.dtype.kind in "fc" else torch.as_tensor(array)
    if M.dtype not in _COMPUTE:
        raise InputError(f"{label}: dtype {str(M.dtype).removeprefix('torch.')} is not real floating point; convert it")
    if M.layout != torch.strided:
        raise InputError(f"{label}: a {M.layout} tensor; a dense one is needed")
    return M
