"""Files written whole or not at all, what tells one from another, and the lock of a folder."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from rasa_theory.common.errors import InputError

if sys.platform != "win32":
    import fcntl

_FULL = (errno.ENOSPC, errno.EDQUOT)


_UNFINISHED = re.compile(r"\.(.+)\.[0-9a-f]{16}")


def unfinished(path: Path) -> str | None:
    """The name of the file that `write_file` has not finished there; None if it is no such one."""
    found = _UNFINISHED.fullmatch(path.name)
    return None if found is None else found[1]


def write_file(path: Path, fill: Callable[[IO[bytes]], Any]) -> None:
    """Write a file whole or not at all. Raises InputError if that fails."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")  # named before it is there: interrupted, it goes
    try:
        with temporary.open("xb") as file:
            fill(file)
        os.replace(temporary, path)
    except OSError as error:
        advice = "name another folder with --out"
        if error.errno in _FULL:
            advice = f"make room and give the same command again, or {advice}"
        raise InputError(f"cannot write {path}: {error.strerror or error}; {advice}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def writable_folder(path: Path) -> Path:
    """The folder itself, made if need be. Raises InputError if it cannot be written."""
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


_BEGINNING = 1 << 20  # bytes


def locked(path: Path) -> IO[bytes] | None:
    """The file, locked until it is closed or the process ends, however that may be; None where there are no locks.

    Raises InputError if another process has locked it, or has just removed it with the folder that it was in.
    """
    if sys.platform == "win32":
        return None
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        alone = path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
    except BlockingIOError:
        alone = False
    except OSError:  # a file system that knows none
        alone = True
    if not alone:
        file.close()
        raise InputError(
            f"another process is extracting into {path.parent.parent}; wait for it, or name another folder"
        )
    return file


def identity(path: Path) -> dict[str, Any]:
    """What tells whether a file has changed: size, time, and a digest of its beginning, where headers are."""
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(_BEGINNING)).hexdigest()
    facts = path.stat()
    return {"file": str(path.resolve()), "bytes": facts.st_size, "modified_ns": facts.st_mtime_ns, "sha256": digest}
