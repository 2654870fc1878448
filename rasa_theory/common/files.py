"""Files that are written whole or not at all, folders that can be written to, and fingerprints of files."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from rasa_theory.common.errors import InputError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{16}")
_HEAD = 1 << 20  # bytes at the beginning of a file that its fingerprint covers: headers lie there


def write_file(path: Path, fill: Callable[[IO[bytes]], Any]) -> None:
    """Write a file whole or not at all. Raises InputError if that fails."""
    # The name exists before the file does: an interruption at any moment finds it in `finally`, and the file goes.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            fill(file)
        os.replace(temporary, path)
    except OSError as error:
        advice = "name another folder with --out"
        if error.errno in _NO_ROOM:
            advice = f"make room and give the same command again, or {advice}"
        raise InputError(f"cannot write {path}: {error.strerror or error}; {advice}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def unfinished(path: Path) -> str | None:
    """The name of the file whose writing `write_file` began as `path`; None if `path` is no such temporary file."""
    match = _TEMPORARY.fullmatch(path.name)
    return None if match is None else match[1]


def writable_folder(path: Path) -> Path:
    """Return the folder, made if need be. Raises InputError if it cannot be written to."""
    verb = "made"
    try:
        path.mkdir(parents=True, exist_ok=True)
        verb = "written to"
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise InputError(
            f"{path} is not a folder that can be {verb}: {error.strerror or error}; name another folder"
        ) from None
    return path


def identity(path: Path) -> dict[str, Any]:
    """The fingerprint of a file: its path, size, time of change, and a digest of its first MiB.

    A digest of the whole would mean reading checkpoints of many GiB. The head holds the names, types and offsets of all
    tensors; a change of entries alone shows in the time.
    """
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(_HEAD)).hexdigest()
    facts = path.stat()
    return {"file": str(path.resolve()), "bytes": facts.st_size, "modified_ns": facts.st_mtime_ns, "sha256": digest}
