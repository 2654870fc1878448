"""The folder of an extraction: what is finished of it, whether it may go on, and its final files."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save

from rasa_theory.console import write_file
from rasa_theory.errors import InputError
from rasa_theory.exports import join_safetensors, lora_config, rasa_config
from rasa_theory.extraction import Extracted


class Workplace:
    """The folder of an extraction: what is finished of it, and whether it may go on.

    `plan` is what must not change between two runs that share the folder: settings, inputs, the stacks. Parts lie in
    `parts` until all are there. Raises InputError if the folder belongs to another plan.
    """

    def __init__(self, out: Path, plan: dict[str, Any]) -> None:
        self.out, self.plan, self.parts = out, plan, out / "parts"
        self.finished = False
        for name in ("report.json", "parts/manifest.json"):
            if not (out / name).exists():
                continue
            known = _read_json(out / name)
            if known.get("plan") != plan:
                changed = next((key for key in plan if known.get("plan", {}).get(key) != plan[key]), "plan")
                raise InputError(
                    f"{out} holds an extraction with other {changed}; name another folder with --out, or delete it"
                )
            self.finished |= name == "report.json"
        if not self.finished:
            self.parts.mkdir(parents=True, exist_ok=True)
            if not (self.parts / "manifest.json").exists():
                write_file(
                    self.parts / "manifest.json", lambda f: f.write(json.dumps({"plan": plan}, indent=1).encode())
                )

    def row(self, n: int) -> dict[str, Any] | None:
        """The row of the n-th stack, if it is finished."""
        path = self.parts / f"{n:05d}.json"
        return _read_json(path) if path.exists() else None

    def add(self, n: int, extracted: Extracted) -> None:
        """Write the tensors of the n-th stack and then its row, which says that they are there."""
        write_file(self.tensors(n), lambda f: f.write(save(extracted.tensors)))
        text = json.dumps(extracted.row, allow_nan=False)
        write_file(self.parts / f"{n:05d}.json", lambda f: f.write(text.encode()))

    def tensors(self, n: int) -> Path:
        """Where the tensors of the n-th stack lie: dense ones in their final place."""
        if self.plan["settings"]["format"] == "diff":
            return self.out / f"diff-{n + 1:05d}.safetensors"
        return self.parts / f"{n:05d}.safetensors"

    def finish(self, rows: Sequence[dict[str, Any]], base: str | None) -> None:
        """The adapter as one file with its configuration; for dense differences the index of their files."""
        settings, parts = self.plan["settings"], [self.tensors(n) for n in range(len(rows))]
        if settings["format"] == "diff":
            files = {key: part.name for part in parts for key in _keys(part)}
            index = {"metadata": {"rasa_theory": "tuned - base, reconstructed"}, "weight_map": files}
            write_file(
                self.out / "diff.safetensors.index.json", lambda f: f.write(json.dumps(index, indent=1).encode())
            )
            return
        ranks = {name: rank for row in rows for name, rank in row["ranks"].items()}
        transposed = any(row["transposed"] for row in rows)
        if settings["format"] == "rasa":
            config = rasa_config(list(ranks), settings["rank"], settings["k"], transposed, base)
        else:
            config = lora_config(ranks, transposed, base)
        write_file(self.out / "adapter_model.safetensors", lambda f: join_safetensors(parts, f, {"format": "pt"}))
        write_file(self.out / "adapter_config.json", lambda f: f.write(json.dumps(config, indent=1).encode()))

    def clear(self) -> None:
        """Remove the parts, which the finished files have made superfluous."""
        shutil.rmtree(self.parts, ignore_errors=True)


def identity(path: Path) -> dict[str, Any]:
    """What tells whether a safetensors file has changed: size, time, and the digest of its header."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        digest = hashlib.sha256(file.read(size)).hexdigest()
    facts = path.stat()
    return {"file": str(path), "bytes": facts.st_size, "modified_ns": facts.st_mtime_ns, "header_sha256": digest}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); delete it to begin anew") from None
    return found if isinstance(found, dict) else {}


def _keys(path: Path) -> Iterator[str]:
    with safe_open(path, framework="pt") as tensors:
        yield from tensors.keys()
