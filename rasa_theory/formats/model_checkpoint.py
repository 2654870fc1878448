"""A checkpoint under the names of its model: the parameters that its tensors become when transformers loads them.

Where transformers does not know the model, or is not installed, tensors keep the names that they have on the disk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from rasa_theory.common import InputError
from rasa_theory.formats.architecture import Architecture, Parameter, converted_shape
from rasa_theory.formats.checkpoint import Checkpoint
from rasa_theory.formats.orientation import oriented
from rasa_theory.formats.roles import Place, Role, place_by_name
from rasa_theory.formats.tensors import Entry, is_floating
from rasa_theory.problem import Part


class ModelCheckpoint:
    """The parameters of a model, read from a checkpoint by their name in the model.

    A parameter is one tensor of the checkpoint, or is made of several: a fused tensor of experts is read expert by
    expert, a part of a fused tensor is cut out of it. `entries` describes the parameters, each with its `place`: what
    it is in the model, and by what this was decided. With `architecture` None, `models` (values of `model_type`) and
    the names decide. With `convolutions`, those in two dimensions are read as matrices (out, in k k), but for those of
    one channel each, whose inputs the shape does not tell.
    """

    def __init__(
        self,
        disk: Checkpoint,
        architecture: Architecture | None,
        models: frozenset[str] = frozenset(),
        convolutions: bool = False,
    ) -> None:
        self._disk = disk
        self.path = disk.path
        self.left_out = disk.left_out
        shapes = {name: entry.shape for name, entry in disk.entries.items()}
        if architecture is None:
            self._parameters = {name: Parameter((name,)) for name in shapes}
        else:
            self._parameters = architecture.parameters(shapes)
        in_class = {} if architecture is None else {name: architecture.place(name) for name in self._parameters}
        if convolutions:
            in_class |= self._flatten_convolutions(in_class, shapes)
        entries = [self._entry(name, in_class.get(name), shapes) for name in self._parameters]
        turned = oriented((entry for entry in entries if in_class.get(entry.name) is None), models)
        self.entries = {entry.name: entry for entry in entries} | {entry.name: entry for entry in turned}

    def _flatten_convolutions(
        self, in_class: Mapping[str, Place | None], shapes: dict[str, tuple[int, ...]]
    ) -> dict[str, Place]:
        """Make matrices of the convolutions in two dimensions; return their places."""
        flat: dict[str, Place] = {}
        for name, parameter in self._parameters.items():
            shape = converted_shape(parameter, shapes)
            place = in_class.get(name) or place_by_name(name, shape)
            is_plain = parameter.made_of is None and len(shape) == 4 and shape[1] > 1
            if is_plain and place.role is Role.CONVOLUTION and name.endswith(".weight"):
                flat[name] = place._replace(role=Role.KERNELS, kernel=shape[2:])
        for name in flat:
            source = self._parameters[name].sources[0]
            self._parameters[name] = Parameter((source,), functools.partial(_flat, source))
        return flat

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that hold tensors, in order of their names."""
        return self._disk.files

    def file_of(self, name: str) -> str:
        """The file that holds the parameter, or the first of the tensors that it is made of."""
        return self._disk.file_of(self._parameters[name].sources[0])

    def read(self, name: str) -> Tensor:
        """The parameter as the model has it, in the dtype of the file. Raises InputError as `Checkpoint.read` does."""
        parameter = self._parameters[name]
        if parameter.made_of is None:
            return self._disk.read(parameter.sources[0])
        return parameter.made_of(self._disk.read)

    def is_in_file(self, name: str) -> bool:
        """Whether the parameter is one tensor of a file, as it is, so that `part` can read it."""
        return self._parameters[name].made_of is None

    def part(self, name: str) -> Part:
        """The rows of a parameter, read in blocks on demand.

        Raises InputError as `read` does, and for a parameter that is made of others: it has no rows in a file.
        """
        parameter = self._parameters[name]
        if parameter.made_of is not None:
            raise InputError(
                f"{self.file_of(name)}: {name!r} is made of {len(parameter.sources)} tensors of the file, and cannot "
                "be read in parts; allow more --memory"
            )
        return self._disk.part(parameter.sources[0])

    def _entry(self, name: str, place: Place | None, shapes: dict[str, tuple[int, ...]]) -> Entry:
        parameter = self._parameters[name]
        shape = converted_shape(parameter, shapes)
        dtype = _common_dtype([self._disk.entries[source].dtype for source in parameter.sources])
        place = place or place_by_name(name, shape)
        is_turned = (place.role is Role.CONV1D and len(shape) == 2) or place.role is Role.EXPERTS_TRANSPOSED
        return Entry(name, (*shape[:-2], *shape[:-3:-1]) if is_turned else shape, dtype, is_turned, place)


def _flat(source: str, read: Callable[[str], Tensor]) -> Tensor:
    """The weight of a convolution as the matrix (out, in k k)."""
    return read(source).flatten(1)


def _common_dtype(dtypes: list[str]) -> str:
    """The dtype that holds tensors of all these; one that cannot be computed with, if there is one."""
    for dtype in dtypes:
        if not is_floating(dtype):
            return dtype
    if len(set(dtypes)) == 1:
        return dtypes[0]
    return "float64" if "float64" in dtypes else "float32"
