"""The entrance to all sources: bundled sets, numpy files, checkpoints and pairs of them, and adapters."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from rasa_theory.common import InputError, whole_number
from rasa_theory.formats import CONFIG_FILE, MLX_WEIGHTS, PICKLES, WEIGHTS_FILE, LeftOut, adapter_folder
from rasa_theory.problem import LayerStack, compute_device, compute_dtype
from rasa_theory.sources.adapters import open_adapter, open_adapters
from rasa_theory.sources.arrays import open_npy, open_npz
from rasa_theory.sources.bundled import BUNDLED, DEFAULT, open_bundled
from rasa_theory.sources.catalogue import Catalogue
from rasa_theory.sources.hub import is_hub_id, snapshot
from rasa_theory.sources.pair import open_pair
from rasa_theory.sources.update_files import open_checkpoint


def open_source(
    source: str = DEFAULT,
    *,
    base: str | None = None,
    tuned: str | None = None,
    adapters: Sequence[str] | None = None,
    memory: int | None = None,
    alone: bool = False,
    convolutions: bool = False,
) -> Catalogue:
    """List the stacks of a source without reading their values.

    `base` with `tuned`, or `adapters`, take the place of `source`. A checkpoint may also be named by its id on the Hub,
    `org/name` or `org/name@revision`. The index of a checkpoint directory decides which of its files are read.
    Matrices of checkpoints are (out, in), that is (b, a), also where the file has them as (in, out), as in GPT-2.

    Arguments:
        source: name of a bundled set, a `.npy`, `.npz` or `.safetensors` file, or the directory of a checkpoint or an
            adapter.
        base: the checkpoint before fine-tuning. The stacks are then tuned - base.
        tuned: the checkpoint after fine-tuning.
        adapters: folders of two or more LoRA adapters of one base. There is one stack per module, over the adapters.
        memory: limit in bytes on the allocations for a stack, as for `LayerStack`. A stack larger than a quarter of it
            stays in its file, and every pass reads it once. None: no limit.
        alone: make a stack of one layer of a matrix that is the only one of its kind.
        convolutions: read convolutions in two dimensions as matrices.

    Returns:
        The stacks, which can be selected by name and loaded one at a time, and the tensors left out.

    Raises:
        InputError: the source is missing, unknown or damaged, or holds no stack.
    """
    if memory is not None and whole_number("memory", memory) < 1:
        raise InputError(f"memory must be at least 1 byte, got {memory}")
    if adapters is not None:
        if base is not None or tuned is not None:
            raise InputError("--adapters and --base with --tuned exclude each other; give one of them")
        return open_adapters(_existing(adapters, "the folders of PEFT LoRA adapters"), memory)
    if base is not None and tuned is not None:
        before, after = _here_or_hub([base, tuned], "a .safetensors file or a directory of them")
        _refuse_adapters((before, after))
        return open_pair(before, after, memory, alone, convolutions)
    if base is not None or tuned is not None:
        present, missing = ("--base", "--tuned") if tuned is None else ("--tuned", "--base")
        raise InputError(f"{present} is given without {missing}; an update is the difference of the two")
    if source in BUNDLED:
        return open_bundled(source, memory)
    (path,) = _here_or_hub([source], f"a file, a directory or a bundled set ({', '.join(BUNDLED)})")
    if (folder := adapter_folder(path)) is not None:
        return open_adapter(folder, memory, alone)
    suffix = path.suffix.lower()
    if path.is_dir() or suffix in (".safetensors", ".gguf", *PICKLES):
        return open_checkpoint(path, memory, alone, convolutions)
    if suffix == ".npy":
        return open_npy(path, memory)
    if suffix == ".npz":
        return open_npz(path, memory)
    raise InputError(
        f"{source}: the kind of file {suffix!r} is not known; give a .safetensors, .npy or .npz file, "
        f"the directory of a checkpoint or adapter, or a bundled set ({', '.join(BUNDLED)})"
    )


def load(
    source: str = DEFAULT,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    memory: int | None = None,
) -> tuple[list[LayerStack], list[LeftOut]]:
    """Load all stacks of updates that a source holds.

    Tensors (L, b, a) are stacks. Matrices are grouped by name: the number after `layers`, `layer`, `h`, `block` or
    `blocks` is the layer, and layers of unequal shape form separate stacks.

    Arguments:
        source: name of a bundled set (the default), or a path: a `.npy`, `.npz` or `.safetensors` file, the directory
            of a checkpoint of updates, or the folder of a PEFT LoRA adapter.
        dtype: dtype of the computation, "float32" or "float64"; None takes the input's, and float32 for half precision.
        device: device of the computation, such as "cuda"; None stays on the CPU.
        memory: limit of the allocations for one stack, in bytes; larger stacks stay in their file. None sets no limit.

    Returns:
        The stacks, and the tensors left out as pairs (name, reason).

    Raises:
        InputError: the source is missing, unknown or damaged, holds no stack, or an entry is infinite or NaN. The
            message names the file.
    """
    catalogue = open_source(source, memory=memory)
    target = None if dtype is None else compute_dtype(dtype)
    place = None if device is None else compute_device(device)
    return [stack.load(target, place) for stack in catalogue.stacks], catalogue.left_out


def _existing(sources: Sequence[str], wanted: str) -> list[Path]:
    """The paths of these files or folders. Raises InputError, naming all that do not exist."""
    names = [os.path.expanduser(source) for source in sources]
    # unlike Path.exists, os.path.exists is False also for the empty name and for impossible ones
    if missing := [repr(s) for s, name in zip(sources, names, strict=True) if not os.path.exists(name)]:
        raise InputError(f"{' and '.join(missing)} {'does' if len(missing) == 1 else 'do'} not exist; give {wanted}")
    return [Path(name) for name in names]


def _here_or_hub(sources: Sequence[str], wanted: str) -> list[Path]:
    """The paths of these, or of their snapshots from the Hub. Raises InputError as `_existing` and `snapshot` do."""
    names = [os.path.expanduser(source) for source in sources]
    return _existing([str(snapshot(n)) if not os.path.exists(n) and is_hub_id(n) else n for n in names], wanted)


def _refuse_adapters(models: Sequence[Path]) -> None:
    """Raise InputError if a model of a pair is the folder of an adapter: a difference of factors is no update."""
    for path in models:
        if (path / CONFIG_FILE).is_file() and {x.name for x in path.glob("*.safetensors")} <= {
            WEIGHTS_FILE,
            MLX_WEIGHTS,
        }:
            raise InputError(
                f"{path} is the folder of an adapter, not a model; merge it into its base first, or give it alone as "
                "--source, or several as --adapters"
            )
